"""Graph optimisation: from an fp32 bundle to a new one with fused attention and normalisation.

``onnxruntime.transformers`` does the fusing. It often pays on a GPU and can cost speed on a CPU, so the fused bundle is
written beside the plain one, and both record their speed.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx

from qadeploy.errors import FailureError
from qadeploy.export.fusion import fuse, has_fusions
from qadeploy.export.manifest import finish_bundle
from qadeploy.export.reference import Reference
from qadeploy.inference.bundle import MODEL, Bundle, open_bundle, writing_bundle

ATTENTION = ("Attention", "MultiHeadAttention")  # each is the whole of a layer's
_COUNTED = (
    *ATTENTION,
    "RotaryEmbedding",
    "EmbedLayerNormalization",
    "SkipLayerNormalization",
    "LayerNormalization",
    "BiasGelu",
    "FastGelu",
    "Gelu",
)


def optimize(reference: Reference, source: Bundle, out: Path) -> Bundle:
    """Writes the fused bundle ``out`` from the fp32 bundle ``source`` and returns it, verified.

    Raises FailureError if no fusion is known for the model or nothing fused, GateError if the logits move by more than
    the fp32 tolerance.
    """
    architecture = source.manifest["architecture"]
    kind = architecture["model_type"]
    if not has_fusions(kind):
        raise FailureError(f"ONNX Runtime's graph optimisation has no fusions for {kind} models")
    with writing_bundle(out) as work:
        reference.count(0, 1, " fusing the graph")
        fused = fuse(source.read(MODEL), architecture)
        layers = architecture["layers"] or 0
        counts = Counter(node.op_type for node in fused.model.graph.node)
        report = {name: counts.get(name, 0) for name in _COUNTED}
        if not any(report.values()):
            raise FailureError(f"ONNX Runtime's graph optimisation fused nothing in this {kind} model")
        onnx.save(fused.model, work / MODEL)
        del fused  # as large as the model
        made = {"graph": "fused", "from": source.name, "fused_nodes": report, "layers": layers}
        finish_bundle(reference, work, out.name, precision="fp32", made=made)
    return open_bundle(out)


def fusion_line(bundle: Bundle) -> str:
    """What fused, in one line: attention nodes compared with layers."""
    made = bundle.manifest["made"]
    nodes = ", ".join(f"{count} {name}" for name, count in made["fused_nodes"].items() if count)
    attentions = sum(made["fused_nodes"][name] for name in ATTENTION)
    line = f"fused {attentions} of {made['layers']} attention layers ({nodes})"
    if attentions < made["layers"]:
        line += ": not every attention layer has a form that ONNX Runtime knows"
    return line
