"""Pieces of inline SVG that the reports' charts are made of. Colours are classes: the page's style sheet knows light, dark and paper."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH = 440
LEFT, RIGHT, TOP = 46, 12, 20


@dataclass(frozen=True, slots=True)
class Plot:
    """A plotting area: what it spans in data and in SVG units, its ticks, and its texts."""

    x_range: tuple[float, float]
    y_range: tuple[float, float]
    height: float

    def x(self, value: float) -> float:
        """SVG x of a value."""
        low, high = self.x_range
        return LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        """SVG y of a value."""
        low, high = self.y_range
        return TOP + (high - value) / (high - low) * self.height


def swatch(style: str, marker: str) -> Markup:
    """A short piece of a line with its marker, for a legend."""
    body = f'<line class="line {style}" x1="1" y1="8" x2="31" y2="8"/>{mark(marker, 16, 8, style)}'
    return Markup('<svg class="swatch" width="32" height="16" aria-hidden="true">{}</svg>').format(Markup(body))  # noqa: S704


def key(style: str, marker: str) -> Markup:
    """A marker alone, for the head of a column."""
    return Markup('<svg class="swatch" width="12" height="12" aria-hidden="true">{}</svg>').format(
        Markup(mark(marker, 6, 6, style))  # noqa: S704
    )


def drawing(title: str, height: float, parts: Sequence[str]) -> Markup:
    """A chart of ``WIDTH`` by ``height`` units from its parts; ``title`` is what a screen reader says."""
    return Markup('<svg class="chart" viewBox="0 0 {} {:.0f}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH,
        height,
        title,
        Markup("".join(parts)),  # noqa: S704 - numbers and our own words; texts went through escape
    )


def frame(
    plot: Plot,
    x_ticks: Sequence[float],
    y_ticks: Sequence[float],
    x_name: Callable[[float], str],
    y_name: Callable[[float], str],
) -> str:
    """Grid lines, tick labels by ``x_name`` and ``y_name``, and the axis below."""
    bottom, right = TOP + plot.height, WIDTH - RIGHT
    parts = []
    for tick in y_ticks:
        parts.append(f'<line class="grid" x1="{LEFT}" y1="{plot.y(tick):.1f}" x2="{right}" y2="{plot.y(tick):.1f}"/>')
        parts.append(words(LEFT - 7, plot.y(tick) + 4, y_name(tick), "tick", "end"))
    parts += [words(plot.x(tick), bottom + 17, x_name(tick), "tick", "middle") for tick in x_ticks]
    parts.append(f'<line class="axis" x1="{LEFT}" y1="{bottom}" x2="{right}" y2="{bottom}"/>')
    return "".join(parts)


def titles(plot: Plot, x_title: str, y_title: str) -> str:
    """What the axes count."""
    middle = TOP + plot.height / 2
    return words((LEFT + WIDTH - RIGHT) / 2, TOP + plot.height + 36, x_title, "label", "middle") + words(
        11, middle, y_title, "label", "middle", turn=-90
    )


def words(x: float, y: float, text: str, style: str, anchor: str, turn: float = 0) -> str:
    """A text at a place; ``style`` is its class, ``turn`` degrees."""
    turned = f' transform="rotate({turn:.1f} {x:.1f} {y:.1f})"' if turn else ""
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{turned}>{escape(text)}</text>'


_SHAPES = {
    "circle": "M-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0-9 0z",
    "square": "M-4-4h8v8h-8z",
    "diamond": "M0-5.5 5.5 0 0 5.5-5.5 0z",
    "triangle": "M0-5.2 5.2 4-5.2 4z",
}


def mark(shape: str, x: float, y: float, style: str, said: str = "") -> str:
    """A marker at a place; ``said`` is what it shows under the pointer."""
    title = f"<title>{escape(said)}</title>" if said else ""
    return f'<path class="mark {style}" transform="translate({x:.1f} {y:.1f})" d="{_SHAPES[shape]}">{title}</path>'


def ticks(low: float, high: float, count: int, *, whole: bool = False) -> list[float]:
    """About ``count`` round numbers that span ``low`` to ``high``."""
    from matplotlib.ticker import MaxNLocator

    if high == low:
        low, high = (low - 1, high) if low >= 1 else (low, high + 1)  # a percentage stays within 0 to 100
    found = MaxNLocator(nbins=count, steps=[1, 2, 2.5, 5, 10], integer=whole).tick_values(low, high)
    return [float(t) for t in found]


def number(value: float) -> str:
    """A number without needless zeros."""
    return f"{value:g}"
