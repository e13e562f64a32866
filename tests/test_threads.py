"""64 threads on one Answerer get the serial calls' results to the last bit, with mixed texts, options and call forms."""

from __future__ import annotations

import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Barrier
from typing import Any

import pytest

from qadeploy import Answer, Answerer
from qadeploy.core.windows import Encoder
from qadeploy.errors import QadeployError
from tests.conftest import triplets

OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"top_k": 3},
    {"top_k": 20, "max_answer_len": 4},
    {"max_seq_len": 40, "doc_stride": 8},
    {"max_seq_len": 64, "doc_stride": 20, "top_k": 2},
    {"allow_no_answer": True, "top_k": 2},
    {"align_to_words": True},
    {"max_seq_len": 40, "doc_stride": 38},  # leaves no room for new text, so it is lowered
    {"max_seq_len": 40, "doc_stride": 40},  # no question allows it: an error
)
THREADS = 2  # of the answerer
FORMS = ("answer", "answer", "answer", "batch", "stream")


@dataclass(frozen=True)
class Query:
    form: str
    pairs: tuple[tuple[str, str], ...]
    options: dict[str, Any]

    def ask(self, answerer: Answerer) -> list[list[Answer]] | str:
        """The answers to each pair, or the error as text."""
        try:
            if self.form == "answer":
                return [answerer.answer(*self.pairs[0], **self.options)]
            if self.form == "batch":
                return answerer.answer_batch(self.pairs, **self.options)
            return list(answerer.answer_stream(iter(self.pairs), **self.options))
        except QadeployError as error:
            return f"{type(error).__name__}: {error}"


@pytest.fixture(scope="module")
def queries() -> list[Query]:
    """240 distinct calls: short and long contexts, in many scripts, one empty question."""
    rows = [(str(row["question"]), str(row["context"])) for row in triplets(48)]
    texts = [
        *rows,
        ("Who keeps the kettle?", " ".join(context for _, context in rows[:24])),
        ("Who keeps the bell?", "\U0001f469\u200d\U0001f467 keeps the bell \U0001f514 in room 3. Ada keeps the rope."),
        ("Who keeps the lamp?", "\u0622\u062f\u0627 keeps the lamp. \u090f\u0926\u093e keeps the rope."),
        ("", "Ada keeps the lamp."),
    ]
    draw = random.Random(0)
    forms = [FORMS[number % len(FORMS)] for number in range(240)]
    return [
        Query(
            form, tuple(draw.choices(texts, k=1 if form == "answer" else draw.randint(1, 3))), OPTIONS[i % len(OPTIONS)]
        )
        for i, form in enumerate(forms)
    ]


def differences(answerer: Answerer, queries: Sequence[Query], serial: Sequence[Any], threads: int, each: int) -> int:
    """The number of calls from that many threads whose result differs from the serial call."""
    ready = Barrier(threads)

    def work(seed: int) -> int:
        order = random.Random(seed)
        ready.wait()
        chosen = [order.randrange(len(queries)) for _ in range(each)]
        return sum(queries[i].ask(answerer) != serial[i] for i in chosen)

    with ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(work, range(threads)))


def test_sixty_four_threads_get_what_serial_calls_get(answerer, queries):
    serial = [query.ask(answerer) for query in queries]
    assert any(isinstance(found, str) for found in serial)
    assert differences(answerer, queries, serial, 64, 25) == 0
    assert [query.ask(answerer) for query in queries] == serial


def test_a_difference_under_threads_is_found(answerer, queries, monkeypatch):
    """An encoder that forgets half of a text now and then, once the serial calls are over."""
    serial, encode, seen = [query.ask(answerer) for query in queries], Encoder.encode, 0

    def forgetful(self, text):
        nonlocal seen
        seen += 1
        return encode(self, text[: len(text) // 2] if seen % 7 == 0 else text)

    monkeypatch.setattr(Encoder, "encode", forgetful)
    assert differences(answerer, queries, serial, 4, 300) > 0
