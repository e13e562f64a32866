"""The command line on models, run for real: ``evaluate``, ``ask`` and ``answer``."""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
import pytest
from click.testing import CliRunner

from qadeploy import Answerer
from qadeploy.cli import main
from qadeploy.core.settings import Options
from qadeploy.inference.bundle import open_bundle
from tests.cli_for_tests import fails, run, value, well
from tests.conftest import sealed_copy, triplets, unanswerable, write_jsonl

pytestmark = pytest.mark.usefixtures("elsewhere")


@pytest.mark.parametrize("kind", ["run", "bundle"])
def test_evaluate_writes_the_files_that_train_wrote(kind, tiny, bundle):
    from qadeploy.training.runs import dev_set, find_run

    part = dev_set(find_run(tiny.run))
    rows = [{"id": e.id, "context": e.context, "question": e.question, "answer": e.answers[0].text} for e in part]
    write_jsonl(Path("dev.jsonl"), rows)
    model = bundle if kind == "bundle" else tiny.run
    well("evaluate", model, "--data", "dev.jsonl", "--predictions-dir", "new/folder")
    assert sorted(p.name for p in Path("new/folder").iterdir()) == ["nbest_predictions.json", "predictions.json"]
    theirs, ours = (
        json.loads((folder / "nbest_predictions.json").read_text()) for folder in (tiny.run, Path("new/folder"))
    )
    assert list(theirs) == list(ours) == [row["id"] for row in rows]
    for row in rows:
        assert len(ours[row["id"]]) == 20
        places = {(e["start"], e["end"]): e for e in ours[row["id"]]}  # by place: what is almost equal may change ranks
        for old in theirs[row["id"]][:5]:
            mine = places[old["start"], old["end"]]
            assert mine["text"] == old["text"]
            assert mine["start_logit"] == pytest.approx(old["start_logit"], abs=1e-3)
            assert mine["probability"] == pytest.approx(old["probability"], abs=1e-4)
    well(
        "evaluate", model, "--data", "dev.jsonl", "--predictions-dir", "other", "--allow-no-answer", "--n-best-size", 2
    )
    odds = json.loads(Path("other/null_odds.json").read_text())
    assert list(odds) == list(ours)
    predicted = json.loads(Path("other/predictions.json").read_text())
    assert {i for i, text in predicted.items() if not text} == {i for i, value in odds.items() if value > 0}


def official_scores(rows: list[dict[str, Any]], predictions: dict[str, str]) -> tuple[float, float]:
    """EM and F1 as SQuAD's evaluate-v1.1.py computes them, with v2.0's rule for empty texts."""

    def tokens(text: str) -> list[str]:
        text = "".join(c for c in text.lower() if c not in set(string.punctuation))
        return re.sub(r"\b(a|an|the)\b", " ", text).split()

    em = f1 = 0.0
    for row in rows:
        predicted = tokens(predictions[row["id"]])
        best = 0.0
        for gold in map(tokens, row["answers"]["text"]):
            same = sum((Counter(predicted) & Counter(gold)).values())
            if same:
                precision, recall = same / len(predicted), same / len(gold)
                best = max(best, 2 * precision * recall / (precision + recall))
            if not (predicted and gold):
                best = max(best, float(predicted == gold))
        em += any(predicted == tokens(gold) for gold in row["answers"]["text"])
        f1 += best
    return 100 * em / len(rows), 100 * f1 / len(rows)


def graded_rows() -> list[dict[str, Any]]:
    """Questions that the tiny model gets right, half right (of two annotators), and wrong."""
    rows = []
    for i, row in enumerate(triplets(9)):
        context, name = str(row["context"]), str(row["answer"])
        whole = f"{name} keeps the"
        texts = ([name], [f"{whole} {context.split()[3]}", whole], ["outside."])[i % 3]
        answers = {"text": texts, "answer_start": [context.index(t) for t in texts]}
        rows.append({"id": f"q{i}", "context": context, "question": row["question"], "answers": answers})
    return rows


@pytest.mark.parametrize("kind", ["bundle", "run", "checkpoint"])
def test_evaluate_agrees_with_the_official_script(kind, tiny, bundle):
    model = {"bundle": bundle, "run": tiny.run, "checkpoint": tiny.run / "checkpoint"}[kind]
    rows = graded_rows()
    write_jsonl(Path("graded.jsonl"), rows)
    result = well("evaluate", model, "--data", "graded.jsonl", "--predictions", "predictions.json", "--json")
    found = value(result)
    em, f1 = official_scores(rows, json.loads(Path("predictions.json").read_text()))
    assert 30 < em < f1 < 60
    assert (found["exact_match"], found["f1"]) == (pytest.approx(em), pytest.approx(f1))
    assert (found["total"], found["model"], found["data"]) == (9, str(model), "graded.jsonl")


@pytest.fixture
def unsure(bundle) -> Path:
    """The tiny bundle, with a null threshold that refuses four of the first eight questions without an answer."""
    rows = [(str(r["question"]), str(r["context"])) for r in unanswerable(24) if not r["answer"]]
    answerer = Answerer.load(bundle, device="cpu")
    read = sorted(answerer.read(q, c, Options(allow_no_answer=True)).decoded.null_difference for q, c in rows)
    settings = {**answerer.settings.to_dict(), "null_threshold": (read[3] + read[4]) / 2}
    return sealed_copy(bundle, Path("unsure").absolute(), settings=settings)


def test_evaluate_reports_with_and_without_an_answer_as_the_official_script(unsure):
    rows = [{**row, "id": f"q{i}"} for i, row in enumerate(unanswerable(24))]
    write_jsonl(Path("rows.jsonl"), rows)
    command = ("evaluate", unsure, "--data", "rows.jsonl", "--predictions", "predictions.json")
    found = value(well(*command, "--json"))
    predictions = json.loads(Path("predictions.json").read_text())
    kinds = {"HasAns": [r for r in rows if r["answer"]], "NoAns": [r for r in rows if not r["answer"]]}
    total = 0.0
    for kind, part in kinds.items():
        golds = [{"id": r["id"], "answers": {"text": [r["answer"] or ""]}} for r in part]
        em, f1 = official_scores(golds, predictions)
        assert (found[f"{kind}_exact"], found[f"{kind}_f1"]) == (pytest.approx(em), pytest.approx(f1))
        assert found[f"{kind}_total"] == len(part)
        total += f1 * len(part)
    assert found["f1"] == pytest.approx(total / 24)
    assert found["NoAns_f1"] == 50
    assert 0 < found["HasAns_f1"] < 100
    assert (found["allow_no_answer"], found["null_threshold"]) == (True, open_bundle(unsure).settings.null_threshold)
    assert 0 <= found["ece"] <= 1
    text = well(*command[:-2]).stdout
    assert re.search(rf"without an answer +{found['NoAns_f1']:.2f}  F1, exact match .*, 8 questions", text)
    assert re.search(rf"calibration error +{found['ece']:.3f}", text)
    assert "'no answer' competes (the data holds such questions; null threshold" in text

    always = well(*command[:-1], "always.json", "--always-answer")
    assert "every question is answered (as asked)" in always.stdout
    assert all(json.loads(Path("always.json").read_text()).values())


def test_evaluate_by_probability_where_the_model_has_no_threshold(bundle):
    write_jsonl(Path("rows.jsonl"), unanswerable(6))
    assert "(the data holds such questions; by probability" in well("evaluate", bundle, "--data", "rows.jsonl").stdout
    write_jsonl(Path("rows.jsonl"), triplets(6))
    text = well("evaluate", bundle, "--data", "rows.jsonl").stdout
    assert "every question is answered (all of the data has an answer)" in text
    assert not re.search(r"without an answer +\d", text)
    text = well("evaluate", bundle, "--data", "rows.jsonl", "--allow-no-answer").stdout
    assert "(as asked; by probability" in text


def test_ask_and_answer_by_the_threshold_of_the_bundle(unsure):
    rows = unanswerable(24)
    write_jsonl(Path("rows.jsonl"), [{k: r[k] for k in ("context", "question")} for r in rows])
    well("answer", unsure, "--input", "rows.jsonl", "--output", "null.jsonl")  # a model that was trained for it may
    found = [json.loads(line) for line in Path("null.jsonl").read_text().splitlines()]
    assert sum(not own["answer"] for own, row in zip(found, rows, strict=True) if not row["answer"]) == 4
    assert all((row["start"], row["end"]) == (0, 0) for row in found if not row["answer"])
    well("answer", unsure, "--input", "rows.jsonl", "--output", "always.jsonl", "--always-answer")
    assert all(json.loads(line)["answer"] for line in Path("always.jsonl").read_text().splitlines())

    number = next(n for n, row in enumerate(found) if not row["answer"])
    asked = ("--question", rows[number]["question"], "--context", rows[number]["context"])
    text = well("ask", unsure, *asked, "--top-k", 3, "--trace").stdout
    threshold, t = (getattr(open_bundle(unsure).settings, name) for name in ("null_threshold", "temperature"))
    assert re.search(r"\n1\. \(no answer in this text\)   score 0\.\d{4}, code points 0-0\n2\. ", text)
    assert f"exceeds the logit of the best span by more than {threshold:.2f}" in text
    assert f"at temperature {t:.3f}" in text
    assert "no answer" not in well("ask", unsure, *asked, "--always-answer").stdout


def test_evaluate_scores_the_validation_split_unless_told(bundle):
    rows = triplets(6)
    write_jsonl(Path("split.jsonl"), [*rows[:4], *({**r, "split": "validation"} for r in rows[4:])])
    result = well("evaluate", bundle, "--data", "split.jsonl", "--json")
    assert value(result)["total"] == 2
    assert "scoring the 2 questions of its validation split" in result.stderr
    assert value(well("evaluate", bundle, "--data", "split.jsonl", "--split", "all", "--json"))["total"] == 6
    text = well("evaluate", bundle, "--data", "split.jsonl").stdout
    assert re.search(r"exact match +100\.00  \(100\.00 to 100\.00\)", text)


def test_ask(bundle, tiny):
    Path("notes.txt").write_text("Ada keeps the lamp in room 0. Fay keeps the boat outside.")
    question = ("--question", "Who keeps the lamp?", "--context", "@notes.txt")
    text = well("ask", bundle, *question, "--top-k", 3).stdout
    assert re.match(r"1\. Ada   score 0\.\d{4}, code points 0-3\n2\. ", text)
    answers = value(well("ask", bundle, *question, "--top-k", 2, "--json"))["answers"]
    assert answers[0]["text"] == "Ada"
    assert len(answers) == 2
    by_torch = value(well("ask", tiny.run, *question, "--top-k", 2, "--json"))["answers"]
    assert [(a["text"], a["start"]) for a in by_torch] == [(a["text"], a["start"]) for a in answers]


def test_answers_are_printed_in_any_encoding(bundle):
    arguments = [
        "ask",
        str(bundle),
        "--question",
        "Who keeps the lamp?",
        "--context",
        "\u0141ucja\U0001f600",
        "--top-k",
        "9",
    ]
    text = CliRunner(charset="cp1252").invoke(main, arguments)
    assert (text.exit_code, "\\u0141ucja" in text.stdout) == (0, True)
    found = CliRunner(charset="cp1252").invoke(main, [*arguments, "--json"])
    texts = {answer["text"] for answer in json.loads(found.stdout)["answers"]}
    assert "\u0141ucja\U0001f600" in texts


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_ask_counts_places_in_the_file_itself(bundle, mark):
    text = "\r\n\r\r\nAda keeps the l\u00e5mp in room 0.\r\nFay keeps the boat outside.\r"
    Path("notes.txt").write_bytes(mark + text.encode())
    question = ("--question", "Who keeps the lamp?", "--context", "@notes.txt", "--top-k", 9, "--json")
    answers = value(well("ask", bundle, *question))["answers"]
    assert (answers[0]["text"], answers[0]["start"]) == ("Ada", 5)
    assert [a["text"] for a in answers] == [text[a["start"] : a["end"]] for a in answers]


def test_ask_takes_a_text_that_begins_with_an_at_sign(bundle):
    question = ("ask", bundle, "--question", "Who keeps the lamp?", "--top-k", 9, "--json", "--context")
    answers = value(well(*question, "@@ada keeps the lamp in room 0."))["answers"]
    expected = Answerer.load(bundle).answer("Who keeps the lamp?", "@ada keeps the lamp in room 0.", top_k=9)
    assert [(a["text"], a["start"]) for a in answers] == [(a.text, a.start) for a in expected]
    result = run(*question, "@home")
    assert (result.exit_code, "--context @home: no such file" in result.stderr) == (2, True)
    Path("old.txt").write_bytes(b"Ada keeps the caf\xe9.")
    result = run(*question, "@old.txt")
    assert (result.exit_code, "not UTF-8 text (byte 17)" in result.stderr) == (2, True)


def test_ask_warns_if_the_text_is_the_name_of_a_file(bundle):
    Path("notes.txt").write_text("Ada keeps the lamp in room 0.")
    question = ("ask", bundle, "--question", "Who keeps the lamp?", "--context")
    said = "--context notes.txt: is read as the text itself; to read the file, give --context @notes.txt"
    assert said in well(*question, "notes.txt").stderr
    for context in ("@notes.txt", "Ada keeps the lamp. " * 500):
        assert "is read as the text itself" not in well(*question, context).stderr


def test_ask_shows_its_trace(bundle):
    question = ("--question", "Who keeps the lamp?", "--context", "Ada keeps the lamp in room 0.", "--trace")
    text = well("ask", bundle, *question).stdout
    for head in ("1 INPUT ENCODING", "2 FORWARD PASS", "3 SPAN SELECTION", "[CLS]", "answer 1, score", "1. Ada"):
        assert head in text
    trace = value(well("ask", bundle, *question, "--json"))["trace"]
    window = trace["windows"][0]
    assert len(window["input_ids"]) == len(window["start_logits"]) == window["tokens"]
    assert trace["candidates"][0]["text"] == "Ada"


def test_answer_goes_on_and_counts_what_it_sets_aside(bundle):
    write_jsonl(Path("a.jsonl"), triplets(9))
    write_jsonl(Path("b.jsonl"), [*triplets(2), {"context": "Ada.", "question": ""}])
    command = ("answer", bundle, "--input", "a.jsonl", "--input", "b*.jsonl", "--output", "answers", "--shard-rows", 4)
    result = well(*command, "--max-rejected", 0.1)
    assert result.stdout.splitlines() == [
        "answers: 11 answers",
        "answers/rejected: 1 row without an answer, each with its reason",
    ]
    Path("answers/part-00001.parquet").unlink()
    again = well(*command, "--json")
    assert "answers: 8 of 12 rows are already done" in again.stderr
    assert value(again) == {"rows": 11, "rejected": 1, "output": "answers"}
    strict = run(*command, "--max-rejected", 0.08)
    assert strict.exit_code == 1
    assert "Error: 8.33% of the rows were rejected, --max-rejected allows 8.00%" in strict.stderr
    fails(2, ["answers: holds answers of another job", "b.jsonl was an input"], *command[:4], *command[6:])


def test_answer_takes_its_inputs_from_a_config(bundle):
    write_jsonl(Path("a.jsonl"), triplets(3))
    write_jsonl(Path("b.jsonl"), triplets(2))
    for inputs, rows in (('"a.jsonl"', 3), ('["a.jsonl", "b.jsonl"]', 5)):
        Path("run.json").write_text(f'{{"input": {inputs}}}')
        output = f"{rows}.jsonl"
        assert value(well("answer", bundle, "--config", "run.json", "--output", output, "--json"))["rows"] == rows
    Path("run.json").write_text('{"input": ["a.jsonl", 3]}')
    fails(2, ["key input: must be text, not a whole number"], "answer", bundle, "--config", "run.json", "--output", "x")


def test_options_of_ray_ask_for_ray(bundle):
    write_jsonl(Path("a.jsonl"), triplets(3))
    command = ("answer", bundle, "--input", "a.jsonl", "--output", "answers", "--actors", 2, "--address", "auto")
    fails(2, ["--address, --actors: only with --engine ray"], *command)
    assert not Path("answers").exists()


@pytest.mark.parametrize("ending", [".csv", ".json", ".tsv", ".XLSX"])
def test_answer_makes_no_folder_that_looks_like_a_file(ending, bundle):
    write_jsonl(Path("a.jsonl"), triplets(3))
    said = f"--output answers{ending}: {ending} is not written: give a name that ends in .jsonl, or that of a folder"
    fails(2, [said], "answer", bundle, "--input", "a.jsonl", "--output", f"answers{ending}")


@pytest.mark.parametrize("output", ["answers.jsonl", "answers"])
def test_answer(output, bundle):
    rows = triplets(20)
    write_jsonl(Path("questions.jsonl"), [{k: r[k] for k in ("context", "question")} for r in rows])
    result = well("answer", bundle, "--input", "questions.jsonl", "--output", output, "--json")
    assert value(result) == {"rows": 20, "rejected": 0, "output": output}
    if output.endswith(".jsonl"):
        found = [json.loads(line) for line in Path(output).read_text().splitlines()]
    else:
        assert sorted(p.name for p in Path(output).iterdir()) == ["_plan.json", "part-00000.parquet"]
        found = parquet.read_table(output).to_pylist()
    assert [r["answer"] for r in found] == [r["answer"] for r in rows]
    assert [r["id"] for r in found] == [f"row-{n}" for n in range(1, 21)]
    assert all(rows[n]["context"][r["start"] : r["end"]] == r["answer"] for n, r in enumerate(found))
    assert {r["bundle"] for r in found} == {open_bundle(bundle).hash}
    assert sorted(p.name for p in Path().iterdir()) == sorted([output, "questions.jsonl"])
