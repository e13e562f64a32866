"""The answerer for asyncio: threads tokenise, run and decode, so that no event loop waits.

The number of threads bounds the calls in progress. Other calls wait in a queue, as plain texts. Nothing here belongs to an
event loop, so any number of event loops may share it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import TypeVar

from qadeploy.inference.session import Pending
from qadeploy.records import Answer, Logits, Window

Value = TypeVar("Value")
RunWindows = Callable[[Sequence[Window]], list[Logits]]
StartWindows = Callable[[Sequence[Window]], Pending]
# Windows per step and thread of the model: between two steps a cancelled call ends, and other calls get their turn.
_STEP_PER_THREAD = 8


class AnswerThreads:
    """Threads that answer for coroutines, started when first needed. A forked child starts its own.

    There are twice as many as the model has, so that some tokenise and decode while the model runs windows for others.

    Args:
        threads: The number of threads of the model.
    """

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._clear()

    def _clear(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None
        self._calls = 0

    async def run(self, work: Callable[[RunWindows], Value], run: RunWindows, start: StartWindows) -> Value:
        """Calls ``work`` in a thread. A cancelled call does not start, or ends before its next windows.

        Args:
            work: Called with the function that runs windows.
            run: The model's ``run``, used if this is the only call, for the least delay.
            start: The model's ``start``, used if there are several calls, so that their windows run side by side.

        Returns:
            What ``work`` returns; it raises what ``work`` raises.
        """
        left = threading.Event()

        def step(windows: Sequence[Window]) -> list[Logits]:
            logits: list[Logits] = []
            size = _STEP_PER_THREAD * self._threads
            for first in range(0, len(windows), size):
                if left.is_set():
                    raise CancelledError
                part = windows[first : first + size]
                logits += run(part) if self._calls == 1 else start(part).result()
            return logits

        self._count(1)
        try:
            return await asyncio.wrap_future(self._submit(lambda: work(step)))
        finally:
            left.set()
            self._count(-1)

    async def stream(self, items: Iterator[list[Answer]]) -> AsyncGenerator[list[Answer], None]:
        """Yields the items of a slow iterator, each step in a thread. Closing this generator early closes the iterator."""
        stepping = threading.Lock()  # a cancelled step may still be running when the iterator is closed

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
            with contextlib.suppress(RuntimeError):  # the interpreter is shutting down, and no thread can start
                self._submit(close)

    def _count(self, change: int) -> None:
        with self._own_lock():
            self._calls = max(0, self._calls + change)  # a forked child ends calls that its parent began

    def _submit(self, work: Callable[[], Value]) -> Future[Value]:
        with self._own_lock():
            if self._pool is None:
                self._pool = ThreadPoolExecutor(2 * self._threads, thread_name_prefix="qadeploy-answer")
            return self._pool.submit(work)

    def _own_lock(self) -> threading.Lock:
        """The lock of this process; a forked child starts anew."""
        if self._pid != os.getpid():  # the parent's threads do not exist here, and one may have held the lock
            self._clear()
        return self._lock
