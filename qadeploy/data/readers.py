"""Every way in: files and hub data sets to validated ``Example`` lists.

Shapes: SQuAD v1.1 / v2.0 nested JSON; flat rows with an ``answers`` dict; plain triplets
{"context", "question", "answer"} with or without ``answer_start``. Carriers: JSON (a list, or an
object with "data"), JSONL, CSV, parquet, and ``hub:NAME`` through the datasets library.
A reader returns every row or raises one DataError that lists every bad row; nothing is dropped
unless ``on_ambiguous="skip"`` asks for it, and then the rows skipped are counted in the result.
"""

from __future__ import annotations

import ast
import csv
import hashlib
import io
import json
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from qadeploy.errors import DataError, InputError, MissingExtraError
from qadeploy.records import Annotation, Example

OnAmbiguous = Literal["error", "first", "skip"]
HANDBOOK = Path(__file__).with_name("handbook.jsonl")
_SPLITS = {"train": "train", **dict.fromkeys(("validation", "valid", "val", "dev", "eval", "test"), "validation")}


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


@dataclass(frozen=True, slots=True)
class _Row:
    """A row as it was read: ``number`` counts from 1; ``split`` where the carrier itself tells it.

    ``problem`` says why the carrier could not read the row's fields.
    """

    number: int
    fields: dict[str, Any]
    split: str = ""
    problem: str = ""


def read(
    source: str, *, on_ambiguous: OnAmbiguous = "error", token: str | None = None, annotated: bool = True
) -> DataSet:
    """Reads ``handbook``, a file, or ``hub:NAME[:SPLIT]``.

    ``on_ambiguous`` says what happens to a triplet without ``answer_start`` whose answer occurs
    several times (as a substring): an error that counts them, the first occurrence, or the row is
    skipped and counted. With ``annotated=False`` answers are neither needed nor looked at (questions
    to be answered, not to learn from). Raises DataError (rows), InputError (files), MissingExtraError.
    """
    if on_ambiguous not in get_args(OnAmbiguous):
        raise InputError(f"on_ambiguous is {on_ambiguous!r}: choose one of {', '.join(get_args(OnAmbiguous))}")
    if source.startswith("hub:"):
        rows: Iterable[_Row] = _hub_rows(source, token)
    elif source == "handbook":
        rows = _file_rows(HANDBOOK, source)
    else:
        rows = _file_rows(Path(source), source)
    return _collect(source, rows, on_ambiguous, annotated)


def hash_examples(examples: Iterable[Example]) -> str:
    """SHA-256 over the examples' content, whatever file format they came in."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps(asdict(example), sort_keys=True, ensure_ascii=False).encode())
    return digest.hexdigest()


# ---------------------------------------------------------------- carriers


def _file_rows(path: Path, name: str) -> list[_Row]:
    if not os.path.exists(path):  # false for a name too long, where Path.exists raises
        raise InputError(f"{name}: no such file. Give a JSON, JSONL, CSV or parquet file, 'handbook' or 'hub:NAME'")
    if path.is_dir():
        raise InputError(f"{name}: this is a folder, a file is needed (JSON, JSONL, CSV or parquet)")
    empty = InputError(f"{name}: the file is empty; it needs at least one row with context, question and answer")
    if path.stat().st_size == 0:
        raise empty
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _parquet_rows(path, name)
    try:
        # Bytes, because reading text turns the \r\n inside a quoted CSV field into \n and moves the offsets.
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{name}: not UTF-8 text (byte {error.start}): save it as UTF-8, e.g. iconv -f latin1 -t utf-8"
        ) from error
    except OSError as error:
        raise InputError(f"{name}: cannot be read: {error.strerror}") from error
    if not text.strip():
        raise empty
    if suffix == ".csv":
        return _csv_rows(text, name)
    if suffix in {".jsonl", ".ndjson"}:
        return _jsonl_rows(text)
    if suffix == ".json":
        return _json_rows(text, name)
    raise InputError(f"{name}: unknown ending {suffix!r}: use .json, .jsonl, .csv or .parquet")


def _json_rows(text: str, name: str) -> list[_Row]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data":
            first = text[: error.pos]
            if "\n" in first[len(first.rstrip()) :] and "\n" not in first.strip():
                return _jsonl_rows(text)  # one object a line under a .json name
        raise InputError(f"{name}: {_json_problem(error)}") from error
    if isinstance(value, dict) and isinstance(value.get("data"), list):
        value = value["data"]
        if value and isinstance(value[0], dict) and "paragraphs" in value[0]:
            return list(_nested_rows(value, name))
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise InputError(f"{name}: JSON of type {_type(value)}: a list of rows or SQuAD's {{'data': [...]}} is needed")
    return _objects(value)


def _json_problem(error: ValueError | RecursionError, before: int = 0) -> str:
    """Where and why a text is no JSON; ``before`` lines of its file stand before it."""
    if isinstance(error, json.JSONDecodeError):
        return f"line {before + error.lineno}, column {error.colno}: not valid JSON: {error.msg}"
    return f"from line {before + 1}: not valid JSON: {_one_line(error)}"  # too deep, or a number too long


def _objects(values: list[Any]) -> list[_Row]:
    return [_object(n, v) for n, v in enumerate(values, 1)]


def _object(number: int, value: Any) -> _Row:
    if isinstance(value, dict):
        return _Row(number, value)
    return _Row(number, {}, problem=f"is {_type(value)}, an object with context, question and answer is needed")


def _jsonl_rows(text: str) -> list[_Row]:
    rows = []
    lines = [(n, line) for n, line in enumerate(text.split("\n")) if line.strip()]
    for number, (before, line) in enumerate(lines, 1):
        try:
            rows.append(_object(number, json.loads(line)))
        except (ValueError, RecursionError) as error:
            rows.append(_Row(number, {}, problem=_json_problem(error, before)))
    return rows


def _nested_rows(articles: list[Any], name: str) -> Iterator[_Row]:
    number = 0
    try:
        for article in articles:
            for paragraph in article["paragraphs"]:
                for qa in paragraph["qas"]:
                    number += 1
                    yield _Row(number, {**qa, "context": paragraph["context"]})
    except (KeyError, TypeError) as error:
        raise InputError(
            f"{name}: not SQuAD's nesting after question {number}: {error!r}: "
            "each article needs 'paragraphs', each paragraph 'context' and 'qas'"
        ) from error


def _csv_rows(text: str, name: str) -> list[_Row]:
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows: list[_Row] = []
    try:
        header = next(reader)
        for number, values in enumerate((v for v in reader if v), 1):
            if len(values) != len(header):
                problem = f"{len(values)} fields, the header has {len(header)}: quote the commas"
                rows.append(_Row(number, {}, problem=problem))
                continue
            fields: dict[str, Any] = dict(zip(header, values, strict=False))
            for key in ("answers", "answer_start", "is_impossible"):
                if key in fields:
                    fields[key] = _literal(fields[key])
            rows.append(_Row(number, fields))
    except csv.Error as error:
        raise InputError(f"{name}: line {reader.line_num}: not valid CSV: {error}") from error
    return rows


def _literal(text: str) -> Any:
    """A CSV cell that holds a number, JSON, or a Python literal; anything else stays text."""
    if not text.strip():
        return None
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(text)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            continue
    return text


def _parquet_rows(path: Path, name: str) -> list[_Row]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise MissingExtraError("reading parquet", "pyarrow", "parquet") from error
    try:
        values = parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{name}: not a parquet file that can be read: {_one_line(error)}") from error
    return _objects(values)


def _hub_rows(source: str, token: str | None) -> list[_Row]:
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError("reading from a hub", "datasets", "train") from error
    name, _, wanted = source.removeprefix("hub:").partition(":")
    try:
        found = datasets.load_dataset(name, split=wanted or None, token=token)
    except Exception as error:  # the library raises many unrelated types
        raise InputError(
            f"{source}: the data set cannot be loaded from the hub: {_one_line(error)}. "
            "Check the name and the network, or download it once and give the file"
        ) from error
    parts = {wanted: found} if wanted else dict(found)
    if len({"test", "validation"} & parts.keys()) == 2:
        del parts["test"]  # hub test splits are for submissions, often without answers: name one to read it
    rows: list[_Row] = []
    for split, part in parts.items():
        fixed = "" if wanted else _SPLITS.get(split, "train")
        rows += [_Row(n, dict(fields), fixed) for n, fields in enumerate(part, len(rows) + 1)]
    return rows


# ---------------------------------------------------------------- rows to examples


class _ProblemError(Exception):
    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"field {field}: {message}")


class _AmbiguousError(_ProblemError):
    def __init__(self, field: str, text: str, count: int) -> None:
        super().__init__(
            field,
            f"{_quote(text)} occurs {count} times in the context: add answer_start, "
            "or choose with --on-ambiguous first|skip",
        )


def _collect(source: str, rows: Iterable[_Row], on_ambiguous: OnAmbiguous, annotated: bool) -> DataSet:
    examples: list[Example] = []
    problems: list[str] = []
    skipped = first_taken = 0
    seen: dict[str, int] = {}
    for row in rows:
        if row.problem:
            problems.append(f"{source}: row {row.number}: {row.problem}")
            continue
        try:
            example, guessed = _example(row, on_ambiguous, annotated)
            first_taken += guessed
            if example.id in seen:
                if row.fields.get("id") is not None:
                    raise _ProblemError(
                        "id", f"{_quote(example.id)} is also the id of row {seen[example.id]}: ids are unique"
                    )
                while example.id in seen:
                    example = replace(example, id=f"{example.id}-2")
            seen[example.id] = row.number
            examples.append(example)
        except _AmbiguousError as problem:
            if on_ambiguous == "skip":
                skipped += 1
            else:
                problems.append(f"{source}: row {row.number}, {problem}")
        except _ProblemError as problem:
            problems.append(f"{source}: row {row.number}, {problem}")
    if problems:
        raise DataError(problems)
    if not examples:
        raise InputError(f"{source}: holds no rows that can be used")
    return DataSet(source, tuple(examples), skipped, first_taken)


def _example(row: _Row, on_ambiguous: OnAmbiguous, annotated: bool) -> tuple[Example, bool]:
    fields = row.fields
    for field in ("context", "question"):
        _text(fields, field)
    context, question = fields["context"], fields["question"]
    split = row.split
    if fields.get("split") not in (None, ""):
        split = _SPLITS.get(str(fields["split"]), "")
        if not split:
            raise _ProblemError("split", f"is {_quote(str(fields['split']))}, one of {', '.join(_SPLITS)} is needed")
    answers: tuple[Annotation, ...]
    guessed = False
    if not annotated or fields.get("is_impossible") is True:
        answers = ()
    elif "answers" in fields:
        answers = _annotations(fields["answers"], context)
    elif "answer" in fields:
        start = fields.get("answer_start")
        if start is not None:
            answers = (_annotation(_text(fields, "answer"), start, context, "answer_start"),)
        else:
            found, guessed = _find(_text(fields, "answer"), context, on_ambiguous)
            answers = (found,)
    else:
        raise _ProblemError("answer", f"is missing; the fields found are {_names(fields)}")
    identity = fields.get("id")
    if identity is not None and not isinstance(identity, str | int):
        raise _ProblemError("id", f"is {_type(identity)}, text is needed")
    _encodable(str(identity), "id")
    return Example(
        id=f"row-{row.number}" if identity is None else str(identity),
        question=question,
        context=context,
        answers=answers,
        split=split,
    ), guessed


def _text(fields: dict[str, Any], field: str) -> str:
    if field not in fields:
        raise _ProblemError(field, f"is missing; the fields found are {_names(fields)}")
    value = fields[field]
    if not isinstance(value, str):
        raise _ProblemError(field, f"is {_type(value)}, text is needed")
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
        raise _ProblemError("answers", f"is {_type(value)}, {{'text': [...], 'answer_start': [...]}} is needed")
    found = []
    for text, start in pairs:
        if not isinstance(text, str) or not text.strip():
            raise _ProblemError(
                "answers.text", "is empty" if isinstance(text, str) else f"is {_type(text)}, text is needed"
            )
        found.append(_annotation(text, start, context, "answers.answer_start"))
    return tuple(found)


def _annotation(text: str, start: Any, context: str, field: str) -> Annotation:
    if isinstance(start, bool) or not isinstance(start, int):
        raise _ProblemError(field, f"is {_type(start)}, a whole number is needed")
    there = context[start : start + len(text)] if start >= 0 else ""
    if there != text:
        raise _ProblemError(
            field, f"{start} does not match: the context has {_quote(there)} there, the answer is {_quote(text)}"
        )
    return Annotation(text, start)


def _find(text: str, context: str, on_ambiguous: OnAmbiguous) -> tuple[Annotation, bool]:
    first = context.find(text)
    if first < 0:
        raise _ProblemError(
            "answer", f"{_quote(text)} does not occur in the context: it must be copied from it letter by letter"
        )
    count, at = 1, context.find(text, first + 1)
    while at >= 0:
        count, at = count + 1, context.find(text, at + 1)
    if count > 1 and on_ambiguous != "first":
        raise _AmbiguousError("answer", text, count)
    return Annotation(text, first), count > 1


def _quote(text: str) -> str:
    return _printable(json.dumps(text if len(text) <= 60 else text[:57] + "...", ensure_ascii=False))


def _names(fields: dict[str, Any]) -> str:
    return _printable(", ".join(str(name) for name in fields)) or "none"


def _printable(text: str) -> str:
    """The text on one line: line separators, lone surrogates and the like as escapes."""
    return "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text)


def _type(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
