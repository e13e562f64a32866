"""Logit parity: an exported model against PyTorch on real windows, alone and in padded batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from qadeploy.errors import GateError
from qadeploy.inference.session import OnnxModel, differences
from qadeploy.inference.tuning import FP32_TOLERANCE
from qadeploy.integrations.onnx_standalone.in_graph import cut_windows
from qadeploy.records import Example, Logits, Window
from qadeploy.training.checkpoint import Checkpoint, TorchModel

PARITY_RUNS = 24  # questions to compare on; about as many runs, since each question has one window or a few
_BATCH = 8
_ROUNDINGS = 2  # adding in another order than PyTorch rounds differently
# One logit in a thousand may be off by ten times as much. In a correct fused graph, one of 21,490 was off by 1.1e-4, the
# others by at most 5e-5. In a wrong export many are off.
_USUAL, _RARE = 0.999, 10
# By precision, how far a logit may be from PyTorch's; int8 has no limit, since F1 judges it. In fp16 a logit of 10 rounds by
# 2^-11 x 10 = 0.005, so 0.1 is about twenty such roundings.
TOLERANCES: dict[str, float | None] = {"fp32": FP32_TOLERANCE, "fp16": 0.1, "int8": None}


@dataclass(frozen=True, slots=True)
class Parity:
    """The largest absolute difference of any start or end logit, and what it was measured on.

    ``best_span_agreement`` is the share of windows with the highest start and end logits at the same tokens in both models.
    ``pytorch_rounding`` and ``rounding`` are the largest differences from PyTorch's float64 logits, of PyTorch's float32 logits
    and of the model's; 99.9 % of the model's differ by at most ``usual_rounding``. All three are None if not measured.
    """

    max_abs_diff: float
    mean_abs_diff: float
    best_span_agreement: float
    windows: int
    shortest: int
    longest: int
    pytorch_rounding: float | None = None
    rounding: float | None = None
    usual_rounding: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The figures as plain JSON values, without those that were not measured."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def parity_windows(checkpoint: Checkpoint, examples: Sequence[Example]) -> list[Window]:
    """Windows of real questions, of many lengths (see ``cut_windows``). At most 6 of a question."""
    chosen = examples[:: max(1, len(examples) // PARITY_RUNS)][:PARITY_RUNS]
    return [cut.window for cut in cut_windows(checkpoint.encoder, checkpoint.settings, chosen, most=6)]


def measure_parity(
    checkpoint: Checkpoint, model: OnnxModel, examples: Sequence[Example], tolerance: float | None = None
) -> Parity:
    """Compares logits of the parity windows, each alone and, if the model takes a mask, also in padded batches.

    Args:
        checkpoint: The PyTorch model.
        model: The exported model.
        examples: The questions whose windows are compared.
        tolerance: If a logit differs by more than this, both models are also compared with PyTorch's logits in float64, to tell
            a wrong export from rounding; None for no such comparison.
    """
    windows = parity_windows(checkpoint, examples)
    reference = TorchModel(checkpoint.model, checkpoint.encoder.config.pad_token_id)
    alone = [reference.run_batch([w])[0] for w in windows]
    runs: list[Sequence[Logits]] = [model.run(windows)]
    if "attention_mask" in model.inputs:
        batches = (windows[begin : begin + _BATCH] for begin in range(0, len(windows), _BATCH))
        runs.append([logits for batch in batches for logits in model.run_batch(batch)])
    every = np.concatenate([differences(alone, run) for run in runs])
    agree = [
        all(int(a.argmax()) == int(b.argmax()) for a, b in zip(theirs, ours, strict=True))
        for run in runs
        for theirs, ours in zip(alone, run, strict=True)
    ]
    lengths = [len(w) for w in windows]
    found = Parity(
        float(every.max()), float(every.mean()), float(np.mean(agree)), len(windows), min(lengths), max(lengths)
    )
    if tolerance is None or found.max_abs_diff <= tolerance:
        return found
    checkpoint.model.double()
    try:
        exact = [reference.run_batch([w])[0] for w in windows]
    except RuntimeError:  # a model that fixes its own data types
        return found
    finally:
        checkpoint.model.float()
    own = [differences(exact, run) for run in runs]
    return replace(
        found,
        pytorch_rounding=float(differences(exact, alone).max()),
        rounding=max(float(each.max()) for each in own),
        usual_rounding=max(float(np.quantile(each, _USUAL)) for each in own),
    )


def require_parity(parity: Parity, what: str, tolerance: float = FP32_TOLERANCE) -> None:
    """Raises GateError if logits differ from PyTorch's by more than ``tolerance`` and rounding does not explain it.

    The limit of rounding is ``tolerance`` or, if larger, ``_ROUNDINGS`` times the distance of PyTorch's float32 logits from its
    float64 ones. 99.9 % of the model's logits must be within it, and all within ``_RARE`` times it.
    """
    theirs, own, usual = parity.pytorch_rounding, parity.rounding, parity.usual_rounding
    explained = False
    if theirs is not None and own is not None and usual is not None:
        limit = max(tolerance, _ROUNDINGS * theirs)
        explained = usual <= limit and own <= _RARE * limit < np.inf
    if parity.max_abs_diff <= tolerance or explained:
        return
    raise GateError(
        f"{what}: its logits differ from PyTorch by up to {parity.max_abs_diff:.2e}, more than {tolerance:.0e} "
        f"(on {parity.windows} real windows): the export is wrong and was not written"
    )
