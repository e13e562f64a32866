"""Where an answer that is not letter by letter in its context stands there nevertheless.

A view of a text keeps some of its code points, folded, and remembers where each came from; an answer
whose view occurs in the context's view stands at the slice that this occurrence came from.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache


def occurrences(text: str, context: str) -> list[int]:
    """Where ``text`` stands in ``context``, as code points, overlapping occurrences too."""
    found, at = [], context.find(text)
    while at >= 0:
        found.append(at)
        at = context.find(text, at + 1)
    return found


@dataclass(frozen=True, slots=True)
class Slice:
    """``context[start:end]``, in code points."""

    start: int
    end: int


@dataclass(frozen=True, slots=True)
class _View:
    """The kept code points, and for each the index of the one it came from."""

    text: str
    source: tuple[int, ...]

    def find(self, text: str) -> list[Slice]:
        """Every place of ``text`` that begins and ends with whole code points of the source."""
        found = []
        for at in occurrences(text, self.text):
            last = at + len(text) - 1
            begins = at == 0 or self.source[at - 1] != self.source[at]
            ends = last + 1 == len(self.text) or self.source[last + 1] != self.source[last]
            if begins and ends:
                found.append(Slice(self.source[at], self.source[last] + 1))
        return found


def _view(text: str, fold: Callable[[str], str]) -> _View:
    kept: list[str] = []
    source: list[int] = []
    for i, character in enumerate(text):
        for piece in fold(character):
            kept.append(piece)
            source.append(i)
    return _View("".join(kept), tuple(source))


@lru_cache(maxsize=32)
def _spaced(text: str) -> _View:
    """Runs of white space are one space."""
    kept: list[str] = []
    source: list[int] = []
    for i, character in enumerate(text):
        if character.isspace():
            if kept and kept[-1] == " ":
                continue
            character = " "
        kept.append(character)
        source.append(i)
    return _View("".join(kept), tuple(source))


@lru_cache(maxsize=32)
def _caseless(text: str) -> _View:
    return _view(text, str.casefold)


@lru_cache(maxsize=32)
def _spelled(text: str) -> _View:
    """Letters, the marks that belong to them, and digits, whatever their case."""
    return _view(text, lambda c: c.casefold() if unicodedata.category(c)[0] in "LMN" else "")


def find_spaced(answer: str, context: str) -> list[Slice]:
    """Where the answer stands but for the amount of white space."""
    return _spaced(context).find(" ".join(answer.split()))


def find_caseless(answer: str, context: str) -> list[Slice]:
    """Where the answer stands but for letter case."""
    return _caseless(context).find(answer.casefold())


def find_spelled(answer: str, context: str, given: Slice | None = None) -> list[Slice]:
    """Where the answer stands when all but letters and digits is dropped from both, as in tokenised text.

    What the answer has of other signs at its ends is taken along where the context has it there. ``given`` is the
    slice that the data names: where its letters and digits are the answer's, it alone is returned.
    """
    wanted = _spelled(answer).text
    if not wanted:
        return []
    if given and 0 <= given.start < given.end <= len(context):
        piece = context[given.start : given.end]
        if _spelled(piece).text == wanted:
            lead = len(piece) - len(piece.lstrip())
            return [Slice(given.start + lead, given.start + len(piece.rstrip()))]
    head, tail = _ends(answer)
    return [
        Slice(_stretch(context, s.start, head[::-1], -1), _stretch(context, s.end, tail, 1))
        for s in _spelled(context).find(wanted)
    ]


def _ends(answer: str) -> tuple[str, str]:
    """The signs before the answer's first letter or digit and after its last, without white space."""
    source = _spelled(answer).source
    return "".join(answer[: source[0]].split()), "".join(answer[source[-1] + 1 :].split())


def _stretch(context: str, border: int, signs: str, step: int) -> int:
    """The border moved outwards over ``signs``, white space between them allowed, as far as they stand there."""
    at = border
    for sign in signs:
        while 0 <= (i := at if step > 0 else at - 1) < len(context) and context[i].isspace():
            at += step
        if not 0 <= i < len(context) or context[i] != sign:
            break
        at += step
        border = at
    return border


def whole_words(slices: list[Slice], context: str) -> list[Slice]:
    """Those that do not cut a word of letters with case, or a number, in two; all where none is left."""
    whole = [s for s in slices if not _joins(context, s.start) and not _joins(context, s.end)]
    return whole or slices


def cuts_a_word(found: Slice, context: str) -> bool:
    """Whether the slice begins or ends inside a word of letters with case, or inside a number."""
    return _joins(context, found.start) or _joins(context, found.end)


def _joins(context: str, at: int) -> bool:
    return 0 < at < len(context) and _tight(context[at - 1]) and _tight(context[at])


def _tight(character: str) -> bool:
    return character.isdigit() or character.lower() != character.upper()


def from_utf16(offset: int, text: str) -> int | None:
    """An offset in UTF-16 units as one in code points; None past the end, or inside a surrogate pair."""
    at = units = 0
    while units < offset and at < len(text):
        units += 1 + (ord(text[at]) > 0xFFFF)
        at += 1
    return at if units == offset else None
