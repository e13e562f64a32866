"""Seconds of the features step: without the cache, on a first run that fills it, and on a second that finds it.

    python benchmarks/features_cache.py SQUAD.json benchmarks/results/features_cache.json

The base model's tokenizer and limits, all questions of the file, the variants in turn, a fresh encoder for
each. CPU seconds of all threads stand beside those of the clock, for a machine that is not idle.
"""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import click

from qadeploy.core.windows import Encoder, EncoderConfig
from qadeploy.data.readers import hash_examples, read
from qadeploy.errors import QadeployError
from qadeploy.files import write_json
from qadeploy.inference.doctor import diagnose
from qadeploy.shipped import base_model_path
from qadeploy.training.checkpoint import load_checkpoint
from qadeploy.training.feature_cache import Part, cached_features

VARIANTS = ("no cache", "first run", "second run")


@click.command(help=__doc__)
@click.argument("data")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--rounds", default=7, show_default=True, type=click.IntRange(min=1))
def main(data: str, out: Path, rounds: int) -> None:
    """Measures, prints the figures and writes the JSON."""
    examples = read(data).examples
    base = load_checkpoint(base_model_path())
    tokenizer, config, settings = base_model_path() / "tokenizer.json", base.encoder.config, base.settings
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in VARIANTS}
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary) / "cache"
        for _ in range(rounds):
            shutil.rmtree(place, ignore_errors=True)
            for name in VARIANTS:
                encoder = Encoder.from_file(tokenizer, EncoderConfig.from_dict(config.to_dict()))
                started = time.perf_counter(), time.process_time()
                folder = None if name == "no cache" else place
                made = cached_features([Part(examples, data)], encoder, settings, folder, _fail)
                seconds[name].append((time.perf_counter() - started[0], time.process_time() - started[1]))
                if made.found != (name == "second run"):
                    raise SystemExit(f"{name}: the cache was not what it should be")
        size = sum(path.stat().st_size for path in place.iterdir())
    figures: dict[str, dict[str, Any]] = {
        name: {
            "median_seconds": statistics.median(clock for clock, _ in found),
            "range_seconds": [min(clock for clock, _ in found), max(clock for clock, _ in found)],
            "median_cpu_seconds": statistics.median(cpu for _, cpu in found),
        }
        for name, found in seconds.items()
    }
    last = figures["second run"]
    for figure in figures.values():
        figure["times_the_second_run"] = figure["median_seconds"] / last["median_seconds"]
        figure["times_the_second_run_by_cpu"] = figure["median_cpu_seconds"] / last["median_cpu_seconds"]
    report = {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "environment": {**diagnose(), "load_average": os.getloadavg()[0]},
        "data": Path(data).name,
        "data_sha256": hash_examples(examples),
        "questions": len(examples),
        "windows": len(made.sets[0]),
        "max_seq_len": settings.max_seq_len,
        "doc_stride": settings.doc_stride,
        "entry_bytes": size,
        "rounds": rounds,
        "variants": figures,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, report)
    for name, figure in figures.items():
        click.echo(
            f"{name:<11} {figure['median_seconds']:6.3f} s ({figure['times_the_second_run']:.1f} x), "
            f"{figure['median_cpu_seconds']:6.3f} s of CPU ({figure['times_the_second_run_by_cpu']:.1f} x)"
        )
    click.echo(f"{len(examples)} questions, {report['windows']} windows, an entry of {size / 1e6:.1f} MB")


def _fail(line: str) -> None:
    raise SystemExit(line)


if __name__ == "__main__":
    try:
        main()
    except QadeployError as error:
        raise SystemExit(f"Error: {error}") from error
