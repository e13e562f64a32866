"""The null threshold, the temperature and the calibration error against brute force and theory."""

from __future__ import annotations

import math
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qadeploy.core.calibration import (
    TEMPERATURES,
    answer_loss,
    best_null_threshold,
    confidence_bins,
    expected_calibration_error,
    fit_temperature,
    stable_null_threshold,
)

thorough = settings(max_examples=300, deadline=None)
SHARES = st.sampled_from([0.0, 0.25, 0.5, 2 / 3, 1.0])
DIFFERENCES = st.one_of(st.floats(-30, 30), st.sampled_from([-1.0, 0.0, 0.5, 0.5000000001, math.inf]))


def earned(threshold: float, rows: list[tuple[float, float, float]]) -> float:
    """The score by SQuAD v2's rule: null if the difference exceeds the threshold, or if there is no span."""
    return math.fsum(null if d > threshold or d == math.inf else span for d, span, null in rows)


# ---------------------------------------------------------------- null threshold


@thorough
@given(rows=st.lists(st.tuples(DIFFERENCES, SHARES, SHARES), min_size=1, max_size=30))
def test_no_threshold_earns_more(rows):
    columns = [np.asarray(column, dtype=np.float64) for column in zip(*rows, strict=True)]
    found = best_null_threshold(*columns)
    assert math.isfinite(found)
    values = sorted({d for d, _, _ in rows if d < math.inf})
    tried = [x for v in values for x in (math.nextafter(v, -math.inf), v)] or [0.0]
    assert earned(found, rows) == pytest.approx(max(earned(t, rows) for t in tried), abs=1e-6)


@thorough
@given(rows=st.lists(st.tuples(DIFFERENCES, SHARES, st.booleans()), min_size=1, max_size=30))
def test_no_threshold_has_a_better_geometric_mean(rows):
    has = [(d, f1, 0.0) for d, f1, null in rows if not null]
    no = [(d, 0.0, 1.0) for d, _, null in rows if null]
    columns = [np.asarray(column, dtype=np.float64) for column in zip(*has, *no, strict=True)]
    found = best_null_threshold(*columns, balanced=True)

    def mean(threshold: float) -> float:
        return math.sqrt(earned(threshold, has) * earned(threshold, no))

    values = sorted({d for d, _, _ in rows if d < math.inf})
    tried = [x for v in values for x in (math.nextafter(v, -math.inf), v)] or [0.0]
    assert mean(found) == pytest.approx(max(mean(t) for t in tried), abs=1e-6)


def test_a_weak_model_is_not_made_to_refuse_nearly_all():
    """Differences of -65 to 35 with an answer, which is right in half of the cases, and of -35 to 65 without one."""
    ranks = np.arange(200) % 100 - 49.5
    rows = (
        ranks + np.repeat([-15.0, 15.0], 100),
        np.tile([1.0, 0.0], 100) * (np.arange(200) < 100),
        np.arange(200) >= 100,
    )
    answered = {}
    for balanced in (False, True):
        threshold = stable_null_threshold(*(np.asarray(r, dtype=np.float64) for r in rows), balanced=balanced)
        answered[balanced] = (rows[0][:100] <= threshold).mean()
    # The mean falls from the first difference without an answer on, -35; (t + 65) (65 - t) is highest at 0.
    assert answered == pytest.approx({False: 0.3, True: 0.65}, abs=0.1)


def official_best(rows: dict[str, tuple[float, float, bool]]) -> float:
    """The best score in percent by the algorithm of SQuAD v2's evaluate-v2.0.py, ``find_best_thresh``.

    Rows: id to (null odds, score of the answer given, has an answer). It begins with "no answer" everywhere and
    lets one question after the other be answered, from the least odds up.
    """
    score = best = sum(not has for _, _, has in rows.values())
    for key in sorted(rows, key=lambda k: rows[k][0]):
        _, value, has = rows[key]
        score += value if has else -1
        best = max(best, score)
    return 100.0 * best / len(rows)


@pytest.mark.parametrize("seed", range(5))
def test_the_best_f1_is_that_of_the_official_script(seed):
    generator = np.random.default_rng(seed)
    has = generator.random(80) < 0.6
    odds = generator.normal(size=80) + 1.5 * ~has
    f1 = np.where(has, generator.choice([0, 0.4, 1], size=80), 0.0)
    threshold = best_null_threshold(odds, f1, (~has).astype(np.float64))
    reached = 100 * float(np.where(odds > threshold, ~has, f1).mean())
    rows = {str(i): (float(odds[i]), float(f1[i]), bool(has[i])) for i in range(80)}
    assert reached == pytest.approx(official_best(rows))


@pytest.mark.parametrize(
    ("differences", "span", "null", "expected"),
    [
        ([-3.0, 1.0], [1, 0], [0, 1], -1.0),  # half-way between the two that it separates
        ([4.0, 5.0], [1, 1], [0, 0], 6.0),  # answers everywhere: 1 beyond the last
        ([-5.0, -4.0], [0, 0], [1, 1], -6.0),  # null everywhere
        ([-5.0, 7.0], [0.5, 0.5], [0.5, 0.5], 1.0),  # all the same: of the possible, the one nearest 0
        ([math.inf, math.inf], [0, 0], [1, 1], 0.0),  # never a span
        ([], [], [], 0.0),
    ],
)
def test_where_the_threshold_stands(differences, span, null, expected):
    assert best_null_threshold(*(np.asarray(c, dtype=np.float64) for c in (differences, span, null))) == expected


def test_the_threshold_kept_is_less_a_matter_of_chance_than_the_best():
    """Over many samples of one population, where the best F1 lies at the difference of the means."""
    generator = np.random.default_rng(0)
    best, stable = [], []
    for _ in range(40):
        has = generator.random(120) < 0.5
        rows = generator.normal(size=120) * 3 + np.where(has, 0.0, 4.0), has * 0.9, (~has).astype(np.float64)
        best.append(best_null_threshold(*rows))
        stable.append(stable_null_threshold(*rows))
    assert np.std(stable) < 0.75 * np.std(best)
    # Null earns 1 and a span 0.9, so the densities cross where 0.9 N(t; 0, 3) = N(t; 4, 3): t = 2 + 9 / 4 log 0.9.
    assert np.mean(stable) == pytest.approx(2 + 9 / 4 * math.log(0.9), abs=0.4)
    again = stable_null_threshold(*rows)
    assert again == stable[-1]


def test_the_threshold_kept_of_clear_cases():
    parted = (
        np.asarray([-9.0] * 30 + [5.0] * 30),
        np.asarray([1.0] * 30 + [0.0] * 30),
        np.asarray([0.0] * 30 + [1.0] * 30),
    )
    assert stable_null_threshold(*parted) == -2.0  # half-way, in every sample
    assert stable_null_threshold(*(np.asarray([]),) * 3) == 0.0


# ---------------------------------------------------------------- temperature


def plain_loss(logit: float, others: list[float], target: float, temperature: float) -> float:
    weights = [math.exp(x / temperature) for x in (logit, *others)]
    return (weights[0] / math.fsum(weights) - target) ** 2


@thorough
@given(
    logit=st.floats(-20, 20, width=32),
    others=st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=8),
    target=st.floats(0, 1),
    t=st.floats(0.2, 5),
)
def test_the_loss_is_that_of_the_plain_formula(logit, others, target, t):
    found = answer_loss(logit, np.asarray(others, dtype=np.float32), target, np.asarray([t]))
    assert found[0] == pytest.approx(plain_loss(logit, others, target, t), rel=1e-6, abs=1e-9)


Made = tuple[list[tuple[float, np.ndarray]], np.ndarray]


def made(count: int, true: float, seed: int = 7) -> Made:
    """Best answers, each right with the probability that its softmax at temperature ``true`` gives."""
    generator = np.random.default_rng(seed)
    answers, right = [], []
    for _ in range(count):
        logits = np.sort(3 * generator.normal(size=12))[::-1].astype(np.float32)
        weights = np.exp(logits.astype(np.float64) / true)
        answers.append((float(logits[0]), logits[1:]))
        right.append(float(generator.random() < weights[0] / weights.sum()))
    return answers, np.asarray(right)


@pytest.mark.parametrize("true", [0.5, 1.0, 3.0])
def test_the_temperature_that_made_the_answers_is_found(true):
    assert fit_temperature(*made(4000, true)) == pytest.approx(true, rel=0.06)


@pytest.mark.parametrize(("count", "true"), [(60, 2.0), (12, 3.0)])
def test_the_temperature_is_the_least_of_a_dense_search_with_targets_of_platt_and_a_prior(count, true):
    answers, right = made(count, true)
    hits, misses = sum(right), count - sum(right)
    targets = [(hits + 1) / (hits + 2) if r else 1 / (misses + 2) for r in right]
    dense = np.geomspace(0.5, 8, 400)
    losses = [
        sum(plain_loss(a, list(map(float, o)), t, float(d)) for (a, o), t in zip(answers, targets, strict=True))
        + 0.6 * math.log(d) ** 2
        for d in dense
    ]
    assert fit_temperature(answers, right) == pytest.approx(dense[np.argmin(losses)], rel=0.01)


def test_answers_that_are_all_right_are_trusted_by_their_number():
    best = (5.0, np.asarray([3.0], dtype=np.float32))  # right in 88 of 100 cases
    found = [fit_temperature([best] * count, np.ones(count)) for count in (1, 3, 30, 3_000)]
    assert found == sorted(found, reverse=True)
    dense = np.geomspace(0.5, 2, 400)  # a single answer, whose target is 2 / 3
    losses = [(1 / (1 + math.exp(-2 / t)) - 2 / 3) ** 2 + 0.6 * math.log(t) ** 2 for t in dense]
    assert found[0] == pytest.approx(dense[np.argmin(losses)], rel=0.01)
    assert found[-1] < 0.4


def test_few_answers_whose_losses_hardly_depend_on_the_temperature_leave_it_near_1():
    """36 of them, 7 wrong, of which the squared error alone is least at T = 0.14: every score would be 0 or 1."""
    sure, unsure = ((gap, np.asarray([0.0], dtype=np.float32)) for gap in (2.0, 0.2))
    answers = [sure] * 16 + [unsure] * 13 + [sure] * 4 + [unsure] * 3
    assert fit_temperature(answers, np.repeat([1.0, 0.0], [29, 7])) == pytest.approx(1.0, abs=0.2)


def test_temperatures_at_the_ends_and_without_a_rival():
    none = np.asarray([], dtype=np.float32)
    assert fit_temperature([], np.asarray([])) == 1.0
    assert fit_temperature([(3.0, none), (-1.0, none)], np.asarray([1.0, 0.0])) == 1.0
    rival = np.asarray([1.0], dtype=np.float32)
    assert fit_temperature([(5.0, rival)] * 300, np.zeros(300)) == TEMPERATURES[-1]  # all wrong: as unsure as may be
    assert fit_temperature([(1.05, rival)] * 900, np.ones(900)) == TEMPERATURES[0]
    huge = np.asarray([-4e4], dtype=np.float32)
    assert math.isfinite(fit_temperature([(4e4, huge), (-4e4, -huge)], np.asarray([0.0, 1.0])))


# ---------------------------------------------------------------- calibration error


@thorough
@given(rows=st.lists(st.tuples(st.one_of(st.floats(0, 1), st.integers(0, 10).map(lambda i: i / 10)), st.booleans())))
def test_the_calibration_error_is_that_of_plain_loops(rows):
    total = 0.0
    for i in range(10):
        inside = [(c, right) for c, right in rows if i / 10 < c <= (i + 1) / 10 or (i == 0 and c == 0)]
        if inside:
            accuracy = sum(right for _, right in inside) / len(inside)
            total += len(inside) / len(rows) * abs(accuracy - sum(c for c, _ in inside) / len(inside))
    confidences = np.asarray([c for c, _ in rows], dtype=np.float64)
    correct = np.asarray([right for _, right in rows], dtype=np.float64)
    assert expected_calibration_error(confidences, correct) == pytest.approx(total, abs=1e-9)
    assert sum(b.count for b in confidence_bins(confidences, correct)) == len(rows)


def test_bins_by_hand():
    bins = confidence_bins(np.asarray([0.0, 0.1, 0.11, 0.95, 1.0]), np.asarray([0, 1, 1, 1, 0]))
    assert len(bins) == 10
    assert [b.count for b in bins] == [2, 1, 0, 0, 0, 0, 0, 0, 0, 2]
    assert asdict(bins[9]) == {"low": 0.9, "high": 1.0, "count": 2, "confidence": 0.975, "accuracy": 0.5}
    assert (bins[0].confidence, bins[0].accuracy, bins[5].accuracy) == (0.05, 0.5, 0.0)
    assert expected_calibration_error(
        np.asarray([0.0, 0.1, 0.11, 0.95, 1.0]), np.asarray([0, 1, 1, 1, 0])
    ) == pytest.approx((2 * 0.45 + 0.89 + 2 * 0.475) / 5)
