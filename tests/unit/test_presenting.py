"""Snippets, and offsets in other units: properties that hold for any text, and sentences in several scripts."""

from __future__ import annotations

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qadeploy.errors import MissingExtraError
from qadeploy.inference.presenting import characters_around, check_snippet, present, sentence_around
from qadeploy.records import Answer
from tests.tokenizers_for_tests import thorough

PIECES = (
    "word", "a", " ", "  ", "\n", "\n\n", ". ", "! ", "。", "？", "東京", "ไทย",
    "e\u0301", "🏮", "👩‍👩‍👧", "Dr. ", "३।", "\u2029",
)  # fmt: skip
CONTEXTS = st.lists(st.sampled_from(PIECES), min_size=1, max_size=40).map("".join).filter(str.strip)
SENTENCES = [
    ("Dr. Lind came at 3 p.m. to Port Ansel. Mungo waved.", "Port Ansel", "Dr. Lind came at 3 p.m. to Port Ansel."),
    ("今日は天気がいい。散歩に行きましょう！はい。", "散歩", "散歩に行きましょう！"),
    ("我在Google工作。你呢？", "Google", "我在Google工作。"),
    ("यह एक वाक्य है। यह दूसरा है।", "दूसरा", "यह दूसरा है।"),
    ("هذا نص. هل تفهم؟ نعم.", "تفهم", "هل تفهم؟"),
    ("ይህ አረፍተ ነገር ነው። ሌላ ነው።", "ሌላ", "ሌላ ነው።"),
    ("Это текст. Ада хранит лампу! Да.", "Ада", "Ада хранит лампу!"),
    ("Heading\n\nAda keeps\nthe lamp.", "Ada", "Ada keeps\nthe lamp."),
    ("Heading\n\nAda keeps the lamp.", "Heading", "Heading"),
    ("One two. Three four. Five.", "two. Three", "One two. Three four."),
    ("Wait 🏮🏮. Then 🏮 dies. Done.", "dies", "Then 🏮 dies."),
]


def place(data: st.DataObject, text: str) -> tuple[int, int]:
    """A part of the text that is not blank and does not begin or end with white space, as answers are."""
    visible = [i for i, c in enumerate(text) if not c.isspace()]
    first = data.draw(st.sampled_from(visible))
    return first, 1 + data.draw(st.sampled_from([i for i in visible if i >= first]))


@thorough
@given(text=CONTEXTS, data=st.data())
def test_a_sentence_holds_its_answer_and_no_blank_line(text, data):
    answer = place(data, text)
    start, end = sentence_around(text, answer)
    assert start <= answer[0] < answer[1] <= end
    assert text[start:end].strip() == text[start:end]
    around = text[start : answer[0]] + "|" + text[answer[1] : end]
    assert "\n\n" not in around


@thorough
@given(text=CONTEXTS, data=st.data(), size=st.integers(1, 30))
def test_so_many_characters_hold_the_answer_and_whole_words(text, data, size):
    answer = place(data, text)
    start, end = characters_around(text, answer, size)
    assert answer[0] - size <= start <= answer[0] < answer[1] <= end <= answer[1] + size
    assert text[start:end].strip() == text[start:end]
    for border, side in ((start, text[start : answer[0]]), (end, text[answer[1] : end])):
        cut = 0 < border < len(text) and not text[border - 1].isspace() and not text[border].isspace()
        assert not cut or not any(c.isspace() for c in side)  # only if there is no whole word on that side


@thorough
@given(text=CONTEXTS, data=st.data())
def test_offsets_cut_the_same_text_from_what_the_caller_has(text, data):
    start, end = place(data, text)
    answer = Answer(text[start:end], start, end, 0.5)
    for unit, codec, size in (("utf16", "utf-16-le", 2), ("utf8", "utf-8", 1)):
        (found,) = present([answer], [text], 5, unit)
        whole = text.encode(codec)
        assert whole[size * found.start : size * found.end].decode(codec) == found.text == answer.text
        assert whole[size * found.snippet.start : size * found.snippet.end].decode(codec) == found.snippet.text
        assert answer.text in found.snippet.text


@pytest.mark.parametrize(("text", "answer", "sentence"), SENTENCES, ids=[each[1] for each in SENTENCES])
def test_sentences_end_where_their_script_ends_them(text, answer, sentence):
    start = text.index(answer)
    first, last = sentence_around(text, (start, start + len(answer)))
    assert text[first:last] == sentence


def test_a_text_without_sentences_is_cut_around_the_answer():
    text = "cell " * 10_000
    start, end = sentence_around(text, (25_000, 25_004))
    assert 0 < 25_000 - start <= 1_000
    assert 0 < end - 25_004 <= 1_000
    assert text[start:end].startswith("cell ")


def test_the_null_answer_has_no_snippet_and_stays_at_0():
    null = Answer("", 0, 0, 0.5)
    assert present([null], ["🏮 some text"], "sentence", "utf16") == [null]


def test_without_the_library_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencex", None)
    check_snippet(20)
    with pytest.raises(MissingExtraError, match=r"needs the package sentencex.*: pip install 'qadeploy\[snippet\]'"):
        check_snippet("sentence")
