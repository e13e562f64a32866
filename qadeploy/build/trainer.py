"""The Trainer that training uses: length-grouped batches, and a loss over valid positions only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Sampler
from transformers import Trainer

from qadeploy.build.features import NO_LABEL, Feature, FeatureSet, collate_labels
from qadeploy.qa.windows import pad_batch


class LengthGroupedSampler(Sampler[int]):
    """Indices in an order where neighbours have like lengths, drawn anew each epoch from the seed.

    Windows are shuffled, cut into pools of 50 batches, sorted by length inside a pool, and the
    batches of the epoch are shuffled again; the longest batch comes first, so that memory fails early.
    """

    POOL = 50

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths = np.asarray(lengths)
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the data loader at the start of each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = np.random.default_rng((self.seed, self.epoch))
        order = generator.permutation(len(self.lengths))
        batches: list[Any] = []
        for begin in range(0, len(order), self.POOL * self.batch_size):
            pool = order[begin : begin + self.POOL * self.batch_size]
            pool = pool[np.argsort(-self.lengths[pool], kind="stable")]
            batches += [pool[i : i + self.batch_size] for i in range(0, len(pool), self.batch_size)]
        # Only the very last batch may be short: the loader cuts this stream every batch_size indices.
        full = [b for b in batches if len(b) == self.batch_size]
        short = [b for b in batches if len(b) < self.batch_size]
        full = [full[i] for i in generator.permutation(len(full))]
        if full:
            longest = max(range(len(full)), key=lambda i: int(self.lengths[full[i]].max()))
            full[0], full[longest] = full[longest], full[0]
        for batch in (*full, *short):
            yield from (int(i) for i in batch)


class SpanTrainer(Trainer):
    """The Trainer with length-grouped batches and a loss over valid positions only.

    The loss is the cross entropy of start and end positions, averaged over the annotators of a
    question (their spans are equally good targets) and over start and end. Its softmax runs over
    the context and the null position, as the decoder's does.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        features: FeatureSet = train_dataset if train_dataset is not None else self.train_dataset
        lengths = [len(f.window) for f in features.features]
        return LengthGroupedSampler(lengths, self.args.train_batch_size, self.args.seed)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of a batch, and with ``return_outputs`` its logits."""
        labels = ("start_positions", "end_positions", "answer_mask")
        outputs = model(**{k: v for k, v in inputs.items() if k not in labels})
        mask = inputs["answer_mask"]
        losses = [
            span_loss(outputs.start_logits, inputs["start_positions"], mask),
            span_loss(outputs.end_logits, inputs["end_positions"], mask),
        ]
        loss = (losses[0] + losses[1]) / 2
        logits = {"start_logits": outputs.start_logits, "end_logits": outputs.end_logits}
        return (loss, logits) if return_outputs else loss


def span_loss(logits: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy. ``logits`` [windows, tokens], ``positions`` [windows, annotations] (-100 fills), ``mask`` [windows, tokens]."""
    log_probabilities = torch.log_softmax(logits.float().masked_fill(~mask, -1e9), dim=-1)
    valid = positions != NO_LABEL
    picked = log_probabilities.gather(1, positions.clamp(min=0)) * valid
    return -(picked.sum(1) / valid.sum(1)).mean()


def collate(features: Sequence[Feature], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Model inputs and labels of a batch, padded to its longest window."""
    batch: dict[str, Any] = dict(pad_batch([f.window for f in features], pad_token_id))
    batch.update(collate_labels(features, batch["input_ids"].shape[1]))
    return {name: torch.from_numpy(values) for name, values in batch.items()}
