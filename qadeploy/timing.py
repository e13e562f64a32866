"""Timing variants against each other: interleaved rounds, medians and spread, ratios within a round."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

_Row = TypeVar("_Row")
WORTH = 1.02  # a smaller gain is not worth a change
_AWRY = 1 / 9  # the share of rounds that may go the other way


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds a round of one variant: all, median, least and most, and the ratio to the first variant.

    ``speedup`` is the median over rounds of (first variant's seconds / this one's) in the same round,
    ``speedup_range`` its least and most: above 1 is faster.
    """

    seconds: tuple[float, ...]
    median: float
    least: float
    most: float
    speedup: float
    speedup_range: tuple[float, float]

    def clearly_faster(self, first: Timing) -> bool:
        """True where this variant beat ``first``, of the same rounds, beyond what chance brings.

        In the median by 2 % at least, and in 8 rounds of 9: two variants of like speed come out so in 1 of 51 cases
        (sign test). With fewer than 9 rounds, in all of them.
        """
        return _beats(first.seconds, self.seconds)

    def clearly_slower(self, first: Timing) -> bool:
        """True where ``first`` beat this variant in the same way."""
        return _beats(self.seconds, first.seconds)


def interleave(variants: Mapping[str, Callable[[], object]], rounds: int, *, warm_up: bool = True) -> dict[str, Timing]:
    """Runs every variant once a round, after one warm-up round that is not counted, in the order of ``turns``."""
    names = list(variants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for name in names if warm_up else ():
        variants[name]()
    for order in turns(names, rounds):
        for name in order:
            started = time.perf_counter()
            variants[name]()
            seconds[name].append(time.perf_counter() - started)
    first = np.asarray(seconds[names[0]])
    result = {}
    for name in names:
        own = np.asarray(seconds[name])
        ratio = first / own
        result[name] = Timing(
            tuple(seconds[name]),
            float(np.median(own)),
            float(own.min()),
            float(own.max()),
            float(np.median(ratio)),
            (float(ratio.min()), float(ratio.max())),
        )
    return result


def turns(names: Sequence[str], rounds: int) -> Iterator[list[str]]:
    """The names in each round's order, which turns with the rounds, so that none is always the first."""
    for number in range(rounds):
        turn = number % max(1, len(names))
        yield [*names[turn:], *names[:turn]]


def spread(rows: Sequence[_Row], count: int) -> list[_Row]:
    """At most ``count`` rows at even distances."""
    step = max(1.0, len(rows) / count)
    return [rows[int(i * step)] for i in range(min(count, len(rows)))]


def _beats(slow: Sequence[float], fast: Sequence[float]) -> bool:
    ratio = np.asarray(slow) / np.asarray(fast)
    return bool(np.median(ratio) >= WORTH and (ratio <= 1).sum() <= int(_AWRY * len(ratio)))
