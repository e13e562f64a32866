"""The report's charts as inline SVG. Colours are classes: the page's style sheet knows light, dark and paper."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from qadeploy.reports.run_report import Calibration, Epoch, RunFacts, wilson_interval
from qadeploy.reports.svg import LEFT, RIGHT, TOP, WIDTH, Plot, drawing, frame, mark, number, ticks, titles, words


@dataclass(frozen=True, slots=True)
class Series:
    """A line of a chart: its name, the class that colours and dashes it, its marker, its points (x, y)."""

    name: str
    style: str
    marker: str
    points: tuple[tuple[float, float], ...]


def loss_series(epochs: Sequence[Epoch]) -> tuple[Series, ...]:
    """Train and dev loss by epoch."""
    train = tuple((float(e.number), e.train_loss) for e in epochs if e.train_loss is not None)
    dev = tuple((float(e.number), e.eval_loss) for e in epochs)
    return (Series("train loss", "a", "circle", train), Series("dev loss", "b", "square", dev))


def score_series(epochs: Sequence[Epoch]) -> tuple[Series, ...]:
    """F1, EM and accuracy on the dev part by epoch, percent."""
    return (
        Series("F1", "a", "circle", tuple((float(e.number), e.f1) for e in epochs)),
        Series("exact match (EM)", "b", "diamond", tuple((float(e.number), e.exact_match) for e in epochs)),
        Series("accuracy", "c", "triangle", tuple((float(e.number), e.accuracy) for e in epochs)),
    )


def curves(series: Sequence[Series], best: int, y_title: str, title: str) -> Markup:
    """Lines against the epoch, with the best epoch marked."""
    values = [y for s in series for _, y in s.points]
    last = max(1.0, *(x for s in series for x, _ in s.points))
    y_ticks = ticks(min(values), max(values), 5)
    plot = Plot((0.0, last), (y_ticks[0], y_ticks[-1]), 206)
    bottom = TOP + plot.height
    at = plot.x(best)
    parts = [
        frame(plot, [t for t in ticks(0, last, 8, whole=True) if t <= last], y_ticks, number, number),
        f'<line class="best" x1="{at:.1f}" y1="{TOP}" x2="{at:.1f}" y2="{bottom}"/>',
        words(at, TOP - 9, "kept", "said", "middle"),
    ]
    for line in series:
        places = [(plot.x(x), plot.y(y)) for x, y in line.points]
        joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline class="line {line.style}" points="{joined}"/>')
        parts += [
            mark(line.marker, x, y, line.style, f"epoch {value[0]:.0f}: {line.name} {value[1]:.3f}")
            for (x, y), value in zip(places, line.points, strict=True)
        ]
    return drawing(title, bottom + 44, [*parts, titles(plot, "epoch", y_title)])


def reliability(calibration: Calibration, title: str) -> Markup:
    """Confidence against the share of exactly right answers, in percent, over a histogram of the confidences."""
    plot = Plot((0, 100), (0, 100), 250)
    bottom = TOP + plot.height
    tens = [0.0, 20.0, 40.0, 60.0, 80.0, 100.0]
    most = max((b.count for b in calibration.bins), default=0) or 1
    floor, tall = bottom + 106, 48
    parts = [
        frame(plot, tens, tens, number, number),
        f'<line class="diagonal" x1="{plot.x(0)}" y1="{plot.y(0)}" x2="{plot.x(100)}" y2="{plot.y(100)}"/>',
    ]
    for group in calibration.bins:
        if not group.count:
            continue
        low, high = wilson_interval(group.accuracy, group.count)
        x, y = plot.x(100 * group.confidence), plot.y(100 * group.accuracy)
        said = (
            f"{100 * group.low:.0f} to {100 * group.high:.0f} %: {group.count} answers, mean confidence "
            f"{100 * group.confidence:.1f} %, {100 * group.accuracy:.1f} % right"
        )
        parts.append(
            f'<line class="whisker a" x1="{x:.1f}" y1="{plot.y(100 * low):.1f}" x2="{x:.1f}" y2="{plot.y(100 * high):.1f}"/>'
        )
        parts.append(mark("circle", x, y, "a", said))
        left, right = plot.x(100 * group.low) + 2, plot.x(100 * group.high) - 2
        rise = max(1.0, tall * group.count / most)
        parts.append(
            f'<rect class="bar" x="{left:.1f}" y="{floor - rise:.1f}" width="{right - left:.1f}" height="{rise:.1f}">'
            f"<title>{said}</title></rect>"
        )
        parts.append(words((left + right) / 2, floor - rise - 4, f"{group.count:,}", "said", "middle"))
    parts += [
        f'<line class="axis" x1="{LEFT}" y1="{floor}" x2="{WIDTH - RIGHT}" y2="{floor}"/>',
        words((LEFT + WIDTH - RIGHT) / 2, floor + 17, "answers at that confidence", "label", "middle"),
        titles(plot, "confidence (%)", "exactly right (%)"),
    ]
    return drawing(title, floor + 24, parts)


def strip(
    f1: float,
    f1_interval: tuple[float, float] | None,
    exact_match: float,
    exact_match_interval: tuple[float, float] | None,
    overall: float | None = None,
) -> Markup:
    """F1 above EM on a line from 0 to 100 percent as wide as its place, with whiskers; ``overall`` is a rule across."""
    parts = [f'<line class="grid" x1="{t}%" y1="0" x2="{t}%" y2="36"/>' for t in (0, 25, 50, 75, 100)]
    if overall is not None:
        parts.append(f'<line class="overall" x1="{overall:.2f}%" y1="0" x2="{overall:.2f}%" y2="36"/>')
    for value, interval, style, marker, height in (
        (f1, f1_interval, "a", "circle", 11),
        (exact_match, exact_match_interval, "b", "diamond", 25),
    ):
        if interval:
            parts.append(
                f'<line class="whisker {style}" x1="{interval[0]:.2f}%" y1="{height}" x2="{interval[1]:.2f}%" y2="{height}"/>'
            )
        drawn = mark(marker, 0, 0, style if interval else f"{style} few")
        parts.append(f'<svg x="{value:.2f}%" y="{height}" overflow="visible">{drawn}</svg>')
    return Markup('<svg class="strip" width="100%" height="36" aria-hidden="true">{}</svg>').format(
        Markup("".join(parts))  # noqa: S704 - numbers and our own words
    )


def strip_axis() -> Markup:
    """The scale of ``strip``: 0, 50 and 100 percent."""
    labels = "".join(
        f'<text class="tick {anchor}" x="{t}%" y="12" text-anchor="{anchor}">{t}</text>'
        for t, anchor in ((0, "start"), (50, "middle"), (100, "end"))
    )
    return Markup('<svg class="strip" width="100%" height="16" aria-hidden="true">{}</svg>').format(Markup(labels))  # noqa: S704


def facts_charts(facts: RunFacts) -> dict[str, Markup]:
    """The drawn charts by name: loss, scores, reliability."""
    return {
        "loss": curves(loss_series(facts.epochs), facts.best_epoch, "loss", "Loss by epoch"),
        "scores": curves(score_series(facts.epochs), facts.best_epoch, "percent", "Dev scores by epoch"),
        "reliability": reliability(facts.calibration, "Confidence against exact match"),
    }
