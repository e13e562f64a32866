"""Shared by the benchmarks: environment facts, reports as JSON, medians with their range, tables between markers."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from qadeploy.errors import QadeployError
from qadeploy.files import write_json
from qadeploy.inference.bundle import open_bundle
from qadeploy.inference.doctor import diagnose

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
Json = dict[str, Any]


def report(**facts: Any) -> Json:
    """``facts`` with the date, the environment and the load average; an ``environment`` in ``facts`` adds to it.

    The environment's ``threads`` are the CPUs of this process, unless ``facts`` give another number.
    """
    own = {"threads": len(os.sched_getaffinity(0)), "load_average": os.getloadavg()[0]}
    environment = {**diagnose(), **own, **facts.pop("environment", {})}
    return {"date": time.strftime("%Y-%m-%d", time.gmtime()), "environment": environment, **facts}


def write_report(path: Path, found: Json) -> None:
    """Writes a report, and creates its folder if needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, found)


def bundle_facts(folder: str | Path) -> Json:
    """A bundle's name, precision and hash."""
    bundle = open_bundle(folder)
    return {"name": bundle.name, "precision": bundle.precision, "sha256": bundle.hash}


def spread(values: Sequence[float], digits: int | None = None) -> dict[str, float]:
    """Median, minimum and maximum."""
    found = {"median": statistics.median(values), "least": min(values), "most": max(values)}
    return found if digits is None else {name: round(value, digits) for name, value in found.items()}


def ranged(values: Json, digits: int = 2) -> str:
    """The values of ``spread`` as text."""
    return f"{values['median']:.{digits}f} ({values['least']:.{digits}f} to {values['most']:.{digits}f})"


def where_measured(environment: Json, *packages: str) -> str:
    """CPU, threads, the versions of ONNX Runtime and ``packages``, and the commit, as text below a table."""
    versions = environment["packages"]
    shown = [f"ONNX Runtime {versions['onnxruntime'] or versions['onnxruntime-gpu']}"]
    shown += [f"{name} {versions[name]}" for name in packages]
    return f"{environment['cpu']['model']}, {environment['threads']} threads, {', '.join(shown)}, commit {environment['commit']}"


def read_report(name: str) -> Json:
    """A report in ``benchmarks/results``."""
    found: Json = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    return found


def write_table(document: str, marker: str, lines: Sequence[str], *, check: bool) -> None:
    """Prints lines, and puts them between the ``marker`` comments of a document of the repository.

    With ``check`` nothing is written: raises ClickException if the document would change.
    """
    path = ROOT / document
    text = path.read_text(encoding="utf-8")
    begin, end = f"<!-- {marker}: begin -->", f"<!-- {marker}: end -->"
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    new = before + "\n".join([begin, *lines, end]) + after
    if check and new != text:
        raise click.ClickException(f"{document}: its {marker} do not match benchmarks/results")
    if not check:
        path.write_text(new, encoding="utf-8")
    click.echo("\n".join(lines))


def run(command: Callable[[], object]) -> None:
    """Runs a benchmark's command; an error of qadeploy ends it with one line."""
    try:
        command()
    except QadeployError as error:
        raise SystemExit(f"Error: {error}") from error
