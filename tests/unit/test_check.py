"""The data check: classes, flags, repairs, and that rows in are rows out."""

import csv
import io
import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qadeploy.data.check import RowClass, check_rows
from qadeploy.data.check_file import write_fixed
from qadeploy.data.check_text import check_lines, check_summary
from qadeploy.data.fields import DataOptions
from qadeploy.data.formats import load_rows
from qadeploy.data.loading import read
from qadeploy.data.rows import RawRow
from qadeploy.errors import InputError

CONTEXT = "The sky is blue, blue all day. 😀 A Grey  cloud came; it was funny, funny. Then night."


def row(answer=None, start=None, number=1, **more):
    fields = {"context": CONTEXT, "question": "What?", **more}
    if answer is not None:
        fields["answer"] = answer
    if start is not None:
        fields["answer_start"] = start
    return RawRow(number, fields)


def check_row(given_row, options):
    """Checks a row beside a sound one, since a source in which no row is sound is refused as a whole."""
    return check_rows("x", [given_row, row("sky", 4, number=2, question="Else?")], options).rows[0]


@pytest.mark.parametrize(
    ("given_row", "kind", "fixed"),
    [
        (row("sky", 4), "exact", ("sky", 4)),
        (row("sky"), "exact", ("sky", 4)),
        (row(" sky ", 3), "exact", (" sky ", 3)),
        (row("sky", 5), "shifted", ("sky", 4)),
        (row("sky", 60), "shifted", ("sky", 4)),
        (row("sky", -1), "empty", None),  # "none here", not a place
        (row("sky", "4"), "exact", ("sky", 4)),
        (row("sky", 4.0), "exact", ("sky", 4)),
        (row("sky", "5.0"), "shifted", ("sky", 4)),
        (row("sky", 4.5), "empty", None),
        (row("blue", 13), "shifted", ("blue", 11)),
        (row("blue", 16), "shifted", ("blue", 17)),
        (row("night", len(CONTEXT) - 5), "utf16", ("night", len(CONTEXT) - 6)),
        (row("night", len(CONTEXT) - 4), "shifted", ("night", len(CONTEXT) - 6)),
        (row("Grey cloud", 35), "whitespace", ("Grey  cloud", 35)),
        (row("\tsky\n is"), "whitespace", ("sky is", 4)),
        (row("THE SKY", 0), "case", ("The sky", 0)),
        (row("grey  Cloud"), "case", ("Grey  cloud", 35)),
        (row("funny , funny"), "detokenised", ("funny, funny", 60)),
        (row("funny , funny", 60), "detokenised", ("funny, funny", 60)),  # not the 13 characters from 60
        (row("grey cloud"), "detokenised", ("Grey  cloud", 35)),
        (row("day ."), "detokenised", ("day.", 26)),
        (row("red", 3), "absent", None),
        (row("—", 3), "absent", None),
        (row("sky", 4, is_impossible=True), "no_answer", None),
        (row(answers={"text": [], "answer_start": []}), "no_answer", None),
        (row(answers=[]), "no_answer", None),
        (row("NONE"), "no_answer", None),
        (row(answers={"text": [" NONE"], "answer_start": [0]}), "no_answer", None),
        (row(""), "empty", None),
        (row(7), "empty", None),
        (row(), "empty", None),
        (row("sky", 4, context="  "), "empty", None),
        (row("sky", 4, question=None), "empty", None),
        (row(answers={"text": ["sky"], "answer_start": []}), "empty", None),
        (row("\ud800"), "empty", None),
        (row("sky", 4, split="elsewhere"), "empty", None),
        (RawRow(1, {}, problem="is a number"), "empty", None),
    ],
)
def test_classes_and_repairs(given_row, kind, fixed):
    found = check_row(given_row, DataOptions(no_answer_token="NONE"))
    assert found.kind == kind
    answers = [f.fixed for f in found.answers if f.fixed]
    assert [(a.text, a.start) for a in answers] == ([fixed] if fixed else [])
    assert bool(found.problem) == (kind in {"empty", "absent"})


def test_utf16_is_told_from_shifted_by_the_characters_before():
    assert check_row(row("Grey", 36), DataOptions()).kind == "utf16"  # one emoji before: exactly what UTF-16 counts
    assert check_row(row("sky", 5), DataOptions()).kind == "shifted"  # none before
    assert check_row(row("Grey", 34), DataOptions()).kind == "shifted"  # the other way


def test_several_answers_have_the_class_of_the_worst():
    answers = {"text": ["sky", "THE SKY", "sky"], "answer_start": [4, 0, 5]}
    found = check_row(row(answers=answers), DataOptions())
    assert (found.kind, [f.kind for f in found.answers]) == ("case", ["exact", "case", "shifted"])
    assert [(f.fixed.text, f.fixed.start) for f in found.answers] == [("sky", 4), ("The sky", 0), ("sky", 4)]
    answers["text"][2] = "red"
    assert check_row(row(answers=answers), DataOptions()).problem.sentence == '"red" does not occur in the context'


@pytest.mark.parametrize(
    ("given_row", "kind", "reason"),
    [
        (row("blue"), "exact", '"blue" occurs 2 times in the context and no offset says which is meant'),
        (row("blue", "x"), "empty", 'answer_start: must be a whole number, not "x"'),
        (row("loud", 20), "shifted", '"loud" occurs only inside a longer word'),
        (row("Blue"), "case", '"Blue" occurs 2 times'),
        (
            row("blue", 14),
            "shifted",
            '"blue" is not at its offset 14, and it is uncertain which of its 2 occurrences is meant',
        ),
        (row("HE SK", 1), "case", '"HE SK" occurs only inside a longer word'),
    ],
)
def test_what_is_not_certain_is_not_repaired(given_row, kind, reason):
    found = check_row(given_row, DataOptions())
    assert found.kind == kind
    assert str(found.problem).startswith(reason)
    assert not found.repaired


def test_the_first_of_several_where_that_is_asked_for():
    found = check_row(row("blue"), DataOptions(on_ambiguous="first"))
    assert (found.kind, found.repeated, found.answers[0].fixed.start, found.problem) == ("exact", True, 11, None)


@given(st.data())
def test_repairs_are_slices_of_the_context(data):
    context = data.draw(st.text(alphabet="abAB ,.\n😀é", min_size=1, max_size=30).filter(str.strip))
    answer = data.draw(st.text(alphabet="abAB ,.é😀", min_size=1, max_size=4).filter(str.strip))
    start = data.draw(st.none() | st.integers(0, 35))
    found = check_row(
        RawRow(1, {"context": context, "question": "?", "answer": answer, "answer_start": start}), DataOptions()
    )
    assert found.kind in list(RowClass)
    (finding,) = found.answers
    assert (finding.fixed is None) == bool(found.problem)
    if finding.fixed:
        assert context[finding.fixed.start : finding.fixed.end] == finding.fixed.text
        assert (found.kind == "exact") == (finding.fixed.text == answer and start in (None, finding.fixed.start))


# ---------------------------------------------------------------- files as they are found


def covid_like(path):
    """SQuAD's nesting, as Haystack's annotation tool writes it: contexts lost a leading space, offsets did not."""
    random.seed(7)
    paragraphs, wanted = [], {"exact": 0, "shifted": 0, "whitespace": 0, "absent": 0}
    for p in range(12):
        words = [f"w{p}x{i}" for i in range(60)]
        context = " ".join(words)
        qas = []
        for q in range(10):
            i = random.randrange(50)
            answer = " ".join(words[i : i + 3])
            start = context.index(answer)
            kind = random.choice(["exact", "exact", "exact", "shifted", "shifted", "whitespace", "absent"])
            wanted[kind] += 1
            if kind == "shifted":
                start += 1
            elif kind == "whitespace":
                answer = answer.replace(" ", "\n")
            elif kind == "absent":
                answer = "nothing " + answer
            qas.append(
                {
                    "question": f"question {q}?",
                    "id": 100 * p + q,
                    "answers": [{"text": answer, "answer_start": start, "answer_id": 5, "document_id": 9}],
                    "is_impossible": False,
                }
            )
        paragraphs.append({"context": context, "document_id": p, "qas": qas})
    path.write_text(json.dumps({"data": [{"paragraphs": paragraphs[:6]}, {"paragraphs": paragraphs[6:]}]}))
    return wanted


def test_a_covid_qa_like_file(tmp_path):
    source = tmp_path / "covid.json"
    wanted = covid_like(source)
    check = check_rows(str(source), load_rows(str(source)), DataOptions())
    counts = check.to_dict()
    assert counts["rows"] == 120
    assert {k: v for k, v in counts["classes"].items() if v} == {**wanted}
    assert check.shifts() == {1: wanted["shifted"]}
    assert counts["repaired"] == wanted["shifted"] + wanted["whitespace"]
    assert counts["rejected"] == wanted["absent"]
    assert f"offsets are off by +1 ({wanted['shifted']}) code points" in "\n".join(check_lines(check))


SUBJQA = [
    ("Is it fun?", "A funny, funny film. ANSWERNOTFOUND", "funny , funny", "(2, 14)"),
    ("Is it fun?", "Dull , dull. And so loud , loud. ANSWERNOTFOUND", "so loud, loud", "(17, 30)"),
    ("How is the screen?", "It's great! I don't mind. ANSWERNOTFOUND", "I do n't mind", "(12, 24)"),
    ("How is the screen?", "It was so so. Really so so. ANSWERNOTFOUND", "so so", "(21, 26)"),
    ("How is the sound?", "No word on it. ANSWERNOTFOUND", "ANSWERNOTFOUND", "(15, 29)"),
    ("How is the sound?", "Nor here. ANSWERNOTFOUND", "ANSWERNOTFOUND", "(10, 24)"),
]
MAPPING = "context=review,answer=human_ans_spans,span=human_ans_indices"


def subjqa_like(path):
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["item_id", "question", "review", "human_ans_spans", "human_ans_indices"])
    writer.writerows([str(n), *values] for n, values in enumerate(SUBJQA))
    path.write_bytes(text.getvalue().encode())


def test_a_subjqa_like_file(tmp_path):
    source, out = tmp_path / "electronics.csv", tmp_path / "out.jsonl"
    subjqa_like(source)
    reading = DataOptions(columns=MAPPING, no_answer_token="ANSWERNOTFOUND")
    check = check_rows(str(source), load_rows(str(source)), reading)
    counts = check.to_dict()
    assert {k: v for k, v in counts["classes"].items() if v} == {
        "exact": 1,
        "detokenised": 3,
        "no_answer": 2,
        "repeated": 1,
    }
    write_fixed(check, out)
    answers = [[a.text for a in e.answers] for e in read(str(out)).examples]
    assert answers == [["funny, funny"], ["so loud , loud"], ["I don't mind"], ["so so"], [], []]
    with pytest.raises(InputError, match=r"in every row, field context: is missing;.*--columns context=review"):
        check_rows(str(source), load_rows(str(source)), DataOptions())


def test_a_label_studio_export(tmp_path):
    source, out = tmp_path / "tasks.json", tmp_path / "out.jsonl"
    text = "😀😀 It sailed at dawn."
    region = {"type": "labels", "value": {"start": 8, "end": 14, "text": "sailed", "labels": ["Answer"]}}
    early = {"type": "labels", "value": {"start": 5, "end": 7, "text": "It", "labels": ["Answer"]}}
    tasks = [
        {
            "id": 11,
            "data": {"text": text, "question": "What did it do?"},
            "annotations": [{"result": [region]}, {"result": [early]}, {"result": [], "was_cancelled": True}],
        },
        {"id": 12, "data": {"text": text, "question": "Who?"}, "annotations": [{"result": []}]},
    ]
    source.write_text(json.dumps(tasks))
    check = check_rows(str(source), load_rows(str(source)), DataOptions())
    assert [r.kind for r in check.rows] == ["utf16", "no_answer"]
    write_fixed(check, out)
    first, second = read(str(out)).examples
    assert [(a.text, a.start) for a in first.answers] == [("sailed", 6), ("It", 3)]
    assert (first.id, second.answers) == ("11", ())


# ---------------------------------------------------------------- --fix


def test_rows_in_are_rows_out(tmp_path):
    source, out = tmp_path / "rows.jsonl", tmp_path / "clean.jsonl"
    rows = [
        {"context": CONTEXT, "question": "1?", "answer": "sky", "id": "a", "split": "dev"},
        {"context": CONTEXT, "question": "2?", "answer": "THE SKY", "id": "a"},
        {"context": CONTEXT, "question": "3?", "answer": "red", "id": "a-2"},
        {"context": CONTEXT, "question": "4?", "answer": "Grey cloud"},
        {"context": CONTEXT, "question": "5?", "answer": "\ud83d"},
        {"context": CONTEXT, "question": "1?", "answer": "sky"},
    ]
    text = "".join(json.dumps(r) + "\n" for r in rows) + "not JSON\n"
    source.write_text(text)
    check = check_rows(str(source), load_rows(str(source)), DataOptions())
    written = write_fixed(check, out)
    clean = [json.loads(line) for line in out.read_text().splitlines()]
    rejected = [json.loads(line) for line in written.rejected.read_text().splitlines()]
    assert (len(clean), len(rejected)) == (4, 3) == (written.clean_rows, written.rejected_rows)
    assert written.rejected.name == "clean.rejected.jsonl"
    assert clean[0] == {
        "id": "a",
        "context": CONTEXT,
        "question": "1?",
        "answers": {"text": ["sky"], "answer_start": [4]},
        "split": "validation",
    }
    assert [r["id"] for r in clean] == ["a", "a-3", "row-4", "row-6"]  # a-2 is the id of a row, though rejected
    assert written.renamed == 1
    assert [(r["row"], r["class"]) for r in rejected] == [(3, "absent"), (5, "empty"), (7, "empty")]
    assert rejected[0]["reason"] == '"red" does not occur in the context'
    assert rejected[1]["fields"]["answer"] == "\ud83d"
    assert [e.id for e in read(str(out)).examples] == ["a", "a-3", "row-4", "row-6"]
    assert source.read_text() == text
    assert check.rows[5].duplicate_of == 1
    assert check.to_dict()["same_ids"] == 1


def test_a_long_context_is_written_once(tmp_path, monkeypatch):
    monkeypatch.setattr("qadeploy.data.check_file._MUCH", 100)
    source, out = tmp_path / "squad.json", tmp_path / "clean.jsonl"
    qas = [{"id": f"q{n}", "question": f"{n}?", "answers": [{"text": "THE SKY", "answer_start": 0}]} for n in range(4)]
    qas.append({"id": "none", "question": "Who?", "answers": [], "is_impossible": True})
    qas.append({"id": "bad", "question": "Who?", "answers": [{"text": "red", "answer_start": 0}]})
    source.write_text(json.dumps({"data": [{"paragraphs": [{"context": CONTEXT, "qas": qas}]}]}))
    written = write_fixed(check_rows(str(source), load_rows(str(source)), DataOptions()), out)
    (line,) = out.read_text().splitlines()
    assert line.count("The sky is blue") == 1
    assert (written.clean_rows, written.rejected_rows) == (5, 1)
    examples = read(str(out)).examples
    assert [(e.id, [(a.text, a.start) for a in e.answers]) for e in examples] == [
        *((f"q{n}", [("The sky", 0)]) for n in range(4)),
        ("none", []),
    ]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("clean.csv", "the repaired rows are written as JSONL: give a name that ends in .jsonl"),
        ("rows.jsonl", "would overwrite its source"),
        ("rows", "give a name that ends in .jsonl"),
        ("absent/clean.jsonl", "its folder does not exist"),
        ("folder.jsonl", "is a folder"),
    ],
)
def test_places_that_cannot_be_written(tmp_path, name, message):
    source = tmp_path / "rows.jsonl"
    source.write_text(json.dumps({"context": CONTEXT, "question": "1?", "answer": "sky"}))
    (tmp_path / "folder.jsonl").mkdir()
    check = check_rows(str(source), load_rows(str(source)), DataOptions())
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(InputError, match=message):
        write_fixed(check, tmp_path / name)
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_the_rejected_file_may_not_be_the_source(tmp_path):
    source = tmp_path / "x.rejected.jsonl"
    source.write_text(json.dumps({"context": CONTEXT, "question": "1?", "answer": "sky"}))
    check = check_rows(str(source), load_rows(str(source)), DataOptions())
    with pytest.raises(InputError, match="would overwrite"):
        write_fixed(check, tmp_path / "x.jsonl")


# ---------------------------------------------------------------- counts and text


def test_the_counts_add_up(tmp_path):
    check = check_rows("x", [row("sky", 4), row("red", number=2), row("blue", 11, number=3, id="q")], DataOptions())
    value = check.to_dict()
    classes = "exact shifted whitespace case detokenised utf16 utf8 repeated absent empty duplicate no_answer"
    assert list(value["classes"]) == classes.split()
    flags = value["classes"]["repeated"], value["classes"]["duplicate"]
    assert flags == (1, 2)
    assert sum(value["classes"].values()) - sum(flags) == value["rows"] == 3
    assert (value["repaired"], value["rejected"], check.bad_share) == (0, 1, 1 / 3)
    assert check_summary(check) == "3 rows: 2 exact, 1 repeated, 1 absent, 2 duplicate"
    text = check_lines(check, show=1)
    assert '  row 2: "red" does not occur in the context' in text
    assert '  row 3 (id q): "blue" occurs several times, the one at 11 is meant' in text
    assert "  row 2: has the question and context of row 1" in text
    assert "  ... and 1 more" in text
    assert not any(line.startswith("  row ") for line in check_lines(check, show=0))


def test_every_repair_is_worded():
    rows = [row("sky", 5), row("Grey", 36), row("Grey cloud", 35), row("THE SKY"), row("day ."), row("blue", 16)]
    text = check_lines(check_rows("x", rows, DataOptions()))
    for wanted in (
        '"sky": answer_start 5 -> 4',
        '"Grey": answer_start 36 (UTF-16 units) -> 35',
        '"Grey cloud" -> "Grey  cloud" at 35',
        '"THE SKY" -> "The sky" at 0',
        '"day ." -> "day." at 26',
    ):
        assert f"  row 1: {wanted}" in text
    assert "  offsets are off by +1 (1), -1 (1) code points" in text


def test_no_rows():
    with pytest.raises(InputError, match="x: holds no rows"):
        check_rows("x", [], DataOptions())
