"""Which windows make a batch: a number of windows of similar length, or as many as a number of tokens holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Sampler

from qadeploy.errors import InputError
from qadeploy.records import IntArray


class LengthGroupedSampler(Sampler[int]):
    """Indices in an order in which neighbours have similar lengths, drawn anew each epoch from the seed.

    Windows are shuffled, cut into pools of 50 batches and sorted by length inside a pool, and the batches of the epoch are
    shuffled again. The longest batch comes first, so that memory runs out early if it does.
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


class UnitBatches(Sampler[list[int]]):
    """Batches of whole units of similar length, drawn anew each epoch from the seed.

    A unit is the windows that must share a batch: one, or those of a question and its negatives. Units are sorted by their
    longest window, equal ones in an order drawn each epoch, and cut greedily. The batches come in an order drawn each epoch,
    one with the longest windows first, so that memory runs out early if it does. The cuts depend on the lengths alone: every
    epoch has the same number of batches, and each window is in one of them.

    Args:
        units: Indices of windows, unit by unit.
        lengths: ``[windows]``, in tokens.
        seed: That of the orders.
        tokens: The most tokens in a batch, padding included; None for no bound.
        most: The most windows in a batch; None for no bound. A larger unit gets a batch to itself.

    Raises:
        InputError: A single window has more tokens than a batch may hold.
    """

    def __init__(
        self,
        units: Sequence[Sequence[int]],
        lengths: Sequence[int],
        seed: int,
        *,
        tokens: int | None = None,
        most: int | None = None,
    ) -> None:
        if tokens:
            check_tokens(tokens, lengths)
        self.units = [list(unit) for unit in units]
        # Sorted by both, so that the cuts do not depend on the order of equal units.
        self.sizes = np.asarray([(max(lengths[i] for i in unit), len(unit)) for unit in self.units])
        self.seed = seed
        self.epoch = 0
        self.cuts = _cuts(self.sizes[np.lexsort((-self.sizes[:, 1], -self.sizes[:, 0]))], tokens, most)

    def set_epoch(self, epoch: int) -> None:
        """Called by the data loader at the start of each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.cuts) - 1

    def __iter__(self) -> Iterator[list[int]]:
        generator = np.random.default_rng((self.seed, self.epoch))
        shuffled = generator.permutation(len(self.units))
        order = shuffled[np.lexsort((-self.sizes[shuffled, 1], -self.sizes[shuffled, 0]))]
        for number in (0, *(int(n) + 1 for n in generator.permutation(len(self) - 1))):
            yield [i for unit in order[self.cuts[number] : self.cuts[number + 1]] for i in self.units[unit]]


def check_tokens(tokens: int, lengths: Sequence[int]) -> None:
    """Raises InputError if a batch of ``tokens`` tokens does not hold the longest window."""
    if max(lengths) > tokens:
        raise InputError(
            f"batch-tokens {tokens} does not hold even one window: the longest has {max(lengths)} tokens. "
            f"Give --batch-tokens {max(lengths)} or more, or a lower --max-seq-len"
        )


def _cuts(sizes: IntArray, tokens: int | None, most: int | None) -> list[int]:
    """Where batches of units begin, and the end. ``sizes`` ``[units, 2]`` are lengths, falling, and windows."""
    cuts, longest, windows = [0], 0, 0
    for number, (length, count) in enumerate(sizes.tolist()):
        full = most is not None and windows + count > most
        if windows and (full or (tokens is not None and longest * (windows + count) > tokens)):
            cuts.append(number)
            windows = 0
        longest = length if not windows else longest
        windows += count
    return [*cuts, len(sizes)]
