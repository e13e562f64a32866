"""What an exported model kept and what it gained, measured against PyTorch on held-out questions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qadeploy.core.metrics import Scores, bootstrap_interval
from qadeploy.evaluation.scoring import evaluate
from qadeploy.inference.answerer import Answerer
from qadeploy.inference.session import OnnxModel
from qadeploy.records import Example
from qadeploy.timing import interleave, spread
from qadeploy.training.checkpoint import Checkpoint, load_checkpoint, torch_answerer
from qadeploy.training.runs import Run, dev_part

_TIMED_QUESTIONS = 16
_ROUNDS = 5


@dataclass(frozen=True)
class Reference:
    """The PyTorch model that exports are held against, and the held-out questions to do it on.

    ``dev`` are the questions that may choose between variants (empty where the run is not known);
    ``examples`` judge the one chosen.
    """

    run: Run
    checkpoint: Checkpoint
    source: str
    examples: tuple[Example, ...]
    dev: tuple[Example, ...]
    answerer: Answerer
    scores: Scores
    timed: tuple[tuple[str, str], ...] = field(repr=False)

    @property
    def choosing(self) -> tuple[Example, ...]:
        """The questions that choose between variants: the dev part, or the held-out ones where there is no other."""
        return self.dev or self.examples

    @property
    def questions(self) -> str:
        """How many held-out questions, and of what."""
        return f"{len(self.examples)} held-out questions of {self.source}"


def make_reference(run: Run, source: str, examples: Sequence[Example]) -> Reference:
    """Loads the run's checkpoint and scores it on the held-out examples."""
    checkpoint = load_checkpoint(run.checkpoint)
    answerer = torch_answerer(checkpoint)
    timed = tuple((e.question, e.context) for e in spread(examples, _TIMED_QUESTIONS))
    scores = evaluate(answerer, examples).scores
    return Reference(run, checkpoint, source, tuple(examples), dev_part(run), answerer, scores, timed)


def make_answerer(
    reference: Reference,
    model: bytes,
    session: Mapping[str, Any],
    *,
    device: str = "cpu",
) -> Answerer:
    """An answerer for a model that is not in a bundle yet."""
    config = reference.checkpoint.encoder.config
    onnx = OnnxModel(
        lambda: model,
        device=device,
        pad_token_id=config.pad_token_id,
        options=session,
        longest=config.position_limit,
    )
    return Answerer(reference.checkpoint.encoder, reference.checkpoint.settings, onnx)


def measure(reference: Reference, answerer: Answerer) -> dict[str, Any]:
    """Scores and calibration error, the paired F1 difference to PyTorch with its interval, and speed against PyTorch.

    ``ms_per_question`` is one question at a time with all threads, the median of interleaved rounds;
    ``speedup_to_pytorch`` the median ratio within a round.
    """
    evaluation = evaluate(answerer, reference.examples)
    scores = evaluation.scores
    difference = scores.rows_f1 - reference.scores.rows_f1
    timings = interleave(
        {"pytorch": _asker(reference.answerer, reference), "this": _asker(answerer, reference)}, _ROUNDS
    )
    asked = len(reference.timed)
    own, torch = timings["this"], timings["pytorch"]
    return {
        "data": reference.source,
        **scores.to_dict(),
        "ece": evaluation.calibration_error,
        "pytorch": {
            **reference.scores.to_dict(),
            "ms_per_question": 1000 * torch.median / asked,
        },
        "f1_change": 100.0 * float(difference.mean()),
        "f1_change_interval": list(bootstrap_interval(difference)),
        "ms_per_question": 1000 * own.median / asked,
        "ms_per_question_range": [1000 * own.least / asked, 1000 * own.most / asked],
        "speedup_to_pytorch": own.speedup,
        "speedup_range": list(own.speedup_range),
        "timed_questions": asked,
        "rounds": _ROUNDS,
    }


def _asker(answerer: Answerer, reference: Reference) -> Callable[[], object]:
    return lambda: [answerer.answer(question, context) for question, context in reference.timed]


def table(reference: Reference, pytorch_bytes: int, manifests: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
    """The lines of the closing table: variant, size, EM, F1, ms per question, ratio to PyTorch."""
    lines = [
        f"{'variant':<24} {'size':>8} {'EM':>6} {'F1':>6} {'F1 change (95 %)':>22} {'ms/question':>12} {'x PyTorch':>10}"
    ]
    own = manifests[0][1]["measured"]["pytorch"] if manifests else {"ms_per_question": float("nan")}
    lines.append(
        f"{'pytorch fp32':<24} {pytorch_bytes / 1e6:>5.1f} MB {reference.scores.exact_match:>6.1f} "
        f"{reference.scores.f1:>6.1f} {'':>22} {own['ms_per_question']:>12.1f} {1:>10.2f}"
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
        f"on {reference.questions}; one question at a time, medians of {_ROUNDS} interleaved rounds; "
        f"{len(reference.examples)} questions resolve no better than the interval"
    )
    return lines
