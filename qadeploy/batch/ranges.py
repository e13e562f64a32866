"""Row ranges of files, so that many workers can read one file and none needs to hold all of it.

JSONL is cut at byte offsets, which are found by reading the file once; parquet at row numbers, from its footer. JSON,
CSV and hub data sets can only be read whole, so each worker holds the file that it reads.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import islice
from typing import Any

from qadeploy.batch.sources import LINES, PARQUET, Source
from qadeploy.data.arrow import take_batch, take_rows, texts_of_parquet, to_rows
from qadeploy.data.columns import columns_of, guess
from qadeploy.data.fields import DataOptions
from qadeploy.data.formats import load_rows
from qadeploy.data.parquet_pages import Pages
from qadeploy.data.rows import RawRow
from qadeploy.data.unpacking import Budget
from qadeploy.data.wording import kind_of, names
from qadeploy.errors import FailureError, InputError, one_line
from qadeploy.extras import import_extra

FINEST = 250  # rows of the smallest range by default
_MARKS = 4096  # with more ranges per file, neighbours are joined in pairs, so that a plan stays small
_BATCH = 256  # rows of parquet in memory at a time
_FIELDS = ("context", "contexts", "question", "id")
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Range:
    """A range of ``rows`` rows, which follow the first ``first`` rows; in JSONL they are the bytes ``begin:end``."""

    first: int
    rows: int
    begin: int = 0
    end: int = 0


@dataclass(frozen=True, slots=True)
class Scan:
    """The rows of a file in ranges of ``step`` rows; the last one may be shorter.

    ``passages`` says whether a row may have passages.
    """

    rows: int
    step: int
    ranges: tuple[Range, ...]
    passages: bool = False

    def coarser(self, step: int) -> tuple[Range, ...]:
        """The same rows in ranges of ``step`` rows, which must be a multiple of this scan's step."""
        each = step // self.step
        return tuple(_joined(self.ranges[i : i + each]) for i in range(0, len(self.ranges), each))


def _joined(parts: tuple[Range, ...]) -> Range:
    return Range(parts[0].first, sum(part.rows for part in parts), parts[0].begin, parts[-1].end)


def scan(source: Source, step: int | None, data_options: DataOptions) -> Scan:
    """Divides the rows of a file into ranges of ``step`` rows; None means ``FINEST``, doubled as often as needed.

    Raises:
        InputError: The file cannot be read, holds no rows, or is parquet without the columns.
        MissingExtraError: The file is parquet and pyarrow is not installed.
    """
    if source.kind in LINES:
        found = _scan_lines(source, step, f'"{data_options.column("contexts")}"'.encode())
    else:
        if source.kind == PARQUET:
            rows, names = _scan_parquet(source, data_options)
        else:
            whole = _whole(source)
            rows, names = len(whole), {name for row in whole for name in row.fields}
        passages = data_options.column("contexts") in names or "contexts" in names
        if step is None:
            step = FINEST
            while step * _MARKS < rows:
                step *= 2
        ranges = tuple(Range(first, min(step, rows - first)) for first in range(0, rows, step))
        found = Scan(rows, step, ranges, passages)
    if not found.rows:
        raise InputError(f"{source.path}: holds no rows")
    return found


def _scan_lines(source: Source, step: int | None, passages: bytes) -> Scan:
    size = step or FINEST
    ranges: list[Range] = []
    rows = at = begin = first = 0
    found = False
    try:
        with source.open() as stream:
            for line in stream:
                found = found or passages in line
                if _body(line, at):
                    if rows - first == size:
                        ranges.append(Range(first, size, begin, at))
                        first, begin = rows, at
                        if not step and len(ranges) == _MARKS:
                            ranges = [_joined((a, b)) for a, b in zip(ranges[::2], ranges[1::2], strict=True)]
                            size *= 2
                    rows += 1
                at += len(line)
    except OSError as error:
        raise InputError(f"{source.path}: cannot be read: {one_line(error)}") from error
    if rows:
        ranges.append(Range(first, rows - first, begin, at))
    return Scan(rows, size, tuple(ranges), found)


def _scan_parquet(source: Source, data_options: DataOptions) -> tuple[int, set[str]]:
    import_parquet(f"reading {source.path}")
    try:
        with source.open() as stream:
            file = _parquet_file(stream)
            schema, rows = file.schema_arrow, int(file.metadata.num_rows)
            budget = Budget(source.path, source.size, streamed=True)
            take_rows(rows, budget)
            pages = Pages(stream, source.size)
            # In an object store each header may be a request, so they are read when their row group is.
            for group in range(0 if source.remote else file.num_row_groups):
                with suppress(ValueError):  # its rows are set aside
                    pages.check(group, budget)
    except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
        raise InputError(f"{source.path}: not a readable parquet file: {one_line(error)}") from error
    found = schema.names
    known = {*found, *columns_of(found, data_options.mapping)}
    for field in ("context", "question"):
        if field not in known and not (field == "context" and "contexts" in known):
            option = guess({each.name: "text" if "string" in str(each.type) else None for each in schema})
            hint = f"; did you mean {option}?" if option else ""
            raise InputError(f"{source.path}: column {field} is missing; the columns found are {names(found)}{hint}")
    return rows, set(found)


def import_parquet(purpose: str) -> Any:
    """The module pyarrow.parquet. Raises MissingExtraError if it is not installed; ``purpose`` is what needs it."""
    return import_extra("pyarrow.parquet", purpose, "parquet")


def _parquet_file(stream: Any, **options: Any) -> Any:
    # pre_buffer would hold all bytes of a row group; without it, pages are read as they are needed.
    return import_parquet("reading parquet").ParquetFile(stream, pre_buffer=False, buffer_size=2**20, **options)


# ---------------------------------------------------------------- reading


class Reader:
    """Reads ranges of input files. A parquet file stays open at its current row for the next range.

    Not thread-safe: each worker has its own reader.
    """

    def __init__(self, data_options: DataOptions) -> None:
        self._data_options = data_options
        self._at: tuple[Source, int, Iterator[RawRow]] | None = None

    def rows(self, source: Source, part: Range) -> Iterator[RawRow]:
        """The rows of a range, lazily. A row that cannot be read has a ``problem``.

        Raises OSError, InputError if the file cannot be opened or its storage fails.
        """
        if source.kind in LINES:
            return _line_rows(source, part)
        if source.kind == PARQUET:
            return self._parquet_rows(source, part)
        return iter(_whole(source)[part.first : part.first + part.rows])

    def _parquet_rows(self, source: Source, part: Range) -> Iterator[RawRow]:
        at, self._at = self._at, None  # the position is kept only if this range is read to its end
        if at and at[0] == source and at[1] <= part.first:
            rows = at[2]
        else:
            rows = _all_parquet_rows(source, self._data_options, part.first)
            at = (source, part.first, rows)
        yield from islice(rows, part.first - at[1], part.first - at[1] + part.rows)
        self._at = (source, part.first + part.rows, rows)


def _line_rows(source: Source, part: Range) -> Iterator[RawRow]:
    with source.open() as stream:
        stream.seek(part.begin)
        number, at = part.first, part.begin
        while at < part.end and (line := stream.readline(part.end - at)):
            if body := _body(line, at):
                number += 1
                yield _line_row(number, body)
            at += len(line)


def _body(line: bytes, at: int) -> bytes:
    """The text of the line at a byte offset; empty if the line is blank."""
    return (line if at else line.removeprefix(_BOM)).strip()


def _line_row(number: int, line: bytes) -> RawRow:
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return RawRow(number, {}, problem=f"not UTF-8 text (byte {error.start} of its line)")
    except json.JSONDecodeError as error:
        return RawRow(number, {}, problem=f"not valid JSON: {error.msg} (column {error.colno} of its line)")
    except (ValueError, RecursionError) as error:  # too long a number, or too deep nesting
        return RawRow(number, {}, problem=f"not valid JSON: {one_line(error)}")
    if not isinstance(value, dict):
        return RawRow(number, {}, problem=f"must be an object with context and question, not {kind_of(value)}")
    return RawRow(number, value)


@lru_cache(maxsize=1)
def _whole(source: Source) -> tuple[RawRow, ...]:
    if source.remote:
        raise InputError(
            f"{source.path}: only parquet and JSONL can be read from there: convert the file, or copy it here"
        )
    return tuple(load_rows(source.path))


def _all_parquet_rows(source: Source, data_options: DataOptions, first: int) -> Iterator[RawRow]:
    """The rows of a parquet file after the first ``first``. Rows on damaged pages have a problem."""
    with source.open() as stream:
        file = _parquet_file(stream)
        file = _parquet_file(stream, read_dictionary=texts_of_parquet(file))
        given = file.schema_arrow.names
        theirs = columns_of(given, data_options.mapping)
        wanted = {*_FIELDS, *(theirs.get(field, field) for field in _FIELDS)}
        columns = [name for name in given if name in wanted]
        leaves = {n for n in range(len(file.schema)) if _leads_to(file.schema.column(n).path, columns)}
        pages, budget = Pages(stream, source.size), Budget(source.path, source.size, streamed=True)
        end = 0
        for group in range(file.num_row_groups):
            begin, end = end, end + file.metadata.row_group(group).num_rows
            if end > first:
                check = partial(pages.check, group, budget, leaves)
                part = max(first, begin) - begin, end - begin
                yield from _group_rows(source, file, group, columns, part, begin, check)


def _leads_to(path: str, columns: list[str]) -> bool:
    """Whether a parquet leaf column is one of the columns, or a part of one; names may have dots."""
    return any(path == name or path.startswith(f"{name}.") for name in columns)


def _group_rows(
    source: Source,
    file: Any,
    group: int,
    columns: list[str],
    part: tuple[int, int],
    before: int,
    check: Callable[[], object],
) -> Iterator[RawRow]:
    """Rows ``part[0]:part[1]`` of a row group, which starts after ``before`` rows of the file; ``check`` counts its pages."""
    done = 0
    try:
        check()
        for batch in file.iter_batches(_BATCH, row_groups=[group], columns=columns):
            take_batch(batch, Budget(source.path, source.size))  # limits the memory of a batch
            skip = min(max(part[0] - done, 0), len(batch))
            yield from _batch_rows(batch.slice(skip), before + done + skip)
            done += len(batch)
    except InputError as error:
        raise FailureError(str(error)) from error  # neither a row nor the storage is at fault
    except (OSError, ValueError, NotImplementedError) as error:  # pyarrow raises these for damaged files
        if getattr(error, "errno", None) or (source.remote and isinstance(error, OSError)):  # the storage fails
            raise
        problem = f"row group {group + 1} cannot be read: {one_line(error)}"
        for row in range(max(part[0], done), part[1]):
            yield RawRow(before + row + 1, {}, problem=problem)


def _batch_rows(batch: Any, before: int) -> list[RawRow]:
    try:
        return [RawRow(n, fields) for n, fields in enumerate(to_rows(batch), before + 1)]
    except ValueError as error:  # a UnicodeDecodeError is one
        if len(batch) == 1:
            return [RawRow(before + 1, {}, problem=f"cannot be read: {one_line(error)}")]
    return [row for i in range(len(batch)) for row in _batch_rows(batch.slice(i, 1), before + i)]
