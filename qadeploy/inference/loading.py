"""A limit on the time that loading takes: a graph can keep ONNX Runtime busy for ever, and nothing ends a thread in there."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from qadeploy.errors import InputError, LoadTimeoutError

_T = TypeVar("_T")
_running: set[threading.Thread] = set()


def within(seconds: float | None, load: Callable[[], _T], path: object) -> _T:
    """Loads in a thread of its own, which is left behind if it takes too long; with None, in this thread and without limit.

    Args:
        seconds: How long it may take.
        load: What to call.
        path: What it loads, for the message.

    Raises:
        InputError: ``seconds`` is not above 0.
        LoadTimeoutError: It took longer. What ``load`` raises is raised too.
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
    try:
        return done.result(min(seconds, threading.TIMEOUT_MAX))
    except TimeoutError as error:
        if done.done():  # its own
            raise
        raise LoadTimeoutError(
            f"{path}: was not loaded within {seconds:g} s: raise load_timeout (--load-timeout)"
        ) from error
    finally:
        if done.done():
            _running.discard(thread)


def end_past_loading(code: int) -> None:
    """Ends the process with ``code`` if a thread is still loading: it would crash the usual end of the process."""
    if any(thread.is_alive() for thread in _running):
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):  # closed
                stream.flush()
        os._exit(code)
