"""Figures drawn by matplotlib: as SVG for a page with light and dark colours, and as PNG."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import Any

from cycler import cycler
from markupsafe import Markup
from matplotlib import style
from matplotlib.figure import Figure

# The light colours of report.css. In a page each becomes the CSS variable of that name, which dark mode redefines.
COLOURS = {
    "text": "#1b1e23", "muted": "#565d67", "grid": "#e7e9ed", "card": "#ffffff",
    "a": "#1a5ca6", "b": "#b0420c", "c": "#0a6e5c", "bar": "#8fa9c9",
}  # fmt: skip
_WIDTH = 440  # of an SVG figure, in its own units
_STYLE = {
    **dict.fromkeys(("axes.edgecolor", "text.color", "xtick.color", "ytick.color"), COLOURS["muted"]),
    **dict.fromkeys(("axes.labelcolor", "legend.labelcolor"), COLOURS["text"]),
    **dict.fromkeys(("axes.facecolor", "figure.facecolor", "svg.fonttype"), "none"),
    **dict.fromkeys(("axes.spines.left", "axes.spines.right", "axes.spines.top", "legend.frameon"), False),
    **dict.fromkeys(("axes.xmargin", "axes.ymargin", "xtick.major.size", "ytick.major.size"), 0),
    "axes.autolimit_mode": "round_numbers",
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.labelpad": 6,
    "axes.prop_cycle": cycler(color=[COLOURS[c] for c in "abc"], marker=["o", "D", "^"], linestyle=["-", "--", ":"]),
    "grid.color": COLOURS["grid"],
    "lines.linewidth": 2.25,
    "lines.markeredgecolor": COLOURS["card"],
    "lines.markersize": 8,
    "text.parse_math": False,
    "xtick.major.pad": 6,
    "ytick.major.pad": 8,
}


def svg(title: str, draw: Callable[[Figure], None], height: int) -> Markup:
    """Returns a figure as inline SVG that takes its font and colours from the page.

    Args:
        title: The text for screen readers. The ids in a page are unique if the titles are.
        draw: Draws into the empty figure.
        height: The height, in units in which the figure is 440 wide.
    """
    stream = io.StringIO()
    # Room for the largest letters that report.css sets, on a narrow screen.
    with style.context(["default", _STYLE, {"font.size": 14, "svg.hashsalt": title}]):
        figure = Figure((_WIDTH / 72, height / 72), layout="constrained")
        draw(figure)
        figure.savefig(stream, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    body = stream.getvalue().partition("<svg ")[2].partition(">")[2]
    for pattern, replacement in (
        (r"<defs>\s*<style.*?</defs>", ""),  # it would style the whole page
        (r'<g id="[^"]*"', "<g"),
        (r'font[\w-]*: [^;"]*(; |(?="))', ""),
        ("xlink:href", "href"),
        *((colour, f"var(--{name})") for name, colour in COLOURS.items()),
    ):
        body = re.sub(pattern, replacement, body, flags=re.DOTALL)
    start = Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">').format(_WIDTH, height, title)
    return start + Markup(body)  # noqa: S704 - matplotlib escapes texts


def png(draw: Callable[[Figure], None], size: tuple[float, float]) -> bytes:
    """Returns a figure of ``size`` inches as a PNG picture."""
    stream = io.BytesIO()
    with style.context(["default", _STYLE]):
        figure = Figure(size, dpi=120, facecolor="white", layout="constrained")
        draw(figure)
        figure.savefig(stream, format="png")
    return stream.getvalue()


def legend_above(axes: Any, columns: int) -> None:
    """Puts the legend above the axes and above the labels on their top edge."""
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.12), borderaxespad=0, ncols=columns, handlelength=2.2)
