"""A context cut down to the surroundings of its answers, in marked and unmarked pieces. All offsets are code points."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

_BRIDGE = 40  # a shorter gap is not worth an ellipsis
_REACH = 24  # how far a cut moves to reach white space
_JOINER = "\u200d"

Range = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece of a context: ``context[start:end] == text``; ``gap`` is true if text before it was left out."""

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
    context: str, golds: Sequence[Range], answered: Sequence[Range], *, whole: int = 700, around: int = 160
) -> tuple[Piece, ...]:
    """Returns the pieces of a context to show, in order; each lies wholly inside or outside of every given span.

    Args:
        context: The context.
        golds: The annotated spans.
        answered: The spans that the model answered.
        whole: A context of at most this many code points is shown whole.
        around: Of a longer context, this many code points around the start and the end of each span are shown, cut at
            white space if there is some nearby; without spans, its beginning is shown.
    """
    spans = [*golds, *answered]
    shown = [(0, len(context))] if len(context) <= whole else _near(context, spans, whole, around)
    pieces, done = [], 0
    for begin, end in shown:
        edges = sorted({begin, end, *(edge for span in spans for edge in span if begin < edge < end)})
        for start, stop in pairwise(edges):
            in_gold, in_answer = _inside(start, golds), _inside(start, answered)
            pieces.append(Piece(context[start:stop], start, in_gold, in_answer, gap=start > done))
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
    reach = min(_REACH, around - 1)  # so that nothing wanted is cut off
    return [(_cut(context, begin, reach), _cut(context, end, reach)) for begin, end in merged]


def _cut(context: str, place: int, reach: int) -> int:
    """``place``, or a place up to ``reach`` after it that splits no word, or at least no character of several code points."""
    if place <= 0 or place >= len(context):
        return max(0, min(place, len(context)))
    places = range(place, min(place + reach, len(context)))
    spaced = (near for near in places if context[near - 1].isspace() or context[near].isspace())
    apart = (near for near in places if not _continues(context, near))
    return next(spaced, next(apart, places.stop))


def _continues(context: str, place: int) -> bool:
    """Whether the code point belongs to the character before it: marks, variation selectors, joined emoji, skin tones."""
    this = context[place]
    is_mark = unicodedata.category(this).startswith("M")
    return is_mark or _JOINER in context[place - 1 : place + 1] or "\U0001f3fb" <= this <= "\U0001f3ff"
