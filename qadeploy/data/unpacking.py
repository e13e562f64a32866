"""How much a packed file may unpack to: a megabyte of gzip can hold a gigabyte, one of parquet far more."""

from __future__ import annotations

import gzip
import io
import os
from dataclasses import dataclass

from qadeploy.errors import InputError

LIMIT = "QADEPLOY_MAX_UNPACKED_BYTES"
RATIO = 200  # four published sets as JSON pack to a tenth to a quarter; rows that repeat long contexts to less
FREE = 2**28  # of any ratio
MOST = 2**32
_CHUNK = 2**20


@dataclass(slots=True)
class Budget:
    """The bytes that a file may still unpack to.

    Attributes:
        name: The file, for errors.
        packed: Its size in bytes.
        taken: What was unpacked so far.
        streamed: Whether no more than a part of it is held at a time, so that ``MOST`` does not bound the whole.
    """

    name: str
    packed: int
    taken: int = 0
    streamed: bool = False

    @property
    def limit(self) -> int:
        """``$QADEPLOY_MAX_UNPACKED_BYTES``, else ``RATIO`` times the packed size, at least ``FREE``, and at most ``MOST`` unless streamed."""
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
            count: How many more.

        Raises:
            InputError: They are more than ``limit``.
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
        name: The file, for errors.

    Raises:
        InputError: It unpacks to more than a ``Budget`` allows.
        EOFError: It is cut short. Damage elsewhere raises zlib.error or gzip.BadGzipFile.
    """
    budget = Budget(name, len(content))
    parts: list[bytes] = []
    with gzip.GzipFile(fileobj=io.BytesIO(content)) as stream:
        while part := stream.read(_CHUNK):
            budget.take(len(part))
            parts.append(part)
    return b"".join(parts)
