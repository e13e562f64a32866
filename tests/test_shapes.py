"""Every shape and kind of file that public data sets use, read without conversion."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from pathlib import Path

import pytest

from qadeploy.data.check import check_rows
from qadeploy.data.fields import DataOptions
from qadeploy.data.formats import load_rows, table
from qadeploy.data.loading import read
from qadeploy.errors import DataError, DataWarning, InputError
from tests.data_for_tests import (
    ARTICLE,
    FLAT,
    ONE,
    PARAGRAPHS,
    SEA,
    SKY,
    TWO,
    WANTED,
    answers,
    classes,
    found,
    lines,
    put,
)

# ---------------------------------------------------------------- nesting

MRQA = {
    "id": "",
    "context": SKY,
    "qas": [
        {"qid": "q1", "question": ONE["question"], "answers": ["blue"], "detected_answers": [{"text": "blue", "char_spans": [[11, 14]]}]}
    ],
}  # fmt: skip
MRQA_SEA = {
    "context": SEA,
    "qas": [{"qid": "q2", "question": TWO["question"], "answers": ["cold"], "detected_answers": [{"text": "cold", "char_spans": [[28, 31]]}]}],
}  # fmt: skip
CMRC = [
    {"context_id": n, "context_text": p["context"], "qas": [{"query_id": q["id"], "query_text": q["question"], "answers": ["blue" if n == 0 else "cold"]}]}
    for n, p in enumerate(PARAGRAPHS) for q in p["qas"]
]  # fmt: skip
COLUMNS = {name: [row[name] for row in FLAT] for name in FLAT[0]}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("squad.json", json.dumps({"version": "1.1", "data": [ARTICLE]})),
        ("articles.json", json.dumps([ARTICLE])),
        ("article.json", json.dumps(ARTICLE)),
        ("paragraphs.json", json.dumps(PARAGRAPHS)),
        ("files.json", json.dumps([{"data": [{"paragraphs": [p]}]} for p in PARAGRAPHS])),
        ("articles.jsonl", lines({"paragraphs": PARAGRAPHS[:1]}, {"paragraphs": PARAGRAPHS[1:]})),
        ("paragraphs.jsonl", lines(*PARAGRAPHS)),
        ("mixed.json", json.dumps([PARAGRAPHS[0], FLAT[1]])),
        ("mrqa.jsonl", lines({"header": {"dataset": "x", "split": "dev"}}, MRQA, MRQA_SEA)),
        ("cmrc.json", json.dumps(CMRC)),
        ("columns.json", json.dumps(COLUMNS)),
        ("pandas.json", json.dumps({n: {str(i): x for i, x in enumerate(c)} for n, c in COLUMNS.items()})),
        ("split.json", json.dumps({"columns": [*COLUMNS], "index": [0, 1], "data": [[*row.values()] for row in FLAT]})),
        ("index.json", json.dumps({str(i): row for i, row in enumerate(FLAT)})),
        ("named.json", json.dumps({n: {f"r{i}": x for i, x in enumerate(c)} for n, c in COLUMNS.items()})),
        ("rows.json", json.dumps({"rows": [{"row": r} for r in FLAT]})),
        ("table.json", json.dumps({"schema": {}, "data": [{"index": i, **row} for i, row in enumerate(FLAT)]})),
        ("viewer.json", json.dumps({"features": [], "rows": [{"row_idx": i, "row": r} for i, r in enumerate(FLAT)]})),
        ("viewer.jsonl", lines(*({"row_idx": i, "row": r, "truncated_cells": []} for i, r in enumerate(FLAT)))),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_a_nesting_is_read_at_once(tmp_path, name, text, packed):
    source = put(tmp_path, f"{name}.gz", gzip.compress(text.encode())) if packed else put(tmp_path, name, text)
    assert found(source) == WANTED
    assert classes(source) == {"exact": 2}


def test_jsonl_needs_little_more_memory_than_its_text(tmp_path):
    source = put(
        tmp_path, "long.jsonl", lines(*({**FLAT[0], "context": "The sky is blue. " * 2**14} for _ in range(20)))
    )
    tracemalloc.start()
    try:
        rows = list(load_rows(source))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(rows) == 20
    assert peak < 3.5 * Path(source).stat().st_size  # its bytes, its text and the rows; 4 with a list of all lines


def test_splits_in_one_file(tmp_path):
    data = read(
        put(
            tmp_path,
            "splits.json",
            json.dumps({"train": FLAT[:1], "validation": {"data": [{"paragraphs": PARAGRAPHS[1:]}]}}),
        )
    )
    assert [(e.id, e.split) for e in data.examples if e.context == SEA] == [("q2", "validation")]


def test_splits_keep_their_own_rows(tmp_path):
    data = read(put(tmp_path, "splits.json", json.dumps({"train": FLAT[:1], "test": FLAT[1:]})))
    assert [(e.id, e.split) for e in data.examples] == [("q1", "train"), ("q2", "validation")]


def test_drop_has_only_answers_of_one_span(tmp_path):
    asked = [
        ({"number": "", "spans": ["blue"]}, [("blue", 11)]),
        ({"number": "7", "spans": []}, "a number or a date"),
        ({"number": "", "spans": ["sky", "blue"]}, "several spans together"),
    ]
    qas = [{"question": f"{n}?", "query_id": f"d{n}", "answer": answer} for n, (answer, _) in enumerate(asked)]
    source = put(tmp_path, "drop.json", json.dumps({"p1": {"passage": SKY, "qa_pairs": qas}}))
    assert classes(source) == {"exact": 1, "empty": 2}
    with pytest.raises(DataError) as caught:
        read(source)
    assert [p.removeprefix(source + ": ") for p in caught.value.problems] == [
        f"row {n}: its answer is {why}, not one span of the context" for n, (_, why) in enumerate(asked, 1) if n > 1
    ]


# ---------------------------------------------------------------- answers


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (["blue"], [("blue", 11)]),
        ([" blue"], [(" blue", 10)]),
        ({"text": "blue", "answer_start": 11}, [("blue", 11)]),
        ({"text": ["blue"]}, [("blue", 11)]),
        ([{"start": 11, "end": 15, "text": "blue"}], [("blue", 11)]),
        ([{"start": 11, "end": 15}], [("blue", 11)]),
        ({"start": 4, "end": 7}, [("sky", 4)]),
        ({"text": ["blue", "sky"], "answer_start": ["11", 4.0]}, [("blue", 11), ("sky", 4)]),
        ([{"text": "", "answer_start": -1}], []),
        ([{"text": "", "answer_start": "-1"}], []),
        ([{"text": None, "start": -1}], []),
        ({"text": ["blue"], "answer_start": 11}, [("blue", 11)]),
        ({"text": ["blue"], "answer_starts": [11]}, [("blue", 11)]),
        ([{"text": "", "answer_start": 0, "answer_category": "NOT_GIVEN"}], []),
    ],
)
def test_answers_in_any_shape(tmp_path, given, wanted):
    row = {"context": SKY, "question": "?", "answers": given}
    assert answers(put(tmp_path, "rows.jsonl", lines(row))) == [wanted]


@pytest.mark.parametrize("column", ["answers", "gold"])
@pytest.mark.parametrize(
    "cell",
    [
        "{'text': array(['blue'], dtype=object), 'answer_start': array([11], dtype=int32)}",
        "{'text': array(['blue'],\n      dtype=object), 'answer_start': array([11])}",
        "{'text': ['blue'], 'answer_start': [11]}",
        '{"text": ["blue"], "answer_start": [11]}',
        "['blue']",
        "[{'text': 'blue', 'answer_start': np.int64(11)}]",
    ],
)
def test_a_cell_that_datasets_or_pandas_wrote(tmp_path, column, cell):
    text = f'context,question,{column}\n{SKY},?,"{cell.replace(chr(34), chr(34) * 2)}"\n'
    options = DataOptions(columns=f"answers={column}")
    assert answers(put(tmp_path, "rows.csv", text), options) == [[("blue", 11)]]


def test_texts_that_numpy_prints_without_commas_are_several(tmp_path):
    text = "context,question,answers\nNew days in York.,?,\"['New' 'York']\"\n"
    assert answers(put(tmp_path, "rows.csv", text)) == [[("New", 0), ("York", 12)]]


@pytest.mark.parametrize(
    "more", [{"qas": []}, {"data": []}, {"rows": []}, {"paragraphs": None}, {"text": "x", "label": "y"}]
)
@pytest.mark.parametrize("names", [("context", "question", "answer"), ("Context", "Question", "Answer")])
def test_a_row_with_a_question_is_a_row_whatever_else_it_holds(tmp_path, more, names):
    row = {**dict(zip(names, (SKY, "?", "blue"), strict=True)), **more}
    assert answers(put(tmp_path, "rows.json", json.dumps([row]))) == [[("blue", 11)]]


def test_mrqa_without_detected_answers(tmp_path):
    qa = {"qid": "q", "question": "?", "answers": ["blue"], "detected_answers": []}
    assert answers(put(tmp_path, "m.jsonl", lines({"context": SKY, "qas": [qa]}))) == [[("blue", 11)]]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"Context": SKY, "CONTEXT": SEA, "question": "?", "answer": "blue"},
            "is in two columns, Context and CONTEXT",
        ),
        (
            {"context": SKY, "question": "?", "answer": "sky", "span": [4, 7], "answer_start": 9},
            "begins at 4, answer_start is 9",
        ),
        ({"context": SKY, "question": "?", "answers": [None]}, "not a list with null"),
        ({"context": SKY, "question": "?", "answer": "sky", "answer_start": 10**400}, "does not match"),
        ({"paragraphs": [{"context": SKY, "qas": 5}]}, "paragraph 1: 'qas' must be a list, not a number"),
        ({"context": [SKY], "question": "?", "answer": ["blue"]}, "field context: must be text, not a list"),
    ],
)
def test_odd_rows_are_named_beside_the_others(tmp_path, row, message):
    with pytest.raises(DataError) as caught:
        read(put(tmp_path, "rows.jsonl", lines(FLAT[0], row, FLAT[1])))
    (problem,) = caught.value.problems
    assert "row 2" in problem
    assert message in problem


@pytest.mark.parametrize(
    "value",
    [
        {"columns": [["a"]], "data": [[1]]},
        {"p": {"passage": SKY, "qa_pairs": [{"question": "?", "answer": {"spans": 5}}]}},
        [{"context": SKY, "qas": [{"question": "?", "detected_answers": [{"char_spans": 5}, 7]}]}],
        [{"data": {"text": SKY, "question": "?"}, "annotations": [{"result": 5}, {"result": [{"value": {"start": 1, "labels": 5}}]}]}],
        [{"data": {"text": SKY, "question": "?"}, "annotations": [{"result": [{"value": {"start": 1, "globalOffsets": [None]}}]}]}],
        [{"text": SKY, "question": "?", "spans": 5, "_task_hash": 1, "answer": "accept"}],
        [{"context": SKY, "question": "?", "answers": [{"text": "sky", "answer_category": []}]}],
        {"data": None},
        {"train": None},
    ],
)  # fmt: skip
def test_hostile_values_are_never_a_traceback(tmp_path, value):
    source = put(tmp_path, "odd.json", json.dumps(value))
    said = []
    for options in (DataOptions(), DataOptions(label="x", empty_answers="no-answer")):
        try:
            check_rows(source, load_rows(source), options)
            read(source, options)
        except InputError as error:
            said.append(str(error))
    assert all(source in text for text in said)


def test_nesting_without_end_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"nested too deeply|not valid JSON"):
        read(put(tmp_path, "deep.json", '{"train":' * 700 + "[]" + "}" * 700))


def test_a_span_outside_the_context_is_named(tmp_path):
    row = {"context": SKY, "question": "?", "answers": [{"start": 11, "end": 99}]}
    with pytest.raises(
        DataError, match="gives no text: 11 to 99 is not a span of the context, which has 16 code points"
    ):
        read(put(tmp_path, "rows.jsonl", lines(row)))


# ---------------------------------------------------------------- kinds of files

CSV = f"context,question,answer,answer_start\n{SKY},a,blue,11\n{SKY},b,sky,4\n"
BOTH = [[("blue", 11)], [("sky", 4)]]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.tsv", CSV.replace(",", "\t")),
        ("a.csv", CSV.replace(",", ";")),
        ("a.csv", CSV.replace(",", "\t")),
        ("a.csv", "sep=;\n" + CSV.replace(",", ";")),
        ("a.csv", CSV.replace(",", "|")),
        ("a.csv", CSV.replace("\n", "\r")),
        ("a.csv", "\n" + CSV),
        ("a.csv", CSV.encode("utf-8-sig")),
        ("a.csv", CSV.encode("utf-16")),
        ("a.csv.gz", gzip.compress(CSV.encode(), mtime=0)),  # one id in all workers
        ("a.csv", CSV.replace("context,question,answer,answer_start", "Context, Question ,ANSWER,Answer Start")),
    ],
)
def test_tables_as_programs_save_them(tmp_path, name, content):
    assert answers(put(tmp_path, name, content)) == BOTH


def test_windows_1252_is_read_and_said(tmp_path):
    source = put(tmp_path, "a.csv", "context,question,answer\nThe café – “old”.,?,“old”\n".encode("cp1252"))
    with pytest.warns(DataWarning, match=r"not UTF-8 text \(byte 31\): read as Windows-1252"):
        assert answers(source) == [[("“old”", 11)]]


def test_damaged_utf8_is_not_taken_for_windows_1252(tmp_path):
    content = "context,question,answer\nThe café is nice.,?,".encode() + b"\xe9\n"
    with pytest.raises(InputError, match=r"not UTF-8 text \(byte \d+\), but UTF-8 elsewhere: it is damaged there"):
        read(put(tmp_path, "a.csv", content))


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf16_without_its_mark_is_named(tmp_path, encoding):
    with pytest.raises(InputError, match="UTF-16"):
        read(put(tmp_path, "a.csv", CSV.encode(encoding)))


def test_columns_named_twice_are_refused(tmp_path):
    with pytest.raises(InputError, match="the header has the column answer more than once"):
        read(put(tmp_path, "a.csv", "context,question,answer,answer\na,b,c,d\n"))


def test_an_excel_sheet(tmp_path):
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    for cells in (
        ["Context", "Question", "Answer", "Answer Start", "is_impossible"],
        [SKY, "a", "blue", 11.0, False],
        [SKY, "b", None, None, True],
    ):
        book.active.append(cells)  # fmt: skip
    book.save(tmp_path / "a.xlsx")
    assert answers(str(tmp_path / "a.xlsx")) == [[("blue", 11)], []]


def test_what_datasets_saved(tmp_path):
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_list(FLAT)
    made.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": made, "test": made.select([1])}).save_to_disk(str(tmp_path / "both"))
    assert found(str(tmp_path / "one")) == WANTED
    (arrow,) = (tmp_path / "one").glob("*.arrow")
    assert found(str(arrow)) == WANTED
    assert [(r.number, r.split) for r in load_rows(str(tmp_path / "both"))] == [
        (1, "train"),
        (2, "train"),
        (3, "validation"),
    ]


# ---------------------------------------------------------------- suggestions


@pytest.mark.parametrize(
    ("columns", "wanted"),
    [
        ({"passage": SKY, "question": "?", "selected_text": "blue"}, "--columns context=passage,answer=selected_text"),
        ({"document_text": SKY, "query": "?", "answer": "blue"}, "--columns context=document_text,question=query"),
        (
            {"text": SKY, "question_translated": "?", "answers": []},
            "--columns context=text,question=question_translated",
        ),
        ({"text": SKY, "question": "?", "label": 3}, "--columns context=text"),
        ({"Context": SKY, "Question": "?", "answer_text": "blue"}, "--columns answer=answer_text"),
        ({"document text": SKY, "question": "?", "answer": "sky"}, "--columns 'context=document text'"),
        ({"text": SKY, "question_id": "q", "query": "?", "answer_type": "x"}, "--columns context=text,question=query"),
    ],
)
def test_suggestions_can_work(tmp_path, columns, wanted):
    with pytest.raises(DataError) as caught:
        read(put(tmp_path, "rows.jsonl", lines(columns)))
    assert str(caught.value).splitlines()[0].endswith(f"did you mean {wanted}?")


def test_the_documents_list_what_is_read():
    page = (Path(__file__).parents[1] / "docs" / "data.md").read_text(encoding="utf-8")
    assert table() in page
