"""Documents to passages: cut at headings and pages, then at blank lines, and inside paragraphs only if they are too long."""

from __future__ import annotations

import re
from collections.abc import Iterator

from qadeploy.core.encoded_text import trimmed
from qadeploy.corpus.records import Cut, Document, Heading

# Code points of a passage: in most languages, this much text and a question fit into one window of 384 tokens.
LONGEST = 800
BETWEEN = " > "  # separates the headings of a place
_BLANK = re.compile(r"\n[^\S\n]*\n|\u2029|\f")
_SENTENCE_END = re.compile(r"[.!?][\"'”’)\]]*(?=\s)|[。！？]|\n")
_MOST_TITLE = 120  # code points of a heading in a place


def cut(document: Document) -> Iterator[Cut]:
    """Cuts a document into passages, in order. They cover every code point except white space around paragraphs.

    A passage never crosses a heading or a page. Short paragraphs of a section are joined, up to ``LONGEST`` code points.
    """
    line, counted = 1, 0
    for number, (start, end, headings) in enumerate(_sections(document), 1):
        for first, last in _packed(document.text, start, end):
            place = f"page {number}" if document.pages else headings or document.place
            if not place and document.has_lines:
                line += document.text.count("\n", counted, first)
                counted = first
                place = f"line {line}"
            yield Cut(first, last, place, headings)


def _sections(document: Document) -> Iterator[tuple[int, int, str]]:
    """The parts of a document that no passage crosses, each with the headings above it, or the title."""
    end = len(document.text)
    if document.pages:
        borders = [*document.pages[1:], end]
        for first, last in zip(document.pages, borders, strict=True):
            yield first, last, document.title
        return
    path: list[Heading] = []
    begin = 0
    for heading in document.headings:
        # A heading right below another one starts no new section: both share one.
        if document.text[path[-1].end if path else 0 : heading.start].strip():
            yield begin, heading.start, _headings(document, path)
            begin = heading.start
        path = [*(above for above in path if above.level < heading.level), heading]
    yield begin, end, _headings(document, path)


def _headings(document: Document, path: list[Heading]) -> str:
    names = [name[:_MOST_TITLE] for name in (document.title, *(heading.title for heading in path)) if name]
    return BETWEEN.join(names[1:] if names[:1] == names[1:2] else names)


def _packed(text: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Joins neighbouring paragraphs, up to ``LONGEST`` code points."""
    held: tuple[int, int] | None = None
    for first, last in _pieces(text, start, end):
        if held and last - held[0] <= LONGEST:
            held = held[0], last
            continue
        if held:
            yield held
        held = first, last
    if held:
        yield held


def _pieces(text: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    """The paragraphs between two offsets, without surrounding white space; a long paragraph in parts."""
    borders = [(found.start(), found.end()) for found in _BLANK.finditer(text, start, end)]
    for first, last in zip([start, *(b for _, b in borders)], [*(a for a, _ in borders), end], strict=True):
        first, last = trimmed(text, first, last)
        while last - first > LONGEST:
            at = _part(text, first)
            begin, stop = trimmed(text, first, at)
            if begin < stop:
                yield begin, stop
            first, _ = trimmed(text, at, last)
        if first < last:
            yield first, last


def _part(text: str, first: int) -> int:
    """Where to cut a paragraph that is too long: after the last sentence, or else word, in the second half of what fits."""
    half, most = first + LONGEST // 2, first + LONGEST
    ends = [found.end() for found in _SENTENCE_END.finditer(text, half, most)]
    if ends:
        return ends[-1]
    return next((at for at in range(most, half, -1) if text[at - 1].isspace()), most)
