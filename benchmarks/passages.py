r"""One question among many passages: whether the right one comes first, and whether the answer is right.

    python models/prepare_data.py ../shared/data DATA
    python -m benchmarks.passages models/minilm-l6-qa models/minilm-l6-qa-int8 --data DATA
    python -m benchmarks.passages      # only rewrites the table in docs/passages.md from the JSON

Each held-out question is asked of its own paragraph and the 4 or 19 other held-out paragraphs that BM25 ranks highest
for it, in random order. Such a neighbour may contain the answer too; nothing is filtered out. The passages are read

- together, as ``contexts``: one softmax over the spans of all passages;
- alone: each passage as a separate ``context``, and the answer with the highest score wins;

and together again with "no answer" competing by the stored null threshold: on all passages, and on the neighbours
without the right one, where "no answer" is right (unless a neighbour contains an answer). All of these use one run of
the model over the windows. EM and F1 are SQuAD's, with a 95 % bootstrap interval over questions. "right first": the
first answer comes from the question's own paragraph.

Writes ``results/passages.json`` and the table between the markers in docs/passages.md.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import bm25s
import click
import numpy as np

from benchmarks.harness import RESULTS, Json, read_report, report, run, where_measured, write_report, write_table
from qadeploy import Answerer
from qadeploy.cli.common import load_predictor
from qadeploy.core.metrics import bootstrap_interval, score
from qadeploy.core.settings import Options
from qadeploy.data.loading import hash_examples
from qadeploy.inference.pairs import to_answers
from qadeploy.records import NO_ANSWER, Annotation, Answer, Example, Logits

REPORT = "passages.json"
SETS = ("wiki", "reddit", "amazon")
COUNTS = (5, 20)
ALWAYS, COMPETES = Options(allow_no_answer=False), Options(allow_no_answer=True)


@dataclass(frozen=True, slots=True)
class Among:
    """A question, its passages (its own, then the others, best first by BM25), and the order to give them in."""

    example: Example
    passages: tuple[str, ...]
    order: tuple[int, ...]

    def given(self, count: int, *, right: bool = True) -> list[int]:
        """The indices of the first ``count`` passages, in the order to give them in, with or without the right one."""
        return [number for number in self.order if number < count and (right or number)]


def held_out(data: Path) -> list[Example]:
    """All held-out questions that have an answer."""
    rows = [
        json.loads(line)
        for name in SETS
        for line in (data / f"held_out_{name}.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    found = []
    for row in rows:
        pairs = zip(row["answers"]["text"], row["answers"]["answer_start"], strict=True)
        annotations = tuple(Annotation(text, start) for text, start in pairs)
        if annotations:
            found.append(Example(row["id"], row["question"], row["context"], annotations))
    return found


def among(examples: Sequence[Example], texts: Sequence[str], generator: random.Random) -> list[Among]:
    """Each question with its own paragraph and the ``max(COUNTS) - 1`` neighbours."""
    most = max(COUNTS)
    index = bm25s.BM25()
    index.index(bm25s.tokenize(list(texts), stopwords="en", show_progress=False), show_progress=False)
    queries = bm25s.tokenize([e.question for e in examples], stopwords="en", show_progress=False)
    ranked, _ = index.retrieve(queries, k=most, show_progress=False)
    found = []
    for example, numbers in zip(examples, ranked, strict=True):
        others = [texts[int(i)] for i in numbers if texts[int(i)] != example.context][: most - 1]
        order = list(range(most))
        generator.shuffle(order)
        found.append(Among(example, (example.context, *others), tuple(order)))
    return found


@dataclass(slots=True)
class Reading:
    """The logits of every passage of a question, from which any subset can be decoded together."""

    answerer: Answerer
    asked: Among
    logits: list[list[Logits]]

    @classmethod
    def of(cls, answerer: Answerer, asked: Among) -> Reading:
        """Runs the model over the windows of all passages."""
        alone = [answerer.encode(asked.example.question, passage, ALWAYS) for passage in asked.passages]
        found = iter(answerer.model.run([window for pair in alone for window in pair.windows]))
        return cls(answerer, asked, [[next(found) for _ in pair.windows] for pair in alone])

    def together(self, numbers: Sequence[int], options: Options) -> Answer:
        """The best answer of some passages read together; ``passage`` is one of ``numbers``."""
        passages = [self.asked.passages[number] for number in numbers]
        pair = self.answerer.encode(self.asked.example.question, passages, options)
        logits = [each for number in numbers for each in self.logits[number]]
        best = next(iter(to_answers(self.answerer.decode(pair, logits, options), options)), NO_ANSWER)
        return best if best.passage is None else replace(best, passage=numbers[best.passage])

    def alone(self, numbers: Sequence[int]) -> Answer:
        """The best answer of some passages read one by one, by score."""
        found = []
        for number in numbers:
            pair = self.answerer.encode(self.asked.example.question, self.asked.passages[number], ALWAYS)
            best = to_answers(self.answerer.decode(pair, self.logits[number], ALWAYS), ALWAYS)
            found += [replace(answer, passage=number) for answer in best]
        return max(found, key=lambda answer: answer.score, default=NO_ANSWER)


def figures(examples: Sequence[Example], answers: Sequence[Answer]) -> Json:
    """EM, F1 and the share with the right passage first, in percent."""
    scores = score(examples, answers)
    right = np.asarray([answer.passage == 0 for answer in answers], dtype=np.float64)
    return {
        "exact_match": scores.exact_match,
        "f1": scores.f1,
        "f1_interval": list(bootstrap_interval(scores.rows_f1)),
        "right_first": 100 * float(right.mean()),
        "right_first_interval": list(bootstrap_interval(right)),
        "no_answer": 100 * statistics.mean(not answer.text for answer in answers),
    }


def measure_model(folder: Path, rows: Sequence[Among]) -> Json:
    """The figures of one model."""
    answerer: Answerer = load_predictor(str(folder), "cpu")
    examples = [row.example for row in rows]
    with click.progressbar(rows, label=str(folder), file=sys.stderr) as bar:
        readings = [Reading.of(answerer, row) for row in bar]
    found: Json = {"1": figures(examples, [each.together([0], ALWAYS) for each in readings])}
    for count in COUNTS:
        sets = [each.asked.given(count) for each in readings]
        pairs = list(zip(readings, sets, strict=True))
        absent = [each.together(each.asked.given(count, right=False), COMPETES) for each in readings]
        found[str(count)] = {
            "together": figures(examples, [each.together(numbers, ALWAYS) for each, numbers in pairs]),
            "alone": figures(examples, [each.alone(numbers) for each, numbers in pairs]),
            "no_answer_competes": figures(examples, [each.together(numbers, COMPETES) for each, numbers in pairs]),
            "no_answer_without_the_right_one": 100 * statistics.mean(not answer.text for answer in absent),
        }
    return {"model": folder.name, "settings": answerer.settings.to_dict(), "passages": found}


def measure(models: Sequence[Path], data: Path, questions: int, seed: int) -> Iterator[Json]:
    """The content of results/passages.json, after each model."""
    everything = held_out(data)
    texts = list(dict.fromkeys(example.context for example in everything))
    generator = random.Random(seed)
    examples = generator.sample(everything, min(questions, len(everything)))
    rows = among(examples, texts, generator)
    measured: list[Json] = []
    for folder in models:
        measured.append(measure_model(folder, rows))
        yield report(
            data=[f"held_out_{name}" for name in SETS],
            data_sha256=hash_examples(examples),
            questions=len(examples),
            paragraphs=len(texts),
            bm25s=bm25s.__version__,
            seed=seed,
            models=measured,
        )


def table(found: Json) -> list[str]:
    """The figures as a table in Markdown."""
    lines = [
        "| model | passages | read | right passage first | EM | F1 |",
        "|---|---|---|---|---|---|",
    ]
    for model in found["models"]:
        for count, row in model["passages"].items():
            ways = {"": row} if count == "1" else {"together": row["together"], "one by one": row["alone"]}
            for way, f in ways.items():
                low, high = f["f1_interval"]
                lines.append(
                    f"| {model['model']} | {count} | {way} | {f['right_first']:.1f} % | {f['exact_match']:.1f} "
                    f"| {f['f1']:.1f} ({low:.1f} to {high:.1f}) |"
                )
    lines += [
        "",
        '| model | passages | EM and F1 if "no answer" competes | "no answer" | without the right passage |',
        "|---|---|---|---|---|",
    ]
    for model in found["models"]:
        for count in map(str, COUNTS):
            row = model["passages"][count]
            f = row["no_answer_competes"]
            lines.append(
                f"| {model['model']} | {count} | {f['exact_match']:.1f}, {f['f1']:.1f} | {f['no_answer']:.1f} % "
                f"| {row['no_answer_without_the_right_one']:.1f} % |"
            )
    environment = found["environment"]
    lines += [
        "",
        f"{found['questions']} held-out questions, neighbours from {found['paragraphs']} held-out paragraphs; "
        f"bm25s {found['bm25s']}; {where_measured(environment)}.",
    ]
    return lines


@click.command(help=__doc__)
@click.argument("models", type=click.Path(path_type=Path, exists=True), nargs=-1)
@click.option("--data", type=click.Path(path_type=Path, exists=True), help="The folder that prepare_data.py wrote.")
@click.option("--questions", default=300, show_default=True, type=click.IntRange(min=10))
@click.option("--seed", default=7, show_default=True)
@click.option("--check", is_flag=True, help="Do not write the table; fail if it does not match the results.")
def main(models: tuple[Path, ...], check: bool, data: Path | None, **options: Any) -> None:
    """Measures, writes the JSON and the docs, and prints the table."""
    if models:
        if data is None:
            raise click.UsageError("also give --data")
        for found in measure(models, data, **options):
            write_report(RESULTS / REPORT, found)
    write_table("docs/passages.md", "passages", table(read_report(REPORT)), check=check)


if __name__ == "__main__":
    run(main)
