"""The buckets of the figures that are watched for drift."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from qadeploy.core.drift import BOUNDS, Distribution, Drift, Figure


@pytest.mark.parametrize(
    ("figure", "values", "at_most"),
    [
        (Figure.NO_ANSWER, [0, 1, 1], [1, 3]),
        (Figure.QUESTION_TOKENS, [4, 5, 6, 101], [1, *[3] * 11, 4]),  # a bound belongs to its bucket
        (Figure.SCORE, [0.1, 0.1000001, 1.0], [1, *[2] * 10, 3]),
    ],
)
def test_values_are_counted_as_prometheus_does(figure, values, at_most):
    drift = Drift()
    for value in values:
        drift.add({figure: value})
    found = drift.distributions()[figure]
    assert found.at_most() == at_most
    assert found.total == pytest.approx(sum(values))
    assert found.to_dict() == {"bounds": [*BOUNDS[figure]], "counts": [*found.counts]}


def test_the_bounds_of_every_figure_rise():
    assert set(BOUNDS) == set(Figure)
    assert all([*bounds] == sorted(set(bounds)) for bounds in BOUNDS.values())


def test_nothing_asked_is_nothing_counted():
    assert Drift().distributions()[Figure.NO_ANSWER] == Distribution((0.0,), (0, 0), 0.0)


def test_threads_lose_no_question():
    drift = Drift()
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda value: drift.add(dict.fromkeys(Figure, value % 3)), range(3000)))
    assert {sum(found.counts) for found in drift.distributions().values()} == {3000}
    assert {found.total for found in drift.distributions().values()} == {3000}
