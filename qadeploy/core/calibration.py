"""What a dev part teaches about a model's scores: the null threshold, the temperature, and their honesty.

All of it is numpy on rows of numbers, one a question; who decodes and who scores is not asked here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qadeploy.records import FloatArray

Rows = NDArray[np.float64]

ECE_BINS = 10
RESAMPLES = 200
TEMPERATURES: Rows = np.geomspace(0.1, 10.0, 49)


def best_null_threshold(differences: Rows, span_f1: Rows, null_f1: Rows) -> float:
    """The threshold with the best mean F1, where the null answer is given above it.

    ``differences`` ``[questions]`` is the null logit minus the best span's logit (+inf where there is no span, which
    is then the null answer at any threshold), ``span_f1`` and ``null_f1`` ``[questions]`` what either answer earns, 0 to
    1. One sort and two running sums, as in ``find_best_thresh`` of SQuAD v2's official script. The threshold
    stands half-way between the two questions that it parts, so that logits may move a little; beyond
    the outermost question it stands 1 away. Ties go to the threshold nearest 0. No questions: 0.0.
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
    earned = (spans + nulls)[: finite + 1]
    middles = bounds[:-1] + np.diff(bounds) / 2
    middles = np.where(middles < bounds[1:], middles, bounds[:-1])  # neighbours in float64 have no middle
    thresholds = np.concatenate(([bounds[0] - 1.0], middles, [bounds[-1] + 1.0]))
    possible = np.concatenate(([True], np.diff(bounds) > 0, [True]))  # equal differences cannot be parted
    thresholds, earned = thresholds[possible], earned[possible]
    best = np.flatnonzero(earned >= earned.max() - 1e-9)
    return float(thresholds[best[np.argmin(np.abs(thresholds[best]))]])


def stable_null_threshold(differences: Rows, span_f1: Rows, null_f1: Rows) -> float:
    """The mean of ``best_null_threshold`` over ``RESAMPLES`` bootstrap samples of the questions (Breiman 1996, bagging).

    F1 hardly changes over a wide range of thresholds, and the very best of a few hundred questions is one of its many small
    peaks: the mean stands inside the range. Drawn with a fixed seed.
    """
    generator = np.random.default_rng(0)
    size = len(differences)
    drawn = (generator.integers(0, size, size) for _ in range(RESAMPLES if size else 0))
    found = [best_null_threshold(differences[i], span_f1[i], null_f1[i]) for i in drawn]
    return float(np.mean(found)) if found else 0.0


def fit_temperature(answers: Iterable[tuple[float, FloatArray]], right: Rows) -> float:
    """The temperature T under which the scores of the given answers are likeliest to be right as often as they say.

    An answer is (its logit, the logits of all other candidates ``[candidates]``), ``right`` ``[answers]`` is 1 where it is
    right and 0 where not. Its score p is its share in softmax(logits / T) (Guo et al. 2017, "On Calibration of Modern
    Neural Networks", section 4.2). The loss is the squared distance of p from ``right`` (Brier 1950): the likelihood
    of the annotated spans would punish confidence in another span that is just as right, and cross entropy lets
    a few confident mistakes set T for all. ``right`` stands as Platt's targets (n + 1) / (n + 2) and 1 / (m + 2)
    for n right and m wrong answers (Platt 1999, "Probabilistic Outputs for Support Vector Machines", section
    2.2), so that a few answers, all right, do not ask for endless confidence.

    One pass: the losses on ``TEMPERATURES``, a geometric grid, then the vertex of the parabola in log T
    through the best three. 1.0 where no answer has a rival.
    """
    hits = float(np.sum(right))
    targets = np.where(right > 0, (hits + 1) / (hits + 2), 1 / (len(right) - hits + 2))
    losses = np.zeros(len(TEMPERATURES))
    for (logit, others), target in zip(answers, targets, strict=True):
        if len(others):
            losses += answer_loss(logit, others, float(target), TEMPERATURES)
    if not losses.any():
        return 1.0
    best = int(np.argmin(losses))
    if best in {0, len(TEMPERATURES) - 1}:
        return float(TEMPERATURES[best])
    left, middle, right_loss = losses[best - 1 : best + 2]
    step = np.log(TEMPERATURES[1] / TEMPERATURES[0])
    bend = left - 2 * middle + right_loss
    shift = 0.5 * (left - right_loss) / bend if bend > 0 else 0.0
    return float(TEMPERATURES[best] * np.exp(shift * step))


def answer_loss(logit: float, others: FloatArray, target: float, temperatures: Rows) -> Rows:
    """``[temperatures]``: (p - target) squared, p the share of ``logit`` beside ``others`` in softmax at T."""
    peak = float(others.max())
    falls = np.divide.outer(np.asarray(others, dtype=np.float64) - peak, temperatures)
    rivals = np.log(np.exp(falls).sum(axis=0)) + peak / temperatures
    odds = np.exp(np.minimum(rivals - logit / temperatures, 700.0))  # exp(700) is about the largest float64
    losses: Rows = (1.0 / (1.0 + odds) - target) ** 2
    return losses


@dataclass(frozen=True, slots=True)
class ConfidenceBin:
    """The answers whose confidence lies in (low, high]: how many, their mean confidence, the share that is right."""

    low: float
    high: float
    count: int
    confidence: float
    accuracy: float

    def to_dict(self) -> dict[str, Any]:
        """The bin as plain JSON values."""
        return asdict(self)


def confidence_bins(confidences: Rows, correct: Rows, bins: int = ECE_BINS) -> tuple[ConfidenceBin, ...]:
    """``bins`` of equal width over 0 to 1, the empty ones too; both arrays ``[answers]``, 0 to 1. 0 is in the first."""
    number = np.searchsorted(np.arange(1, bins) / bins, confidences)
    found = []
    for i in range(bins):
        inside = number == i
        count = int(inside.sum())
        confidence, accuracy = (float(np.mean(rows[inside])) if count else 0.0 for rows in (confidences, correct))
        found.append(ConfidenceBin(i / bins, (i + 1) / bins, count, confidence, accuracy))
    return tuple(found)


def expected_calibration_error(confidences: Rows, correct: Rows, bins: int = ECE_BINS) -> float:
    """The mean distance of confidence from accuracy over equal-width bins, weighted by their answers, 0 to 1.

    Formula: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, equation 3. 0.0 for no answers.
    """
    total = len(confidences)
    parts = confidence_bins(confidences, correct, bins)
    return sum(b.count * abs(b.accuracy - b.confidence) for b in parts) / total if total else 0.0
