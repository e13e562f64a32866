"""How much a compressed file may unpack to: a megabyte of gzip can hold a gigabyte, a megabyte of parquet far more."""

from __future__ import annotations

import gzip
import io
import os
from dataclasses import dataclass

from qadeploy.errors import InputError

LIMIT = "QADEPLOY_MAX_UNPACKED_BYTES"
RATIO = 200  # four published data sets as JSON compress to 10 to 25 %; rows that repeat long contexts to less
FREE = 2**28  # bytes that are allowed at any ratio
MOST = 2**32  # bytes
_CHUNK = 2**20


@dataclass(slots=True)
class Budget:
    """The bytes that a file may unpack to.

    Attributes:
        name: The name of the file, for errors.
        packed: Its size in bytes.
        taken: The bytes unpacked so far.
        streamed: Whether only a part of it is in memory at a time, so that ``MOST`` does not limit the whole.
    """

    name: str
    packed: int
    taken: int = 0
    streamed: bool = False

    @property
    def limit(self) -> int:
        """``$QADEPLOY_MAX_UNPACKED_BYTES``, or ``RATIO`` times the packed size, from ``FREE`` to (unless streamed) ``MOST``."""
        given = os.environ.get(LIMIT)
        if given is None:
            limit = max(RATIO * self.packed, FREE)
            return limit if self.streamed else min(limit, MOST)
        if not (given.isascii() and given.isdecimal() and len(given) < 20 and int(given)):
            raise InputError(f"{LIMIT} must be a whole number of bytes from 1, not {given!r}")
        return int(given)

    def take(self, count: int) -> None:
        """Counts unpacked bytes.

        Args:
            count: The number of further bytes.

        Raises:
            InputError: The total exceeds ``limit``.
        """
        self.taken += count
        if self.taken > self.limit:
            raise InputError(
                f"{self.name}: its {self.packed:,} bytes unpack to more than {self.limit:,}, so it may be a decompression "
                f"bomb. If you trust it, set {LIMIT} to a larger number of bytes, or split it into smaller files"
            )


def gunzip(content: bytes, name: str) -> bytes:
    """Unpacks gzip.

    Args:
        content: The packed bytes.
        name: The name of the file, for errors.

    Raises:
        InputError: The content unpacks to more than a ``Budget`` allows.
        EOFError: The content is truncated. Other damage raises zlib.error or gzip.BadGzipFile.
    """
    budget = Budget(name, len(content))
    parts: list[bytes] = []
    with gzip.GzipFile(fileobj=io.BytesIO(content)) as stream:
        while part := stream.read(_CHUNK):
            budget.take(len(part))
            parts.append(part)
    return b"".join(parts)
