"""Writes the README's tables from ``benchmarks/results``.

    python -m benchmarks.readme_table                                    rewrites the tables
    python -m benchmarks.readme_table runs/handbook bundles/handbook     first collects the figures of a run of the base that ships

The other results, ``handbook_bench.json`` and ``wikipedia_bench.json`` (the base model on articles that were held out
from its training, see ``models/minilm-l6-qa/README.md``), are written by ``qadeploy bench --out``.
"""

from __future__ import annotations

import json
from pathlib import Path

import click

from benchmarks.harness import RESULTS, Json, read_report, report, run, where_measured, write_report, write_table
from qadeploy.shipped import base_model_path

RUN = "handbook_run.json"
BENCHES = {
    "handbook_bench.json": "the handbook, fine-tuned model",
    "wikipedia_bench.json": "Wikipedia articles, base model",
}


def collect(run: Path, bundle: Path) -> Json:
    """The figures of a run and its bundles, as the content of results/handbook_run.json."""
    metrics = json.loads((run / "metrics.json").read_text())
    plain = json.loads((bundle / "manifest.json").read_text())
    record = json.loads((run / "run.json").read_text())
    checkpoints = (base_model_path(), run / "checkpoint")
    base, trained = ((folder / "model.safetensors").stat().st_size for folder in checkpoints)
    rows = [
        _row("base model, before fine-tuning", metrics["held_out_base"], base),
        _row("fine-tuned, PyTorch", plain["measured"]["pytorch"], trained),
    ]
    for suffix, name in (("", "ONNX fp32"), ("-fused", "ONNX fp32, fused graph"), ("-int8", "ONNX int8")):
        path = bundle.with_name(bundle.name + suffix) / "manifest.json"
        if path.is_file():
            manifest = json.loads(path.read_text())
            rows.append(_row(name, manifest["measured"], manifest["files"]["model.onnx"]["size"]))
    return report(run=record, epochs=metrics["epochs"], seconds=metrics["seconds"], rows=rows)


def _row(name: str, scores: Json, size: int) -> Json:
    kept = ("exact_match", "f1", "accuracy", "total", "exact_match_interval", "f1_interval", "accuracy_interval")
    return {"name": name, "size_bytes": size, **{key: scores[key] for key in kept}}


def run_table(found: Json) -> list[str]:
    """EM and F1 on the handbook's held-out questions, from the base model to int8."""
    lines = ["| on the handbook's held-out questions | size | EM | F1 (95 % interval) |", "|---|---|---|---|"]
    for row in found["rows"]:
        low, high = row["f1_interval"]
        size = f"{row['size_bytes'] / 1e6:.0f} MB"
        lines.append(
            f"| {row['name']} | {size} | {row['exact_match']:.1f} | {row['f1']:.1f} ({low:.1f} to {high:.1f}) |"
        )
    return lines


def bench_table(bench: Json, title: str) -> list[str]:
    """Questions per second and latency against the peers."""
    lines = [
        f"| {title} | x pipeline (range) | questions/s | p50 | p95 | F1 | size | memory | start |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for v in bench["variants"]:
        if v["status"] != "ok":
            continue
        low, high = v["speedup"]["range"]
        memory, start = v["peak_memory_bytes"], v["startup_seconds"]
        lines.append(
            f"| {v['name']} | {v['speedup']['median']:.2f} ({low:.2f} to {high:.2f}) | {v['questions_per_second']:.0f} "
            f"| {v['latency_ms']['p50']:.1f} ms | {v['latency_ms']['p95']:.1f} ms | {v['f1']:.1f} | {v['size_bytes'] / 1e6:.0f} MB "
            f"| {f'{memory / 1e6:.0f} MB' if memory else '–'} | {f'{start:.2f} s' if start else '–'} |"
        )
    workload = bench["workload"]
    return [
        *lines,
        "",
        f"{workload['questions']} questions in {workload['windows']} windows, text in to answers out, median of {bench['rounds']} "
        f"interleaved rounds in one process; {where_measured(bench['environment'], 'torch', 'transformers')}.",
    ]


@click.command(help=__doc__)
@click.argument("folders", nargs=-1, type=click.Path(path_type=Path))
@click.option("--check", is_flag=True, help="Do not write the tables; fail if they do not match the results.")
def main(folders: tuple[Path, ...], check: bool) -> None:
    """Rewrites the README in place."""
    if folders:
        write_report(RESULTS / RUN, collect(*folders))
    lines = run_table(read_report(RUN))
    for name, title in BENCHES.items():
        lines += ["", *bench_table(read_report(name), title)]
    write_table("README.md", "results", lines, check=check)


if __name__ == "__main__":
    run(main)
