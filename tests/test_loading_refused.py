"""What cannot be loaded: files, and rows of files, each named with a remedy."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pyarrow
import pyarrow.parquet as parquet
import pytest

from qadeploy.data.fields import DataOptions
from qadeploy.data.loading import read
from qadeploy.errors import DataError, InputError
from qadeploy.records import Annotation
from tests.test_loading import FLAT, NESTED, SEED, csv_text, jsonl, problem, problems, put, put_parquet, without

# ---------------------------------------------------------------- files that cannot be used


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.json", "", "the file is empty; it needs at least one row"),
        ("empty.parquet", b"", "the file is empty; it needs at least one row"),
        ("bom.csv", "\ufeff", "the file is empty; it needs at least one row"),
        ("blank.jsonl", "\n \n", "the file is empty; it needs at least one row"),
        ("rows.txt", "x", "unknown ending '.txt': use .json, .jsonl, .ndjson, .csv, "),
        ("rows", "x", "unknown ending ''"),
        (
            "cp.json",
            '"café"'.encode("cp1252"),
            "not UTF-8 text (byte 4), probably Windows-1252: save it as UTF-8, e.g. iconv",
        ),
        ("other.csv", b"context,question,answer\n\x81,b,c", "not UTF-8 text (byte 24): save it as UTF-8"),
        ("zipped.csv", b"PK\x03\x04\xff", "but a zip archive or an Excel file: unpack it, or name it .xlsx"),
        ("packed.csv", b"\x1f\x8b\xff", "but gzip: name it .gz"),
        ("packed.csv.gz", b"\x1f\x8b\x08 but not really", "not a readable gzip file"),
        (
            "utf16.json",
            json.dumps(["é" * 9]).encode("utf-16-le") + b"\xff\xdf",
            "looks like UTF-16, truncated or without a byte order mark",
        ),
        ("wrong.xlsx", b"PK\x03\x04 but no sheet", "not a readable Excel file"),
        ("wrong.arrow", b"ARROW1 but no table", "not a readable arrow file"),
        ("wrong.json", '[{"context": "a",\n  "question": }]', "line 2, column 15: not valid JSON: Expecting value"),
        ("after.json", json.dumps([SEED], indent=1) + "\n]", "line 8, column 1: not valid JSON: Extra data"),
        ("line.json", json.dumps(SEED) + " x", "line 1, column 89: not valid JSON: Extra data"),
        ("deep.json", "[" * 100_000, "not valid JSON: "),
        ("huge.json", "9" * 5000, "not valid JSON: "),
        ("text.json", '"blue"', "must be a list of rows or an object with 'data', not text"),
        ("number.json", "7.5", "'data', not a number"),
        ("null.json", "null", "'data', not null"),
        ("none.json", "[]", "holds no rows that can be used"),
        ("nodata.json", '{"version": "v2.0", "data": []}', "holds no rows that can be used"),
        ("header.csv", "context,question,answer\n", "holds no rows that can be used"),
        ("open.csv", 'context,question,answer\n"a,b,c\n', "line 2: not valid CSV: unexpected end of data"),
        ("quote.csv", 'context,question,answer\n"a"b,b,c\n', "line 2: not valid CSV: "),
        ("wrong.parquet", b"PAR1 but no table PAR1", "not a readable parquet file: "),
    ],
)
def test_a_file_that_cannot_be_used(tmp_path, name, content, message):
    source = put(tmp_path, name, content)
    with pytest.raises(InputError) as caught:
        read(source)
    assert type(caught.value) is InputError
    assert str(caught.value).startswith(source + ": ")
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("cut", [0.1, 0.5, 0.95])
def test_a_truncated_parquet_file(tmp_path, cut):
    source = put_parquet(tmp_path, [{**SEED, "n": n} for n in range(50)])
    whole = Path(source).read_bytes()
    Path(source).write_bytes(whole[: int(len(whole) * cut)])
    with pytest.raises(InputError, match="not a readable parquet file"):
        read(source)


def test_parquet_text_that_is_not_utf8(tmp_path):
    # Offsets 0 and 1, then the one wrong byte.
    text = pyarrow.StringArray.from_buffers(1, pyarrow.py_buffer(b"\0\0\0\0\1\0\0\0"), pyarrow.py_buffer(b"\xff"))
    parquet.write_table(pyarrow.table({"context": text}), tmp_path / "data.parquet")
    with pytest.raises(InputError, match="not a readable parquet file"):
        read(str(tmp_path / "data.parquet"))


@pytest.mark.parametrize("source", ["absent.json", "x" * 300, '{"context": "\n"}', "a\0b"])
def test_a_missing_file(tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"no such file\. Give a file \(\.json, "):
        read(source)


def test_a_folder(tmp_path):
    with pytest.raises(InputError, match="this is a folder, and not one that datasets saved: give a file"):
        read(str(tmp_path))


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (
            {"title": "x", "paragraphs": [{"qas": [{}]}]},
            "element 3, paragraph 1: 'context' is missing; the fields found are qas",
        ),
        ({"title": "x", "paragraphs": [{"context": "c"}]}, "element 3, paragraph 1: 'qas' must be a list, not null"),
        ({"paragraphs": [{"context": "c", "qas": None}]}, "element 3, paragraph 1: 'qas' must be a list, not null"),
        (
            {"paragraphs": [{"context": "c", "qas": [None]}]},
            "element 3, paragraph 1, question 1: must be an object, not null",
        ),
        ({"paragraphs": [None]}, "element 3, paragraph 1: must be an object, not null"),
        ({"title": "x"}, "row 4, field context: is missing; the fields found are title"),
        ({"paragraphs": None}, "element 3: 'paragraphs' must be a list, not null"),
        ("x", "row 4: must be an object with context, question and answer, not text"),
    ],
)
def test_broken_nesting(tmp_path, broken, message):
    source = put(tmp_path, "squad.json", json.dumps({"data": [*NESTED["data"], broken]}))
    with pytest.raises(InputError) as caught:
        read(source)
    assert message in str(caught.value)


def test_on_ambiguous_takes_three_values():
    with pytest.raises(InputError, match=r"on_ambiguous is 'last': choose one of error, first, skip"):
        read("handbook", DataOptions(on_ambiguous="last"))


# ---------------------------------------------------------------- rows that cannot be used

ANSWERS = "must be a list of answers or {'text': [...], 'answer_start': [...]}, not"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (without("context"), "field context: is missing; the fields found are question, answer"),
        (without("question"), "field question: is missing; the fields found are context, answer"),
        (without("answer"), "field answer: is missing; the fields found are context, question"),
        ({}, "field context: is missing; the fields found are none"),
        ({"a\nb\u2028\ud800": 1}, r"field context: is missing; the fields found are a\nb\u2028\ud800"),
        *(
            ({**SEED, field: value}, f"field {field}: must be text, not {kind}")
            for field in SEED
            for value, kind in ((7, "a number"), (None, "null"), (["x"], "a list"), ({}, "an object"))
        ),
        ({**SEED, "context": True}, "field context: must be text, not a boolean"),
        *(({**SEED, field: value}, f"field {field}: is empty") for field in SEED for value in ("", " \t\n\u00a0")),
        *(
            ({**SEED, field: "ab\ud800"}, f"field {field}: holds a lone surrogate at code point 2: not valid Unicode")
            for field in SEED
        ),
        ({**SEED, "id": "\udfff"}, "field id: holds a lone surrogate at code point 0: not valid Unicode"),
        ({**SEED, "id": ["x"]}, "field id: must be text, not a list"),
        ({**SEED, "answer": "Blue"}, 'field answer: "Blue" does not occur in the context: it must be an exact copy'),
        ({**SEED, "answer": "a\nb\u2028"}, r'field answer: "a\nb\u2028" does not occur in the context'),
        ({**SEED, "answer": "x" * 99}, f'field answer: "{"x" * 57}..." does not occur'),
        (
            {**SEED, "answer_start": 10},
            'field answer_start: 10 does not match: the context has " blu" there, the answer is "blue"',
        ),
        (
            {**SEED, "answer_start": -5},
            "field answer_start: is -5, which means 'none here', but the row gives the answer \"blue\": set is_impossible",
        ),
        ({**SEED, "answer_start": 16}, 'field answer_start: 16 does not match: the context has "" there'),
        ({**SEED, "answer_start": 10**30}, "field answer_start: 1000000000000000000000000000000 does not match"),
        *(
            ({**SEED, "answer_start": value}, f"field answer_start: must be a whole number, not {kind}")
            for value, kind in (
                ("eleven", '"eleven"'),
                (11.5, "11.5"),
                ("11.5", '"11.5"'),
                (True, "True"),
                ([11], "a list"),
            )
        ),
        ({**FLAT, "answers": None}, f"field answers: {ANSWERS} null"),
        ({**FLAT, "answers": "blue"}, f"field answers: {ANSWERS} text"),
        ({**FLAT, "answers": [7]}, f"field answers: {ANSWERS} a list"),
        ({**FLAT, "answers": {"answer_start": [11]}}, "field answers: needs the list 'text'"),
        (
            {**FLAT, "answers": {"text": ["blue", "sky"], "answer_start": [11]}},
            "field answers: has 2 texts and 1 answer_starts: one start per text",
        ),
        (
            {**FLAT, "answers": {"text": ["blue", "sky"], "answer_start": [11, 3]}},
            'field answers.answer_start: 3 does not match: the context has " sk" there, the answer is "sky"',
        ),
        (
            {**FLAT, "answers": {"text": ["blue"], "answer_start": ["x"]}},
            'field answers.answer_start: must be a whole number, not "x"',
        ),
        ({**FLAT, "answers": {"text": [""], "answer_start": [0]}}, "field answers.text: is empty"),
        ({**FLAT, "answers": {"text": [None], "answer_start": [0]}}, "field answers.text: must be text, not null"),
        ({**FLAT, "answers": [{"answer_start": 11}]}, "field answers.text: must be text, not null"),
        (
            {**FLAT, "answers": [{"text": "blu"}, {"text": "green", "answer_start": None}]},
            'field answers.text: "green" does not occur in the context',
        ),
        (
            {**FLAT, "answers": [{"text": "\ud800lue", "answer_start": 11}]},
            "field answers.text: holds a lone surrogate at code point 0: not valid Unicode",
        ),
    ],
)
def test_a_row_that_cannot_be_used(tmp_path, row, message):
    line = problem(put(tmp_path, "rows.json", json.dumps([SEED, row])))
    assert line.startswith("row 2, field ")
    assert message in line


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("answers", "{'text': ['blue']", f"field answers: {ANSWERS} text"),
        ("answers", "{[]: 1}", f"field answers: {ANSWERS} text"),
        ("answers", "", f"field answers: {ANSWERS} null"),
        ("answer_start", "eleven", 'field answer_start: must be a whole number, not "eleven"'),
        ("answer_start", "11.5", 'field answer_start: must be a whole number, not "11.5"'),
        ("answer_start", "12", 'field answer_start: 12 does not match: the context has "lue." there'),
    ],
)
def test_a_csv_cell_that_cannot_be_used(tmp_path, field, value, message):
    line = problem(put(tmp_path, "rows.csv", csv_text({**SEED, field: value})))
    assert line.startswith(f"row 1, {message}")


@pytest.mark.parametrize(("count", "cells"), [(4, "a,b,c,d"), (2, "a,b")])
def test_a_csv_row_with_another_number_of_fields(tmp_path, count, cells):
    source = put(tmp_path, "rows.csv", csv_text(SEED, SEED) + cells + "\r\n\r\nx,y,z\r\n")
    assert [re.sub(" does not.*", "", line) for line in problems(source)] == [
        f"row 3: {count} fields, the header has 3: quote the delimiters",
        'row 4, field answer: "z"',
    ]


def test_rows_that_are_no_objects_stand_beside_the_other_problems(tmp_path):
    rows = [SEED, 7, {**SEED, "answer": "red"}, None, [SEED], "x"]
    needed = "must be an object with context, question and answer, not"
    expected = [
        f"row 2: {needed} a number",
        'row 3, field answer: "red" does not occur in the context: it must be an exact copy of a part of the context',
        f"row 4: {needed} null",
        f"row 5: {needed} a list",
        f"row 6: {needed} text",
    ]
    assert problems(put(tmp_path, "rows.json", json.dumps(rows))) == expected
    assert problems(put(tmp_path, "rows.jsonl", jsonl(*rows))) == expected


def test_jsonl_lines_that_are_no_json_stand_beside_the_other_problems(tmp_path):
    lines = [jsonl(SEED), "\n", '{"context": "a",\n', "[" * 100_000 + "\n", jsonl(without("answer")), "9" * 5000]
    found = problems(put(tmp_path, "rows.jsonl", "".join(lines)))
    assert found[0].startswith("row 2: line 3, column 17: not valid JSON: Expecting property name")
    assert found[1].startswith("row 3: from line 4: not valid JSON: ")
    assert found[2] == "row 4, field answer: is missing; the fields found are context, question"
    assert found[3].startswith("row 5: from line 6: not valid JSON: ")
    assert len(found) == 4


def test_nested_rows_are_counted_by_question(tmp_path):
    broken = json.loads(json.dumps(NESTED))
    broken["data"][1]["paragraphs"][0]["qas"][0]["answers"][0]["answer_start"] = 5
    source = put(tmp_path, "squad.json", json.dumps(broken))
    assert problem(source).startswith("row 3, field answers.answer_start: 5 does not match")


@pytest.mark.parametrize(("first", "second", "named"), [({"id": "a"}, {"id": "a"}, "a"), ({"id": 7}, {"id": "7"}, "7")])
def test_ids_are_unique(tmp_path, first, second, named):
    source = put(tmp_path, "rows.jsonl", jsonl({**SEED, **first}, SEED, {**SEED, **second}))
    assert problem(source) == f'row 3, field id: "{named}" is also the id of row 1: ids are unique'
    with pytest.raises(DataError, match=r"See what can be repaired: qadeploy check .* --fix OUT\.jsonl"):
        read(source)


def test_an_id_that_is_given_later_is_not_taken_by_a_row_without_one(tmp_path):
    rows = [SEED, {**SEED, "id": "row-1", "question": "And?"}]
    assert [e.id for e in read(put(tmp_path, "rows.jsonl", jsonl(*rows))).examples] == ["row-1-2", "row-1"]


@pytest.mark.parametrize("absent", [{}, {"id": None}])
def test_a_row_without_an_id_makes_way_for_the_ids_given(tmp_path, absent):
    rows = [
        {**SEED, "id": "row-3"},
        {**SEED, "id": "row-3-2", "question": "And?"},
        {**SEED, **absent, "question": "Or?"},
    ]
    assert [e.id for e in read(put(tmp_path, "rows.jsonl", jsonl(*rows))).examples] == ["row-3", "row-3-2", "row-3-2-2"]


@pytest.mark.parametrize(
    ("context", "answer", "count"), [("blue or blue?", "blue", 2), ("banana", "ana", 2), ("aaaa", "aa", 3)]
)
def test_an_ambiguous_answer(tmp_path, context, answer, count):
    source = put(tmp_path, "rows.jsonl", jsonl({**SEED, "context": context, "answer": answer}, SEED))
    assert problem(source) == (
        f'row 1, field answer: "{answer}" occurs {count} times in the context and no offset says which is meant: '
        "add answer_start, or choose with --on-ambiguous first|skip"
    )
    skipped = read(source, DataOptions(on_ambiguous="skip"))
    assert ([e.id for e in skipped.examples], skipped.skipped, skipped.first_taken) == (["row-2"], 1, 0)
    first = read(source, DataOptions(on_ambiguous="first"))
    assert first.examples[0].answers == (Annotation(answer, context.index(answer)),)
    assert (len(first.examples), first.skipped, first.first_taken) == (2, 0, 1)


def test_answer_start_ends_the_ambiguity(tmp_path):
    row = {**SEED, "context": "blue or blue?", "answer_start": 8}
    data = read(put(tmp_path, "rows.jsonl", jsonl(row)))
    assert (data.examples[0].answers, data.first_taken) == ((Annotation("blue", 8),), 0)


def test_skipping_drops_nothing_but_the_ambiguous(tmp_path):
    twice = {**SEED, "context": "blue or blue?"}
    with pytest.raises(DataError) as caught:
        read(put(tmp_path, "rows.jsonl", jsonl(twice, {**SEED, "answer": "red"})), DataOptions(on_ambiguous="skip"))
    assert len(caught.value.problems) == 1
    with pytest.raises(InputError, match="holds no rows that can be used"):
        read(put(tmp_path, "only.jsonl", jsonl(twice)), DataOptions(on_ambiguous="skip"))


def test_all_problems_are_kept_and_the_first_twenty_shown(tmp_path):
    good_and_bad = [row for _ in range(23) for row in (SEED, {**SEED, "answer": "red"})]
    source = put(tmp_path, "rows.jsonl", jsonl(*good_and_bad))
    with pytest.raises(DataError) as caught:
        read(source)
    assert [int(re.search(r"row (\d+)", line)[1]) for line in caught.value.problems] == list(range(2, 47, 2))
    shown = str(caught.value).splitlines()
    assert shown[:20] == list(caught.value.problems[:20])
    hint = f"See what can be repaired: qadeploy check {source} --fix OUT.jsonl"
    assert shown[20:] == ["... and 3 more rows with problems", hint]
