"""The charts of a run: SVG for the report, ``curves.png`` for the run folder, and a small one for the terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup
from matplotlib.figure import Figure

from qadeploy.core.metrics import wilson_interval
from qadeploy.reports.facts import Calibration, RunFacts
from qadeploy.reports.figures import COLOURS, legend_above, png, svg

Rows = Sequence[Mapping[str, Any]]  # of epochs, as in ``metrics.json``
_OVER_THE_EDGE: dict[str, Any] = {"clip_on": False, "zorder": 3}  # draws markers on an axis whole


def facts_charts(facts: RunFacts) -> dict[str, Markup]:
    """Returns the charts of a report by name: loss, scores, reliability, and search if there was one."""
    metrics = facts.run.metrics
    rows, best, search = metrics["epochs"], metrics["best_epoch"], metrics.get("search")
    drawn = {
        "loss": svg("Loss by epoch", lambda f: draw_loss(f.subplots(), rows, best), 290),
        "scores": svg("Dev scores by epoch", lambda f: draw_scores(f.subplots(), rows, best), 290),
        "reliability": svg("Confidence against exact match", lambda f: draw_reliability(f, facts.calibration), 400),
    }
    if search:
        lines = math.ceil(len(search["trials"][0]["settings"]) / 2)
        drawn["search"] = svg("F1 by setting", lambda f: draw_search(f, search), 60 + 200 * lines)
    return drawn


def draw_curves(rows: Rows, path: Path) -> None:
    """Draws losses and scores by epoch into a PNG file."""

    def draw(figure: Figure) -> None:
        losses, scores = figure.subplots(1, 2)
        draw_loss(losses, rows)
        draw_scores(scores, rows)

    path.write_bytes(png(draw, (9, 3.6)))


def draw_loss(axes: Any, rows: Rows, best: int | None = None) -> None:
    """Draws train and dev loss by epoch and marks the best one."""
    for name, label in (("train_loss", "train loss"), ("eval_loss", "dev loss")):
        known = [row for row in rows if row[name] is not None]
        axes.plot([row["epoch"] for row in known], [row[name] for row in known], label=label, **_OVER_THE_EDGE)
    _finish(axes, rows, best, "loss")


def draw_scores(axes: Any, rows: Rows, best: int | None = None) -> None:
    """Draws the dev scores by epoch and marks the best one."""
    for name, label, scale in (("eval_f1", "F1", 1), ("eval_exact_match", "EM", 1), ("eval_accuracy", "accuracy", 100)):
        axes.plot([row["epoch"] for row in rows], [scale * row[name] for row in rows], label=label, **_OVER_THE_EDGE)
    axes.set_ylim(0, min(100, axes.get_ylim()[1]))
    _finish(axes, rows, best, "percent")


def draw_reliability(figure: Figure, calibration: Calibration) -> None:
    """Draws the share of exactly right answers by confidence, both in percent, over a histogram of the confidences."""
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(5, 1))
    bins = [b for b in calibration.bins if b.count]
    bounds = [wilson_interval(b.accuracy, b.count) for b in bins]
    places = [100 * b.confidence for b in bins]
    upper.plot((0, 100), (0, 100), "--", color=COLOURS["muted"], linewidth=1.5, label="perfect calibration")
    upper.vlines(places, [100 * low for low, _ in bounds], [100 * high for _, high in bounds], "C0", alpha=0.75)
    right = [100 * b.accuracy for b in bins]
    upper.plot(places, right, "o", color="C0", label="answers, 95 % interval", **_OVER_THE_EDGE)
    upper.set(xlim=(0, 100), ylim=(0, 100), ylabel="exactly right (%)")
    lefts, widths = [100 * b.low for b in bins], [100 * (b.high - b.low) - 1 for b in bins]
    bars = lower.bar(lefts, [b.count for b in bins], widths, align="edge", color=COLOURS["bar"])
    lower.bar_label(bars, fmt="{:,.0f}", padding=2, fontsize="small")
    lower.set(yticks=(), xlabel="confidence (%)", ylabel="answers")
    legend_above(upper, 1)


def draw_search(figure: Figure, search: Mapping[str, Any]) -> None:
    """Draws F1 against each setting that was searched for, and marks the trial that was kept."""
    best = search["trials"][search["best"] - 1]
    scored = [t for t in search["trials"] if t["f1"] is not None]
    names = list(best["settings"])
    columns = min(2, len(names))
    panels = figure.subplots(math.ceil(len(names) / columns), columns, sharey=True, squeeze=False).flat
    for name, axes in zip(names, panels, strict=False):
        values = sorted({t["settings"][name] for t in scored})
        if name == "learning_rate":
            axes.set_xscale("log")
            values = values[:: max(1, len(values) - 1)]  # the least and the greatest
        axes.plot([t["settings"][name] for t in scored], [t["f1"] for t in scored], linestyle="", label="trial")
        axes.plot(best["settings"][name], best["f1"], linestyle="", label="kept")
        axes.margins(0.15)
        axes.minorticks_off()
        axes.set_xticks(values, [f"{value:.2g}" for value in values])
        axes.set_xlabel(name.replace("_", " "))
    for axes in panels:  # the unused panel, if any
        axes.set_axis_off()
    figure.supylabel("F1 (%)", fontsize="medium")
    legend_above(figure.axes[0], 2)


def _finish(axes: Any, rows: Rows, best: int | None, y_label: str) -> None:
    axes.set(xlabel="epoch", ylabel=y_label, xlim=(0, max(1, *(row["epoch"] for row in rows))))
    axes.xaxis.get_major_locator().set_params(integer=True)
    if best is not None:
        axes.axvline(best, color=COLOURS["muted"], linestyle=":", linewidth=1, marker="")
        above = {"xytext": (0, 7), "textcoords": "offset points", "ha": "center"}
        axes.annotate("best", (best, 1), xycoords=axes.get_xaxis_transform(), **above)
    legend_above(axes, 3)


def terminal_chart(rows: Rows, *, width: int = 50, height: int = 8) -> str:
    """Returns train loss (``t``) and dev loss (``e``) by epoch, ``*`` if they meet; "" for fewer than two epochs."""
    if len(rows) < 2:
        return ""
    kinds = (("eval_loss", "e"), ("train_loss", "t"))
    points = [(row["epoch"], row[name], mark) for row in rows for name, mark in kinds if row[name] is not None]
    losses = [loss for _, loss, _ in points]
    low, high, last = min(losses), max(losses), max(row["epoch"] for row in rows) or 1
    grid = [[" "] * width for _ in range(height)]
    for epoch, loss, mark in points:
        column = round(epoch / last * (width - 1))
        line = round((high - loss) / ((high - low) or 1.0) * (height - 1))
        grid[line][column] = "*" if grid[line][column] not in {" ", mark} else mark
    labels = [f"{high:7.3f}", *["       "] * (height - 2), f"{low:7.3f}"]
    lines = [f"{label} |{''.join(row).rstrip()}" for label, row in zip(labels, grid, strict=True)]
    axis = f"        +{'-' * width}\n         0{'epoch'.center(width - 2)}{last}"
    return "loss: t train, e eval\n" + "\n".join(lines) + "\n" + axis
