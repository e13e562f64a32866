"""Markdown: the text stays as it is, so that places count in the file; only the headings are looked for."""

from __future__ import annotations

from itertools import pairwise

from qadeploy.corpus.records import Heading
from qadeploy.extras import import_extra


def markdown_headings(text: str) -> tuple[Heading, ...]:
    """The headings of a Markdown text, those with ``#`` and those that are underlined, and not what only looks like one.

    Raises:
        MissingExtraError: markdown-it-py is not installed.
    """
    parser = import_extra("markdown_it", "reading Markdown", "corpus", "markdown-it-py").MarkdownIt("commonmark")
    parser.disable(["inline", "text_join"])  # what a paragraph holds does not matter here
    # Its lines end at \n, \r\n or \r; each of them becomes one character below, so that lines are counted the same way.
    begins = [0]
    at = 0
    for line in text.splitlines(keepends=True):
        at += len(line)
        if line.endswith(("\n", "\r")):
            begins.append(at)
    begins.append(len(text))
    tokens = parser.parse(text)
    found = []
    for token, inline in pairwise(tokens):
        if token.type == "heading_open" and token.map and not token.level:
            first, last = token.map
            start, end = begins[first], begins[min(last, len(begins) - 1)]
            end = start + len(text[start:end].rstrip())
            found.append(Heading(start, end, int(token.tag[1:]), " ".join(inline.content.split())))
    return tuple(found)
