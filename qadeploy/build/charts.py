"""The report's charts as inline SVG. Colours are classes: the page's style sheet knows light, dark and paper."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from qadeploy.build.run_report import Calibration, Epoch, RunFacts, wilson_interval

WIDTH = 440
_LEFT, _RIGHT, _TOP = 46, 12, 20


@dataclass(frozen=True, slots=True)
class Series:
    """A line of a chart: its name, the class that colours and dashes it, its marker, its points (x, y)."""

    name: str
    style: str
    marker: str
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True, slots=True)
class Plot:
    """A plotting area: what it spans in data and in SVG units, its ticks, and its texts."""

    x_range: tuple[float, float]
    y_range: tuple[float, float]
    height: float

    def x(self, value: float) -> float:
        """SVG x of a value."""
        low, high = self.x_range
        return _LEFT + (value - low) / (high - low) * (WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        """SVG y of a value."""
        low, high = self.y_range
        return _TOP + (high - value) / (high - low) * self.height


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
    y_ticks = _ticks(min(values), max(values), 5)
    plot = Plot((0.0, last), (y_ticks[0], y_ticks[-1]), 206)
    bottom = _TOP + plot.height
    at = plot.x(best)
    parts = [
        _frame(plot, [t for t in _ticks(0, last, 8, whole=True) if t <= last], y_ticks, _number, _number),
        f'<line class="best" x1="{at:.1f}" y1="{_TOP}" x2="{at:.1f}" y2="{bottom}"/>',
        _text(at, _TOP - 9, "kept", "said", "middle"),
    ]
    for line in series:
        places = [(plot.x(x), plot.y(y)) for x, y in line.points]
        joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline class="line {line.style}" points="{joined}"/>')
        parts += [
            _mark(line.marker, x, y, line.style, f"epoch {value[0]:.0f}: {line.name} {value[1]:.3f}")
            for (x, y), value in zip(places, line.points, strict=True)
        ]
    return _svg(title, bottom + 44, [*parts, _titles(plot, "epoch", y_title)])


def swatch(style: str, marker: str) -> Markup:
    """A short piece of a line with its marker, for a legend."""
    body = f'<line class="line {style}" x1="1" y1="8" x2="31" y2="8"/>{_mark(marker, 16, 8, style)}'
    return Markup('<svg class="swatch" width="32" height="16" aria-hidden="true">{}</svg>').format(Markup(body))  # noqa: S704


def key(style: str, marker: str) -> Markup:
    """A marker alone, for the head of a column."""
    return Markup('<svg class="swatch" width="12" height="12" aria-hidden="true">{}</svg>').format(
        Markup(_mark(marker, 6, 6, style))  # noqa: S704
    )


def reliability(calibration: Calibration, title: str) -> Markup:
    """Confidence against the share of exactly right answers, in percent, over a histogram of the confidences."""
    plot = Plot((0, 100), (0, 100), 250)
    bottom = _TOP + plot.height
    ticks = [0.0, 20.0, 40.0, 60.0, 80.0, 100.0]
    most = max((b.count for b in calibration.bins), default=0) or 1
    floor, tall = bottom + 106, 48
    parts = [
        _frame(plot, ticks, ticks, _number, _number),
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
        parts.append(_mark("circle", x, y, "a", said))
        left, right = plot.x(100 * group.low) + 2, plot.x(100 * group.high) - 2
        rise = max(1.0, tall * group.count / most)
        parts.append(
            f'<rect class="bar" x="{left:.1f}" y="{floor - rise:.1f}" width="{right - left:.1f}" height="{rise:.1f}">'
            f"<title>{said}</title></rect>"
        )
        parts.append(_text((left + right) / 2, floor - rise - 4, f"{group.count:,}", "said", "middle"))
    parts += [
        f'<line class="axis" x1="{_LEFT}" y1="{floor}" x2="{WIDTH - _RIGHT}" y2="{floor}"/>',
        _text((_LEFT + WIDTH - _RIGHT) / 2, floor + 17, "answers at that confidence", "label", "middle"),
        _titles(plot, "confidence (%)", "exactly right (%)"),
    ]
    return _svg(title, floor + 24, parts)


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
        mark = _mark(marker, 0, 0, style if interval else f"{style} few")
        parts.append(f'<svg x="{value:.2f}%" y="{height}" overflow="visible">{mark}</svg>')
    return Markup('<svg class="strip" width="100%" height="36" aria-hidden="true">{}</svg>').format(
        Markup("".join(parts))  # noqa: S704 - numbers and our own words
    )


def strip_axis() -> Markup:
    """The scale of ``strip``: 0, 50 and 100 percent."""
    ticks = "".join(
        f'<text class="tick {anchor}" x="{t}%" y="12" text-anchor="{anchor}">{t}</text>'
        for t, anchor in ((0, "start"), (50, "middle"), (100, "end"))
    )
    return Markup('<svg class="strip" width="100%" height="16" aria-hidden="true">{}</svg>').format(Markup(ticks))  # noqa: S704


def facts_charts(facts: RunFacts) -> dict[str, Markup]:
    """The drawn charts by name: loss, scores, reliability."""
    return {
        "loss": curves(loss_series(facts.epochs), facts.best_epoch, "loss", "Loss by epoch"),
        "scores": curves(score_series(facts.epochs), facts.best_epoch, "percent", "Dev scores by epoch"),
        "reliability": reliability(facts.calibration, "Confidence against exact match"),
    }


# ---------------------------------------------------------------- pieces of SVG


def _svg(title: str, height: float, parts: Sequence[str]) -> Markup:
    return Markup('<svg class="chart" viewBox="0 0 {} {:.0f}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH,
        height,
        title,
        Markup("".join(parts)),  # noqa: S704 - numbers and our own words; texts went through escape
    )


def _frame(
    plot: Plot,
    x_ticks: Sequence[float],
    y_ticks: Sequence[float],
    x_name: Callable[[float], str],
    y_name: Callable[[float], str],
) -> str:
    bottom, right = _TOP + plot.height, WIDTH - _RIGHT
    parts = []
    for tick in y_ticks:
        parts.append(f'<line class="grid" x1="{_LEFT}" y1="{plot.y(tick):.1f}" x2="{right}" y2="{plot.y(tick):.1f}"/>')
        parts.append(_text(_LEFT - 7, plot.y(tick) + 4, y_name(tick), "tick", "end"))
    parts += [_text(plot.x(tick), bottom + 17, x_name(tick), "tick", "middle") for tick in x_ticks]
    parts.append(f'<line class="axis" x1="{_LEFT}" y1="{bottom}" x2="{right}" y2="{bottom}"/>')
    return "".join(parts)


def _titles(plot: Plot, x_title: str, y_title: str) -> str:
    middle = _TOP + plot.height / 2
    return _text((_LEFT + WIDTH - _RIGHT) / 2, _TOP + plot.height + 36, x_title, "label", "middle") + _text(
        11, middle, y_title, "label", "middle", turn=-90
    )


def _text(x: float, y: float, text: str, style: str, anchor: str, turn: float = 0) -> str:
    turned = f' transform="rotate({turn:.1f} {x:.1f} {y:.1f})"' if turn else ""
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{turned}>{escape(text)}</text>'


_SHAPES = {
    "circle": "M-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0-9 0z",
    "square": "M-4-4h8v8h-8z",
    "diamond": "M0-5.5 5.5 0 0 5.5-5.5 0z",
    "triangle": "M0-5.2 5.2 4-5.2 4z",
}


def _mark(shape: str, x: float, y: float, style: str, said: str = "") -> str:
    title = f"<title>{escape(said)}</title>" if said else ""
    return f'<path class="mark {style}" transform="translate({x:.1f} {y:.1f})" d="{_SHAPES[shape]}">{title}</path>'


def _ticks(low: float, high: float, count: int, *, whole: bool = False) -> list[float]:
    from matplotlib.ticker import MaxNLocator

    if high == low:
        low, high = (low - 1, high) if low >= 1 else (low, high + 1)  # a percentage stays within 0 to 100
    found = MaxNLocator(nbins=count, steps=[1, 2, 2.5, 5, 10], integer=whole).tick_values(low, high)
    return [float(t) for t in found]


def _number(value: float) -> str:
    return f"{value:g}"
