"""Training: labels, loss, order, the reports, and the run folder it leaves (or does not leave)."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint
from transformers import AutoTokenizer, BertConfig, BertModel, FlaubertConfig, FlaubertForQuestionAnsweringSimple

from qadeploy.core.settings import QaSettings
from qadeploy.data.loading import hash_examples, read
from qadeploy.data.splits import carve_by_passage
from qadeploy.errors import CheckpointError, DataError, FailureError, InputError
from qadeploy.evaluation.scoring import evaluate
from qadeploy.records import Annotation, Example, Window
from qadeploy.reports.charts import terminal_chart
from qadeploy.training.batches import LengthGroupedSampler
from qadeploy.training.callbacks import EpochTable, StepLines, observe
from qadeploy.training.checkpoint import load_checkpoint, torch_answerer
from qadeploy.training.features import collate_labels, label, make_features
from qadeploy.training.options import TrainOptions
from qadeploy.training.run_log import RunLog
from qadeploy.training.runs import HeldOut, check_replaceable, dev_set, find_run, held_out
from qadeploy.training.torch_device import resolve_precision
from qadeploy.training.train import train
from qadeploy.training.trainer import span_loss
from tests.conftest import tiny_options, triplets, write_jsonl

# ---------------------------------------------------------------- loss


def test_the_loss_of_one_annotation_is_cross_entropy_over_the_mask():
    torch.manual_seed(0)
    logits, mask = torch.randn(5, 11), torch.rand(5, 11) > 0.3
    positions = torch.tensor([int(row.nonzero()[i % 2]) for i, row in enumerate(mask)])
    expected = torch.nn.functional.cross_entropy(logits.masked_fill(~mask, -math.inf), positions)
    torch.testing.assert_close(span_loss(logits, positions[:, None], mask).mean(), expected)


def test_the_loss_of_several_annotations_is_their_mean():
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.125, 0.125], [0.7, 0.1, 0.1, 0.1]]))
    mask = torch.ones(2, 4, dtype=torch.bool)
    positions = torch.tensor([[0, 2, 1], [0, -100, -100]])
    by_hand = ((math.log(2) + math.log(8) + math.log(4)) / 3 - math.log(0.7)) / 2
    assert float(span_loss(logits, positions, mask).mean()) == pytest.approx(by_hand, rel=1e-6)


def test_what_the_mask_hides_gets_no_gradient():
    logits = torch.zeros(1, 4, requires_grad=True)
    span_loss(logits, torch.tensor([[1]]), torch.tensor([[True, True, False, True]])).mean().backward()
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, torch.tensor([[1 / 3, -2 / 3, 0.0, 1 / 3]]))


# ---------------------------------------------------------------- order


@pytest.fixture
def lengths() -> list[int]:
    return [int(n) for n in np.random.default_rng(3).integers(10, 384, size=1003)]


def order(lengths: list[int], seed: int, epoch: int, batch: int = 8) -> list[int]:
    sampler = LengthGroupedSampler(lengths, batch, seed)
    sampler.set_epoch(epoch)
    assert len(sampler) == len(lengths)
    return list(sampler)


def test_the_sampler_permutes_by_seed_and_epoch(lengths):
    first = order(lengths, 13, 0)
    assert sorted(first) == list(range(len(lengths)))
    assert order(lengths, 13, 0) == first
    assert order(lengths, 13, 1) != first
    assert order(lengths, 14, 0) != first


def test_the_sampler_puts_like_lengths_together_and_the_longest_first(lengths):
    chosen = [lengths[i] for i in order(lengths, 13, 2)]
    batches = [chosen[i : i + 8] for i in range(0, len(chosen), 8)]
    spreads = [max(b) - min(b) for b in batches]
    assert np.mean(spreads) < 20  # eight lengths drawn at random from 10 to 384 spread over about 290
    assert max(batches[0]) == max(max(b) for b in batches if len(b) == 8)
    tops = [max(b) for b in batches]
    assert any(a < b for a, b in pairwise(tops))  # the batches themselves are shuffled, not sorted


@pytest.mark.parametrize("count", [1, 7, 8, 9])
def test_the_sampler_loses_nothing_of_small_sets(count):
    assert sorted(order(list(range(1, count + 1)), 1, 0)) == list(range(count))


# ---------------------------------------------------------------- labels and features


def window(begin: int, length: int, offset: int) -> Window:
    ids = np.arange(begin + length + 1, dtype=np.int64)
    return Window(ids, None, context_begin=begin, context_length=length, context_offset=offset, null_index=0)


@pytest.mark.parametrize(
    ("spans", "expected"),
    [
        ([(10, 12)], [(4, 6)]),
        ([(10, 10), (14, 14)], [(4, 4), (8, 8)]),
        ([(9, 11)], [(0, 0)]),  # begins before the window
        ([(14, 15)], [(0, 0)]),  # ends after it
        ([(2, 3), (11, 12)], [(5, 6)]),  # the one outside is left out
        ([], [(0, 0)]),
    ],
)
def test_labels_are_positions_in_the_window_or_the_null_position(spans, expected):
    assert [tuple(row) for row in label(window(4, 5, 10), spans)] == expected


def test_features_point_at_the_answer_in_each_window_that_holds_it(tiny_checkpoint):
    checkpoint = load_checkpoint(tiny_checkpoint)
    rows = triplets(20)
    context = " ".join(str(row["context"]) for row in rows)
    start = context.index("Cora keeps the ladder")
    examples = [
        Example("many", "Who keeps the ladder?", context, (Annotation("Cora", start),)),
        Example("none", "Who keeps the moon?", context),
        Example("short", "Who keeps it?", "Fay keeps the bell.", (Annotation("Fay", 0), Annotation("bell", 14))),
    ]
    features = make_features(examples, checkpoint.encoder, QaSettings(40, 16, 30), "here")
    assert features.first[0] == 0
    assert features.first[-1] == len(features) == len(features.features)
    parts = [features.features[a:b] for a, b in pairwise(features.first)]
    assert min(len(parts[0]), len(parts[1])) > 5
    found = [f for f in parts[0] if f.positions[0, 0] != f.window.null_index]
    assert 1 <= len(found) < len(parts[0])
    for feature in found:
        first, last = feature.positions[0]
        assert [checkpoint.encoder.token_text(int(i)) for i in feature.window.input_ids[first : last + 1]] == ["cora"]
    assert all(f.positions.tolist() == [[f.window.null_index] * 2] for f in parts[1])
    assert len(parts[2]) == 1
    assert len(parts[2][0].positions) == 2
    assert features.with_answer == len(found) + 1

    labels = collate_labels([parts[2][0], parts[1][0]], 50)
    assert labels["start_positions"][1].tolist() == [parts[1][0].window.null_index, -100]
    inside = np.flatnonzero(labels["answer_mask"][0])
    w = parts[2][0].window
    assert inside.tolist() == [w.null_index, *range(w.context_begin, w.context_begin + w.context_length)]


def test_a_question_without_room_names_its_row(tiny_checkpoint):
    checkpoint = load_checkpoint(tiny_checkpoint)
    examples = [Example("good", "Who?", "Ada."), Example("bad", "Who keeps the bell " * 20, "Ada.")]
    with pytest.raises(DataError, match=r"faq.jsonl: question 2 \(id bad\), field question: .*no room") as caught:
        make_features(examples, checkpoint.encoder, QaSettings(40, 8, 30), "faq.jsonl")
    assert len(caught.value.problems) == 1


# ---------------------------------------------------------------- reports


def row(epoch: int, train_loss: float | None, eval_loss: float, accuracy: float = 0.5) -> dict[str, object]:
    return {"epoch": epoch, "train_loss": train_loss, "eval_loss": eval_loss, "eval_accuracy": accuracy}


@pytest.mark.parametrize(
    ("before", "now", "remark"),
    [
        ([], row(0, None, 3.0), "the base model, before training"),
        ([row(0, None, 3.0, 0.1)], row(1, 2.0, 2.0, 0.4), "loss falls, accuracy rises"),
        ([row(0, None, 3.0, 0.4)], row(1, 2.0, 3.5, 0.1), "loss rises, accuracy falls"),
        ([row(1, 2.0, 1.0)], row(2, 2.5, 1.5), "loss rises, accuracy stays"),
        ([row(1, 2.0, 1.0)], row(2, 1.5, 1.0), "loss stays, accuracy stays"),
        (
            [row(1, 2.0, 1.0, 0.5)],
            row(2, 1.0, 1.5, 0.4),
            "overfitting: eval loss rises while train loss falls; accuracy falls",
        ),
    ],
)
def test_observations(before, now, remark):
    assert observe(before, now) == remark


def evaluated(rows: list[tuple[float | None, float]]) -> tuple[EpochTable, list[str]]:
    """The table after epochs with these (train loss, eval loss), from epoch 0 on."""
    said: list[str] = []
    losses = iter([train_loss for train_loss, _ in rows])
    table = EpochTable(RunLog(said.append), loss_of=lambda: next(losses))
    for epoch, (_, eval_loss) in enumerate(rows):
        state = SimpleNamespace(epoch=epoch)
        metrics = {"eval_loss": eval_loss, "eval_accuracy": 0.5, "eval_exact_match": 50.0, "eval_f1": 60.0}
        table.on_evaluate(None, state, None, metrics)
    return table, said


def test_a_gap_that_opens_is_warned_of_once_with_what_to_do():
    table, said = evaluated([(None, 3.0), (2.0, 2.0), (1.0, 2.25), (0.5, 2.5)])
    warnings = [line for line in said if "WARNING" in line]
    assert len(warnings) == 1
    assert said.index(warnings[0]) == 3  # after the rows of epochs 0, 1 and 2
    assert "overfitting from epoch 2 on: eval loss 2.250 rises away from train loss 1.000" in warnings[0]
    assert "a lower --learning-rate" in warnings[0]
    assert table.gap_opened == 2
    assert [r["observation"].startswith("overfitting") for r in table.rows] == [False, False, True, True]


@pytest.mark.parametrize(
    "rows", [[(None, 3.0), (2.0, 3.5)], [(None, 3.0), (2.0, 2.0), (1.0, 1.5)], [(None, 3.0), (2.0, 2.0), (2.5, 2.5)]]
)
def test_losses_that_fall_or_rise_together_are_no_gap(rows):
    table, said = evaluated(rows)
    assert table.gap_opened is None
    assert not any("WARNING" in line for line in said)


def test_a_log_without_a_bar_names_the_step_once_a_while():
    said: list[str] = []
    lines = StepLines(RunLog(said.append), seconds=0.05)
    for step in range(1, 4):
        time.sleep(0.06 if step > 1 else 0.0)
        state = SimpleNamespace(global_step=1_000 * step, max_steps=3_000, is_world_process_zero=step < 3)
        lines.on_step_end(None, state, None)
    assert [line.strip() for line in said] == ["step 2,000 of 3,000"]


def test_the_terminal_chart():
    assert terminal_chart([row(0, None, 3.0)]) == ""
    lines = terminal_chart([row(0, None, 3.0), row(1, 1.0, 2.0), row(2, 1.5, 1.5)], width=21, height=5).split("\n")
    plot = [line.partition("|")[2].ljust(21) for line in lines[1:6]]
    columns = ["".join(line[c] for line in plot) for c in (0, 10, 20)]
    assert columns == ["e    ", "  e t", "   * "]
    assert lines[1].startswith("  3.000 |")
    assert lines[5].startswith("  1.000 |")
    flat = terminal_chart([row(0, None, 2.0), row(1, 2.0, 2.0)])  # equal losses have no range to divide by
    assert "*" in flat


def test_precision(monkeypatch):
    for device in ("cpu", "cuda"):
        assert resolve_precision("fp32", device) == "fp32"
    assert resolve_precision("bf16", "cpu") == "bf16"
    assert resolve_precision("auto", "cpu") in {"fp32", "bf16"}
    with pytest.raises(InputError, match="choose auto, fp32, bf16 or fp16"):
        resolve_precision("fp8", "cpu")
    # A GPU may be there: what is trained on the CPU goes by the CPU.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(InputError, match="fp16: needs a GPU, and this trains on the CPU: use --precision bf16 or fp32"):
        resolve_precision("fp16", "cpu")
    for native in (True, False):
        monkeypatch.setattr(
            torch.cuda,
            "is_bf16_supported",
            lambda including_emulation, native=native: native and not including_emulation,
        )
        assert resolve_precision("fp16", "cuda") == "fp16"
        assert resolve_precision("auto", "cuda") == ("bf16" if native else "fp32")
    with pytest.raises(InputError, match="this GPU does not multiply bf16"):
        resolve_precision("bf16", "cuda")


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
    assert metrics["eval_loss"] == rows[metrics["best_epoch"]]["eval_loss"] < rows[0]["eval_loss"]
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
    assert windows > 2 * 12  # of each passage's, the last one holds the name again
    assert metrics["masked_windows"] == 12
    line = "12 train windows hold an answer's text where nobody annotated it: they are left out of training"
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
    """Every third question without an answer, as SQuAD v2 says it."""
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
    assert metrics["steps"] == 2 * steps

    settings = metrics["settings"]
    assert (settings["max_answer_len"], settings["null_threshold"]) == (3, 1.5)
    assert any("max_answer_len 3 as given" in line for line in said)
    assert any("null threshold +1.500" in line and "the threshold as given" in line for line in said)
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
    with pytest.raises(InputError, match="flaubert: this kind of model has no gradient checkpointing"):
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


@pytest.mark.parametrize(("given", "resolved"), [(None, 1), (0, 0), (2, 2)])
def test_few_examples_get_a_negative_each_unless_asked_otherwise(given, resolved):
    from qadeploy.training.train import resolve

    one = Example("a", "Who?", "Ada keeps it.", (Annotation("Ada", 0),))
    assert resolve(TrainOptions(negatives=given), [one] * 20).negatives == resolved
    many, none = [one] * 5_000, replace(one, answers=())
    assert resolve(TrainOptions(), many).negatives == 0
    assert resolve(TrainOptions(), [one, none]).negatives == 0  # the data themselves say what has no answer
