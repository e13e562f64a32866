"""The folder of answers: complete at any time, readable by other tools, and never a foreign folder."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

import pyarrow.parquet as parquet
import pytest

from qadeploy.batch.answering import COLUMNS, Answered, Rejected
from qadeploy.batch.output import Counts, Folder, OneFile, explain
from qadeploy.batch.plan import BatchPlan, BatchSettings, make_plan
from qadeploy.errors import InputError
from tests.conftest import triplets, write_jsonl

GOOD = [Answered(f"r{n}", "naïve 🙂", 0.1 + n, n, n + 7) for n in range(3)]
BAD = Rejected("x.jsonl", 4, "question", "r4", "is empty")


@pytest.fixture
def plan(tmp_path: Path) -> BatchPlan:
    return make_plan(BatchSettings("h" * 64, {}, False), [str(write_jsonl(tmp_path / "x.jsonl", triplets(8)))], 4)


@pytest.fixture
def folder(tmp_path: Path, plan: BatchPlan) -> Folder:
    found = Folder(tmp_path / "out")
    assert not found.begun
    with found.held():
        found.make(plan)
    return found


def test_a_part_has_the_columns_and_its_rejected_rows_beside_it(folder, plan):
    assert folder.write(0, [*GOOD, BAD], "abc") == Counts(3, 1)
    table = parquet.read_table(folder.path)  # rejected rows, plan and journals do not disturb
    assert tuple(table.column_names) == COLUMNS
    assert [str(kind) for kind in table.schema.types] == ["string", "string", "double", "int64", "int64", "string"]
    place = {"score": 2.1, "start": 2, "end": 9}
    assert table.to_pylist()[2] == {"id": "r2", "answer": "naïve 🙂", **place, "bundle": "abc"}
    (line,) = folder.rejected(0).read_text().splitlines()
    assert line == '{"file": "x.jsonl", "row": 4, "field": "question", "id": "r4", "reason": "is empty"}'
    assert folder.done(plan) == {0: Counts(3, 1)}


def test_a_part_of_rejected_rows_alone_keeps_the_columns(folder, plan):
    folder.write(1, [BAD] * 4, "abc")
    folder.write(0, [*GOOD, BAD], "abc")
    assert parquet.read_table(folder.path).num_rows == 3
    assert folder.done(plan) == {0: Counts(3, 1), 1: Counts(0, 4)}


def test_damaged_and_half_written_parts_are_not_done(folder, plan):
    folder.write(0, [*GOOD, BAD], "abc")
    folder.write(1, [*GOOD, BAD], "abc")
    data = folder.part(0).read_bytes()
    folder.part(0).write_bytes(data[: len(data) // 2])
    half = folder.path / ".part-00001.parquet.qadeploy-0123456789abcdef.tmp"
    half.write_bytes(data[:9])
    assert list(folder.done(plan)) == [1]
    assert not half.exists()
    folder.write(0, GOOD, "abc")  # fewer rows than its shard, so from another plan
    assert list(folder.done(plan)) == [1]


def test_rejected_rows_of_an_earlier_try_go(folder):
    folder.write(0, [*GOOD, BAD], "abc")
    folder.write(0, [*GOOD, GOOD[0]], "abc")
    assert not folder.rejected(0).exists()


def test_the_plan_that_lies_there_is_followed_or_refused(folder, plan):
    assert folder.begun
    assert folder.plan_for(plan.settings, plan.sources, None) == plan
    with pytest.raises(InputError) as caught:
        folder.plan_for(BatchSettings("i" * 64, {}, True), plan.sources, 5)
    text = str(caught.value)
    assert f"{folder.path}: holds answers of another job" in text
    assert "  the bundle was hhhhhhhhhhhh, now it is iiiiiiiiiiii\n  --allow-no-answer was not given" in text
    (folder.path / "_plan.json").write_text("{")
    with pytest.raises(InputError, match=r"_plan.json: is not a plan"):
        folder.plan()


def test_one_run_at_a_time_writes_into_a_folder(folder):
    with folder.held(), pytest.raises(InputError, match="another command is writing it"), folder.held():
        pass
    with folder.held():
        pass


def test_places_that_cannot_become_a_folder_of_answers_are_refused(tmp_path):
    (tmp_path / "mine").mkdir()
    assert not Folder(tmp_path / "mine").begun
    (tmp_path / "mine" / "thesis.txt").touch()
    (tmp_path / "file").touch()
    for name, message in (("mine", "holds other files"), ("file", "is not a folder"), ("no/where", "no such folder")):
        with pytest.raises(InputError, match=message):
            assert Folder(tmp_path / name).begun


def test_one_file_appears_when_it_is_whole(tmp_path):
    output = OneFile(tmp_path / "out.jsonl")
    with output.writing("abc") as add:
        assert add([GOOD[0], BAD]) == Counts(1, 1)
        assert add(GOOD[1:]) == Counts(2, 0)
        assert not output.path.exists()
    assert [line.partition(", ")[0] for line in output.path.read_text().splitlines()] == [
        '{"id": "r0"',
        '{"id": "r1"',
        '{"id": "r2"',
    ]
    assert (tmp_path / "out.rejected.jsonl").read_text().count("\n") == 1
    assert len(os.listdir(tmp_path)) == 2
    with pytest.raises(InputError, match=r"out.jsonl: exists already"), output.held():
        pass
    output.path.unlink()
    with pytest.raises(InputError, match=r"out.rejected.jsonl: exists already"), output.held():
        pass
    assert os.listdir(tmp_path) == ["out.rejected.jsonl"]


def test_one_file_that_fails_leaves_nothing(tmp_path):
    output = OneFile(tmp_path / "out.jsonl")
    with contextlib.suppress(KeyboardInterrupt), output.writing("abc") as add:
        add(GOOD)
        assert len(os.listdir(tmp_path)) == 2
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []


def test_an_error_of_the_system_says_where_and_what_remains():
    error = explain(OSError(errno.ENOSPC, "No space left on device", "out/part-00003.parquet"), "out", 3, 9)
    assert str(error).startswith("out/part-00003.parquet: No space left on device. 3 of 9 parts are finished and kept")
    assert str(explain(OSError("odd"), "out", 3, 9)).startswith("out: odd. 3 of 9")
