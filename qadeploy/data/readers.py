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
import io
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from qadeploy.errors import DataError, InputError, MissingExtraError
from qadeploy.records import Annotation, Example

OnAmbiguous = Literal["error", "first", "skip"]
HANDBOOK = Path(__file__).with_name("handbook.jsonl")
_SPLITS = {"train": "train", "validation": "validation", "dev": "validation", "test": "validation"}


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
    """A row as it was read: ``number`` counts from 1; ``split`` where the carrier itself tells it."""

    number: int
    fields: dict[str, Any]
    split: str = ""


def read(source: str, *, on_ambiguous: OnAmbiguous = "error", token: str | None = None) -> DataSet:
    """Reads ``handbook``, a file, or ``hub:NAME[:SPLIT]``.

    ``on_ambiguous`` says what happens to a triplet without ``answer_start`` whose answer occurs
    several times (as a substring): an error that counts them, the first occurrence, or the row is
    skipped and counted. Raises DataError (rows), InputError (files), MissingExtraError.
    """
    if on_ambiguous not in get_args(OnAmbiguous):
        raise InputError(f"on_ambiguous is {on_ambiguous!r}: choose one of {', '.join(get_args(OnAmbiguous))}")
    if source.startswith("hub:"):
        rows: Iterable[_Row] = _hub_rows(source, token)
    elif source == "handbook":
        rows = _file_rows(HANDBOOK, source)
    else:
        rows = _file_rows(Path(source), source)
    return _collect(source, rows, on_ambiguous)


# ---------------------------------------------------------------- carriers


def _file_rows(path: Path, name: str) -> list[_Row]:
    if not path.exists():
        raise InputError(f"{name}: no such file. Give a JSON, JSONL, CSV or parquet file, 'handbook' or 'hub:NAME'")
    if path.is_dir():
        raise InputError(f"{name}: this is a folder, a file is needed (JSON, JSONL, CSV or parquet)")
    if path.stat().st_size == 0:
        raise InputError(f"{name}: the file is empty; it needs at least one row with context, question and answer")
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _parquet_rows(path, name)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{name}: not UTF-8 text (byte {error.start}): save it as UTF-8, e.g. iconv -f latin1 -t utf-8"
        ) from error
    except OSError as error:
        raise InputError(f"{name}: cannot be read: {error.strerror}") from error
    if suffix == ".csv":
        return _csv_rows(text, name)
    if suffix in {".jsonl", ".ndjson"}:
        return _jsonl_rows(text, name)
    if suffix == ".json":
        return _json_rows(text, name)
    raise InputError(f"{name}: unknown ending {suffix!r}: use .json, .jsonl, .csv or .parquet")


def _json_rows(text: str, name: str) -> list[_Row]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and "\n" in text.strip():
            return _jsonl_rows(text, name)  # one object a line under a .json name
        raise InputError(f"{name}: line {error.lineno}, column {error.colno}: not valid JSON: {error.msg}") from error
    if isinstance(value, dict) and isinstance(value.get("data"), list):
        value = value["data"]
        if value and isinstance(value[0], dict) and "paragraphs" in value[0]:
            return list(_nested_rows(value, name))
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise InputError(f"{name}: JSON of type {_type(value)}: a list of rows or SQuAD's {{'data': [...]}} is needed")
    return _objects(value, name)


def _objects(values: list[Any], name: str) -> list[_Row]:
    bad = [
        f"{name}: row {n}: is {_type(v)}, an object with context, question and answer is needed"
        for n, v in enumerate(values, 1)
        if not isinstance(v, dict)
    ]
    if bad:
        raise DataError(bad)
    return [_Row(n, v) for n, v in enumerate(values, 1)]


def _jsonl_rows(text: str, name: str) -> list[_Row]:
    values: list[Any] = []
    bad = []
    lines = [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    for number, (line_number, line) in enumerate(lines, 1):
        try:
            values.append(json.loads(line))
        except json.JSONDecodeError as error:
            bad.append(f"{name}: row {number} (line {line_number}): not valid JSON: {error.msg}")
    if bad:
        raise DataError(bad)
    return _objects(values, name)


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
    bad: list[str] = []
    try:
        header = next(reader)
        for number, values in enumerate((v for v in reader if v), 1):
            if len(values) != len(header):
                bad.append(f"{name}: row {number}: {len(values)} fields, the header has {len(header)}: quote the commas")
            fields: dict[str, Any] = dict(zip(header, values, strict=False))
            for key in ("answers", "answer_start"):
                if key in fields:
                    fields[key] = _literal(fields[key])
            rows.append(_Row(number, fields))
    except (csv.Error, StopIteration) as error:
        raise InputError(f"{name}: line {reader.line_num}: not valid CSV: {error}") from error
    if bad:
        raise DataError(bad)
    return rows


def _literal(text: str) -> Any:
    """A CSV cell that holds a number, JSON, or a Python literal; anything else stays text."""
    if not text.strip():
        return None
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
    return text


def _parquet_rows(path: Path, name: str) -> list[_Row]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise MissingExtraError("reading parquet", "pyarrow", "parquet") from error
    try:
        table = parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{name}: not a parquet file that can be read: {_one_line(error)}") from error
    return [_Row(n, fields) for n, fields in enumerate(table.to_pylist(), 1)]


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
    rows: list[_Row] = []
    for split, part in parts.items():
        fixed = "" if wanted else _SPLITS.get(split, "train")
        rows += [_Row(n, dict(fields), fixed) for n, fields in enumerate(part, len(rows) + 1)]
    return rows


# ---------------------------------------------------------------- rows to examples


class _Problem(Exception):
    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"field {field}: {message}")


class _Ambiguous(_Problem):
    def __init__(self, field: str, text: str, count: int) -> None:
        super().__init__(
            field,
            f"{_quote(text)} occurs {count} times in the context: add answer_start, "
            "or choose with --on-ambiguous first|skip",
        )


def _collect(source: str, rows: Iterable[_Row], on_ambiguous: OnAmbiguous) -> DataSet:
    examples: list[Example] = []
    problems: list[str] = []
    skipped = first_taken = 0
    seen: dict[str, int] = {}
    for row in rows:
        try:
            example, guessed = _example(row, on_ambiguous)
            first_taken += guessed
            if example.id in seen:
                if "id" in row.fields:
                    raise _Problem("id", f"{_quote(example.id)} is also the id of row {seen[example.id]}: ids are unique")
                example = _example(_Row(row.number, {**row.fields, "id": f"row-{row.number}"}), on_ambiguous)[0]
            seen[example.id] = row.number
            examples.append(example)
        except _Ambiguous as problem:
            if on_ambiguous == "skip":
                skipped += 1
            else:
                problems.append(f"{source}: row {row.number}, {problem}")
        except _Problem as problem:
            problems.append(f"{source}: row {row.number}, {problem}")
    if problems:
        raise DataError(problems)
    if not examples:
        raise InputError(f"{source}: holds no rows that can be used")
    return DataSet(source, tuple(examples), skipped, first_taken)


def _example(row: _Row, on_ambiguous: OnAmbiguous) -> tuple[Example, bool]:
    fields = row.fields
    for field in ("context", "question"):
        _text(fields, field)
    context, question = fields["context"], fields["question"]
    split = row.split
    if fields.get("split") is not None and isinstance(fields["split"], str):
        split = _SPLITS.get(fields["split"], "")
    answers: tuple[Annotation, ...]
    guessed = False
    if fields.get("is_impossible") is True:
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
        raise _Problem("answer", f"is missing; the fields found are {_names(fields)}")
    identity = fields.get("id")
    if identity is not None and not isinstance(identity, str | int):
        raise _Problem("id", f"is {_type(identity)}, text is needed")
    return Example(
        id=f"row-{row.number}" if identity is None else str(identity),
        question=question,
        context=context,
        answers=answers,
        split=split,
    ), guessed


def _text(fields: dict[str, Any], field: str) -> str:
    if field not in fields:
        raise _Problem(field, f"is missing; the fields found are {_names(fields)}")
    value = fields[field]
    if not isinstance(value, str):
        raise _Problem(field, f"is {_type(value)}, text is needed")
    if not value.strip():
        raise _Problem(field, "is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise _Problem(field, f"holds a lone surrogate at code point {error.start}: not valid Unicode") from error
    return value


def _annotations(value: Any, context: str) -> tuple[Annotation, ...]:
    if isinstance(value, dict):
        texts, starts = value.get("text"), value.get("answer_start")
        if not isinstance(texts, list) or not isinstance(starts, list):
            raise _Problem("answers", "needs the lists 'text' and 'answer_start'")
        if len(texts) != len(starts):
            raise _Problem("answers", f"has {len(texts)} texts and {len(starts)} answer_starts: one start a text")
        pairs = list(zip(texts, starts, strict=True))
    elif isinstance(value, list) and all(isinstance(v, dict) for v in value):
        pairs = [(v.get("text"), v.get("answer_start")) for v in value]
    else:
        raise _Problem("answers", f"is {_type(value)}, {{'text': [...], 'answer_start': [...]}} is needed")
    found = []
    for text, start in pairs:
        if not isinstance(text, str) or not text.strip():
            raise _Problem("answers.text", "is empty" if isinstance(text, str) else f"is {_type(text)}, text is needed")
        found.append(_annotation(text, start, context, "answers.answer_start"))
    return tuple(found)


def _annotation(text: str, start: Any, context: str, field: str) -> Annotation:
    if isinstance(start, bool) or not isinstance(start, int):
        raise _Problem(field, f"is {_type(start)}, a whole number is needed")
    there = context[start : start + len(text)] if start >= 0 else ""
    if there != text:
        raise _Problem(field, f"{start} does not match: the context has {_quote(there)} there, the answer is {_quote(text)}")
    return Annotation(text, start)


def _find(text: str, context: str, on_ambiguous: OnAmbiguous) -> tuple[Annotation, bool]:
    first = context.find(text)
    if first < 0:
        raise _Problem("answer", f"{_quote(text)} does not occur in the context: it must be copied from it letter by letter")
    count, at = 1, context.find(text, first + 1)
    while at >= 0:
        count, at = count + 1, context.find(text, at + 1)
    if count > 1 and on_ambiguous != "first":
        raise _Ambiguous("answer", text, count)
    return Annotation(text, first), count > 1


def _quote(text: str) -> str:
    return json.dumps(text if len(text) <= 60 else text[:57] + "...", ensure_ascii=False)


def _names(fields: dict[str, Any]) -> str:
    return ", ".join(str(name) for name in fields) or "none"


def _type(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
