"""Graph optimisation: from an fp32 bundle to a new one with fused attention and normalisation.

``onnxruntime.transformers`` does the fusing. It often pays on a GPU and can cost speed on a CPU, so the fused bundle is
written beside the plain one, and both record their speed.
"""

from __future__ import annotations

from pathlib import Path

from qadeploy.errors import FailureError
from qadeploy.export.finishing import finish_bundle
from qadeploy.export.fusion import FUSED_TYPES, fuse_file
from qadeploy.export.reference import Reference
from qadeploy.inference.bundle import MODEL, Bundle, open_bundle, writing_bundle
from qadeploy.machine import return_freed_memory

ATTENTION = ("Attention", "MultiHeadAttention")  # each node is a layer's whole attention
_COUNTED = (
    *ATTENTION, "RotaryEmbedding", "EmbedLayerNormalization", "SkipLayerNormalization", "LayerNormalization", "BiasGelu",
    "FastGelu", "Gelu",
)  # fmt: skip


def optimize(reference: Reference, source: Bundle, out: Path) -> Bundle:
    """Writes the fused bundle ``out`` from the fp32 bundle ``source`` and returns it, verified.

    Raises FailureError if no fusion is known for the model or nothing fused, GateError if its logits move too far.
    """
    architecture = source.manifest["architecture"]
    kind = architecture["model_type"]
    if kind not in FUSED_TYPES:
        raise FailureError(f"ONNX Runtime's graph optimisation has no fusions for {kind} models")
    with writing_bundle(out) as work:
        reference.count(0, 1, " fusing the graph")
        return_freed_memory()  # from the exported model's sessions
        (work / MODEL).write_bytes(source.read(MODEL))
        counts = fuse_file(work / MODEL, architecture)
        report = {name: counts.get(name, 0) for name in _COUNTED}
        if not any(report.values()):
            raise FailureError(f"ONNX Runtime's graph optimisation fused nothing in this {kind} model")
        made = {"graph": "fused", "from": source.name, "fused_nodes": report, "layers": architecture["layers"] or 0}
        finish_bundle(reference, work, out.name, precision="fp32", made=made)
    return open_bundle(out)


def fusion_line(bundle: Bundle) -> str:
    """What was fused, in one line: attention nodes compared with layers."""
    made = bundle.manifest["made"]
    nodes = ", ".join(f"{count} {name}" for name, count in made["fused_nodes"].items() if count)
    attentions = sum(made["fused_nodes"][name] for name in ATTENTION)
    line = f"fused {attentions} of {made['layers']} attention layers ({nodes})"
    if attentions < made["layers"]:
        line += ": not every attention layer has a form that ONNX Runtime knows"
    return line
