"""What ``bench --out`` writes: bench.json, bench.html and bench.png."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from qadeploy.bench import table
from qadeploy.errors import InputError
from qadeploy.files import write_bytes, write_json, write_text
from qadeploy.reports import figures
from qadeploy.reports.page import render

_TEMPLATE = Path(__file__).with_name("bench.html.j2")
_REPORT = "bench.json"
_PLOT = "F1 against the latency of one question, one dot per variant"
_FILES = (_REPORT, "bench.html", "bench.png")


def require_own(folder: Path) -> None:
    """Raises InputError if ``folder`` is a file, or ``write`` would overwrite a file in it that is not from an earlier report."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: is a file, but --out names a folder for {', '.join(_FILES)}")
    there = [name for name in _FILES if os.path.lexists(folder / name)]
    if not there:
        return
    try:
        found = json.loads((folder / _REPORT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    if not (isinstance(found, dict) and {"variants", "workload", "environment"} <= found.keys()):
        raise InputError(
            f"{folder}: {', '.join(there)} would be overwritten, but this is no report of bench: give another --out"
        )


def write(report: Mapping[str, Any], folder: Path) -> list[Path]:
    """Writes the report into ``folder`` and returns the files; if no variant ran, there is no plot.

    Everything is drawn before the first file is written, and no file is written partly.
    """
    page = bench_page(report)
    picture = _picture(report) if _dots(report) else None
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / _REPORT, report)
    write_text(folder / "bench.html", page)
    files = [folder / _REPORT, folder / "bench.html"]
    if picture:
        write_bytes(folder / "bench.png", picture)
        files.append(folder / "bench.png")
    return files


def bench_page(report: Mapping[str, Any]) -> str:
    """The report as one self-contained page, which has no scripts and loads nothing."""
    found = _dots(report)
    against = next((v["peer"] for v in report["variants"] if v["name"] == report["speedup_against"]), "")
    return render(
        _TEMPLATE,
        report=report,
        first=report["variants"][0],
        numbers={v["name"]: n for n, v in enumerate(found, 1)},
        drawn=figures.svg(_PLOT, lambda figure: draw_plot(figure.subplots(), report), 330) if found else None,
        baseline="pipeline" if against == "pipeline" else "baseline",
        caption=_caption(report),
        legend=table.legend(report),
        limits=table.limit_lines(report),
        configuration=_configuration(report),
    )


def _configuration(report: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Tables of names and values: the machine, the versions, the workload and the bundles."""
    found = report["environment"]
    machine = {
        "CPU": found["cpu"]["model"],
        "instruction sets": ", ".join(found["cpu"]["features"]) or None,
        "threads": found["threads"],
        "device": found["device"],
        "memory": f"{found['memory_gib']} GiB",
        "peak, int8": report["peak"] and f"{report['peak']['int8'] / 1e9:,.0f} G operations per second",
        "peak, fp32": report["peak"] and f"{report['peak']['fp32'] / 1e9:,.0f} G operations per second",
        "NVIDIA driver": found["nvidia_driver"],
    }
    versions = {
        "qadeploy": found["qadeploy"],
        "commit": found["commit"],
        "Python": found["python"],
        **{name: found["packages"][name] for name in table.shown_packages(report)},
    }
    workload = {
        "questions": report["workload"]["questions"],
        "of": report["workload"]["source"],
        "windows": report["workload"]["windows"],
        "rounds": report["rounds"],
        "date": report["date"],
    }
    bundles = {b["name"]: f"{b['precision']}, SHA-256 {b['sha256']}" for b in report["bundles"]}
    return {"Machine": machine, "Versions": versions, "Workload": workload, "Bundles": bundles}


# ---------------------------------------------------------------- the plot


def _dots(report: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The variants that ran, in the report's order: a dot's number is its place here, from 1."""
    return [v for v in report["variants"] if v["status"] == "ok"]


def draw_plot(axes: Any, report: Mapping[str, Any]) -> None:
    """Draws F1 with its 95 % interval over latency; our bundles and peers differ in colour and marker."""
    for number, v in enumerate(_dots(report), 1):
        colour, marker = ("C1", "D") if v["peer"] else ("C0", "o")
        x, f1 = v["latency_ms"]["p50"], v["f1"]
        axes.vlines([x], *v["f1_interval"], colour, alpha=0.75)
        axes.plot([x], [f1], color=colour, marker=marker, linestyle="", label=f"{number}  {v['name']}")
        axes.annotate(str(number), (x, f1), textcoords="offset points", xytext=(6, 5))
    axes.set_xlim(left=0)
    axes.set(xlabel="ms per question (median)", ylabel="F1 (%)")


def _picture(report: Mapping[str, Any]) -> bytes:
    """The plot as a PNG picture with a title and a legend."""

    def draw_all(figure: Figure) -> None:
        axes = figure.subplots()
        draw_plot(axes, report)
        axes.set_title(_caption(report))
        figure.legend(loc="outside lower center", fontsize="small")

    return figures.png(draw_all, (9, 5))


def _caption(report: Mapping[str, Any]) -> str:
    """What is plotted, in one line."""
    found = report["environment"]
    return f"{report['workload']['questions']} questions; {found['cpu']['model']}, {found['threads']} threads"
