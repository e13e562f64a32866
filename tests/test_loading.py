"""Every format and shape that can be loaded, and every error."""

from __future__ import annotations

import csv
import io
import json
import os
import re
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
from tests.processes_for_tests import succeeded

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
SKY = [
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
]
SEA = {"id": "q3", "question": "What is green?", "is_impossible": False}
SEA["answers"] = [{"text": "sea", "answer_start": 4}]
NESTED = {
    "version": "v2.0",
    "data": [
        {"title": "Sky", "paragraphs": [{"context": SEED["context"], "qas": SKY}]},
        {"title": "Sea", "paragraphs": [{"context": "The sea is green.", "qas": [SEA]}]},
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
MAPPING = "context=review,answer=human_ans_spans,span=at"


@pytest.mark.parametrize("span", ["(0, 10)", [0, 10], "[0, 10]", {"start": 0, "end": 10}, 0, "0"])
def test_columns_of_any_name_and_spans_of_any_kind(tmp_path, span):
    source = put(tmp_path, "rows.jsonl", jsonl({**REVIEW, "at": span}))
    (example,) = read(source, DataOptions(columns=MAPPING)).examples
    assert (example.context, example.answers) == (REVIEW["review"], (Annotation("Good sound", 0),))


def test_a_missing_column_is_answered_with_a_guess_of_the_mapping(tmp_path):
    source = put(tmp_path, "rows.csv", csv_text({**without("at", REVIEW), "human_ans_indices": "(0, 10)"}))
    wanted = "--columns context=review,answer=human_ans_spans,span=human_ans_indices"
    assert problem(source).endswith(f"did you mean {wanted}?")
    assert len(read(source, DataOptions(columns=wanted.removeprefix("--columns "))).examples) == 1


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
    """A stand-in for the datasets library: notes the calls, serves two splits or the requested one."""
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
    done = succeeded(
        [sys.executable, "-c", code],
        timeout=120,
        cwd=Path(__file__).parents[1],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path)},
    )
    assert "Traceback" not in done.stderr
    (line,) = done.stdout.splitlines()
    assert line.startswith("InputError: hub:rajpurkar/squad: the data set cannot be loaded from the hub: ")
    assert line.endswith("Check the name and the network, or download it once and give the file")


@pytest.mark.parametrize(
    ("module", "source", "extra"),
    [("datasets", "hub:user/set", "train"), ("pyarrow", "data.parquet", "parquet"), ("openpyxl", "data.xlsx", "excel")],
)
def test_a_missing_package_names_the_extra(tmp_path, monkeypatch, module, source, extra):
    monkeypatch.chdir(tmp_path)
    put_parquet(tmp_path, [SEED])
    put(tmp_path, "data.xlsx", "content")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=re.escape(f"pip install 'qadeploy[{extra}]'")):
        read(source)


def test_a_configuration_of_a_hub_data_set(hub):
    assert read("hub:user/set@plain:validation").examples[0].id == "q3"
    assert hub == [("user/set plain", "validation", None)]


def test_rows_of_a_hub_data_set_are_counted_over_its_splits(hub, monkeypatch):
    parts = {"train": [SEED], "test": [SEED, without("context")]}
    monkeypatch.setattr(sys.modules["datasets"], "load_dataset", lambda *_, **__: parts)
    assert problem("hub:user/set").startswith("row 3, field context: is missing")


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


# ---------------------------------------------------------------- several sources


def write_rows(path: Path, *rows: dict[str, object]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_several_files_are_one_data_set_whatever_their_formats(tmp_path):
    one = write_rows(tmp_path / "one.jsonl", {**SEED, "question": "Which?"}, {**SEED, "question": "Is it?"})
    two = tmp_path / "two.csv"
    two.write_text("context,question,answer\nThe sea is green.,What is it that is green?,The sea\n")
    three = tmp_path / "three.json"
    three.write_text(json.dumps(NESTED))
    found = read([one, str(two), str(three)])
    alone = [read(each).examples for each in (one, str(two), str(three))]
    assert [e.question for e in found.examples] == [e.question for each in alone for e in each]
    assert [e.id for e in found.examples[:3]] == ["row-1", "row-2", "row-1-2"]
    assert len({e.id for e in found.examples}) == len(found.examples)
    assert found.source == f"{one}, {two}, {three}"


def test_a_question_that_two_files_ask_has_the_answers_of_both(tmp_path):
    one = write_rows(tmp_path / "one.jsonl", {**SEED, "id": "a"}, {**SEED, "id": "b", "question": "Which?"})
    two = write_rows(
        tmp_path / "two.jsonl", {**SEED, "id": "b", "answer": "is blue"}, {**SEED, "id": "a", "question": "?"}
    )
    found = {e.id: (e.question, e.answers, e.also) for e in read([one, two]).examples}
    assert found == {
        "a": (SEED["question"], (*BLUE, Annotation("is blue", 8)), ("b-2",)),
        "b": ("Which?", BLUE, ()),
        "a-2": ("?", BLUE, ()),
    }


def test_a_file_that_is_named_twice_is_read_once_and_none_is_refused(tmp_path):
    one = write_rows(tmp_path / "one.jsonl", SEED)
    assert read([one, one]).examples == read(one).examples
    for nothing in ([], "", [one, ""]):
        with pytest.raises(InputError, match=r"^no data is named: give"):
            read(nothing)


def test_every_id_of_several_files_stands_for_one_question(tmp_path):
    twice = {**SEED, "question": "Which?"}
    one = write_rows(tmp_path / "one.jsonl", {**SEED, "id": "a"}, {**twice, "id": "b"}, {**twice, "id": "c"})
    two = write_rows(
        tmp_path / "two.jsonl", {**SEED, "id": "a"}, {**twice, "id": "a-2"}, {**SEED, "id": "b", "question": "?"}
    )
    assert [(e.id, e.also) for e in read([one, two]).examples] == [("a", ()), ("b", ("c", "a-2")), ("b-2", ())]


def test_files_that_contradict_each_other_are_refused_with_every_question(tmp_path):
    none = {"answer": "", "is_impossible": True}
    one = write_rows(tmp_path / "one.jsonl", SEED, {**SEED, "question": "Is it?", **none})
    two = write_rows(tmp_path / "two.jsonl", {**SEED, **none}, {**SEED, "question": "Is it?"})
    with pytest.raises(DataError) as told:
        read([one, two])
    expected = ": correct one, or leave it out"
    assert [line.removeprefix(f"{two}: ").removesuffix(expected) for line in told.value.problems] == [
        '"What color is the sky?" (id row-1) is also in an earlier file, and only one of the two has the answer "blue"',
        '"Is it?" (id row-2) is also in an earlier file, and only one of the two has the answer "blue"',
    ]


def test_a_bad_row_of_a_later_file_is_named_by_its_own_file_and_number(tmp_path):
    one = write_rows(tmp_path / "one.jsonl", SEED)
    two = write_rows(tmp_path / "two.jsonl", {**SEED, "question": "?"}, {**SEED, "answer": "red"})
    with pytest.raises(DataError, match=rf"^{two}: row 2, field answer"):
        read([one, two])
