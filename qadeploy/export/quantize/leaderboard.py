"""The leaderboard of a search over recipes: one row per recipe for the manifest, and the same rows as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from qadeploy.export.quantize.search import MeasuredRecipe


def leaderboard(
    candidates: Sequence[MeasuredRecipe],
    known: Sequence[str],
    judged: Mapping[str, float],
    *,
    max_f1_drop: float,
    chosen: str | None = None,
) -> list[dict[str, Any]]:
    """A row for each of the ``known`` recipes, measured or not; ``judged`` maps recipes to F1 lost on held-out questions.

    ``verdict`` says why a recipe was not chosen.
    """
    found = {candidate.recipe: candidate for candidate in candidates}
    rows: list[dict[str, Any]] = []
    for name in known:
        candidate = found.get(name)
        if candidate is None:
            rows.append({"recipe": name, "verdict": "not tried: the budget was used up"})
            continue
        held_out: dict[str, Any] = {"f1_lost_held_out": judged[name]} if name in judged else {}
        verdict = "chosen" if name == chosen else _verdict(candidate, judged.get(name), max_f1_drop)
        rows.append({**asdict(candidate), **held_out, "verdict": verdict})
    return rows


def _verdict(candidate: MeasuredRecipe, held_out: float | None, max_f1_drop: float) -> str:
    if candidate.failed:
        return f"failed: {candidate.failed}"
    if not candidate.f1_lost <= max_f1_drop:
        return f"loses more than {max_f1_drop:g}"
    if held_out is not None and not held_out <= max_f1_drop:
        return f"lost {held_out:.2f} on the held-out questions"
    return "not the best"


def leaderboard_lines(
    rows: Sequence[Mapping[str, Any]], judged_on: Mapping[str, Any], chosen: str | None = None
) -> list[str]:
    """The rows of ``leaderboard`` as a table, the chosen recipe marked; ``judged_on`` comes from ``Judges.to_dict``."""
    lines = [
        f"{'recipe':<22} {'size':>9} {'F1 change (95 %)':>24} {'one at a time, x fp32':>24} {'many, x fp32':>21}  verdict"
    ]
    for row in rows:
        mark = "*" if row["recipe"] == chosen else " "
        if not row.get("size"):
            lines.append(f"{mark}{row['recipe']:<21} {row['verdict']}")
            continue
        low, high = row["f1_change_interval"]
        change = f"{-row['f1_lost']:+.2f} ({low:+.2f} to {high:+.2f})"
        lines.append(
            f"{mark}{row['recipe']:<21} {row['size'] / 1e6:>6.1f} MB {change:>24} {_speed(row, 'latency'):>24} "
            f"{_speed(row, 'throughput'):>21}  {row['verdict']}"
        )
    training = judged_on["training"]
    asked = f"{judged_on['dev']} dev"
    if training:
        asked += f" and {training} training questions, weighted like the dev set (worth {judged_on['worth']:.0f} of equal weight)"
    else:
        asked += " questions"
    return [
        *lines,
        f"F1 judged on {asked}, against the fp32 model; speeds are medians of interleaved rounds (least to most)",
    ]


def _speed(row: Mapping[str, Any], name: str) -> str:
    low, high = row[f"{name}_range"]
    return f"{row[name]:.2f} ({low:.2f} to {high:.2f})"
