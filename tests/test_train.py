"""Training: the run folder that it leaves (or does not leave), and its options."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from transformers import AutoTokenizer, BertConfig, BertModel, FlaubertConfig, FlaubertForQuestionAnsweringSimple

from qadeploy.core.settings import QaSettings
from qadeploy.data.loading import hash_examples, read
from qadeploy.data.splits import carve_by_passage
from qadeploy.errors import CheckpointError, FailureError, InputError
from qadeploy.evaluation.scoring import evaluate
from qadeploy.records import Annotation, Example
from qadeploy.training import distributed
from qadeploy.training.checkpoint import load_checkpoint, torch_answerer
from qadeploy.training.features import make_features
from qadeploy.training.inputs import resolve
from qadeploy.training.options import TrainOptions
from qadeploy.training.runs import HeldOut, check_replaceable, dev_set, find_run, held_out
from qadeploy.training.train import check, train
from qadeploy.training.trainer import MeanOfEpochs
from tests.conftest import tiny_options, triplets, write_jsonl

# ---------------------------------------------------------------- the run folder


def test_the_run_folder_is_whole(tiny, tiny_checkpoint):
    assert sorted(p.name for p in tiny.run.iterdir()) == [
        "README.md",
        "checkpoint",
        "curves.png",
        "metrics.json",
        "nbest_predictions.json",
        "predictions.json",
        "report.html",
        "run.json",
    ]
    assert [p.name for p in tiny.run.parent.iterdir()] == [tiny.run.name]
    files = {p.name for p in (tiny.run / "checkpoint").iterdir()}
    assert files >= {"config.json", "model.safetensors", "qadeploy.json", "tokenizer.json", "tokenizer_config.json"}
    assert (tiny.run / "curves.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")

    record = json.loads((tiny.run / "run.json").read_text())
    assert (record["status"], record["seed"], record["precision"]) == ("complete", 13, "fp32")
    assert record["data_sha256"] == hash_examples(read(str(tiny.data)).examples)
    assert record["base"]["name"] == str(tiny_checkpoint)
    assert len(record["base"]["sha256"]) == 64
    assert record["base"]["commit"] is None
    assert record["versions"]["torch"] == torch.__version__
    assert {"qadeploy", "python", "transformers", "tokenizers", "numpy"} <= set(record["versions"])
    options = record["options"]
    assert (options["epochs"], options["learning_rate"], options["batch_size"]) == (3, 3e-3, 8)
    if not torch.cuda.is_available():
        assert record["machine"] == {"cpu_count": os.cpu_count(), "device": "cpu", "tf32": False}
    assert "token" not in options

    metrics = json.loads((tiny.run / "metrics.json").read_text())
    assert metrics == tiny.metrics
    assert metrics["eval_f1"] == metrics["eval_exact_match"] == 100.0
    assert metrics["eval_accuracy"] == 1.0
    rows = metrics["epochs"]
    assert [r["epoch"] for r in rows] == [0, 1, 2, 3]
    assert rows[0]["eval_f1"] < 50
    assert rows[0]["train_loss"] is None
    mean = metrics["mean_of_epochs"]
    assert (mean["epochs"], mean["eval_f1"]) == (3, rows[metrics["best_epoch"]]["eval_f1"])
    assert metrics["eval_loss"] == mean["eval_loss"] < rows[0]["eval_loss"]
    settings = json.loads((tiny.run / "checkpoint" / "qadeploy.json").read_text())
    assert settings == metrics["settings"]


def test_the_five_stages_and_a_row_an_epoch_are_printed(tiny):
    heads = [line[:16].strip() for line in tiny.said if line[0].isdigit()]
    assert heads == ["1 raw data", "2 preprocessing", "3 features", "4 training", "5 evaluation"]
    table = [line.split() for line in tiny.said if re.match(r" {17,}\d ", line)]
    assert [cells[0] for cells in table] == ["0", "1", "2", "3"]
    for cells, values in zip(table, tiny.metrics["epochs"], strict=True):
        assert float(cells[2]) == pytest.approx(values["eval_loss"], abs=1e-4)
        assert float(cells[3]) == pytest.approx(values["eval_accuracy"], abs=1e-4)
        assert float(cells[5]) == pytest.approx(values["eval_f1"], abs=0.1)
    assert table[0][6:8] == ["-", "-"]
    for cells, values in zip(table[1:], tiny.metrics["speed"]["epochs"], strict=True):
        assert cells[6] == f"{values['windows_per_second']:.1f}"
        assert cells[7] == f"{values['peak_memory_bytes'] / 2**30:.2f}G"
    assert any(line.startswith("loss: t train, e eval") for line in tiny.said)
    stops = "training stops after 2 epochs without a better dev F1"
    assert [line.strip() for line in tiny.said].count(stops) == 1  # one of three epochs may be left out
    assert str(tiny.run) in tiny.said[-1]


def test_the_metrics_are_those_of_our_decoder_on_the_dev_set(tiny):
    run = find_run(tiny.run)
    dev = dev_set(run)
    scores = evaluate(torch_answerer(load_checkpoint(run.checkpoint)), dev).scores
    assert scores.to_dict() == tiny.metrics["dev"]
    assert tiny.metrics["dev"]["total"] == len(dev) == 20
    assert tiny.metrics["predictions"] == "dev"
    predicted = json.loads((tiny.run / "predictions.json").read_text())
    assert predicted == {e.id: e.answers[0].text for e in dev}  # the tiny model knows them all


def test_the_same_seed_gives_the_same_run_and_replaces_an_old_one(tiny, tiny_checkpoint, tmp_path):
    out = tmp_path / "again"
    shutil.copytree(tiny.run, out)
    (out / "metrics.json").write_text("{}")
    (out / "null_odds.json").write_text("of an older run")
    again = train(tiny_options(tiny.data, tiny_checkpoint, out), lambda line: None, progress=False)
    timeless = {"seconds": 0, "speed": None}
    assert {**again.metrics, **timeless} == {**tiny.metrics, **timeless}
    assert [p.name for p in tmp_path.iterdir()] == ["again"]
    assert not (out / "null_odds.json").exists()
    assert json.loads((out / "metrics.json").read_text()) == again.metrics


def test_a_run_of_one_step_learns(tiny, tiny_checkpoint, tmp_path):
    options = tiny_options(tiny.data, tiny_checkpoint, tmp_path / "run", epochs=1, max_train_samples=8)
    metrics = train(options, lambda line: None, progress=False).metrics
    base, trained = metrics["epochs"]
    assert metrics["steps"] == 1
    assert trained["eval_loss"] != base["eval_loss"]


def test_two_files_are_the_run_that_one_file_with_both_would_be(tiny, tiny_checkpoint, tmp_path):
    rows = triplets()
    one, two = (write_jsonl(tmp_path / f"{name}.jsonl", part) for name, part in (("a", rows[:40]), ("b", rows[40:])))
    options = replace(tiny_options(tiny.data, tiny_checkpoint, tmp_path / "run"), data=(str(one), str(two)))
    result = train(options, lambda line: None, progress=False)
    timeless = {"seconds": 0, "speed": None}
    assert {**result.metrics, **timeless} == {**tiny.metrics, **timeless}
    run = find_run(result.folder)
    assert run.record is not None
    assert run.record["options"]["data"] == [str(one), str(two)]
    found = held_out(run, None)
    assert [e.question for e in found.examples] == [e.question for e in held_out(find_run(tiny.run), None).examples]
    assert found.name == f"{one}, {two} (dev set)"
    assert f"--data {one} \\\n  --data {two} \\\n" in (result.folder / "README.md").read_text()
    two.write_text(two.read_text().replace("keeps", "kept"))
    with pytest.raises(InputError, match=rf"^{one}, {two}: is not what the run was trained on"):
        held_out(run, None)


@pytest.fixture
def few(tmp_path: Path) -> Path:
    """A file with so few questions that an epoch is two steps."""
    return write_jsonl(tmp_path / "few.jsonl", triplets(16))


def test_a_base_without_an_answer_head_with_dropout_and_held_out_data(few, tiny_checkpoint, tmp_path):
    base = tmp_path / "bare"
    torch.manual_seed(0)
    BertModel(BertConfig.from_pretrained(tiny_checkpoint), add_pooling_layer=False).save_pretrained(base)
    AutoTokenizer.from_pretrained(tiny_checkpoint).save_pretrained(base)
    assert load_checkpoint(base).new_head
    held_out = write_jsonl(tmp_path / "held.jsonl", triplets(40)[30:])
    said: list[str] = []
    options = tiny_options(
        few,
        base,
        tmp_path / "run",
        epochs=1,
        eval_data=str(held_out),
        attention_dropout=0.25,
        max_seq_len=64,
        long_seq_len=48,
        bm25_weight=0.3,
    )
    metrics = train(options, said.append, progress=False).metrics
    config = json.loads((tmp_path / "run" / "checkpoint" / "config.json").read_text())
    assert config["architectures"] == ["BertForQuestionAnswering"]
    assert config["attention_probs_dropout_prob"] == 0.25
    assert metrics["settings"]["max_seq_len"] == 64
    assert metrics["held_out"]["total"] == metrics["held_out_base"]["total"] == 10
    assert sum("held out" in line for line in said) >= 3  # announced, the base's scores, the run's scores
    trained = load_checkpoint(tmp_path / "run" / "checkpoint")
    assert not trained.new_head
    chosen = trained.settings
    assert (chosen.max_seq_len, chosen.long_seq_len, chosen.bm25_weight) == (64, 48, 0.3)


def test_a_model_that_training_does_not_change_scores_as_the_base_does(tiny_checkpoint, tmp_path):
    """The threshold, which is chosen on the same dev set, must not look like a gain."""
    data = write_jsonl(tmp_path / "rows.jsonl", triplets(60))
    options = tiny_options(data, tiny_checkpoint, tmp_path / "run", epochs=1, negatives=1, learning_rate=0.0)
    metrics = train(options, lambda line: None, progress=False).metrics
    assert metrics["settings"]["null_threshold"] != 0
    assert metrics["dev_base"] == metrics["dev"]
    assert metrics["dev"]["f1"] != metrics["epochs"][0]["eval_f1"]


def test_windows_with_the_answer_where_nobody_annotated_it_are_not_trained_on(tiny_checkpoint, tmp_path):
    rows = triplets(16)
    for row in rows:
        row["answer_start"] = str(row["context"]).index(str(row["answer"]))
        row["context"] = f"{row['context']} {'The hall is quiet. ' * 12}{row['answer']} sleeps."
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    said: list[str] = []
    options = tiny_options(data, tiny_checkpoint, tmp_path / "run", epochs=1, max_seq_len=48, doc_stride=0)
    metrics = train(options, said.append, progress=False).metrics

    trained_on, dev = carve_by_passage(read(str(data)).examples, 0.2, 13)
    encoder = load_checkpoint(tiny_checkpoint).encoder
    windows = len(make_features(trained_on, encoder, QaSettings(48, 0, 30), "rows"))
    assert windows > 2 * 12  # the last question of each passage has the name again
    assert metrics["masked_windows"] == 12
    line = "12 train windows contain an answer's text that is not annotated: they are left out of training"
    assert line in [text.strip() for text in said]
    assert metrics["steps"] == math.ceil((windows - 12) / 8) < math.ceil(windows / 8)
    every = len(make_features(dev, encoder, QaSettings(48, 0, 30), "rows"))
    assert any(f"train {windows} windows (12 with an answer), dev {every};" in text for text in said)


def test_unknown_tokens_are_counted_and_many_are_warned_of(tiny, tiny_checkpoint, tmp_path):
    assert tiny.metrics["unknown_tokens"] == 0
    assert not any("unknown" in line for line in tiny.said)
    rows = [{**row, "context": f"{row['context']} ሰላም ለዓለም 北京"} for row in triplets(16)]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    warned: list[str] = []
    options = tiny_options(data, tiny_checkpoint, tmp_path / "run", epochs=1)
    metrics = train(options, print, warn=warned.append, progress=False).metrics
    reference = AutoTokenizer.from_pretrained(tiny_checkpoint)
    texts = {str(row[key]) for row in rows for key in ("context", "question")}
    ids = [i for text in texts for i in reference(text, add_special_tokens=False)["input_ids"]]
    share = 4 * 16 / len(ids)  # two words and two characters per context
    assert share > 0.05
    assert metrics["unknown_tokens"] == pytest.approx(share, abs=1e-4)
    assert [w.partition(" of the tokens")[0] for w in warned] == [f"{100 * share:.0f}%"]


def test_attention_dropout_is_off_unless_asked_for(tiny):
    assert json.loads((tiny.run / "checkpoint" / "config.json").read_text())["attention_probs_dropout_prob"] == 0.0


def test_training_stops_when_dev_f1_no_longer_rises(few, tiny_checkpoint, tmp_path):
    options = tiny_options(few, tiny_checkpoint, tmp_path / "run", epochs=40, learning_rate=1e-12, patience=1)
    metrics = train(options, lambda line: None, progress=False).metrics
    assert [r["epoch"] for r in metrics["epochs"]] == [0, 1, 2]
    assert metrics["best_epoch"] == 1


@pytest.mark.parametrize(("learning_rate", "kept"), [(3e-3, True), (2e-4, False)])
def test_the_mean_of_the_epochs_is_kept_unless_an_epoch_is_clearly_better(
    learning_rate, kept, tiny_checkpoint, tmp_path
):
    """At the lower rate the first epoch is far behind the second, and so is the mean."""
    ends: list[dict[str, torch.Tensor]] = []

    class Watched(MeanOfEpochs):
        def on_epoch_end(self, *args: Any, model: Any = None, **kwargs: Any) -> None:
            ends.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
            super().on_epoch_end(*args, model=model, **kwargs)

    said: list[str] = []
    data = write_jsonl(tmp_path / "rows.jsonl", triplets(96))
    options = tiny_options(data, tiny_checkpoint, tmp_path / "run", epochs=2, learning_rate=learning_rate)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qadeploy.training.trainer.MeanOfEpochs", Watched)
        metrics = train(options, said.append, progress=False).metrics
    (line,) = (line for line in said if "mean of the 2 epochs' weights" in line)
    assert line.endswith(": kept" if kept else ": not kept, because epoch 2 is better, beyond chance")
    assert (metrics["mean_of_epochs"] is not None) is kept
    written = load_checkpoint(tmp_path / "run" / "checkpoint").model.state_dict()
    for name, tensor in written.items():
        wanted = (ends[0][name] + ends[1][name]) / 2 if kept else ends[metrics["best_epoch"] - 1][name]
        torch.testing.assert_close(tensor, wanted)


def test_a_run_that_diverges_leaves_nothing(few, tiny_checkpoint, tmp_path):
    before = sorted(tmp_path.iterdir())
    options = tiny_options(few, tiny_checkpoint, tmp_path / "run", epochs=2, learning_rate=1e30)
    with pytest.raises(FailureError, match=r"diverged|NaN"):
        train(options, lambda line: None, progress=False)
    assert sorted(tmp_path.iterdir()) == before


# ---------------------------------------------------------------- the options of run_qa.py


def test_gradient_checkpointing_changes_no_figure(tiny, tiny_checkpoint, tmp_path, monkeypatch):
    calls: list[object] = []

    def spy(function: Callable[..., object], *args: object, **kwargs: object) -> object:
        calls.append(kwargs.get("use_reentrant"))
        return checkpoint(function, *args, **kwargs)

    monkeypatch.setattr("transformers.modeling_utils.checkpoint", spy)
    options = tiny_options(tiny.data, tiny_checkpoint, tmp_path / "run", gradient_checkpointing=True)
    found = train(options, lambda line: None, progress=False).metrics
    assert found["epochs"] == tiny.metrics["epochs"]
    assert found["dev"] == tiny.metrics["dev"]
    assert calls == [False] * 2 * found["steps"]  # both layers, every step


def no_answer_rows(rows: list[dict[str, object]]) -> list[dict[str, object]]:
    """Every third question has no answer, in SQuAD v2's form."""
    return [
        {"id": f"q{i}", "context": row["context"], "question": "Who keeps the moon?", "is_impossible": True}
        if i % 3 == 2
        else {"id": f"q{i}", **row}
        for i, row in enumerate(rows)
    ]


def test_the_options_of_run_qa_in_one_run(tiny_checkpoint, tmp_path):
    data = write_jsonl(tmp_path / "rows.jsonl", no_answer_rows(triplets(40)))
    held = write_jsonl(tmp_path / "held.jsonl", no_answer_rows(triplets(80)[40:]))
    said: list[str] = []
    options = tiny_options(
        data,
        tiny_checkpoint,
        tmp_path / "run",
        eval_data=str(held),
        epochs=2,
        batch_size=4,
        gradient_accumulation_steps=2,
        max_train_samples=21,
        max_eval_samples=5,
        max_answer_len=3,
        null_score_diff_threshold=1.5,
        n_best_size=4,
        token="hf_veryveryverysecret",
    )
    metrics = train(options, said.append, progress=False).metrics
    run = find_run(tmp_path / "run")

    assert "2 preprocessing  train 21, dev 5 (carved by passage, chooses the epoch), held out 5 (only reported)" in said
    windows = 21  # each passage is one
    assert any(f"train {windows} windows" in line for line in said)
    steps = math.ceil(math.ceil(windows / 4) / 2)
    assert any(f"2 epochs of {steps} steps of 2 x 4 windows" in line for line in said)
    assert not any("training stops after" in line for line in said)  # too few epochs for that
    assert metrics["steps"] == 2 * steps

    settings = metrics["settings"]
    assert (settings["max_answer_len"], settings["null_threshold"]) == (3, 1.5)
    assert any("max_answer_len 3 as given" in line for line in said)
    assert any("null threshold +1.500" in line and "the threshold as given" in line for line in said)
    dev, last = metrics["dev"], metrics["held_out"]
    assert any(line.endswith(f"; HasAns F1 {dev['HasAns_f1']:.1f}, NoAns {dev['NoAns_f1']:.1f}") for line in said)
    assert any(line.endswith(f"; HasAns F1 {last['HasAns_f1']:.1f}, NoAns {last['NoAns_f1']:.1f}") for line in said)
    found = held_out(run, None)
    source, examples = found.name, found.examples
    assert (source, [e.id for e in examples]) == (str(held), ["q0", "q1", "q2", "q3", "q4"])
    answerer = torch_answerer(load_checkpoint(run.checkpoint))
    assert evaluate(answerer, examples).scores.to_dict() == metrics["held_out"]
    assert evaluate(answerer, dev_set(run)).scores.to_dict() == metrics["dev"]
    whole = read(str(data)).examples
    carved = carve_by_passage(whole, 0.2, 13)[1]
    assert len(carved) > 5
    assert dev_set(run) == carved[:5]
    assert run.record is not None
    assert run.record["data_sha256"] == hash_examples(whole)
    assert {name: run.record["options"][name] for name in ("max_train_samples", "max_eval_samples", "n_best_size")} == {
        "max_train_samples": 21,
        "max_eval_samples": 5,
        "n_best_size": 4,
    }

    assert metrics["predictions"] == "held_out"
    predicted, n_best, odds = (
        json.loads((run.checkpoint.parent / f"{name}.json").read_text())
        for name in ("predictions", "nbest_predictions", "null_odds")
    )
    assert list(predicted) == list(n_best) == list(odds) == [e.id for e in examples]
    assert {i: text == "" for i, text in predicted.items()} == {i: value > 1.5 for i, value in odds.items()}
    assert all(4 <= len(entries) <= 5 for entries in n_best.values())
    answers = [answerer.answer(e.question, e.context, allow_no_answer=True)[0].text for e in examples]
    assert list(predicted.values()) == answers

    for path in (p for p in tmp_path.rglob("*") if p.is_file()):
        assert b"hf_very" not in path.read_bytes(), path
    assert "hf_very" not in "\n".join(said) + repr(options)


def test_dev_data_is_cut_too_and_found_again(few, tiny_checkpoint, tmp_path):
    dev = write_jsonl(tmp_path / "dev.jsonl", triplets(32)[16:])
    options = tiny_options(
        few, tiny_checkpoint, tmp_path / "run", epochs=1, dev_data=str(dev), max_train_samples=12, max_eval_samples=7
    )
    said: list[str] = []
    metrics = train(options, said.append, progress=False).metrics
    assert "2 preprocessing  train 12, dev 7 " in "".join(said)
    run = find_run(tmp_path / "run")
    assert dev_set(run) == read(str(dev)).examples[:7]
    assert held_out(run, None) == HeldOut(str(dev), dev_set(run))
    scores = evaluate(torch_answerer(load_checkpoint(run.checkpoint)), dev_set(run)).scores
    assert scores.to_dict() == metrics["dev"]


def test_a_set_smaller_than_its_limit_is_whole(few, tiny_checkpoint, tmp_path):
    options = tiny_options(few, tiny_checkpoint, tmp_path / "run", epochs=1, max_train_samples=99, max_eval_samples=99)
    assert train(options, lambda line: None, progress=False).metrics["dev"]["total"] == 4
    assert len(dev_set(find_run(tmp_path / "run"))) == 4


def test_a_run_of_before_these_options_still_finds_its_dev_set(tiny, tmp_path):
    shutil.copytree(tiny.run, tmp_path / "old")
    record = json.loads((tmp_path / "old" / "run.json").read_text())
    for name in ("max_eval_samples", "max_train_samples", "n_best_size"):
        del record["options"][name]
    (tmp_path / "old" / "run.json").write_text(json.dumps(record))
    assert dev_set(find_run(tmp_path / "old")) == dev_set(find_run(tiny.run))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", 0),
        ("batch_size", 0),
        ("max_train_samples", 0),
        ("max_eval_samples", -1),
        ("max_answer_len", 0),
        ("n_best_size", 0),
        ("gradient_accumulation_steps", 0),
        ("gradient_accumulation_steps", 1.5),
        ("preprocessing_num_workers", True),
        ("null_score_diff_threshold", math.nan),
        ("save_steps", -1),
    ],
)
def test_numbers_that_make_no_sense_are_refused(name, value, tmp_path):
    with pytest.raises(InputError, match=f"{name} must be a (whole )?number.*not {value}"):
        train(tiny_options(tmp_path / "none", tmp_path / "none", tmp_path / "run", **{name: value}), print)
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_gradient_checkpointing_and_a_folder_with_a_revision_are_refused(
    few, tiny_checkpoint, tmp_path
):
    options = tiny_options(few, tiny_checkpoint, tmp_path / "run", model_revision="v2")
    with pytest.raises(InputError, match="checkpoint: is a folder, which has no revisions"):
        train(options, lambda line: None, progress=False)
    base = tmp_path / "flaubert"
    config = FlaubertConfig(vocab_size=300, emb_dim=16, n_layers=1, n_heads=2, max_position_embeddings=160)
    FlaubertForQuestionAnsweringSimple(config).save_pretrained(base)
    AutoTokenizer.from_pretrained(tiny_checkpoint).save_pretrained(base)
    options = tiny_options(few, base, tmp_path / "run", gradient_checkpointing=True)
    with pytest.raises(InputError, match="flaubert: this kind of model does not support gradient checkpointing"):
        train(options, lambda line: None, progress=False)
    assert not (tmp_path / "run").exists()


def unusable(name: str, tmp_path: Path) -> list[dict[str, object]]:
    rows = triplets(16)
    if name == "one passage":
        return [{**row, "context": "Ada keeps it.", "answer": "Ada"} for row in rows]
    if name == "all validation":
        return [{**row, "split": "validation"} for row in rows]
    return [{"question": r["question"], "context": r["context"], "is_impossible": True} for r in rows]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("one passage", "all questions are on one passage"),
        ("all validation", "none is left to train on"),
        ("no answers", "nothing to learn from"),
    ],
)
def test_data_that_cannot_be_learned_from_is_refused(name, message, tiny_checkpoint, tmp_path):
    data = write_jsonl(tmp_path / "rows.jsonl", unusable(name, tmp_path))
    with pytest.raises(InputError, match=message):
        train(tiny_options(data, tiny_checkpoint, tmp_path / "run"), lambda line: None, progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]


@pytest.mark.parametrize(
    ("record", "name", "message"),
    [
        ('{"runs": [1, 2]}', "data.csv", "mine: exists and is not a run folder"),
        (
            '{"status": "complete", "options": {}}',
            "data.csv",
            "mine: holds data.csv beside a run, which would be deleted",
        ),
    ],
)
def test_a_folder_with_a_run_json_keeps_what_else_it_holds(record, name, message, few, tiny_checkpoint, tmp_path):
    out = tmp_path / "mine"
    out.mkdir()
    (out / "run.json").write_text(record)
    (out / name).write_text("keep me")
    with pytest.raises(InputError, match=message):
        train(tiny_options(few, tiny_checkpoint, out), lambda line: None, progress=False)
    assert (out / name).read_text() == "keep me"


@pytest.mark.parametrize("listed", [True, False], ids=["", "a run of 0.2.0"])
def test_foreign_files_in_a_checkpoint_are_named_and_kept(listed, tiny, tmp_path):
    out = shutil.copytree(tiny.run, tmp_path / "mine")
    record = json.loads((out / "run.json").read_text())
    assert set(record["checkpoint_files"]) == {p.name for p in (out / "checkpoint").iterdir()}
    if not listed:
        del record["checkpoint_files"]
        (out / "run.json").write_text(json.dumps(record))
    check_replaceable(out)  # nothing but the run
    for name in ("notes.txt", "mine/data.csv", "model.onnx"):
        kept = out / "checkpoint" / name
        kept.parent.mkdir(exist_ok=True)
        kept.write_text("keep me")
        with pytest.raises(InputError, match=f"mine: holds checkpoint/{name} beside a run, which would be deleted"):
            train(tiny_options(tiny.data, tiny.run / "checkpoint", out), lambda line: None, progress=False)
        assert kept.read_text() == "keep me"
        kept.unlink()


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_is_no_run_is_not_overwritten(kind, few, tiny_checkpoint, tmp_path):
    out = tmp_path / "mine"
    kept = out if kind == "file" else out / "thesis.txt"
    kept.parent.mkdir(exist_ok=True)
    kept.write_text("keep me")
    with pytest.raises(InputError, match="mine: exists and is not a run folder"):
        train(tiny_options(few, tiny_checkpoint, out), lambda line: None, progress=False)
    assert kept.read_text() == "keep me"


@pytest.mark.parametrize("fault", ["no config", "cut weights", "no such name"])
def test_a_base_that_does_not_load_is_named(fault, few, tiny_checkpoint, tmp_path):
    base = tmp_path / "base"
    if fault == "no config":
        base.mkdir()
    elif fault == "cut weights":
        AutoTokenizer.from_pretrained(tiny_checkpoint).save_pretrained(base)
        (base / "config.json").write_bytes((tiny_checkpoint / "config.json").read_bytes())
        (base / "model.safetensors").write_bytes((tiny_checkpoint / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(CheckpointError, match="base"):
        train(tiny_options(few, base, tmp_path / "run"), lambda line: None, progress=False)
    assert not (tmp_path / "run").exists()


def test_a_run_that_is_given_as_a_base_names_its_checkpoint(tiny):
    with pytest.raises(CheckpointError, match=f": give {re.escape(str(tiny.run / 'checkpoint'))}$"):
        load_checkpoint(tiny.run)


@pytest.mark.parametrize(("given", "resolved"), [(None, 1), (0, 0), (2, 2)])
def test_few_examples_get_a_negative_each_unless_asked_otherwise(given, resolved):
    one = Example("a", "Who?", "Ada keeps it.", (Annotation("Ada", 0),))
    assert resolve(TrainOptions(negatives=given), [one] * 20).negatives == resolved
    many, none = [one] * 5_000, replace(one, answers=())
    assert resolve(TrainOptions(), many).negatives == 0
    assert resolve(TrainOptions(), [one, none]).negatives == 0  # the data themselves say what has no answer


@pytest.mark.parametrize(("given", "crops", "epochs"), [(None, 1, 2), (0, 0, 3), (2, 2, 2)])
def test_few_examples_get_a_crop_each_and_two_epochs_unless_asked_otherwise(given, crops, epochs):
    one = Example("a", "Who?", "Ada keeps it.", (Annotation("Ada", 0),))
    few = resolve(TrainOptions(crops=given), [one] * 20)
    assert (few.crops, few.epochs) == (crops, epochs)
    assert resolve(TrainOptions(crops=given, epochs=7), [one] * 20).epochs == 7
    for questions in ([one] * 5_000, [one, replace(one, answers=())]):
        other = resolve(TrainOptions(), questions)
        assert (other.crops, other.epochs) == (0, 3)


def test_crops_are_trained_on_and_nothing_else_sees_them(tiny_checkpoint, tmp_path):
    data = write_jsonl(tmp_path / "few.jsonl", triplets(20))
    runs = {}
    for crops in (0, 2):
        said: list[str] = []
        options = tiny_options(data, tiny_checkpoint, tmp_path / f"run-{crops}", epochs=1, crops=crops, batch_size=1)
        runs[crops] = train(options, said.append, progress=False).metrics
        made = [int(line.split()[2]) for line in said if "train crops: " in line]
        assert runs[crops]["steps"] == 16 + sum(made)
        assert bool(made) == bool(crops)
    assert runs[0]["dev"]["total"] == runs[2]["dev"]["total"] == 4
    assert runs[0]["epochs"][0]["eval_loss"] == runs[2]["epochs"][0]["eval_loss"]


def test_several_processes_make_no_negatives(monkeypatch):
    monkeypatch.setattr(distributed, "count", lambda: 2)
    assert resolve(TrainOptions(), [Example("a", "Who?", "Ada", (Annotation("Ada", 0),))] * 20).negatives == 0
    with pytest.raises(InputError, match="--negatives trains in one process: leave it out"):
        check(TrainOptions(negatives=1))
