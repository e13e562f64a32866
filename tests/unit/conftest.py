"""The quick tier: no test here starts a process, needs torch or a trained model."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any, NoReturn

import pytest


@pytest.fixture(autouse=True)
def light(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fails a test that starts a process or imports torch, because it belongs in ``tests/``."""

    def refuse(*args: Any, **options: Any) -> NoReturn:
        raise AssertionError("a test in tests/unit starts no process")

    before = "torch" in sys.modules
    monkeypatch.setattr(subprocess.Popen, "__init__", refuse)
    yield
    assert before or "torch" not in sys.modules, "a test in tests/unit needs no torch"
