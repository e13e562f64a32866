"""How the windows of one question run soonest: side by side on one thread each, one by one on all, both, or as a batch.

    python benchmarks/layout.py bundles/handbook-int8 benchmarks/results/layout.json

Windows of one length and random tokens through bare sessions with the bundle's settings, the ways in turn. A round counts only
if other processes took less than ``--others`` of the machine meanwhile (from /proc/stat), so that it may
take a while on one that is shared. The speedup of a wide run gives Amdahl's parallel share, ``PARALLEL_SHARE`` of
``qadeploy/inference/layout.py``.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
import numpy as np

from qadeploy.errors import QadeployError
from qadeploy.files import write_json
from qadeploy.inference.bundle import MODEL, Bundle, open_bundle
from qadeploy.inference.doctor import diagnose
from qadeploy.inference.layout import SessionSettings
from qadeploy.inference.session import onnxruntime, usable_cpus

LENGTHS, COUNTS = (64, 175, 384), (1, 2, 3, 4, 5)


@click.command(help=__doc__)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--rounds", default=9, show_default=True, type=click.IntRange(min=1), help="Undisturbed rounds of each.")
@click.option("--others", default=0.1, show_default=True, type=float, help="Share of the machine others may take.")
@click.option("--minutes", default=10.0, show_default=True, type=float, help="Time to wait for undisturbed rounds.")
def main(bundle: Path, out: Path, rounds: int, others: float, minutes: float) -> None:
    """Measures, prints the figures and writes the JSON."""
    threads, opened = usable_cpus(), open_bundle(bundle)
    wide, narrow = _session(opened, threads), _session(opened, 1)
    names = [i.name for i in wide.get_inputs()]
    random = np.random.default_rng(0)
    rows = []
    until = time.monotonic() + 60 * minutes
    with ThreadPoolExecutor(threads) as pool:
        for length in LENGTHS:
            for count in COUNTS:
                ids = random.integers(1000, 20_000, (count, length))
                batch = {name: ids if name == "input_ids" else np.zeros_like(ids) for name in names}
                if "attention_mask" in batch:
                    batch["attention_mask"] = np.ones_like(ids)
                feeds = [{name: values[i : i + 1] for name, values in batch.items()} for i in range(count)]
                full = count - count % threads
                ways: dict[str, Callable[[], object]] = {
                    "wide": lambda feeds=feeds: [wide.run(None, f) for f in feeds],  # type: ignore[misc]
                    "narrow": lambda feeds=feeds: list(pool.map(lambda f: narrow.run(None, f), feeds)),  # type: ignore[misc]
                    "full rounds narrow, the rest wide": lambda feeds=feeds, full=full: (  # type: ignore[misc]
                        list(pool.map(lambda f: narrow.run(None, f), feeds[:full])),
                        [wide.run(None, f) for f in feeds[full:]],
                    ),
                    "one batch, wide": lambda batch=batch: wide.run(None, batch),  # type: ignore[misc]
                }
                found: dict[str, list[float]] = {name: [] for name in ways}
                while min(map(len, found.values())) < rounds and time.monotonic() < until:
                    for name, work in ways.items():
                        milliseconds, share = _undisturbed(work, threads)
                        if share < others:
                            found[name].append(milliseconds)
                figures = {
                    k: {"median": statistics.median(v), "least": min(v), "rounds": len(v)}
                    for k, v in found.items()
                    if v
                }
                rows.append({"tokens": length, "windows": count, "milliseconds": figures})
                shown = ", ".join(f"{k} {v['median']:.1f} ({v['rounds']})" for k, v in figures.items())
                click.echo(f"{count} x {length} tokens: {shown or 'never undisturbed'}")
    report: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "environment": {**diagnose(), "threads": threads, "load_average": os.getloadavg()[0]},
        "bundle": {"name": bundle.name, "sha256": opened.hash},
        "others_at_most": others,
        "rows": rows,
        "parallel_share": _parallel_shares(rows, threads),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, report)
    click.echo(f"parallel share of a wide run by length: {report['parallel_share']}")


def _session(bundle: Bundle, threads: int) -> Any:
    settings = SessionSettings.from_manifest(bundle.manifest.get("session"))
    ort = onnxruntime()
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    for name, value in settings.config.items():
        options.add_session_config_entry(name, value)
    return ort.InferenceSession(
        bundle.read(MODEL),
        options,
        providers=["CPUExecutionProvider"],
        disabled_optimizers=list(settings.disabled_optimizers) or None,
    )


def _undisturbed(work: Callable[[], object], threads: int) -> tuple[float, float]:
    """Milliseconds of several runs' mean, and the share of the machine that others took meanwhile."""
    work()
    busy, own, started = _busy(), time.process_time(), time.perf_counter()
    times = 0
    while time.perf_counter() - started < 0.2:  # /proc/stat counts in steps of 10 ms
        work()
        times += 1
    seconds = time.perf_counter() - started
    foreign = _busy() - busy - (time.process_time() - own)
    return 1000 * seconds / times, max(foreign, 0.0) / (seconds * threads)


def _busy() -> float:
    """CPU seconds that all processes took since the machine started, stolen ones too."""
    user, nice, system, _, _, irq, soft, steal, *_ = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:])
    return (user + nice + system + irq + soft + steal) / os.sysconf("SC_CLK_TCK")


def _parallel_shares(rows: list[dict[str, Any]], threads: int) -> dict[str, float]:
    """By length: p of s = 1 / (1 - p + p / threads), s the speedup of one window wide against narrow."""
    shares = {}
    for row in rows:
        figures = row["milliseconds"]
        if row["windows"] == 1 and {"wide", "narrow"} <= set(figures) and threads > 1:
            inverse = figures["wide"]["median"] / figures["narrow"]["median"]
            shares[str(row["tokens"])] = (1 - inverse) / (1 - 1 / threads)
    return shares


if __name__ == "__main__":
    try:
        main()
    except QadeployError as error:
        raise SystemExit(f"Error: {error}") from error
