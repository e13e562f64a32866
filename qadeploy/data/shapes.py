"""Shapes: how the values in a file are nested, and how they are read into raw rows.

A value is a whole JSON document, or one line of JSONL. ``SHAPES`` lists the supported shapes; the first one that fits an object
reads it. Elements of a list may have different shapes. This module does not examine the content of fields.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from qadeploy.data.annotation_tools import (
    doccano,
    is_doccano,
    is_export_row,
    is_prodigy,
    is_task,
    prodigy,
    row_of_export,
    task,
)
from qadeploy.data.rows import SPLITS, RawRow
from qadeploy.data.values import offset_of, plain
from qadeploy.data.wording import kind_of, names
from qadeploy.errors import InputError

Object = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Shape:
    """One shape.

    Attributes:
        name: The name of the shape, for people.
        looks: An example of the shape.
        fits: Returns whether an object has the shape.
        rows: Reads the rows, not numbered yet, from an object and its place in the file, which errors name.
    """

    name: str
    looks: str
    fits: Callable[[Object], bool]
    rows: Callable[[Object, str], Iterable[RawRow]]


def rows_of(value: Any, name: str) -> list[RawRow]:
    """Reads a whole JSON document.

    Args:
        value: The value of the document.
        name: The name of the file, for errors.

    Raises:
        InputError: The document has no supported shape, or a list or object that a shape needs is missing; names the place.
    """
    if not isinstance(value, dict | list):
        raise InputError(f"{name}: must be a list of rows or an object with 'data', not {kind_of(value)}")
    try:
        return numbered(_rows(value, name))
    except RecursionError as error:
        raise InputError(f"{name}: is nested too deeply") from error


def rows_of_line(value: Any, place: str) -> Iterator[RawRow]:
    """Reads one line of JSONL; the rows are not numbered yet. Raises InputError as ``rows_of`` does."""
    return _rows(value if isinstance(value, dict) else [value], place)


def numbered(rows: Iterable[RawRow]) -> list[RawRow]:
    """Numbers rows from 1."""
    return [replace(row, number=number) for number, row in enumerate(rows, 1)]


def _rows(value: Any, place: str) -> Iterator[RawRow]:
    if isinstance(value, list):
        for number, element in enumerate(value, 1):
            if isinstance(element, dict):
                yield from _rows(element, f"{place}: element {number}")
            else:
                problem = f"must be an object with context, question and answer, not {kind_of(element)}"
                yield RawRow(0, {}, problem=problem)
        return
    shape = None if _is_plain(value) else next((shape for shape in SHAPES if shape.fits(value)), None)
    if shape is None:
        yield RawRow(0, value)
    else:
        yield from shape.rows(value, place)


_TOOLS = (is_task, is_export_row, is_prodigy, is_doccano)
_MARKS = frozenset({"annotations", "annotation_id", "spans", "_task_hash", "label", "labels", "entities"})


def _is_plain(value: Object) -> bool:
    """Whether an object is itself a row, whatever else it holds: it has a question, and no annotation tool wrote it."""
    if isinstance(value.get("question"), str) and _MARKS.isdisjoint(value):
        return True
    asks = any(plain(key) == "question" and not isinstance(x, list | dict) for key, x in value.items())
    return asks and not any(fits(value) for fits in _TOOLS)


# ---------------------------------------------------------------- nesting


def _list(value: Object, key: str, place: str) -> list[Any]:
    found = value.get(key)
    if not isinstance(found, list):
        raise InputError(f"{place}: {key!r} must be a list, not {kind_of(found)}")
    return found


def _objects(value: Object, key: str, place: str) -> Iterator[tuple[dict[str, Any], str]]:
    for number, element in enumerate(_list(value, key, place), 1):
        where = f"{place}, {_SINGULAR[key]} {number}"
        if not isinstance(element, dict):
            raise InputError(f"{where}: must be an object, not {kind_of(element)}")
        yield element, where


_SINGULAR = {"paragraphs": "paragraph", "qas": "question", "qa_pairs": "question"}
_CONTEXT = ("context", "context_text")
_RENAMED = {"query_text": "question", "query_id": "id", "qid": "id"}  # CMRC's and MRQA's names


def _article(article: Object, place: str) -> Iterator[RawRow]:
    for paragraph, where in _objects(article, "paragraphs", place):
        yield from _paragraph(paragraph, where)


def _paragraph(paragraph: Object, place: str) -> Iterator[RawRow]:
    key = next((key for key in _CONTEXT if key in paragraph), None)
    if key is None:
        raise InputError(f"{place}: 'context' is missing; the fields found are {names(paragraph)}")
    for qa, _ in _objects(paragraph, "qas", place):
        fields = {_RENAMED.get(name, name) if _RENAMED.get(name) not in qa else name: x for name, x in qa.items()}
        detected = [*_detected(fields.pop("detected_answers", None))]
        if detected:
            fields["answers"] = detected
        yield RawRow(0, {**fields, "context": paragraph[key]}, nested=True)


def _detected(found: Any) -> Iterator[Any]:
    """Yields MRQA's answers, whose spans include their last character."""
    for answer in (x for x in found if isinstance(x, dict)) if isinstance(found, list) else ():
        spans = answer.get("char_spans")
        for span in spans if isinstance(spans, list) else ():
            first, last = span if isinstance(span, list) and len(span) == 2 else (span, None)
            with suppress(ValueError):  # reported when the answer is read
                last = None if (end := offset_of(last)) is None else end + 1
            yield {"text": answer.get("text"), "start": first, "end": last}


def _drop(passages: Object, place: str) -> Iterator[RawRow]:
    for identity, passage in passages.items():
        for qa, _ in _objects(passage, "qa_pairs", f"{place}: passage {identity}"):
            fields, problem = {"id": qa.get("query_id"), **qa}, ""
            if "answer" in qa:
                answer = fields.pop("answer")
                spans = answer.get("spans") if isinstance(answer, dict) else None
                fields["answers"] = spans = spans if isinstance(spans, list) else []
                if len(spans) != 1:
                    found = "several spans together" if spans else "a number or a date"
                    problem = f"its answer is {found}, not one span of the context"
            yield RawRow(0, {**fields, "context": passage["passage"]}, nested=True, problem=problem)


def _splits(value: Object, place: str) -> Iterator[RawRow]:
    for split, part in value.items():
        for row in _rows(part, f"{place}: {split}"):
            yield replace(row, split=SPLITS[split])


# ---------------------------------------------------------------- tables


def _is_columns(value: Object) -> bool:
    columns = list(value.values())
    if len(columns) < 2 or "paragraphs" in value or "qas" in value:
        return False
    if all(isinstance(column, list) for column in columns):
        return len({len(column) for column in columns}) == 1
    if not all(isinstance(column, dict) for column in columns):
        return False
    keys = {tuple(column) for column in columns}
    return len(keys) == 1 and "question" in {plain(key) for key in value}


def _is_index(value: Object) -> bool:
    rows = list(value.values())
    return bool(rows) and all(isinstance(row, dict) and "question" in {plain(key) for key in row} for row in rows)


def _columns(value: Object, place: str) -> Iterator[RawRow]:
    columns = [column if isinstance(column, list) else list(column.values()) for column in value.values()]
    for cells in zip(*columns, strict=True):
        yield RawRow(0, dict(zip(value, cells, strict=True)))


def _table(value: Object, place: str) -> Iterator[RawRow]:
    refuse_twice(value["columns"], place)
    for number, cells in enumerate(_list(value, "data", place), 1):
        if not isinstance(cells, list) or len(cells) != len(value["columns"]):
            raise InputError(f"{place}, row {number}: must be a list of {len(value['columns'])} values, one per column")
        yield RawRow(0, dict(zip(map(str, value["columns"]), cells, strict=True)))


def refuse_twice(columns: Iterable[Any], place: str) -> None:
    """Raises InputError if a column is named more than once."""
    counts = Counter(str(column) for column in columns)
    twice = [column for column, count in counts.items() if count > 1 and column]
    if twice:
        raise InputError(f"{place}: the header has the column {names(twice)} more than once: give each its own name")


def _has(*keys: str) -> Callable[[Object], bool]:
    return lambda value: all(isinstance(value.get(key), list) for key in keys)


def _is_split(value: Object) -> bool:
    return bool(value) and all(key in SPLITS and isinstance(part, list | dict) for key, part in value.items())


def _is_drop(value: Object) -> bool:
    return bool(value) and all(isinstance(x, dict) and {"passage", "qa_pairs"} <= set(x) for x in value.values())


def _one(read: Callable[[Object], RawRow]) -> Callable[[Object, str], Iterable[RawRow]]:
    return lambda value, place: [read(value)]


SHAPES = (
    Shape("Label Studio, JSON", '`[{"data": {...}, "annotations": [...]}]`', is_task, _one(task)),
    Shape(
        "Label Studio, JSON-MIN and CSV",
        "the task's fields, `annotation_id`, a column of regions",
        is_export_row,
        _one(row_of_export),
    ),
    Shape('pandas, `orient="split"`', '`{"columns": [...], "data": [[...]]}`', _has("columns", "data"), _table),
    Shape(
        'SQuAD v1.1 and v2.0 (also Haystack\'s exports), pandas `orient="table"`',
        '`{"data": [articles, paragraphs or rows]}`',
        lambda x: isinstance(x.get("data"), list) or ("data" in x and not {"question", "context"} & set(x)),
        lambda x, place: _rows(_list(x, "data", place), place),
    ),
    Shape(
        "an article",
        '`{"paragraphs": [{"context", "qas"}]}`, alone or in a list',
        lambda x: "paragraphs" in x,
        _article,
    ),
    Shape(
        "a paragraph (simpletransformers, MRQA, CMRC)",
        '`{"context", "qas": [...]}`, alone or in a list; MRQA\'s `detected_answers`, CMRC\'s `context_text` and `query_text`',
        lambda x: "qas" in x,
        _paragraph,
    ),
    Shape("DROP", '`{id: {"passage", "qa_pairs"}}`; only answers of one span', _is_drop, _drop),
    Shape("splits", '`{"train": [...], "validation": [...]}`', _is_split, _splits),
    Shape(
        "the hub viewer's rows", '`{"rows": [{"row": {...}}]}`', _has("rows"), lambda x, place: _rows(x["rows"], place)
    ),
    Shape(
        "a row of the viewer",
        '`{"row_idx", "row": {...}}`',
        lambda x: isinstance(x.get("row"), dict),
        lambda x, place: _rows(x["row"], place),
    ),
    Shape("Prodigy", '`{"text", "question", "spans": [...], "answer": "accept"}`', is_prodigy, _one(prodigy)),
    Shape("doccano", '`{"text", "question", "label": [[start, end, name]]}`', is_doccano, _one(doccano)),
    Shape(
        'pandas, `orient="index"`',
        '`{"0": {row}, "1": {row}}`',
        _is_index,
        lambda x, place: _rows([*x.values()], place),
    ),
    Shape("columns (`to_dict`, pandas `to_json`)", '`{"context": [...], "question": [...]}`', _is_columns, _columns),
)
