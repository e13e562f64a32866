"""What ``bench --out`` writes: bench.json, bench.html and bench.png."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qadeploy.bench import plot, table
from qadeploy.errors import InputError
from qadeploy.files import write_bytes, write_json, write_text
from qadeploy.reports.page import render, value

_TEMPLATE = Path(__file__).with_name("bench.html.j2")
_REPORT = "bench.json"
_FILES = (_REPORT, "bench.html", "bench.png")


def require_own(folder: Path) -> None:
    """Raises InputError if ``write`` would overwrite a file in ``folder`` that is not from an earlier report."""
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
    picture = plot.png(report) if plot.dots(report) else None
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
    found = plot.dots(report)
    against = next((v["peer"] for v in report["variants"] if v["name"] == report["speedup_against"]), "")
    return render(
        _TEMPLATE,
        report=report,
        first=report["variants"][0],
        numbers={v["name"]: n for n, v in enumerate(found, 1)},
        drawn=plot.drawing(report) if found else None,
        baseline="pipeline" if against == "pipeline" else "baseline",
        caption=plot.caption(report),
        legend=table.legend(report),
        limits=table.limit_lines(report),
        configuration=_configuration(report),
    )


def _configuration(report: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
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
    tables = {"Machine": machine, "Versions": versions, "Workload": workload, "Bundles": bundles}
    return [(title, [(name, value(v)) for name, v in rows.items()]) for title, rows in tables.items()]
