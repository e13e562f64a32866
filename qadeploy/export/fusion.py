"""ONNX Runtime's graph fusions (``onnxruntime.transformers``), for the graphs of the CPU and of CUDA.

For the CPU, ``fuse_attention`` first fuses the attention that they do not know. The fusions copy a model several times, so
``fuse_file`` runs them in a process of its own and keeps the large weights out of the copies.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx
from onnx import external_data_helper

from qadeploy.errors import FailureError
from qadeploy.export.attention import fuse_attention
from qadeploy.export.graph import Graph

# ONNX Runtime's optimizer knows families of graphs; the graphs of models of these types are built like BERT's.
FUSED_TYPES = frozenset(
    {"albert", "bert", "camembert", "deberta", "deberta-v2", "distilbert", "electra", "mobilebert"}
    | {"modernbert", "mpnet", "roberta", "xlm-roberta"}
)
_OUTSIDE = 2**16  # bytes; weights at least this large stay out of the copies
_WEIGHTS = "weights.bin"


def fuse_file(model: Path, architecture: Mapping[str, Any]) -> dict[str, int]:
    """Fuses everything that can be fused in a model's file, replaces the file, and returns its number of nodes by kind.

    Raises FailureError with ONNX Runtime's reason if its optimizer fails; the file is then unchanged.
    """
    sizes = [str(architecture[name] or 0) for name in ("heads", "hidden")]
    command = [sys.executable, "-m", __name__, model.name, *sizes]
    path = os.pathsep.join(each for each in sys.path if each)  # the child's working folder is the model's
    done = subprocess.run(
        command, cwd=model.parent, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise FailureError(f"ONNX Runtime's graph optimisation failed: {reason}")
    counts: dict[str, int] = json.loads(done.stdout)
    return counts


def _fuse_here(name: str, heads: int, hidden: int) -> dict[str, int]:
    """``fuse_file`` for a file in the working folder, where onnx looks for the external weights of a model."""
    proto = onnx.load(name)
    external_data_helper.convert_model_to_external_data(proto, location=_WEIGHTS, size_threshold=_OUTSIDE)
    external_data_helper.write_external_data_tensors(proto, ".")
    skeleton = proto.SerializeToString()
    del proto
    fused = fuse(skeleton, {"heads": heads, "hidden": hidden}).model
    external_data_helper.load_external_data_for_model(fused, ".")
    onnx.save(fused, f"{name}.new")
    Path(_WEIGHTS).unlink(missing_ok=True)  # a small model has none
    Path(f"{name}.new").replace(name)
    return Counter(node.op_type for node in fused.graph.node)


def fuse(model: bytes, architecture: Mapping[str, Any], *, mask_index: bool = False) -> Any:
    """The model with everything fused that can be fused, an ``onnxruntime.transformers`` ``OnnxModel``.

    ``architecture`` is a manifest's entry. Attention reads the mask itself or, with ``mask_index``, the length of each
    row, which is correct if padding is on the right, where ``pad_batch`` puts it.
    """
    from onnxruntime.transformers.fusion_options import FusionOptions
    from onnxruntime.transformers.optimizer import optimize_model

    if not mask_index:
        model = fuse_attention(model, architecture["heads"] or 0, keep_mask=True, plain=False).model
    options = FusionOptions("bert")
    options.use_raw_attention_mask(not mask_index)
    proto = onnx.load_model_from_string(model)
    _put_residuals_last(proto)
    with silent():
        return optimize_model(
            proto,
            model_type="bert",
            num_heads=architecture["heads"] or 0,
            hidden_size=architecture["hidden"] or 0,
            opt_level=0,
            optimization_options=options,
        )


def _put_residuals_last(model: onnx.ModelProto) -> None:
    """Turns ``x + f(x)`` into ``f(x) + x``, the same bits, where both are sums: ONNX Runtime follows the first sum only.

    ALBERT's first attention is added to a projection with a bias, and was not found behind it.
    """
    graph = Graph(model)
    for add in [node for node in model.graph.node if node.op_type == "Add"]:
        first, second = (graph.maker(name, "Add") for name in add.input)
        if first is not None and second is not None and first in graph.ancestors(add.input[1]):
            add.input[:] = reversed(add.input)


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Silences the logs and prints of ``onnxruntime.transformers``; callers count the fused nodes instead."""
    with only_errors(), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def only_errors() -> Iterator[None]:
    """Silences logs below errors, the root logger's too: ONNX Runtime's tools log steps and warnings about shapes."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


if __name__ == "__main__":
    print(json.dumps(_fuse_here(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
