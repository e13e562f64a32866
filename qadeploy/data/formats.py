"""Formats: files, folders and hub data sets to raw rows. ``READERS`` lists the kinds of files.

The values in a file have one of the ``shapes``; ``fields``, ``loading`` and ``check`` examine the content of the fields.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import sys
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

from qadeploy.data.arrow import check_arrow, read_table, take_rows
from qadeploy.data.rows import SPLITS, RawRow
from qadeploy.data.shapes import SHAPES, numbered, refuse_twice, rows_of, rows_of_line
from qadeploy.data.unpacking import Budget, gunzip
from qadeploy.errors import DataWarning, InputError, one_line
from qadeploy.extras import import_extra
from qadeploy.shipped import HANDBOOK

_DELIMITERS = (",", ";", "\t", "|")
_HEAD = 2**20  # characters within which the header must end
_EXCEL_ROWS = 2**20
_MAGIC = {
    b"\x1f\x8b": "gzip: name it .gz",
    b"PK\x03\x04": "a zip archive or an Excel file: unpack it, or name it .xlsx",
}


@dataclass(frozen=True, slots=True)
class Reader:
    """A kind of file: its suffixes, its name for people, and the function that reads its bytes."""

    suffixes: tuple[str, ...]
    name: str
    read: Callable[[bytes, str], list[RawRow]]


def load_rows(source: str, token: str | None = None) -> Iterable[RawRow]:
    """Reads the rows of a source.

    Args:
        source: ``handbook``, a file, a folder saved by ``datasets``, or ``hub:NAME[@CONFIG][:SPLIT]``.
        token: An access token for the hub.

    Raises:
        InputError: The source cannot be read.
        MissingExtraError: The format needs an optional package.
    """
    if not source:
        raise InputError("no data is named: give 'handbook', a file or 'hub:NAME'")
    if source.startswith("hub:"):
        return _hub_rows(source, token)
    path = HANDBOOK if source == "handbook" else Path(source)
    if not os.path.exists(path):  # for too long a name it returns False, while Path.exists raises
        raise InputError(f"{source}: no such file. Give a file ({_endings()}), 'handbook' or 'hub:NAME'")
    if path.is_dir():
        return _saved_rows(path, source)
    return _file_rows(path, source)


def _endings() -> str:
    return ", ".join(suffix for reader in READERS for suffix in reader.suffixes)


def _file_rows(path: Path, name: str) -> list[RawRow]:
    packed = path.suffix.lower() == ".gz"
    suffix = (path.with_suffix("") if packed else path).suffix.lower()
    reader = next((reader for reader in READERS if suffix in reader.suffixes), None)
    if reader is None:
        raise InputError(f"{name}: unknown ending {suffix!r}: use {_endings()}, or one of them with .gz")
    try:
        content = path.read_bytes()
        if packed:
            content = gunzip(content, name)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{name}: not a readable gzip file: {one_line(error)}") from error
    except OSError as error:
        raise InputError(f"{name}: cannot be read: {error.strerror}") from error
    if not content.strip():
        raise _empty(name)
    return reader.read(content, name)


# ---------------------------------------------------------------- text


def decode(content: bytes, name: str, *, windows: bool = False) -> str:
    """The text of a file in UTF-8, or UTF-16 with a byte order mark.

    Line ends are not translated: inside a quoted field, that would shift the offsets.

    Args:
        content: The bytes of the file.
        name: The name of the file, for errors.
        windows: Whether it may be Windows-1252, in which Excel saves; this emits a warning.

    Raises:
        InputError: The file is not text in these encodings.
    """
    marked = content[:2] in {b"\xff\xfe", b"\xfe\xff"}
    try:
        text = content.decode("utf-16" if marked else "utf-8-sig")
    except UnicodeDecodeError as error:
        text = _decode_windows(content, f"{name}: not UTF-8 text (byte {error.start})", _hint(content, marked), windows)
    if text.count("\0") > len(text) // 4:
        raise InputError(f"{name}: holds NUL characters, as UTF-16 without a byte order mark does: save it as UTF-8")
    return text


def _decode(content: bytes, name: str, *, windows: bool = False) -> str:
    text = decode(content, name, windows=windows)
    if not text.strip():
        raise _empty(name)
    return text


def _hint(content: bytes, marked: bool) -> str:
    """What bytes that are not text may be; "" if they may be in a legacy encoding. ``marked``: with a UTF-16 mark."""
    known = next((what for mark, what in _MAGIC.items() if content.startswith(mark)), "")
    if known:
        return f", but {known}"
    if marked or content.count(0) > len(content) // 4:
        return ", but looks like UTF-16, truncated or without a byte order mark: save it as UTF-8"
    if not content.decode("utf-8", errors="ignore").isascii():
        return ", but UTF-8 elsewhere: it is damaged there"
    return ""


def _decode_windows(content: bytes, problem: str, hint: str, allowed: bool) -> str:
    """The text of bytes that are not UTF-8, in Windows-1252 if that is ``allowed``. Raises InputError otherwise."""
    if hint:
        raise InputError(problem + hint)
    try:
        text = content.decode("cp1252")
    except UnicodeDecodeError as error:
        raise InputError(f"{problem}: save it as UTF-8") from error
    if not allowed:
        raise InputError(f"{problem}, probably Windows-1252: save it as UTF-8, e.g. iconv -f cp1252 -t utf-8")
    warnings.warn(f"{problem}: read as Windows-1252; if letters are wrong, save it as UTF-8", DataWarning, stacklevel=2)
    return text


def _empty(name: str, what: str = "the file") -> InputError:
    return InputError(f"{name}: {what} is empty; it needs at least one row with context, question and answer")


def _json_rows(content: bytes, name: str) -> list[RawRow]:
    text = _decode(content, name)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data":
            first = text[: error.pos]
            if first.lstrip().startswith("{") and "\n" in first[len(first.rstrip()) :] and "\n" not in first.strip():
                return _lines(text)  # one object per line under a .json name
        raise InputError(f"{name}: {_json_problem(error)}") from error
    return rows_of(value, name)


def _json_problem(error: ValueError | RecursionError, before: int = 0) -> str:
    """Says where and why a text is not JSON; ``before`` is the number of lines of the file that precede it."""
    if isinstance(error, json.JSONDecodeError):
        return f"line {before + error.lineno}, column {error.colno}: not valid JSON: {error.msg}"
    return f"from line {before + 1}: not valid JSON: {one_line(error)}"  # nested too deeply, or too long a number


def _each_line(text: str) -> Iterator[str]:
    """Yields the lines one by one: a list of all of them would be another copy of the file."""
    begin = 0
    while (end := text.find("\n", begin)) >= 0:
        yield text[begin:end]
        begin = end + 1
    yield text[begin:]


def _lines(text: str) -> list[RawRow]:
    rows: list[RawRow] = []
    for before, line in enumerate(_each_line(text)):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            rows.append(RawRow(0, {}, problem=_json_problem(error, before)))
            continue
        if isinstance(value, dict) and set(value) == {"header"} and not rows:  # MRQA's first line
            continue
        try:
            rows += [*rows_of_line(value, f"line {before + 1}")]
        except InputError as error:
            rows.append(RawRow(0, {}, problem=str(error)))
        except RecursionError:
            rows.append(RawRow(0, {}, problem=f"line {before + 1}: is nested too deeply"))
    return numbered(rows)


def _csv_rows(content: bytes, name: str, delimiter: str = "") -> list[RawRow]:
    text = _decode(content, name, windows=True)
    if delimiter:
        return _separated(text, name, delimiter)
    first, _, rest = text.partition("\n")
    first = first.rstrip("\r ")
    if first[:4].lower() == "sep=" and first[4:] in _DELIMITERS:  # a line that names the delimiter for Excel
        return _separated(rest, name, first[4:])
    return _separated(text, name, _delimiter(text))


def _reader(text: str, delimiter: str, **options: Any) -> Any:
    csv.field_size_limit(sys.maxsize)
    return csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, **options)


def _delimiter(text: str) -> str:
    """The delimiter that splits the header into the most fields; a comma if several do."""
    head = text[:_HEAD].lstrip("\r\n")
    return max(_DELIMITERS, key=lambda each: len(next(_reader(head, each), [])))


def _separated(text: str, name: str, delimiter: str) -> list[RawRow]:
    reader = _reader(text, delimiter, strict=True)
    rows: list[RawRow] = []
    try:
        header = [cell.strip() for cell in next(values for values in reader if values)]
        refuse_twice(header, name)
        for values in (v for v in reader if v):
            if len(values) != len(header):
                problem = f"{len(values)} fields, the header has {len(header)}: quote the delimiters"
                rows.append(RawRow(0, {}, problem=problem))
                continue
            rows += rows_of_line(dict(zip(header, values, strict=True)), f"{name}: line {reader.line_num}")
    except csv.Error as error:
        raise InputError(f"{name}: line {reader.line_num}: not valid CSV: {error}") from error
    return numbered(rows)


# ---------------------------------------------------------------- tables


def _table_rows(kind: str) -> Callable[[bytes, str], list[RawRow]]:
    return lambda content, name: rows_of(read_table(content, name, kind), name)


def _excel_rows(content: bytes, name: str) -> list[RawRow]:
    openpyxl = import_extra("openpyxl", "reading Excel files", "excel")
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:  # zipfile unpacks no more of a part than its entry says
            Budget(name, len(content)).take(sum(part.file_size for part in archive.infolist()))
        sheet = openpyxl.load_workbook(io.BytesIO(content), read_only=True, data_only=True).worksheets[0]
        sheet.reset_dimensions()  # some programs write wrong dimensions
        values = _filled(sheet.iter_rows(values_only=True), name, len(content))
    except InputError:
        raise
    except Exception as error:  # the library raises many unrelated types on a damaged file
        raise InputError(f"{name}: not a readable Excel file: {one_line(error)}") from error
    if not values:
        raise _empty(name, "its first sheet")
    header = ["" if cell is None else str(cell).strip() for cell in values[0]]
    refuse_twice(header, name)
    rows: list[RawRow] = []
    for cells in values[1:]:
        if any(cell is not None for cell in cells[len(header) :]):
            rows.append(RawRow(0, {}, problem=f"{len(cells)} cells, the header has {len(header)}"))
        else:
            rows += rows_of_line(dict(zip_longest(header, cells[: len(header)])), name)
    return numbered(rows)


def _filled(rows: Iterable[tuple[Any, ...]], name: str, packed: int) -> list[tuple[Any, ...]]:
    """The nonempty rows of a sheet. Raises InputError if it has more rows than Excel or a ``Budget`` allows."""
    budget = Budget(name, packed)
    found: list[tuple[Any, ...]] = []
    for number, row in enumerate(rows, 1):
        if number > _EXCEL_ROWS:  # a single cell may name any row, and openpyxl then yields all rows before it
            raise InputError(f"{name}: its first sheet has more than the {_EXCEL_ROWS:,} rows that Excel allows")
        if any(cell is not None for cell in row):
            budget.take(8 * len(row))
            found.append(row)
    return found


READERS = (
    Reader((".json",), "JSON", _json_rows),
    Reader((".jsonl", ".ndjson"), "JSONL", lambda content, name: _lines(_decode(content, name))),
    Reader((".csv",), "CSV with a header; comma, semicolon, tab or bar", _csv_rows),
    Reader((".tsv",), "tab-separated text with a header", partial(_csv_rows, delimiter="\t")),
    Reader((".parquet",), "parquet", _table_rows("parquet")),
    Reader((".arrow",), "arrow", _table_rows("arrow")),
    Reader((".xlsx",), "Excel, the first sheet", _excel_rows),
)


def table() -> str:
    """The supported shapes and kinds of files, as two tables in Markdown."""
    shapes = ["| shape | looks like |", "|---|---|", *(f"| {shape.name} | {shape.looks} |" for shape in SHAPES)]
    files = ["| ending | kind |", "|---|---|"]
    files += [f"| {', '.join(f'`{suffix}`' for suffix in reader.suffixes)} | {reader.name} |" for reader in READERS]
    return "\n".join([*shapes, "", *files]) + "\n"


# ---------------------------------------------------------------- the datasets library


def _saved_rows(path: Path, name: str) -> list[RawRow]:
    """Reads a folder written by ``save_to_disk``."""
    if not (path / "state.json").is_file() and not (path / "dataset_dict.json").is_file():
        raise InputError(f"{name}: this is a folder, and not one that datasets saved: give a file ({_endings()})")
    datasets = import_extra("datasets", "reading a folder that datasets saved", "train")
    try:
        files = {
            state.parent / file["filename"]
            for state in path.rglob("state.json")
            for file in json.loads(state.read_text(encoding="utf-8"))["_data_files"]
        }
        for file in sorted(files):
            check_arrow(file, str(file))
        found = datasets.load_from_disk(str(path))
        size = sum(file.stat().st_size for file in files)
        budget = Budget(name, size)  # for the rows, because a file may be listed many times
        return _split_rows(found if isinstance(found, dict) else {"": found}, name, budget)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{name}: not a readable folder of datasets: {one_line(error)}") from error


def _hub_rows(source: str, token: str | None) -> list[RawRow]:
    datasets = import_extra("datasets", "reading from a hub", "train")
    place, _, wanted = source.removeprefix("hub:").partition(":")
    name, _, config = place.partition("@")
    try:
        found = datasets.load_dataset(name, name=config or None, split=wanted or None, token=token)
    except Exception as error:  # the library raises many unrelated types
        raise InputError(
            f"{source}: the data set cannot be loaded from the hub: {one_line(error)}. "
            "Check the name and the network, or download it once and give the file"
        ) from error
    parts = {"": found} if wanted else dict(found)
    if len({"test", "validation"} & parts.keys()) == 2:
        del parts["test"]  # test splits on the hub often have no answers: they are read only if named
    return _split_rows(parts, source)


def _split_rows(parts: Any, name: str, budget: Budget | None = None) -> list[RawRow]:
    rows: list[RawRow] = []
    for split, part in parts.items():
        fixed = SPLITS.get(split, "train") if split else ""
        for fields in part:
            if budget:
                take_rows(1, budget)
                budget.take(_characters(fields))
            rows += [replace(row, split=fixed) for row in rows_of_line(dict(fields), name)]
    return numbered(rows)


def _characters(value: Any) -> int:
    """The characters and bytes of all texts in a value."""
    if isinstance(value, dict | list):
        return sum(map(_characters, value.values() if isinstance(value, dict) else value))
    return len(value) if isinstance(value, str | bytes) else 0
