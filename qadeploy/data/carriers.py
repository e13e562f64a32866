"""Files and hub data sets to raw rows: what stands in a row is for ``readers`` and ``check`` to judge.

JSON (a list, an object with "data", or SQuAD's nesting), JSONL, CSV, parquet, ``hub:NAME`` through
the datasets library, and Label Studio's JSON exports, whose offsets count UTF-16 units.
"""

from __future__ import annotations

import ast
import csv
import io
import json
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qadeploy.data.wording import kind_of, one_line
from qadeploy.errors import InputError, MissingExtraError
from qadeploy.shipped import HANDBOOK

SPLITS = {"train": "train", **dict.fromkeys(("validation", "valid", "val", "dev", "eval", "test"), "validation")}
_LITERALS = ("answers", "answer_start", "is_impossible")


@dataclass(frozen=True, slots=True)
class Row:
    """A row as it was read: ``number`` counts from 1; ``split`` where the carrier itself tells it.

    ``problem`` says why the carrier could not read the row's fields. ``nested`` rows are SQuAD's own,
    one an id; ``label_studio`` rows come from that tool's export.
    """

    number: int
    fields: dict[str, Any]
    split: str = ""
    problem: str = ""
    nested: bool = False
    label_studio: bool = False


def load_rows(source: str, token: str | None = None) -> Iterable[Row]:
    """The rows of ``handbook``, a file, or ``hub:NAME[:SPLIT]``. Raises InputError, MissingExtraError."""
    if source.startswith("hub:"):
        return _hub_rows(source, token)
    return _file_rows(HANDBOOK if source == "handbook" else Path(source), source)


def _file_rows(path: Path, name: str) -> list[Row]:
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


def _json_rows(text: str, name: str) -> list[Row]:
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
    if isinstance(value, list) and value and all(_is_task(v) for v in value):
        return [_task(n, v) for n, v in enumerate(value, 1)]
    if not isinstance(value, list):
        raise InputError(
            f"{name}: JSON of type {kind_of(value)}: a list of rows or SQuAD's {{'data': [...]}} is needed"
        )
    return _objects(value)


def _json_problem(error: ValueError | RecursionError, before: int = 0) -> str:
    """Where and why a text is no JSON; ``before`` lines of its file stand before it."""
    if isinstance(error, json.JSONDecodeError):
        return f"line {before + error.lineno}, column {error.colno}: not valid JSON: {error.msg}"
    return f"from line {before + 1}: not valid JSON: {one_line(error)}"  # too deep, or a number too long


def _objects(values: list[Any]) -> list[Row]:
    return [_object(n, v) for n, v in enumerate(values, 1)]


def _object(number: int, value: Any) -> Row:
    if isinstance(value, dict):
        return Row(number, value)
    return Row(number, {}, problem=f"is {kind_of(value)}, an object with context, question and answer is needed")


def _jsonl_rows(text: str) -> list[Row]:
    rows = []
    lines = [(n, line) for n, line in enumerate(text.split("\n")) if line.strip()]
    for number, (before, line) in enumerate(lines, 1):
        try:
            rows.append(_object(number, json.loads(line)))
        except (ValueError, RecursionError) as error:
            rows.append(Row(number, {}, problem=_json_problem(error, before)))
    return rows


def _nested_rows(articles: list[Any], name: str) -> Iterator[Row]:
    number = 0
    try:
        for article in articles:
            for paragraph in article["paragraphs"]:
                for qa in paragraph["qas"]:
                    number += 1
                    yield Row(number, {**qa, "context": paragraph["context"]}, nested=True)
    except (KeyError, TypeError) as error:
        raise InputError(
            f"{name}: not SQuAD's nesting after question {number}: {error!r}: "
            "each article needs 'paragraphs', each paragraph 'context' and 'qas'"
        ) from error


def _csv_rows(text: str, name: str) -> list[Row]:
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows: list[Row] = []
    try:
        header = next(reader)
        for number, values in enumerate((v for v in reader if v), 1):
            if len(values) != len(header):
                problem = f"{len(values)} fields, the header has {len(header)}: quote the commas"
                rows.append(Row(number, {}, problem=problem))
                continue
            fields: dict[str, Any] = dict(zip(header, values, strict=False))
            for key in _LITERALS:
                if key in fields:
                    fields[key] = literal(fields[key])
            rows.append(Row(number, fields))
    except csv.Error as error:
        raise InputError(f"{name}: line {reader.line_num}: not valid CSV: {error}") from error
    return rows


def literal(text: str) -> Any:
    """A CSV cell that holds a number, JSON, or a Python literal; anything else stays text."""
    if not text.strip():
        return None
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(text)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            continue
    return text


def _parquet_rows(path: Path, name: str) -> list[Row]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise MissingExtraError("reading parquet", "pyarrow", "parquet") from error
    try:
        values = parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{name}: not a parquet file that can be read: {one_line(error)}") from error
    return _objects(values)


def _hub_rows(source: str, token: str | None) -> list[Row]:
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError("reading from a hub", "datasets", "train") from error
    name, _, wanted = source.removeprefix("hub:").partition(":")
    try:
        found = datasets.load_dataset(name, split=wanted or None, token=token)
    except Exception as error:  # the library raises many unrelated types
        raise InputError(
            f"{source}: the data set cannot be loaded from the hub: {one_line(error)}. "
            "Check the name and the network, or download it once and give the file"
        ) from error
    parts = {wanted: found} if wanted else dict(found)
    if len({"test", "validation"} & parts.keys()) == 2:
        del parts["test"]  # hub test splits are for submissions, often without answers: name one to read it
    rows: list[Row] = []
    for split, part in parts.items():
        fixed = "" if wanted else SPLITS.get(split, "train")
        rows += [Row(n, dict(fields), fixed) for n, fields in enumerate(part, len(rows) + 1)]
    return rows


def _is_task(value: Any) -> bool:
    return (
        isinstance(value, dict) and isinstance(value.get("data"), dict) and isinstance(value.get("annotations"), list)
    )


def _task(number: int, task: dict[str, Any]) -> Row:
    """A Label Studio task: its data are the fields, the labelled regions of all annotators its answers."""
    answers = []
    asked = [a for a in task["annotations"] if isinstance(a, dict) and not a.get("was_cancelled")]
    for annotation in asked:
        for result in annotation.get("result") or ():
            value = result.get("value") if isinstance(result, dict) else None
            if not isinstance(value, dict) or "text" not in value:
                continue
            start = value.get("start")
            if not isinstance(start, int):  # regions of hypertext have XPaths there
                start = (value.get("globalOffsets") or {}).get("start")
            answers.append({"text": value["text"], "answer_start": start})
    fields = dict(task["data"])
    if "context" not in fields and "text" in fields:
        fields["context"] = fields.pop("text")
    fields.setdefault("id", task.get("id"))
    if asked:
        fields["answers"] = answers
    return Row(number, fields, label_studio=True)
