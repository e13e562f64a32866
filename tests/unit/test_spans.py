"""The decoder, compared with a plain double loop, and its documented properties."""

from __future__ import annotations

import re
from itertools import pairwise
from math import exp, inf, log
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from qadeploy.core import decoding as decoder
from qadeploy.core.decoding import Decoded, WindowLogits, rank_answers, span_table
from qadeploy.core.encoded_text import EncodedText
from qadeploy.core.scripts import UNSPACED, within_script
from qadeploy.core.windows import Encoder, EncoderConfig
from qadeploy.errors import InputError, LogitsError
from qadeploy.records import Answer, FloatArray, Window
from tests.tokenizers_for_tests import NAMES, encoder, family, texts, thorough

Logits = list[FloatArray]


def brute_force(
    windows: list[Window],
    starts: Logits,
    ends: Logits,
    text: str,
    covers: list[tuple[int, int]],
    words: list[tuple[int, int]],
    max_answer_len: int,
    allow_no_answer: bool,
) -> tuple[list[tuple[int, int, int, int, float, float]], float, float]:
    """All spans as (start, end, first token, last token, logit, score), the null logit and its score."""
    best: dict[tuple[int, int], float] = {}
    null = inf
    for window, s, e in zip(windows, starts, ends, strict=True):
        null = min(null, float(s[window.null_index] + e[window.null_index]))
        for i in range(window.context_length):
            for j in range(i, min(i + max_answer_len, window.context_length)):
                pair = (window.context_offset + i, window.context_offset + j)
                if all(text[slice(*covers[token])].strip() for token in pair):
                    logit = float(s[window.context_begin + i] + e[window.context_begin + j])
                    best[pair] = max(best.get(pair, -inf), logit)
    everything = [*best.values(), *([null] if allow_no_answer else [])]
    peak = max(everything, default=0.0)
    total = sum(exp(logit - peak) for logit in everything)

    spans: dict[tuple[int, int], tuple[int, int, int, int, float, float]] = {}
    for (first, last), logit in sorted(best.items(), key=lambda item: (-item[1], item[0])):
        piece = text[words[first][0] : words[last][1]]
        start = words[first][0] + len(piece) - len(piece.lstrip())
        span = (start, start + len(piece.strip()))
        spans.setdefault(span, (*span, first, last, logit, exp(logit - peak) / total))
    return list(spans.values()), null, exp(null - peak) / total if allow_no_answer else 0.0


def decode(windows: list[Window], starts: Logits, ends: Logits, context: EncodedText, **options: Any) -> Decoded:
    return decoder.decode(WindowLogits(windows, starts, ends, context), **options)


def random_logits(windows: list[Window], seed: int, ties: bool) -> tuple[Logits, Logits]:
    """Logits for each window, with some padding behind it; few distinct values where ``ties``."""
    rng = np.random.default_rng(seed)

    def one(window: Window) -> FloatArray:
        size = len(window) + int(rng.integers(0, 4))
        return (rng.integers(0, 3, size) if ties else rng.normal(0, 4, size)).astype(np.float32)

    return [one(w) for w in windows], [one(w) for w in windows]


def rows(decoded: Decoded) -> list[tuple[int, int, int, int, float, float]]:
    return [(s.start, s.end, s.start_token, s.end_token, s.logit, s.score) for s in decoded.spans]


def in_script(text: str, token: tuple[int, int], word: tuple[int, int]) -> tuple[int, int]:
    """A word without what a character of a script without spaces cuts off from the token, one character after the other."""

    def apart(place: int) -> bool:  # test_metrics checks which characters these are
        return re.match(rf"[{UNSPACED}\u3000-\u303f\uff00-\uff65]", text[place]) is not None

    start, end = token
    while start > word[0] and start < len(text) and not (apart(start - 1) or apart(start)):
        start -= 1
    while end < word[1] and end > 0 and not (apart(end - 1) or apart(end)):
        end += 1
    return start, end


@pytest.mark.parametrize("align_to_words", [False, True])
@pytest.mark.parametrize("name", NAMES)
@thorough
@given(text=texts(15), data=st.data())
def test_decode_equals_brute_force(name, align_to_words, text, data):
    kind = family(name)
    question, context = kind.encoder.encode("Who?"), kind.encoder.encode(text)
    room = data.draw(st.integers(1, 16), "room")
    windows = kind.encoder.windows(
        question,
        context,
        max_seq_len=len(question) + kind.encoder.special_tokens + room,
        doc_stride=data.draw(st.integers(0, room - 1), "doc_stride"),
    )
    starts, ends = random_logits(windows, data.draw(st.integers(0, 9999), "seed"), data.draw(st.booleans(), "ties"))
    top_k = data.draw(st.sampled_from((1, 3, 20, 10_000)), "top_k")
    max_answer_len = data.draw(st.integers(1, 20), "max_answer_len")
    allow = data.draw(st.booleans(), "allow_no_answer")

    encoding = kind.tokenizer.encode(text, add_special_tokens=False)
    words = [
        encoding.offsets[i]
        if word is None or not align_to_words
        else in_script(text, encoding.offsets[i], encoding.word_to_chars(word))
        for i, word in enumerate(encoding.word_ids)
    ]
    spans, null, null_score = brute_force(windows, starts, ends, text, encoding.offsets, words, max_answer_len, allow)

    options = {"max_answer_len": max_answer_len, "align_to_words": align_to_words, "allow_no_answer": allow}
    found = decode(windows, starts, ends, context, top_k=top_k, **options)
    assert [row[:5] for row in rows(found)] == [span[:5] for span in spans[:top_k]]
    assert [s.score for s in found.spans] == pytest.approx([span[5] for span in spans[:top_k]], rel=1e-4, abs=1e-12)
    assert found.null_logit == null
    assert found.null_score == pytest.approx(null_score, rel=1e-4)
    assert sum(s.score for s in found.spans) + found.null_score <= 1 + 1e-6
    for span in found.spans:
        assert text[span.start : span.end] == text[span.start : span.end].strip() != ""
    # The scores are those of the whole list, however small top_k is.
    assert rows(decode(windows, starts, ends, context, top_k=1, **options)) == rows(found)[:1]


@thorough
@given(text=texts(15), data=st.data())
def test_distinct_spans_are_the_best_that_overlap_no_better_one(text, data):
    kind = family("bert")
    question, context = kind.encoder.encode("Who?"), kind.encoder.encode(text)
    windows = kind.encoder.windows(question, context, max_seq_len=len(question) + 12, doc_stride=4)
    starts, ends = random_logits(windows, data.draw(st.integers(0, 9999), "seed"), data.draw(st.booleans(), "ties"))
    threshold = data.draw(st.sampled_from((0.0, 0.3, 0.5, 1.0)), "threshold")
    top_k = data.draw(st.sampled_from((1, 3, 50)), "top_k")
    options = {
        "align_to_words": data.draw(st.booleans(), "align"),
        "max_answer_len": data.draw(st.integers(1, 9), "length"),
    }

    kept: list[Any] = []
    for span in decode(windows, starts, ends, context, top_k=100_000, **options).spans:
        shared = [min(span.end, k.end) - max(span.start, k.start) for k in kept]
        shorter = [min(span.end - span.start, k.end - k.start) for k in kept]
        if all(both <= threshold * length for both, length in zip(shared, shorter, strict=True)):
            kept.append(span)
    cells = data.draw(st.sampled_from((1, 2**16)), "cells")  # 1: block by block, as a long context
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder, "_CELLS", cells)
        found = decode(windows, starts, ends, context, top_k=top_k, most_overlap=threshold, **options).spans
    assert [(s.start, s.end, s.logit) for s in found] == [(s.start, s.end, s.logit) for s in kept[:top_k]]
    assert [s.score for s in found] == pytest.approx([s.score for s in kept[:top_k]], rel=1e-5)


SPACED_OR_NOT = [
    ("我在Google工作，住在北京市。", "Google", "Google"),
    ("我在Google工作，住在北京市。", "北京", "北京"),
    ("東京に住んでいます。iPhoneを買った。", "Phone", "iPhone"),
    ("ผมชื่อจอห์นอยู่ที่กรุงเทพ", "กรุงเทพ", "กรุงเทพ"),
    ("서울에서 만나요", "서울", "서울에서"),
    ("Mungo Strand's lamp", "Strand", "Strand's"),
]


@pytest.mark.parametrize(("text", "answer", "aligned"), SPACED_OR_NOT)
def test_words_are_whole_in_scripts_with_spaces_and_answers_stay_short_in_others(text, answer, aligned):
    offsets = np.asarray([(i, i + 1) for i in range(len(text))])
    # The words of a SentencePiece tokenizer: everything between two spaces.
    borders = [0, *(i + 1 for i, c in enumerate(text) if c == " "), len(text) + 1]
    words = np.asarray([next((a, b - 1) for a, b in pairwise(borders) if i < b) for i in range(len(text))])
    found = within_script(text, offsets, words)
    start = text.index(answer)
    assert text[found[start, 0] : found[start + len(answer) - 1, 1]] == aligned


def table_of_one_window_after_another(
    windows: list[Window], starts: Logits, ends: Logits, context: EncodedText, max_answer_len: int
) -> FloatArray:
    """The span table as it is defined: a loop over windows, tokens and lengths."""
    lengths = min(max_answer_len, max(w.context_length for w in windows) or 1)
    table = np.full((len(context), lengths), -inf, dtype=np.float32)
    for window, s, e in zip(windows, starts, ends, strict=True):
        for i in range(window.context_length):
            for k in range(min(lengths, window.context_length - i)):
                first = window.context_offset + i
                if not (context.blank[first] or context.blank[first + k]):
                    logit = s[window.context_begin + i] + e[window.context_begin + i + k]
                    table[first, k] = max(table[first, k], logit)
    return table


@thorough
@given(data=st.data())
def test_contexts_decoded_together_are_those_decoded_alone(data):
    enc = encoder("xlm-r")
    scored = []
    for number in range(data.draw(st.integers(1, 5), "contexts")):
        question, context = enc.encode("Who?"), enc.encode(data.draw(texts(10), "text"))
        room = data.draw(st.integers(1, 40), "room")
        sizes = {"max_seq_len": len(question) + enc.special_tokens + room, "doc_stride": (room - 1) * 3 // 4}
        windows = enc.windows(question, context, **sizes)
        if data.draw(st.booleans(), "shuffled"):
            windows = windows[::-1]
        scored.append(WindowLogits(windows, *random_logits(windows, number, data.draw(st.booleans(), "ties")), context))
    length = data.draw(st.integers(1, 45), "max_answer_len")
    for one in scored:
        parts = (list(one.windows), list(one.start_logits), list(one.end_logits), one.context, length)
        np.testing.assert_array_equal(span_table(one, length), table_of_one_window_after_another(*parts))
    options = {
        "top_k": data.draw(st.sampled_from((1, 2, 30)), "top_k"),
        "max_answer_len": length,
        "allow_no_answer": data.draw(st.booleans(), "allow_no_answer"),
        "temperature": data.draw(st.sampled_from((0.3, 1.0, 4.0)), "temperature"),
    }
    whole = [decoder.decode(one, **options) for one in scored]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder, "_CELLS", data.draw(st.sampled_from((1, 500, 2**16)), "cells"))
        blocks = [decoder.decode(one, **options) for one in scored]
    for one, left, right in zip(scored, whole, blocks, strict=True):
        assert [row[:5] for row in rows(left)] == [row[:5] for row in rows(right)]
        np.testing.assert_allclose([s.score for s in left.spans], [s.score for s in right.spans], rtol=1e-9)
        assert left.null_logit == right.null_logit == one.null_logit
        assert left.null_score == pytest.approx(right.null_score, rel=1e-9)


def test_logits_far_apart_make_scores_without_overflow():
    context, windows = read("red green blue")
    starts = [np.float32([0, 0, 0, -3e4, 3e4, 0, 0])]
    found = decode(windows, starts, starts, context, top_k=9, temperature=0.1, allow_no_answer=True)
    assert (found.spans[0].start_token, found.spans[0].score, found.null_score) == (1, 1.0, 0.0)
    assert sum(s.score for s in found.spans) == 1.0


# "red green blue" as three tokens, and logits whose exponentials are small whole numbers.
COLOURS = ("[CLS]", "[SEP]", "which", "red", "green", "blue")


def colours() -> Encoder:
    ids = {word: i for i, word in enumerate(COLOURS)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="which"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 0), ("[SEP]", 1)]
    )
    return Encoder(tokenizer, EncoderConfig(2, False, 0, 0, 512))


def read(context: str, max_seq_len: int = 20, doc_stride: int = 1) -> tuple[EncodedText, list[Window]]:
    enc = colours()
    encoded = enc.encode(context)
    return encoded, enc.windows(enc.encode("which"), encoded, max_seq_len=max_seq_len, doc_stride=doc_stride)


def logs(*values: float) -> FloatArray:
    return np.log(np.array(values, dtype=np.float32))


def test_golden_example():
    context, windows = read("red green blue")
    # [CLS] which [SEP] red green blue [SEP]; the question and the last [SEP] are high and must not count.
    starts, ends = [logs(2, 99, 99, 2, 1, 3, 99)], [logs(1, 99, 99, 1, 4, 2, 99)]
    # Two tokens at most: red 2, red green 8, green 4, green blue 2, blue 6; together 22. No answer: 2.
    found = decode(windows, starts, ends, context, top_k=9, max_answer_len=2)
    assert [(s.start, s.end) for s in found.spans] == [(0, 9), (10, 14), (4, 9), (0, 3), (4, 14)]
    assert [s.score * 22 for s in found.spans] == pytest.approx([8, 6, 4, 2, 2])
    assert [(s.start_token, s.end_token) for s in found.spans][:2] == [(0, 1), (2, 2)]
    assert found.spans[0].logit == pytest.approx(log(8))
    assert found.null_logit == pytest.approx(log(2))
    assert found.null_score == 0.0
    with_null = decode(windows, starts, ends, context, max_answer_len=2, allow_no_answer=True)
    assert with_null.spans[0].score == pytest.approx(8 / 24)
    assert with_null.null_score == pytest.approx(2 / 24)


def test_a_temperature_divides_the_logits_and_changes_no_rank():
    context, windows = read("red green blue")
    starts, ends = [logs(2, 99, 99, 2, 1, 3, 99)], [logs(1, 99, 99, 1, 4, 2, 99)]
    options = {"top_k": 9, "max_answer_len": 2, "allow_no_answer": True}
    found = decode(windows, starts, ends, context, temperature=0.5, **options)
    # Half the temperature squares the weights: 8, 6, 4, 2, 2 and no answer 2; together 128.
    assert [s.score * 128 for s in found.spans] == pytest.approx([64, 36, 16, 4, 4])
    assert found.null_score == pytest.approx(4 / 128)
    plain = decode(windows, starts, ends, context, **options)
    assert [(s.start, s.end, s.logit) for s in found.spans] == [(s.start, s.end, s.logit) for s in plain.spans]
    assert found.null_logit == plain.null_logit
    assert found.null_difference == plain.null_difference == pytest.approx(log(2) - log(8))


@pytest.mark.parametrize(
    ("threshold", "texts"),
    [
        (None, ["green", "red", "", "blue"]),  # by probability
        (0.0, ["green", "red", "", "blue"]),
        (1.5, ["green", "red", "blue", ""]),  # it exceeds blue by log 4 = 1.386
        (1.25, ["green", "red", "", "blue"]),
        (-0.75, ["green", "", "red", "blue"]),  # less than red by log 2 = 0.693
        (-1.25, ["", "green", "red", "blue"]),  # less than green by log 3 = 1.099
    ],
)
def test_the_null_answer_stands_by_its_threshold(threshold, texts):
    context, windows = read("red green blue")
    starts, ends = [logs(4, 1, 1, 8, 12, 1, 1)], [np.zeros(7, dtype=np.float32)]
    found = decode(windows, starts, ends, context, top_k=3, max_answer_len=1, allow_no_answer=True)
    ranked = rank_answers(found, context.text, top_k=4, allow_no_answer=True, null_threshold=threshold)
    assert [a.text for a in ranked] == texts
    scores = {a.text: a.score * 25 for a in ranked}
    assert scores == pytest.approx({"green": 12, "red": 8, "": 4, "blue": 1})
    assert rank_answers(found, context.text, top_k=1, allow_no_answer=True, null_threshold=threshold) == ranked[:1]
    assert [a.text for a in rank_answers(found, context.text, top_k=4)] == ["green", "red", "blue"]


def test_without_a_span_null_is_all_there_is():
    enc = encoder("xlm-r")
    context = enc.encode("")
    windows = enc.windows(enc.encode("Who?"), context)
    flat = [np.zeros(len(w), dtype=np.float32) for w in windows]
    found = decode(windows, flat, flat, context, allow_no_answer=True)
    assert found.null_difference == np.inf
    assert rank_answers(found, "", top_k=3, allow_no_answer=True, null_threshold=50.0) == [Answer("", 0, 0, 1.0)]


def test_a_span_in_two_windows_is_one_candidate_with_its_best_score():
    context, windows = read("red green blue", max_seq_len=6, doc_stride=1)
    assert [(w.context_offset, w.context_length) for w in windows] == [(0, 2), (1, 2)]
    starts = [logs(5, 1, 1, 1, 3, 1), logs(3, 1, 1, 7, 1, 1)]
    ends = [logs(1, 1, 1, 1, 1, 1), logs(1, 1, 1, 1, 1, 1)]
    # red 1, red green 1, green max(3, 7), green blue 7, blue 1; together 17. No answer: min(5, 3).
    found = decode(windows, starts, ends, context, top_k=9, allow_no_answer=True)
    assert [((s.start, s.end), round(s.score * 20, 4)) for s in found.spans] == [
        ((4, 9), 7),
        ((4, 14), 7),
        ((0, 3), 1),
        ((0, 9), 1),
        ((10, 14), 1),
    ]
    assert found.null_score == pytest.approx(3 / 20)
    assert decode(windows[::-1], starts[::-1], ends[::-1], context, top_k=9, allow_no_answer=True) == found


def test_ties_go_to_the_earlier_then_the_shorter_span():
    context, windows = read("red green blue " * 40, max_seq_len=200)
    flat = [np.zeros(len(w), dtype=np.float32) for w in windows]
    every = [(i, j) for i in range(120) for j in range(i, min(i + 3, 120))]
    for top_k in (1, 2, 7, 50, 400):
        found = decode(windows, flat, flat, context, top_k=top_k, max_answer_len=3)
        assert [(s.start_token, s.end_token) for s in found.spans] == every[:top_k]


def test_tokens_of_one_character_are_one_answer():
    enc = encoder("roberta")
    text = "x 🚀"
    context = enc.encode(text)
    windows = enc.windows(enc.encode("Who?"), context)
    flat = [np.zeros(len(windows[0]), dtype=np.float32)]
    assert len(context) > 3  # the emoji is several tokens
    found = decode(windows, flat, flat, context, top_k=99)
    assert sorted(text[s.start : s.end] for s in found.spans) == ["x", "x 🚀", "🚀"]


def test_align_to_words_widens_to_whole_words():
    enc = encoder("bert")
    text = "see xqzkjw."
    context = enc.encode(text)
    windows = enc.windows(enc.encode("Who?"), context)
    first, last = context.tokens_of(4, 10)
    assert last > first
    starts = [np.zeros(len(windows[0]), dtype=np.float32)]
    starts[0][windows[0].context_begin + last] = 9
    part, whole = (decode(windows, starts, starts, context, align_to_words=align).spans[0] for align in (False, True))
    assert part.start > 4
    assert (whole.start, whole.end) == (4, 10)
    assert (whole.start_token, whole.end_token, whole.score) == (part.start_token, part.end_token, part.score)


def test_a_long_word_does_not_crowd_out_other_answers():
    letters = Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    letters.pre_tokenizer = pre_tokenizers.Whitespace()
    enc = Encoder(letters, EncoderConfig(0, False, None, 0, 512))
    context = enc.encode("a" * 20 + " b")
    windows = enc.windows(enc.encode("b"), context)
    flat = [np.zeros(len(windows[0]), dtype=np.float32)]
    flat[0][-1] = -9  # 210 spans of the first word stand before the others
    found = decode(windows, flat, flat, context, top_k=3, align_to_words=True)
    assert [(s.start, s.end) for s in found.spans] == [(0, 20), (0, 22), (21, 22)]


@pytest.mark.parametrize("text", ["", " \n\u3000 "])
def test_a_context_without_visible_text_has_no_spans(text):
    enc = encoder("xlm-r")
    context = enc.encode(text)
    windows = enc.windows(enc.encode("Who?"), context)
    flat = [np.zeros(len(w), dtype=np.float32) for w in windows]
    assert decode(windows, flat, flat, context) == Decoded((), 0.0, 0.0)
    assert decode(windows, flat, flat, context, allow_no_answer=True) == Decoded((), 0.0, 1.0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("position", [0, 3, -1])
def test_logits_that_are_not_finite_are_an_error(bad, side, position):
    context, windows = read("red green")
    logits = [logs(1, 1, 1, 1, 1, 1), logs(1, 1, 1, 1, 1, 1)]
    logits[side][position] = bad
    with pytest.raises(LogitsError, match="NaN or infinite"):
        decode(windows, [logits[0]], [logits[1]], context)


def test_logits_of_padding_do_not_matter():
    context, windows = read("red green")
    plain = [logs(1, 1, 1, 3, 4, 1)]
    padded = [np.append(plain[0], np.float32([np.nan, 99]))]
    assert decode(windows, padded, padded, context, top_k=9) == decode(windows, plain, plain, context, top_k=9)


@pytest.mark.parametrize("option", ["top_k", "max_answer_len"])
def test_counts_below_one_are_input_errors(option):
    context, windows = read("red")
    flat = [logs(1, 1, 1, 1, 1)]
    with pytest.raises(InputError, match=f"{option} 0 is below 1"):
        decode(windows, flat, flat, context, **{option: 0})
