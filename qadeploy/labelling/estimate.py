"""How often the model is right, from the decisions so far."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from qadeploy.core.metrics import Metric, exact_match
from qadeploy.labelling.store import Row

EVERY = 5  # one row of so many is shown at random, and counts
_Z = 1.959963984540054  # of a 95 % interval


def is_sampled(key: str) -> bool:
    """Whether a row is among those that count. It depends on its text alone: not on the model, the order or the session."""
    return int(key[:8], 16) % EVERY == 0


@dataclass(frozen=True, slots=True)
class Estimate:
    """Exact match of the model's answers, percent, with a 95 % interval, on ``total`` rows. None without a row."""

    total: int
    exact_match: float | None
    interval: tuple[float, float] | None

    def to_dict(self) -> dict[str, Any]:
        """Returns plain JSON values."""
        return asdict(self)


def judged(row: Row, metric: Metric) -> float:
    """Exact match of the model's answer with the decision, 0 or 1."""
    return exact_match(row["predicted"], row["answer"], metric)


def estimate(rows: Iterable[Row], model: str, metric: Metric) -> Estimate:
    """Estimates exact match on all rows from those that were drawn at random and have an answer of this model."""
    found = [judged(row, metric) for row in rows if row.get("sampled") is True and row.get("model") == model]
    if not found:
        return Estimate(0, None, None)
    return Estimate(len(found), 100 * sum(found) / len(found), wilson(sum(found), len(found)))


def wilson(right: float, total: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share, percent; unlike a bootstrap it has a width also if all or none are right."""
    share, square = right / total, _Z**2
    middle = (share + square / (2 * total)) / (1 + square / total)
    half = _Z / (1 + square / total) * math.sqrt(share * (1 - share) / total + square / (4 * total**2))
    return 100 * max(0.0, middle - half), 100 * min(1.0, middle + half)
