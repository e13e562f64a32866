"""What the host adds to the model: CPU time a question of tokenising, running and decoding, text in to answers out.

    python benchmarks/host_share.py bundles/handbook-int8 SQUAD.json benchmarks/results/host_share.json

One thread and its own CPU clock, so that other work on the machine does not count; the parts in turn, medians of rounds.
"the model alone" is ONNX Runtime on inputs that lie ready; "host" is ``answer_batch`` with logits that lie ready, without
a cache of contexts: windows are made, spans selected and answers built as ever. Between two runs of a model the host's
code is cold, so one question at a time costs more than its parts: "all" has it. Beside it: what the context cache saves on one
long document, and the seconds of a new process until its first answer.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np

from qadeploy import Answerer
from qadeploy.bench.workload import draw
from qadeploy.data.readers import hash_examples, read
from qadeploy.errors import QadeployError
from qadeploy.files import write_json
from qadeploy.inference.answerer import Options
from qadeploy.inference.bundle import MODEL, open_bundle
from qadeploy.inference.doctor import diagnose
from qadeploy.inference.session import Pending, onnxruntime
from qadeploy.records import FloatArray, Window

FIRST_ANSWER = """
import json, sys, time
begun = time.perf_counter()
from qadeploy import Answerer
imported = time.perf_counter()
answerer = Answerer.load(sys.argv[1])
loaded = time.perf_counter()
answerer.answer("Who keeps the lamp?", "Mungo Strand keeps the lamp.")
done = time.perf_counter()
print(json.dumps([imported - begun, loaded - imported, done - loaded, done - begun, time.process_time()]))
"""
DOCUMENT_CHARACTERS, DOCUMENT_QUESTIONS = 20_000, 20
FRESH_PROCESSES = 7


class Recorded:
    """A model whose logits are known: what an answerer takes with it is the host's work alone."""

    threads = 1

    def __init__(self, windows: Sequence[Window], logits: Sequence[tuple[FloatArray, FloatArray]]) -> None:
        self.known = {w.input_ids.tobytes(): part for w, part in zip(windows, logits, strict=True)}

    def run(self, windows: Sequence[Window]) -> list[tuple[FloatArray, FloatArray]]:
        """The logits of each window."""
        return [self.known[w.input_ids.tobytes()] for w in windows]

    def start(self, windows: Sequence[Window]) -> Pending:
        """``run``, when the result is asked for."""
        return Pending(partial(self.run, windows))


@click.command(help=__doc__)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("data")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--questions", default=300, show_default=True, type=click.IntRange(min=1))
@click.option("--rounds", default=7, show_default=True, type=click.IntRange(min=1))
def main(bundle: Path, data: str, out: Path, questions: int, rounds: int) -> None:
    """Measures, prints the figures and writes the JSON."""
    examples = read(data).examples
    pairs = draw(data, examples, questions).pairs
    answerer = Answerer.load(bundle, device="cpu", threads=1, context_cache_bytes=0)
    windows = [answerer.read(q, c, Options()).windows for q, c in pairs]
    flat = [w for of_one in windows for w in of_one]
    recorded = Recorded(flat, answerer.model.run(flat))
    host = Answerer(answerer.encoder, answerer.settings, recorded, context_cache_bytes=0)
    alone = _ready(bundle, flat)

    def tokenise() -> None:
        for question, context in pairs:
            answerer.encoder.windows(answerer.encoder.encode(question), answerer.encoder.encode(context))

    parts: dict[str, Callable[[], object]] = {
        "the model alone": alone,
        "all, answer_batch": lambda: answerer.answer_batch(pairs),
        "all, answer": lambda: [answerer.answer(q, c) for q, c in pairs],
        "host, answer_batch": lambda: host.answer_batch(pairs),
        "host, answer": lambda: [host.answer(q, c) for q, c in pairs],
        "tokenise": tokenise,
    }
    milliseconds: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(rounds):
        for name, work in parts.items():
            milliseconds[name].append(_cpu(work) / len(pairs))
    figures = {name: _spread(found) for name, found in milliseconds.items()}
    middle = {name: figure["median"] for name, figure in figures.items()}
    report: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "environment": {**diagnose(), "load_average": os.getloadavg()[0], "threads": 1},
        "bundle": {"name": bundle.name, "sha256": open_bundle(bundle).hash},
        "data": Path(data).name,
        "data_sha256": hash_examples(examples),
        "questions": len(pairs),
        "windows": len(flat),
        "tokens_a_window": statistics.mean(len(w) for w in flat),
        "rounds": rounds,
        "cpu_ms_a_question": figures,
        "decode_ms": middle["host, answer_batch"] - middle["tokenise"],
        "throughput_of_model_alone": {
            form: _spread(
                [a / b for a, b in zip(milliseconds["the model alone"], milliseconds[f"all, {form}"], strict=True)]
            )
            for form in ("answer_batch", "answer")
        },
        "host_share_of_model": {
            form: middle[f"host, {form}"] / middle["the model alone"] for form in ("answer_batch", "answer")
        },
        "document": _document(bundle, [context for _, context in pairs]),
        "first_answer_seconds": _first_answer(bundle),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, report)
    for name, figure in figures.items():
        click.echo(f"{name:<20} {figure['median']:8.3f} ms ({figure['least']:.3f} to {figure['most']:.3f})")
    click.echo(f"{'decode and the rest':<20} {report['decode_ms']:8.3f} ms (host in a batch, less tokenise)")
    for form, share in report["host_share_of_model"].items():
        kept = report["throughput_of_model_alone"][form]["median"]
        click.echo(f"{form}: the host takes {100 * share:.1f} % of the model's time; {kept:.3f} of the model alone")
    click.echo(f"{len(pairs)} questions, {len(flat)} windows of {report['tokens_a_window']:.0f} tokens in the mean")
    click.echo(json.dumps({"document": report["document"], "first_answer_seconds": report["first_answer_seconds"]}))


def _ready(bundle: Path, windows: Sequence[Window]) -> Callable[[], object]:
    """Runs all windows, one by one, through a bare session with the bundle's settings; the inputs lie ready."""
    opened = open_bundle(bundle)
    ort = onnxruntime()
    stored: dict[str, Any] = opened.manifest.get("session") or {}
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    for name, value in stored.get("config", {}).items():
        options.add_session_config_entry(name, value)
    session = ort.InferenceSession(
        opened.read(MODEL),
        options,
        providers=["CPUExecutionProvider"],
        disabled_optimizers=stored.get("disabled_optimizers"),
    )
    kinds = {i.name: np.int32 if "int32" in i.type else np.int64 for i in session.get_inputs()}
    feeds = []
    for w in windows:
        whole = {"input_ids": w.input_ids, "attention_mask": np.ones(len(w)), "token_type_ids": w.token_type_ids}
        feeds.append({name: np.asarray(whole[name])[None].astype(kind) for name, kind in kinds.items()})
    return lambda: [session.run(None, feed) for feed in feeds]


def _document(bundle: Path, contexts: Sequence[str]) -> dict[str, Any]:
    """CPU milliseconds a question to prepare many questions on one document, with and without the cache, and its counters."""
    document = "\n".join(contexts)[:DOCUMENT_CHARACTERS]
    asked = [f"What is said of {document[i * 500 : i * 500 + 30]}?" for i in range(DOCUMENT_QUESTIONS)]
    report: dict[str, Any] = {"characters": len(document), "questions": len(asked)}
    for name, bound in (("with the cache", 64 * 2**20), ("without", 0)):
        answerer = Answerer.load(bundle, device="cpu", threads=1, context_cache_bytes=bound)
        known = [w for q in asked for w in answerer.read(q, document, Options()).windows]
        recorded = Recorded(known, [(np.zeros(len(w), np.float32),) * 2 for w in known])
        host = Answerer(answerer.encoder, answerer.settings, recorded, context_cache_bytes=bound)
        taken = _cpu(lambda host=host: [host.answer(q, document) for q in asked])  # type: ignore[misc]
        stats = host.stats()
        report[name] = {"host_cpu_ms_a_question": taken / len(asked), "hits": stats.hits, "misses": stats.misses}
        report["windows_a_question"] = len(known) / len(asked)
    return report


def _first_answer(bundle: Path) -> dict[str, Any]:
    """Seconds of the clock in new processes: importing, loading, the first answer, all three; and all CPU seconds."""
    rows = []
    for _ in range(FRESH_PROCESSES):
        command = [sys.executable, "-c", FIRST_ANSWER, str(bundle)]
        rows.append(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    names = ("import", "load", "answer", "all", "cpu of the process")
    return {name: _spread([row[i] for row in rows]) for i, name in enumerate(names)}


def _cpu(work: Callable[[], object]) -> float:
    """Milliseconds of this thread's CPU time."""
    started = time.thread_time()
    work()
    return 1000 * (time.thread_time() - started)


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


if __name__ == "__main__":
    try:
        main()
    except QadeployError as error:
        raise SystemExit(f"Error: {error}") from error
