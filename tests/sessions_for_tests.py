"""ONNX Runtime sessions that a test watches: every run is recorded, and held or broken if the test says so."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime
import pytest


@dataclass(frozen=True, eq=False)
class Run:
    """A run that has begun.

    Attributes:
        threads: The threads of its session.
        inputs: Its inputs by name.
        shrinks: Whether the session gives back the memory of its arena afterwards.
    """

    threads: int
    inputs: dict[str, Any]
    shrinks: bool


class Sessions:
    """Stands in for ``onnxruntime.InferenceSession``: watches the sessions that are created from now on.

    Attributes:
        created: The sessions.
        begun: Their runs.
        broken: Whether runs return NaN.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.created: list[onnxruntime.InferenceSession] = []
        self.begun: list[Run] = []
        self.broken = False
        self._gate = threading.Event()
        self._gate.set()
        watch = self

        class Watched(onnxruntime.InferenceSession):
            def __init__(self, *given: Any, **more: Any) -> None:
                super().__init__(*given, **more)
                watch.created.append(self)

            def run(self, output_names: Any, input_feed: dict[str, Any], run_options: Any = None) -> Sequence[Any]:
                watch.begin(self, input_feed, run_options)
                found = super().run(output_names, input_feed, run_options)
                return [np.full_like(logits, np.nan) for logits in found] if watch.broken else found

        monkeypatch.setattr(onnxruntime, "InferenceSession", Watched)

    def hold(self) -> None:
        """Runs that begin from now on wait for ``release``; ``begun`` is emptied."""
        self.begun.clear()
        self._gate.clear()

    def release(self) -> None:
        """Lets the held runs continue."""
        self._gate.set()

    def shrink_after(self, call: Callable[[], object]) -> bool:
        """Whether sessions give back memory after a call, which they do after a large one if no other call is running."""
        self.begun.clear()
        call()
        return any(run.shrinks for run in self.begun)

    def begin(self, session: Any, inputs: dict[str, Any], options: Any) -> None:
        """Notes a run, and holds it if the test says so."""
        shrinks = options is not None and bool(options.get_run_config_entry("memory.enable_memory_arena_shrinkage"))
        self.begun.append(Run(session.get_session_options().intra_op_num_threads, inputs, shrinks))
        assert self._gate.wait(30), "nobody released the run"


def until(condition: Callable[[], object], seconds: float = 20) -> None:
    """Waits until a condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"this did not happen within {seconds} seconds"
        time.sleep(0.01)
