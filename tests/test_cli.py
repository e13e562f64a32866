"""The command line: documented, run for real, and clear about every mistake a new user makes."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import string
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pyarrow.parquet as parquet
import pytest
from click.testing import CliRunner, Result

from qadeploy import Answerer, __version__
from qadeploy.cli import main
from qadeploy.core.settings import Options
from qadeploy.inference.bundle import MANIFEST, MODEL, open_bundle
from qadeploy.shipped import base_bundle_path
from tests.conftest import sealed_copy, triplets, unanswerable, write_jsonl

COMMANDS = sorted(main.commands)
SEED = {"context": "The sky is blue.", "question": "What color is the sky?", "answer": "blue"}


def run(*args: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in args])


def well(*args: object) -> Result:
    """Runs a command that must succeed."""
    result = run(*args)
    assert result.exit_code == 0, (result.output, result.exception)
    return result


def value(result: Result) -> Any:
    """Stdout as exactly one JSON object on one line."""
    assert len(result.stdout.splitlines()) == 1, result.stdout
    found = json.loads(result.stdout)
    assert isinstance(found, dict)
    return found


def files(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("*")}


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


# ---------------------------------------------------------------- documentation


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_and_option_has_help(name):
    command = main.commands[name]
    assert command.help, name
    assert [p.opts for p in command.params if isinstance(p, click.Option) and not p.help] == []
    shown = well(name, "--help").stdout
    for param in command.params:
        assert (param.opts[0] if isinstance(param, click.Option) else param.human_readable_name.upper()) in shown


@pytest.mark.parametrize("name", COMMANDS)
def test_every_example_parses(name):
    examples = re.findall(rf"^ +qadeploy ({name}\b.*)$", well(name, "--help").stdout, re.MULTILINE)
    assert examples
    Path("run.yaml").write_text("epochs: 3")  # which an example names
    for line in examples:
        main.commands[name].make_context(name, shlex.split(line)[1:])  # raises on what does not exist


def test_the_group_lists_its_commands_and_its_version():
    shown = well("--help").stdout
    assert {"train", "export", "evaluate", "ask", "answer", "bench", "doctor"} <= set(COMMANDS)
    assert all(re.search(rf"^  {name}  ", shown, re.MULTILINE) for name in COMMANDS)
    assert well("--version").stdout.strip().endswith(__version__)


# ---------------------------------------------------------------- every command for real


DIRTY = [
    {**SEED, "id": "a"},
    {**SEED, "id": "b", "question": "And?", "answer": "Blue"},
    {**SEED, "id": "c", "question": "Or?", "answer": "green"},
    {**SEED, "id": "d", "question": "Else?", "answer": "sky", "answer_start": 5},
]


def test_check_prints_counts_examples_and_lengths():
    write_jsonl(Path("faq.jsonl"), DIRTY)
    shown = well("check", "faq.jsonl", "--show", 1).stdout
    for line in (
        "faq.jsonl: 4 rows",
        '  row 2 (id b): "Blue" -> "blue" at 11',
        '  row 3 (id c): "green" does not occur in the context',
        '  row 4 (id d): "sky": answer_start 5 -> 4',
        "  offsets are off by +1 (1) code points",
        "context tokens: 1, median 5, 95 % at most 5, longest 5",
        "answer tokens: 3, median 1, 95 % at most 1, longest 1",
        "windows per question (max_seq_len 384, doc_stride 128): 3, median 1, 95 % at most 1, longest 1",
        "answers cut by a window border: 0 (0.0%); whole in no window: 0 (0.0%)",
    ):
        assert line in shown.splitlines()


def test_check_of_a_file_without_a_usable_row_is_exit_code_1():
    write_jsonl(Path("bad.jsonl"), [{"context": "A lamp.", "question": "?", "answer": "boat"}])
    result = run("check", "bad.jsonl")
    assert (result.exit_code, result.stderr) == (1, "Error: bad.jsonl: holds no row that can be used\n")


def test_a_question_without_room_is_set_aside_and_named():
    rows = triplets(3)
    rows[1]["question"] = "Who keeps it? " * 200
    write_jsonl(Path("long.jsonl"), rows)
    result = well("check", "long.jsonl", "--fix", "clean.jsonl")
    assert "questions that leave no room for context in 384 tokens: 1 (row 2)" in result.stdout
    (rejected,) = map(json.loads, Path("clean.rejected.jsonl").read_text().splitlines())
    assert rejected["row"] == 2
    assert rejected["reason"].startswith("question: leaves no room for the context in windows of 384 tokens")


def test_a_configuration_needs_its_data_set():
    result = run("train", "--dataset-config-name", "plain_text")
    assert result.exit_code == 2
    assert "--dataset-config-name names a configuration of --dataset-name: give both" in result.stderr


def test_check_counts_as_json():
    write_jsonl(Path("faq.jsonl"), DIRTY)
    names = ["exact", "shifted", "whitespace", "case", "detokenised", "utf16", "utf8"]
    names += ["repeated", "absent", "empty", "duplicate", "no_answer"]
    found = value(well("check", "faq.jsonl", "--json"))
    counts = {**dict.fromkeys(names, 0), "exact": 1, "case": 1, "absent": 1, "shifted": 1}
    assert found == {"rows": 4, "classes": counts, "repaired": 2, "rejected": 1, "same_ids": 0, "empty_answers": 0}


def test_check_repairs_what_train_then_reads(tiny_checkpoint):
    rows = [{k: v for k, v in row.items() if k != "split"} for row in triplets(60)]
    rows[7]["answer"] = str(rows[7]["answer"]).upper()
    rows[9]["answer"] = "not there at all"
    write_jsonl(Path("faq.jsonl"), rows)
    result = run("train", "--data", "faq.jsonl")
    assert result.exit_code == 2
    assert "data check       60 rows: 58 exact, 1 case, 1 absent" in result.stdout
    assert "row 8, field answer" in result.stderr
    assert "qadeploy check faq.jsonl --fix OUT.jsonl" in result.stderr
    assert not Path("runs").exists()
    result = well("check", "faq.jsonl", "--fix", "clean.jsonl", "--json")
    assert result.stderr.strip() == "clean.jsonl: 59 rows; clean.rejected.jsonl: 1 rows"
    well("train", "--data", "clean.jsonl", "--base", tiny_checkpoint, "--out", "runs/x", "--epochs", 1)
    metrics = json.loads(Path("runs/x/metrics.json").read_text())
    assert metrics["data_check"]["classes"]["exact"] == 59


@pytest.mark.parametrize(
    ("taken", "flag"),
    [
        ("mine.json", "--predictions"),
        ("rows.jsonl", "--predictions"),
        ("folder/nbest_predictions.json", "--predictions-dir"),
        ("clean.jsonl", "--fix"),
        ("clean.rejected.jsonl", "--fix"),
    ],
)
def test_no_file_is_overwritten(taken, flag, bundle):
    write_jsonl(Path("rows.jsonl"), triplets(3))
    Path("folder").mkdir()
    if taken != "rows.jsonl":
        Path(taken).write_text("ten years of work")
    before = {path: path.read_text() for path in Path().rglob("*.json*")}
    where = {"--predictions-dir": "folder", "--fix": "clean.jsonl"}.get(flag, taken)
    command = ("check", "rows.jsonl") if flag == "--fix" else ("evaluate", bundle, "--data", "rows.jsonl")
    fails(2, [f"{taken}: exists already: remove it or give another {flag}"], *command, flag, where)
    assert {path: path.read_text() for path in Path().rglob("*.json*")} == before
    assert not [*Path().rglob(".*")]


@pytest.mark.parametrize(("limit", "code"), [(0.75, 0), (0.74, 1), (0, 1), (1, 0)])
def test_check_exits_by_the_share_of_bad_rows(limit, code):
    write_jsonl(Path("faq.jsonl"), DIRTY)
    result = run("check", "faq.jsonl", "--max-bad", limit)
    assert result.exit_code == code
    assert ("75.00% of the rows cannot be used as they are" in result.stderr) == bool(code)


@pytest.mark.parametrize("command", ["check", "train", "evaluate", "answer"])
def test_any_column_names(command, tiny_checkpoint, bundle):
    rows = [{"doc": r["context"], "q": r["question"], "a": r["answer"]} for r in triplets(60)]
    write_jsonl(Path("faq.jsonl"), rows)
    columns = ["--columns", "context=doc,question=q,answer=a"]
    commands = {
        "check": ("check", "faq.jsonl"),
        "train": ("train", "--data", "faq.jsonl", "--base", tiny_checkpoint, "--out", "runs/x", "--epochs", 1),
        "evaluate": ("evaluate", bundle, "--data", "faq.jsonl"),
        "answer": ("answer", bundle, "--input", "faq.jsonl", "--output", "out.jsonl"),
    }
    fails(2, ["context", "is missing; the fields found are doc, q, a"], *commands[command])
    fails(2, ["--columns 'doc': give OURS=YOURS pairs"], *commands[command], "--columns", "doc")
    well(*commands[command], *columns)
    if command == "train":
        assert json.loads(Path("runs/x/run.json").read_text())["options"]["columns"] == columns[1]
        exported = well("export", "runs/x", "--no-optimize")  # reads the data again, by the run's mapping
        assert "questions of faq.jsonl (dev set)" in exported.stdout


def test_train(tiny_checkpoint):
    write_jsonl(Path("few.jsonl"), triplets(16))
    options = ("--base", tiny_checkpoint, "--epochs", 1, "--precision", "fp32", "--no-progress")
    result = well("train", "--data", "few.jsonl", *options, "--json")
    found = value(result)
    assert found["run"] == "runs/few"
    assert found["eval_f1"] == json.loads(Path("runs/few/metrics.json").read_text())["eval_f1"]
    assert "1 raw data       16 questions on 16 passages from few.jsonl" in result.stderr


def test_a_command_line_of_run_qa_moves_over_with_few_edits(tiny_checkpoint):
    """As in the README of transformers' question-answering examples, less --do_train --do_eval."""
    write_jsonl(Path("train.jsonl"), triplets(24))
    write_jsonl(Path("dev.jsonl"), triplets(40)[24:])
    line = f"""
        --model_name_or_path {tiny_checkpoint} --train_file train.jsonl --validation_file dev.jsonl
        --per_device_train_batch_size 12 --learning_rate 3e-3 --num_train_epochs 1 --max_seq_length 64 --doc_stride 16
        --max_answer_length 6 --n_best_size 3 --weight_decay 0.02 --warmup_ratio 0.1 --gradient_accumulation_steps 2
        --max_train_samples 20 --max_eval_samples 6 --preprocessing_num_workers 2 --seed 7 --output_dir out
    """
    found = value(well("train", *line.split(), "--negatives", 0, "--precision", "fp32", "--no-progress", "--json"))
    assert found["run"] == "out"
    options = json.loads(Path("out/run.json").read_text())["options"]
    assert {name: options[name] for name in ("base", "data", "eval_data", "epochs", "batch_size", "seed")} == {
        "base": str(tiny_checkpoint),
        "data": "train.jsonl",
        "eval_data": "dev.jsonl",
        "epochs": 1,
        "batch_size": 12,
        "seed": 7,
    }
    assert (options["weight_decay"], options["warmup_ratio"], options["preprocessing_num_workers"]) == (0.02, 0.1, 2)
    assert (found["steps"], found["held_out"]["total"], found["settings"]["max_seq_len"]) == (1, 6, 64)
    assert found["settings"]["max_answer_len"] == 6
    assert len(json.loads(Path("out/predictions.json").read_text())) == 6


def test_train_by_a_config_file(tiny_checkpoint):
    write_jsonl(Path("few.jsonl"), triplets(16))
    Path("run.yaml").write_text(f"data: few.jsonl\nbase: {tiny_checkpoint}\nepochs: 9\nprecision: fp32\njson: true\n")
    found = value(well("train", "--config", "run.yaml", "--epochs", 1, "--no-progress"))
    assert [row["epoch"] for row in found["epochs"]] == [0, 1]


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
        "evaluate",
        model,
        "--data",
        "dev.jsonl",
        "--predictions-dir",
        "other",
        "--allow-no-answer",
        "--n-best-size",
        2,
    )
    odds = json.loads(Path("other/null_odds.json").read_text())
    assert list(odds) == list(ours)
    predicted = json.loads(Path("other/predictions.json").read_text())
    assert {i for i, text in predicted.items() if not text} == {i for i, value in odds.items() if value > 0}


def test_a_token_is_in_no_output(tiny_checkpoint):
    write_jsonl(Path("few.jsonl"), triplets(16))
    for base in ("no/such-model", tiny_checkpoint):
        arguments = ["--data", "few.jsonl", "--base", base, "--epochs", 1, "--precision", "fp32", "--no-progress"]
        result = run("train", *arguments, "--token", "hf_veryveryverysecret", "--debug")
        assert result.exit_code == (0 if base == tiny_checkpoint else 1)
        assert "hf_very" not in result.output
    assert all(b"hf_very" not in p.read_bytes() for p in Path("runs").rglob("*") if p.is_file())


def test_an_interrupted_run_is_named_and_goes_on_with_its_own_options(tiny_checkpoint, monkeypatch):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    write_jsonl(Path("few.jsonl"), triplets(16))
    begin = (
        "train",
        "--data",
        "few.jsonl",
        "--base",
        tiny_checkpoint,
        "--epochs",
        2,
        "--seed",
        5,
        "--negatives",
        0,
        "--precision",
        "fp32",
    )
    with monkeypatch.context() as patch:
        patch.setattr("qadeploy.training.trainer.prune", interrupt)  # Ctrl-C after the first save
        assert "kept; its last complete checkpoint is checkpoint-1" in run(*begin, "--no-progress").output
    fails(2, ["runs/few: holds an unfinished run", "--resume"], *begin)
    hint = "runs/few is not finished (interrupted, or still training): qadeploy train --resume --out runs/few"
    fails(1, [hint], "export", "runs/few")
    fails(2, ["holds no finished run yet", hint], "export")
    fails(2, ["--seed was 5, now 6"], "train", "--resume", "--out", "runs/few", "--seed", 6)
    result = well("train", "--resume", "--out", "runs/few", "--no-progress", "--json")
    assert [row["epoch"] for row in value(result)["epochs"]] == [0, 1, 2]
    assert "runs/few: resumes after step 1, from checkpoint-1" in result.stderr
    record = json.loads(Path("runs/few/run.json").read_text())
    assert (record["status"], record["options"]["data"], record["seed"]) == ("complete", "few.jsonl", 5)
    assert "was complete already" in well("train", "--resume", "--out", "runs/few", "--no-progress").output


def test_export(tiny, tiny_export):
    bundles = value(tiny_export)["bundles"]
    assert list(bundles) == ["bundles/keepers", "bundles/keepers-fused", "bundles/keepers-int8"]
    for path, manifest in bundles.items():
        assert open_bundle(tiny.root / path).manifest == manifest
    assert "judged on 20 questions" in tiny_export.stderr


def test_export_with_one_recipe_and_the_search_kept(tiny, monkeypatch, tmp_path):
    monkeypatch.setenv("QADEPLOY_CACHE", str(tmp_path / "cache"))
    base = ("export", tiny.run, "--quantize", "--no-optimize", "--out", "bundles/x")
    first = well(*base, "--recipe", "int8-mixed")
    assert "int8-mixed" in first.stdout
    assert "int8-protected" not in first.stdout
    assert open_bundle("bundles/x-int8").manifest["made"]["recipe"] == "int8-mixed"
    assert len(list((tmp_path / "cache").glob("recipe-*.json"))) == 1
    kept = open_bundle("bundles/x-int8").manifest["made"]["leaderboard"]
    well(*base, "--recipe", "int8-mixed")
    again = open_bundle("bundles/x-int8").manifest["made"]["leaderboard"]
    assert again == kept  # seconds and speeds too: they were not measured again
    out = well(*base, "--budget", 0, "--target", "size", "--no-cache").stdout
    assert "the budget of 0 s is used up: int8-protected and what follows was not tried" in out
    assert open_bundle("bundles/x-int8").manifest["made"]["target"] == "size"


def test_the_recipes_are_explained():
    shown = well("export", "--list-recipes").stdout.splitlines()
    assert [line.split()[0] for line in shown] == list(value(well("export", "--list-recipes", "--json")))
    assert all(len(line.split()) > 5 for line in shown)


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
    """The tiny bundle, with a null threshold that gives "no answer" to about a third of the triplets."""
    rows = [(str(r["question"]), str(r["context"])) for r in unanswerable(24)]
    answerer = Answerer.load(bundle, device="cpu")
    read = [answerer.read(q, c, Options(allow_no_answer=True)).decoded.null_difference for q, c in rows]
    settings = {**answerer.settings.to_dict(), "null_threshold": (sorted(read)[15] + sorted(read)[16]) / 2}
    return sealed_copy(bundle, Path("unsure").absolute(), settings=settings)


def test_evaluate_reports_with_and_without_an_answer_as_the_official_script(unsure):
    rows = [{**row, "id": f"q{i}"} for i, row in enumerate(unanswerable(24))]
    write_jsonl(Path("rows.jsonl"), rows)
    command = ("evaluate", unsure, "--data", "rows.jsonl", "--predictions", "predictions.json")
    found = value(well(*command, "--json"))
    predictions = json.loads(Path("predictions.json").read_text())
    assert sum(not text for text in predictions.values()) == 8
    kinds = {"HasAns": [r for r in rows if r["answer"]], "NoAns": [r for r in rows if not r["answer"]]}
    total = 0.0
    for kind, part in kinds.items():
        golds = [{"id": r["id"], "answers": {"text": [r["answer"] or ""]}} for r in part]
        em, f1 = official_scores(golds, predictions)
        assert (found[f"{kind}_exact"], found[f"{kind}_f1"]) == (pytest.approx(em), pytest.approx(f1))
        assert found[f"{kind}_total"] == len(part)
        total += f1 * len(part)
    assert found["f1"] == pytest.approx(total / 24)
    assert 0 < found["NoAns_f1"] < 100
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
    assert sum(not row["answer"] for row in found) == 8
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


def test_a_reader_that_goes_away_ends_a_command_quietly(tmp_path):
    data = write_jsonl(tmp_path / "rows.jsonl", triplets(400))
    command = f"{sys.executable} -m qadeploy check {data} --show 400 | head -n 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.stdout.startswith(str(data))
    assert "pipe" not in done.stderr.lower()


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
        "answers/rejected: 1 rows without an answer, each with its reason",
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


def test_bench_bare_takes_the_newest_bundle_and_names_a_peer_that_fails(tiny, tiny_export, monkeypatch):
    monkeypatch.chdir(tiny.root)
    options = ("--questions", 3, "--rounds", 1, "--against", "pipeline", "--checkpoint", tiny.root / "gone")
    text = well("bench", "--data", tiny.data, *options).stdout
    newest = max((tiny.root / "bundles").iterdir(), key=lambda p: (p / MANIFEST).stat().st_mtime_ns)
    assert f"({newest.name})" in text
    assert re.search(
        r"^pipeline +failed: FailureError: .*gone: the bundle's source checkpoint no longer exists", text, re.M
    )


def test_without_a_bundle_the_newest_is_taken_else_the_one_that_ships(plain_int8):
    ask = ("ask", "--question", "Who keeps the lamp?", "--context", "Ada keeps the lamp.", "--json")
    result = well(*ask)
    assert f"using the bundle {base_bundle_path()}" in result.stderr
    assert value(result)["answers"][0]["text"] == "Ada"
    assert Answerer.load().answer("What is the capital of Japan?", "Warsaw is on the Vistula.")[0].text == ""
    Path("bundles").symlink_to(plain_int8.parent)
    assert f"using the bundle bundles/{plain_int8.name}" in well(*ask).stderr
    assert Answerer.load().bundle.folder == Path("bundles") / plain_int8.name


def test_doctor():
    assert "no problems found" in (text := well("doctor").stdout) or "PROBLEM: " in text
    report = value(well("doctor", "--json"))
    assert report["qadeploy"] == __version__
    assert report["packages"]["torch"]
    assert "CPUExecutionProvider" in report["providers"]


# ---------------------------------------------------------------- mistakes


def fails(code: int, messages: list[str], *args: object) -> str:
    """Runs a command that must end with ``code``, one clear message, and leave the folder as it was."""
    before = files(Path.cwd())
    result = run(*args)
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    assert result.stderr.count("Error: ") == 1, result.stderr
    for message in messages:
        assert message in result.stderr
    assert files(Path.cwd()) == before
    return result.stderr


DATA_FAULTS: dict[str, tuple[Callable[[Path], Any], str, list[str]]] = {
    "empty file": (lambda p: p.write_text(""), "x.jsonl", ["the file is empty", "context, question and answer"]),
    "wrong JSON": (lambda p: p.write_text("[{]"), "x.json", ["line 1, column 3: not valid JSON"]),
    "half a line": (
        lambda p: p.write_text(json.dumps(SEED) + '\n{"context": "a"'),
        "x.jsonl",
        ["x.jsonl: row 2", "not valid JSON"],
    ),
    "unknown ending": (lambda p: p.write_text("hello"), "x.txt", ["unknown ending '.txt': use .json"]),
    "not parquet": (lambda p: p.write_text("hello"), "x.parquet", ["not a readable parquet file"]),
    "not UTF-8": (lambda p: p.write_bytes(b'{"context": "caf\xe9"}'), "x.jsonl", ["not UTF-8 text (byte 16)", "iconv"]),
    "missing column": (
        lambda p: write_jsonl(p, [SEED, {"passage": "a", "question": "b", "answer": "c"}]),
        "x.jsonl",
        ["row 2, field context: is missing; the fields found are passage, question, answer"],
    ),
    "numbers": (
        lambda p: write_jsonl(p, [{**SEED, "question": 7}]),
        "x.jsonl",
        ["row 1, field question: must be text, not a number"],
    ),
    "empty context": (lambda p: write_jsonl(p, [{**SEED, "context": " "}]), "x.jsonl", ["field context: is empty"]),
    "empty question": (lambda p: write_jsonl(p, [{**SEED, "question": ""}]), "x.jsonl", ["field question: is empty"]),
    "empty answer": (lambda p: write_jsonl(p, [{**SEED, "answer": ""}]), "x.jsonl", ["field answer: is empty"]),
    "foreign answer": (
        lambda p: write_jsonl(p, [SEED, {**SEED, "answer": "green"}]),
        "x.jsonl",
        ['row 2, field answer: "green" does not occur in the context', "letter by letter"],
    ),
    "ambiguous answer": (
        lambda p: write_jsonl(p, [{**SEED, "context": "Ada saw Ada, and Ada smiled.", "answer": "Ada"}]),
        "x.jsonl",
        ['"Ada" occurs 3 times in the context', "--on-ambiguous first|skip"],
    ),
    "wrong offset": (
        lambda p: write_jsonl(p, [{**SEED, "answer_start": 10}]),
        "x.jsonl",
        ['field answer_start: 10 does not match: the context has " blu" there, the answer is "blue"'],
    ),
    "two bad rows": (
        lambda p: write_jsonl(p, [{**SEED, "answer": "green"}, {**SEED, "context": 1}]),
        "x.jsonl",
        ["row 1, field answer", "row 2, field context"],
    ),
}


@pytest.mark.parametrize("fault", DATA_FAULTS)
def test_data_faults_name_the_file_row_and_field(fault, tiny_checkpoint):
    write, name, messages = DATA_FAULTS[fault]
    write(Path(name))
    fails(2, [name, *messages], "train", "--data", name, "--base", tiny_checkpoint, "--out", "run")


@pytest.mark.parametrize(
    ("command", "option"),
    [
        ("train", "--data"),
        ("train", "--eval-data"),
        ("train", "--dev-data"),
        ("evaluate", "--data"),
        ("answer", "--input"),
        ("bench", "--data"),
    ],
)
def test_a_missing_data_file_is_named(command, option, bundle):
    write_jsonl(Path("good.jsonl"), triplets(8))
    rest = {
        "train": ["--data", "good.jsonl"] if option != "--data" else [],
        "answer": [bundle, "--output", "out.jsonl"],
    }.get(command, [bundle])
    fails(2, ["nothing.jsonl: no such file"], command, *rest, option, "nothing.jsonl")


def test_an_unknown_base_says_what_it_may_be():
    write_jsonl(Path("good.jsonl"), triplets(8))
    message = fails(1, ["no/such-model: no such folder"], "train", "--data", "good.jsonl", "--base", "no/such-model")
    assert "offline? misspelt?" in message


def test_bare_commands_without_runs_or_bundles_name_the_step_before():
    fails(2, ["holds no finished run yet: run qadeploy train first"], "export")
    fails(2, ["holds no bundle yet: run qadeploy export first"], "bench")


@pytest.mark.parametrize("command", ["export", "evaluate", "ask"])
def test_a_run_without_its_checkpoint_is_named(command, tiny):
    shutil.copytree(tiny.run, "run")
    shutil.rmtree("run/checkpoint")
    rest = {"evaluate": ["--data", tiny.data], "ask": ["--question", "Who?", "--context", "Ada."]}.get(command, [])
    fails(1, ["run: the run has no checkpoint", "train again"], command, "run", *rest)


@pytest.mark.parametrize("name", [MODEL, "tokenizer.json", "README.md"])
def test_one_changed_byte_in_a_bundle_is_found(name, bundle):
    shutil.copytree(bundle, "copy")
    path = Path("copy") / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    fails(
        1,
        [f"copy/{name}: does not match the manifest", "export it again"],
        "ask",
        "copy",
        "--question",
        "Who?",
        "--context",
        "Ada.",
    )


@pytest.mark.parametrize("command", ["ask", "answer", "evaluate", "bench"])
def test_a_bundle_that_is_not_there_is_named(command, tiny):
    rest = {
        "ask": ["--question", "Who?", "--context", "Ada."],
        "answer": ["--input", tiny.data, "--output", "out.jsonl"],
        "evaluate": ["--data", tiny.data],
        "bench": [],
    }[command]
    fails(2, ["bundles/typo: no such"], command, "bundles/typo", *rest)


@pytest.mark.parametrize(
    ("option", "bad", "message"),
    [
        ("--budget", "soon", "budget is 'soon': give a time such as 90s, 5m or 1h"),
        ("--budget", "-1s", "budget is '-1s'"),
        ("--recipe", "int4", "recipe is 'int4': choose one of int8, "),
    ],
)
def test_bad_options_of_the_search_are_named_before_anything_is_exported(option, bad, message, tiny):
    fails(2, [message], "export", tiny.run, "--quantize", option, bad)
    assert not Path("bundles").exists()


def test_what_is_there_is_not_overwritten(tiny, tiny_checkpoint, bundle):
    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("keep me")
    clash = ["mine", "exists"]
    fails(2, clash, "train", "--data", tiny.data, "--base", tiny_checkpoint, "--out", "mine")
    fails(2, clash, "export", tiny.run, "--out", "mine")
    fails(2, clash, "answer", bundle, "--input", tiny.data, "--output", "mine")
    missing = "--output nowhere/out.jsonl: its folder does not exist"
    fails(2, [missing], "answer", bundle, "--input", tiny.data, "--output", "nowhere/out.jsonl")
    fails(
        2,
        ["--predictions nowhere/p.json: its folder does not exist"],
        "evaluate",
        bundle,
        "--data",
        tiny.data,
        "--predictions",
        "nowhere/p.json",
    )


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["ask", "--question", "", "--context", "Ada."], "question is empty"),
        (["ask", "--question", "Who?", "--context", " "], "context is empty"),
        (["ask", "--question", "Who?", "--context", "@gone.txt"], "--context @gone.txt: no such file"),
        (["ask", "--question", "Who?", "--context", "Ada.", "--top-k", 0], "0 is not in the range x>=1"),
        (["ask", "--question", "Who?", "--context", "Ada.", "--max-seq-len", 999], "limit of 160 tokens"),
        (["ask", "--question", "Who?", "--context", "Ada.", "--device", "tpu"], "choose auto, cpu, cuda or cuda:N"),
        (["bench", "--against", "pipeline,keras"], "unknown peer keras: choose from pipeline, torch"),
        (["bench", "--questions", 0], "'--questions': 0 is not in the range"),
    ],
)
def test_bad_options_are_named(args, message, tiny, bundle):
    fails(2, [message], args[0], bundle, *args[1:])


@pytest.mark.parametrize(
    ("option", "bad"),
    [
        ("--learning-rate", -1),
        ("--learning-rate", "nan"),
        ("--weight-decay", -1),
        ("--warmup-ratio", 2),
        ("--attention-dropout", 1.5),
        ("--dev-fraction", 0),
        ("--epochs", 0),
        ("--batch-size", 0),
        ("--batch-tokens", 0),
        ("--batch-tokens", 8),
        ("--device", "tpu"),
        ("--seed", -1),
        ("--max-seq-len", 4000),
    ],
)
def test_training_options_out_of_range_are_named(option, bad, tiny_checkpoint):
    write_jsonl(Path("good.jsonl"), triplets(8))
    name = option.strip("-")
    options = ("--data", "good.jsonl", "--base", tiny_checkpoint, "--precision", "fp32")
    message = fails(2, [], "train", *options, option, bad)
    assert name in message or name.replace("-", "_") in message


def test_a_typo_in_an_option_or_a_command_is_named():
    assert "No such option" in run("train", "--epoch-count", 3).stderr
    assert "No such command" in run("trian").stderr


def test_debug_shows_the_traceback():
    command = [sys.executable, "-m", "qadeploy", "ask", "nothing", "--question", "Who?", "--context", "Ada."]
    plain = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (plain.returncode, plain.stdout) == (2, "")
    assert plain.stderr.startswith("Error: nothing: no such")
    assert "Traceback" not in plain.stderr
    debug = subprocess.run([*command, "--debug"], capture_output=True, text=True, timeout=120, check=False)
    assert debug.returncode != 0
    assert "Traceback" in debug.stderr
    assert "InputError: nothing: no such" in debug.stderr
