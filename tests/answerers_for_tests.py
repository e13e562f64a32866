"""Answerers that fail on certain rows, for the engines' workers, which import this module."""

from __future__ import annotations

import ctypes
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qadeploy import Answerer

EXIT, SEGFAULT, RAISE, BREAK, NAN = "Who exits?", "Who faults?", "Who raises?", "Who breaks?", "Who is no number?"


class Poisoned(Answerer):
    """Ends its process on ``EXIT`` and ``SEGFAULT``, raises on ``RAISE``, and answers nothing after ``BREAK``."""

    broken = False
    seconds = 0.0

    def _encode(self, question: str, *rest: Any, **more: Any) -> Any:
        time.sleep(self.seconds)
        if question == EXIT:
            os._exit(3)
        if question == SEGFAULT:
            ctypes.string_at(0)  # Ray's handlers survive a signal that is only sent
        if question == RAISE:
            raise RuntimeError("no kernel\nfor this")
        self.broken |= question == BREAK
        if self.broken:
            raise RuntimeError("illegal memory access")
        return super()._encode(question, *rest, **more)


@dataclass(frozen=True)
class PoisonedLoad:
    """Loads a bundle as ``Poisoned``, on one thread; each row takes ``seconds`` longer. Records each load's pid in ``pids``."""

    path: str
    pids: str = ""
    seconds: float = 0.0

    def __call__(self) -> Answerer:
        loaded = Answerer.load(self.path, device="cpu", threads=1)
        answerer = Poisoned(loaded.encoder, loaded.settings, loaded.model, loaded.bundle)
        answerer.seconds = self.seconds
        if self.pids:
            (Path(self.pids) / str(os.getpid())).touch()
        return answerer
