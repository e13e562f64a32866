"""How fast a GPU answers: our latency and throughput paths, ONNX Runtime with its defaults, torch, optimum and the pipeline.

    python -m benchmarks.gpu benchmarks/results/gpu.json
    python -m benchmarks.gpu --device cpu dry-run.json      # each part once, with tiny models, to see that it runs

Needs only the repository: the base model that ships, and models of BERT-base's and BERT-large's shape with random weights.
The questions come from the handbook, so their lengths are real.

Each model has its own process, with a share of ``--minutes``. If its time is up or it dies, the results so far are kept
and the rest is reported as not measured. Each variant is loaded and answers the questions of the correctness check,
which warms it up; then all are timed in turns, in an order that rotates with the rounds. A variant that fails gets a
row with the reason. torch.compile, which is slow, comes last, in turns with eager torch and our paths.

Model only: windows as token ids on the host in, logits on the host out. End to end: texts in, answers out. A round of a
short task is the mean of several runs, so that the clock can resolve it; a slow task gets fewer rounds. ``memory_mib``
is how much the device's used memory grew from before loading a variant until it had answered everything;
``utilisation`` is nvidia-smi's, in percent, while the variant alone runs for a second. Without nvidia-smi both are null.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from benchmarks.gpu_plan import (
    BASE,
    COMPILED,
    E2E_ALL,
    E2E_ONE,
    EAGER,
    LATENCY,
    MANY_384,
    MIXED,
    MLPERF_INT8,
    ONE_384,
    ORT_PLAIN,
    PIPELINE,
    SDPA,
    SHARES,
    SORTED,
    THROUGHPUT,
    ModelPlan,
)
from benchmarks.harness import ROOT, Json, report, run, write_report
from qadeploy.inference.session import onnxruntime

WORKER = (sys.executable, "-m", "benchmarks.gpu_worker")


def run_model(plan: ModelPlan) -> list[Json]:
    """Runs one model's process until it ends or its time is up, and again without a variant that kills it."""
    rows = Path(plan.rows)
    skip: list[str] = []
    while True:
        spec = rows.with_suffix(".plan.json")
        spec.write_text(json.dumps({**asdict(plan), "skip": skip}), encoding="utf-8")
        grace = 2.0 if plan.dry else 10.0
        left = plan.until + grace - time.time()
        log = rows.with_suffix(".log")
        with log.open("a", encoding="utf-8") as stream:
            process = subprocess.Popen([*WORKER, str(spec)], stdout=stream, stderr=stream, cwd=ROOT)
            try:
                code: int | None = process.wait(timeout=max(1.0, left))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                code = None
        lines = written(rows)
        if any(line["kind"] == "done" for line in lines):
            return lines
        began = [line["variant"] for line in lines if line["kind"] == "begin"]
        last = began[-1] if began else None
        tail = " ".join(log.read_text(encoding="utf-8", errors="replace").split())[-300:]
        reason = "the time was up" if code is None else f"its process ended with {code}: {tail}"
        lines.append({"kind": "failed", "model": plan.model, "variant": last, "step": "process", "reason": reason})
        with rows.open("a", encoding="utf-8") as stream:
            stream.write("\n" + json.dumps(lines[-1]) + "\n")  # the line before may have been cut off
        if code is None or last is None or last in skip or time.time() > plan.until - 20:
            return lines
        skip.append(last)


def written(rows: Path) -> list[Json]:
    """The lines of a model's process, without a last line that was cut off."""
    found = []
    for line in rows.read_text(encoding="utf-8").splitlines() if rows.is_file() else []:
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found


def ratios(lines: Sequence[Json]) -> list[Json]:
    """The targets of the GPU path with the measured values; null if a part is missing."""

    def median(model: str, scenario: str, *variants: str, phase: str = "main") -> float | None:
        found = [
            line["median_ms"]
            for line in lines
            if line["kind"] == "row"
            and (line["model"], line["scenario"], line["phase"]) == (model, scenario, phase)
            and line["variant"] in variants
        ]
        return min(found) if found else None

    def ratio(upper: float | None, lower: float | None) -> float | None:
        return None if upper is None or not lower else upper / lower

    def target(what: str, found: float | None, limit: float, *, most: bool) -> Json:
        met = None if found is None else (found <= limit if most else found >= limit)
        return {"target": what, "limit": f"{'at most' if most else 'at least'} {limit:g}", "found": found, "met": met}

    result = []
    for model in SHARES:
        one, many = median(model, ONE_384, LATENCY), median(model, MIXED, THROUGHPUT)
        eager, plain = median(model, ONE_384, EAGER), median(model, ONE_384, ORT_PLAIN)
        padded, torch_best = median(model, MIXED, ORT_PLAIN), median(model, MIXED, EAGER, SDPA, SORTED)
        compiled, beside = (median(model, MIXED, name, phase="compiled") for name in (COMPILED, THROUGHPUT))
        pipeline, texts = median(model, E2E_ALL, PIPELINE), median(model, E2E_ALL, THROUGHPUT)
        for what, upper, lower, limit, most in (
            ("1 x 384: ours / torch eager fp16", one, eager, 0.2, True),
            ("1 x 384: ours / plain ONNX Runtime", one, plain, 0.7, True),
            ("mixed: padded ONNX Runtime / ours", padded, many, 1.3, False),
            ("mixed: best torch fp16 / ours", torch_best, many, 1.0, False),
            ("mixed: torch compiled / ours, in turns", compiled, beside, 1.0, False),
            ("many questions: pipeline / ours", pipeline, texts, 10, False),
        ):
            result.append(target(f"{model}, {what}", ratio(upper, lower), limit, most=most))
    single = [
        line for line in lines if line["kind"] == "row" and line["scenario"] == E2E_ONE and line["variant"] == LATENCY
    ]
    each = next(
        (line["median_ms"] / line["items"] for line in single if (line["model"], line["phase"]) == (BASE, "main")), None
    )
    large = [line for line in lines if line["kind"] == "row" and line["scenario"] == MANY_384]
    large = [line for line in large if (line["model"], line["variant"]) == ("BERT-large shape", THROUGHPUT)]
    rate = large[0]["items_per_second"] if large else None
    result += [
        target("base model, one question end to end, ms", each, 1.0, most=True),
        target("BERT-large shape, 32 x 384: windows per second", rate, 3000, most=False),
        {
            "target": "BERT-large shape: of MLPerf's best single H100 (int8, hand-written kernels)",
            "limit": None,
            "found": ratio(rate, MLPERF_INT8),
            "met": None,
        },
    ]
    return result


def table(lines: Sequence[Json]) -> list[str]:
    """The report as text: models, scenarios, variants, correctness, failures."""
    result = []
    for model in SHARES:
        own = [line for line in lines if line["model"] == model]
        facts = next((line for line in own if line["kind"] == "subject"), None)
        if facts:
            tokens = facts["tokens"]
            result.append(
                f"\n{model}: {facts['questions']} questions, {facts['windows']} windows of {tokens['least']} to {tokens['most']} "
                f"tokens (mean {tokens['mean']:.0f})"
            )
        head = f"{'scenario':<15} {'variant':<48} {'ms (least to most)':>30} {'per second':>11} {'GPU %':>6}"
        rows = [line for line in own if line["kind"] == "row"]
        result += [head] if rows else []
        for row in rows:
            ms = f"{row['median_ms']:.3f} ({row['least_ms']:.3f} to {row['most_ms']:.3f})"
            usage = "" if row["utilisation"] is None else f"{row['utilisation']:.0f}"
            name = row["variant"] + (
                " (beside compiled)" if row["phase"] == "compiled" and row["variant"] != COMPILED else ""
            )
            result.append(f"{row['scenario']:<15} {name:<48} {ms:>30} {row['items_per_second']:>11.1f} {usage:>6}")
        for line in own:
            if line["kind"] == "variant":
                memory = "" if line["memory_mib"] is None else f", {line['memory_mib']} MiB"
                same = (
                    "answers not compared"
                    if line["equal_answers"] is None
                    else f"{100 * line['equal_answers']:.1f} % of the answers are torch fp32's, F1 {line['f1_change']:+.2f}"
                )
                result.append("; ".join([f"{line['variant']} ({line['precision']}{memory}): {same}", *line["notes"]]))
            if line["kind"] == "failed":
                result.append(f"NOT MEASURED {line['variant'] or 'this model'} ({line['step']}): {line['reason']}")
    return result


def closing(found: Sequence[Json]) -> list[str]:
    """The targets as text."""
    words = {True: "met", False: "missed", None: "-"}
    result = ["\ntargets (an H100's; the figures of a dry run mean nothing):"]
    for each in found:
        value = "not measured" if each["found"] is None else f"{each['found']:.3g}"
        result.append(f"{each['target']:<66} {value:>13} {each['limit'] or '':<14} {words[each['met']]}")
    return result


@click.command(help=__doc__)
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--device", default="cuda", show_default=True, help="cuda, cuda:N, or cpu for a dry run with tiny models."
)
@click.option("--questions", type=click.IntRange(1), help="Questions of the handbook.  [default: 400, on the CPU 3]")
@click.option("--rounds", type=click.IntRange(1), help="Rounds of each variant.  [default: 9, on the CPU 2]")
@click.option("--minutes", type=float, help="Time for all models together.  [default: 3, on the CPU 1.8]")
@click.option(
    "--exports",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder in which exported models are kept and reused.",
)
@click.option("--only-export", is_flag=True, help="Export the models into --exports, in parallel, and measure nothing.")
@click.option(
    "--model", "models", multiple=True, type=click.Choice(list(SHARES)), help="Only this model; may be repeated."
)
def main(
    out: Path, device: str, exports: Path | None, only_export: bool, models: tuple[str, ...], **limits: Any
) -> None:
    """Measures, prints the table and writes the JSON."""
    dry = not device.startswith("cuda")
    chosen = models or tuple(SHARES)
    if only_export:
        if exports is None:
            raise click.UsageError("--only-export needs --exports")
        kind = "dry" if dry else "full"
        command = [sys.executable, "-m", "benchmarks.gpu_variants"]
        running = [subprocess.Popen([*command, name, str(exports), kind], cwd=ROOT) for name in chosen]
        raise SystemExit(max(process.wait() for process in running))
    defaults = {"questions": 3, "rounds": 2, "minutes": 1.8} if dry else {"questions": 400, "rounds": 9, "minutes": 3}
    limits = {name: limits[name] or default for name, default in defaults.items()}
    shares = {name: SHARES[name] for name in chosen}
    lines: list[Json] = []
    end = time.time() + 60 * limits.pop("minutes")
    with tempfile.TemporaryDirectory() as folder:
        for number, name in enumerate(chosen):
            rest = sum(shares[other] for other in chosen[number:])
            until = time.time() + (end - time.time()) * shares[name] / rest  # time left by one model goes to the others
            rows, place = Path(folder) / f"{number}.jsonl", exports or Path(folder) / "exports"
            plan = ModelPlan(name, device, dry, until=until, rows=str(rows), exports=str(place), **limits)
            click.echo(f"{name}: until {time.strftime('%H:%M:%S', time.localtime(until))}", err=True)
            lines += run_model(plan)
    found = [{**each, "met": None} if dry else each for each in ratios(lines)]
    kept = [line for line in lines if line["kind"] != "begin"]
    facts = {"device": device, "dry_run": dry, "targets": found, "lines": kept}
    write_report(out, report(environment={"versions": versions()}, **facts))
    for text in [*table(lines), *closing(found)]:
        click.echo(text)
    if not any(line["kind"] == "row" for line in lines):
        raise SystemExit("nothing could be measured: see the reasons above")


def versions() -> Json:
    """The builds of torch and ONNX Runtime, and the GPU's name."""
    import torch

    return {
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "onnxruntime": onnxruntime().__version__,
    }


if __name__ == "__main__":
    run(main)
