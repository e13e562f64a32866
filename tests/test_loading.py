"""Every format and shape that can be loaded, and every complaint."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet as parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qadeploy.data.columns import parse_columns
from qadeploy.data.fields import DataOptions
from qadeploy.data.loading import hash_examples, read
from qadeploy.errors import DataError, DataWarning, InputError, MissingExtraError
from qadeploy.records import Annotation, Example

SEED = {"context": "The sky is blue.", "question": "What color is the sky?", "answer": "blue"}
BLUE = (Annotation("blue", 11),)
FLAT = {
    "id": "q1",
    "context": SEED["context"],
    "question": SEED["question"],
    "answers": {"text": ["blue", "is blue"], "answer_start": [11, 8]},
}
OTHER = {**FLAT, "id": "q2", "question": "Which color has the sky?"}
FLAT_ANSWERS = (Annotation("blue", 11), Annotation("is blue", 8))
NESTED = {
    "version": "v2.0",
    "data": [
        {
            "title": "Sky",
            "paragraphs": [
                {
                    "context": SEED["context"],
                    "qas": [
                        {
                            "id": "q1",
                            "question": SEED["question"],
                            "answers": [{"text": "blue", "answer_start": 11}, {"text": "is blue", "answer_start": 8}],
                        },
                        {
                            "id": "q2",
                            "question": "How high is it?",
                            "is_impossible": True,
                            "answers": [],
                            "plausible_answers": [{"text": "sky", "answer_start": 4}],
                        },
                    ],
                }
            ],
        },
        {
            "title": "Sea",
            "paragraphs": [
                {
                    "context": "The sea is green.",
                    "qas": [
                        {
                            "id": "q3",
                            "question": "What is green?",
                            "is_impossible": False,
                            "answers": [{"text": "sea", "answer_start": 4}],
                        }
                    ],
                }
            ],
        },
    ],
}


def jsonl(*rows: object) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def csv_text(*rows: dict[str, object]) -> str:
    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def without(field: str, row: dict[str, object] = SEED) -> dict[str, object]:
    return {name: value for name, value in row.items() if name != field}


def put(folder: Path, name: str, content: str | bytes) -> str:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return str(path)


def put_parquet(folder: Path, rows: list[dict[str, object]], name: str = "data.parquet") -> str:
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / name)
    return str(folder / name)


def problems(source: str) -> list[str]:
    """The problems of a file, each one line that starts ``FILE: row N``, without that file name."""
    with pytest.raises(DataError) as caught:
        read(source)
    for line in caught.value.problems:
        assert re.match(re.escape(source) + r": row [1-9]\d*(, field [\w.]+)?: \S", line)
        assert len(line.splitlines()) == 1
        line.encode("utf-8")  # can be printed
    return [line.removeprefix(source + ": ") for line in caught.value.problems]


def problem(source: str) -> str:
    (line,) = problems(source)
    return line


# ---------------------------------------------------------------- formats and shapes


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("list.json", json.dumps([SEED])),
        ("object.json", json.dumps(SEED)),
        ("data.json", json.dumps({"version": 1, "data": [SEED]})),
        ("pretty.json", json.dumps([SEED], indent=2)),
        ("bom.json", "\ufeff" + json.dumps([SEED])),
        ("rows.jsonl", jsonl(SEED)),
        ("rows.JSONL", "\n\n" + jsonl(SEED).replace("\n", "\r\n") + "  \n"),
        ("rows.ndjson", jsonl(SEED).rstrip("\n")),
        ("rows.csv", csv_text(SEED)),
        ("bom.csv", "\ufeff" + csv_text(SEED)),
        ("blank.csv", csv_text(SEED).replace("\r\n", "\n\n")),
        ("start.jsonl", jsonl({**SEED, "answer_start": 11})),
        ("start.csv", csv_text({**SEED, "answer_start": 11})),
        ("nostart.csv", csv_text({**SEED, "answer_start": ""})),
        ("nostart.jsonl", jsonl({**SEED, "answer_start": None})),
    ],
)
def test_the_seed_triplet_in_every_text_format(tmp_path, name, content):
    data = read(put(tmp_path, name, content))
    assert data.examples == (Example("row-1", SEED["question"], SEED["context"], BLUE),)
    assert data.source == str(tmp_path / name)
    assert (data.skipped, data.first_taken) == (0, 0)


@pytest.mark.parametrize("start", [None, 11])
def test_the_seed_triplet_in_parquet(tmp_path, start):
    row = SEED if start is None else {**SEED, "answer_start": start}
    assert read(put_parquet(tmp_path, [row])).examples == (Example("row-1", SEED["question"], SEED["context"], BLUE),)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("list.json", json.dumps([FLAT, OTHER])),
        ("data.json", json.dumps({"data": [FLAT, OTHER]})),
        ("rows.jsonl", jsonl(FLAT, OTHER)),
        ("lines.json", jsonl(FLAT, OTHER)),
        ("json.csv", csv_text(*({**row, "answers": json.dumps(FLAT["answers"])} for row in (FLAT, OTHER)))),
        ("python.csv", csv_text(*({**row, "answers": repr(FLAT["answers"])} for row in (FLAT, OTHER)))),
    ],
)
def test_flat_rows_with_an_answers_dict(tmp_path, name, content):
    first, second = read(put(tmp_path, name, content)).examples
    assert first == Example("q1", SEED["question"], SEED["context"], FLAT_ANSWERS)
    assert second.id == "q2"


def test_flat_rows_in_parquet(tmp_path):
    none = {**OTHER, "answers": {"text": [], "answer_start": []}}
    with pytest.warns(DataWarning, match="1 of 2 rows have an empty list of answers and no is_impossible"):
        first, second = read(put_parquet(tmp_path, [FLAT, none])).examples
    assert first == Example("q1", SEED["question"], SEED["context"], FLAT_ANSWERS)
    assert second.answers == ()


def test_squad_v2_nesting_keeps_order_and_reads_impossible_as_no_answer(tmp_path):
    one, two, three = read(put(tmp_path, "squad.json", json.dumps(NESTED))).examples
    assert one == Example("q1", SEED["question"], SEED["context"], FLAT_ANSWERS)
    assert two == Example("q2", "How high is it?", SEED["context"], ())
    assert three == Example("q3", "What is green?", "The sea is green.", (Annotation("sea", 4),))


def test_squad_v1_nesting(tmp_path):
    old = json.loads(json.dumps(NESTED["data"][0]))
    old["paragraphs"][0]["qas"].pop()
    (example,) = read(put(tmp_path, "squad.json", json.dumps({"version": "1.1", "data": [old]}))).examples
    assert example.answers == FLAT_ANSWERS


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_csv_keeps_the_line_ends_inside_quotes(tmp_path, line_end):
    context = f"First{line_end}{line_end}line, second line."
    row = {"context": context, "question": f"Which{line_end}line?", "answer": "second", "answer_start": 0}
    row["answer_start"] = context.index("second")
    (example,) = read(put(tmp_path, "rows.csv", csv_text(row))).examples
    assert (example.context, example.question) == (context, f"Which{line_end}line?")
    assert example.answers == (Annotation("second", context.index("second")),)


@pytest.mark.parametrize("before", ["😀😀 ", "e\u0301 ", "日本 ", "\U0001f468\u200d\U0001f469 "])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_offsets_count_code_points(tmp_path, before, ascii_only):
    start = len(before) + len("The sky is ")
    row = {**SEED, "context": before + SEED["context"], "answer_start": start}
    text = json.dumps([row], ensure_ascii=ascii_only)  # the ASCII form writes an emoji as a pair of surrogates
    (example,) = read(put(tmp_path, "rows.json", text)).examples
    assert example.answers == (Annotation("blue", start),)
    assert example.context[start : example.answers[0].end] == "blue"


@pytest.mark.parametrize(
    ("stored", "split"),
    [("train", "train"), ("validation", "validation"), ("dev", "validation"), ("test", "validation"), ("", "")],
)
def test_a_split_field_fixes_the_side(tmp_path, stored, split):
    data = read(put(tmp_path, "rows.jsonl", jsonl({**SEED, "split": stored}, {**SEED, "question": "And?"})))
    assert [e.split for e in data.examples] == [split, ""]
    assert data.part(split or "train") == (data.examples[:1] if split else ())


def test_a_split_that_is_not_known_is_said(tmp_path):
    path = put(tmp_path, "rows.jsonl", jsonl(SEED, {**SEED, "split": "fold-2"}))
    with pytest.raises(DataError) as caught:
        read(path)
    assert caught.value.problems[0].startswith(f"{path}: row 2, field split: must be one of train, validation")


def test_several_annotators_of_one_question_become_one_example(tmp_path):
    rows = [{**SEED, "id": "a"}, {**SEED, "id": "b", "answer": "is blue"}, {**SEED, "id": "c", "question": "And?"}]
    one, other = read(put(tmp_path, "rows.jsonl", jsonl(*rows))).examples
    assert (one.id, one.also, one.answers) == ("a", ("b",), FLAT_ANSWERS)
    assert (other.id, other.also) == ("c", ())
    assert len(read(put(tmp_path, "rows.jsonl", jsonl(*rows)), annotated=False).examples) == 3


def test_squads_own_ids_are_never_merged(tmp_path):
    paragraph = NESTED["data"][0]["paragraphs"][0]
    twice = {**paragraph, "qas": [paragraph["qas"][0], {**paragraph["qas"][0], "id": "q9"}]}
    source = put(tmp_path, "squad.json", json.dumps({"data": [{"paragraphs": [twice]}]}))
    assert [e.id for e in read(source).examples] == ["q1", "q9"]


# ---------------------------------------------------------------- the user's own columns

REVIEW = {
    "review": "Good sound , long life.",
    "question": "How is it?",
    "human_ans_spans": "Good sound",
    "at": "(0, 10)",
}
MAPPING = {"context": "review", "answer": "human_ans_spans", "span": "at"}


@pytest.mark.parametrize("span", ["(0, 10)", [0, 10], "[0, 10]", {"start": 0, "end": 10}, 0, "0"])
def test_columns_of_any_name_and_spans_of_any_kind(tmp_path, span):
    source = put(tmp_path, "rows.jsonl", jsonl({**REVIEW, "at": span}))
    (example,) = read(source, DataOptions(columns=MAPPING)).examples
    assert (example.context, example.answers) == (REVIEW["review"], (Annotation("Good sound", 0),))


def test_a_missing_column_is_answered_with_a_guess_of_the_mapping(tmp_path):
    source = put(tmp_path, "rows.csv", csv_text({**without("at", REVIEW), "human_ans_indices": "(0, 10)"}))
    wanted = "--columns context=review,answer=human_ans_spans,span=human_ans_indices"
    assert problem(source).endswith(f"did you mean {wanted}?")
    assert len(read(source, DataOptions(columns=parse_columns(wanted.removeprefix("--columns ")))).examples) == 1


def test_a_problem_names_the_users_own_column(tmp_path):
    source = put(tmp_path, "rows.jsonl", jsonl({**REVIEW, "review": ""}))
    with pytest.raises(DataError, match="row 1, field review: is empty"):
        read(source, DataOptions(columns=MAPPING))


def test_an_answer_that_means_none(tmp_path):
    source = put(tmp_path, "rows.jsonl", jsonl({**REVIEW, "human_ans_spans": "ANSWERNOTFOUND", "at": "(90, 104)"}))
    (example,) = read(source, DataOptions(columns=MAPPING, no_answer_token="ANSWERNOTFOUND")).examples
    assert example.answers == ()


@pytest.mark.parametrize("text", ["review", "context=", "text=review", "context=a,context=b"])
def test_a_mapping_that_is_none(text):
    with pytest.raises(InputError, match="--columns"):
        parse_columns(text)


def test_a_number_as_id_becomes_text(tmp_path):
    assert read(put(tmp_path, "rows.jsonl", jsonl({**SEED, "id": 7}))).examples[0].id == "7"


def test_the_handbook_is_a_name_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = read("handbook")
    assert data.source == "handbook"
    assert len(data.part("train")) + len(data.part("validation")) == len(data.examples)


@pytest.mark.parametrize("extra", [{}, {"answer": 7}, {"answers": None}, {"answer": "The", "answer_start": 99}])
def test_questions_to_be_answered_need_no_answers(tmp_path, extra):
    source = put(tmp_path, "rows.jsonl", jsonl({**without("answer"), **extra}))
    assert read(source, annotated=False).examples == (Example("row-1", SEED["question"], SEED["context"]),)
    assert problem(source)


def test_the_hash_of_examples_follows_their_content_alone(tmp_path):
    a = hash_examples(read(put(tmp_path, "a.jsonl", jsonl(FLAT))).examples)
    assert a == hash_examples(read(put_parquet(tmp_path, [{**FLAT, "title": "Sky"}])).examples)
    assert re.fullmatch("[0-9a-f]{64}", a)
    other = [{**FLAT, "id": "x"}, {**FLAT, "question": "x"}, {**FLAT, "context": "The sky is blue"}]
    other += [{**FLAT, "split": "train"}, {**FLAT, "answers": {"text": ["blue"], "answer_start": [11]}}]
    files = [put(tmp_path, f"{n}.jsonl", jsonl(row)) for n, row in enumerate(other)]
    assert len({a, *(hash_examples(read(file).examples) for file in files)}) == 6


# ---------------------------------------------------------------- the hub


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the datasets library: notes the calls, serves two splits or the one asked for."""
    calls = []
    parts = {"train": [FLAT, OTHER], "validation": [{**FLAT, "id": "q3"}], "extra": [{**SEED, "question": "And?"}]}

    def load_dataset(path, *, name=None, split=None, token=None):
        calls.append((f"{path} {name}" if name else path, split, token))
        if path == "gone":
            raise RuntimeError("Dataset 'gone' is\nnot there")
        return parts[split] if split else parts

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return calls


def test_a_whole_hub_data_set_brings_its_splits(hub):
    data = read("hub:user/set", token="secret")
    assert hub == [("user/set", None, "secret")]
    assert [(e.id, e.split) for e in data.examples] == [
        ("q1", "train"),
        ("q2", "train"),
        ("q3", "validation"),
        ("row-4", "train"),
    ]
    assert data.examples[0].answers == FLAT_ANSWERS


def test_one_split_of_a_hub_data_set_is_not_bound_to_a_side(hub):
    data = read("hub:user/set:validation")
    assert hub == [("user/set", "validation", None)]
    assert [(e.id, e.split) for e in data.examples] == [("q3", "")]


def test_a_failing_hub_is_one_line_that_says_what_to_do(hub):
    with pytest.raises(InputError) as caught:
        read("hub:gone")
    message = str(caught.value)
    assert message.startswith("hub:gone: the data set cannot be loaded from the hub: Dataset 'gone' is not there. ")
    assert "download it once and give the file" in message
    assert "\n" not in message


def test_without_a_network_the_real_library_ends_in_one_clear_error(tmp_path):
    code = """
from qadeploy.data.loading import read
from qadeploy.errors import InputError
try:
    read("hub:rajpurkar/squad")
except InputError as error:
    print("InputError:", error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parents[1],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    (line,) = done.stdout.splitlines()
    assert line.startswith("InputError: hub:rajpurkar/squad: the data set cannot be loaded from the hub: ")
    assert line.endswith("Check the name and the network, or download it once and give the file")


@pytest.mark.parametrize(
    ("module", "source", "extra"),
    [
        ("datasets", "hub:user/set", "train"),
        ("pyarrow", "data.parquet", "parquet"),
        ("openpyxl", "data.xlsx", "excel"),
    ],
)
def test_a_missing_package_names_the_extra(tmp_path, monkeypatch, module, source, extra):
    monkeypatch.chdir(tmp_path)
    put_parquet(tmp_path, [SEED])
    put(tmp_path, "data.xlsx", "content")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=re.escape(f"pip install 'qadeploy[{extra}]'")):
        read(source)


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
            "looks like UTF-16, cut short or without its mark",
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
    text = pyarrow.StringArray.from_buffers(
        1, pyarrow.py_buffer(b"\0\0\0\0\1\0\0\0"), pyarrow.py_buffer(b"\xff")
    )  # offsets 0 and 1, then the one wrong byte
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
        ({**SEED, "answer": "Blue"}, 'field answer: "Blue" does not occur in the context: it must be copied from it'),
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
        'row 3, field answer: "red" does not occur in the context: it must be copied from it letter by letter',
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


def test_a_configuration_of_a_hub_data_set(hub):
    assert read("hub:user/set@plain:validation").examples[0].id == "q3"
    assert hub == [("user/set plain", "validation", None)]


def test_rows_of_a_hub_data_set_are_counted_over_its_splits(hub, monkeypatch):
    parts = {"train": [SEED], "test": [SEED, without("context")]}
    monkeypatch.setattr(sys.modules["datasets"], "load_dataset", lambda *_, **__: parts)
    assert problem("hub:user/set").startswith("row 3, field context: is missing")


@pytest.mark.parametrize(
    ("first", "second", "named"),
    [({"id": "a"}, {"id": "a"}, "a"), ({"id": 7}, {"id": "7"}, "7")],
)
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


# ---------------------------------------------------------------- any valid example, there and back

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
VISIBLE = st.tuples(TEXT, st.sampled_from("aé😀\u4e00"), TEXT).map("".join)


@st.composite
def examples(draw: st.DrawFn) -> list[Example]:
    found = []
    for number in range(draw(st.integers(1, 4))):
        context, answers = draw(TEXT), []
        for _ in range(draw(st.integers(0, 2))):
            text = draw(VISIBLE)
            answers.append(Annotation(text, len(context)))
            context += text + draw(TEXT)
        found.append(Example(f"id-{number}", f"{number} {draw(VISIBLE)}", context + draw(VISIBLE), tuple(answers)))
    return found


def flat(example: Example) -> dict[str, object]:
    texts, starts = [a.text for a in example.answers], [a.start for a in example.answers]
    answers = {"text": texts, "answer_start": starts}
    return {"id": example.id, "question": example.question, "context": example.context, "answers": answers}


def nested(example: Example) -> dict[str, object]:
    answers = [{"text": a.text, "answer_start": a.start} for a in example.answers]
    qa = {"id": example.id, "question": example.question, "answers": answers}
    return {"title": "", "paragraphs": [{"context": example.context, "qas": [qa]}]}


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(wanted=examples())
def test_any_valid_example_comes_back_equal(tmp_path, wanted):
    rows = [flat(e) for e in wanted]
    with_json = csv_text(*({**row, "answers": json.dumps(row["answers"])} for row in rows))
    with_python = csv_text(*({**row, "answers": repr(row["answers"])} for row in rows))
    sources = [
        put(tmp_path, "rows.jsonl", jsonl(*rows)),
        put(tmp_path, "rows.json", json.dumps(rows)),
        put(tmp_path, "squad.json", json.dumps({"data": [nested(e) for e in wanted]})),
        put(tmp_path, "json.csv", with_json),
        put(tmp_path, "python.csv", with_python),
        put_parquet(tmp_path, rows),
    ]
    for source in sources:
        assert read(source, DataOptions(empty_answers="no-answer")).examples == tuple(wanted), source
