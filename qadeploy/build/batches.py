"""Which windows make a batch: so many of like length, or as many as a number of tokens holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Sampler

from qadeploy.errors import InputError
from qadeploy.records import IntArray


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


class TokenBatches(Sampler[list[int]]):
    """Batches of like length that hold at most ``tokens`` tokens, padding included, drawn anew each epoch from the seed.

    Windows are sorted by length, those of one length in an order drawn each epoch, and cut greedily; the
    batches come in an order drawn each epoch, one of the longest windows first, so that memory fails early. Where the cuts
    lie depends on the lengths alone: every epoch has the same number of batches, and each window is in one of them.

    ``most`` bounds the windows of a batch. Raises InputError where a window alone has more tokens.
    """

    def __init__(self, lengths: Sequence[int], tokens: int, seed: int, most: int | None = None) -> None:
        check_tokens(tokens, lengths)
        self.lengths = np.asarray(lengths)
        self.seed = seed
        self.epoch = 0
        self.cuts = _cuts(-np.sort(-self.lengths), tokens, most)

    def set_epoch(self, epoch: int) -> None:
        """Called by the data loader at the start of each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.cuts) - 1

    def __iter__(self) -> Iterator[list[int]]:
        generator = np.random.default_rng((self.seed, self.epoch))
        shuffled = generator.permutation(len(self.lengths))
        order = shuffled[np.argsort(-self.lengths[shuffled], kind="stable")]
        for number in (0, *(int(n) + 1 for n in generator.permutation(len(self) - 1))):
            yield [int(i) for i in order[self.cuts[number] : self.cuts[number + 1]]]


def check_tokens(tokens: int, lengths: Sequence[int]) -> None:
    """Raises InputError where a batch of ``tokens`` tokens does not hold the longest window."""
    if max(lengths) > tokens:
        raise InputError(
            f"batch-tokens {tokens} holds not even one window: the longest has {max(lengths)} tokens. "
            f"Give --batch-tokens {max(lengths)} or more, or a lower --max-seq-len"
        )


def _cuts(lengths: IntArray, tokens: int, most: int | None) -> list[int]:
    """Where batches of the windows begin, and their end; ``lengths`` fall, so that a batch is as long as its first."""
    cuts = [0]
    while cuts[-1] < len(lengths):
        size = tokens // int(lengths[cuts[-1]])
        cuts.append(min(cuts[-1] + min(size, most or size), len(lengths)))
    return cuts
