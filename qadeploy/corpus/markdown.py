"""Markdown: the text stays unchanged, so that offsets count in the file; only the headings are parsed."""

from __future__ import annotations

from itertools import pairwise

from qadeploy.corpus.records import Heading
from qadeploy.extras import import_extra


def markdown_headings(text: str) -> tuple[Heading, ...]:
    """The headings of a Markdown text, with ``#`` or underlined, but not what only looks like one, for example in code.

    Raises:
        MissingExtraError: markdown-it-py is not installed.
    """
    parser = import_extra("markdown_it", "reading Markdown", "corpus", "markdown-it-py").MarkdownIt("commonmark")
    parser.disable(["inline", "text_join"])  # the contents of paragraphs do not matter here
    # The parser's lines end at \n, \r\n or \r; splitlines() knows more line ends, which are ignored here.
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
