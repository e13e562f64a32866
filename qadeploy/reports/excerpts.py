"""A context cut down to where its answers lie, in pieces that are marked or not. All offsets are code points."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

WHOLE = 700
AROUND = 160
_BRIDGE = 40  # a shorter gap is not worth an ellipsis
_REACH = 24  # how far a cut moves to fall on white space
_JOINER = "\u200d"

Range = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Piece:
    """``context[start:start + len(text)] == text``; ``gap`` tells that something before it was left out."""

    text: str
    start: int
    gold: bool
    answered: bool
    gap: bool

    @property
    def end(self) -> int:
        """One past the last code point of the piece."""
        return self.start + len(self.text)


def excerpt(
    context: str, golds: Sequence[Range], answered: Sequence[Range], *, whole: int = WHOLE, around: int = AROUND
) -> tuple[Piece, ...]:
    """The pieces to show of a context, in order; each lies wholly inside or outside of every given span.

    A context of at most ``whole`` code points is kept whole, of a longer one what lies within ``around``
    of a span's start or end, cut at white space where some is near. Without spans that is its beginning.
    """
    spans = [*golds, *answered]
    shown = [(0, len(context))] if len(context) <= whole else _near(context, spans, whole, around)
    pieces, done = [], 0
    for begin, end in shown:
        edges = sorted({begin, end, *(edge for span in spans for edge in span if begin < edge < end)})
        for start, stop in pairwise(edges):
            pieces.append(
                Piece(context[start:stop], start, _inside(start, golds), _inside(start, answered), gap=start > done)
            )
            done = stop
    return tuple(pieces)


def _inside(place: int, spans: Sequence[Range]) -> bool:
    return any(start <= place < end for start, end in spans)


def _near(context: str, spans: Sequence[Range], whole: int, around: int) -> list[Range]:
    wanted = sorted((max(0, edge - around), edge + around) for span in spans for edge in span) or [(0, whole)]
    merged: list[list[int]] = []
    for begin, end in wanted:
        if merged and begin - merged[-1][1] <= _BRIDGE:
            merged[-1][1] = max(merged[-1][1], end)
        else:
            merged.append([begin, end])
    reach = min(_REACH, around - 1)  # what is wanted stays in
    return [(_cut(context, begin, reach), _cut(context, end, reach)) for begin, end in merged]


def _cut(context: str, place: int, reach: int) -> int:
    """``place``, or a place at most ``reach`` after it that does not tear a word, or at least no character of several code points."""
    if place <= 0 or place >= len(context):
        return max(0, min(place, len(context)))
    last = min(place + reach, len(context))
    for near in range(place, last):
        if context[near - 1].isspace() or context[near].isspace():
            return near
    while place < last and _continues(context, place):
        place += 1
    return place


def _continues(context: str, place: int) -> bool:
    """Whether the code point belongs to the character before it: marks, variation selectors, emoji of several."""
    this = context[place]
    return (
        unicodedata.category(this) in {"Mn", "Mc", "Me"}
        or this == _JOINER
        or context[place - 1] == _JOINER
        or "\U0001f3fb" <= this <= "\U0001f3ff"
    )
