"""The accuracy and speed of an exported model, measured against PyTorch on held-out questions."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qadeploy.core.metrics import Scores, bootstrap_interval
from qadeploy.evaluation.scoring import Evaluation, evaluate
from qadeploy.inference.answerer import Answerer
from qadeploy.inference.manifest import SessionSettings
from qadeploy.inference.session import OnnxModel
from qadeploy.inference.tuning import asking
from qadeploy.records import Example
from qadeploy.timing import interleave, spread
from qadeploy.training.checkpoint import Checkpoint, Hub, load_checkpoint, torch_answerer
from qadeploy.training.runs import HeldOut, Run, dev_set

Count = Callable[[int, int, str], object]
_TIMED_QUESTIONS = 16
_LEAST_TIMED = 4
ROUNDS = 5
# Approximate seconds for tuning a bundle, and again for timing it against PyTorch (fewer questions for a large model).
_SECONDS = 20.0
_SHARE = 1 / 6  # of the budget, if that is less than _SECONDS


@dataclass(frozen=True)
class Reference:
    """The PyTorch model that exports are compared with, and the questions for it.

    ``dev`` holds the questions that may choose between variants (empty if the run is not known);
    ``held_out`` those that judge the chosen one. ``seconds`` is PyTorch's time per question, ``measuring`` the seconds for
    finding the session settings of a bundle, and again for timing it.
    """

    run: Run
    checkpoint: Checkpoint
    held_out: HeldOut
    dev: tuple[Example, ...]
    answerer: Answerer
    scores: Scores
    timed: tuple[tuple[str, str], ...] = field(repr=False)
    seconds: float
    measuring: float
    count: Count = field(default=lambda *_: None, repr=False)

    @property
    def examples(self) -> tuple[Example, ...]:
        """The held-out questions."""
        return self.held_out.examples

    @property
    def choosing(self) -> tuple[Example, ...]:
        """The questions that choose between variants: the dev set, or the held-out ones if there is none."""
        return self.dev or self.examples

    @property
    def questions(self) -> str:
        """How many held-out questions, and of which data."""
        return f"{len(self.examples)} held-out questions of {self.held_out.name}"


def make_reference(
    run: Run, held_out: HeldOut, hub: Hub | None = None, count: Count = lambda *_: None, budget: float | None = None
) -> Reference:
    """Loads the run's checkpoint and scores it on the held-out questions.

    Args:
        run: The run.
        held_out: The held-out questions.
        hub: Whether the checkpoint's own code may run, and its weights be read from a pickle.
        count: Called with the number of answered questions, the number in all, and the step.
        budget: Seconds for measuring int8 recipes; a small one also shortens the measuring of each bundle.
    """
    checkpoint = load_checkpoint(run.checkpoint, hub)
    answerer = torch_answerer(checkpoint)
    answerer.require_room(held_out.examples, held_out.name)
    started = time.perf_counter()
    scores = counted(answerer, held_out.examples, "PyTorch answers", count).scores
    seconds = (time.perf_counter() - started) / max(1, len(held_out.examples))
    measuring = _SECONDS if budget is None else min(_SECONDS, budget * _SHARE)
    fitting = int(measuring / (2 * (ROUNDS + 1) * max(seconds, 1e-6)))
    number = min(_TIMED_QUESTIONS, max(_LEAST_TIMED, fitting))
    timed = tuple((e.question, e.context) for e in spread(held_out.examples, number))
    return Reference(run, checkpoint, held_out, dev_set(run), answerer, scores, timed, seconds, measuring, count)


def counted(answerer: Answerer, examples: Sequence[Example], what: str, count: Count) -> Evaluation:
    """``evaluate`` with the figures of drift; ``count`` is called after each question."""
    done = 0

    def one_more() -> None:
        nonlocal done
        done += 1
        count(done, len(examples), f" {what}")

    return evaluate(answerer, examples, one_more, drift=True)


def make_answerer(
    reference: Reference, model: bytes | Path, session: Mapping[str, Any], *, device: str = "cpu"
) -> Answerer:
    """An answerer for a model that is not in a bundle yet. A file takes less memory than bytes."""
    config = reference.checkpoint.encoder.config
    onnx = OnnxModel(
        lambda: str(model) if isinstance(model, Path) else model,
        device=device,
        pad_token_id=config.pad_token_id,
        settings=SessionSettings.from_manifest(session),
        longest=config.position_limit,
    )
    return Answerer(reference.checkpoint.encoder, reference.checkpoint.settings, onnx)


def measure(reference: Reference, answerer: Answerer, evaluation: Evaluation) -> dict[str, Any]:
    """Scores and calibration error, the paired F1 difference to PyTorch with its interval, and speed against PyTorch.

    ``evaluation`` holds the answerer's answers to the held-out questions.
    ``ms_per_question`` is for one question at a time with all threads, the median of interleaved rounds;
    ``speedup_to_pytorch`` is the median ratio within a round.
    """
    scores = evaluation.scores
    difference = scores.rows_f1 - reference.scores.rows_f1
    reference.count(0, 1, " timing it against PyTorch")
    both = {"pytorch": reference.answerer, "this": answerer}
    timings = interleave({name: asking(each, reference.timed, one=True) for name, each in both.items()}, ROUNDS)
    questions = len(reference.timed)
    own, torch = timings["this"], timings["pytorch"]
    return {
        "data": reference.held_out.source,
        "dev_set": reference.held_out.dev_set,
        **scores.to_dict(),
        "ece": evaluation.calibration_error,
        "pytorch": {**reference.scores.to_dict(), "ms_per_question": 1000 * torch.median / questions},
        "f1_change": 100.0 * float(difference.mean()),
        "f1_change_interval": list(bootstrap_interval(difference)),
        "ms_per_question": 1000 * own.median / questions,
        "ms_per_question_range": [1000 * own.least / questions, 1000 * own.most / questions],
        "speedup_to_pytorch": own.speedup,
        "speedup_range": list(own.speedup_range),
        "timed_questions": questions,
        "rounds": ROUNDS,
    }


def table(reference: Reference, pytorch_bytes: int, manifests: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
    """The lines of the closing table: variant, size, EM, F1, ms per question, ratio to PyTorch."""
    lines = [
        f"{'variant':<24} {'size':>8} {'EM':>6} {'F1':>6} {'F1 change (95 %)':>22} {'ms/question':>12} {'x PyTorch':>10}"
    ]
    torch = manifests[0][1]["measured"]["pytorch"] if manifests else {"ms_per_question": float("nan")}
    lines.append(
        f"{'pytorch fp32':<24} {pytorch_bytes / 1e6:>5.1f} MB {reference.scores.exact_match:>6.1f} "
        f"{reference.scores.f1:>6.1f} {'':>22} {torch['ms_per_question']:>12.1f} {1:>10.2f}"
    )
    for name, manifest in manifests:
        m = manifest["measured"]
        low, high = m["f1_change_interval"]
        change = f"{m['f1_change']:+.2f} ({low:+.2f} to {high:+.2f})"
        lines.append(
            f"{name:<24} {manifest['files']['model.onnx']['size'] / 1e6:>5.1f} MB {m['exact_match']:>6.1f} {m['f1']:>6.1f} "
            f"{change:>22} {m['ms_per_question']:>12.1f} {m['speedup_to_pytorch']:>10.2f}"
        )
    lines.append(
        f"on {reference.questions}; one question at a time, medians of {ROUNDS} interleaved rounds; "
        "a change of F1 whose interval contains 0 may be chance"
    )
    return lines
