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
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

from qadeploy.data.carriers import SPLITS, Row, load_rows
from qadeploy.data.columns import guess, rename
from qadeploy.data.wording import kind_of, names, quote
from qadeploy.errors import DataError, InputError
from qadeploy.records import Annotation, Example

OnAmbiguous = Literal["error", "first", "skip"]


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
    *,
    on_ambiguous: OnAmbiguous = "error",
    columns: Mapping[str, str] | None = None,
    no_answer_token: str | None = None,
    token: str | None = None,
    annotated: bool = True,
) -> DataSet:
    """Reads ``handbook``, a file, or ``hub:NAME[:SPLIT]``.

    ``on_ambiguous`` says what happens to a triplet without ``answer_start`` whose answer occurs
    several times (as a substring): an error that counts them, the first occurrence, or the row is
    skipped and counted. ``columns`` maps our field names to the data's, ``no_answer_token`` is an
    answer that means "none here". With ``annotated=False`` answers are neither needed nor looked at
    (questions to be answered, not to learn from).

    Rows with the same question and context are several annotators of one question and become one
    example with all their answers, but in SQuAD's own nesting, where every id is scored.
    Raises DataError (rows), InputError (files, columns), MissingExtraError.
    """
    if on_ambiguous not in get_args(OnAmbiguous):
        raise InputError(f"on_ambiguous is {on_ambiguous!r}: choose one of {', '.join(get_args(OnAmbiguous))}")
    rules = _Rules(on_ambiguous, dict(columns or {}), no_answer_token, annotated)
    return _collect(source, load_rows(source, token), rules)


@dataclass(frozen=True, slots=True)
class _Rules:
    on_ambiguous: OnAmbiguous
    columns: dict[str, str]
    no_answer_token: str | None
    annotated: bool


def hash_examples(examples: Iterable[Example]) -> str:
    """SHA-256 over the examples' content, whatever file format they came in."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps(asdict(example), sort_keys=True, ensure_ascii=False).encode())
    return digest.hexdigest()


# ---------------------------------------------------------------- rows to examples


class _ProblemError(Exception):
    """A row that cannot be used: the field at fault (ours, or "field.part") and why."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


class _AmbiguousError(_ProblemError):
    def __init__(self, field: str, text: str, count: int) -> None:
        super().__init__(
            field,
            f"{quote(text)} occurs {count} times in the context: add answer_start, "
            "or choose with --on-ambiguous first|skip",
        )


def _collect(source: str, rows: Iterable[Row], rules: _Rules) -> DataSet:
    examples: list[Example] = []
    problems: list[str] = []
    skipped = first_taken = 0
    seen: dict[str, int] = {}
    asked: dict[tuple[str, str, str], int] = {}
    for row in rows:
        if row.label_studio and rules.annotated:
            raise InputError(
                f"{source}: a Label Studio export, whose offsets count UTF-16 units: convert it with "
                f"qadeploy check {source} --fix OUT.jsonl, and use OUT.jsonl"
            )
        if row.problem:
            problems.append(f"{source}: row {row.number}: {row.problem}")
            continue
        try:
            example, guessed = _example(row, rules)
            first_taken += guessed
            if example.id in seen:
                if row.fields.get(rules.columns.get("id", "id")) is not None:
                    raise _ProblemError(
                        "id", f"{quote(example.id)} is also the id of row {seen[example.id]}: ids are unique"
                    )
                while example.id in seen:
                    example = replace(example, id=f"{example.id}-2")
            seen[example.id] = row.number
            key = (example.context, example.question, example.split)
            if rules.annotated and not row.nested and key in asked:
                first = examples[asked[key]]
                examples[asked[key]] = replace(
                    first, answers=first.answers + example.answers, also=(*first.also, example.id)
                )
                continue
            asked[key] = len(examples)
            examples.append(example)
        except _ProblemError as problem:
            if isinstance(problem, _AmbiguousError) and rules.on_ambiguous == "skip":
                skipped += 1
                continue
            field = rules.columns.get(problem.field, problem.field)
            problems.append(f"{source}: row {row.number}, field {field}: {problem}")
    if problems:
        fix = ""
        if rules.annotated and any("answer" in problem for problem in problems):
            fix = f"See what can be repaired: qadeploy check {source} --fix OUT.jsonl"
        raise DataError(problems, fix)
    if not examples:
        raise InputError(f"{source}: holds no rows that can be used")
    return DataSet(source, tuple(examples), skipped, first_taken)


def _example(row: Row, rules: _Rules) -> tuple[Example, bool]:
    fields = rename(row.fields, rules.columns)
    for field in ("context", "question"):
        _text(fields, field, row)
    context, question = fields["context"], fields["question"]
    split = row.split
    if fields.get("split") not in (None, ""):
        split = SPLITS.get(str(fields["split"]), "")
        if not split:
            raise _ProblemError("split", f"is {quote(str(fields['split']))}, one of {', '.join(SPLITS)} is needed")
    answers: tuple[Annotation, ...]
    guessed = False
    if not rules.annotated or is_no_answer(fields, rules.no_answer_token):
        answers = ()
    elif "answers" in fields:
        answers = _annotations(fields["answers"], context)
    elif "answer" in fields:
        start = fields.get("answer_start")
        if start is not None:
            answers = (_annotation(_text(fields, "answer", row), start, context, "answer_start"),)
        else:
            found, guessed = _find(_text(fields, "answer", row), context, rules.on_ambiguous)
            answers = (found,)
    else:
        raise _missing("answer", row)
    identity = fields.get("id")
    if identity is not None and not isinstance(identity, str | int):
        raise _ProblemError("id", f"is {kind_of(identity)}, text is needed")
    _encodable(str(identity), "id")
    return Example(
        id=f"row-{row.number}" if identity is None else str(identity),
        question=question,
        context=context,
        answers=answers,
        split=split,
    ), guessed


def is_no_answer(fields: Mapping[str, Any], no_answer_token: str | None) -> bool:
    """True where a row says that its context holds no answer: ``is_impossible``, or the token as its answer."""
    if fields.get("is_impossible") is True:
        return True
    answer = fields.get("answer")
    return bool(no_answer_token) and isinstance(answer, str) and answer.strip() == no_answer_token


def _missing(field: str, row: Row) -> _ProblemError:
    option = guess(row.fields)
    hint = f"; did you mean {option}?" if option else ""
    return _ProblemError(field, f"is missing; the fields found are {names(row.fields)}{hint}")


def _text(fields: dict[str, Any], field: str, row: Row) -> str:
    if field not in fields:
        raise _missing(field, row)
    value = fields[field]
    if not isinstance(value, str):
        raise _ProblemError(field, f"is {kind_of(value)}, text is needed")
    if not value.strip():
        raise _ProblemError(field, "is empty")
    _encodable(value, field)
    return value


def _encodable(text: str, field: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise _ProblemError(field, f"holds a lone surrogate at code point {error.start}: not valid Unicode") from error


def _annotations(value: Any, context: str) -> tuple[Annotation, ...]:
    if isinstance(value, dict):
        texts, starts = value.get("text"), value.get("answer_start")
        if not isinstance(texts, list) or not isinstance(starts, list):
            raise _ProblemError("answers", "needs the lists 'text' and 'answer_start'")
        if len(texts) != len(starts):
            raise _ProblemError("answers", f"has {len(texts)} texts and {len(starts)} answer_starts: one start a text")
        pairs = list(zip(texts, starts, strict=True))
    elif isinstance(value, list) and all(isinstance(v, dict) for v in value):
        pairs = [(v.get("text"), v.get("answer_start")) for v in value]
    else:
        raise _ProblemError("answers", f"is {kind_of(value)}, {{'text': [...], 'answer_start': [...]}} is needed")
    found = []
    for text, start in pairs:
        if not isinstance(text, str) or not text.strip():
            raise _ProblemError(
                "answers.text", "is empty" if isinstance(text, str) else f"is {kind_of(text)}, text is needed"
            )
        found.append(_annotation(text, start, context, "answers.answer_start"))
    return tuple(found)


def _annotation(text: str, start: Any, context: str, field: str) -> Annotation:
    if isinstance(start, bool) or not isinstance(start, int):
        raise _ProblemError(field, f"is {kind_of(start)}, a whole number is needed")
    there = context[start : start + len(text)] if start >= 0 else ""
    if there != text:
        raise _ProblemError(
            field, f"{start} does not match: the context has {quote(there)} there, the answer is {quote(text)}"
        )
    return Annotation(text, start)


def _find(text: str, context: str, on_ambiguous: OnAmbiguous) -> tuple[Annotation, bool]:
    first = context.find(text)
    if first < 0:
        raise _ProblemError(
            "answer", f"{quote(text)} does not occur in the context: it must be copied from it letter by letter"
        )
    count, at = 1, context.find(text, first + 1)
    while at >= 0:
        count, at = count + 1, context.find(text, at + 1)
    if count > 1 and on_ambiguous != "first":
        raise _AmbiguousError("answer", text, count)
    return Annotation(text, first), count > 1
