"""Drift: how today's questions differ from the held-out data that a bundle was judged on.

Figures of each question are counted in the same buckets at export and in the server, to compare their distributions.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from itertools import accumulate
from typing import Any


class Figure(StrEnum):
    """What is recorded per question: the first two are scores, the last a share of the tokens of question and context."""

    SCORE = "score"
    MARGIN = "margin"  # the best answer's score minus the second's
    NO_ANSWER = "no_answer"  # 1 if there was no answer, else 0
    QUESTION_TOKENS = "question_tokens"
    CONTEXT_TOKENS = "context_tokens"
    UNKNOWN_TOKENS = "unknown_tokens"


Figures = Mapping[Figure, float]
_SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
BOUNDS: Mapping[Figure, tuple[float, ...]] = {
    Figure.SCORE: _SHARES,
    Figure.MARGIN: (0.0, 0.05, *_SHARES),
    Figure.NO_ANSWER: (0.0,),
    Figure.QUESTION_TOKENS: (4, 6, 8, 10, 12, 15, 20, 25, 30, 40, 60, 100),
    Figure.CONTEXT_TOKENS: (32, 64, 96, 128, 192, 256, 384, 512, 1024, 2048, 4096, 8192, 16384),
    Figure.UNKNOWN_TOKENS: (0.0, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5),
}


@dataclass(frozen=True, slots=True)
class Distribution:
    """How often a figure fell into each bucket.

    Attributes:
        bounds: The upper bound of each bucket, inclusive, rising; a last bucket without a bound follows.
        counts: Questions in each bucket, ``len(bounds) + 1`` numbers.
        total: The sum of all values.
    """

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    total: float = 0.0

    def at_most(self) -> list[int]:
        """How many questions had at most each bound; the last number counts all."""
        return list(accumulate(self.counts))

    def to_dict(self) -> dict[str, Any]:
        """Returns bounds and counts as plain JSON values."""
        return {"bounds": list(self.bounds), "counts": list(self.counts)}


class Drift:
    """Counts the figures of questions. Safe under threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts = {figure: [0] * (len(bounds) + 1) for figure, bounds in BOUNDS.items()}
        self._totals = dict.fromkeys(BOUNDS, 0.0)

    def add(self, figures: Figures) -> None:
        """Counts one question."""
        with self._lock:
            for figure, value in figures.items():
                self._counts[figure][bisect_left(BOUNDS[figure], value)] += 1
                self._totals[figure] += value

    def distributions(self) -> dict[Figure, Distribution]:
        """The distribution of each figure so far."""
        with self._lock:
            return {
                figure: Distribution(bounds, tuple(self._counts[figure]), self._totals[figure])
                for figure, bounds in BOUNDS.items()
            }
