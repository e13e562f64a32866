"""Checks on loading that a bundle's model is the exported one, by one question whose logits the manifest stores.

Hashes show whether files are unchanged. They do not show whether tokenizer and model belong together, or whether
this CPU computes what the exporting machine's did.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from qadeploy.core.windows import Encoder
from qadeploy.errors import BundleError, InputError
from qadeploy.inference.bundle import Bundle
from qadeploy.inference.session import OnnxModel
from qadeploy.records import Window

_QUESTION = "Who lights the 3 lamps?"
_CONTEXT = "At dusk the keeper, Ada Quill, lights the 3 lamps of the harbour."
# How far logits may be from those at export, as a share of their spread: chosen to tell another model from another CPU,
# whose int8 products may differ.
_APART, _APART_INT8 = 0.05, 0.25
_LEAST = 1e-3
_LONGEST = 128  # tokens


def make_probe(encoder: Encoder, model: OnnxModel) -> dict[str, Any]:
    """The ``probe`` entry of a manifest: one question with its tokens and the model's logits."""
    window = _window(encoder, _QUESTION, _CONTEXT)
    starts, ends = model.run_batch([window])[0]
    return {
        "question": _QUESTION,
        "context": _CONTEXT,
        "input_ids": window.input_ids.tolist(),
        "start_logits": [round(float(x), 4) for x in starts],
        "end_logits": [round(float(x), 4) for x in ends],
    }


def prove(bundle: Bundle, encoder: Encoder, model: OnnxModel) -> None:
    """Runs a bundle's model on its probe, and on the last token of the vocabulary.

    Args:
        bundle: The bundle.
        encoder: Its encoder.
        model: Its model.

    Raises:
        BundleError: The model does not run or does not know a token of its tokenizer, or tokens or logits differ from the export's.
    """
    probe = bundle.checked.probe
    question, context = (probe.question, probe.context) if probe else (_QUESTION, _CONTEXT)
    try:
        window = _window(encoder, question, context)
    except InputError as error:
        raise BundleError(f"{bundle.folder}: its tokenizer cannot be used: {error}: export the bundle again") from error
    starts, ends = model.run_batch([window])[0]
    last = np.full(4, encoder.vocabulary - 1, dtype=np.int64)
    types = None if window.token_type_ids is None else np.zeros(4, dtype=np.int64)
    try:
        model.run_batch([Window(last, types, 0, 4, 0, 0)])
    except BundleError as error:
        raise BundleError(
            f"{bundle.folder}: the model does not accept token {last[0]}, the last of its tokenizer: export the bundle again ({error})"
        ) from error
    if probe is None:
        return
    if tuple(window.input_ids.tolist()) != probe.input_ids:
        raise BundleError(
            f"{bundle.folder}: the tokenizer does not split the manifest's probe as it did at export: it belongs to another model, or "
            "this version of tokenizers splits it differently; export the bundle again"
        )
    stored = np.array([probe.start_logits, probe.end_logits])
    apart = float(np.abs(np.array([starts, ends]) - stored).max())
    is_int8 = bundle.precision == "int8"
    allowed = max(_LEAST, (_APART_INT8 if is_int8 else _APART) * float(np.ptp(stored)))
    if not apart <= allowed:
        fix = ", or this CPU saturates in int8: export it on this machine" if is_int8 else ": export it again"
        raise BundleError(
            f"{bundle.folder}: logits differ by {apart:.2g} from those at export, but at most {allowed:.2g} is allowed: the model is "
            f"damaged or not the exported one{fix}"
        )


def _window(encoder: Encoder, question: str, context: str) -> Window:
    asked, read = encoder.encode(question), encoder.encode(context)
    return encoder.windows(asked, read, max_seq_len=min(encoder.config.position_limit, _LONGEST), doc_stride=0)[0]
