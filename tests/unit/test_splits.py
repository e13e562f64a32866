"""Splitting off a held-out set by passage."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qadeploy.data.splits import carve_by_passage
from qadeploy.errors import InputError
from qadeploy.records import Example


def questions(passages: list[int]) -> list[Example]:
    """One question for each number, on the passage of that number."""
    return [Example(f"q{n}", "Which?", f"passage {passage}") for n, passage in enumerate(passages)]


def before(examples: list[Example], fraction: float, seed: int) -> tuple[Example, ...]:
    """What 0.2.0 drew: whole passages, whatever their size."""
    order = list(dict.fromkeys(e.context for e in examples))
    random.Random(seed).shuffle(order)
    drawn: set[str] = set()
    for passage in order[:-1]:
        drawn.add(passage)
        if sum(e.context in drawn for e in examples) >= fraction * len(examples):
            break
    return tuple(e for e in examples if e.context in drawn)


@settings(max_examples=100, deadline=None)
@given(
    passages=st.lists(st.integers(0, 8), min_size=2, max_size=40).filter(lambda p: len(set(p)) > 1),
    fraction=st.floats(0.01, 0.99),
    seed=st.integers(0, 2**32),
)
def test_whole_passages_until_the_fraction_is_reached(passages, fraction, seed):
    examples = questions(passages)
    rest, part = carve_by_passage(examples, fraction, seed)
    assert rest == tuple(e for e in examples if e not in part)
    assert part == tuple(e for e in examples if e not in rest)
    assert rest
    assert part
    assert not {e.context for e in rest} & {e.context for e in part}
    sizes = Counter(e.context for e in part)
    wanted = fraction * len(examples)
    assert 2 * len(part) >= wanted or len({e.context for e in rest}) == 1
    smallest = min(Counter(e.context for e in rest).values())
    assert len(part) <= 2 * wanted or max(sizes.values()) <= smallest  # a smaller one would have been drawn
    drawn = before(examples, fraction, seed)
    assert len(drawn) > 2 * wanted or part == drawn  # finished runs carve their dev set again
    assert any(len(part) - size < wanted for size in sizes.values())  # one passage more than needed is never taken
    assert carve_by_passage(examples, fraction, seed) == (rest, part)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(
    ("sizes", "held"), [([90] + [1] * 10, 10), ([95, 5], 5), ([50, 49, 1], 50), ([40, 30, 30], 30)]
)
def test_a_passage_with_most_questions_is_not_drawn(sizes, held, seed):
    examples = questions([passage for passage, size in enumerate(sizes) for _ in range(size)])
    assert len(carve_by_passage(examples, 0.1, seed)[1]) == held


def test_the_seed_draws_the_passages():
    examples = questions([n // 5 for n in range(100)])
    parts = {carve_by_passage(examples, 0.2, seed)[1] for seed in range(20)}
    assert {len(part) for part in parts} == {20}
    assert len(parts) == 20


@pytest.mark.parametrize("fraction", [0.001, 0.999])
def test_neither_side_is_ever_empty(fraction):
    rest, part = carve_by_passage(questions([0, 0, 0, 1]), fraction, 7)
    assert sorted([len(rest), len(part)]) == [1, 3]


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5, math.nan, math.inf])
def test_the_fraction_lies_between_0_and_1(fraction):
    with pytest.raises(InputError, match=f"dev-fraction {fraction} is not between 0 and 1"):
        carve_by_passage(questions([0, 1]), fraction, 7)


@pytest.mark.parametrize("passages", [[], [3], [3, 3, 3]])
def test_one_passage_cannot_be_split(passages):
    with pytest.raises(InputError, match="all questions are on one passage"):
        carve_by_passage(questions(passages), 0.5, 7)
