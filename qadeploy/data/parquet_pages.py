"""What the pages of a parquet file unpack to, read from their headers, which also decide how much memory pyarrow takes for them.

The sizes in the file's footer decide nothing, so a bomb may state any. pyarrow shows no page headers, and ends the process on some
damaged footers when it is asked for a column's size. So both are read here: they are structs in Thrift's compact protocol
(parquet-format, ``parquet.thrift``).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

_LEVELS = 8  # bytes per value for its levels and its place, at least
_FOOTER = struct.Struct("<I4s")
# Of parquet.thrift, by their numbers.
_ROW_GROUPS, _COLUMNS, _COLUMN = 4, 1, 3
_NUM_VALUES, _COMPRESSED, _DATA_PAGE, _DICTIONARY_PAGE = 5, 7, 9, 11
_PAGE_UNPACKED, _PAGE_PACKED, _PAGE_KINDS = 2, 3, (5, 7, 8)


def unpacked(content: bytes) -> Iterator[int]:
    """Yields the bytes that each page takes at least.

    Args:
        content: A parquet file.

    Raises:
        ValueError: The footer or a header cannot be read.
    """
    data = memoryview(content)
    try:
        size, _ = _FOOTER.unpack_from(data, len(data) - _FOOTER.size)
        footer, _ = _Thrift(data, len(data) - _FOOTER.size - size).fields()
        chunks = [c[_COLUMN] for group in footer[_ROW_GROUPS] for c in group[_COLUMNS]]
        for chunk in chunks:
            yield from _pages(data, chunk)
    except (LookupError, TypeError, AttributeError, struct.error, RecursionError) as error:
        raise ValueError("its footer or the header of a page is damaged") from error


def _pages(data: memoryview, chunk: dict[int, Any]) -> Iterator[int]:
    at = min(chunk[_DATA_PAGE], chunk.get(_DICTIONARY_PAGE) or chunk[_DATA_PAGE])
    end, values = at + chunk[_COMPRESSED], 0
    while at < end and values < chunk[_NUM_VALUES]:
        header, at = _Thrift(data, at).fields()
        kind = next((number for number in _PAGE_KINDS if number in header), None)
        count = header[kind][1] if kind else 0
        values += 0 if kind == _PAGE_KINDS[1] else count  # a dictionary's are no values of the column
        if min(header[_PAGE_UNPACKED], header[_PAGE_PACKED], count) < 0:
            raise LookupError
        yield header[_PAGE_UNPACKED] + _LEVELS * count
        at += header[_PAGE_PACKED]


class _Thrift:
    """Reads structs from a place on; a struct is its fields by number."""

    def __init__(self, data: memoryview, at: int) -> None:
        if at < 0:
            raise LookupError
        self._data, self._at = data, at

    def fields(self) -> tuple[dict[int, Any], int]:
        """The fields of the struct here, and where it ends."""
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
        if kind in {7, 8}:  # a double, a text: no size
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
        raise LookupError  # maps and others: parquet has none
