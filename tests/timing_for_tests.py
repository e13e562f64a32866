"""A clock driven by the durations that models declare, so that other work on the machine does not affect speeds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from qadeploy.inference.manifest import SessionSettings
from qadeploy.inference.session import OnnxModel


class Clock:
    """Seconds that advance only when told."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        for module in ("qadeploy.timing", "qadeploy.inference.tuning"):
            patch.setattr(f"{module}.time", SimpleNamespace(perf_counter=lambda: self.now))

    def take(self, seconds: float) -> None:
        self.now += seconds


class Slowed(OnnxModel):
    """A real model whose calls advance the clock by ``slow``, and whose start logits are moved."""

    def __init__(
        self,
        model: bytes,
        session: Mapping[str, Any],
        clock: Clock,
        slow: Callable[[Any, int], float],
        *,
        moved: float = 0.0,
        threads: int | None = None,
    ) -> None:
        super().__init__(lambda: model, device="cpu", threads=threads, settings=SessionSettings.from_manifest(session))
        self.clock, self.slow, self.moved = clock, slow, moved

    def run(self, windows: Any) -> Any:
        self.clock.take(self.slow(self._settings, len(windows)))
        return [(starts + np.float32(self.moved), ends) for starts, ends in super().run(windows)]

    def start(self, windows: Any) -> Any:
        self.clock.take(self.slow(self._settings, len(windows)))
        return super().start(windows)
