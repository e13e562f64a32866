r"""Questions with several answers ("Which rivers meet there?"): how far ``distinct`` with a threshold goes.

    python models/prepare_data.py ../shared/data DATA
    python -m benchmarks.several_answers models/minilm-l6-qa-int8 --data DATA
    python -m benchmarks.several_answers --data DATA --candidates    # lists the candidates for several_answers.jsonl
    python -m benchmarks.several_answers      # only rewrites the table in docs/passages.md from the JSON

The data have one span per annotator, so several answers are annotated as one list: "Texas, California and Florida".
Candidates are questions of the base model's held-out sets for which at least two annotators gave the same list (split
at ``SEPARATOR``), and questions of the handbook, where one annotator suffices. ``several_answers.jsonl`` holds those
whose items are answers by themselves, as judged by hand; a few items are corrected. All others have a "list" that is
one answer: a date, a name ("Pratt & Whitney"), words with a shared head ("western and southern Connecticut").

A set of answers is compared with the set of items by F1, per question, in two ways: texts are equal after SQuAD's
normalisation (``equal``), or pairs of answer and item, one to one, have SQuAD's token F1 (``partial``). A question
outside that file has one item: the annotator's answer that fits best. A threshold is chosen on either half of the
documents by ``equal`` over the questions with several answers, and used on the other; the best answer is always kept.

Writes ``results/several_answers.json`` and the table between the markers in docs/passages.md.
"""

from __future__ import annotations

import json
import random
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.harness import RESULTS, ROOT, Json, read_report, report, run, where_measured, write_report, write_table
from qadeploy import Answerer
from qadeploy.cli.common import load_predictor
from qadeploy.core.metrics import bootstrap_interval, f1, normalize
from qadeploy.core.settings import Options
from qadeploy.records import BoolArray, Span
from qadeploy.shipped import HANDBOOK

REPORT = "several_answers.json"
SEVERAL = ROOT / "benchmarks" / "several_answers.jsonl"
SETS = ("wiki", "reddit", "amazon")
SEPARATOR = re.compile(r"\s*[,;]\s+(?:and\s+|or\s+|&\s+)?|\s+(?:and|or|&)\s+")
LONGEST_ITEM = 6  # the maximum words in an item of a candidate
CANDIDATES = 150  # the spans among which those without a separator are looked for
MOST = 20  # the maximum answers of a rule
SEED = 11
DISTINCT = Options(top_k=MOST, distinct=True, allow_no_answer=False)
ALL = Options(top_k=CANDIDATES, allow_no_answer=False)


@dataclass(frozen=True, slots=True)
class Question:
    """A question with the sets of right answers: its list of items, or one answer per annotator."""

    id: str
    document: str
    text: str
    context: str
    golds: tuple[tuple[str, ...], ...]
    several: bool


def questions(data: Path) -> Iterator[Question]:
    """All questions held out from the base model that have an answer, and the handbook's."""
    several = {row["id"]: tuple(row["items"]) for row in map(json.loads, SEVERAL.read_text("utf-8").splitlines())}
    articles = {row["id"]: row["context"] for row in _rows(data / "held_out_articles.jsonl")}
    for source in [*(data / f"held_out_{name}.jsonl" for name in SETS), HANDBOOK]:
        for row in _rows(source):
            given = [row["answer"]] if "answer" in row else row["answers"]["text"]
            document = str(row.get("passage") or articles.get(row["id"], row["context"]))
            items = several.get(row["id"])
            golds = (items,) if items else tuple((text,) for text in given)
            if golds:
                yield Question(row["id"], document, row["question"], row["context"], golds, bool(items))


def _rows(path: Path) -> Iterator[Json]:
    with path.open(encoding="utf-8") as stream:
        yield from map(json.loads, stream)


def split(text: str) -> list[str]:
    """The items of a list; the text itself if it is not a list."""
    return [item for item in SEPARATOR.split(text.strip(" \n.,;")) if item.strip()]


def candidates(data: Path) -> Iterator[Json]:
    """The candidates for ``several_answers.jsonl``, with the list that annotators agree on."""
    for source in [*(data / f"held_out_{name}.jsonl" for name in SETS), HANDBOOK]:
        for row in _rows(source):
            given = [row["answer"]] if "answer" in row else row["answers"]["text"]
            lists = {frozenset(map(normalize, items)): items for items in map(split, given)}
            counts = Counter(frozenset(map(normalize, split(text))) for text in given)
            fit = {key: n for key, n in counts.items() if len(key) > 1 and _short(key)}
            agreed = max(fit, key=lambda key: fit[key], default=None)
            if agreed is not None and fit[agreed] >= (1 if source == HANDBOOK else 2):
                yield {"id": row["id"], "question": row["question"], "items": lists[agreed]}


def _short(items: frozenset[str]) -> bool:
    return all(len(item.split()) <= LONGEST_ITEM for item in items)


# ---------------------------------------------------------------- judging


def equal(answers: Sequence[str], gold: Sequence[str]) -> float:
    """F1 of two sets of texts, which are compared for equality."""
    found, wanted = set(map(normalize, answers)), set(map(normalize, gold))
    return 2 * len(found & wanted) / (len(found) + len(wanted))


def partial(answers: Sequence[str], gold: Sequence[str]) -> float:
    """F1 of two sets of texts by the token F1 of pairs, which are formed greedily from the best."""
    pairs = sorted(((-f1(a, g), i, j) for i, a in enumerate(answers) for j, g in enumerate(gold)))
    left, right, total = set(range(len(answers))), set(range(len(gold))), 0.0
    for negative, i, j in pairs:
        if i in left and j in right:
            left.remove(i)
            right.remove(j)
            total -= negative
    return 2 * total / (len(answers) + len(gold))


@dataclass(frozen=True, slots=True)
class Read:
    """A question with the model's best spans without overlaps: of all spans, and of those without a separator."""

    question: Question
    distinct: tuple[Span, ...]
    plain: tuple[Span, ...]
    null_logit: float

    @classmethod
    def of(cls, answerer: Answerer, question: Question) -> Read:
        """Runs the model once and decodes twice."""
        pair = answerer.encode(question.text, question.context, DISTINCT)
        logits = answerer.model.run(pair.windows)
        distinct = answerer.decode(pair, logits, DISTINCT).decoded
        plain: list[Span] = []
        for span in answerer.decode(pair, logits, ALL).decoded.spans:
            apart = all(span.end <= other.start or span.start >= other.end for other in plain)
            if apart and len(split(question.context[span.start : span.end])) == 1:
                plain.append(span)
        return cls(question, distinct.spans, tuple(plain[:MOST]) or distinct.spans[:1], distinct.null_logit)

    def texts(self, spans: Sequence[Span]) -> list[str]:
        """The texts of spans."""
        return [self.question.context[span.start : span.end] for span in spans]


Keeps = Callable[
    [Read, Span, Span, float], bool
]  # whether a span is an answer, given the reading, the best span, the span and a threshold
THRESHOLDS: dict[str, tuple[Keeps, tuple[float, ...]]] = {
    "score": (lambda _, best, span, x: span.score >= x, (0.001, 0.003, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.3, 0.5)),
    "share of the best score": (
        lambda _, best, span, x: span.score >= x * best.score,
        (0.003, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0),
    ),
    "logit above the null logit": (
        lambda read, _, span, x: span.logit - read.null_logit >= x,
        tuple(map(float, range(-4, 14))),
    ),
}


def kept(read: Read, spans: Sequence[Span], keeps: Keeps, threshold: float) -> list[str]:
    """The best answer, and the others that pass the threshold."""
    return read.texts([spans[0], *(s for s in spans[1:] if keeps(read, spans[0], s, threshold))])


def measured(reads: Sequence[Read], answers: Sequence[Sequence[str]], **more: Any) -> Json:
    """Both F1 with their intervals, over the questions with several answers and over the other questions."""
    scores = {
        judge.__name__: np.asarray(
            [max(judge(found, gold) for gold in r.question.golds) for r, found in zip(reads, answers, strict=True)]
        )
        for judge in (equal, partial)
    }
    several = np.asarray([read.question.several for read in reads])
    counts = np.asarray([len(found) for found in answers])

    def of(chosen: Any) -> Json:
        return {
            "equal": 100 * float(scores["equal"][chosen].mean()),
            "equal_interval": list(bootstrap_interval(scores["equal"][chosen])),
            "partial": 100 * float(scores["partial"][chosen].mean()),
            "partial_interval": list(bootstrap_interval(scores["partial"][chosen])),
            "answers": float(counts[chosen].mean()),
        }

    return {**more, "several": of(several), "one": of(~several)}


def chosen_on_the_other_half(reads: Sequence[Read], spans: str, kind: str) -> Json:
    """``measured``, where each question uses the threshold that is best on the other half of the documents."""
    keeps, values = THRESHOLDS[kind]
    first = half_of([read.question.document for read in reads])
    found: list[list[str]] = [[] for _ in reads]
    thresholds = []
    for half in (True, False):
        best = max(values, key=lambda x: (_mean(reads, first != half, spans, keeps, x), x))
        thresholds.append(best)
        for i in np.flatnonzero(first == half).tolist():
            found[i] = kept(reads[i], getattr(reads[i], spans), keeps, best)
    return measured(reads, found, thresholds=thresholds)


def _mean(reads: Sequence[Read], half: BoolArray, spans: str, keeps: Keeps, threshold: float) -> float:
    some = [read for read, inside in zip(reads, half, strict=True) if inside and read.question.several]
    return float(np.mean([equal(kept(r, getattr(r, spans), keeps, threshold), r.question.golds[0]) for r in some]))


def half_of(documents: Sequence[str]) -> BoolArray:
    """Whether each question belongs to the first half of the documents, drawn at random."""
    drawn = sorted(set(documents))
    random.Random(SEED).shuffle(drawn)
    chosen = set(drawn[: len(drawn) // 2])
    return np.asarray([document in chosen for document in documents])


def measure(folder: Path, data: Path) -> Json:
    """The content of results/several_answers.json."""
    answerer: Answerer = load_predictor(str(folder), "cpu")
    held_out = list(questions(data))
    with click.progressbar(held_out, label=str(folder), file=sys.stderr) as bar:
        reads = [Read.of(answerer, question) for question in bar]
    best = [read.texts(read.distinct[:1]) for read in reads]
    rules: Json = {"best": measured(reads, best)}
    for name, spans in (("distinct", "distinct"), ("plain", "plain")):
        rules[name] = {kind: chosen_on_the_other_half(reads, spans, kind) for kind in THRESHOLDS}
        counted = [read.texts(getattr(read, spans)[: len(read.question.golds[0])]) for read in reads]
        rules[name]["count"] = measured(reads, counted)
    rules["split"] = measured(reads, [split(texts[0]) for texts in best])
    several = [(read, texts[0]) for read, texts in zip(reads, best, strict=True) if read.question.several]
    lists = [sum(_holds(text, item) for item in read.question.golds[0]) > 1 for read, text in several]
    first = half_of([read.question.document for read in reads])
    return report(
        data=[*(f"held_out_{name}" for name in SETS), "handbook"],
        model=folder.name,
        questions=len(reads),
        candidates=sum(1 for _ in candidates(data)),
        several=len(several),
        several_by_items=dict(sorted(Counter(str(len(read.question.golds[0])) for read, _ in several).items())),
        several_by_half=[
            int(sum(r.question.several for r, f in zip(reads, first, strict=True) if f == h)) for h in (1, 0)
        ],
        best_holds_several_items=100 * float(np.mean(lists)),
        rules=rules,
    )


def _holds(text: str, item: str) -> bool:
    return f" {normalize(item)} " in f" {normalize(text)} "


def table(found: Json) -> list[str]:
    """The figures as a table in Markdown."""
    rules = found["rules"]
    named = [("the best answer alone", rules["best"])]
    for name, words in (("distinct", "`distinct`"), ("plain", "spans without a separator")):
        named += [(f"{words}, threshold on the {kind}", rules[name][kind]) for kind in THRESHOLDS]
        named.append((f"{words}, as many as there are items", rules[name]["count"]))
    named.append(("the best answer, split at separators", rules["split"]))
    lines = [
        "| answers | F1, equal texts | F1, partial | answers per question | other questions: F1, equal | answers per question |",
        "|---|---|---|---|---|---|",
    ]
    for words, rule in named:
        several, one = rule["several"], rule["one"]
        low, high = several["equal_interval"]
        lines.append(
            f"| {words} | {several['equal']:.1f} ({low:.1f} to {high:.1f}) | {several['partial']:.1f} | {several['answers']:.2f} "
            f"| {one['equal']:.1f} | {one['answers']:.2f} |"
        )
    lines += [
        "",
        f"{found['several']} questions with several answers, {found['questions'] - found['several']} others; {found['model']}, "
        f"{where_measured(found['environment'])}.",
    ]
    return lines


@click.command(help=__doc__)
@click.argument("model", type=click.Path(path_type=Path, exists=True), required=False)
@click.option("--data", type=click.Path(path_type=Path, exists=True), help="The folder that prepare_data.py wrote.")
@click.option("--candidates", "listed", is_flag=True, help="Only print the candidates, as JSON lines.")
@click.option("--check", is_flag=True, help="Do not write the table; fail if it does not match the results.")
def main(model: Path | None, data: Path | None, listed: bool, check: bool) -> None:
    """Measures, writes the JSON and the docs, and prints the table."""
    if (model or listed) and data is None:
        raise click.UsageError("also give --data")
    if listed and data:
        for row in candidates(data):
            click.echo(json.dumps(row, ensure_ascii=False))
        return
    if model and data:
        write_report(RESULTS / REPORT, measure(model, data))
    write_table("docs/passages.md", "several", table(read_report(REPORT)), check=check)


if __name__ == "__main__":
    run(main)
