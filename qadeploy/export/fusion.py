"""ONNX Runtime's graph fusions (``onnxruntime.transformers``), for the graphs of the CPU and of CUDA.

For the CPU, attention that they do not know is fused before.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import onnx

from qadeploy.export.attention import fuse_attention

# ONNX Runtime's optimizer knows families of graphs; these are built like BERT's.
_BERT_LIKE = frozenset(
    {"albert", "bert", "camembert", "deberta", "deberta-v2", "distilbert", "electra", "mobilebert"}
    | {"modernbert", "mpnet", "roberta", "xlm-roberta"}
)


def has_fusions(kind: str) -> bool:
    """Whether ONNX Runtime's optimizer knows graphs of this ``model_type``."""
    return kind in _BERT_LIKE


def fuse(model: bytes, architecture: Mapping[str, Any], *, mask_index: bool = False) -> Any:
    """The model with everything fused that can be, an ``onnxruntime.transformers`` ``OnnxModel``.

    ``architecture`` is a manifest's entry. Attention takes the mask as it is or, with ``mask_index``, the length of each
    row, which is right if padding is on the right, where ``pad_batch`` puts it.
    """
    from onnxruntime.transformers.fusion_options import FusionOptions
    from onnxruntime.transformers.optimizer import optimize_model

    if not mask_index:
        model = fuse_attention(model, architecture["heads"] or 0, keep_mask=True, plain=False).model
    options = FusionOptions("bert")
    options.use_raw_attention_mask(not mask_index)
    with silent():
        return optimize_model(
            onnx.load_model_from_string(model),
            model_type="bert",
            num_heads=architecture["heads"] or 0,
            hidden_size=architecture["hidden"] or 0,
            opt_level=0,
            optimization_options=options,
        )


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Silences the logs and prints of ``onnxruntime.transformers``; what it did is counted afterwards."""
    names = ("onnxruntime.transformers", *logging.root.manager.loggerDict)
    for name in names:
        if name.startswith(("onnxruntime.t", "fusion", "onnx_model", "optimizer", "symbolic_shape_infer")):
            logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
