"""The command line on data, run for real: ``check`` and ``train``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from qadeploy.cli import main
from tests.cli_for_tests import SEED, fails, run, value, well
from tests.conftest import triplets, write_jsonl

pytestmark = pytest.mark.usefixtures("elsewhere")


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
    others = {"repaired": 2, "rejected": 1, "same_ids": 0, "empty_answers": 0, "overruled_answers": 0}
    assert found == {"rows": 4, "classes": counts, **others}


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
    assert result.stderr.strip() == "clean.jsonl: 59 rows; clean.rejected.jsonl: 1 row"
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


def test_train_in_any_encoding(tiny_checkpoint):
    write_jsonl(Path("🚣.jsonl"), triplets(16))
    options = ["--base", str(tiny_checkpoint), "--epochs", "1", "--precision", "fp32", "--no-progress", "--json"]
    result = CliRunner(charset="cp1252").invoke(main, ["train", "--data", "🚣.jsonl", *options])
    assert result.exit_code == 0, (result.output, result.exception)
    found = value(result)
    assert found["run"] == "runs/🚣"
    assert found["eval_f1"] == json.loads(Path("runs/🚣/metrics.json").read_text())["eval_f1"]
    assert "1 raw data       16 questions on 16 passages from " in result.stderr


def test_a_command_line_of_run_qa_moves_over_with_few_edits(tiny_checkpoint):
    """As in the README of transformers' question-answering examples, without --do_train --do_eval."""
    write_jsonl(Path("train.jsonl"), triplets(24))
    write_jsonl(Path("dev.jsonl"), triplets(40)[24:])
    line = f"""
        --model_name_or_path {tiny_checkpoint} --train_file train.jsonl --validation_file dev.jsonl
        --per_device_train_batch_size 12 --learning_rate 3e-3 --num_train_epochs 1 --max_seq_length 64 --doc_stride 16
        --max_answer_length 6 --n_best_size 3 --weight_decay 0.02 --warmup_ratio 0.1 --gradient_accumulation_steps 2
        --max_train_samples 20 --max_eval_samples 6 --preprocessing_num_workers 2 --seed 7 --output_dir out
    """
    found = value(
        well("train", *line.split(), "--negatives", 0, "--crops", 0, "--precision", "fp32", "--no-progress", "--json")
    )
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
    settings = ("--epochs", 2, "--seed", 5, "--negatives", 0, "--crops", 0, "--precision", "fp32")
    begin = ("train", "--data", "few.jsonl", "--base", tiny_checkpoint, *settings)
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
