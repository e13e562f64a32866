"""How windows are grouped into batches: a fixed number of similar length, or as many as a token limit allows."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Sampler

from qadeploy.errors import InputError
from qadeploy.records import IntArray


class LengthGroupedSampler(Sampler[int]):
    """Yields window indices in a random order in which neighbours have similar lengths; each epoch has its own order.

    Windows are shuffled, cut into pools of 50 batches and sorted by length inside a pool, and the batches of the epoch are
    shuffled again. The longest batch comes first, so that one too large for the memory fails at once.
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
    """Yields batches of whole units of similar length.

    A unit is a set of windows that share a batch: a single window, or those of a question and its negatives. A unit larger
    than a batch is cut into parts, anew each epoch: its windows with an answer and as many others, drawn at random, as fit;
    the rest form parts of their own. Units are sorted by their longest window, ties in random order, and cut greedily into
    batches. The batches are shuffled each epoch, except that the longest windows come first, so that a batch too large for
    the memory fails at once. The cuts depend on the lengths alone: every epoch has the same number of batches and contains
    each window once.

    Args:
        units: The window indices of each unit.
        lengths: ``[windows]``, in tokens.
        seed: The seed of the random orders.
        tokens: The maximum tokens in a batch, padding included; None for no limit.
        most: The maximum windows in a batch; None for no limit.
        answered: The indices of the windows with an answer.

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
        answered: Collection[int] = (),
    ) -> None:
        if tokens:
            check_tokens(tokens, lengths)
        self.answered = answered
        self.units: list[tuple[list[int], int]] = []  # each with the maximum windows of a part
        sizes: list[tuple[int, int]] = []
        for unit in map(list, units):
            longest = max(lengths[i] for i in unit)  # counts for every part, so that sizes do not depend on the draw
            room = min(len(unit), most or len(unit), tokens // longest if tokens else len(unit))
            self.units.append((unit, room))
            sizes += [(longest, min(room, len(unit) - begin)) for begin in range(0, len(unit), room)]
        # Sorting by both values makes the cuts independent of the order of ties.
        self.sizes = np.asarray(sizes)
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
        parts = [part for unit, room in self.units for part in self._parts(unit, room, generator)]
        shuffled = generator.permutation(len(parts))
        order = shuffled[np.lexsort((-self.sizes[shuffled, 1], -self.sizes[shuffled, 0]))]
        for number in (0, *(int(n) + 1 for n in generator.permutation(len(self) - 1))):
            yield [i for part in order[self.cuts[number] : self.cuts[number + 1]] for i in parts[part]]

    def _parts(self, unit: list[int], room: int, generator: np.random.Generator) -> list[list[int]]:
        if len(unit) <= room:
            return [unit]
        drawn = sorted(generator.permutation(unit).tolist(), key=lambda i: i not in self.answered)
        return [drawn[begin : begin + room] for begin in range(0, len(drawn), room)]


def check_tokens(tokens: int, lengths: Sequence[int]) -> None:
    """Raises InputError if the longest window has more than ``tokens`` tokens."""
    if max(lengths) > tokens:
        raise InputError(
            f"batch-tokens {tokens} is too small for the longest window, which has {max(lengths)} tokens. "
            f"Give --batch-tokens {max(lengths)} or more, or a lower --max-seq-len"
        )


def _cuts(sizes: IntArray, tokens: int | None, most: int | None) -> list[int]:
    """The first part of each batch, and the end. ``sizes``, ``[parts, 2]``: lengths, descending, and window counts."""
    cuts, longest, windows = [0], 0, 0
    for number, (length, count) in enumerate(sizes.tolist()):
        full = most is not None and windows + count > most
        if windows and (full or (tokens is not None and longest * (windows + count) > tokens)):
            cuts.append(number)
            windows = 0
        longest = length if not windows else longest
        windows += count
    return [*cuts, len(sizes)]
