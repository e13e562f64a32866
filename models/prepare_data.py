"""Splits the base model's data into a training set and held-out sets.

    python models/prepare_data.py FOLDER OUT

FOLDER holds the new-Wikipedia, Reddit and Amazon parts of SQuAD-shifts and QAMR in SQuAD's format. Held out whole,
drawn with seed 13, are 8 of the 48 Wikipedia articles and 10 % of the Reddit posts and of the Amazon reviews. QAMR has
many questions on each sentence, of which ``QAMR_QUESTIONS`` are drawn.

The held-out Wikipedia articles also make three harder sets:

- ``moved``: each question twice, on its paragraph and on another one of its article in which none of its answers occurs;
- ``removed``: each question twice, on its paragraph and on that paragraph without the sentences of its answers;
- ``articles``: each question on its whole article.

Besides ``train``, these files are for training (docs/training.md):

- ``more``: the questions that ``--max-train-samples 18000`` leaves unused, for a second stage. Its Wikipedia contexts
  include parts of their neighbours, like windows cut from a whole article;
- ``again``, for a third stage: the Wikipedia and Reddit questions of both stages. Wikipedia contexts with parts of their
  neighbours are given without them, the others with them;
- ``again_dev``: the dev set of the second stage, whose questions no stage trains on;
- ``crops``: questions on the sentences around their answers, for a large teacher on a CPU.
"""

from __future__ import annotations

import json
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qadeploy.data.loading import read as read_questions
from qadeploy.data.splits import carve_by_passage
from qadeploy.records import Annotation, Example
from qadeploy.training.negatives import holds_answer, without_answer

SEED = 13
QAMR_QUESTIONS = 6
FIRST_STAGE = 18_600  # rows of train.jsonl: 18,000 questions, and their share of the dev set
CROPS = {"wiki": None, "reddit": 3500, "amazon": 1200, "qamr": 800}  # questions drawn for a teacher; None: all
CROP_SEED, CROP_LENGTHS = 7, (300, 450, 600)  # characters
_BREAK = re.compile(r'[.!?]["”)]?\s+|\n+')
Row = dict[str, Any]
Paragraph = dict[str, Any]


def rows(paragraphs: list[Paragraph]) -> list[Row]:
    """Flat rows with every annotator's answer, offsets as published."""
    return [row_of(example(paragraph, qa)) for paragraph in paragraphs for qa in paragraph["qas"]]


def example(paragraph: Paragraph, qa: dict[str, Any], context: str | None = None, shift: int = 0) -> Example:
    """A question as published, or on a ``context`` in which its paragraph begins at ``shift``."""
    answers = tuple(Annotation(a["text"], a["answer_start"] + shift) for a in qa["answers"])
    return Example(str(qa["id"]), qa["question"], context or paragraph["context"], answers)


def row_of(one: Example) -> Row:
    """The row that ``qadeploy train`` and ``evaluate`` read."""
    answers = {"text": [a.text for a in one.answers], "answer_start": [a.start for a in one.answers]}
    row: Row = {"id": one.id, "context": one.context, "question": one.question, "answers": answers}
    return row if one.answers else {**row, "is_impossible": True}


def moved(articles: list[Any], generator: random.Random) -> Iterator[Row]:
    """Each question on its paragraph and on another one of its article."""
    for article in articles:
        contexts = [p["context"] for p in article["paragraphs"]]
        for paragraph in article["paragraphs"]:
            for qa in paragraph["qas"]:
                one = example(paragraph, qa)
                others = [c for c in contexts if c != one.context and not holds_answer(one, c)]
                if others:
                    yield row_of(one)
                    yield row_of(Example(f"{one.id}#moved", one.question, generator.choice(others)))


def removed(articles: list[Any]) -> Iterator[Row]:
    """Each question on its paragraph and on that paragraph without the sentences of its answers."""
    for paragraph in (p for article in articles for p in article["paragraphs"]):
        for qa in paragraph["qas"]:
            one = example(paragraph, qa)
            rest = without_answer(one)
            if rest:
                yield row_of(one)
                yield row_of(Example(f"{one.id}#removed", one.question, rest))


def whole(articles: list[Any]) -> Iterator[Row]:
    """Each question on its whole article."""
    for article in articles:
        text = "\n\n".join(p["context"] for p in article["paragraphs"])
        shift = 0
        for paragraph in article["paragraphs"]:
            for qa in paragraph["qas"]:
                yield row_of(example(paragraph, qa, text, shift))
            shift += len(paragraph["context"]) + 2


def between(articles: list[Any], generator: random.Random) -> Iterator[Row]:
    """Each question on its paragraph with random parts of both neighbours."""
    for article in articles:
        contexts = ["", *(p["context"] for p in article["paragraphs"]), ""]
        for number, paragraph in enumerate(article["paragraphs"], start=1):
            for qa in paragraph["qas"]:
                before, after = contexts[number - 1], contexts[number + 1]
                before = before[generator.randint(0, len(before)) :].partition(" ")[2]
                after = after[: generator.randint(0, len(after))].rpartition(" ")[0]
                text = "\n\n".join(part for part in (before, paragraph["context"], after) if part)
                yield row_of(example(paragraph, qa, text, len(before) + 2 if before else 0))


def crop(row: Row, length: int, generator: random.Random) -> Row:
    """A question on the sentences of its answers and random ones beside them, in at most ``length`` characters if possible."""
    context, answers = row["context"], row["answers"]
    ends = [start + len(text) for text, start in zip(answers["text"], answers["answer_start"], strict=True)]
    cuts = sorted({0, len(context), *(found.end() for found in _BREAK.finditer(context))})
    first = max(i for i, cut in enumerate(cuts) if cut <= min(answers["answer_start"]))
    last = min(i for i, cut in enumerate(cuts) if cut >= max(ends))
    while wider := [
        (i, j)
        for i, j in ((first - 1, last), (first, last + 1))
        if i >= 0 and j < len(cuts) and cuts[j] - cuts[i] <= length
    ]:
        first, last = generator.choice(wider)
    starts = [start - cuts[first] for start in answers["answer_start"]]
    text = context[cuts[first] : cuts[last]].rstrip()
    return {**row, "context": text, "answers": {**answers, "answer_start": starts}}


def crops(train: list[Row], source_of: dict[str, str]) -> list[Row]:
    """The questions for a teacher, drawn from each source as ``CROPS`` says."""
    generator = random.Random(CROP_SEED)
    cropped = []
    for name, count in CROPS.items():
        found = [row for row in train if source_of[row["id"]] == name]
        drawn = generator.sample(found, count or len(found))
        cropped += [crop(row, generator.choice(CROP_LENGTHS), generator) for row in drawn]
    generator.shuffle(cropped)
    return cropped


def read(source: Path, name: str) -> list[Any]:
    """The articles of a file."""
    return list(json.loads((source / f"{name}.json").read_text(encoding="utf-8"))["data"])


def write(out: Path, name: str, part: list[Row]) -> None:
    """Writes one set."""
    with (out / f"{name}.jsonl").open("w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in part)
    print(f"{name}: {len(part)} questions")


def main(source: Path, out: Path) -> None:
    """Writes the training sets and the held-out sets into ``out``."""
    generator = random.Random(SEED)
    articles = read(source, "squadshifts_new_wiki")
    titles = set(generator.sample(sorted(a["title"] for a in articles), 8))
    held = [a for a in articles if a["title"] in titles]
    trained = [a for a in articles if a["title"] not in titles]
    parts = {"held_out_wiki": rows([p for a in held for p in a["paragraphs"]])}
    sources = {"wiki": rows([p for a in trained for p in a["paragraphs"]])}
    for name in ("reddit", "amazon"):
        texts = [p for a in read(source, f"squadshifts_{name}") for p in a["paragraphs"]]
        drawn = set(generator.sample(range(len(texts)), len(texts) // 10))
        sources[name] = rows([p for i, p in enumerate(texts) if i not in drawn])
        parts[f"held_out_{name}"] = rows([p for i, p in enumerate(texts) if i in drawn])
    sources["qamr"] = []
    for article in read(source, "qamr_wiki"):
        for paragraph in article["paragraphs"]:
            questions = paragraph["qas"]
            chosen = generator.sample(questions, min(QAMR_QUESTIONS, len(questions)))
            sources["qamr"] += rows([{**paragraph, "qas": chosen}])
    source_of = {row["id"]: name for name, part in sources.items() for row in part}
    train = [row for part in sources.values() for row in part]
    random.Random(SEED).shuffle(train)
    first, rest = train[:FIRST_STAGE], train[FIRST_STAGE:]
    wider = {row["id"]: row for row in between(trained, random.Random(SEED))}
    parts |= {"train": train, "more": [wider.get(row["id"], row) for row in rest], "crops": crops(train, source_of)}
    parts["held_out_moved"] = list(moved(held, generator))
    parts["held_out_removed"] = list(removed(held))
    parts["held_out_articles"] = list(whole(held))
    out.mkdir(parents=True, exist_ok=True)
    for name, part in parts.items():
        write(out, name, part)

    dev = {one.id for one in carve_by_passage(read_questions(str(out / "more.jsonl")).examples, 0.03, SEED)[1]}
    again = [wider[row["id"]] for row in first if source_of[row["id"]] == "wiki"]
    again += [row for row in first if source_of[row["id"]] == "reddit"]
    again += [row for row in rest if source_of[row["id"]] == "wiki"]
    random.Random(SEED).shuffle(again)
    write(out, "again", [row for row in again if row["id"] not in dev])
    write(out, "again_dev", [row for row in parts["more"] if row["id"] in dev])


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
