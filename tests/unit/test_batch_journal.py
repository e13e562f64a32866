"""The journal of a shard: deaths are counted, and blamed on a row only if it was being answered alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from qadeploy.batch.answering import Answered, Rejected
from qadeploy.batch.journal import Journal
from qadeploy.errors import FailureError

ONE = Answered("a", "Ada", 0.1 + 0.2, 3, 6)
TWO = Rejected("x.jsonl", 2, "question", "b", "is empty")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / ".shard-00000.journal"


def begun(path: Path, run: str = "a", *, loaded: bool = True) -> Journal:
    """A worker that begins the shard; deaths before it are counted."""
    journal = Journal(path, run)
    journal.begin()
    if loaded:
        journal.loaded()
    return journal


def test_a_shard_that_goes_well_leaves_nothing(path):
    begun(path).remove()
    assert not path.exists()


def test_two_deaths_make_the_next_worker_careful(path):
    assert not begun(path).careful
    assert not begun(path).careful
    assert begun(path).careful


def test_who_leaves_in_good_order_did_not_die(path):
    for _ in range(5):
        journal = begun(path)
        assert not journal.careful
        journal.left()


def test_a_row_is_blamed_for_two_deaths_of_workers_that_had_asked_it(path):
    for _ in range(2):
        begun(path)
    first = begun(path)
    first.trying(1)
    first.trying(1, ONE)
    first.trying(2)
    first.trying(2, TWO)
    first.trying(3)
    second = begun(path)
    assert second.known == {1: ONE, 2: TWO}
    assert second.killers == {}
    second.trying(3)
    third = begun(path)
    assert third.killers == {3: 2}
    third.trying(4)
    third.left()  # interrupted: 4 is not to blame
    begun(path).trying(4)
    assert Journal(path).killers == {3: 2}


def test_a_line_that_was_not_finished_is_passed_over(path):
    for _ in range(2):
        begun(path)
    begun(path).trying(7)
    with path.open("a") as stream:
        stream.write('{"event": "resu')
    begun(path).trying(7)
    assert Journal(path).killers == {7: 2}


def test_workers_that_die_before_they_ask_anything_come_to_an_end(path):
    for _ in range(5):
        begun(path)
    with pytest.raises(FailureError, match=r"5 worker processes ended one after the other .* fewer --actors"):
        begun(path)


@pytest.mark.parametrize("loaded", [False, True])
def test_a_later_run_goes_on_however_many_workers_died_in_those_before(path, loaded):
    for number in range(12):
        begun(path, str(number), loaded=loaded)
    journal = begun(path, "last", loaded=loaded)
    assert journal.careful == loaded  # a worker that dies while loading has not reached a row


def test_a_row_that_was_asked_between_shows_that_it_goes_on(path):
    for row in range(20):
        begun(path).trying(row)
