"""Batches of units: their content, and that an epoch has each unit once."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qadeploy.errors import InputError
from qadeploy.training.batches import UnitBatches


def singles(lengths: list[int], tokens: int, seed: int, most: int | None = None) -> UnitBatches:
    """Batches of windows that need not be in a batch with others."""
    return UnitBatches([[i] for i in range(len(lengths))], lengths, seed, tokens=tokens, most=most)


def epochs(batches: UnitBatches, count: int = 3) -> list[list[list[int]]]:
    found = []
    for epoch in range(count):
        batches.set_epoch(epoch)
        found.append(list(batches))
    return found


@given(
    lengths=st.lists(st.integers(1, 64), min_size=1, max_size=60),
    room=st.integers(0, 300),
    most=st.none() | st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_an_epoch_holds_each_window_once_in_batches_that_fit(lengths, room, most, seed):
    tokens = max(lengths) + room
    batches = singles(lengths, tokens, seed, most)
    for found in epochs(batches):
        assert len(found) == len(batches)  # the same in every epoch, or the Trainer's count of steps would be wrong
        assert sorted(i for batch in found for i in batch) == list(range(len(lengths)))
        for batch in found:
            assert 1 <= len(batch) <= (most or len(lengths))
            assert len(batch) * max(lengths[i] for i in batch) <= tokens
        assert max(lengths) in [lengths[i] for i in found[0]]  # the longest first: memory fails early
    assert epochs(singles(lengths, tokens, seed, most)) == epochs(batches)  # the seed alone decides


@given(
    units=st.lists(st.lists(st.integers(1, 64), min_size=1, max_size=5), min_size=1, max_size=30),
    tokens=st.none() | st.integers(64, 400),
    most=st.none() | st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_a_unit_that_fits_stays_whole_and_every_epoch_has_as_many_batches(units, tokens, most, seed):
    lengths = [length for unit in units for length in unit]
    numbers = iter(range(len(lengths)))
    indices = [[next(numbers) for _ in unit] for unit in units]
    answered = {unit[-1] for unit in indices}
    batches = UnitBatches(indices, lengths, seed, tokens=tokens, most=most, answered=answered)
    for found in epochs(batches):
        assert len(found) == len(batches)
        assert sorted(i for batch in found for i in batch) == list(range(len(lengths)))
        for batch in found:
            assert len(batch) <= (most or len(batch))
            assert len(batch) * max(lengths[i] for i in batch) <= (tokens or 10**9)
        for unit in indices:
            longest = max(lengths[i] for i in unit)
            room = min(len(unit), most or len(unit), (tokens or 10**9) // longest)
            assert len(set(unit).intersection(next(b for b in found if unit[-1] in b))) >= room


def test_a_unit_larger_than_a_batch_is_cut_anew_each_epoch_around_its_windows_with_an_answer():
    unit, answered = list(range(68)), frozenset({40, 41})
    batches = UnitBatches([unit, [68, 69]], [384] * 70, 13, most=16, answered=answered)
    beside: list[set[int]] = []
    for found in epochs(batches, 60):
        assert len(found) == len(batches) == 5
        assert sorted(i for batch in found for i in batch) == list(range(70))
        assert max(map(len, found)) == 16
        (part,) = (set(batch) for batch in found if answered & set(batch))
        assert answered < part
        beside.append(part - answered)
    assert beside[0] != beside[1]
    assert set.union(*beside) == set(unit) - answered  # over the epochs each is compared with the answer


def test_no_batch_could_take_the_next_window():
    lengths = np.random.default_rng(5).gamma(9.0, 19.0, size=3000).clip(40, 384).astype(int)
    batches = singles([int(n) for n in lengths], 4096, 13)
    found = sorted((sorted((int(lengths[i]) for i in b), reverse=True) for b in list(batches)), reverse=True)
    for batch in found[:-1]:
        assert (len(batch) + 1) * batch[0] > 4096
    computed = sum(len(batch) * batch[0] for batch in found)
    assert lengths.sum() / computed > 0.98  # hardly any token is padding


def test_windows_of_one_length_and_the_batches_change_places_each_epoch():
    first, second, third = epochs(singles([10] * 40 + [20] * 40, 80, 3))
    assert first != second != third != first
    as_sets = [{frozenset(batch) for batch in found} for found in (first, second, third)]
    assert as_sets[0] != as_sets[1]
    assert epochs(singles([10] * 40 + [20] * 40, 80, 4))[0] != first


def test_a_window_that_does_not_fit_is_refused_by_name():
    with pytest.raises(
        InputError, match=r"batch-tokens 63 .* longest window, which has 64 tokens. Give --batch-tokens 64 or more"
    ):
        singles([3, 64, 9], 63, 13)
