"""Calibration of a model's scores on a dev set: the null threshold, the temperature, the calibration error.

Everything here is numpy on one row of numbers per question; decoding and scoring happen elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from qadeploy.records import Float64Array, FloatArray

ECE_BINS = 10
RESAMPLES = 200
TEMPERATURES: Float64Array = np.geomspace(0.1, 10.0, 49)
# Variance of the error of a confidence around 0.8, over the variance of log T: few models need a T below 1/3 or above 3.
PRIOR = 0.15 / 0.5**2


def best_null_threshold(
    differences: Float64Array, span_f1: Float64Array, null_f1: Float64Array, *, balanced: bool = False
) -> float:
    """Finds the threshold with the best F1 when the null answer is given to every question above it.

    It takes one sort and two running sums, as ``find_best_thresh`` of SQuAD v2's official script does. The threshold
    lies half-way between the two differences that it separates, so that small changes of the logits do no harm, or 1
    beyond the outermost difference. Ties go to the threshold nearest 0; without questions it is 0.0.

    Args:
        differences: Null logit minus the best span's logit, ``[questions]``; +inf without a span, in which case the
            null answer is given at any threshold.
        span_f1: F1 of the best span, 0 to 1, ``[questions]``.
        null_f1: F1 of the null answer, 0 to 1, ``[questions]``.
        balanced: Whether the best F1 is the geometric mean of the F1 of the questions with an answer and of those without
            one (Kubat and Matwin, ICML 1997), whatever their numbers; otherwise it is the mean over all questions.
    """
    order = np.argsort(differences, kind="stable")
    sorted_differences = differences[order]
    finite = int(np.isfinite(sorted_differences).sum())
    if not finite:
        return 0.0
    bounds = sorted_differences[:finite]
    # earned[k]: the k smallest differences answer with a span, the others with null.
    spans = np.concatenate(([0.0], np.cumsum(span_f1[order])))
    nulls = np.concatenate((np.cumsum(null_f1[order][::-1])[::-1], [0.0]))
    earned = (spans * nulls if balanced else spans + nulls)[: finite + 1]
    middles = bounds[:-1] + np.diff(bounds) / 2
    middles = np.where(middles < bounds[1:], middles, bounds[:-1])  # neighbours in float64 have no middle
    thresholds = np.concatenate(([bounds[0] - 1.0], middles, [bounds[-1] + 1.0]))
    possible = np.concatenate(([True], np.diff(bounds) > 0, [True]))  # equal differences cannot be separated
    thresholds, earned = thresholds[possible], earned[possible]
    best = np.flatnonzero(earned >= earned.max() - 1e-9)
    return float(thresholds[best[np.argmin(np.abs(thresholds[best]))]])


def stable_null_threshold(
    differences: Float64Array, span_f1: Float64Array, null_f1: Float64Array, *, balanced: bool = False
) -> float:
    """Averages ``best_null_threshold`` over ``RESAMPLES`` bootstrap samples of the questions (Breiman 1996, bagging).

    F1 hardly changes over a wide range of thresholds, and the best threshold on a few hundred questions is one of many
    small peaks; the mean lies inside the range. The seed is fixed. For the arguments see ``best_null_threshold``.
    """
    generator = np.random.default_rng(0)
    size = len(differences)
    drawn = (generator.integers(0, size, size) for _ in range(RESAMPLES if size else 0))
    found = [best_null_threshold(differences[i], span_f1[i], null_f1[i], balanced=balanced) for i in drawn]
    return float(np.mean(found)) if found else 0.0


def fit_temperature(answers: Iterable[tuple[float, FloatArray]], right: Float64Array) -> float:
    """Fits the temperature T so that answers are right as often as their scores say.

    The score p of an answer is its share in softmax(logits / T) (Guo et al. 2017, "On Calibration of Modern
    Neural Networks", section 4.2). The loss is the squared distance of p from ``right`` (Brier 1950): the likelihood
    of the annotated spans would punish confidence in another span that is just as right, and cross entropy lets
    a few confident mistakes set T for all. ``right`` is replaced by Platt's targets (n + 1) / (n + 2) and 1 / (m + 2)
    for n right and m wrong answers (Platt 1999, "Probabilistic Outputs for Support Vector Machines", section
    2.2), so that a few answers that are all right do not call for unlimited confidence. With a few dozen answers the losses
    may hardly depend on T, and noise would choose it; so log T has a normal prior with mean 0 and standard deviation 0.5,
    which adds ``PRIOR`` log(T)^2 to the sum of losses and is negligible for some hundred answers.

    The losses are computed on ``TEMPERATURES``, a geometric grid; T is the vertex of the parabola in log T through the
    best three points, or 1.0 if no answer has other candidates.

    Args:
        answers: For each answer its logit and the logits of all other candidates, ``[candidates]``.
        right: 1 if the answer is right, else 0, ``[answers]``.
    """
    hits = float(np.sum(right))
    targets = np.where(right > 0, (hits + 1) / (hits + 2), 1 / (len(right) - hits + 2))
    losses = np.zeros(len(TEMPERATURES))
    for (logit, others), target in zip(answers, targets, strict=True):
        if len(others):
            losses += answer_loss(logit, others, float(target), TEMPERATURES)
    if not losses.any():
        return 1.0
    losses += PRIOR * np.log(TEMPERATURES) ** 2
    best = int(np.argmin(losses))
    if best in {0, len(TEMPERATURES) - 1}:
        return float(TEMPERATURES[best])
    left, middle, right_loss = losses[best - 1 : best + 2]
    step = np.log(TEMPERATURES[1] / TEMPERATURES[0])
    bend = left - 2 * middle + right_loss
    shift = 0.5 * (left - right_loss) / bend if bend > 0 else 0.0
    return float(TEMPERATURES[best] * np.exp(shift * step))


def answer_loss(logit: float, others: FloatArray, target: float, temperatures: Float64Array) -> Float64Array:
    """Returns (p - target) squared for each temperature, p being the share of ``logit`` among ``others`` in the softmax."""
    peak = float(others.max())
    falls = np.divide.outer(np.asarray(others, dtype=np.float64) - peak, temperatures)
    rivals = np.log(np.exp(falls).sum(axis=0)) + peak / temperatures
    odds = np.exp(np.minimum(rivals - logit / temperatures, 700.0))  # exp(700) is about the largest float64
    losses: Float64Array = (1.0 / (1.0 + odds) - target) ** 2
    return losses


@dataclass(frozen=True, slots=True)
class ConfidenceBin:
    """The answers whose confidence lies in (low, high]: their number, mean confidence and accuracy."""

    low: float
    high: float
    count: int
    confidence: float
    accuracy: float


def confidence_bins(confidences: Float64Array, correct: Float64Array) -> tuple[ConfidenceBin, ...]:
    """Sorts answers into ``ECE_BINS`` bins of equal width from 0 to 1, empty bins included.

    Args:
        confidences: Scores of the answers, 0 to 1, ``[answers]``; 0 falls into the first bin.
        correct: 1 if the answer is right, else 0, ``[answers]``.
    """
    number = np.searchsorted(np.arange(1, ECE_BINS) / ECE_BINS, confidences)
    found = []
    for i in range(ECE_BINS):
        inside = number == i
        count = int(inside.sum())
        confidence, accuracy = (float(np.mean(rows[inside])) if count else 0.0 for rows in (confidences, correct))
        found.append(ConfidenceBin(i / ECE_BINS, (i + 1) / ECE_BINS, count, confidence, accuracy))
    return tuple(found)


def expected_calibration_error(confidences: Float64Array, correct: Float64Array) -> float:
    """Computes the mean distance between confidence and accuracy over ``confidence_bins``, weighted by answers, 0 to 1.

    Formula: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, equation 3. 0.0 without answers.
    """
    total = len(confidences)
    parts = confidence_bins(confidences, correct)
    return sum(b.count * abs(b.accuracy - b.confidence) for b in parts) / total if total else 0.0
