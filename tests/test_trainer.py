"""The trainer inside the real loop: which windows it sees in which order, and how little of a batch is padding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback

from qadeploy.build.checkpoint import load_checkpoint
from qadeploy.build.features import Feature, FeatureSet, make_features
from qadeploy.build.trainer import LengthGroupedSampler, SpanTrainer, collate, training_arguments
from qadeploy.data.readers import read
from qadeploy.qa.settings import QaSettings
from tests.conftest import triplets, write_jsonl

BATCH = 4
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
    tiny_checkpoint: Path, features: FeatureSet, folder: Path, seed: int = 13
) -> tuple[list[list[int]], list[list[int]]]:
    """The windows' numbers in each batch of two epochs of training, and of an evaluation after."""
    set_seed(seed)
    checkpoint = load_checkpoint(tiny_checkpoint)
    number = {id(f): i for i, f in enumerate(features.features)}
    seen: list[list[int]] = []

    def watched(rows: list[Feature]) -> dict[str, Any]:
        seen.append([number[id(f)] for f in rows])
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
        model=checkpoint.model, args=arguments, train_dataset=features, eval_dataset=features, data_collator=watched
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


@pytest.mark.parametrize(("precision", "mixed"), [("fp32", "no"), ("bf16", "bf16")])
def test_the_precision_is_that_of_this_run_not_of_the_one_before(precision, mixed, tiny_checkpoint, tmp_path):
    for wanted in ("fp32", "bf16", precision):
        arguments = training_arguments(bf16=wanted == "bf16", output_dir=str(tmp_path), use_cpu=True, report_to=[])
    trainer = SpanTrainer(model=load_checkpoint(tiny_checkpoint).model, args=arguments)
    assert trainer.accelerator.mixed_precision == mixed
    with trainer.compute_loss_context_manager():
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == (torch.bfloat16 if precision == "bf16" else torch.float32)


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
    assert padded(lengths, list(range(len(lengths))), batch) < 0.7  # the same windows as they come
