"""The unpacked sizes of the pages of a parquet file, read from the page headers, by which pyarrow allocates memory.

pyarrow does not rely on the sizes in the file's footer, so a decompression bomb may state any. It exposes no page headers, and
crashes on some damaged footers when it is queried for a column's size. So this module reads both: they are structs in Thrift's
compact protocol (parquet-format, ``parquet.thrift``).
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

from qadeploy.data.unpacking import Budget

_LEVELS = 8  # the least bytes per value for its levels and its position
_FOOTER = struct.Struct("<I4s")
# Field numbers in parquet.thrift.
_ROW_GROUPS, _COLUMNS, _COLUMN = 4, 1, 3
_NUM_VALUES, _COMPRESSED, _DATA_PAGE, _DICTIONARY_PAGE = 5, 7, 9, 11
_PAGE_UNPACKED, _PAGE_PACKED, _PAGE_KINDS = 2, 3, (5, 7, 8)
_BLOCK = 4096  # bytes of a file that are read at a time: headers are short, with pages between them


class _Blocks:
    """A file as a sequence of bytes, read in blocks."""

    def __init__(self, stream: BinaryIO, size: int) -> None:
        self._stream, self._size = stream, size
        self._held, self._first = b"", 0

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, at: int) -> int:
        if not self._first <= at < self._first + len(self._held):
            self._first = at - at % _BLOCK
            self._stream.seek(self._first)
            self._held = self._stream.read(_BLOCK)
        return self._held[at - self._first]


class Pages:
    """The pages of a parquet file; its length is the number of row groups.

    Args:
        stream: The file.
        size: Its size in bytes.

    Raises:
        ValueError: The footer cannot be read.
        OSError: The file cannot be read.
    """

    def __init__(self, stream: BinaryIO, size: int) -> None:
        self._data = _Blocks(stream, size)
        with _damage():
            self._groups = _row_groups(self._data)

    def __len__(self) -> int:
        return len(self._groups)

    def check(self, group: int, budget: Budget, columns: Collection[int] | None = None) -> None:
        """Counts the pages of a row group without reading them.

        Args:
            group: The index of the row group.
            budget: The bytes that the file may unpack to. A single page may unpack to as much as an unstreamed file may.
            columns: The indices of the columns that are read, None for all.

        Raises:
            InputError: The pages unpack to more.
            ValueError: The header of a page cannot be read.
            OSError: The file cannot be read.
        """
        with _damage():
            for number, chunk in enumerate(self._groups[group]):
                if columns is not None and number not in columns:
                    continue
                for size in _pages(self._data, chunk):
                    Budget(budget.name, budget.packed).take(size)
                    budget.take(size)


@contextmanager
def _damage() -> Iterator[None]:
    try:
        yield
    except (LookupError, TypeError, AttributeError, struct.error, RecursionError) as error:
        raise ValueError("its footer or the header of a page is damaged") from error


def _row_groups(data: _Blocks) -> list[list[dict[int, Any]]]:
    """The column chunks of each row group."""
    size, _ = _FOOTER.unpack(bytes(data[at] for at in range(len(data) - _FOOTER.size, len(data))))
    footer, _ = _Thrift(data, len(data) - _FOOTER.size - size).fields()
    return [[column[_COLUMN] for column in group[_COLUMNS]] for group in footer[_ROW_GROUPS]]


def _pages(data: _Blocks, chunk: dict[int, Any]) -> Iterator[int]:
    at = min(chunk[_DATA_PAGE], chunk.get(_DICTIONARY_PAGE) or chunk[_DATA_PAGE])
    end, values = at + chunk[_COMPRESSED], 0
    while at < end and values < chunk[_NUM_VALUES]:
        header, at = _Thrift(data, at).fields()
        kind = next((number for number in _PAGE_KINDS if number in header), None)
        count = header[kind][1] if kind else 0
        values += 0 if kind == _PAGE_KINDS[1] else count  # the values of a dictionary do not count for the column
        if min(header[_PAGE_UNPACKED], header[_PAGE_PACKED], count) < 0:
            raise LookupError
        yield header[_PAGE_UNPACKED] + _LEVELS * count
        at += header[_PAGE_PACKED]


class _Thrift:
    """Reads structs from a position on; a struct is a dictionary of its fields by number."""

    def __init__(self, data: _Blocks, at: int) -> None:
        if at < 0:
            raise LookupError
        self._data, self._at = data, at

    def fields(self) -> tuple[dict[int, Any], int]:
        """The fields of the struct at the current position, and where it ends."""
        found: dict[int, Any] = {}
        number = 0
        while head := self._byte():
            delta, kind = head >> 4, head & 15
            number = number + delta if delta else self._number()
            found[number] = self._value(kind)
        return found, self._at

    def _byte(self) -> int:
        self._at += 1
        return self._data[self._at - 1]

    def _varint(self) -> int:
        found = shift = 0
        while shift < 70:
            byte = self._byte()
            found |= (byte & 127) << shift
            if byte < 128:
                return found
            shift += 7
        raise LookupError

    def _number(self) -> int:
        found = self._varint()
        return (found >> 1) ^ -(found & 1)  # zigzag

    def _value(self, kind: int) -> Any:
        if kind in {1, 2}:
            return kind == 1
        if kind == 3:
            return self._byte()
        if kind in {4, 5, 6}:
            return self._number()
        if kind in {7, 8}:  # a double or a text: skipped
            length = 8 if kind == 7 else self._varint()
            self._at += length
            return None
        if kind in {9, 10}:
            head = self._byte()
            count, of = head >> 4, head & 15
            count = self._varint() if count == 15 else count
            return [self._byte() if of in {1, 2} else self._value(of) for _ in range(count)]
        if kind == 12:
            return self.fields()[0]
        raise LookupError  # parquet does not use maps or other types
