"""Answers for people and for other programs: the text around them, and offsets in UTF-16 units or UTF-8 bytes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from qadeploy.core.encoded_text import trimmed
from qadeploy.core.settings import Offsets, SnippetSize
from qadeploy.extras import import_extra
from qadeploy.records import Answer, Snippet

Place = tuple[int, int]
# Code points on each side of an answer in which to search for its sentence: a text may have none, such as a table.
_FAR = 1_000
_PARAGRAPH = re.compile(r"\n[^\S\n]*\n|\u2029|\f")
# The library requires a language. Its English rules know the sentence ends of all scripts, and English abbreviations.
_LANGUAGE = "en"
_CODECS = {"utf16": ("utf-16-le", 2), "utf8": ("utf-8", 1)}


def present(answers: Sequence[Answer], texts: Sequence[str], snippet: SnippetSize, offsets: Offsets) -> list[Answer]:
    """Adds snippets to answers, and converts all of their offsets. The null answer stays as it is.

    Args:
        answers: The answers, with offsets in code points.
        texts: The context or passage of each.
        snippet: "sentence", or the number of code points on each side; None for no snippet.
        offsets: The unit of the offsets.

    Raises:
        MissingExtraError: ``snippet`` is "sentence", and sentencex is not installed.
    """
    shown = []
    for answer, text in zip(answers, texts, strict=True):
        if answer.text and snippet is not None:
            place = (answer.start, answer.end)
            cut = sentence_around(text, place) if snippet == "sentence" else characters_around(text, place, snippet)
            answer = replace(answer, snippet=Snippet(text[cut[0] : cut[1]], *cut))
        shown.append(answer if offsets == "codepoints" or text.isascii() else _converted(answer, text, offsets))
    return shown


def check_snippet(snippet: SnippetSize) -> None:
    """Raises MissingExtraError if a snippet needs a package that is not installed."""
    if snippet == "sentence":
        _sentences("")


def characters_around(text: str, answer: Place, size: int) -> Place:
    """The code points of an answer and at most ``size`` on each side: whole words, without white space at the ends."""
    start, end = max(answer[0] - size, 0), min(answer[1] + size, len(text))
    if start and not text[start - 1].isspace():  # inside a word: go on to the next
        start = next((i for i in range(start, answer[0]) if text[i].isspace()), start)
    if end < len(text) and not text[end].isspace():
        end = next((i for i in range(end, answer[1], -1) if text[i - 1].isspace()), end)
    return trimmed(text, start, end)


def sentence_around(text: str, answer: Place) -> Place:
    """The code points of the sentence that contains an answer, or of all sentences that contain a part of it.

    A blank line ends a sentence. At most 1,000 code points of a sentence are returned on each side of the answer.

    Raises:
        MissingExtraError: sentencex is not installed.
    """
    first, last = max(answer[0] - 2 * _FAR, 0), min(answer[1] + 2 * _FAR, len(text))
    for border in _PARAGRAPH.finditer(text, first, last):
        if border.end() <= answer[0]:
            first = border.end()
        elif border.start() >= answer[1]:
            last = border.start()
            break
    start, end = answer
    for begin, stop in _sentences(text[first:last]):
        if begin + first < answer[1] and stop + first > answer[0]:
            start, end = min(start, begin + first), max(end, stop + first)
    near = characters_around(text, answer, _FAR)
    return trimmed(text, max(start, near[0]), min(end, near[1]))


def _sentences(text: str) -> Iterator[Place]:
    library = import_extra("sentencex", "snippet sentence", "snippet")
    found: list[dict[str, Any]] = library.get_sentence_boundaries(_LANGUAGE, text)
    return ((each["start_index"], each["end_index"]) for each in found)


def in_units(text: str, places: Sequence[int], offsets: Offsets) -> list[int]:
    """Converts places in a text from code points to another unit.

    Args:
        text: The text.
        places: The places in code points.
        offsets: The unit.
    """
    if offsets == "codepoints" or text.isascii():
        return list(places)
    codec, size = _CODECS[offsets]
    return [len(text[:place].encode(codec)) // size for place in places]


def _converted(answer: Answer, text: str, offsets: Offsets) -> Answer:
    start, end = in_units(text, (answer.start, answer.end), offsets)
    found = answer.snippet
    if found:
        first, last = in_units(text, (found.start, found.end), offsets)
        found = replace(found, start=first, end=last)
    return replace(answer, start=start, end=end, snippet=found)
