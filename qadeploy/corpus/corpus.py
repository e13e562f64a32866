"""``Corpus``: a folder of documents that questions are answered from, each answer with its document and place."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn, Unpack

from qadeploy.core.settings import AnswerOptions, Offsets
from qadeploy.core.windows import rust_errors
from qadeploy.corpus.building import OnFile, build
from qadeploy.corpus.folder import IndexFolder, Place, Source, is_index, open_index
from qadeploy.corpus.options import READ, SNIPPET
from qadeploy.corpus.records import CorpusAnswer, Passage, Skipped
from qadeploy.corpus.terms import require_tantivy, terms_of
from qadeploy.errors import CorpusError, InputError
from qadeploy.files import cache_folder
from qadeploy.inference.answerer import Answerer
from qadeploy.inference.pairs import check_text
from qadeploy.inference.presenting import in_units
from qadeploy.records import Answer

_TIED = 20  # passages fetched beyond the limit, so that equal scores at the limit can be ordered


class Corpus:
    """Documents that questions are answered from: BM25 finds passages, and the model reads the best. Thread-safe.

    Open it with ``build``, ``load`` or ``open``.

    Args:
        index: A verified index.
        skipped: What is not in the corpus, and why; None to take it from the index.

    Attributes:
        skipped: The files, folders and rows that are not in the corpus, each with its reason.

    Example:
        >>> corpus = Corpus.build("manuals", "indexes/manuals")
        >>> for answer in corpus.answer(Answerer.load(), "Who trims the light?"):
        ...     print(answer.text, answer.document, answer.place, answer.start, answer.end)
    """

    def __init__(self, index: IndexFolder, skipped: Sequence[Skipped] | None = None) -> None:
        rows = [problem for source in index.sources for problem in source.skipped]
        self.skipped = tuple([*index.skipped, *rows] if skipped is None else skipped)
        self._index = index
        self._passages = sum(source.passages for source in index.sources)
        self._sources = {source.id: source for source in index.sources}
        self._search = index.open_search()
        self._tantivy = require_tantivy()

    @classmethod
    def build(cls, source: str | Path, folder: str | Path, on_file: OnFile | None = None) -> Corpus:
        """Builds or updates an index, and opens it.

        Args:
            source: A folder of documents, or a file: text, Markdown, HTML, PDF, or JSONL with a document per row.
            folder: The folder of the index.
            on_file: Called with the number and the name of each file.

        Raises:
            InputError: No file of the source can be read, ``folder`` holds something else, or another command is writing it.
            CorpusError: The existing index is damaged or of another version.
            MissingExtraError: Tantivy is not installed.
        """
        built = build(Path(source), Path(folder), on_file)
        return cls(open_index(Path(folder)), built.skipped)

    @classmethod
    def load(cls, folder: str | Path) -> Corpus:
        """Opens an index and verifies all of its files.

        Args:
            folder: A folder made by ``build`` or ``qadeploy index``.

        Raises:
            InputError: There is no such folder.
            CorpusError: The index is damaged, unsafe or of another version.
            MissingExtraError: Tantivy is not installed.
        """
        require_tantivy()
        return cls(open_index(Path(folder)))

    @classmethod
    def open(cls, place: str | Path, on_file: OnFile | None = None) -> Corpus:
        """Opens an index, or the documents themselves, whose index is then kept in ``$QADEPLOY_CACHE`` (``~/.cache/qadeploy``).

        Args:
            place: An index, or what ``build`` takes as its source.
            on_file: Called with the number and the name of each file, if there is no index yet.

        Raises:
            InputError, CorpusError, MissingExtraError: As ``load`` and ``build`` do.
        """
        if place == "":  # as a path it would be the working folder
            raise InputError("the name of the corpus is empty: give a folder, a file or an index")
        place = Path(place)
        if is_index(place):
            return cls.load(place)
        cache = cache_folder()
        if cache is None:
            raise InputError(
                "there is no home folder to keep the index in: set QADEPLOY_CACHE, or make one with qadeploy index"
            )
        name = hashlib.sha256(os.fsencode(place.resolve())).hexdigest()[:32]
        built = build(place, cache / "corpora" / name, on_file, replace_damaged=True)
        return cls(open_index(built.folder), built.skipped)

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Corpus cannot be pickled: load the index in each process, with Corpus.load")

    @property
    def folder(self) -> Path:
        """The folder of the index."""
        return self._index.folder

    @property
    def hash(self) -> str:
        """SHA-256 of the index's manifest, which identifies the index."""
        return self._index.hash

    @property
    def files(self) -> int:
        """The number of files."""
        return len(self._index.sources)

    @property
    def documents(self) -> int:
        """The number of documents: each file is one, or each row of a JSONL file."""
        return sum(source.documents for source in self._index.sources)

    @property
    def passages(self) -> int:
        """The number of passages."""
        return self._passages

    def search(self, question: str, limit: int = 20) -> list[Passage]:
        """Finds the passages that match a question best by BM25, over their words and the words of their headings.

        Args:
            question: The question.
            limit: The largest number of passages.

        Returns:
            The passages, best first; none if no word of the question occurs in the corpus.

        Raises:
            InputError: The question is empty, or ``limit`` is below 1.
            CorpusError: The index was changed while it was open.
        """
        check_text("question", question)
        if limit < 1:
            raise InputError(f"limit must be a whole number from 1, not {limit!r}")
        query, schema = self._tantivy.Query, self._search.schema
        terms = [query.term_query(schema, "terms", term, index_option="freq") for term in terms_of(question)]
        if not terms:
            return []
        wanted = query.boolean_query([(self._tantivy.Occur.Should, term) for term in terms])
        # Tantivy orders equal scores by indexing order, which depends on threads and updates.
        found = self._found(wanted, min(limit + _TIED, self.passages))
        found.sort(key=lambda each: (-each[0], each[2].document, each[2].start))
        return [
            Passage(place.document, place.place, place.start, place.end, self._index.text_of(source, place), score)
            for score, source, place in found[:limit]
        ]

    def text(self, document: str) -> str:
        """The text of a document, to which the offsets of its passages and answers refer.

        Raises:
            InputError: There is no document of this name.
            CorpusError: The index was changed while it was open.
        """
        wanted = self._tantivy.Query.term_query(self._search.schema, "document", document, index_option="basic")
        for _, source, place in self._found(wanted, 1):
            data = self._index.bytes_of(source, place.document_begin, place.document_length)
            return data.decode("utf-8", "replace")
        raise InputError(f"{document}: there is no such document in the corpus {self.folder}")

    def answer(
        self, answerer: Answerer, question: str, *, passages: int = READ, **options: Unpack[AnswerOptions]
    ) -> list[CorpusAnswer]:
        """Answers a question from the passages that match it best, which the model reads together.

        Args:
            answerer: The model.
            question: The question.
            passages: How many passages the model reads.
            **options: See ``AnswerOptions``. ``snippet`` is 200 characters on each side by default.

        Returns:
            The ``top_k`` best answers, best first; none if no word of the question occurs in the corpus.

        Raises:
            QadeployError: As ``search`` and ``Answerer.answer`` do.
        """
        found = self.search(question, passages)
        if not found:
            return []
        options.setdefault("snippet", SNIPPET)
        offsets = options.pop("offsets", "codepoints")
        answers = answerer.answer(question, contexts=[passage.text for passage in found], **options)
        return self.placed(answers, found, offsets)

    def placed(
        self, answers: Sequence[Answer], passages: Sequence[Passage], offsets: Offsets = "codepoints"
    ) -> list[CorpusAnswer]:
        """Adds documents and places to answers that were read from passages: the last step of ``answer``.

        Args:
            answers: The answers to the texts of ``passages`` as ``contexts``, with offsets in code points.
            passages: The passages that ``search`` found.
            offsets: The unit of the offsets in the documents.
        """
        found = []
        begins: dict[int, int] = {}  # cached starts of passages in other units: converting a long document takes time
        for answer in answers:
            number = answer.passage
            if number is None:
                found.append(CorpusAnswer(answer.text, answer.score))
                continue
            passage = passages[number]
            start, end, snippet = answer.start, answer.end, answer.snippet
            places = [start, end, *((snippet.start, snippet.end) if snippet else ())]
            begin = passage.start
            if offsets != "codepoints":
                if number not in begins:
                    begins[number] = in_units(self.text(passage.document), [begin], offsets)[0]
                begin, places = begins[number], in_units(passage.text, places, offsets)
            places = [begin + place for place in places]
            found.append(
                CorpusAnswer(
                    *(answer.text, answer.score, passage.document, passage.place, places[0], places[1]),
                    snippet=snippet and replace(snippet, start=places[2], end=places[3]),
                    passage=number,
                )
            )
        return found

    def _found(self, query: Any, limit: int) -> list[tuple[float, Source, Place]]:
        damaged = f"{self.folder}: its search files cannot be used: build the index again"
        with rust_errors(lambda _: CorpusError(damaged)):
            searcher = self._search.searcher()
            hits = searcher.search(query, limit, count=False).hits
            stored = [(score, searcher.doc(address)) for score, address in hits]
            return [
                (score, self._sources[entry["file"][0]], Place.from_bytes(bytes(entry["place"][0])))
                for score, entry in stored
            ]
