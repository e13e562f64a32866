"""The trainer in the real loop: the order of its windows, and how little of a batch is padding."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback

from qadeploy.core.settings import QaSettings
from qadeploy.data.loading import read
from qadeploy.training.batches import LengthGroupedSampler, UnitBatches
from qadeploy.training.checkpoint import load_checkpoint
from qadeploy.training.features import Feature, FeatureSet, make_features
from qadeploy.training.trainer import (
    SpanTrainer,
    distillation_loss,
    shared_loss,
    span_loss,
    training_arguments,
)
from qadeploy.training.training_set import SoftLabels, TrainingSet, TrainingWindow, collate
from tests.conftest import triplets, write_jsonl

BATCH = 4
CPU = torch.device("cpu")
SETTINGS = QaSettings(max_seq_len=64, doc_stride=16, max_answer_len=10)


@pytest.fixture(scope="module")
def features(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> FeatureSet:
    """Windows of several lengths, in a number that no batch size divides."""
    rows = [
        {**row, "context": f"{row['context']}{' The hall is quiet.' * (i % 5)}"} for i, row in enumerate(triplets(43))
    ]
    data = read(str(write_jsonl(tmp_path_factory.mktemp("data") / "rows.jsonl", rows)))
    made = make_features(data.examples, load_checkpoint(tiny_checkpoint).encoder, SETTINGS, "rows.jsonl")
    assert len({len(f.window) for f in made.features}) > 3
    return made


def batches_seen(
    tiny_checkpoint: Path, features: FeatureSet, folder: Path, seed: int = 13, **options: Any
) -> tuple[list[list[int]], list[list[int]]]:
    """The windows' numbers in each batch of two epochs of training, and of an evaluation after."""
    set_seed(seed)
    checkpoint = load_checkpoint(tiny_checkpoint)
    number = {id(f): i for i, f in enumerate(features.features)}
    seen: list[list[int]] = []

    def watched(rows: list[Feature | TrainingWindow]) -> dict[str, Any]:
        seen.append([number[id(f.feature if isinstance(f, TrainingWindow) else f)] for f in rows])
        return dict(collate(rows, checkpoint.encoder.config.pad_token_id))

    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=2,
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=BATCH,
        use_cpu=True,
        remove_unused_columns=False,
        label_names=["start_positions", "end_positions"],
        save_strategy="no",
        report_to=[],
        seed=seed,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = SpanTrainer(
        model=checkpoint.model,
        args=arguments,
        train_dataset=TrainingSet(features),
        eval_dataset=features,
        data_collator=watched,
        **options,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trained = len(seen)
    trainer.evaluate()
    return seen[:trained], seen[trained:]


def test_the_loop_takes_the_samplers_order_of_each_epoch_and_evaluates_in_order(tiny_checkpoint, features, tmp_path):
    trained, evaluated = batches_seen(tiny_checkpoint, features, tmp_path)
    lengths = [len(f.window) for f in features.features]
    sampler = LengthGroupedSampler(lengths, BATCH, 13)
    expected = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        expected.append(list(sampler))
    a_epoch = -(-len(features) // BATCH)
    assert [i for batch in trained[:a_epoch] for i in batch] == expected[0]
    assert [i for batch in trained[a_epoch:] for i in batch] == expected[1]
    assert expected[0] != expected[1]
    assert {len(batch) for batch in trained} == {BATCH, len(features) % BATCH}
    assert [i for batch in evaluated for i in batch] == list(range(len(features)))


def test_the_loop_takes_token_batches_anew_each_epoch(tiny_checkpoint, features, tmp_path):
    lengths = [len(f.window) for f in features.features]
    trained, evaluated = batches_seen(tiny_checkpoint, features, tmp_path, batch_tokens=150, most_windows=5)
    batches = UnitBatches([[i] for i in range(len(lengths))], lengths, 13, tokens=150, most=5)
    expected = []
    for epoch in range(2):
        batches.set_epoch(epoch)
        expected.append(list(batches))
    assert trained == expected[0] + expected[1]
    assert expected[0] != expected[1]
    assert [i for batch in evaluated for i in batch] == list(range(len(features)))


class Constant(torch.nn.Module):
    """Logits that are parameters, the same for every window: its gradient is the weighted sum of the windows'."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.logits = torch.nn.Parameter(torch.zeros(2, tokens, dtype=torch.float64))

    def forward(self, input_ids: torch.Tensor, **others: torch.Tensor) -> SimpleNamespace:
        rows, tokens = input_ids.shape
        starts, ends = (x[:tokens].expand(rows, tokens) for x in self.logits)
        return SimpleNamespace(start_logits=starts, end_logits=ends)


def epoch_of(features: FeatureSet, folder: Path, **options: Any) -> tuple[torch.Tensor, float]:
    """The mean gradient and the mean loss over the batches of one epoch, by the trainer's own loader and loss."""
    model = Constant(max(len(f.window) for f in features.features))
    arguments = training_arguments(
        CPU, output_dir=str(folder), report_to=[], remove_unused_columns=False, per_device_train_batch_size=1
    )
    trainer = SpanTrainer(
        model=model,
        args=arguments,
        train_dataset=TrainingSet(features),
        data_collator=lambda rows: collate(rows, 0),
        **options,
    )
    losses = [trainer.compute_loss(model, batch) for batch in trainer.get_train_dataloader()]
    torch.stack(losses).mean().backward()
    assert trainer.windows_seen == len(features)
    return model.logits.grad, float(torch.stack(losses).mean().detach())


def test_every_window_weighs_the_same_however_many_are_in_its_batch(features, tmp_path):
    alone, loss = epoch_of(features, tmp_path)  # a window a batch: a mean of one
    for tokens in (64, 150, 10_000):
        gradient, mean = epoch_of(features, tmp_path, batch_tokens=tokens)
        torch.testing.assert_close(gradient, alone, rtol=1e-6, atol=1e-9)  # span_loss computes in float32
        assert mean == pytest.approx(loss, rel=1e-6)


def test_the_teachers_loss_is_the_cross_entropy_at_its_temperature():
    """By hand: logits 2 and 0 at T = 2 are 1 and 0, so log shares -0.31326 and -1.31326; the third token is masked."""
    logits, mask = torch.tensor([[2.0, 0.0, 9.0]]), torch.tensor([[True, True, False]])
    found = distillation_loss(logits, torch.tensor([[0.75, 0.25, 0.0]]), mask, 2.0)
    assert float(found) == pytest.approx(4 * (0.75 * 0.313262 + 0.25 * 1.313262), rel=1e-5)


def test_windows_of_one_question_share_one_softmax():
    """Three windows, null at 0: two of question 7 (the answer at 2 of the first), and one of question 9 by itself."""
    logits = torch.tensor([[5.0, 1.0, 2.0], [5.0, 3.0, 0.0], [1.0, 1.0, 1.0]], requires_grad=True)
    positions = torch.tensor([[2, -100], [0, -100], [1, 2]])
    mask = torch.tensor([[True, True, True], [True, True, False], [True, True, True]])
    found = shared_loss(logits, positions, mask, torch.tensor([7, 7, 9]), torch.zeros(3, dtype=torch.int64))
    # exp(2) among exp(1), exp(2) and exp(3): null positions and the masked token do not count.
    by_hand = -np.log(np.exp(2) / (np.exp(1) + np.exp(2) + np.exp(3)))
    assert found.tolist() == pytest.approx([by_hand], rel=1e-6)
    found.sum().backward()
    assert logits.grad[:, 0].abs().max() == 0
    assert logits.grad[2].abs().max() == 0


def test_annotators_of_one_question_add_their_shares():
    logits, mask = torch.tensor([[0.0, 1.0, 2.0], [0.0, 0.0, 0.0]]), torch.ones(2, 3, dtype=torch.bool)
    positions = torch.tensor([[1, 2], [0, -100]])
    found = shared_loss(logits, positions, mask, torch.tensor([0, 0]), torch.zeros(2, dtype=torch.int64))
    shares = np.exp([1, 2, 0, 0])
    assert found.tolist() == pytest.approx([-np.log(shares[:2].sum() / shares.sum())], rel=1e-6)


def test_the_parts_of_the_loss_are_weighed_as_they_were_asked(features, tmp_path):
    """With a teacher, a labelled window has (1 - w) x hard + w x taught, an unlabelled one only w x taught."""
    soft = [
        SoftLabels(
            np.asarray([f.window.context_begin]), np.ones(1, np.float32), np.asarray([0]), np.ones(1, np.float32)
        )
        for f in features.features
    ]
    data = TrainingSet(features, unlabelled=1, soft=soft)
    items = [data[0], data[len(data) - 1]]
    assert [item.labelled for item in items] == [True, False]
    batch = collate(items, 0)
    model = Constant(batch["input_ids"].shape[1])
    arguments = training_arguments(CPU, output_dir=str(tmp_path), report_to=[], remove_unused_columns=False)
    trainer = SpanTrainer(model=model, args=arguments, train_dataset=data, distill_weight=0.25, temperature=2.0)
    model.train()
    loss = float(trainer.compute_loss(model, batch).detach())
    mask = batch["answer_mask"]
    zeros = torch.zeros(mask.shape)
    hard = sum(span_loss(zeros, batch[f"{s}_positions"], mask)[0] for s in ("start", "end")) / 2
    taught = sum(distillation_loss(zeros, batch[f"soft_{s}s"], mask, 2.0) for s in ("start", "end")) / 2
    assert loss == pytest.approx(float((0.75 * hard + 0.25 * taught.sum()) / 2), rel=1e-6)
    assert trainer.epoch_loss() == pytest.approx(float(hard), rel=1e-6)
    assert trainer.epoch_loss() is None


class Rows(torch.nn.Module):
    """Logits that are parameters, one per token of each window of a batch, all zero: every position is as likely."""

    def __init__(self, rows: int, tokens: int) -> None:
        super().__init__()
        self.logits = torch.nn.Parameter(torch.zeros(2, rows, tokens))

    def forward(self, **inputs: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(start_logits=self.logits[0], end_logits=self.logits[1])


def test_a_masked_window_is_pushed_neither_by_its_label_nor_by_the_windows_it_shares_a_softmax_with(features, tmp_path):
    """Three windows of one question, the second masked, so that only its teacher counts, who weighs 0 here."""
    soft = [SoftLabels(*(np.zeros(1, kind) for kind in (int, np.float32) * 2)) for _ in features.features]
    groups = (0, 0, 0, *range(3, len(features)))
    data = TrainingSet(features, groups, soft=soft, masked=frozenset({1}))
    batch = collate([data[0], data[1], data[2]], 0)
    model = Rows(*batch["input_ids"].shape)
    arguments = training_arguments(CPU, output_dir=str(tmp_path), report_to=[], remove_unused_columns=False)
    trainer = SpanTrainer(model=model, args=arguments, train_dataset=data, distill_weight=0.0)
    assert trainer.batches is not None
    model.train()
    loss = trainer.compute_loss(model, batch)
    loss.backward()
    first, third = (features[i].window.context_length for i in (0, 2))
    own = np.log(first + 1) + np.log(third + 1)  # one of the context's tokens or the null position
    shared = np.log(first + third) - np.log(2)  # one of two answers among all context tokens but the masked window's
    weight = len(trainer.batches) / len(data)  # of one window in an epoch's mean
    assert float(loss.detach()) == pytest.approx(weight * (own + shared), rel=1e-5)
    assert model.logits.grad[:, 1].abs().max() == 0
    assert model.logits.grad[:, 0].abs().max() > 0
    assert trainer.epoch_loss() == pytest.approx(own / 2, rel=1e-5)


def test_a_batch_of_masked_windows_alone_costs_nothing(features, tmp_path):
    soft = [SoftLabels(*(np.zeros(1, kind) for kind in (int, np.float32) * 2)) for _ in features.features]
    data = TrainingSet(features, (0, 0, *range(2, len(features))), soft=soft, masked=frozenset({0, 1}))
    batch = collate([data[0], data[1]], 0)
    model = Rows(*batch["input_ids"].shape)
    arguments = training_arguments(CPU, output_dir=str(tmp_path), report_to=[], remove_unused_columns=False)
    trainer = SpanTrainer(model=model, args=arguments, train_dataset=data, distill_weight=0.0)
    model.train()
    assert float(trainer.compute_loss(model, batch).detach()) == 0


def test_one_device_a_process(tmp_path, monkeypatch):
    arguments = training_arguments(CPU, output_dir=str(tmp_path), report_to=[])
    assert (arguments.use_cpu, arguments.device, arguments.n_gpu) == (True, CPU, 0)
    # The Trainer sees four GPUs; one is requested, and one is used.
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)

    def four(self: TrainingArguments) -> torch.device:
        self.distributed_state, self._n_gpu = None, 4
        return torch.device("cuda", 0)

    monkeypatch.setattr(TrainingArguments, "_setup_devices", property(four))
    arguments = training_arguments(torch.device("cuda", 2), output_dir=str(tmp_path), report_to=[])
    assert (arguments.use_cpu, arguments.device, arguments.n_gpu) == (False, torch.device("cuda", 2), 1)
    assert arguments.train_batch_size == arguments.per_device_train_batch_size
    assert chosen == [torch.device("cuda", 2)]


@pytest.mark.parametrize(("precision", "mixed"), [("fp32", "no"), ("bf16", "bf16")])
def test_the_precision_is_that_of_this_run_not_of_the_one_before(precision, mixed, tiny_checkpoint, tmp_path):
    for wanted in ("fp32", "bf16", precision):
        arguments = training_arguments(CPU, bf16=wanted == "bf16", output_dir=str(tmp_path), report_to=[])
    model = load_checkpoint(tiny_checkpoint).model
    trainer = SpanTrainer(model=model, args=arguments)
    assert trainer.accelerator.mixed_precision == mixed
    computed: list[torch.dtype] = []
    model.qa_outputs.register_forward_hook(lambda module, given, logits: computed.append(logits.dtype))
    with trainer.compute_loss_context_manager():
        trainer.accelerator.prepare(model)(input_ids=torch.tensor([[2, 3]]))
    assert computed == [torch.bfloat16 if precision == "bf16" else torch.float32]


def padded(lengths: np.ndarray, order: list[int], batch: int) -> float:
    """The share of real tokens among all that the batches hold."""
    rows = lengths[order]
    computed = sum(rows[i : i + batch].max() * len(rows[i : i + batch]) for i in range(0, len(rows), batch))
    return float(lengths.sum() / computed)


@pytest.mark.parametrize("batch", [8, 16, 24])
def test_hardly_a_token_of_a_batch_is_padding(batch):
    # Lengths as SQuAD's windows have them: most from 100 to 250 tokens, some cut at 384.
    lengths = np.random.default_rng(5).gamma(9.0, 19.0, size=3000).clip(40, 384).astype(int)
    orders = []
    for epoch in range(3):
        sampler = LengthGroupedSampler([int(n) for n in lengths], batch, 13)
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    assert min(padded(lengths, order, batch) for order in orders) > 0.96
    assert padded(lengths, list(range(len(lengths))), batch) < 0.7  # the same windows in file order
