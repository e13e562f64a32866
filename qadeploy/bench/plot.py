"""F1 against latency, one numbered dot per variant: as SVG for the page and as a PNG picture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup
from matplotlib.figure import Figure

from qadeploy.reports import figures


def dots(report: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Returns the variants that ran, in the report's order: a dot's number is its place here, from 1."""
    return [v for v in report["variants"] if v["status"] == "ok"]


def drawing(report: Mapping[str, Any]) -> Markup:
    """Returns the plot as SVG."""
    title = "F1 against the latency of one question, one dot per variant"
    return figures.svg(title, lambda figure: draw(figure.subplots(), report), 330)


def png(report: Mapping[str, Any]) -> bytes:
    """Returns the plot as a PNG picture with a title and a legend."""

    def draw_all(figure: Figure) -> None:
        axes = figure.subplots()
        draw(axes, report)
        axes.set_title(caption(report))
        figure.legend(loc="outside lower center", fontsize="small")

    return figures.png(draw_all, (9, 5))


def draw(axes: Any, report: Mapping[str, Any]) -> None:
    """Draws F1 with its 95 % interval over latency; our bundles and peers differ in colour and marker."""
    for number, v in enumerate(dots(report), 1):
        colour, marker = ("C1", "D") if v["peer"] else ("C0", "o")
        x, f1 = v["latency_ms"]["p50"], v["f1"]
        axes.vlines([x], *v["f1_interval"], colour, alpha=0.75)
        axes.plot([x], [f1], color=colour, marker=marker, linestyle="", label=f"{number}  {v['name']}")
        axes.annotate(str(number), (x, f1), textcoords="offset points", xytext=(6, 5))
    axes.set_xlim(left=0)
    axes.set(xlabel="ms per question (median)", ylabel="F1 (%)")


def caption(report: Mapping[str, Any]) -> str:
    """Returns what is plotted, in one line."""
    found = report["environment"]
    return f"{report['workload']['questions']} questions; {found['cpu']['model']}, {found['threads']} threads"
