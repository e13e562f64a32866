r"""Long documents: what ``prefilter`` saves and costs, and what a document of a million characters takes.

    python models/prepare_data.py ../shared/data DATA
    python -m benchmarks.long_documents bundles/base-int8 ../shared/data/squadshifts_new_wiki.json \
        --held-out DATA/held_out_wiki.jsonl
    python -m benchmarks.long_documents      # only writes the table of docs/scale.md anew from the JSON

All paragraphs of an article are one context, so that a question's answer lies in one of some dozen windows. Each question is
answered from its article with every N and without one, one after another in an order that turns, so that ratios of times
are of neighbours: the median over tenths of the questions, with the least and the most. The article is tokenised once
("context at hand"); tokenising it is timed beside, and added to both sides in "first question". F1 is SQuAD's, its difference to all
windows a mean over questions with a 95 % bootstrap interval. "gold read" is the share of questions one of whose annotated answers
lies whole in a window that was read.

A document of a million characters, many articles joined, is answered in a process of its own, with and without
``prefilter``: seconds, and the highest resident memory above that of an answerer that has answered one short question.

Writes ``results/long_documents.json`` and the table between the markers in docs/scale.md.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

from qadeploy import Answerer
from qadeploy.core.metrics import bootstrap_interval, score
from qadeploy.data.readers import hash_examples
from qadeploy.errors import QadeployError
from qadeploy.files import write_json
from qadeploy.inference.answerer import Options, Reading, to_answers
from qadeploy.inference.bundle import open_bundle
from qadeploy.inference.doctor import diagnose
from qadeploy.records import Annotation, Answer, Example

COUNTS: tuple[int | None, ...] = (1, 2, 3, 5, 8, 12, 20, None)
HERE = Path(__file__).parent
RESULTS = HERE / "results" / "long_documents.json"
DOCS = HERE.parent / "docs" / "scale.md"
BEGIN, END = "<!-- long documents: begin -->", "<!-- long documents: end -->"
JOIN = "\n\n"
CHARACTERS = 1_000_000
MEMORY = """
import json, sys, time
from pathlib import Path
from qadeploy import Answerer

def peak():
    return next(1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

text, question, count = Path(sys.argv[2]).read_text("utf-8"), sys.argv[3], int(sys.argv[4]) or None
answerer = Answerer.load(sys.argv[1], device="cpu")
answerer.answer(question, text[:2_000])
before, started = peak(), time.perf_counter()
context = answerer.encoder.encode(text)
tokenised, tokens = time.perf_counter() - started, len(context)
del context
started, windows = time.perf_counter(), []
answer = answerer.answer(question, text, prefilter=count, on_windows=lambda done, of: windows.append(of))[0]
whole = time.perf_counter() - started
started = time.perf_counter()
answerer.answer(question, text, prefilter=count)
again = time.perf_counter() - started
print(json.dumps({
    "seconds": whole, "seconds_of_the_next_question": again, "seconds_to_tokenise": tokenised, "tokens": tokens,
    "windows_read": windows[0], "peak_bytes": peak() - before, "answer": answer.text, "score": answer.score,
}))
"""


@dataclass(frozen=True, slots=True)
class Asked:
    """A question on a whole article."""

    example: Example
    article: str


def articles(source: Path) -> dict[str, list[dict[str, Any]]]:
    """The paragraphs of each article of a file in SQuAD's form, by title."""
    return {article["title"]: article["paragraphs"] for article in json.loads(source.read_text())["data"]}


def joined(paragraphs: Sequence[dict[str, Any]]) -> tuple[str, list[Example]]:
    """The text of an article, and its questions with the places of their answers in it."""
    context = JOIN.join(p["context"] for p in paragraphs)
    examples, begin = [], 0
    for paragraph in paragraphs:
        for qa in paragraph["qas"]:
            answers = tuple(Annotation(a["text"], a["answer_start"] + begin) for a in qa["answers"])
            examples.append(Example(qa["id"], qa["question"], context, answers))
        begin += len(paragraph["context"]) + len(JOIN)
    return context, examples


def asked_of(found: dict[str, list[dict[str, Any]]], held: set[str], count: int, seed: int) -> list[Asked]:
    """Questions drawn from the articles that hold any of the contexts ``held`` (none: from all)."""
    rows = []
    for title, paragraphs in found.items():
        if not held or any(p["context"] in held for p in paragraphs):
            rows += [Asked(example, title) for example in joined(paragraphs)[1]]
    if not rows:
        raise SystemExit("Error: none of the articles holds a context of --held-out")
    random.Random(seed).shuffle(rows)
    return rows[:count]


def gold_read(reading: Reading, example: Example) -> bool:
    """Whether an annotated answer lies whole in a window that was read."""
    spans = [reading.context.tokens_of(a.start, a.end) for a in example.answers]
    return any(
        w.context_offset <= span[0] and span[1] < w.context_offset + w.context_length
        for w in reading.windows
        for span in spans
        if span is not None
    )


@click.command(help=__doc__)
@click.argument("bundle", type=click.Path(path_type=Path), required=False)
@click.argument("data", type=click.Path(path_type=Path, exists=True), required=False)
@click.option(
    "--held-out", type=click.Path(path_type=Path, exists=True), help="Ask of the articles in this JSONL only."
)
@click.option("--questions", default=300, show_default=True, type=click.IntRange(min=10))
@click.option("--seed", default=7, show_default=True)
def main(bundle: Path | None, data: Path | None, held_out: Path | None, questions: int, seed: int) -> None:
    """Measures, writes the JSON and the docs, and prints the table."""
    if bundle is not None:
        if data is None:
            raise click.UsageError("give the file in SQuAD's form whose articles are to be read too")
        write_json(RESULTS, run(bundle, data, held_out, questions, seed))
    shown = table(json.loads(RESULTS.read_text(encoding="utf-8")))
    before, _, rest = DOCS.read_text(encoding="utf-8").partition(BEGIN)
    DOCS.write_text("\n".join([before + BEGIN, *shown, END + rest.partition(END)[2]]), encoding="utf-8")
    click.echo("\n".join(shown))


def run(bundle: Path, data: Path, held_out: Path | None, questions: int, seed: int) -> dict[str, Any]:
    """The content of results/long_documents.json."""
    found = articles(data)
    held = {json.loads(line)["context"] for line in held_out.read_text().splitlines()} if held_out else set()
    rows = asked_of(found, held, questions, seed)
    examples = [row.example for row in rows]
    answerer = Answerer.load(bundle, device="cpu", context_cache_bytes=2**30)
    answers: dict[int | None, list[Answer]] = {count: [] for count in COUNTS}
    seconds: dict[int | None, list[float]] = {count: [] for count in COUNTS}
    gold: dict[int | None, list[bool]] = {count: [] for count in COUNTS}
    read: dict[int | None, list[int]] = {count: [] for count in COUNTS}
    tokenising: list[float] = []
    with click.progressbar(examples, label="answering", file=sys.stderr) as bar:
        for number, example in enumerate(bar):
            started = time.perf_counter()
            answerer.encoder.encode(example.context)
            tokenising.append(time.perf_counter() - started)
            answerer.begin(example.question, example.context, Options())  # at hand from here on
            turn = number % len(COUNTS)
            for count in COUNTS[turn:] + COUNTS[:turn]:
                options = Options(prefilter=count)
                started = time.perf_counter()
                reading = answerer.read(example.question, example.context, options)
                best = to_answers(reading, options)
                seconds[count].append(time.perf_counter() - started)
                answers[count].append(best[0] if best else Answer("", 0, 0, 0.0))
                gold[count].append(gold_read(reading, example))
                read[count].append(len(reading.windows))
    scores = {count: score(examples, answers[count]) for count in COUNTS}
    whole = scores[None]
    figures: list[dict[str, Any]] = []
    for count in COUNTS:
        differences = scores[count].rows_f1 - whole.rows_f1
        figures.append(
            {
                "prefilter": count,
                "f1": scores[count].f1,
                "exact_match": scores[count].exact_match,
                "f1_difference": 100 * float(differences.mean()),
                "f1_difference_interval": list(bootstrap_interval(differences)),
                "gold_read": 100 * statistics.mean(gold[count]),
                "windows_read": statistics.mean(read[count]),
                "ms_a_question": 1000 * statistics.mean(seconds[count]),
                "speed_up": _ratios(seconds[None], seconds[count]),
                "speed_up_of_the_first_question": _ratios(
                    [a + b for a, b in zip(seconds[None], tokenising, strict=True)],
                    [a + b for a, b in zip(seconds[count], tokenising, strict=True)],
                ),
            }
        )
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "environment": {**diagnose(), "load_average": os.getloadavg()[0], "threads": answerer.model.threads},  # type: ignore[attr-defined]
        "bundle": {"name": bundle.name, "sha256": open_bundle(bundle).hash},
        "data": data.name,
        "data_sha256": hash_examples(examples),
        "held_out": held_out is not None,
        "seed": seed,
        "questions": len(rows),
        "articles": len({row.article for row in rows}),
        "characters_an_article": statistics.mean(len(e.context) for e in examples),
        "settings": answerer.settings.to_dict(),
        "ms_to_tokenise": 1000 * statistics.mean(tokenising),
        "table": figures,
        "million": _million(bundle, found, examples[0].question, RESULTS.parent),
    }


def table(report: dict[str, Any]) -> list[str]:
    """The figures as tables in Markdown."""

    def ratio(found: dict[str, float]) -> str:
        return f"{found['median']:.2f} ({found['least']:.2f} to {found['most']:.2f})"

    lines = [
        "| `prefilter` | x all windows | the first question | F1 | F1 against all windows | EM | answer in what was read | windows |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in report["table"]:
        low, high = row["f1_difference_interval"]
        lines.append(
            f"| {row['prefilter'] or 'none'} | {ratio(row['speed_up'])} | {row['speed_up_of_the_first_question']['median']:.2f} "
            f"| {row['f1']:.1f} | {row['f1_difference']:+.1f} ({low:+.1f} to {high:+.1f}) | {row['exact_match']:.1f} "
            f"| {row['gold_read']:.1f} % | {row['windows_read']:.1f} |"
        )
    environment = report["environment"]
    machine = (
        f"{environment['cpu']['model']}, {environment['threads']} threads, ONNX Runtime {environment['packages']['onnxruntime']}, "
        f"commit {environment['commit']}, load average {environment['load_average']:.1f}"
    )
    lines += [
        "",
        f"{report['questions']} questions on {report['articles']} {'held-out ' if report['held_out'] else ''}articles of {report['data']}, "
        f"of {report['characters_an_article']:,.0f} characters in the mean of the questions; {report['bundle']['name']}; {machine}.",
        "",
        "| a million characters | windows read | the first question | tokenising in it | the next | memory above start |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {name} | {m['windows_read']} | {m['seconds']:.1f} s | {m['seconds_to_tokenise']:.1f} s "
        f"| {m['seconds_of_the_next_question']:.1f} s | {m['peak_bytes'] / 1e6:.0f} MB |"
        for name, m in report["million"].items()
    ]
    return lines


def _ratios(whole: Sequence[float], part: Sequence[float]) -> dict[str, float]:
    """The time of all windows over that of some, in each tenth of the questions."""
    tenths = np.array_split(np.arange(len(whole)), 10)
    found = [float(np.asarray(whole)[i].sum() / np.asarray(part)[i].sum()) for i in tenths]
    return {"median": statistics.median(found), "least": min(found), "most": max(found)}


def _million(
    bundle: Path, found: dict[str, list[dict[str, Any]]], question: str, folder: Path
) -> dict[str, dict[str, Any]]:
    """One document of ``CHARACTERS`` in a new process, with all windows and with 5."""
    text = JOIN.join(joined(paragraphs)[0] for paragraphs in found.values())
    text = (text * (1 + CHARACTERS // len(text)))[:CHARACTERS]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f".long-{os.getpid()}.txt"
    path.write_text(text, encoding="utf-8")
    report = {}
    try:
        for name, count in (("all windows", 0), ("prefilter 5", 5)):
            command = [sys.executable, "-c", MEMORY, str(bundle), str(path), question, str(count)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            report[name] = {"characters": len(text), **json.loads(done.stdout)}
            report[name]["peak_bytes_a_character"] = report[name]["peak_bytes"] / len(text)
    finally:
        path.unlink()
    return report


if __name__ == "__main__":
    try:
        main()
    except QadeployError as error:
        raise SystemExit(f"Error: {error}") from error
