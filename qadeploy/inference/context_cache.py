"""Tokenised contexts, kept for further questions in bounded memory."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from qadeploy.core.encoded_text import EncodedText
from qadeploy.errors import InputError

DEFAULT_CACHE_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True)
class CacheStats:
    """The counters of a context cache.

    Attributes:
        hits: Contexts that were found in the cache.
        misses: Contexts that were tokenised.
        entries: Contexts in the cache now.
        bytes: Memory of the contexts in the cache.
    """

    hits: int
    misses: int
    entries: int
    bytes: int


@dataclass(slots=True)
class _Entry:
    """A context, or a place for one that the thread that holds ``lock`` is tokenising. ``size`` is in bytes."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    encoded: EncodedText | None = None
    size: int = 0


class ContextCache:
    """The most recently used contexts, tokenised. Safe under threads and forks.

    If several threads ask for the same new context at once, one of them tokenises it and the others wait.

    Args:
        encode: Tokenises a text.
        limit: The largest sum of bytes. A larger context is not kept; 0 keeps none.

    Raises:
        InputError: ``limit`` is negative or not a whole number.
    """

    def __init__(self, encode: Callable[[str], EncodedText], limit: int = DEFAULT_CACHE_BYTES) -> None:
        if isinstance(limit, bool) or not isinstance(limit, int) or limit < 0:
            raise InputError(f"context_cache_bytes is {limit!r}: give a whole number of bytes, 0 to keep no context")
        self._encode = encode
        self._limit = limit
        self._clear()

    def _clear(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._bytes = self._hits = self._misses = 0

    def _own_lock(self) -> threading.Lock:
        """The lock of this process; a forked child starts anew."""
        if self._pid != os.getpid():  # a thread of the parent may have held the lock
            self._clear()
        return self._lock

    def get(self, context: str, near: dict[str, EncodedText] | None = None) -> EncodedText:
        """The tokenised context.

        Args:
            context: The context.
            near: The contexts of this call: searched first, and extended.

        Raises:
            InputError: The text cannot be tokenised.
        """
        found = None if near is None else near.get(context)
        if found is not None:
            with self._own_lock():
                self._hits += 1
            return found
        found = self._find(context) if self._limit else self._tokenise(context)
        if near is not None:
            near[context] = found
        return found

    def ahead(
        self, contexts: Sequence[str], encode_many: Callable[[Sequence[str]], list[EncodedText]]
    ) -> dict[str, EncodedText]:
        """Tokenises all ``contexts`` that are not in the cache at once, and adds them. Returns them, as ``near`` for ``get``.

        Each counts as a miss here, and as a hit when ``get`` returns it. Raises what ``encode_many`` raises.
        """
        with self._own_lock():
            kept = {context for context, entry in self._entries.items() if entry.encoded is not None}
        new = [context for context in dict.fromkeys(contexts) if context not in kept]
        found = dict(zip(new, encode_many(new), strict=True)) if new else {}
        for context, encoded in found.items():
            entry = _Entry(encoded=encoded)
            with self._own_lock():
                self._misses += 1
                if not self._limit or context in self._entries:  # another thread is tokenising it
                    continue
                self._entries[context] = entry
            self._keep(context, entry, encoded.nbytes)
        return found

    def stats(self) -> CacheStats:
        """The counters in this process."""
        with self._own_lock():
            return CacheStats(self._hits, self._misses, len(self._entries), self._bytes)

    def _find(self, context: str) -> EncodedText:
        with self._own_lock():
            entry = self._entries.setdefault(context, _Entry())
            self._entries.move_to_end(context)
        with entry.lock:
            if entry.encoded is not None:
                with self._lock:
                    self._hits += 1
                return entry.encoded
            try:
                encoded = entry.encoded = self._tokenise(context)
            except BaseException:
                self._keep(context, entry, self._limit + 1)  # drops it
                raise
            self._keep(context, entry, encoded.nbytes)
        return encoded

    def _keep(self, context: str, entry: _Entry, size: int) -> None:
        """Makes room for an entry by dropping the least recently used ones; drops the entry itself if it is too large."""
        with self._lock:
            if self._entries.get(context) is not entry:
                return  # dropped meanwhile to make room
            if size > self._limit:
                del self._entries[context]
                return
            entry.size = size
            self._bytes += size
            while self._bytes > self._limit:
                self._bytes -= self._entries.popitem(last=False)[1].size

    def _tokenise(self, context: str) -> EncodedText:
        encoded = self._encode(context)
        with self._own_lock():
            self._misses += 1
        return encoded
