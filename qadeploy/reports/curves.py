"""Loss curves: a small chart for the terminal and ``curves.png`` for the run folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def terminal_chart(rows: Sequence[dict[str, Any]], *, width: int = 50, height: int = 8) -> str:
    """Train loss (``t``) and eval loss (``e``) against the epoch, ``*`` where they meet; "" for fewer than two points."""
    points = [(r["epoch"], r["train_loss"], r["eval_loss"]) for r in rows]
    losses = [v for _, t, e in points for v in (t, e) if v is not None]
    if len(points) < 2:
        return ""
    low, high = min(losses), max(losses)
    last = max(p[0] for p in points) or 1
    grid = [[" "] * width for _ in range(height)]
    for epoch, train_loss, eval_loss in points:
        column = round(epoch / last * (width - 1))
        for value, mark in ((eval_loss, "e"), (train_loss, "t")):
            if value is not None:
                line = round((high - value) / ((high - low) or 1.0) * (height - 1))
                grid[line][column] = "*" if grid[line][column] not in {" ", mark} else mark
    labels = [f"{high:7.3f}", *["       "] * (height - 2), f"{low:7.3f}"]
    lines = [f"{label} |{''.join(row).rstrip()}" for label, row in zip(labels, grid, strict=True)]
    axis = f"        +{'-' * width}\n         0{'epoch'.center(width - 2)}{last}"
    return "loss: t train, e eval\n" + "\n".join(lines) + "\n" + axis


def draw_curves(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws losses and scores against the epoch into a PNG file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), dpi=110, layout="constrained")
    losses, scores = figure.subplots(1, 2)
    epochs = [r["epoch"] for r in rows]
    trained = [r for r in rows if r["train_loss"] is not None]
    losses.plot([r["epoch"] for r in trained], [r["train_loss"] for r in trained], "o-", label="train loss")
    losses.plot(epochs, [r["eval_loss"] for r in rows], "s--", label="eval loss")
    losses.set(xlabel="epoch", ylabel="loss", title="Loss")
    for key, name, factor in (("eval_f1", "F1", 1), ("eval_exact_match", "EM", 1), ("eval_accuracy", "accuracy", 100)):
        scores.plot(epochs, [factor * r[key] for r in rows], "o-", label=name)
    scores.set(xlabel="epoch", ylabel="percent", title="Dev part")
    for axes in (losses, scores):
        axes.grid(alpha=0.3)
        axes.legend()
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.savefig(path)
