"""Offsets, flags and empty answers, read as their author meant them; uncertain ones are rejected."""

from __future__ import annotations

import json
import warnings

import pytest

from qadeploy.data.check import RowClass, check_rows
from qadeploy.data.check_text import check_lines
from qadeploy.data.fields import DataOptions, parse_columns
from qadeploy.data.formats import load_rows
from qadeploy.data.loading import read
from qadeploy.errors import DataError, DataWarning, InputError
from tests.data_for_tests import FLAT, SEA, SKY, answers, classes, found, lines, put

# ---------------------------------------------------------------- offsets

TURKISH = "Ankaralı biri Ankara dedi"


@pytest.mark.parametrize("offset", ["0", 0.0, "0.0", 0])
def test_an_offset_as_text_or_float_is_the_offset(tmp_path, offset):
    row = {"context": TURKISH, "question": "q", "answer": "Ankara", "answer_start": offset}
    source = put(tmp_path, "rows.jsonl", lines(row))
    assert classes(source) == {"exact": 1, "repeated": 1}
    assert answers(source) == [[("Ankara", 0)]]


def test_a_column_of_floats_with_a_gap(tmp_path):
    text = f"context,question,answer,answer_start\n{TURKISH},a,Ankara,14.0\n{SKY},b,blue,\n"
    assert answers(put(tmp_path, "rows.csv", text)) == [[("Ankara", 14)], [("blue", 11)]]
    rows = [{"context": TURKISH, "question": "a", "answer": "Ankara", "answer_start": 14.0}]
    rows += [{"context": SKY, "question": "b", "answer": "blue", "answer_start": float("nan")}]
    assert answers(put(tmp_path, "rows.json", json.dumps(rows))) == [[("Ankara", 14)], [("blue", 11)]]


def test_offsets_behind_a_mapping_and_in_nesting(tmp_path):
    text = f"context,question,answer,where\n{TURKISH},a,Ankara,14\n"
    options = DataOptions(columns="answer_start=where")
    assert answers(put(tmp_path, "rows.csv", text), options) == [[("Ankara", 14)]]
    qa = {"id": "q", "question": "?", "answers": [{"text": "Ankara", "answer_start": "14"}]}
    nested = {"data": [{"paragraphs": [{"context": TURKISH, "qas": [qa]}]}]}
    assert answers(put(tmp_path, "squad.json", json.dumps(nested))) == [[("Ankara", 14)]]


@pytest.mark.parametrize("offset", [12.5, "12.5", "x", "1e400", True])
def test_anything_else_is_no_offset(tmp_path, offset):
    row = {"context": TURKISH, "question": "q", "answer": "Ankara", "answer_start": offset}
    with pytest.raises(DataError, match="row 1, field answer_start: must be a whole number, not"):
        read(put(tmp_path, "rows.jsonl", lines(row)))


def test_a_negative_offset_is_never_repaired(tmp_path):
    row = {"context": "Mr Pownoll came.", "question": "q", "answer": "no", "answer_start": -1}
    source = put(tmp_path, "rows.jsonl", lines(row))
    assert classes(source) == {"empty": 1}
    assert classes(put(tmp_path, "none.jsonl", lines({**row, "is_impossible": True}))) == {"no_answer": 1}
    with pytest.raises(DataError, match="is -1, which means 'none here', but the row gives the answer \"no\""):
        read(source)


@pytest.mark.parametrize(("answer", "start"), [("no", 3), ("NO", 6), ("n o", 6)])
def test_no_repair_cuts_a_word(tmp_path, answer, start):
    row = {"context": "Mr Pownoll came.", "question": "q", "answer": answer, "answer_start": start}
    (checked,) = check_rows("x", load_rows(put(tmp_path, "rows.jsonl", lines(row))), DataOptions()).rows
    assert checked.problem
    assert "occurs only inside a longer word" in str(checked.problem)


@pytest.mark.parametrize(("start", "kind"), [(5, RowClass.EXACT), (8, RowClass.UTF8), (6, RowClass.UTF16)])
def test_units_of_offsets(tmp_path, start, kind):
    row = {"context": "😀 It sailed.", "question": "?", "answer": "sailed", "answer_start": start}
    (checked,) = check_rows("x", load_rows(put(tmp_path, "rows.jsonl", lines(row))), DataOptions()).rows
    assert (checked.kind, checked.answers[0].fixed and checked.answers[0].fixed.start) == (kind, 5)


def spread(*at: int) -> str:
    """A context of 100 letters with the word "sea" at these places."""
    text = [*("-" * 100)]
    for start in at:
        text[start : start + 3] = "sea"
    return "".join(text)


@pytest.mark.parametrize(
    ("places", "given", "fixed"),
    [
        ((10, 60), 12, 10),
        ((10, 60), 25, 10),
        ((10, 60), 30, None),
        ((10, 60), 34, None),
        ((10, 14), 30, None),
        ((10,), 90, 10),
    ],
)
def test_the_nearest_place_must_be_much_nearer(tmp_path, places, given, fixed):
    row = {"context": spread(*places), "question": "?", "answer": "sea", "answer_start": given}
    (checked,) = check_rows("x", load_rows(put(tmp_path, "rows.jsonl", lines(row))), DataOptions()).rows
    assert checked.kind is RowClass.SHIFTED
    assert (checked.answers[0].fixed.start if checked.answers[0].fixed else None) == fixed


def test_a_drift_of_certain_rows_explains_the_others(tmp_path):
    certain = [
        {"context": spread(10 + n), "question": f"{n}?", "answer": "sea", "answer_start": 30 + n} for n in range(3)
    ]
    unsure = {"context": spread(20, 45), "question": "?", "answer": "sea", "answer_start": 40}
    rows = load_rows(put(tmp_path, "rows.jsonl", lines(*certain, unsure)))
    *_, last = check_rows("x", rows, DataOptions()).rows
    assert (last.answers[0].fixed.start, last.problem) == (20, None)  # 45 is nearer, but all others are off by 20
    *_, last = check_rows("x", load_rows(put(tmp_path, "two.jsonl", lines(*certain[:2], unsure))), DataOptions()).rows
    assert last.answers[0].fixed.start == 45


def test_offset_0_everywhere_is_a_placeholder(tmp_path):
    rows = [{"context": SKY, "question": "a", "answer": "blue", "answer_start": 0}]
    rows += [{"context": SEA, "question": "b", "answer": "The sea", "answer_start": 0}]
    source = put(tmp_path, "rows.jsonl", lines(*rows))
    assert classes(source) == {"exact": 2}
    assert answers(source) == [[("blue", 11)], [("The sea", 0)]]
    twice = {"context": SEA, "question": "c", "answer": "sea", "answer_start": 0}
    with pytest.raises(DataError, match='row 3, field answer: "sea" occurs 2 times'):
        read(put(tmp_path, "more.jsonl", lines(*rows, twice)))
    there = [{**rows[1], "question": question} for question in "ab"]
    assert answers(put(tmp_path, "there.jsonl", lines(*there))) == [[("The sea", 0)]] * 2


# ---------------------------------------------------------------- no answer


@pytest.mark.parametrize(
    ("flag", "none"),
    [(x, True) for x in (True, "TRUE", "True", 1, 1.0, "yes", "true", "1")]
    + [(x, False) for x in (False, "FALSE", 0, 0.0, "no", "0")],
)
@pytest.mark.filterwarnings("ignore:.*an answer that the context holds, but is_impossible too")
@pytest.mark.parametrize("name", ["is_impossible", "Is Impossible", "answerable", "unanswerable"])
def test_flags_in_any_spelling(tmp_path, flag, none, name):
    row = {"context": SKY, "question": "?", "answer": "blue", name: flag}
    columns = "is_impossible=unanswerable" if name == "unanswerable" else ""
    wanted = [] if none != (name == "answerable") else [("blue", 11)]
    assert answers(put(tmp_path, "rows.jsonl", lines(row)), DataOptions(columns=columns)) == [wanted]


def test_flags_in_nesting_and_csv(tmp_path):
    qa = {"id": "q", "question": "?", "answers": [], "is_impossible": "true"}
    assert answers(put(tmp_path, "p.json", json.dumps([{"context": SKY, "qas": [qa]}]))) == [[]]
    assert answers(put(tmp_path, "p.csv", f"context,question,answer,is_impossible\n{SKY},?,,TRUE\n")) == [[]]


def test_flags_that_are_none_or_disagree_are_named(tmp_path):
    row = {"context": SKY, "question": "?", "answer": "blue"}
    with pytest.raises(DataError, match='field is_impossible: must be true or false, not "maybe"'):
        read(put(tmp_path, "a.jsonl", lines({**row, "is_impossible": "maybe"})))
    with pytest.raises(DataError, match="field is_impossible: says the opposite of answerable"):
        read(put(tmp_path, "b.jsonl", lines({**row, "is_impossible": True, "answerable": True})))
    with pytest.raises(InputError, match="it says the opposite: give answerable=is_answerable"):
        parse_columns("is_impossible=is_answerable")


@pytest.mark.parametrize(
    ("answer", "overruled"),
    [
        ({"answer": "blue"}, True),
        ({"answers": [{"text": "blue", "answer_start": 11}]}, True),
        ({"answer": "blue", "answer_start": -1}, False),
        ({"answer": "red"}, False),
        ({"answer": ""}, False),
        ({"answers": []}, False),
    ],
)
def test_no_answer_beside_an_answer_is_counted_and_said(answer, overruled, tmp_path):
    row = {"context": SKY, "question": "?", "is_impossible": True, **answer}
    source = put(tmp_path, "rows.jsonl", lines(FLAT[0], row))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert answers(source) == [[("blue", 11)], []]
    said = (
        "1 of 2 rows have an answer that the context holds, but is_impossible too: read as 'no answer in this context'"
    )
    assert [said in str(w.message) for w in caught] == [True] * overruled
    check = check_rows(source, load_rows(source), DataOptions())
    assert check.to_dict()["overruled_answers"] == overruled
    assert any("1 row with an answer that the context holds" in line for line in check_lines(check)) == overruled


def test_withheld_labels_are_counted_and_said(tmp_path):
    none = {"context": SEA, "question": "?", "answers": []}
    source = put(tmp_path, "rows.jsonl", lines(FLAT[0], none))
    with pytest.warns(DataWarning, match=r"1 of 2 rows have an empty list .*--empty-answers no-answer.*reject"):
        assert answers(source) == [[("blue", 11)], []]
    assert check_rows(source, load_rows(source), DataOptions()).to_dict()["empty_answers"] == 1
    assert answers(source, DataOptions(empty_answers="no-answer")) == [[("blue", 11)], []]
    with pytest.raises(DataError, match=r"row 2, field answers: is empty, and --empty-answers reject"):
        read(source, DataOptions(empty_answers="reject"))
    with pytest.raises(InputError, match="every row has an empty list of answers, so the labels seem to be withheld"):
        read(put(tmp_path, "test.jsonl", lines(none, {**none, "question": "!"})))
    with pytest.raises(DataError, match="is empty although the row says that there is an answer"):
        read(put(tmp_path, "said.jsonl", lines({**none, "is_impossible": False})))


@pytest.mark.parametrize("cell", ["", "  "])
def test_a_blank_cell_can_mean_none(tmp_path, cell):
    source = put(tmp_path, "rows.csv", f"context,question,answer\n{SKY},?,{cell}\n")
    assert answers(source, DataOptions(no_answer_token="")) == [[]]
    with pytest.raises(DataError, match="field answer: is empty"):
        read(source)


def test_rows_that_contradict_each_other_are_not_merged(tmp_path):
    row = {"context": SKY, "question": "?", "answer": "blue"}
    source = put(tmp_path, "rows.jsonl", lines(row, {**row, "answer": None, "is_impossible": True}))
    with pytest.raises(
        DataError, match="row and row 1 ask the same: one says that there is no answer, the other gives"
    ):
        read(source)
    checked = check_rows(source, load_rows(source), DataOptions())
    assert [bool(r.problem) for r in checked.rows] == [True, True]


def test_another_split_does_not_contradict(tmp_path):
    row = {"context": SKY, "question": "?", "answer": "blue", "split": "train"}
    source = put(tmp_path, "rows.jsonl", lines(row, {**row, "answer": None, "is_impossible": True, "split": "test"}))
    assert answers(source) == [[("blue", 11)], []]
    assert check_rows(source, load_rows(source), DataOptions()).rejected == 0


def test_blank_and_float_ids(tmp_path):
    source = put(tmp_path, "rows.csv", f"id,context,question,answer\n,{SKY},a,blue\n,{SKY},b,sky\n")
    assert [identity for identity, *_ in found(source)] == ["row-1", "row-2"]
    rows = [{**FLAT[0], "id": 7.0}, {**FLAT[1], "id": float("nan")}]
    assert [identity for identity, *_ in found(put(tmp_path, "rows.json", json.dumps(rows)))] == ["7", "row-2"]
