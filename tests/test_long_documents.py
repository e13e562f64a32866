"""Contexts of any length: the decoder in blocks equals a double loop, memory is bounded, and progress is reported."""

from __future__ import annotations

import asyncio
import io
import sys
import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qadeploy import Answerer
from qadeploy.cli.progress import Progress
from qadeploy.core import decoding as decoder
from qadeploy.core.decoding import WindowLogits, decode
from qadeploy.core.settings import Options, QaSettings
from qadeploy.core.windows import Encoder, EncoderConfig
from qadeploy.errors import LogitsError
from qadeploy.inference.answerer import LogitsModel
from qadeploy.records import Logits, Window
from tests.cli_for_tests import value, well
from tests.conftest import triplets
from tests.processes_for_tests import succeeded
from tests.tokenizers_for_tests import family, texts, thorough
from tests.unit.test_spans import brute_force, random_logits, rows

BASE = Path(__file__).parent.parent / "models" / "minilm-l6-qa"
QUESTION = "Who keeps the bell?"
LONG = " ".join(str(row["context"]) for row in triplets(96)) * 2
# The bounds in docs/scale.md, in bytes per character of a context: in total, and without its tokens.
ALL_IN_ALL, BESIDE_ITS_TOKENS = 200, 40
MILLION = """
import sys
from tests.test_long_documents import million_characters, tireless

def peak():
    return next(1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

text, answerer = million_characters(), tireless()
answerer.answer("Who keeps the bell?", text[:2_000])
before = peak()
answers = answerer.answer("Who keeps the bell?", text, top_k=3)
assert len(answers) == 3
print((peak() - before) / len(text))
"""


# ---------------------------------------------------------------- the decoder


@thorough
@given(text=texts(25), data=st.data())
def test_a_context_in_blocks_is_decoded_like_a_double_loop(text, data):
    kind = family(data.draw(st.sampled_from(("bert", "xlm-r")), "tokenizer"))
    question, context = kind.encoder.encode("Who?"), kind.encoder.encode(text)
    room = data.draw(st.integers(1, 16), "room")
    windows = kind.encoder.windows(
        question,
        context,
        max_seq_len=len(question) + kind.encoder.special_tokens + room,
        doc_stride=data.draw(st.integers(0, room - 1), "doc_stride"),
    )
    kept = data.draw(st.lists(st.sampled_from(windows), min_size=1, unique_by=id), "kept")  # in any order, with gaps
    starts, ends = random_logits(kept, data.draw(st.integers(0, 9999), "seed"), data.draw(st.booleans(), "ties"))
    top_k = data.draw(st.sampled_from((1, 3, 1_000)), "top_k")
    length = data.draw(st.integers(1, 20), "max_answer_len")
    allow = data.draw(st.booleans(), "allow_no_answer")
    offsets = [tuple(pair) for pair in context.offsets.tolist()]
    spans, null, null_score = brute_force(kept, starts, ends, text, offsets, offsets, length, allow)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder, "_CELLS", data.draw(st.integers(0, 60), "cells of a block"))
        options = {"top_k": top_k, "max_answer_len": length, "allow_no_answer": allow}
        found = decode(WindowLogits(kept, starts, ends, context), **options)
    assert [row[:5] for row in rows(found)] == [span[:5] for span in spans[:top_k]]
    assert [s.score for s in found.spans] == pytest.approx([span[5] for span in spans[:top_k]], rel=1e-6, abs=1e-12)
    assert (found.null_logit, found.null_score) == (null, pytest.approx(null_score, rel=1e-6))


def long_context(size: int = 5_000) -> WindowLogits:
    """A context of several blocks at the real size of a block, with random logits."""
    kind = family("bert")
    context = kind.encoder.encode("the river and the bridge " * (size // 5))
    windows = kind.encoder.windows(kind.encoder.encode("Who?"), context)
    return WindowLogits(windows, *random_logits(windows, 5, False), context)


@pytest.mark.parametrize(("top_k", "temperature"), [(1, 1.0), (5, 0.4), (40, 3.0)])
def test_blocks_give_the_answers_and_scores_of_the_whole_table(top_k, temperature, monkeypatch):
    one = long_context()
    assert sum(w.context_length for w in one.windows) * 30 > 2 * decoder._CELLS
    options = {"top_k": top_k, "temperature": temperature, "allow_no_answer": True}
    blocks = decode(one, **options)
    monkeypatch.setattr(decoder, "_CELLS", 2**40)
    whole = decode(one, **options)
    assert [row[:5] for row in rows(blocks)] == [row[:5] for row in rows(whole)]
    np.testing.assert_allclose([s.score for s in blocks.spans], [s.score for s in whole.spans], rtol=1e-12)
    assert blocks.null_score == pytest.approx(whole.null_score, rel=1e-12)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_logit_that_is_not_finite_is_an_error_in_any_block(bad):
    one = long_context()
    one.end_logits[-1][0] = bad  # of a special token
    with pytest.raises(LogitsError, match="NaN or infinite"):
        decode(one)


# ---------------------------------------------------------------- memory


class Tireless(LogitsModel):
    """A model that returns random logits at once, so that only the cost of the code around the model is measured."""

    threads, device = 1, "cpu"

    def run(self, windows: list[Window]) -> list[Logits]:
        random = np.random.default_rng(1)
        return [(random.random(len(w), np.float32), random.random(len(w), np.float32)) for w in windows]


def tireless() -> Answerer:
    """The shipped model's tokenizer with a model that costs nothing."""
    encoder = Encoder.from_file(BASE / "tokenizer.json", EncoderConfig(2, False, 101, 0, 512))
    return Answerer(encoder, QaSettings(), Tireless())


def million_characters() -> str:
    """A million characters of plain English, no sentence like another."""
    sentences = (
        f"In the year {1000 + n}, the keeper of house number {n} sold {3 * n} lamps to the crew of the ship at the quay. "
        for n in range(20_000)
    )
    return "".join(sentences)[:1_000_000]


def test_a_million_characters_take_no_more_memory_than_promised():
    result = succeeded([sys.executable, "-c", MILLION])
    assert 0 < float(result.stdout) < ALL_IN_ALL


def test_windows_logits_and_spans_take_little_beside_the_tokens():
    text, answerer = million_characters(), tireless()
    answerer.encode(QUESTION, text, Options())  # from here on the tokens are cached
    tracemalloc.start()
    answerer.answer(QUESTION, text, top_k=3)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < BESIDE_ITS_TOKENS * len(text)


# ---------------------------------------------------------------- how far it is


def test_it_is_told_how_many_windows_are_done(answerer):
    told: list[tuple[int, int]] = []
    found = answerer.answer(QUESTION, LONG, top_k=2, on_windows=lambda done, of: told.append((done, of)))
    total = len(answerer.encode(QUESTION, LONG, Options()).windows)
    assert total > 16
    assert told == [(done, total) for done in (*range(0, total, 8), total)]
    expected = answerer.answer(QUESTION, LONG, top_k=2)
    assert [(a.text, a.start) for a in found] == [(a.text, a.start) for a in expected]
    assert [a.score for a in found] == pytest.approx([a.score for a in expected], rel=1e-6)


def test_with_a_prefilter_the_windows_read_are_counted(answerer):
    told = []
    answerer.answer(QUESTION, LONG, prefilter=3, on_windows=lambda done, of: told.append((done, of)))
    assert told == [(0, 3), (3, 3)]


def test_a_coroutine_is_told_from_a_thread(answerer):
    told = []
    found = asyncio.run(
        answerer.aanswer(QUESTION, LONG, on_windows=lambda *count: told.append((*count, threading.get_ident())))
    )
    assert [a.text for a in found] == [a.text for a in answerer.answer(QUESTION, LONG)]
    assert told[0][0] == 0
    assert told[-1][0] == told[-1][1] > 16
    assert threading.get_ident() not in {thread for _, _, thread in told}


def test_what_the_listener_raises_ends_the_call(answerer):
    told = []

    def stop(done: int, of: int) -> None:
        told.append(done)
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        answerer.answer(QUESTION, LONG, on_windows=stop)
    assert told == [0, 8]


def test_ask_shows_it_on_a_terminal_alone(bundle, tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    (tmp_path / "long.txt").write_text(LONG)
    command = ("ask", bundle, "--question", QUESTION, "--context", f"@{tmp_path / 'long.txt'}", "--json", "--top-k", 3)
    result = well(*command)
    assert (result.stderr, len(value(result)["answers"])) == ("", 3)

    terminal = Terminal()
    monkeypatch.setattr("qadeploy.cli.answering.Progress", lambda as_json: Progress(as_json, terminal))
    assert value(well(*command))["answers"] == value(result)["answers"]
    shown = terminal.getvalue()
    total = len(Answerer.load(bundle, device="cpu").encode(QUESTION, LONG, Options()).windows)
    assert f"[--------------------] 0/{total} windows read" in shown
    assert f"[{'#' * 20}] {total}/{total} windows read" in shown
    assert shown.endswith("\r\x1b[K")
