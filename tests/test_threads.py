"""benchmarks/threads.py in small: 64 threads on one Answerer get what serial calls get, and it can tell if they do not."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.threads import FORMS, calls, hammer
from qadeploy import Answerer
from qadeploy.core.windows import Encoder


@pytest.fixture(scope="module")
def answerer(bundle: Path) -> Answerer:
    return Answerer.load(bundle, device="cpu", threads=2)


def test_sixty_four_threads_get_what_serial_calls_get(answerer):
    found = hammer(answerer, 64, 25)
    assert found["calls"] == found["identical"] == 1600, found["first_differences"]
    assert (found["different"], found["unexpected_errors"]) == (0, 0)
    assert found["serial_unchanged_afterwards"]
    assert found["errors_equal_to_serial_ones"] > 0
    assert set(found["forms"]) == set(FORMS)


def test_a_difference_under_threads_is_found(answerer, monkeypatch):
    """An encoder that forgets a token now and then, once the serial calls are over."""
    encode, seen = Encoder.encode, 0

    def forgetful(self, text):
        nonlocal seen
        seen += 1
        return encode(self, text[: len(text) // 2] if seen > len(serial) * 5 and seen % 7 == 0 else text)

    serial = calls()
    monkeypatch.setattr(Encoder, "encode", forgetful)
    found = hammer(answerer, 4, 300)
    assert found["different"] > 0
    assert found["identical"] + found["different"] == 1200
    assert found["first_differences"]
