"""Finds an answer that does not occur exactly in its context.

A view of a text keeps some of its code points, folded, and remembers the position of each. If the answer's view
occurs in the context's view, the answer is the slice of the context that this occurrence came from.
"""

from __future__ import annotations

import re
import unicodedata
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache


def occurrences(text: str, context: str) -> list[int]:
    """Finds every occurrence of ``text`` in ``context``, overlapping ones too, in code points."""
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
    """The code points kept, and for each the index of its source."""

    text: str
    source: array[int]

    def find(self, text: str) -> list[Slice]:
        """Finds every place of ``text`` that begins and ends with whole code points of the source."""
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
    source = array("I")
    for i, character in enumerate(text):
        for piece in fold(character):
            kept.append(piece)
            source.append(i)
    return _View("".join(kept), source)


@lru_cache(maxsize=4)  # an answer and its context; long contexts take much memory
def _spaced(text: str) -> _View:
    """Turns each run of white space into one space."""
    kept = (i for i, c in enumerate(text) if not (c.isspace() and i and text[i - 1].isspace()))
    return _View(re.sub(r"\s+", " ", text), array("I", kept))


@lru_cache(maxsize=4)  # an answer and its context; long contexts take much memory
def _caseless(text: str) -> _View:
    return _view(text, str.casefold)


@lru_cache(maxsize=4)  # an answer and its context; long contexts take much memory
def _spelled(text: str) -> _View:
    """Keeps letters, the marks on them, and digits, in any case."""
    return _view(text, lambda c: c.casefold() if unicodedata.category(c)[0] in "LMN" else "")


def find_spaced(answer: str, context: str) -> list[Slice]:
    """Finds the answer, ignoring the amount of white space."""
    return _spaced(context).find(" ".join(answer.split()))


def find_caseless(answer: str, context: str) -> list[Slice]:
    """Finds the answer, ignoring letter case."""
    return _caseless(context).find(answer.casefold())


def find_spelled(answer: str, context: str, given: Slice | None = None) -> list[Slice]:
    """Finds the answer by its letters and digits alone, as in tokenised text.

    Other characters at the answer's ends are included if the context has them there.

    Args:
        answer: The answer's text.
        context: The context.
        given: The slice that the data names; if its letters and digits are those of the answer, only it is returned.
    """
    wanted = _spelled(answer).text
    if not wanted:
        return []
    numbers = _numbers(answer)
    if given and 0 <= given.start < given.end <= len(context):
        piece = context[given.start : given.end]
        if _spelled(piece).text == wanted and _numbers(piece) == numbers:
            lead = len(piece) - len(piece.lstrip())
            return [Slice(given.start + lead, given.start + len(piece.rstrip()))]
    head, tail = _ends(answer)
    found = [
        Slice(_stretch(context, s.start, head[::-1], -1), _stretch(context, s.end, tail, 1))
        for s in _spelled(context).find(wanted)
    ]
    return [s for s in found if _numbers(context[_before_sign(context, s.start) : s.end]) == numbers]


_NUMBER = re.compile(r"(?<!\w)[-+\u2212]?(?:[.,](?=\d))?\d+(?:\s*[^\w\s]\s*\d+|\s+\d+)*")


def _numbers(text: str) -> list[str]:
    """The numbers of a text with signs and separators of digits: "15" is neither "1.5" nor "1 5" nor "-15"."""
    return [re.sub(r"\s*([^\w\s])\s*", r"\1", re.sub(r"\s+", " ", number)) for number in _NUMBER.findall(text)]


def _before_sign(context: str, start: int) -> int:
    """The position of the sign of a number that begins at ``start``; ``start`` itself without a sign."""
    signed = start > 0 and context[start - 1] in "+-\u2212." and context[start].isdigit()
    return start - 1 if signed and not (start > 1 and context[start - 2].isalnum()) else start


def _ends(answer: str) -> tuple[str, str]:
    """Returns the characters before the answer's first letter or digit and after its last, without white space."""
    source = _spelled(answer).source
    return "".join(answer[: source[0]].split()), "".join(answer[source[-1] + 1 :].split())


def _stretch(context: str, border: int, signs: str, step: int) -> int:
    """Moves the border outwards over ``signs`` as far as the context has them, allowing white space between them."""
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
    """Returns the slices that do not cut a word of cased letters, or a number; all of them if none is left."""
    return [s for s in slices if not cuts_a_word(s, context)] or slices


def cuts_a_word(found: Slice, context: str) -> bool:
    """Returns whether the slice begins or ends inside a word of cased letters, or inside a number."""
    return _is_inside_word(context, found.start) or _is_inside_word(context, found.end)


def _is_inside_word(context: str, at: int) -> bool:
    return 0 < at < len(context) and _is_word_part(context[at - 1]) and _is_word_part(context[at])


def _is_word_part(character: str) -> bool:
    return character.isdigit() or character.lower() != character.upper()


def from_utf16(offset: int, text: str) -> int | None:
    """Converts an offset from UTF-16 units to code points; None past the end or inside a surrogate pair."""
    return _from_units(2 * offset, text, "utf-16-le")


def from_utf8(offset: int, text: str) -> int | None:
    """Converts an offset from UTF-8 bytes to code points; None past the end or inside a character."""
    return _from_units(offset, text, "utf-8")


def _from_units(size: int, text: str, encoding: str) -> int | None:
    if text.isascii():
        size //= 2 if encoding == "utf-16-le" else 1
        return size if size <= len(text) else None
    encoded = text.encode(encoding)
    try:
        return len(encoded[:size].decode(encoding)) if size <= len(encoded) else None
    except UnicodeDecodeError:
        return None
