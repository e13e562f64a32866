"""Latency against F1, one dot a variant: as SVG for the page and as a PNG file."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from qadeploy.reports import svg

X_TITLE, Y_TITLE = "ms for one question (median)", "F1 (%)"
OURS, PEER = ("a", "circle"), ("b", "square")


def dots(report: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The variants that ran, in the report's order: a dot's number is its place here, from 1."""
    return [v for v in report["variants"] if v["status"] == "ok"]


def style(variant: Mapping[str, Any]) -> tuple[str, str]:
    """Colour class and marker: bundles of ours and peers differ in both."""
    return PEER if variant["peer"] else OURS


def drawing(report: Mapping[str, Any]) -> Markup:
    """The plot as SVG: F1 with its 95 % interval over latency, numbered dots."""
    found = dots(report)
    x_ticks = svg.ticks(0, max(v["latency_ms"]["p50"] for v in found), 6)
    low, high = min(v["f1_interval"][0] for v in found), max(v["f1_interval"][1] for v in found)
    y_ticks = svg.ticks(low, high, 5)
    plot = svg.Plot((x_ticks[0], x_ticks[-1]), (y_ticks[0], y_ticks[-1]), 260)
    parts = [svg.frame(plot, x_ticks, y_ticks, svg.number, svg.number)]
    for number, v in enumerate(found, 1):
        colour, marker = style(v)
        x, y = plot.x(v["latency_ms"]["p50"]), plot.y(v["f1"])
        bottom, top = (plot.y(bound) for bound in v["f1_interval"])
        parts.append(f'<line class="whisker {colour}" x1="{x:.1f}" y1="{bottom:.1f}" x2="{x:.1f}" y2="{top:.1f}"/>')
        parts.append(
            svg.mark(marker, x, y, colour, f"{number}: {v['name']}: {v['latency_ms']['p50']:.1f} ms, F1 {v['f1']:.1f}")
        )
        parts.append(svg.words(x + 8, y - 7, str(number), "label", "start"))
    return svg.drawing(
        "F1 against the latency of one question, a dot a variant",
        svg.TOP + plot.height + 44,
        [*parts, svg.titles(plot, X_TITLE, Y_TITLE)],
    )


def png(report: Mapping[str, Any]) -> bytes:
    """The same plot as a PNG picture with a legend."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), dpi=120, layout="constrained")
    axes = figure.subplots()
    found = dots(report)
    for number, v in enumerate(found, 1):
        ours = style(v) == OURS
        x, f1 = v["latency_ms"]["p50"], v["f1"]
        below, above = f1 - v["f1_interval"][0], v["f1_interval"][1] - f1
        axes.errorbar(
            [x],
            [f1],
            yerr=[[max(0.0, below)], [max(0.0, above)]],
            fmt="o" if ours else "s",
            color="#1a5ca6" if ours else "#b0420c",
            capsize=3,
            label=f"{number}  {v['name']}",
        )
        axes.annotate(str(number), (x, f1), textcoords="offset points", xytext=(6, 5))
    axes.set_xlim(left=0)
    axes.set(xlabel=X_TITLE, ylabel=Y_TITLE, title=caption(report))
    axes.grid(alpha=0.3)
    figure.legend(*_legend(axes), loc="outside lower center", fontsize="small")
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    return stream.getvalue()


def caption(report: Mapping[str, Any]) -> str:
    """What is plotted, in one line."""
    found = report["environment"]
    return f"{report['workload']['questions']} questions; {found['cpu']['model']}, {found['threads']} threads"


def _legend(axes: Any) -> tuple[Sequence[Any], Sequence[str]]:
    handles, labels = axes.get_legend_handles_labels()
    return handles, labels
