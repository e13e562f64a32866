"""From the logits of a part to answers and scores, and what a finished training chooses on its dev part.

Chosen are ``max_answer_len``, the null threshold (where the model was trained with questions without an answer) and
the temperature; all three go into the settings that the checkpoint and its bundles keep.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from qadeploy.core.calibration import (
    Rows,
    best_null_threshold,
    confidence_bins,
    expected_calibration_error,
    fit_temperature,
    stable_null_threshold,
)
from qadeploy.core.decoding import Decoded, decode_many, least_null_logit, rank_answers, span_table
from qadeploy.core.metrics import Scores, score
from qadeploy.core.settings import QaSettings
from qadeploy.evaluation.predictions import Prediction, predict
from qadeploy.records import Answer, Example, FloatArray
from qadeploy.training.features import FeatureSet

ANSWER_LENGTHS = (8, 10, 12, 15, 20, 25, 30, 40)
TEMPERATURE_QUESTIONS = 2_000  # more of them move one number no further
Logits = tuple[FloatArray, FloatArray]


def unchosen_settings(settings: QaSettings, train_part: Sequence[Example]) -> QaSettings:
    """The settings that epochs are judged with, before anything is chosen on the dev part.

    Temperature 1; a null threshold of 0, and ranking relative to the null logits, where any training question has no
    answer, else neither, whatever the base model had.
    """
    unanswerable = any(not e.answers for e in train_part)
    return replace(
        settings,
        null_threshold=0.0 if unanswerable else None,
        temperature=1.0,
        relative_to_null=unanswerable,
    )


def answers_of(features: FeatureSet, logits: Logits, settings: QaSettings) -> list[Answer]:
    """The best answer of every example. ``logits`` are start and end logits ``[windows, longest]`` each."""
    allow = settings.null_competes(features.examples)
    found = []
    for example, decoded in zip(features.examples, _decoded(features, logits, settings, allow), strict=True):
        ranked = rank_answers(
            decoded, example.context, top_k=1, allow_no_answer=allow, null_threshold=settings.null_threshold
        )
        found.append(ranked[0] if ranked else Answer("", 0, 0, 0.0))
    return found


def predictions_of(
    features: FeatureSet, logits: Logits, settings: QaSettings, n_best_size: int
) -> Iterator[Prediction]:
    """The predictions files' entries of every example; their texts are those of ``answers_of``."""
    allow = settings.null_competes(features.examples)
    for i, (example, answer) in enumerate(zip(features.examples, answers_of(features, logits, settings), strict=True)):
        rows = _rows(features, i)
        windows = [f.window for f in features.features[rows]]
        starts, ends = list(logits[0][rows]), list(logits[1][rows])
        context = features.contexts[i]
        yield predict(
            example, answer, windows, starts, ends, context, settings, n_best_size=n_best_size, allow_no_answer=allow
        )


def score_logits(features: FeatureSet, logits: Logits, settings: QaSettings) -> Scores:
    """The scores of ``answers_of``."""
    return score(features.examples, answers_of(features, logits, settings))


def choose_settings(
    features: FeatureSet,
    logits: Logits,
    settings: QaSettings,
    *,
    max_answer_len: int | None = None,
    keep_threshold: bool = False,
) -> QaSettings:
    """``settings`` with the ``max_answer_len`` and, where they have one, the null threshold of the best F1.

    A ``max_answer_len`` given is taken instead, and ``keep_threshold`` leaves the threshold as it is.

    Each length is judged at its own best threshold; ties go to the longer, which forbids less. The threshold
    kept is the ``stable_null_threshold`` of that length. A part that lacks
    questions with or without an answer tells nothing of a threshold, which then stays as it is. The
    temperature comes last, so that the answers given are right as often as their scores say, see ``fit_temperature``.
    """
    tried: list[tuple[float, int, QaSettings, _NullRows | None]] = []
    tunes = settings.null_threshold is not None and not keep_threshold and tells_thresholds(features)
    for length in (max_answer_len,) if max_answer_len else ANSWER_LENGTHS:
        candidate = replace(settings, max_answer_len=length)
        rows = None
        if tunes:
            rows = _null_rows(features, logits, candidate)
            f1 = rows.f1(best_null_threshold(rows.differences, rows.span_f1, rows.null_f1))
        else:
            f1 = score_logits(features, logits, candidate).f1
        tried.append((round(f1, 6), length, candidate, rows))
    _, _, chosen, rows = max(tried, key=lambda t: t[:2])
    if rows is not None:
        threshold = stable_null_threshold(rows.differences, rows.span_f1, rows.null_f1)
        chosen = replace(chosen, null_threshold=threshold)
    return replace(chosen, temperature=_fitted_temperature(features, logits, chosen))


def tells_thresholds(features: FeatureSet) -> bool:
    """Whether there are questions with an answer and questions without: a null threshold trades one for the other."""
    return len({bool(e.answers) for e in features.examples}) == 2


def no_answer_report(features: FeatureSet, logits: Logits, settings: QaSettings) -> dict[str, float]:
    """F1 in percent at the chosen null threshold, at threshold 0, and when every question is answered."""
    rows = _null_rows(features, logits, settings)
    thresholds = {"f1": settings.null_threshold or 0.0, "f1_threshold_0": 0.0, "f1_always_answer": np.inf}
    return {name: rows.f1(threshold) for name, threshold in thresholds.items()}


def calibration_report(features: FeatureSet, logits: Logits, settings: QaSettings) -> dict[str, Any]:
    """Expected calibration error (ECE, 0 to 1) at temperature 1 and at the chosen one, and the latter's bins.

    An answer is right where it matches an annotated one exactly, as EM counts it.
    """
    correct = score_logits(features, logits, settings).rows_exact_match
    before, after = (
        np.asarray([a.score for a in answers_of(features, logits, replace(settings, temperature=t))], dtype=np.float64)
        for t in (1.0, settings.temperature)
    )
    return {
        "ece_before": expected_calibration_error(before, correct),
        "ece": expected_calibration_error(after, correct),
        "bins": [b.to_dict() for b in confidence_bins(after, correct)],
    }


def report_choice(
    part: str,
    features: FeatureSet,
    logits: Logits,
    settings: QaSettings,
    metrics: dict[str, Any],
    *,
    threshold_given: bool = False,
) -> str:
    """Adds what was chosen and what it brings on ``part`` to ``metrics``, and says it in one line.

    ``metrics["calibration"]`` gets the temperature and ``calibration_report`` by part, ``metrics["no_answer"]``,
    where the settings have a null threshold, the threshold and ``no_answer_report`` by part.
    """
    calibration = calibration_report(features, logits, settings)
    metrics.setdefault("calibration", {"temperature": settings.temperature})[part] = calibration
    line = (
        f"temperature {settings.temperature:.3f}: calibration error (ECE) {calibration['ece_before']:.3f} -> "
        f"{calibration['ece']:.3f}"
    )
    if settings.null_threshold is not None:
        report = no_answer_report(features, logits, settings)
        metrics.setdefault("no_answer", {"null_threshold": settings.null_threshold})[part] = report
        line += (
            f"; null threshold {settings.null_threshold:+.3f}: F1 {report['f1']:.1f} (at 0: {report['f1_threshold_0']:.1f}, "
            f"always answering: {report['f1_always_answer']:.1f})"
        )
        if threshold_given:
            line += "; the threshold as given"
        elif part == "dev" and not tells_thresholds(features):
            line += "; NOT tuned, because not both questions with and without an answer are on the dev part"
    return line


def _rows(features: FeatureSet, index: int) -> slice:
    return slice(features.first[index], features.first[index + 1])


def _decoded(features: FeatureSet, logits: Logits, settings: QaSettings, allow_no_answer: bool) -> list[Decoded]:
    scored = []
    for i, context in enumerate(features.contexts):
        rows = _rows(features, i)
        windows = [f.window for f in features.features[rows]]
        scored.append(settings.scored(windows, list(logits[0][rows]), list(logits[1][rows]), context))
    return decode_many(
        scored,
        max_answer_len=settings.max_answer_len,
        allow_no_answer=allow_no_answer,
        temperature=settings.temperature,
    )


@dataclass(frozen=True, slots=True)
class _NullRows:
    """A row a question: the null logit minus the best span's, and the F1, 0 to 1, of that span and of null."""

    differences: Rows
    span_f1: Rows
    null_f1: Rows

    def f1(self, threshold: float) -> float:
        """Mean F1, percent, where the null answer is given above ``threshold``."""
        return 100.0 * float(np.where(self.differences > threshold, self.null_f1, self.span_f1).mean())


def _null_rows(features: FeatureSet, logits: Logits, settings: QaSettings) -> _NullRows:
    examples = features.examples
    differences, spans = [], []
    for example, decoded in zip(examples, _decoded(features, logits, settings, False), strict=True):
        differences.append(decoded.null_difference)
        spans += rank_answers(decoded, example.context, top_k=1) or [Answer("", 0, 0, 0.0)]
    null = [Answer("", 0, 0, 0.0)] * len(examples)
    return _NullRows(np.asarray(differences), score(examples, spans).rows_f1, score(examples, null).rows_f1)


def _fitted_temperature(features: FeatureSet, logits: Logits, settings: QaSettings) -> float:
    """``fit_temperature`` on the answers that ``settings`` give to at most ``TEMPERATURE_QUESTIONS``, drawn evenly."""
    drawn = range(0, len(features.examples), -(-len(features.examples) // TEMPERATURE_QUESTIONS))
    right = score_logits(features, logits, settings).rows_exact_match[drawn]
    allow = settings.null_competes(features.examples)

    def answers() -> Iterator[tuple[float, FloatArray]]:
        for i in drawn:
            context, rows = features.contexts[i], _rows(features, i)
            windows = [f.window for f in features.features[rows]]
            scored = settings.scored(windows, list(logits[0][rows]), list(logits[1][rows]), context)
            starts, ends = scored.start_logits, scored.end_logits
            spans = span_table(windows, starts, ends, context, settings.max_answer_len).ravel()
            spans = spans[np.isfinite(spans)]
            best = int(spans.argmax()) if len(spans) else 0
            null = least_null_logit(windows, starts, ends)
            if allow and (not len(spans) or null - float(spans[best]) > (settings.null_threshold or 0.0)):
                yield null, spans
            elif len(spans):
                rest = np.delete(spans, best)
                yield float(spans[best]), np.append(rest, np.float32(null)) if allow else rest
            else:
                yield 0.0, spans

    return fit_temperature(answers(), right)
