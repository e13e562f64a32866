"""HTML to text with headings. Scripts and styles are left out; list items become lines, and a blank line separates blocks."""

from __future__ import annotations

import re
from typing import Any

from qadeploy.corpus.records import Document, Heading
from qadeploy.errors import InputError, one_line
from qadeploy.extras import import_extra

_LEFT_OUT = frozenset({
    "script", "style", "template", "noscript", "svg", "math", "iframe", "object", "canvas", "select", "textarea", "head",
})  # fmt: skip
_LINES = frozenset({"br", "li", "tr", "dt", "dd", "option", "summary", "caption", "figcaption"})
_INLINE = frozenset({
    "a", "abbr", "acronym", "b", "bdi", "bdo", "big", "button", "cite", "code", "data", "del", "dfn", "em", "font", "i",
    "img", "input", "ins", "kbd", "label", "mark", "nobr", "q", "rp", "rt", "ruby", "s", "samp", "small", "span", "strike",
    "strong", "sub", "sup", "time", "tt", "u", "var", "wbr",
})  # fmt: skip
_GAPS = ("", " ", "\t", "\n", "\n\n")  # the gaps between two texts, from the weakest to the strongest
_SPACE = re.compile(r"[ \t\n\r\f\v]+")


class _Writer:
    """Joins texts with the strongest gap that was requested between them."""

    def __init__(self) -> None:
        self.parts: list[str] = []
        self.length = 0
        self._gap = 0

    def gap(self, strength: int) -> None:
        self._gap = max(self._gap, strength)

    def write(self, text: str | None, *, as_it_is: bool) -> None:
        if not text:
            return
        if not as_it_is:
            text = _SPACE.sub(" ", text)
            self.gap(int(text.startswith(" ")))
        kept = text if as_it_is else text.strip(" ")
        if kept:
            self.flush()
            self.parts.append(kept)
            self.length += len(kept)
            self.gap(int(not as_it_is and text.endswith(" ")))

    def flush(self) -> None:
        if self.length and self._gap:
            self.parts.append(_GAPS[self._gap])
            self.length += len(_GAPS[self._gap])
        self._gap = 0


def html_document(text: str, name: str) -> Document:
    """Reads HTML.

    Args:
        text: The file's text.
        name: The document's name.

    Raises:
        InputError: The parser cannot read the text.
        MissingExtraError: lxml is not installed.
    """
    etree = import_extra("lxml.etree", "reading HTML", "corpus")
    parser = etree.HTMLParser(encoding="utf-8", no_network=True, remove_comments=True, remove_pis=True, huge_tree=True)
    try:
        root = etree.fromstring(text.replace("\0", "").encode("utf-8"), parser) if text.strip() else None
    except (etree.LxmlError, ValueError) as error:
        raise InputError(f"{name}: not readable HTML: {one_line(error)}") from error
    if root is None:
        return Document(name, "")
    if any(problem.level_name == "FATAL" for problem in parser.error_log):  # the rest of the file was not read
        raise InputError(f"{name}: not readable HTML: {one_line(Exception(parser.error_log.last_error.message))}")
    title = root.find("head/title")
    return Document(
        name, *_walked(etree, root), title=" ".join((title.text or "").split()) if title is not None else ""
    )


def _walked(etree: Any, root: Any) -> tuple[str, tuple[Heading, ...]]:
    writer = _Writer()
    headings: list[Heading] = []
    walker = etree.iterwalk(root, events=("start", "end"))
    verbatim = 0  # how many <pre> are open
    begun: tuple[Any, int, int] | None = None  # the open heading, its offset, and its index in ``writer.parts``
    for event, element in walker:
        tag = element.tag
        strength = 0 if tag in _INLINE else 3 if tag in _LINES else 2 if tag in {"td", "th"} else 4
        writer.gap(strength)
        level = int(tag[1]) if len(tag) == 2 and tag[0] == "h" and tag[1] in "123456" else 0
        if event == "start":
            verbatim += tag == "pre"
            if level and begun is None:
                writer.flush()
                begun = element, writer.length, len(writer.parts)
            if tag in _LEFT_OUT:
                walker.skip_subtree()
            else:
                writer.write(element.text, as_it_is=verbatim > 0)
            continue
        verbatim -= tag == "pre"
        if begun and begun[0] is element:
            said = "".join(writer.parts[begun[2] :])
            if said.strip():
                headings.append(Heading(begun[1], writer.length, level, " ".join(said.split())))
            begun = None
        if element is not root:
            writer.write(element.tail, as_it_is=verbatim > 0)
    return "".join(writer.parts), tuple(headings)
