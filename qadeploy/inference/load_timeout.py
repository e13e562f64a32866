"""A time limit for loading: a graph can keep ONNX Runtime busy for ever, in a thread that cannot be stopped."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

from qadeploy.errors import InputError, LoadTimeoutError

_T = TypeVar("_T")
_WAIT = 0.5  # seconds
_running: set[threading.Thread] = set()


def within(seconds: float | None, load: Callable[[], _T], path: object) -> _T:
    """Calls ``load`` in a thread of its own, which is abandoned if it takes too long. Raises what ``load`` raises.

    Args:
        seconds: How long it may take; None sets no limit and loads in this thread.
        load: The function to call.
        path: The path that it loads, for the message.

    Raises:
        InputError: ``seconds`` is not above 0.
        LoadTimeoutError: It took longer.
    """
    if seconds is None:
        return load()
    if not seconds > 0:
        raise InputError(f"load_timeout must be a number of seconds above 0, not {seconds!r}")
    done: Future[_T] = Future()

    def work() -> None:
        try:
            done.set_result(load())
        except BaseException as error:
            done.set_exception(error)

    thread = threading.Thread(target=work, name="qadeploy-load", daemon=True)
    _running.add(thread)
    thread.start()
    ends = time.monotonic() + seconds
    try:
        # In short waits: Python notices Ctrl-C late if the signal interrupts the other thread instead of this wait.
        while not done.done():
            left = ends - time.monotonic()
            if left <= 0:
                raise LoadTimeoutError(
                    f"{path}: was not loaded within {seconds:g} s: raise load_timeout (--load-timeout)"
                )
            wait([done], min(left, _WAIT))
        return done.result()
    finally:
        if done.done():
            _running.discard(thread)


def end_past_loading(code: int) -> None:
    """Ends the process with ``code`` if a thread is still loading, because it would crash a normal exit."""
    if any(thread.is_alive() for thread in _running):
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):  # closed
                stream.flush()
        os._exit(code)
