"""The data set that comes with the project: its size, its splits, and how hard its questions are."""

from __future__ import annotations

import json
import re
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from qadeploy.data.loading import read
from qadeploy.shipped import HANDBOOK

ROWS: list[dict[str, Any]] = [json.loads(line) for line in HANDBOOK.read_text(encoding="utf-8").splitlines()]
PASSAGES = {row["passage"]: row["context"] for row in ROWS}
TOKENIZER = Path(__file__).parents[2] / "models" / "minilm-l6-qa" / "tokenizer.json"


def places(text: str, part: str) -> list[int]:
    """Every code point at which ``part`` begins in ``text``, overlapping ones too."""
    return [m.start() for m in re.finditer(f"(?={re.escape(part)})", text)]


# ---------------------------------------------------------------- size and splits


def test_a_thousand_rows_eight_hundred_to_train():
    assert len(ROWS) == 1000
    assert Counter(row["split"] for row in ROWS) == {"train": 800, "validation": 200}
    data = read("handbook")
    assert (len(data.part("train")), len(data.part("validation"))) == (800, 200)
    assert (data.skipped, data.first_taken) == (0, 0)


def test_no_passage_stands_on_both_sides():
    sides = {context: {r["split"] for r in ROWS if r["context"] == context} for context in PASSAGES.values()}
    assert [context[:60] for context, found in sides.items() if len(found) > 1] == []


def test_a_passage_has_one_text_and_a_text_one_passage():
    pairs = {(row["passage"], row["context"]) for row in ROWS}
    assert len(pairs) == len(PASSAGES) == len(set(PASSAGES.values()))
    assert len(PASSAGES) >= 110


def test_most_passages_have_80_to_250_words():
    usual = [context for context in PASSAGES.values() if 80 <= len(context.split()) <= 250]
    assert len(usual) >= 0.8 * len(PASSAGES)


def test_at_least_ten_passages_need_several_windows():
    tokenizer = Tokenizer.from_file(str(TOKENIZER))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    lengths = [len(e.ids) for e in tokenizer.encode_batch(list(PASSAGES.values()), add_special_tokens=False)]
    assert sum(length > 384 for length in lengths) >= 10


# ---------------------------------------------------------------- questions and answers


def test_ids_and_questions_are_unique_and_questions_ask():
    for field in ("id", "question"):
        assert [v for v, n in Counter(row[field].casefold() for row in ROWS).items() if n > 1] == []
    assert [
        row["id"] for row in ROWS if not row["question"].endswith("?") or row["question"] != row["question"].strip()
    ] == []
    assert [row["id"] for row in ROWS if not row["id"].startswith(row["passage"] + "-")] == []


def test_answers_stand_in_their_passage_letter_by_letter():
    for row in ROWS:
        assert row["answer"] == row["answer"].strip() != "", row["id"]
        assert row["answer"] in row["context"], row["id"]


def test_answer_start_is_given_exactly_where_it_is_needed():
    several = 0
    for row in ROWS:
        found = places(row["context"], row["answer"])
        assert ("answer_start" in row) == (len(found) > 1), row["id"]
        if len(found) > 1:
            several += 1
            assert row["answer_start"] in found, row["id"]
    assert several >= 10


def test_an_answer_begins_and_ends_with_a_word():
    def cut(text: str, at: int) -> bool:
        return 0 < at < len(text) and text[at - 1].isalnum() and text[at].isalnum()

    bad = []
    for row in ROWS:
        start = row.get("answer_start", row["context"].find(row["answer"]))
        if cut(row["context"], start) or cut(row["context"], start + len(row["answer"])):
            bad.append(row["id"])
    assert bad == []


def test_the_reader_gives_back_what_is_written():
    for row, example in zip(ROWS, read("handbook").examples, strict=True):
        (answer,) = example.answers
        assert (example.id, example.question, example.split) == (row["id"], row["question"], row["split"])
        assert example.context[answer.start : answer.end] == answer.text == row["answer"]
        assert answer.start == row.get("answer_start", answer.start)


# ---------------------------------------------------------------- lexical overlap

STOP_WORDS = frozenset(
    re.findall(
        r"\w+",
        """
    a about after all also an and any are as at be been before being between both but by can could did do does
    during each for from get gets go goes had has have he her his how i if in into is it its just may me might more
    most much many must my no nor not of off on one only or other our out over own shall she should so some such
    than that the their them then there these they this those through to too under until up upon us very was we were
    what when where whether which while who whom whose why will with would you your
    """,
    )
)
ENDINGS = ("ingly", "edly", "ings", "ing", "ies", "ied", "ed", "es", "ly", "s", "e")


def stem(word: str) -> str:
    """The word without its commonest ending, where three letters stay: boats and boat are one word."""
    ending = next((e for e in ENDINGS if word.endswith(e) and len(word) - len(e) >= 3), "")
    return word.removesuffix(ending)


def content_words(text: str) -> set[str]:
    """The stems of the words that carry meaning."""
    text = re.sub(r"[’']s\b", "", text.lower())
    return {stem(word) for word in re.findall(r"[^\W_]+", text) if word not in STOP_WORDS}


def sentence_of(context: str, start: int, end: int) -> str:
    """The sentence (or sentences) that ``context[start:end]`` lies in."""
    breaks = re.finditer(r"(?<!\bDr)(?<!\bMr)(?<!\bMrs)(?<!\bNo)(?<!\bSt)[.!?][”\"’)]*\s+|\n+", context)
    cuts = [0, *(m.end() for m in breaks), len(context)]
    return context[max(c for c in cuts if c <= start) : min(c for c in cuts if c >= end)]


@pytest.mark.parametrize(
    ("question", "sentence", "shared"),
    [
        ("Who painted the boats?", "Ada’s boat was painted by Ada.", {"boat", "paint"}),
        ("Which is it?", "It is which.", set()),
        ("How is time measured?", "He measures times.", {"tim", "measur"}),
    ],
)
def test_overlap_is_counted_by_stems_of_content_words(question, sentence, shared):
    assert content_words(question) & content_words(sentence) == shared


def test_sentences_are_cut_at_their_ends():
    text = "Mr Ade sat. Mrs. Bo (“stood!”) Dr. Cy ran.\nNo. 7 fell"
    at = text.index("Cy")
    assert sentence_of(text, at, at + 2) == "Dr. Cy ran.\n"
    assert sentence_of(text, text.index("sat"), text.index("Bo")) == "Mr Ade sat. Mrs. Bo (“stood!”) "


def test_questions_seldom_repeat_the_words_of_their_answer(capsys):
    overlaps = []
    for example in read("handbook").examples:
        (answer,) = example.answers
        sentence = sentence_of(example.context, answer.start, answer.end)
        overlaps.append(len(content_words(example.question) & content_words(sentence)))
    few = sum(n <= 1 for n in overlaps) / len(overlaps)
    with capsys.disabled():
        print(
            f"\nhandbook: {few:.1%} of the questions share at most one content word with their answer's sentence, "
            f"median {statistics.median(overlaps):g}, most {max(overlaps)}"
        )
    assert few >= 0.7
