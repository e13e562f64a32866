"""How often the model is right, from the decisions so far."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from qadeploy.core.metrics import Metric, exact_match, wilson_interval
from qadeploy.labelling.store import Row

EVERY = 5  # one in this many rows is shown at random, and counts for the estimate


def is_sampled(key: str) -> bool:
    """Whether a row belongs to the random sample. It depends on its text alone, not on the model, the order or the run."""
    return int(key[:8], 16) % EVERY == 0


@dataclass(frozen=True, slots=True)
class Estimate:
    """Exact match of the model's answers, in percent, with a 95 % interval, on ``total`` rows; None without rows."""

    total: int
    exact_match: float | None
    interval: tuple[float, float] | None


def judged(row: Row, metric: Metric) -> float:
    """Exact match of the model's answer with the decision, 0 or 1."""
    return exact_match(row["predicted"], row["answer"], metric)


def estimate(rows: Iterable[Row], model: str, metric: Metric) -> Estimate:
    """Estimates exact match on all rows from those that were drawn at random and have an answer of this model."""
    found = [judged(row, metric) for row in rows if row.get("sampled") is True and row.get("model") == model]
    if not found:
        return Estimate(0, None, None)
    share = sum(found) / len(found)
    low, high = wilson_interval(share, len(found))
    return Estimate(len(found), 100 * share, (100 * low, 100 * high))
