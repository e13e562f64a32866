"""Logit parity: an exported model against PyTorch on real windows, alone and in padded batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from qadeploy.errors import GateError
from qadeploy.inference.session import OnnxModel
from qadeploy.inference.tuning import FP32_TOLERANCE
from qadeploy.records import Example, Window
from qadeploy.training.checkpoint import Checkpoint, TorchModel

PARITY_RUNS = 24  # about: each question has one window or a few
_WINDOWS = PARITY_RUNS
_BATCH = 8
_SHORT = (96, 32)  # max_seq_len and doc_stride that force several windows per context
# By precision, how far a logit may be from PyTorch's; int8 has no limit, since F1 judges it. A logit of 10 rounds by
# 2^-11 x 10 = 0.005 in fp16: about twenty such roundings.
TOLERANCES: dict[str, float | None] = {"fp32": FP32_TOLERANCE, "fp16": 0.1, "int8": None}


@dataclass(frozen=True, slots=True)
class Parity:
    """The largest absolute difference of any start or end logit, and what it was measured on.

    ``best_span_agreement`` is the share of windows with the highest start and end logits at the same tokens in both models.
    """

    max_abs_diff: float
    mean_abs_diff: float
    best_span_agreement: float
    windows: int
    shortest: int
    longest: int

    def to_dict(self) -> dict[str, Any]:
        """The figures as plain JSON values."""
        return asdict(self)


def parity_windows(checkpoint: Checkpoint, examples: Sequence[Example]) -> list[Window]:
    """Real windows of many lengths: whole contexts, and contexts cut into several windows."""
    encoder, settings = checkpoint.encoder, checkpoint.settings
    windows: list[Window] = []
    for i, example in enumerate(examples[:: max(1, len(examples) // _WINDOWS)][:_WINDOWS]):
        question, context = encoder.encode(example.question), encoder.encode(example.context)
        seq, stride = settings.max_seq_len, settings.doc_stride
        if i % 3 == 0 and encoder.room(question, seq) - len(question) > 2 * _SHORT[1]:
            seq = min(seq, len(question) + _SHORT[0])
            stride = min(stride, _SHORT[1])
        windows += encoder.windows(question, context, max_seq_len=seq, doc_stride=stride)[:6]
    return windows


def measure_parity(checkpoint: Checkpoint, model: OnnxModel, examples: Sequence[Example]) -> Parity:
    """Compares logits of the parity windows, each alone and, if the model takes a mask, also in padded batches."""
    windows = parity_windows(checkpoint, examples)
    reference = TorchModel(checkpoint.model, checkpoint.encoder.config.pad_token_id)
    differences: list[np.ndarray[Any, Any]] = []
    agree = []
    for begin in range(0, len(windows), _BATCH):
        batch = windows[begin : begin + _BATCH]
        alone = [reference.run_batch([w])[0] for w in batch]
        masked = "attention_mask" in model.inputs
        for runs in (model.run(batch), model.run_batch(batch)) if masked else (model.run(batch),):
            for theirs, ours in zip(alone, runs, strict=True):
                differences += [np.abs(theirs[0] - ours[0]), np.abs(theirs[1] - ours[1])]
                agree.append(all(int(a.argmax()) == int(b.argmax()) for a, b in zip(theirs, ours, strict=True)))
    every = np.concatenate(differences)
    lengths = [len(w) for w in windows]
    return Parity(
        float(every.max()), float(every.mean()), float(np.mean(agree)), len(windows), min(lengths), max(lengths)
    )


def require_parity(parity: Parity, what: str, tolerance: float = FP32_TOLERANCE) -> None:
    """Raises GateError if the largest difference is above ``tolerance`` or not a number."""
    if not parity.max_abs_diff <= tolerance:
        raise GateError(
            f"{what}: its logits differ from PyTorch by up to {parity.max_abs_diff:.2e}, more than {tolerance:.0e} "
            f"(on {parity.windows} real windows): the export is wrong and was not written"
        )
