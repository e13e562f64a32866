"""BM25 over windows: equal to a library's and to the formula, and the answers from the windows that it keeps."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from dataclasses import replace
from math import log
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qadeploy import Answerer
from qadeploy.core.bm25 import rank_parts
from qadeploy.core.decoding import WindowLogits, decode
from qadeploy.core.settings import Options
from qadeploy.core.windows import Cut
from qadeploy.data.loading import read
from qadeploy.errors import InputError, TooManyWindowsError
from qadeploy.evaluation.scoring import evaluate
from qadeploy.inference.trace import trace_dict, trace_lines
from tests.cli_for_tests import run, value, well
from tests.conftest import NAMES, THINGS, write_jsonl
from tests.tokenizers_for_tests import thorough

# Each sentence names its thing, and no other sentence does, so that a lexical score can find it.
ROOMS = [f"{NAMES[i % 12]} keeps the {thing} in room {i}." for i, thing in enumerate(THINGS)]
FILL = " The hall is quiet." * 30
LONG = FILL.join(ROOMS) + FILL
QUESTION = f"Who keeps the {THINGS[4]}?"


# ---------------------------------------------------------------- scores


def test_the_scores_are_those_of_bm25s():
    # bm25s 0.3.16, BM25(method="lucene", k1=1.2, b=0.75), which leaves the constant factor k1 + 1 = 2.2 out.
    ids = np.asarray([(i * i + 5 * (i // 9)) % 41 for i in range(400)])
    golden = [1.69338, 2.04062, 2.13018, 1.57702, 1.00449, 2.50946, 1.17799, 1.44997, 1.40243, 1.85279]
    found = rank_parts(np.asarray([3, 1, 7, 17, 40, 30, 99]), ids, *Cut(range(0, 380, 40), 60, 400, 20).parts(), 3)
    assert found.scores == pytest.approx(golden, abs=2e-5)
    assert found.chosen.tolist() == sorted(np.argsort(golden)[-3:])


def by_formula(question: list[int], windows: list[list[int]]) -> list[float]:
    """Robertson and Zaragoza's formula as published, one window and one token at a time."""
    counts = [Counter(window) for window in windows]
    mean = sum(map(len, windows)) / len(windows)
    scores = []
    for window, found in zip(windows, counts, strict=True):
        score = 0.0
        for token in set(question):
            holding = sum(token in other for other in counts)
            idf = log(1 + (len(windows) - holding + 0.5) / (holding + 0.5))
            tf = found[token]
            score += idf * tf * 2.2 / (tf + 1.2 * (0.25 + 0.75 * len(window) / mean))
        scores.append(score)
    return scores


@thorough
@given(data=st.data())
def test_ranks_equal_the_formula(data):
    tokens = st.integers(0, 12)
    context = data.draw(st.lists(tokens, min_size=1, max_size=60), "context")
    question = data.draw(st.lists(tokens, max_size=6), "question")
    room = data.draw(st.integers(1, 20), "room")
    overlap = data.draw(st.integers(0, room - 1), "overlap")
    count = data.draw(st.integers(1, 8), "count")
    begins = range(0, len(context) - overlap, room - overlap) if len(context) > room else range(1)
    parts = Cut(begins, room, len(context), overlap).parts()
    found = rank_parts(np.asarray(question, dtype=np.int64), np.asarray(context), *parts, count)
    expected = by_formula(question, [context[b : b + room] for b in begins])
    np.testing.assert_allclose(found.scores, expected, rtol=1e-12)
    order = sorted(range(len(begins)), key=lambda i: (-found.scores[i], i))  # ties by place
    assert found.chosen.tolist() == sorted(order[:count])


# ---------------------------------------------------------------- spans of several windows


def test_the_weight_moves_the_spans_of_each_window_by_its_score(answerer):
    pair = answerer.encode(QUESTION, LONG, Options())
    logits = answerer.model.run(pair.windows)
    stored = answerer.settings
    cut = answerer.encoder.cut(
        pair.question, pair.context, max_seq_len=stored.max_seq_len, doc_stride=stored.doc_stride
    )
    scores = rank_parts(pair.question.ids, pair.context.ids, *cut.parts(), 1).scores
    assert len(scores) == len(pair.windows) > 5

    def scored(weight: float, count: int = len(pair.windows)) -> WindowLogits:
        starts, ends = zip(*logits[:count], strict=True)
        settings = replace(stored, bm25_weight=weight)
        return settings.window_logits(pair.windows[:count], starts, ends, pair.context)

    plain, weighed = scored(0.0), scored(0.6)
    for name in ("start_logits", "end_logits"):
        for window, score, before, after in zip(
            pair.windows, scores, getattr(plain, name), getattr(weighed, name), strict=True
        ):
            moved = np.zeros(len(window))
            moved[window.context_begin : window.context_begin + window.context_length] = 0.3 * (score - max(scores))
            np.testing.assert_allclose(after[: len(window)] - before[: len(window)], moved, atol=1e-5)
    assert weighed.null_logit == plain.null_logit
    # A single window competes with no other.
    np.testing.assert_array_equal(scored(0.6, 1).start_logits[0], plain.start_logits[0])


def test_a_window_that_shares_words_wins_from_one_that_does_not(answerer, monkeypatch):
    def best(weight: float) -> str:
        monkeypatch.setattr(answerer, "settings", replace(answerer.settings, bm25_weight=weight))
        passages = [f"{name} keeps the {thing}." for name, thing in zip(NAMES, THINGS, strict=False)]
        return passages[answerer.answer(QUESTION, contexts=passages)[0].passage]

    assert THINGS[4] in best(1_000.0)
    assert THINGS[4] not in best(0.0)  # by the logits of the tiny model alone


# ---------------------------------------------------------------- answers


def test_the_answers_are_those_of_the_best_windows_alone(answerer):
    options = Options(top_k=5, prefilter=2, allow_no_answer=True)
    whole, part = answerer.read(QUESTION, LONG, Options()), answerer.read(QUESTION, LONG, options)
    assert len(whole.windows) > 5
    assert whole.ranking is None
    chosen = part.ranking.chosen
    assert len(part.ranking.scores) == len(whole.windows)
    assert [w.context_offset for w in part.windows] == [whole.windows[i].context_offset for i in chosen]
    first = LONG.index(THINGS[4])  # the only place that names the question's thing, in one window or in two
    held = [i for i, w in enumerate(whole.windows) if _holds(whole, w, first)]
    assert set(held) <= set(chosen.tolist())

    windows = [whole.windows[i] for i in chosen]
    starts, ends = zip(*(whole.logits[i] for i in chosen), strict=True)
    alone = decode(
        WindowLogits(windows, starts, ends, whole.context),
        top_k=5,
        allow_no_answer=True,
        max_answer_len=whole.settings.max_answer_len,
        temperature=whole.settings.temperature,
    )
    assert [(s.start, s.end) for s in part.decoded.spans] == [(s.start, s.end) for s in alone.spans]
    assert part.decoded.null_score == pytest.approx(alone.null_score, rel=1e-5)
    assert [s.score for s in part.decoded.spans] == pytest.approx([s.score for s in alone.spans], rel=1e-5)


def _holds(reading, window, place: int) -> bool:
    token = reading.context.tokens_of(place, place + 1)[0]
    return window.context_offset <= token < window.context_offset + window.context_length


async def every_form(answerer: Answerer, **options) -> list:
    pairs = [(QUESTION, LONG), ("Who keeps the bell?", LONG)]
    return [
        [answerer.answer(*pair, **options) for pair in pairs],
        answerer.answer_batch(pairs, **options),
        list(answerer.answer_stream(pairs, **options)),
        [await answerer.aanswer(*pair, **options) for pair in pairs],
        await answerer.aanswer_batch(pairs, **options),
        [found async for found in answerer.aanswer_stream(pairs, **options)],
    ]


def test_every_call_form_takes_it(answerer):
    first, *others = asyncio.run(every_form(answerer, prefilter=1, top_k=2))
    for form in others:
        assert [[(a.text, a.start) for a in answers] for answers in form] == [
            [(a.text, a.start) for a in answers] for answers in first
        ]
    assert first != [answerer.answer(q, LONG, top_k=2) for q in (QUESTION, "Who keeps the bell?")]


def test_nothing_changes_where_there_are_no_more_windows(answerer):
    windows = len(answerer.encode(QUESTION, LONG, Options()).windows)
    for count in (windows, windows + 1, 10**9):
        assert answerer.encode(QUESTION, LONG, Options(prefilter=count)).ranking is None
        assert answerer.answer(QUESTION, LONG, prefilter=count) == answerer.answer(QUESTION, LONG)
    assert answerer.encode(QUESTION, LONG, Options(prefilter=windows - 1)).ranking is not None
    assert answerer.answer(QUESTION, ROOMS[4], prefilter=1) == answerer.answer(QUESTION, ROOMS[4])


def test_without_a_word_in_common_the_first_windows_are_read_and_the_trace_says_so(answerer):
    question = "\u8c01"
    reading = answerer.read(question, LONG, Options(prefilter=2))
    assert not reading.ranking.scores.any()
    assert reading.ranking.chosen.tolist() == [0, 1]
    said = "\n".join(trace_lines(answerer, reading, Options(prefilter=2)))
    assert "no token of the question occurs in the context, so these are the first" in said


def test_the_trace_shows_what_was_left_out(answerer):
    options = Options(prefilter=2)
    reading = answerer.read(QUESTION, LONG, options)
    numbers = (reading.ranking.chosen + 1).tolist()
    total = len(reading.ranking.scores)
    said = "\n".join(trace_lines(answerer, reading, options))
    assert f"prefilter: of {total} windows the 2 best by BM25 are read, {numbers[0]} (" in said
    assert f"; {total - 2} are left out, the best of them with score " in said
    assert "no token of the question" not in said
    shown = trace_dict(answerer, reading, options)
    assert shown["prefilter"]["read"] == numbers
    assert shown["prefilter"]["scores"] == pytest.approx(reading.ranking.scores.tolist(), abs=1e-4)
    assert len(shown["windows"]) == 2
    longest = max(len(window) for window in reading.windows)
    assert f", 2 windows of at most {longest} tokens, overlap " in said
    assert trace_dict(answerer, answerer.read(QUESTION, LONG, Options()), Options())["prefilter"] is None


def test_the_limit_on_windows_is_on_those_that_are_read(answerer):
    assert len(answerer.encode(QUESTION, LONG, Options(prefilter=2), max_windows=2).windows) == 2
    with pytest.raises(
        TooManyWindowsError, match=r"prefilter reads 3 of \d+ windows, but at most 2 are allowed: lower prefilter"
    ):
        answerer.encode(QUESTION, LONG, Options(prefilter=3), max_windows=2)


@pytest.mark.parametrize("count", [0, -1, True, 2.0, "3"])
def test_what_is_no_number_of_windows_is_an_error(answerer, count):
    with pytest.raises(InputError, match=r"prefilter must be a whole number from 1, not "):
        answerer.answer(QUESTION, LONG, prefilter=count)


# ---------------------------------------------------------------- commands


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    rows = [
        {
            "context": LONG,
            "question": f"Who keeps the {thing}?",
            "answer": NAMES[i % 12],
            "answer_start": LONG.index(room),
        }
        for i, (thing, room) in enumerate(zip(THINGS, ROOMS, strict=True))
    ]
    return write_jsonl(tmp_path / "long.jsonl", rows)


def test_evaluate_scores_with_it(answerer, questions, bundle, tmp_path):
    examples = read(str(questions)).examples
    expected = [answerer.answer(e.question, e.context, prefilter=1)[0].text for e in examples]
    assert [a.text for a in evaluate(answerer, examples, prefilter=1).answers] == expected
    assert [a.text for a in evaluate(answerer, examples, prefilter=1, n_best_size=3).answers] == expected
    assert [a.text for a in evaluate(answerer, examples).answers] != expected

    out = tmp_path / "predictions.json"
    command = ("evaluate", bundle, "--data", questions, "--predictions", out)
    assert value(well(*command, "--prefilter", "1", "--json"))["prefilter"] == 1
    assert sorted(json_values(out)) == sorted(expected)
    assert "at most 1 windows of a context are read, the best by BM25" in well(*command[:-2], "--prefilter", "1").stdout
    out.unlink()  # no file is overwritten
    assert value(well(*command, "--json"))["prefilter"] is None


def json_values(path: Path) -> list[str]:
    return list(json.loads(path.read_text()).values())


def test_ask_takes_it(answerer, bundle, tmp_path):
    (tmp_path / "long.txt").write_text(LONG)
    command = ("ask", bundle, "--question", QUESTION, "--context", f"@{tmp_path / 'long.txt'}", "--json", "--trace")
    found = value(well(*command, "--prefilter", "1", "--top-k", "1"))
    assert found["answers"][0]["text"] == answerer.answer(QUESTION, LONG, prefilter=1)[0].text
    assert len(found["trace"]["windows"]) == len(found["trace"]["prefilter"]["read"]) == 1


def test_a_filter_of_no_windows_is_refused_by_the_flag(bundle):
    for command in (["ask", "--question", "q", "--context", "c"], ["evaluate", "--data", "d"]):
        result = run(command[0], bundle, *command[1:], "--prefilter", "0")
        assert result.exit_code == 2
        assert "Invalid value for '--prefilter'" in result.stderr
