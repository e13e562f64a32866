"""Every way in: files and hub data sets to validated ``Example`` lists.

Shapes: SQuAD v1.1 / v2.0 nested JSON; flat rows with an ``answers`` dict; plain triplets
{"context", "question", "answer"} with or without ``answer_start``. Carriers: JSON (a list, or an
object with "data"), JSONL, CSV, parquet, and ``hub:NAME`` through the datasets library.
A reader returns every row or raises one DataError that lists every bad row; nothing is dropped
unless ``on_ambiguous="skip"`` asks for it, and then the rows skipped are counted in the result.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace

from qadeploy.data.carriers import Row, load_rows
from qadeploy.data.fields import Given, ProblemError, Reading, is_offset, parse
from qadeploy.data.match import occurrences
from qadeploy.data.wording import kind_of, quote
from qadeploy.errors import DataError, InputError
from qadeploy.records import Annotation, Example


@dataclass(frozen=True, slots=True)
class DataSet:
    """Examples in file order, where they came from, and the rows that ``on_ambiguous`` touched."""

    source: str
    examples: tuple[Example, ...]
    skipped: int = 0
    first_taken: int = 0

    def part(self, split: str) -> tuple[Example, ...]:
        """The examples whose fixed split is ``split``."""
        return tuple(e for e in self.examples if e.split == split)


def read(
    source: str,
    reading: Reading | None = None,
    *,
    token: str | None = None,
    annotated: bool = True,
    rows: Iterable[Row] | None = None,
) -> DataSet:
    """Reads ``handbook``, a file, or ``hub:NAME[:SPLIT]``; ``rows`` are its rows where they are loaded already.

    With ``annotated=False`` answers are neither needed nor looked at (questions to be answered, not to
    learn from). Rows with the same question and context are several annotators of one question and become one
    example with all their answers, but in SQuAD's own nesting, where every id is scored.
    Raises DataError (rows), InputError (files, columns), MissingExtraError.
    """
    loaded = load_rows(source, token) if rows is None else rows
    return _collect(source, loaded, reading or Reading(), annotated)


def hash_examples(examples: Iterable[Example]) -> str:
    """SHA-256 over the examples' content, whatever file format they came in."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps(asdict(example), sort_keys=True, ensure_ascii=False).encode())
    return digest.hexdigest()


# ---------------------------------------------------------------- rows to examples


class _AmbiguousError(ProblemError):
    def __init__(self, field: str, text: str, count: int) -> None:
        super().__init__(
            field,
            f"{quote(text)} occurs {count} times in the context: add answer_start, "
            "or choose with --on-ambiguous first|skip",
        )


def _collect(source: str, rows: Iterable[Row], reading: Reading, annotated: bool) -> DataSet:
    examples: list[Example] = []
    problems: list[str] = []
    skipped = first_taken = 0
    seen: dict[str, int] = {}
    asked: dict[tuple[str, str, str], int] = {}
    for row in rows:
        if row.label_studio and annotated:
            raise InputError(
                f"{source}: a Label Studio export, whose offsets count UTF-16 units: convert it with "
                f"qadeploy check {source} --fix OUT.jsonl, and use OUT.jsonl"
            )
        try:
            example, guessed = _example(row, reading, annotated)
            first_taken += guessed
            if example.id in seen:
                if row.fields.get(reading.columns.get("id", "id")) is not None:
                    raise ProblemError(
                        "id", f"{quote(example.id)} is also the id of row {seen[example.id]}: ids are unique"
                    )
                while example.id in seen:
                    example = replace(example, id=f"{example.id}-2")
            seen[example.id] = row.number
            key = (example.context, example.question, example.split)
            if annotated and not row.nested and key in asked:
                first = examples[asked[key]]
                examples[asked[key]] = replace(
                    first, answers=first.answers + example.answers, also=(*first.also, example.id)
                )
                continue
            asked[key] = len(examples)
            examples.append(example)
        except ProblemError as problem:
            if isinstance(problem, _AmbiguousError) and reading.on_ambiguous == "skip":
                skipped += 1
                continue
            field = reading.columns.get(problem.field, problem.field)
            where = f"row {row.number}, field {field}" if field else f"row {row.number}"
            problems.append(f"{source}: {where}: {problem}")
    if problems:
        fix = ""
        if annotated and any("answer" in problem for problem in problems):
            fix = f"See what can be repaired: qadeploy check {source} --fix OUT.jsonl"
        raise DataError(problems, fix)
    if not examples:
        raise InputError(f"{source}: holds no rows that can be used")
    return DataSet(source, tuple(examples), skipped, first_taken)


def _example(row: Row, reading: Reading, annotated: bool) -> tuple[Example, bool]:
    fields = parse(row, reading, annotated=annotated)
    found = [_annotation(given, fields.context, reading) for given in fields.answers]
    return Example(
        id=f"row-{row.number}" if fields.id is None else fields.id,
        question=fields.question,
        context=fields.context,
        answers=tuple(annotation for annotation, _ in found),
        split=fields.split,
    ), any(guessed for _, guessed in found)


def _annotation(given: Given, context: str, reading: Reading) -> tuple[Annotation, bool]:
    """The answer where its offset says, or found, and then whether its first place of several was taken."""
    text, start = given.text, given.start
    if start is None:
        places = occurrences(text, context)
        field = given.field.replace("answer_start", "text") if "." in given.field else "answer"
        if not places:
            raise ProblemError(
                field, f"{quote(text)} does not occur in the context: it must be copied from it letter by letter"
            )
        if len(places) > 1 and reading.on_ambiguous != "first":
            raise _AmbiguousError(field, text, len(places))
        return Annotation(text, places[0]), len(places) > 1
    if not is_offset(start):
        raise ProblemError(given.field, f"is {kind_of(start)}, a whole number is needed")
    there = context[start : start + len(text)] if start >= 0 else ""
    if there != text:
        raise ProblemError(
            given.field, f"{start} does not match: the context has {quote(there)} there, the answer is {quote(text)}"
        )
    return Annotation(text, start), False
