"""The asyncio face of the answerer: threads of its own tokenise, run and decode, so that no event loop waits.

What is asked is bounded by the number of threads, not by that of the callers: the others wait in a queue that
holds their texts and nothing more. Nothing here belongs to an event loop, so any number of them may share it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import TypeVar

from qadeploy.inference.session import Logits, Pending
from qadeploy.records import Answer, Window

Value = TypeVar("Value")
Run = Callable[[Sequence[Window]], list[Logits]]
Start = Callable[[Sequence[Window]], Pending]
# Windows taken at once, a thread of the model: between two takings a cancelled call ends, and others have their turn.
_TAKEN_A_THREAD = 8


class Aside:
    """Threads that answer for coroutines, made when first needed; a forked child makes its own.

    ``threads`` are those of the model. Twice as many work here, so that some tokenise and decode
    while the model is busy with the windows of the others.
    """

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._clear()

    def _clear(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None
        self._waiting = 0

    async def ask(self, work: Callable[[Run], Value], run: Run, start: Start) -> Value:
        """What ``work`` returns or raises; it runs in a thread, and is given the function that runs windows.

        That is made of a model's two: ``run``, as soon as can be, where no other call waits, else ``start``, side by side.
        Cancelled, it does not begin, or ends before the next windows.
        """
        left = threading.Event()

        def step(windows: Sequence[Window]) -> list[Logits]:
            logits: list[Logits] = []
            size = _TAKEN_A_THREAD * self._threads
            for first in range(0, len(windows), size):
                if left.is_set():
                    raise CancelledError
                part = windows[first : first + size]
                logits += run(part) if self._waiting == 1 else start(part).result()
            return logits

        self._count(1)
        try:
            return await asyncio.wrap_future(self._submit(lambda: work(step)))
        finally:
            left.set()
            self._count(-1)

    async def stream(self, items: Iterator[list[Answer]]) -> AsyncGenerator[list[Answer], None]:
        """The items of an iterator whose steps take long, each step in a thread. Left early, the iterator is closed."""
        stepping = threading.Lock()  # a step that was cancelled may still be under way when the iterator is closed

        def step() -> list[Answer] | None:
            with stepping:
                return next(items, None)

        def close() -> None:
            with stepping:
                getattr(items, "close", lambda: None)()

        self._count(1)
        try:
            while (item := await asyncio.wrap_future(self._submit(step))) is not None:
                yield item
        finally:
            self._count(-1)
            with contextlib.suppress(RuntimeError):  # no thread can begin any more: the interpreter ends
                self._submit(close)

    def _count(self, change: int) -> None:
        with self._mine():
            self._waiting = max(0, self._waiting + change)  # a forked child leaves calls that it did not begin

    def _submit(self, work: Callable[[], Value]) -> Future[Value]:
        with self._mine():
            if self._pool is None:
                self._pool = ThreadPoolExecutor(2 * self._threads, thread_name_prefix="qadeploy-aside")
            return self._pool.submit(work)

    def _mine(self) -> threading.Lock:
        if self._pid != os.getpid():  # the parent's threads are not here, and one may have held the lock
            self._clear()
        return self._lock
