"""Parquet and arrow files as Python rows, within a budget: the unpacked size is counted before anything is unpacked.

An index of a few bytes can stand for a long text, and a run of one value for any number of rows. So texts stay dictionaries
until their lengths are added up.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from qadeploy.data.parquet_pages import Pages
from qadeploy.data.shapes import refuse_twice
from qadeploy.data.unpacking import Budget
from qadeploy.errors import InputError, one_line
from qadeploy.extras import import_extra
from qadeploy.machine import usable_cpus

_ROWS = 1024  # rows of parquet that are unpacked at a time
_ROW, _CELL = 200, 8  # the least bytes that Python needs per row and per cell
_ENCODINGS = ("run_end_encoded", "list_view", "large_list_view")


def read_table(content: bytes, name: str, kind: str) -> list[dict[str, Any]]:
    """Reads the rows of a parquet file, or of an arrow file in the stream format (which ``datasets`` writes) or file format.

    Args:
        content: The bytes of the file.
        name: The name of the file, for errors.
        kind: ``parquet`` or ``arrow``.

    Raises:
        InputError: The file cannot be read, names a column twice, or unpacks to more than a ``Budget`` allows.
        MissingExtraError: pyarrow is not installed.
    """
    import_extra("pyarrow.parquet", f"reading {kind}", "parquet")
    import pyarrow as arrow

    arrow.set_cpu_count(min(arrow.cpu_count(), usable_cpus()))  # pyarrow ignores CPU quotas
    budget = Budget(name, len(content))
    batches = _parquet_batches if kind == "parquet" else _arrow_batches
    rows: list[dict[str, Any]] = []
    try:
        for batch in batches(arrow, content, budget):
            refuse_twice(batch.schema.names, name)
            take_batch(batch, budget)
            rows += to_rows(batch)
    except (arrow.ArrowException, OSError, ValueError, OverflowError, struct.error) as error:
        raise InputError(f"{name}: not a readable {kind} file: {one_line(error)}") from error
    return rows


def take_batch(batch: Any, budget: Budget) -> None:
    """Counts the bytes that the rows of a record batch need, before they are made.

    Args:
        batch: A record batch of pyarrow. Its texts may be dictionaries.
        budget: The bytes that they may need.

    Raises:
        InputError: They need more, or a column has an unsupported type.
    """
    take_rows(len(batch), budget)
    budget.take(sum(_size(column, budget.name) for column in batch.columns))


def take_rows(count: int, budget: Budget) -> None:
    """Counts the bytes that ``count`` rows need besides their values. Raises InputError."""
    budget.take(_ROW * count)


def texts_of_parquet(file: Any) -> list[str]:
    """The text columns of a ``ParquetFile``, which are to be read as dictionaries."""
    columns = [file.schema.column(i) for i in range(len(file.schema))]
    return [c.path for c in columns if c.physical_type == "BYTE_ARRAY" and c.logical_type.type != "DECIMAL"]


def _parquet_batches(arrow: Any, content: bytes, budget: Budget) -> Iterator[Any]:
    source = arrow.BufferReader(content)
    with arrow.parquet.ParquetFile(source) as file:
        claimed = Budget(budget.name, budget.packed)
        take_rows(file.metadata.num_rows, claimed)
        pages = Pages(io.BytesIO(content), len(content))
        for group in range(len(pages)):
            pages.check(group, claimed)
        texts = texts_of_parquet(file)
    with arrow.parquet.ParquetFile(source, read_dictionary=texts) as file:
        refuse_twice(file.schema_arrow.names, budget.name)  # a file without rows has no batch to check
        yield from file.iter_batches(_ROWS)


def check_arrow(path: Path, name: str) -> None:
    """Counts the unpacked size of an arrow file before another library reads it.

    Args:
        path: The file.
        name: Its name in errors.

    Raises:
        InputError: The file is damaged, or unpacks to more than a ``Budget`` allows.
        OSError: The file cannot be read.
    """
    import pyarrow as arrow

    budget = Budget(name, path.stat().st_size)
    try:
        with arrow.memory_map(str(path)) as file:
            for batch in _arrow_batches(arrow, file.read_buffer(), budget):
                take_batch(batch, budget)
    except (arrow.ArrowException, ValueError, OverflowError, struct.error) as error:
        raise InputError(f"{name}: not a readable arrow file: {one_line(error)}") from error


def _arrow_batches(arrow: Any, content: Any, budget: Budget) -> Iterator[Any]:
    """Yields the record batches in bytes or a pyarrow buffer."""
    framed = bytes(content[:6]) == b"ARROW1"  # the file format is the stream format inside a frame
    stream = content[8:] if framed else content
    claimed = Budget(budget.name, budget.packed)
    for message in arrow.ipc.MessageReader.open_stream(stream):
        claimed.take(_unpacked(message))
    with arrow.ipc.open_stream(stream) as reader:
        refuse_twice(reader.schema.names, budget.name)
        for batch in reader:
            batch.validate(full=True)  # or damaged offsets would read other memory
            yield batch


def _unpacked(message: Any) -> int:
    """The bytes that the buffers of an IPC message unpack to: each compressed buffer begins with its length."""
    if message.type not in {"record batch", "dictionary"}:
        return 0
    data, body = memoryview(message.metadata), memoryview(message.body)

    def number(code: str, at: int) -> int:
        return int(struct.unpack_from(f"<{code}", data, at)[0])

    def member(table: int, index: int) -> int | None:
        """The position of a member of a flatbuffers table; None if it is left out."""
        members = table - number("i", table)
        offset = number("H", members + 4 + 2 * index) if 4 + 2 * index < number("H", members) else 0
        return table + offset if offset else None

    def follow(table: int, index: int) -> int | None:
        at = member(table, index)
        return None if at is None else at + number("I", at)

    batch = follow(number("I", 0), 2)
    if batch is not None and message.type == "dictionary":
        batch = follow(batch, 1)
    buffers = None if batch is None else follow(batch, 2)
    if batch is None or buffers is None or member(batch, 3) is None:  # not compressed
        return len(body)
    places = [struct.unpack_from("<qq", data, buffers + 4 + 16 * i) for i in range(number("I", buffers))]
    return sum(max(struct.unpack_from("<q", body, at)[0], 0) for at, length in places if length)


def _size(column: Any, name: str) -> int:
    """The least bytes that an array's values need, counted without making them."""
    import pyarrow as arrow
    from pyarrow import compute

    kind = column.type
    if str(kind).startswith(_ENCODINGS):
        raise InputError(f"{name}: holds a column of type {kind}, which is not read: save it as plain lists or values")
    if isinstance(column, arrow.ExtensionArray):
        return _size(column.storage, name)
    if arrow.types.is_struct(kind):
        return _CELL * len(column) + sum(_size(child, name) for child in column.flatten())
    if hasattr(column, "flatten") and hasattr(kind, "value_type"):  # lists and maps
        return _CELL * len(column) + _size(column.flatten(), name)
    indexed = arrow.types.is_dictionary(kind)
    lengths = _lengths(column.dictionary if indexed else column)
    if indexed and lengths is not None:
        lengths = compute.take(lengths, column.indices)
    return _CELL * len(column) + (column.nbytes if lengths is None else compute.sum(lengths).as_py() or 0)


def _lengths(values: Any) -> Any:
    """The lengths of texts or of bytes as an arrow array; None for other types."""
    import pyarrow as arrow
    from pyarrow import compute

    if str(values.type) in {"string_view", "binary_view"}:  # the first number of each view
        views = np.frombuffer(values.buffers()[1], np.int32).reshape(-1, 4)
        return arrow.array(views[values.offset : values.offset + len(values), 0], arrow.int64())
    try:
        return compute.cast(compute.binary_length(values), arrow.int64())
    except arrow.ArrowNotImplementedError:
        return None


def to_rows(batch: Any) -> list[dict[str, Any]]:
    """Converts a record batch to Python objects.

    A date, time or duration that Python cannot represent becomes the number in the file, so that other columns can be used.

    Args:
        batch: A record batch of pyarrow.

    Returns:
        A dictionary per row.

    Raises:
        ValueError: A value cannot be read, e.g. a text that is not UTF-8.
    """
    columns: Iterable[list[Any]] = [_values(column) for column in batch.columns]
    names = batch.schema.names
    return [dict(zip(names, cells, strict=True)) for cells in zip(*columns, strict=True)]


def _values(column: Any) -> list[Any]:
    try:
        return list(column.to_pylist())
    except UnicodeDecodeError:
        raise
    except (ValueError, OverflowError, KeyError, ImportError):  # KeyError: an unknown time zone
        return list(column.cast(_counted(column.type)).to_pylist())


def _counted(kind: Any) -> Any:
    """An arrow type with plain numbers in place of dates, times and durations."""
    import pyarrow as arrow

    types = arrow.types
    if types.is_date32(kind) or types.is_time32(kind):
        return arrow.int32()
    if types.is_temporal(kind) and not types.is_interval(kind):
        return arrow.int64()
    if types.is_struct(kind):
        return arrow.struct([field.with_type(_counted(field.type)) for field in kind])
    if types.is_map(kind):
        return arrow.map_(_counted(kind.key_type), _counted(kind.item_type))
    if types.is_fixed_size_list(kind):
        return arrow.list_(_counted(kind.value_type), kind.list_size)
    if types.is_list(kind) or types.is_large_list(kind):
        make = arrow.list_ if types.is_list(kind) else arrow.large_list
        return make(kind.value_field.with_type(_counted(kind.value_type)))
    return _counted(kind.value_type) if types.is_dictionary(kind) else kind
