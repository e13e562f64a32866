"""Writes the README's tables from the measurements under ``benchmarks/results``: nothing there is typed by hand.

    python benchmarks/readme_table.py

Reads ``results/handbook_run.json`` (what training, export and quantization reached, see ``collect_run.py``) and, as written by
``qadeploy bench --out``, ``results/handbook_bench.json`` and ``results/wikipedia_bench.json`` (the base model on questions about
articles that its training left out, see ``models/minilm-l6-qa/README.md``); replaces what stands between the markers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
BENCHES = {
    "handbook_bench.json": "the handbook, fine-tuned model",
    "wikipedia_bench.json": "Wikipedia articles, base model",
}
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"


def run_table(run: dict[str, Any]) -> list[str]:
    """EM and F1 on the handbook's held-out questions, from the base model to int8."""
    lines = ["| on the handbook's held-out questions | size | EM | F1 (95 % interval) |", "|---|---|---|---|"]
    for row in run["rows"]:
        low, high = row["f1_interval"]
        size = f"{row['size_bytes'] / 1e6:.0f} MB"
        lines.append(
            f"| {row['name']} | {size} | {row['exact_match']:.1f} | {row['f1']:.1f} ({low:.1f} to {high:.1f}) |"
        )
    return lines


def bench_table(bench: dict[str, Any], what: str) -> list[str]:
    """Questions a second and latency against the peers; ``what`` was asked heads the table."""
    lines = [
        f"| {what} | x pipeline (range) | questions/s | p50 | p95 | F1 | size | memory | start |",
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
    environment = bench["environment"]
    packages = environment["packages"]
    lines += [
        "",
        f"{bench['workload']['questions']} questions in {bench['workload']['windows']} windows, text in to answers out, median of {bench['rounds']} interleaved rounds in one process; "
        f"{environment['cpu']['model']}, {environment['threads']} threads, ONNX Runtime {packages['onnxruntime'] or packages['onnxruntime-gpu']}, "
        f"torch {packages['torch']}, transformers {packages['transformers']}, commit {environment['commit']}.",
    ]
    return lines


def main() -> None:
    """Rewrites the README in place."""
    run = json.loads((HERE / "results" / "handbook_run.json").read_text())
    tables = []
    for name, what in BENCHES.items():
        bench = json.loads((HERE / "results" / name).read_text())
        tables += ["", *bench_table(bench, what)]
    text = README.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    body = "\n".join([BEGIN, *run_table(run), *tables, END])
    README.write_text(before + body + after, encoding="utf-8")


if __name__ == "__main__":
    main()
