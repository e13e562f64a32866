"""The parts of training: the loss, the order of windows, their labels, the table of epochs, the precision."""

from __future__ import annotations

import math
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from qadeploy.core.settings import QaSettings
from qadeploy.data.loading import DataSet
from qadeploy.errors import DataError, InputError
from qadeploy.records import Annotation, Example, Window
from qadeploy.reports.charts import terminal_chart
from qadeploy.training.batches import LengthGroupedSampler
from qadeploy.training.callbacks import EpochTable, StepLines, observe
from qadeploy.training.checkpoint import load_checkpoint
from qadeploy.training.features import collate_labels, label, make_features
from qadeploy.training.options import TrainOptions
from qadeploy.training.run_data import RunData
from qadeploy.training.run_log import RunLog
from qadeploy.training.torch_device import resolve_precision
from qadeploy.training.trainer import span_loss
from tests.conftest import triplets

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
    assert "overfitting from epoch 2 on: eval loss 2.250 rises while train loss 1.000 falls" in warnings[0]
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


def test_a_log_without_a_bar_names_the_step_once_a_while(monkeypatch):
    said: list[str] = []
    now = [0.0]
    monkeypatch.setattr("qadeploy.training.callbacks.time", SimpleNamespace(monotonic=lambda: now[0]))
    lines = StepLines(RunLog(said.append), seconds=60)
    for step, now[0] in ((1, 59.9), (2, 60.0), (3, 119.9), (4, 120.0)):
        state = SimpleNamespace(global_step=1_000 * step, max_steps=4_000, is_world_process_zero=step < 4)
        lines.on_step_end(None, state, None)
    assert [line.strip() for line in said] == ["step 2,000 of 4,000"]


@pytest.mark.parametrize(("dev", "warned"), [(10, False), (20, False), (21, True)])
def test_a_dev_set_of_more_than_twice_its_share_is_warned_of(dev, warned):
    questions = [Example(str(n), "Who?", str(n), ()) for n in range(100)]
    train, held = (DataSet("here", tuple(part)) for part in (questions[dev:], questions[:dev]))
    said: list[str] = []
    data = RunData(DataSet("here", tuple(questions)), None, train, held, None)
    RunLog(str, said.append).splits(data, TrainOptions())
    assert [line[:42] for line in said] == ["the dev set holds 21 of 100 questions, bec"] * warned


def test_passages_that_are_scored_and_taught_are_warned_of():
    def questions(*contexts: str) -> DataSet:
        return DataSet("here", tuple(Example(c, "Who?", c, ()) for c in contexts))

    said: list[str] = []
    data = RunData(questions(), None, questions("a"), questions("a", "b"), questions("b", "c", "d"))
    RunLog(str, said.append).leaks(data)
    RunLog(str, said.append).leaks(data, questions("b", "c").examples)
    assert [line.removesuffix(", so their scores are too high") for line in said] == [
        "1 dev passages are also in the training data",
        "1 held-out passages are also in the training data",
        "2 dev passages are also in the training data or in --unlabelled",
        "2 held-out passages are also in the training data or in --unlabelled",
    ]


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
    # Even with a GPU present, the precision of training on the CPU depends on the CPU.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(InputError, match="needs a GPU, but this run trains on the CPU: use --precision bf16 or fp32"):
        resolve_precision("fp16", "cpu")
    for native in (True, False):
        monkeypatch.setattr(
            torch.cuda,
            "is_bf16_supported",
            lambda including_emulation, native=native: native and not including_emulation,
        )
        assert resolve_precision("fp16", "cuda") == "fp16"
        assert resolve_precision("auto", "cuda") == ("bf16" if native else "fp32")
    with pytest.raises(InputError, match="this GPU does not support bf16"):
        resolve_precision("bf16", "cuda")
