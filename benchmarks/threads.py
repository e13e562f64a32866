"""Many threads on one Answerer, with mixed texts, options and call forms: every result is held against serial ones.

    python -m benchmarks.threads benchmarks/results/threads.json                    a tiny model, trained and exported here
    python -m benchmarks.threads benchmarks/results/threads.json --bundle BUNDLE    a bundle that is there

Run it from the root of the repository: the tiny model and its texts are those of the tests. Each distinct call runs
once before the threads start; what they get must equal it to the last bit, or, where it raised, raise the same error.
"""

from __future__ import annotations

import os
import random
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from qadeploy import Answer, Answerer
from qadeploy.errors import QadeployError
from qadeploy.export.onnx import export
from qadeploy.export.reference import make_reference
from qadeploy.files import write_json
from qadeploy.inference.doctor import diagnose
from qadeploy.training.runs import dev_part, find_run
from qadeploy.training.train import train
from tests.conftest import make_tiny_checkpoint, tiny_options, triplets, write_jsonl

OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"top_k": 3},
    {"top_k": 20, "max_answer_len": 4},
    {"max_seq_len": 40, "doc_stride": 8},
    {"max_seq_len": 64, "doc_stride": 20, "top_k": 2},
    {"allow_no_answer": True, "top_k": 2},
    {"align_to_words": True},
    {"max_seq_len": 40, "doc_stride": 38},  # no way forward: an error
)
FORMS = ("answer", "answer", "answer", "batch", "stream")


@dataclass(frozen=True)
class Call:
    """One call: a form, its (question, context) pairs and its options."""

    form: str
    pairs: tuple[tuple[str, str], ...]
    options: dict[str, Any]

    def ask(self, answerer: Answerer) -> list[list[Answer]] | str:
        """The answers of each pair, or the error as text."""
        try:
            if self.form == "answer":
                return [answerer.answer(*self.pairs[0], **self.options)]
            if self.form == "batch":
                return answerer.answer_batch(self.pairs, **self.options)
            return list(answerer.answer_stream(iter(self.pairs), **self.options))
        except QadeployError as error:
            return f"{type(error).__name__}: {error}"


def calls(seed: int = 0) -> list[Call]:
    """240 distinct calls: short and long contexts, in many scripts, one empty question."""
    rows = [(str(row["question"]), str(row["context"])) for row in triplets(48)]
    everything = " ".join(context for _, context in rows[:24])
    texts = [
        *rows,
        ("Who keeps the kettle?", everything),
        ("Who keeps the bell?", "\U0001f469\u200d\U0001f467 keeps the bell \U0001f514 in room 3. Ada keeps the rope."),
        ("Who keeps the lamp?", "\u0622\u062f\u0627 keeps the lamp. \u090f\u0926\u093e keeps the rope."),
        ("", "Ada keeps the lamp."),
    ]
    draw = random.Random(seed)
    made = []
    for number in range(240):
        form = FORMS[number % len(FORMS)]
        count = 1 if form == "answer" else draw.randint(1, 3)
        made.append(Call(form, tuple(draw.choices(texts, k=count)), OPTIONS[number % len(OPTIONS)]))
    return made


def hammer(answerer: Answerer, threads: int, calls_each: int) -> dict[str, Any]:
    """The figures of ``threads`` threads that make ``calls_each`` calls each, in orders of their own."""
    made = calls()
    serial = [call.ask(answerer) for call in made]
    found: Counter[str] = Counter()
    differences: list[str] = []
    counting, ready = threading.Lock(), threading.Barrier(threads + 1)

    def work(number: int) -> None:
        order = random.Random(number)
        own: Counter[str] = Counter()
        ready.wait()
        for _ in range(calls_each):
            chosen = order.randrange(len(made))
            try:
                same = made[chosen].ask(answerer) == serial[chosen]
            except Exception as error:  # whatever it is, it is counted
                own["errors"] += 1
                same, problem = False, f"{type(error).__name__}: {error}"
            else:
                problem = "differs from the serial call"
            own["identical" if same else "different"] += 1
            own[made[chosen].form] += 1
            own["expected errors"] += same and isinstance(serial[chosen], str)
            if not same:
                with counting:
                    differences.append(f"{made[chosen]}: {problem}")
        with counting:
            found.update(own)

    workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    before = _resident()
    ready.wait()
    started = time.perf_counter()
    for worker in workers:
        worker.join()
    seconds = time.perf_counter() - started
    return {
        "threads": threads,
        "calls_each": calls_each,
        "calls": sum(found[form] for form in set(FORMS)),
        "identical": found["identical"],
        "different": found["different"],
        "unexpected_errors": found["errors"],
        "errors_equal_to_serial_ones": found["expected errors"],
        "forms": {form: found[form] for form in sorted(set(FORMS))},
        "serial_unchanged_afterwards": [call.ask(answerer) for call in made] == serial,
        "seconds": seconds,
        "calls_per_second": threads * calls_each / seconds,
        "resident_mib": {"before": before, "after": _resident()},
        "first_differences": differences[:5],
    }


def _resident() -> float:
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmRSS"))


def tiny_bundle(folder: Path) -> Path:
    """Trains and exports the tests' tiny model; returns its bundle."""
    data = write_jsonl(folder / "keepers.jsonl", triplets())
    options = tiny_options(data, make_tiny_checkpoint(folder / "base"), folder / "run")
    run = find_run(train(options, lambda line: None, progress=False).folder)
    return export(make_reference(run, "keepers", dev_part(run)), folder / "bundle").folder


@click.command(help=__doc__)
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--bundle", type=click.Path(path_type=Path), help="A bundle; without it a tiny one is made.")
@click.option("--threads", default=64, show_default=True, type=click.IntRange(min=1))
@click.option("--calls", "calls_each", default=10_000, show_default=True, type=click.IntRange(min=1), help="A thread.")
def main(out: Path, bundle: Path | None, threads: int, calls_each: int) -> None:
    """Runs it, prints the figures, writes the JSON, and fails where one result differs."""
    with tempfile.TemporaryDirectory() as temporary:
        answerer = Answerer.load(bundle or tiny_bundle(Path(temporary)), device="cpu")
        figures = hammer(answerer, threads, calls_each)
    found = {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "environment": {**diagnose(), "load_average": os.getloadavg()[0]},
        "bundle": bundle.name if bundle else "the tests' tiny model",
        **figures,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, found)
    click.echo(
        f"{threads} threads x {calls_each:,} calls in {figures['seconds']:.0f} s: {figures['identical']:,} identical, "
        f"{figures['different']:,} different, {figures['unexpected_errors']:,} unexpected errors"
    )
    if figures["different"] or not figures["serial_unchanged_afterwards"]:
        raise SystemExit("\n".join(["Error: results differ from serial ones", *figures["first_differences"]]))


if __name__ == "__main__":
    try:
        main()
    except QadeployError as error:
        raise SystemExit(f"Error: {error}") from error
