"""Running the variants of a bench interleaved, scoring their answers, and the table of results."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from qadeploy.bench.peers import PEERS, Variant, own
from qadeploy.bench.workload import Workload
from qadeploy.doctor import diagnose
from qadeploy.errors import QadeployError
from qadeploy.files import write_json
from qadeploy.qa.metrics import score
from qadeploy.records import Answer
from qadeploy.runtime.answerer import Answerer
from qadeploy.timing import interleave

_LATENCY_QUESTIONS = 50


def bench(
    answerer: Answerer,
    checkpoint: Path,
    workload: Workload,
    peers: Sequence[str],
    rounds: int,
    say: Callable[[str], object],
) -> dict[str, Any]:
    """Measures the bundle and its peers on one workload and returns everything as plain JSON values.

    Each round asks every variant all questions at once, in turn; figures are medians over rounds. A
    variant that fails is reported with its reason and does not stop the others.
    """
    assert answerer.bundle is not None  # noqa: S101 - own() below raises the proper error
    device = str(getattr(answerer.model, "device", "cpu"))
    with ExitStack() as stack:
        variants, failed = [own(answerer)], []
        for name in peers:
            say(f"preparing {name}")
            try:
                variants.append(PEERS[name](checkpoint, answerer.settings, answerer.bundle.precision, device, stack))
            except Exception as error:  # a peer may break in any way; the bench goes on without it
                failed.append({"name": name, "status": f"failed: {_one_line(error)}"})
        results, broken = _run(variants, workload, rounds, say)
    first = next((r for r in results if r["name"].startswith("transformers")), results[0])
    for result in results:
        result["speedup"] = _ratio(result, first)
    return {
        "environment": {**diagnose(), "threads": getattr(answerer.model, "threads", None), "device": device},
        "bundle": {
            "name": answerer.bundle.name,
            "sha256": answerer.bundle.hash,
            "precision": answerer.bundle.precision,
        },
        "workload": {"source": workload.source, "questions": len(workload.examples)},
        "rounds": rounds,
        "speedup_against": first["name"],
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "variants": [*results, *broken, *failed],
    }


def _run(
    variants: list[Variant], workload: Workload, rounds: int, say: Callable[[str], object]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    answers: dict[str, list[Answer]] = {}
    broken = []

    def ask(variant: Variant) -> None:
        answers[variant.name] = variant.answer_all(workload.pairs)

    sound = []
    say(f"asking {len(workload.examples)} questions, a warm-up and {rounds} rounds, {len(variants)} variants in turn")
    for variant in variants:
        try:
            ask(variant)
            variant.answer_one(*workload.pairs[0])
            sound.append(variant)
        except QadeployError:
            raise
        except Exception as error:  # a peer again
            broken.append({"name": variant.name, "status": f"failed: {_one_line(error)}"})
    timings = interleave({v.name: partial(ask, v) for v in sound}, rounds, warm_up=False)
    latencies = _latencies(sound, workload)
    results = []
    for variant in sound:
        own_seconds = np.asarray(timings[variant.name].seconds)
        scores = score(workload.examples, answers[variant.name])
        rates = len(workload.examples) / own_seconds
        results.append(
            {
                "name": variant.name,
                "status": "ok",
                "questions_per_second": float(np.median(rates)),
                "questions_per_second_range": [float(rates.min()), float(rates.max())],
                "seconds_by_round": own_seconds.tolist(),
                "latency_ms": {f"p{q}": float(np.percentile(latencies[variant.name], q)) for q in (50, 95, 99)},
                "size_bytes": variant.size,
                **scores.to_dict(),
            }
        )
    return results, broken


def _latencies(variants: Sequence[Variant], workload: Workload) -> dict[str, list[float]]:
    """Milliseconds of one question at a time, the variants in turn on each question."""
    found: dict[str, list[float]] = {v.name: [] for v in variants}
    for question, context in workload.pairs[:_LATENCY_QUESTIONS]:
        for variant in variants:
            started = time.perf_counter()
            variant.answer_one(question, context)
            found[variant.name].append(1000 * (time.perf_counter() - started))
    return found


def _ratio(result: dict[str, Any], first: dict[str, Any]) -> dict[str, Any]:
    ratios = np.asarray(first["seconds_by_round"]) / np.asarray(result["seconds_by_round"])
    return {"median": float(np.median(ratios)), "range": [float(ratios.min()), float(ratios.max())]}


def lines(report: dict[str, Any]) -> list[str]:
    """The report as the lines of a table."""
    result = [
        f"{'variant':<56} {'q/s':>7} {'x':>6} {'(range)':>13} {'p50 ms':>7} {'p95 ms':>7} {'EM':>5} {'F1':>5} {'size':>9}"
    ]
    for v in report["variants"]:
        if v["status"] != "ok":
            result.append(f"{v['name']:<56} {v['status']}")
            continue
        low, high = v["speedup"]["range"]
        result.append(
            f"{v['name']:<56} {v['questions_per_second']:>7.1f} {v['speedup']['median']:>6.2f} {f'({low:.2f}-{high:.2f})':>13} "
            f"{v['latency_ms']['p50']:>7.1f} {v['latency_ms']['p95']:>7.1f} {v['exact_match']:>5.1f} {v['f1']:>5.1f} "
            f"{v['size_bytes'] / 1e6:>6.1f} MB"
        )
    environment = report["environment"]
    result.append(
        f"{report['workload']['questions']} questions of {report['workload']['source']}; x: times {report['speedup_against']}, "
        f"median of {report['rounds']} interleaved rounds; on {environment['device']}: {environment['cpu']['model']}, {environment['threads']} threads"
    )
    return result


def write(report: dict[str, Any], folder: Path) -> Path:
    """Writes ``bench.json`` into ``folder`` and returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "bench.json", report)
    return folder / "bench.json"


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
