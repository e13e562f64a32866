"""Times variants against each other: interleaved rounds, medians, ranges, ratios within a round."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from qadeploy.errors import InputError

_T = TypeVar("_T")
WORTH = 1.02  # a smaller gain is not worth a change
_CONTRARY = 1 / 9  # the share of rounds that the slower variant may win


@dataclass(frozen=True, slots=True)
class Timing:
    """The timing of one variant.

    Attributes:
        seconds: Seconds per round.
        median: Median seconds.
        least: Seconds of the fastest round.
        most: Seconds of the slowest round.
        speedup: Median over rounds of (first variant's seconds / this variant's); above 1 is faster.
        speedup_range: The smallest and the largest of these ratios.
    """

    seconds: tuple[float, ...]
    median: float
    least: float
    most: float
    speedup: float
    speedup_range: tuple[float, float]

    def clearly_faster(self, first: Timing) -> bool:
        """Returns whether this variant beat ``first``, timed in the same rounds, by more than chance.

        It must win by at least 2 % in the median, and in 8 of 9 rounds, which two equally fast variants do in 1 of 51
        cases (sign test). With fewer than 9 rounds it must win all of them.
        """
        ratio = np.asarray(first.seconds) / np.asarray(self.seconds)
        return bool(np.median(ratio) >= WORTH and (ratio <= 1).sum() <= int(_CONTRARY * len(ratio)))

    def clearly_slower(self, first: Timing) -> bool:
        """Returns whether ``first`` beat this variant by the same criteria."""
        return first.clearly_faster(self)


def interleave(variants: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, Timing]:
    """Times variants against each other, after an untimed run of each.

    Args:
        variants: Name to function; speed-ups are relative to the first.
        rounds: How often each is timed, in the order of ``turns``.
    """
    names = list(variants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
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


def seconds_of(name: str, text: str) -> float:
    """Converts a time such as 90s, 5m or 1h to seconds; a bare number is seconds.

    Raises:
        InputError: The text is not a time; the message names ``name``.
    """
    units = {"s": 1, "m": 60, "h": 3600}
    number, unit = (text[:-1], text[-1]) if text[-1:] in units else (text, "s")
    try:
        seconds = float(number) * units[unit]
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise InputError(f"{name} is {text!r}: give a time such as 90s, 5m or 1h")
    return seconds


def turns(names: Sequence[str], rounds: int) -> Iterator[list[str]]:
    """Yields the names in each round's order, rotated by one per round so that none is always first."""
    for number in range(rounds):
        turn = number % max(1, len(names))
        yield [*names[turn:], *names[:turn]]


def spread(rows: Sequence[_T], count: int) -> list[_T]:
    """Returns at most ``count`` evenly spaced rows."""
    step = max(1.0, len(rows) / count)
    return [rows[int(i * step)] for i in range(min(count, len(rows)))]
