"""Builds or updates an index; an update reads only changed files."""

from __future__ import annotations

import hashlib
import shutil
import time
import zlib
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from qadeploy import __version__
from qadeploy.core.windows import rust_errors
from qadeploy.corpus.cutting import cut
from qadeploy.corpus.documents import Reader, documents_of, endings, reader_of, require_size, unread
from qadeploy.corpus.folder import (
    FILES,
    KIND,
    SCHEMA,
    SEARCH_FILE,
    TEXTS,
    IndexFolder,
    Place,
    Source,
    files_text,
    is_index,
    open_index,
    schema,
)
from qadeploy.corpus.records import Document, Skipped
from qadeploy.corpus.scanning import Found, reading, scan
from qadeploy.corpus.terms import ANALYZER, analyzer, prepared, require_tantivy
from qadeploy.errors import CorpusError, InputError, MissingExtraError, one_line
from qadeploy.files import holding, replace_folder, temporary_folder, write_text
from qadeploy.inference.bundle import seal
from qadeploy.machine import usable_cpus

_HEAP = 2**26  # bytes of terms that each of Tantivy's threads collects before it writes them
_MOST_THREADS = 4
# Nanoseconds. A file that changed less than this before it was read may have changed again with the same timestamp.
_TICK = 2_000_000_000
_COPIED = 2**22
_ENDING = 5.0  # seconds that Tantivy's threads have to end after an error
_KEPT = "; the version that was indexed before is kept"
OnFile = Callable[[int, str], object]


@dataclass(frozen=True, slots=True)
class Built:
    """The result of building an index.

    Attributes:
        folder: The index.
        files: The number of files in the index.
        documents: The number of documents in the index.
        passages: The number of passages in the index.
        added: The number of files that are new in the index.
        changed: The number of files that were read again.
        removed: The number of files that no longer exist, or can no longer be read.
        skipped: The files, folders and rows that are not in the index, each with the reason.
    """

    folder: Path
    files: int
    documents: int
    passages: int
    added: int
    changed: int
    removed: int
    skipped: tuple[Skipped, ...]

    @property
    def up_to_date(self) -> bool:
        """Whether no file had changed, so that nothing was written."""
        return not (self.added or self.changed or self.removed)


def build(source: Path, folder: Path, on_file: OnFile | None = None, *, replace_damaged: bool = False) -> Built:
    """Builds the index of a corpus, or updates an existing one.

    An interruption at any time leaves the old index, or none.

    Args:
        source: A folder of documents, or a file.
        folder: The folder of the index.
        on_file: Called with the number and the name of each file.
        replace_damaged: Whether an index that cannot be opened is rebuilt instead of raising an error.

    Raises:
        InputError: No file of the source can be read, ``folder`` holds something else, or another command is writing it.
        CorpusError: The existing index is damaged or of another version.
        MissingExtraError: Tantivy is not installed.
    """
    require_tantivy()
    source = Path(source)
    _check_place(folder)
    _refuse_inside(source, folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with holding(folder):
        _check_place(folder)
        try:
            old = open_index(folder) if is_index(folder) else None
        except CorpusError:
            if not replace_damaged:
                raise
            old = None
        try:
            return _Building(source, folder, old, on_file).run()
        except OSError as error:
            error.filename = error.filename or str(folder)  # the error for a full disk names no file
            raise


def _check_place(folder: Path) -> None:
    if not folder.name:
        raise InputError(f"{folder}: an index needs a folder of its own: give it a name")
    if folder.is_symlink():
        raise InputError(f"{folder}: is a link, which is not overwritten: give the folder itself or another name")
    if not folder.exists() or is_index(folder):
        return
    if not folder.is_dir() or any(folder.iterdir()):
        raise InputError(f"{folder}: exists and is not an index, so it is not overwritten: give another name")


def _refuse_inside(source: Path, folder: Path) -> None:
    """Raises InputError if the index would be a part of the corpus. Hidden folders, such as a cache, are not."""
    inner, outer = folder.resolve(), source.resolve()
    if (
        source.is_dir()
        and inner.is_relative_to(outer)
        and not any(p.startswith(".") for p in inner.relative_to(outer).parts)
    ):
        raise InputError(f"{folder}: lies in the corpus itself: give the index a folder outside of {source}")


class _Building:
    """One run over the files of a corpus."""

    def __init__(self, source: Path, folder: Path, old: IndexFolder | None, on_file: OnFile | None) -> None:
        self.source, self.folder, self.old = source, folder, old
        self.on_file = on_file or (lambda number, name: None)
        self.known = {each.path: each for each in old.sources} if old else {}
        self.next_id = 1 + max((each.id for each in self.known.values()), default=0)
        self.sources: list[Source] = []
        self.skipped: list[Skipped] = []
        self.added = self.changed = 0
        self.writer: _Writer | None = None

    def run(self) -> Built:
        with temporary_folder(self.folder) as work:
            try:
                return self._run(work)
            finally:
                if self.writer:
                    self.writer.close()

    def _run(self, work: Path) -> Built:
        for number, found in enumerate(scan(self.source, self.skipped.append, self._hidden), 1):
            self.on_file(number, found.name)
            reader = reader_of(found.name)
            if reader is None:
                self.skipped.append(unread(found.name))
                continue
            known = self.known.get(found.path)
            if known and _is_unchanged(found, known):
                self.sources.append(known)
                continue
            made = self._read(found, reader, work, known)
            if made:
                self.sources.append(made)
                self.added += known is None
                self.changed += known is not None and made is not known
        if not self.sources:
            raise self._nothing()
        built = Built(
            self.folder,
            len(self.sources),
            sum(each.documents for each in self.sources),
            sum(each.passages for each in self.sources),
            *(self.added, self.changed, len(self.known.keys() - {each.path for each in self.sources})),
            (*self.skipped, *(problem for each in self.sources for problem in each.skipped)),
        )
        if not built.up_to_date:
            writer = self._opened(work)
            for gone in {each.id for each in self.known.values()} - {each.id for each in self.sources}:
                writer.remove(gone)
            self._finish(work, writer, built)
        return built

    def _opened(self, work: Path) -> _Writer:
        """The writer, which is created once a file turns out to have changed."""
        self.writer = self.writer or _Writer(work, self.folder, self.old)
        return self.writer

    def _read(self, found: Found, reader: Reader, work: Path, known: Source | None) -> Source | None:
        """Reads a file into the index.

        If it cannot be read, adds the reason to ``skipped`` and returns None, or ``known`` after an I/O error.
        """
        problems: list[Skipped] = []
        writer: _Writer | None = None
        begin, documents, passages, id_ = 0, 0, 0, self.next_id
        checked = time.time_ns()
        self.next_id += 1
        try:
            require_size(found, reader)
            with reading(found.name):
                found.stream.seek(0)  # an error may have ended an earlier hash halfway
                sha256 = hashlib.file_digest(found.stream, "sha256").hexdigest()
                found.stream.seek(0)
            for document in documents_of(found, reader, problems.append):
                if writer is None:  # as late as possible, because creating it copies the old index
                    writer = self._opened(work)
                    begin = writer.size
                passages += writer.add(document, id_, begin)
                documents += 1
        except (InputError, MissingExtraError) as error:
            if writer:
                writer.take_back(id_, begin)
            reason = str(error).removeprefix(f"{found.name}: ")
            if known and isinstance(error.__cause__, OSError):  # which may pass
                self.skipped.append(Skipped(found.name, reason + _KEPT))
                return known
            self.skipped += [*problems, Skipped(found.name, reason)]
            return None
        return Source(
            *(found.path, id_, found.size, found.changed, checked, sha256),
            *(begin, writer.size - begin if writer else 0, documents, passages, tuple(problems)),
        )

    def _hidden(self, path: str) -> None:
        """Keeps the known files at ``path`` or below it, which an I/O error hides."""
        known = [each for each in self.known.values() if path in {".", each.path} or each.path.startswith(f"{path}/")]
        if known:
            self.sources += known
            last = self.skipped[-1]
            self.skipped[-1] = Skipped(last.path, last.reason + _KEPT)

    def _nothing(self) -> InputError:
        if not self.skipped:
            return InputError(f"{self.source}: holds no files: give a folder with {endings()}")
        most = 10
        lines = [f"{self.source}: no file can be read:", *(f"  {each}" for each in self.skipped[:most])]
        if len(self.skipped) > most:
            lines.append(f"  and {len(self.skipped) - most:,} more")
        return InputError("\n".join(lines))

    def _finish(self, work: Path, writer: _Writer, built: Built) -> None:
        sources = writer.finish(self.sources)
        write_text(work / FILES, files_text(sources, self.skipped))
        facts = {"files_read": built.files, "documents": built.documents, "passages": built.passages}
        created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        seal(work, {"schema": SCHEMA, "kind": KIND, "created": created, "qadeploy": __version__, **facts})
        _check_place(self.folder)  # something may have been put there meanwhile
        replace_folder(work, self.folder)


def _is_unchanged(found: Found, known: Source) -> bool:
    """Whether the bytes of a file are unchanged, judging by its timestamps or else by its hash."""
    if found.size != known.size:
        return False
    if found.changed == known.changed and max(found.changed) < known.checked - _TICK:
        return True
    same = False
    with suppress(OSError):  # ``_read`` reports the error
        same = hashlib.file_digest(found.stream, "sha256").hexdigest() == known.sha256
        found.stream.seek(0)
    return same


class _Writer:
    """Adds documents to an index in a temporary folder, which starts with the files of the old index."""

    def __init__(self, work: Path, folder: Path, old: IndexFolder | None) -> None:
        tantivy = require_tantivy()
        self._tantivy, self._work, self._folder, self._old = tantivy, work, folder, old
        if old:
            for name, file in old.files.items():
                if SEARCH_FILE.fullmatch(name):
                    with (work / name).open("wb") as stream:
                        stream.writelines(file.parts(0, file.size))
        self._schema = schema()
        threads = min(usable_cpus(), _MOST_THREADS)
        with _writing(folder):
            index = tantivy.Index(self._schema, path=str(work))
            index.config_reader(reload_policy="manual")  # or a thread would watch the folder, and make files in it
            index.register_tokenizer(ANALYZER, analyzer())
            self._writer = index.writer(heap_size=threads * _HEAP, num_threads=threads)
        self._texts: BinaryIO = (work / f"{TEXTS}.new").open("wb")
        self.size = 0

    def add(self, document: Document, file: int, begin: int) -> int:
        """Adds the passages of a document from ``file``, whose texts begin at ``begin``. Returns their number."""
        data = document.text.encode()
        first, at, done, count = self.size - begin, 0, 0, 0
        for count, piece in enumerate(cut(document), 1):  # noqa: B007 - the count is used after the loop
            at += len(document.text[done : piece.start].encode())
            text = document.text[piece.start : piece.end]
            bytes_ = text.encode()
            place = Place(
                *(document.name, piece.place, piece.start, piece.end, first + at, len(bytes_)),
                *(first, len(data), zlib.crc32(bytes_)),
            )
            at, done = at + len(bytes_), piece.end
            entry = self._tantivy.Document()
            entry.add_text("terms", prepared(piece.headings))
            entry.add_text("terms", prepared(text))
            entry.add_text("document", document.name)
            entry.add_unsigned("file", file)
            entry.add_bytes("place", place.to_bytes())
            with _writing(self._folder):
                self._writer.add_document(entry)
        self._texts.write(data)
        self.size += len(data)
        return count

    def close(self) -> None:
        """Closes the file of texts, and deletes the temporary folder if it is left, in which Tantivy's threads may still write."""
        with suppress(OSError):
            self._texts.close()
        until = time.monotonic() + _ENDING
        while self._work.exists() and time.monotonic() < until:
            shutil.rmtree(self._work, ignore_errors=True)
            time.sleep(0.01)

    def take_back(self, file: int, begin: int) -> None:
        """Removes a file that turned out to be unreadable halfway."""
        self.remove(file)
        self._texts.truncate(begin)
        self._texts.seek(begin)
        self.size = begin

    def remove(self, file: int) -> None:
        """Removes the passages of a file."""
        # By a query, which knows from the schema that the number is unsigned; deleting by term would delete nothing.
        self._writer.delete_documents_by_query(self._tantivy.Query.term_query(self._schema, "file", file))

    def finish(self, sources: list[Source]) -> list[Source]:
        """Writes the texts that stay, then the new ones. Returns the files with the places of their texts."""
        with _writing(self._folder):
            self._writer.commit()
            self._writer.wait_merging_threads()
        self._texts.close()
        new = self._work / f"{TEXTS}.new"
        placed: dict[int, Source] = {}
        with (self._work / TEXTS).open("wb") as texts:
            at = 0
            if self._old:
                old_ids = {each.id for each in self._old.sources}
                for each in sorted((s for s in sources if s.id in old_ids), key=lambda s: s.begin):
                    texts.writelines(self._old.files[TEXTS].parts(each.begin, each.length))
                    placed[each.id] = replace(each, begin=at)
                    at += each.length
            with new.open("rb") as stream:
                shutil.copyfileobj(stream, texts, _COPIED)
        new.unlink()
        for path in self._work.iterdir():
            if path.name.startswith(".tantivy-"):
                path.unlink()  # a lock
            else:
                shutil.copymode(self._work / TEXTS, path)  # Tantivy makes some files readable by their owner only
        return [placed.get(each.id) or replace(each, begin=each.begin + at) for each in sources]


def _writing(folder: Path) -> AbstractContextManager[None]:
    """Turns errors of Tantivy, such as its ValueError for a full disk, into a CorpusError."""
    return rust_errors(lambda error: CorpusError(f"{folder}: the index cannot be written: {one_line(error)}"))
