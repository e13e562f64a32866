"""The plan: the same rows in the same parts, and a refusal if another run would give other answers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pyarrow
import pyarrow.parquet as parquet
import pytest

from qadeploy.batch import plan as planning
from qadeploy.batch.plan import BatchPlan, BatchSettings, make_plan
from qadeploy.batch.sources import expand
from qadeploy.errors import InputError
from tests.conftest import triplets, write_jsonl

JOB = BatchSettings("ab" * 32, {}, False)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    write_jsonl(tmp_path / "a.jsonl", triplets(30))
    parquet.write_table(pyarrow.Table.from_pylist(triplets(25)), tmp_path / "b.parquet")
    return tmp_path


def test_a_plan_holds_every_row_once_in_order(files):
    plan = make_plan(JOB, [str(files)], 10)
    found = [(s.number, s.source.name, s.range.first, s.range.rows) for s in plan.shards]
    assert found == [
        (0, "a.jsonl", 0, 10),
        (1, "a.jsonl", 10, 10),
        (2, "a.jsonl", 20, 10),
        (3, "b.parquet", 0, 10),
        (4, "b.parquet", 10, 10),
        (5, "b.parquet", 20, 5),
    ]
    assert plan.rows == 55
    assert plan.row_id(plan.sources[1], 3) == "b.parquet:row-3"
    assert make_plan(JOB, [str(files / "a.jsonl")]).row_id(plan.sources[0], 3) == "row-3"


def test_a_plan_survives_as_text(files):
    plan = make_plan(BatchSettings("c" * 64, {"context": "context"}, True), [str(files)], 10)
    again = BatchPlan.of(plan.to_json(), "x")
    assert again == plan
    assert again.digest() == plan.digest() != make_plan(JOB, [str(files)], 10).digest()
    assert json.loads(plan.to_json())["files"][0]["name"] == "a.jsonl"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": 2}', "[" * 99_999])
def test_a_text_that_is_no_plan_is_named(text):
    with pytest.raises(InputError, match=r"DIR/_plan.json: is not a plan"):
        BatchPlan.of(text, "DIR/_plan.json")


def test_a_later_schema_is_named(files):
    text = make_plan(JOB, [str(files)]).to_json().replace('"schema": 2', '"schema": 9')
    with pytest.raises(InputError, match=r"schema 9 is not 2"):
        BatchPlan.of(text, "x")


def test_parts_grow_with_the_rows(files, monkeypatch):
    monkeypatch.setattr(planning, "FINEST", 2)
    monkeypatch.setattr(planning, "_PARTS", 4)
    monkeypatch.setattr("qadeploy.batch.ranges.FINEST", 2)
    for most, step in ((999, 16), (4, 4)):
        monkeypatch.setattr(planning, "_MOST_ROWS", most)
        plan = make_plan(JOB, [str(files)])
        assert plan.step == step
        assert plan.rows == 55


def test_what_differs_from_the_plan_is_said(files):
    plan = make_plan(JOB, [str(files)], 10)
    assert plan.differences(JOB, expand([str(files)]), None) == []
    assert plan.differences(JOB, expand([str(files)]), 10) == []
    other = BatchSettings("cd" * 32, {"context": "text"}, True)
    write_jsonl(files / "a.jsonl", triplets(31))
    (files / "b.parquet").rename(files / "c.parquet")
    found = plan.differences(other, expand([str(files)]), 11)
    size = len("".join(json.dumps(row) + "\n" for row in triplets(30)))
    assert found == [
        "the bundle was abababababab, now it is cdcdcdcdcdcd",
        "--columns was not given, now it is context=text",
        "--allow-no-answer was not given, now it is given",
        "--shard-rows was 10, now it is 11",
        f"{files}/b.parquet was an input, now it is not",
        f"{files}/c.parquet is an input, before it was not",
        f"{files}/a.jsonl was changed ({size} bytes, now {(files / 'a.jsonl').stat().st_size})",
    ]


def test_an_order_and_a_time_differ_too(files):
    plan = make_plan(JOB, [str(files)])
    assert "another order" in plan.differences(JOB, plan.sources[::-1], None)[0]
    touched = [replace(source, modified=source.modified + 1) for source in plan.sources]
    assert [line.endswith("was changed (modified since)") for line in plan.differences(JOB, touched, None)] == [
        True
    ] * 2


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        (
            [{"passage": "a", "question": "b"}] * 3,
            {},
            "x.jsonl: row 1, field context: is missing.*nor any other of the first 3",
        ),
        ([{"context": "a", "question": " "}], {}, "x.jsonl: row 1, field question: is empty; this row cannot be used$"),
        ([{"context": "a", "q": 4}], {"question": "q"}, "row 1, field q: must be text, not a number"),
    ],
)
def test_a_file_whose_first_rows_are_all_unusable_is_refused(rows, columns, message, tmp_path):
    write_jsonl(tmp_path / "x.jsonl", rows)
    with pytest.raises(InputError, match=message):
        make_plan(replace(JOB, columns=columns), [str(tmp_path / "x.jsonl")])
    write_jsonl(tmp_path / "x.jsonl", [*rows, *triplets(1)])
    if not columns:
        assert make_plan(JOB, [str(tmp_path / "x.jsonl")]).rows == len(rows) + 1
