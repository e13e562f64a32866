"""Graph optimisation: an fp32 bundle to a new one whose attention and normalisation are fused.

Fusing is ONNX Runtime's (``onnxruntime.transformers``). It often pays on a GPU and can cost speed
on a CPU, so the fused bundle stands beside the plain one, and both say how fast they were.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import onnx

from qadeploy.build.manifest import finish_bundle
from qadeploy.build.report import Reference
from qadeploy.bundle import MODEL, Bundle, open_bundle, writing_bundle
from qadeploy.errors import FailureError

# ONNX Runtime's optimizer knows families of graphs; these are built like BERT's.
_BERT_LIKE = frozenset(
    {"albert", "bert", "camembert", "deberta", "deberta-v2", "distilbert", "electra", "mobilebert"}
    | {"modernbert", "mpnet", "roberta", "xlm-roberta"}
)
_COUNTED = (
    "Attention",
    "EmbedLayerNormalization",
    "SkipLayerNormalization",
    "LayerNormalization",
    "BiasGelu",
    "FastGelu",
    "Gelu",
)


def optimize(reference: Reference, source: Bundle, out: Path) -> Bundle:
    """Writes the fused bundle ``out`` from the fp32 bundle ``source`` and returns it, verified.

    Raises FailureError where no fusion is known for the model or nothing fused, GateError where the
    logits move by more than the fp32 tolerance.
    """
    architecture = source.manifest["architecture"]
    kind = architecture["model_type"]
    if kind not in _BERT_LIKE:
        raise FailureError(f"ONNX Runtime's graph optimisation has no fusions for {kind} models")
    with writing_bundle(out) as work:
        fused = _fuse(source.read(MODEL), architecture)
        layers = architecture["layers"] or 0
        report = {name: fused["counts"].get(name, 0) for name in _COUNTED}
        if not any(report.values()):
            raise FailureError(f"ONNX Runtime's graph optimisation fused nothing in this {kind} model")
        (work / MODEL).write_bytes(fused["model"])
        made = {"graph": "fused", "from": source.name, "fused_nodes": report, "layers": layers}
        finish_bundle(reference, work, out.name, precision="fp32", made=made, exact=True)
    return open_bundle(out)


def fusion_line(bundle: Bundle) -> str:
    """What fused, in one line: attention nodes against layers."""
    made = bundle.manifest["made"]
    nodes = ", ".join(f"{count} {name}" for name, count in made["fused_nodes"].items() if count)
    line = f"fused {made['fused_nodes']['Attention']} of {made['layers']} attention layers ({nodes})"
    if made["fused_nodes"]["Attention"] < made["layers"]:
        line += ": not every attention layer has a form that ONNX Runtime knows"
    return line


def _fuse(model: bytes, architecture: dict[str, Any]) -> dict[str, Any]:
    from onnxruntime.transformers.fusion_options import FusionOptions
    from onnxruntime.transformers.optimizer import optimize_model

    options = FusionOptions("bert")
    options.use_raw_attention_mask(True)  # else the fused graph assumes padding on the right
    logging.getLogger("onnxruntime.transformers").setLevel(logging.ERROR)
    for name in list(logging.root.manager.loggerDict):
        if name.startswith(("fusion", "onnx_model", "optimizer")):
            logging.getLogger(name).setLevel(logging.ERROR)
    proto = onnx.load_model_from_string(model)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        optimized = optimize_model(
            proto,
            model_type="bert",
            num_heads=architecture["heads"] or 0,
            hidden_size=architecture["hidden"] or 0,
            opt_level=0,
            optimization_options=options,
        )
    result = optimized.model
    counts = Counter(node.op_type for node in result.graph.node)
    return {"model": result.SerializeToString(), "counts": counts}
