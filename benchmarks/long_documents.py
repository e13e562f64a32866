r"""Long documents: what ``prefilter`` saves and costs, and the cost of a document of a million characters.

    python models/prepare_data.py ../shared/data DATA
    python -m benchmarks.long_documents bundles/base-int8 ../shared/data/squadshifts_new_wiki.json \
        --held-out DATA/held_out_wiki.jsonl
    python -m benchmarks.long_documents      # only rewrites the table in docs/scale.md from the JSON

All paragraphs of an article are one context, so the answer lies in one of a few dozen windows. Each question is
answered with every N and without ``prefilter``, in turns, so that ratios compare neighbouring runs: the median over
tenths of the questions, with the minimum and the maximum. The article is tokenised before; that time is measured
separately and added to both sides in "first question". F1 is SQuAD's; its difference to all windows is a mean over
questions with a 95 % bootstrap interval. "gold read": questions with a whole annotated answer in a window that was read.

Questions on a document of a million characters, many articles joined, are answered in a separate process, with and
without ``prefilter``. Measured are the seconds, and the growth of peak memory after one short question.

Writes ``results/long_documents.json`` and the table between the markers in docs/scale.md.
"""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.harness import (
    RESULTS,
    Json,
    bundle_facts,
    ranged,
    read_report,
    report,
    run,
    spread,
    where_measured,
    write_report,
    write_table,
)
from qadeploy import Answerer
from qadeploy.core.metrics import bootstrap_interval, score
from qadeploy.core.settings import Options
from qadeploy.data.loading import hash_examples
from qadeploy.inference.pairs import DecodedPair, to_answers
from qadeploy.records import NO_ANSWER, Annotation, Answer, Example

COUNTS: tuple[int | None, ...] = (1, 2, 3, 5, 8, 12, 20, None)
REPORT = "long_documents.json"
Articles = dict[str, list[Json]]  # paragraphs by title
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
class ArticleQuestion:
    """A question about a whole article."""

    example: Example
    article: str


def articles(source: Path) -> Articles:
    """The paragraphs of each article of a SQuAD file, by title."""
    return {article["title"]: article["paragraphs"] for article in json.loads(source.read_text())["data"]}


def joined(paragraphs: Sequence[Json]) -> tuple[str, list[Example]]:
    """The text of an article, and its questions with the places of their answers in that text."""
    context = JOIN.join(p["context"] for p in paragraphs)
    examples, begin = [], 0
    for paragraph in paragraphs:
        for qa in paragraph["qas"]:
            answers = tuple(Annotation(a["text"], a["answer_start"] + begin) for a in qa["answers"])
            examples.append(Example(qa["id"], qa["question"], context, answers))
        begin += len(paragraph["context"]) + len(JOIN)
    return context, examples


def asked_of(found: Articles, held: set[str], count: int, seed: int) -> list[ArticleQuestion]:
    """Draws questions from the articles that contain any of the contexts in ``held`` (from all if it is empty)."""
    rows = []
    for title, paragraphs in found.items():
        if not held or any(p["context"] in held for p in paragraphs):
            rows += [ArticleQuestion(example, title) for example in joined(paragraphs)[1]]
    if not rows:
        raise SystemExit("Error: none of the articles holds a context of --held-out")
    random.Random(seed).shuffle(rows)
    return rows[:count]


def gold_read(reading: DecodedPair, example: Example) -> bool:
    """Whether a whole annotated answer lies in a window that was read."""
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
    "--held-out", type=click.Path(path_type=Path, exists=True), help="Only ask about the articles in this JSONL file."
)
@click.option("--questions", default=300, show_default=True, type=click.IntRange(min=10))
@click.option("--seed", default=7, show_default=True)
@click.option("--check", is_flag=True, help="Do not write the table; fail if it does not match the results.")
def main(bundle: Path | None, data: Path | None, check: bool, **options: Any) -> None:
    """Measures, writes the JSON and the docs, and prints the table."""
    if bundle is not None:
        if data is None:
            raise click.UsageError("also give the SQuAD file whose articles are to be read")
        write_report(RESULTS / REPORT, measure(bundle, data, **options))
    write_table("docs/scale.md", "long documents", table(read_report(REPORT)), check=check)


def measure(bundle: Path, data: Path, held_out: Path | None, questions: int, seed: int) -> Json:
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
            answerer.encode(example.question, example.context, Options())  # puts the tokens into the context cache
            turn = number % len(COUNTS)
            for count in COUNTS[turn:] + COUNTS[:turn]:
                options = Options(prefilter=count)
                started = time.perf_counter()
                reading = answerer.read(example.question, example.context, options)
                best = to_answers(reading, options)
                seconds[count].append(time.perf_counter() - started)
                answers[count].append(best[0] if best else NO_ANSWER)
                gold[count].append(gold_read(reading, example))
                read[count].append(len(reading.windows))
    scores = {count: score(examples, answers[count]) for count in COUNTS}
    whole = scores[None]
    figures: list[Json] = []
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
    return report(
        environment={"threads": answerer.model.threads},  # type: ignore[attr-defined]
        bundle=bundle_facts(bundle),
        data=data.name,
        data_sha256=hash_examples(examples),
        held_out=held_out is not None,
        seed=seed,
        questions=len(rows),
        articles=len({row.article for row in rows}),
        characters_an_article=statistics.mean(len(e.context) for e in examples),
        settings=answerer.settings.to_dict(),
        ms_to_tokenise=1000 * statistics.mean(tokenising),
        table=figures,
        million=_million(bundle, found, examples[0].question),
    )


def table(found: Json) -> list[str]:
    """The figures as tables in Markdown."""
    lines = [
        "| `prefilter` | x all windows | the first question | F1 | F1 against all windows | EM | answer in what was read | windows |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in found["table"]:
        low, high = row["f1_difference_interval"]
        lines.append(
            f"| {row['prefilter'] or 'none'} | {ranged(row['speed_up'])} | {row['speed_up_of_the_first_question']['median']:.2f} "
            f"| {row['f1']:.1f} | {row['f1_difference']:+.1f} ({low:+.1f} to {high:+.1f}) | {row['exact_match']:.1f} "
            f"| {row['gold_read']:.1f} % | {row['windows_read']:.1f} |"
        )
    environment = found["environment"]
    machine = f"{where_measured(environment)}, load average {environment['load_average']:.1f}"
    lines += [
        "",
        f"{found['questions']} questions on {found['articles']} {'held-out ' if found['held_out'] else ''}articles of {found['data']}, "
        f"of {found['characters_an_article']:,.0f} characters in the mean of the questions; {found['bundle']['name']}; {machine}.",
        "",
        "| a million characters | windows read | the first question | tokenising in it | the next | memory above start |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {name} | {m['windows_read']} | {m['seconds']:.1f} s | {m['seconds_to_tokenise']:.1f} s "
        f"| {m['seconds_of_the_next_question']:.1f} s | {m['peak_bytes'] / 1e6:.0f} MB |"
        for name, m in found["million"].items()
    ]
    return lines


def _ratios(whole: Sequence[float], part: Sequence[float]) -> dict[str, float]:
    """The time with all windows divided by the time with some, in each tenth of the questions."""
    tenths = np.array_split(np.arange(len(whole)), 10)
    found = [float(np.asarray(whole)[i].sum() / np.asarray(part)[i].sum()) for i in tenths]
    return spread(found)


def _million(bundle: Path, found: Articles, question: str) -> dict[str, Json]:
    """Measures one document of ``CHARACTERS`` characters in a new process, with all windows and with 5."""
    text = JOIN.join(joined(paragraphs)[0] for paragraphs in found.values())
    text = (text * (1 + CHARACTERS // len(text)))[:CHARACTERS]
    measured = {}
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", suffix=".txt") as file:
        file.write(text)
        file.flush()
        for name, count in (("all windows", 0), ("prefilter 5", 5)):
            command = [sys.executable, "-c", MEMORY, str(bundle), file.name, question, str(count)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            measured[name] = {"characters": len(text), **json.loads(done.stdout)}
            measured[name]["peak_bytes_a_character"] = measured[name]["peak_bytes"] / len(text)
    return measured


if __name__ == "__main__":
    run(main)
