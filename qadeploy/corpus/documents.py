"""Files to documents. ``READERS`` lists the supported kinds of files; all others are reported with the reason."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import PurePosixPath

from qadeploy.corpus.html import html_document
from qadeploy.corpus.pdf import pdf_document
from qadeploy.corpus.records import Document, Heading, Skipped
from qadeploy.corpus.rows import row_documents
from qadeploy.corpus.scanning import Found, OnSkipped, reading
from qadeploy.data.formats import decode
from qadeploy.errors import InputError
from qadeploy.extras import import_extra

MOST_BYTES = 2**28  # the largest size of a file that is one document
# YAML between lines of three dashes, as Jekyll, Hugo and MkDocs write it at the beginning of a page.
_FRONT_MATTER = re.compile(r"---[ \t]*\r?\n\w[\w -]*:.*?^---[ \t]*\r?$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Reader:
    """A kind of file.

    Attributes:
        suffixes: The suffixes of file names.
        read: Makes a document from the bytes and the name of a file; None for files with a document per row.
    """

    suffixes: tuple[str, ...]
    read: Callable[[bytes, str], Document] | None


def markdown_headings(text: str) -> tuple[Heading, ...]:
    """The headings of a Markdown text, which itself stays unchanged, so that offsets count in the file.

    They begin with ``#`` or are underlined. What only looks like a heading, in code or in YAML front matter, is none.

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
    front = _FRONT_MATTER.match(text)
    found = []
    for token, inline in pairwise(tokens):
        if token.type == "heading_open" and token.map and not token.level:
            first, last = token.map
            start, end = begins[first], begins[min(last, len(begins) - 1)]
            if front and start < front.end():
                continue
            end = start + len(text[start:end].rstrip())
            found.append(Heading(start, end, int(token.tag[1:]), " ".join(inline.content.split())))
    return tuple(found)


def _markdown(content: bytes, name: str) -> Document:
    text = decode(content, name)
    return Document(name, text, markdown_headings(text), has_lines=True)


READERS = (
    Reader((".txt", ".text"), lambda content, name: Document(name, decode(content, name), has_lines=True)),
    Reader((".md", ".markdown"), _markdown),
    Reader((".html", ".htm", ".xhtml"), lambda content, name: html_document(decode(content, name), name)),
    Reader((".pdf",), pdf_document),
    Reader((".jsonl", ".ndjson"), None),
)


def reader_of(name: str) -> Reader | None:
    """The reader of a file, chosen by its suffix; None if there is none."""
    suffix = PurePosixPath(name).suffix.lower()
    return next((reader for reader in READERS if suffix in reader.suffixes), None)


def endings() -> str:
    """The supported suffixes, as text."""
    return ", ".join(suffix for reader in READERS for suffix in reader.suffixes)


def unread(name: str) -> Skipped:
    """The entry for a file that no reader reads."""
    suffix = PurePosixPath(name).suffix
    return Skipped(name, f"{f'ending {suffix!r}' if suffix else 'no ending'}; read are {endings()}")


def require_size(found: Found, reader: Reader) -> None:
    """Raises InputError if a file is too large to be one document."""
    if reader.read is not None and found.size > MOST_BYTES:
        raise InputError(f"{found.name}: {found.size:,} bytes are more than {MOST_BYTES:,}: split it")


def documents_of(found: Found, reader: Reader, skip: OnSkipped) -> Iterator[Document]:
    """Reads the documents of a file.

    Args:
        found: The file, at its beginning.
        reader: Its reader.
        skip: Called with each row that cannot be read.

    Raises:
        InputError: The file cannot be read; the message begins with its name.
        MissingExtraError: Its reader needs a package that is not installed.
    """
    with reading(found.name):
        if reader.read is None:
            yield from row_documents(found, skip)
            return
        document = reader.read(found.stream.read(MOST_BYTES + 1), found.name)
    if not document.text.strip():
        kind = "its pages hold no text, as scans do" if document.pages else "holds no text"
        raise InputError(f"{found.name}: {kind}")
    yield document
