"""transformers' question-answering pipeline and ``qadeploy.integrations.transformers_pipeline`` on one model: where answers differ, and why.

    python -m benchmarks.compare_pipeline bundles/handbook runs/handbook/checkpoint
    python -m benchmarks.compare_pipeline      # only rewrites the table in docs/migrating.md from the JSON

Both answer the same questions with the pipeline's default options. Each answer of the pipeline that differs from ours
gets the first class that fits:

- same text: the same words at another place in the context;
- added up: the answers agree if the pipeline does not add up the scores of equal texts (its ``get_answer`` finds none);
- window by window: the pipeline also takes a softmax per window. In our own logits, the span with the highest such
  probability is the pipeline's answer, and the span with the highest logits is ours;
- other: anything else.

Writes ``results/compare_pipeline.json`` and the table between the markers in docs/migrating.md.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.harness import (
    RESULTS,
    Json,
    bundle_facts,
    read_report,
    report,
    run,
    where_measured,
    write_report,
    write_table,
)
from qadeploy.bench.peers.setup import quiet
from qadeploy.bench.workload import draw
from qadeploy.compat import QuestionAnsweringPipeline, pipeline
from qadeploy.core.calibration import expected_calibration_error
from qadeploy.core.decoding import WindowLogits, span_table
from qadeploy.core.metrics import bootstrap_interval, score
from qadeploy.core.settings import Options
from qadeploy.data.loading import hash_examples, read
from qadeploy.inference.pairs import DecodedPair
from qadeploy.records import Answer, Example, FloatArray

REPORT = "compare_pipeline.json"
CLASSES = ("equal", "same text", "added up", "window by window", "other")
# The pipeline's defaults, for a model of 384 tokens or more.
DEFAULTS = {"max_seq_len": 384, "doc_stride": 128, "max_answer_len": 15}
Place = tuple[int, int]


def place(found: Json) -> Place:
    """The place of an answer of either pipeline."""
    return found["start"], found["end"]


def without_adding(theirs: Any, items: Sequence[Json], **options: int) -> list[Json]:
    """The answers of transformers' pipeline if it does not add up the scores of equal texts."""
    theirs.get_answer = lambda answers, target: None
    try:
        with quiet():
            return list(theirs(list(items), **options))
    finally:
        del theirs.get_answer


def best_by_window(reading: DecodedPair) -> Place:
    """The word-aligned span of the highest probability within a window (softmax of starts times softmax of ends)."""
    best, found = -np.inf, (0, 0)
    words = reading.context.aligned
    for window, (starts, ends) in zip(reading.windows, reading.logits, strict=True):
        table = span_table(WindowLogits([window], [starts], [ends], reading.context), reading.settings.max_answer_len)
        free = [window.null_index, *range(window.context_begin, window.context_begin + window.context_length)]
        table = table - _log_sum(starts[free]) - _log_sum(ends[free])
        first, extra = divmod(int(table.argmax()), table.shape[1])
        if table[first, extra] > best:
            best = float(table[first, extra])
            found = reading.context.visible(int(words[first, 0]), int(words[first + extra, 1]))
    return found


def _log_sum(logits: FloatArray) -> float:
    return float(np.logaddexp.reduce(logits.astype(np.float64)))


def kind_of(theirs: Json, unadded: Json, ours: Json, reading: DecodedPair) -> str:
    """The class of a question, from both answers and from the pipeline's answer without adding."""
    if place(theirs) == place(ours):
        return "equal"
    if theirs["answer"].lower() == ours["answer"].lower():
        return "same text"
    if place(unadded) == place(ours):
        return "added up"
    if len(reading.windows) > 1 and best_by_window(reading) == place(unadded):
        return "window by window"
    return "other"


def figures(examples: Sequence[Example], rows: Sequence[Json]) -> Json:
    """The figures of some questions: the classes, and the scores of either side."""
    sides: Json = {}
    f1 = {}
    for side in ("pipeline", "qadeploy"):
        answers = [Answer(r[side]["answer"], r[side]["start"], r[side]["end"], r[side]["score"]) for r in rows]
        scores = score(examples, answers)
        f1[side] = scores.rows_f1
        confidences = np.asarray([a.score for a in answers])
        sides[side] = {
            "exact_match": scores.exact_match,
            "f1": scores.f1,
            "scores_above_1": int((confidences > 1 + 1e-6).sum()),
            "highest_score": float(confidences.max()),
            "calibration_error": expected_calibration_error(confidences.clip(0, 1), scores.rows_exact_match),
        }
    several = [r for r in rows if r["windows"] > 1]
    return {
        "questions": len(rows),
        "classes": {name: sum(r["class"] == name for r in rows) for name in CLASSES},
        "one_window": {"questions": len(rows) - len(several), "equal": _equal(r for r in rows if r["windows"] == 1)},
        "several_windows": {"questions": len(several), "equal": _equal(several)},
        **sides,
        "f1_gain": {
            "mean": 100.0 * float((f1["qadeploy"] - f1["pipeline"]).mean()),
            "interval": list(bootstrap_interval(f1["qadeploy"] - f1["pipeline"])),
        },
    }


def _equal(rows: Any) -> int:
    return sum(row["class"] == "equal" for row in rows)


def compare(
    theirs: Any, ours: QuestionAnsweringPipeline, examples: Sequence[Example], options: Mapping[str, Any]
) -> list[Json]:
    """One row per question: both answers, its windows, its class. ``options`` are the lengths of ``DEFAULTS``."""
    items = [{"question": e.question, "context": e.context} for e in examples]
    with quiet():
        found = theirs(list(items), **options)
    unadded = without_adding(theirs, items, **options)
    mine = ours(items, **options)
    settings = Options(align_to_words=True, **options)
    rows = []
    for example, a, b, c in zip(examples, found, unadded, mine, strict=True):
        reading = ours.answerer.read(example.question, example.context, settings)
        kind = kind_of(a, b, c, reading)
        rows.append({"id": example.id, "windows": len(reading.windows), "class": kind, "pipeline": a, "qadeploy": c})
    return rows


def measure(bundle: Path, checkpoint: Path, data: str, questions: int, threads: int) -> Json:
    """The content of results/compare_pipeline.json."""
    import torch
    from transformers import pipeline as transformers_pipeline

    from qadeploy import Answerer

    torch.set_num_threads(threads)
    started = time.time()
    with quiet():
        theirs = transformers_pipeline("question-answering", model=str(checkpoint), device="cpu")
    ours = pipeline("question-answering", model=Answerer.load(bundle, device="cpu", threads=threads))
    whole = read(data)
    examples = draw(data, whole.examples, questions).examples
    rows = compare(theirs, ours, examples, DEFAULTS)
    held_out = [i for i, e in enumerate(examples) if e.split == "validation"]
    parts = {"all": figures(examples, rows)}
    if 0 < len(held_out) < len(examples):
        parts["held out"] = figures([examples[i] for i in held_out], [rows[i] for i in held_out])
    return report(
        environment={"threads": threads},
        bundle=bundle_facts(bundle),
        data=data,
        data_sha256=hash_examples(examples),
        parts=parts,
        seconds=round(time.time() - started, 1),
        differences=[row for row in rows if row["class"] != "equal"],
    )


def table(found: Json) -> list[str]:
    """The figures as a table in Markdown."""
    parts = found["parts"]

    def shown(name: str, cells: Any) -> str:
        return f"| {name} | {' | '.join(cells)} |"

    def both(key: str, form: str) -> list[str]:
        return [f"{p['pipeline'][key]:{form}}, {p['qadeploy'][key]:{form}}" for p in parts.values()]

    lines = [
        shown("questions", (f"{name}, {p['questions']:,}" for name, p in parts.items())),
        "|---|" + "---|" * len(parts),
    ]
    for name in CLASSES:
        label = "the same answer" if name == "equal" else f"another answer: {name}"
        lines.append(
            shown(label, (f"{p['classes'][name]} ({p['classes'][name] / p['questions']:.1%})" for p in parts.values()))
        )
    for key, label in (("one_window", "one window"), ("several_windows", "several windows")):
        cells = [f"{p[key]['equal']} of {p[key]['questions']}" for p in parts.values()]
        lines.append(shown(f"the same answer, contexts of {label}", cells))
    lines += [
        shown("EM: pipeline, qadeploy", both("exact_match", ".1f")),
        shown("F1: pipeline, qadeploy", both("f1", ".1f")),
        shown(
            "F1 gained (95 % interval)",
            (
                f"{p['f1_gain']['mean']:+.1f} ({p['f1_gain']['interval'][0]:+.1f} to {p['f1_gain']['interval'][1]:+.1f})"
                for p in parts.values()
            ),
        ),
        shown("scores above 1: pipeline, qadeploy", both("scores_above_1", "d")),
        shown("highest score: pipeline, qadeploy", both("highest_score", ".2f")),
        shown("calibration error: pipeline, qadeploy", both("calibration_error", ".3f")),
    ]
    lines += [
        "",
        f"{found['bundle']['name']} ({found['bundle']['precision']}) on {found['data']}, both with the pipeline's default options; "
        f"{where_measured(found['environment'], 'transformers', 'torch')}.",
    ]
    return lines


@click.command(help=__doc__)
@click.argument("bundle", type=click.Path(path_type=Path), required=False)
@click.argument("checkpoint", type=click.Path(path_type=Path), required=False)
@click.option("--data", default="handbook", show_default=True)
@click.option("--questions", default=1000, show_default=True, type=click.IntRange(min=1))
@click.option("--threads", default=2, show_default=True, type=click.IntRange(min=1))
@click.option("--check", is_flag=True, help="Do not write the table; fail if it does not match the results.")
def main(bundle: Path | None, checkpoint: Path | None, check: bool, **options: Any) -> None:
    """Compares, prints the table, and writes the JSON and the docs."""
    if bundle is not None:
        if checkpoint is None:
            raise click.UsageError("also give the checkpoint that the bundle was exported from")
        measured = measure(bundle, checkpoint, **options)
        write_report(RESULTS / REPORT, measured)
        for row in measured["differences"]:
            if row["class"] == "other":
                click.echo(f"other: {json.dumps(row, ensure_ascii=False)}")
    write_table("docs/migrating.md", "compared", table(read_report(REPORT)), check=check)


if __name__ == "__main__":
    run(main)
