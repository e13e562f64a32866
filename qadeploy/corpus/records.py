"""The values of a corpus. All offsets count Unicode code points."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from qadeploy.records import Snippet


@dataclass(frozen=True, slots=True)
class Heading:
    """A heading in a document: ``text[start:end]`` is the heading with its markup.

    Attributes:
        start: Its first code point.
        end: One past its last code point.
        level: 1 for the title, 2 for a section, and so on.
        title: Its text, without markup.
    """

    start: int
    end: int
    level: int
    title: str


@dataclass(frozen=True, slots=True)
class Document:
    """The text of a file, or of a row of a file.

    Attributes:
        name: The path below the corpus folder; for a row, followed by ``#`` and its id, or ``:`` and its line.
        text: The text to which offsets refer.
        headings: Its headings, in order.
        pages: The offset at which each page begins; () without pages.
        title: Its title from outside the text, such as the title of an HTML page or the field of a row.
        place: The place of its passages, if it has neither title, headings nor pages.
        has_lines: Whether its lines are the lines of the file, so that a line can name a place.
    """

    name: str
    text: str
    headings: tuple[Heading, ...] = ()
    pages: tuple[int, ...] = ()
    title: str = ""
    place: str = ""
    has_lines: bool = False


@dataclass(frozen=True, slots=True)
class Cut:
    """The position of a passage in a document.

    Attributes:
        start: Its first code point.
        end: One past its last code point.
        place: The headings above it, its page, or its line.
        headings: The headings above it or the title, whose words are searched too; "" if there are none.
    """

    start: int
    end: int
    place: str
    headings: str = ""


@dataclass(frozen=True, slots=True)
class Skipped:
    """A file, folder or row that is not in the corpus.

    Attributes:
        path: Its path below the corpus folder.
        reason: Why, and what to do about it.
    """

    path: str
    reason: str

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


@dataclass(frozen=True, slots=True)
class Passage:
    """A passage of a document: ``corpus.text(document)[start:end] == text``.

    Attributes:
        document: The document's name.
        place: The headings above it, its page, or its line.
        start: Its first code point in the document.
        end: One past its last code point.
        text: The passage.
        score: How well it matches the question by BM25, from 0; comparable among the passages of one question only.
    """

    document: str
    place: str
    start: int
    end: int
    text: str
    score: float

    def to_dict(self) -> dict[str, Any]:
        """Returns the passage as plain JSON values."""
        return asdict(self)

    def about(self) -> dict[str, Any]:
        """Returns what results say about the passages that were read: document, place and score."""
        return {"document": self.document, "place": self.place, "score": self.score}


@dataclass(frozen=True, slots=True)
class CorpusAnswer:
    """An answer from a corpus: ``corpus.text(document)[start:end] == text``, in code points or the units that were requested.

    The empty text is the null answer ("not in these passages"), with an empty document and place.

    Attributes:
        text: The answer.
        score: A probability, among all spans of the passages that were read.
        document: The name of its document.
        place: The headings above it, its page, or its line.
        start: Where it starts in the document.
        end: Where it ends there, exclusive.
        snippet: The text around it, with offsets in the document; None for the null answer.
        passage: The index of its passage among those that were read, best first; None for the null answer.
    """

    text: str
    score: float
    document: str = ""
    place: str = ""
    start: int = 0
    end: int = 0
    snippet: Snippet | None = None
    passage: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Returns the answer as plain JSON values, without ``snippet`` and ``passage`` if they are None."""
        return {name: value for name, value in asdict(self).items() if value is not None}
