"""From logits to answers and scores, and the settings that training chooses.

``max_answer_len`` comes from the training answers; the null threshold (if any training question has no answer) and the
temperature are chosen on the dev set. All three go into the settings that the checkpoint and its bundles keep.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from qadeploy.core.calibration import (
    confidence_bins,
    expected_calibration_error,
    fit_temperature,
    stable_null_threshold,
)
from qadeploy.core.decoding import Decoded, WindowLogits, rank_answers, span_table
from qadeploy.core.metrics import Scores, score
from qadeploy.core.settings import QaSettings, any_unanswerable
from qadeploy.evaluation.predictions import Prediction, predict
from qadeploy.records import NO_ANSWER, Answer, Float64Array, FloatArray, Logits
from qadeploy.training.features import FeatureSet

ANSWER_SHARE = 98  # percent of the training answers that max_answer_len admits
LEAST_ANSWER_LEN = 8  # tokens; a word that no training answer has may be split into several
LEAST_BALANCED = 10
TEMPERATURE_QUESTIONS = 2_000  # more hardly change the temperature


def initial_settings(settings: QaSettings, training_set: FeatureSet, unlabelled: int = 0) -> QaSettings:
    """The settings that epochs are scored with, before anything is chosen on the dev set.

    ``max_answer_len`` is the length in tokens that ``ANSWER_SHARE`` percent of the training answers do not exceed, at least
    ``LEAST_ANSWER_LEN``: a dev set of some fifty questions hardly tells one length from another. Temperature 1. If any
    training question has no answer, a null threshold of 0 and ranking relative to the null logits; otherwise neither,
    whatever the base model's settings.

    Args:
        settings: The base model's; ``max_answer_len`` is kept if the training questions have no answers.
        training_set: The training questions.
        unlabelled: How many of the last questions nobody annotated; that they have no answer says nothing.
    """
    found = zip(training_set.examples, training_set.contexts, strict=True)
    spans = [context.tokens_of(a.start, a.end) for example, context in found for a in example.answers]
    lengths = [max(LEAST_ANSWER_LEN, last - first + 1) for first, last in filter(None, spans)]
    unanswerable = any_unanswerable(training_set.examples[: len(training_set.examples) - unlabelled])
    most = int(np.percentile(lengths, ANSWER_SHARE, method="inverted_cdf")) if lengths else settings.max_answer_len
    return replace(
        settings,
        max_answer_len=most,
        null_threshold=0.0 if unanswerable else None,
        temperature=1.0,
        relative_to_null=unanswerable,
    )


def answers_of(features: FeatureSet, logits: Logits, settings: QaSettings) -> list[Answer]:
    """The best answer of every example. ``logits`` are start and end logits ``[windows, longest]`` each."""
    allow = any_unanswerable(features.examples)
    found = []
    for example, decoded in zip(features.examples, _decoded(features, logits, settings, allow), strict=True):
        ranked = rank_answers(
            decoded, example.context, top_k=1, allow_no_answer=allow, null_threshold=settings.null_threshold
        )
        found.append(ranked[0] if ranked else NO_ANSWER)
    return found


def predictions_of(
    features: FeatureSet, logits: Logits, settings: QaSettings, n_best_size: int
) -> Iterator[Prediction]:
    """Every example's entries in the prediction files, with the texts of ``answers_of``."""
    allow = any_unanswerable(features.examples)
    for i, (example, answer) in enumerate(zip(features.examples, answers_of(features, logits, settings), strict=True)):
        scored = _scored(features, logits, settings, i)
        yield predict(example, answer, scored, settings, n_best_size=n_best_size, allow_no_answer=allow)


def score_logits(features: FeatureSet, logits: Logits, settings: QaSettings) -> Scores:
    """The scores of ``answers_of``, by the metric of ``settings``."""
    return score(features.examples, answers_of(features, logits, settings), settings.metric)


def choose_settings(
    features: FeatureSet, logits: Logits, settings: QaSettings, *, keep_threshold: bool = False, balanced: bool = False
) -> QaSettings:
    """Chooses the null threshold (if ``settings`` have one) and the temperature on the dev set.

    The threshold is the ``stable_null_threshold``. The temperature is fitted last, on the answers that the other settings
    give (see ``fit_temperature``).

    Args:
        features: The dev set.
        logits: Start and end logits, ``[windows, longest]`` each.
        settings: The settings that epochs were scored with; all others are kept.
        keep_threshold: Whether to keep the null threshold. It is also kept if the dev set has too few questions for it
            (``can_tune_threshold``).
        balanced: Whether the threshold balances HasAns and NoAns (see ``best_null_threshold``), for a dev set whose share of
            questions without an answer says nothing about the share in production. With the mean over all questions, a weak
            model that answers half of them wrongly would refuse nearly all.
    """
    if settings.null_threshold is not None and not keep_threshold and can_tune_threshold(features, balanced):
        threshold = stable_null_threshold(*_null_rows(features, logits, settings), balanced=balanced)
        settings = replace(settings, null_threshold=threshold)
    return replace(settings, temperature=_fitted_temperature(features, logits, settings))


def can_tune_threshold(features: FeatureSet, balanced: bool) -> bool:
    """Whether a null threshold can be chosen on these questions.

    Some must have an answer and some none; for a balanced one, ``LEAST_BALANCED`` of each kind. With three of each, one
    question that the model gets wrong would move the threshold by several logits.
    """
    answered = sum(bool(e.answers) for e in features.examples)
    return min(answered, len(features.examples) - answered) >= (LEAST_BALANCED if balanced else 1)


def no_answer_report(features: FeatureSet, logits: Logits, settings: QaSettings) -> dict[str, float]:
    """F1 in percent at the chosen null threshold, at threshold 0, and when every question is answered."""
    differences, span_f1, null_f1 = _null_rows(features, logits, settings)
    thresholds = {"f1": settings.null_threshold or 0.0, "f1_threshold_0": 0.0, "f1_always_answer": np.inf}
    return {
        name: 100.0 * float(np.where(differences > threshold, null_f1, span_f1).mean())
        for name, threshold in thresholds.items()
    }


def calibration_report(features: FeatureSet, logits: Logits, settings: QaSettings) -> dict[str, Any]:
    """Expected calibration error (ECE, 0 to 1) at temperature 1 and at the chosen one, and the latter's bins.

    An answer is right if it matches an annotated one exactly, as EM counts it.
    """
    correct = score_logits(features, logits, settings).rows_exact_match
    before, after = (
        np.asarray([a.score for a in answers_of(features, logits, replace(settings, temperature=t))], dtype=np.float64)
        for t in (1.0, settings.temperature)
    )
    return {
        "ece_before": expected_calibration_error(before, correct),
        "ece": expected_calibration_error(after, correct),
        "bins": [asdict(b) for b in confidence_bins(after, correct)],
    }


def report_choice(
    features: FeatureSet, logits: Logits, settings: QaSettings
) -> tuple[dict[str, Any], dict[str, float] | None]:
    """The ``calibration_report``, and the ``no_answer_report``: None if the settings have no null threshold."""
    no_answer = None if settings.null_threshold is None else no_answer_report(features, logits, settings)
    return calibration_report(features, logits, settings), no_answer


def _scored(features: FeatureSet, logits: Logits, settings: QaSettings, index: int) -> WindowLogits:
    """The windows of an example with their logits, as ``settings`` rank them."""
    rows = slice(features.first[index], features.first[index + 1])
    windows = [f.window for f in features.features[rows]]
    return settings.window_logits(windows, list(logits[0][rows]), list(logits[1][rows]), features.contexts[index])


def _decoded(features: FeatureSet, logits: Logits, settings: QaSettings, allow_no_answer: bool) -> list[Decoded]:
    scored = [_scored(features, logits, settings, i) for i in range(len(features.examples))]
    return [settings.decode(one, allow_no_answer=allow_no_answer) for one in scored]


def _null_rows(
    features: FeatureSet, logits: Logits, settings: QaSettings
) -> tuple[Float64Array, Float64Array, Float64Array]:
    """For each question the null logit minus the best span's, and the F1, 0 to 1, of that span and of null."""
    examples = features.examples
    differences, spans = [], []
    for example, decoded in zip(examples, _decoded(features, logits, settings, False), strict=True):
        differences.append(decoded.null_difference)
        spans += rank_answers(decoded, example.context, top_k=1) or [NO_ANSWER]
    span_f1, null_f1 = (
        score(examples, answers, settings.metric).rows_f1 for answers in (spans, [NO_ANSWER] * len(examples))
    )
    return np.asarray(differences), span_f1, null_f1


def _fitted_temperature(features: FeatureSet, logits: Logits, settings: QaSettings) -> float:
    """``fit_temperature`` on the answers that ``settings`` give to at most ``TEMPERATURE_QUESTIONS``, drawn evenly."""
    drawn = range(0, len(features.examples), -(-len(features.examples) // TEMPERATURE_QUESTIONS))
    right = score_logits(features, logits, settings).rows_exact_match[drawn]
    allow = any_unanswerable(features.examples)

    def answers() -> Iterator[tuple[float, FloatArray]]:
        for i in drawn:
            scored = _scored(features, logits, settings, i)
            spans = span_table(scored, settings.max_answer_len).ravel()
            spans = spans[np.isfinite(spans)]
            best = int(spans.argmax()) if len(spans) else 0
            null = scored.null_logit
            if allow and (not len(spans) or null - float(spans[best]) > (settings.null_threshold or 0.0)):
                yield null, spans
            elif len(spans):
                rest = np.delete(spans, best)
                yield float(spans[best]), np.append(rest, np.float32(null)) if allow else rest
            else:
                yield 0.0, spans

    return fit_temperature(answers(), right)
