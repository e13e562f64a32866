"""The folder of an index, verified when it is opened.

    manifest.json    schema, counts, size and SHA-256 of every other file, and its own SHA-256
    files.json       the indexed files, each with its hash and the position of its text, and the files that were skipped
    texts.bin        the texts of all documents, as UTF-8, one after the other
    *                Tantivy's files: the terms of every passage, and its ``Place``

It is written like a bundle: to a hidden folder beside its path, the manifest last, then flushed and renamed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any

from qadeploy.core.windows import rust_errors
from qadeploy.corpus.records import Skipped
from qadeploy.corpus.terms import ANALYZER, analyzer, require_tantivy
from qadeploy.errors import CorpusError, InputError
from qadeploy.files import OpenFile, opened
from qadeploy.inference.bundle import MANIFEST, manifest_text
from qadeploy.inference.manifest import parse_json

SCHEMA = 1
KIND = "qadeploy corpus index"
FILES, TEXTS = "files.json", "texts.bin"
# The files of Tantivy: its lists of files, and segments, which are named by a UUID.
SEARCH_FILE = re.compile(r"meta\.json|\.managed\.json|[0-9a-f]{32}\.[\w.]{1,40}")
_MOST_MANIFEST = 2**24


@dataclass(frozen=True, slots=True)
class Source:
    """A file in the index.

    Attributes:
        path: Its path below the corpus folder; bytes that are not UTF-8 as lone surrogates.
        id: Its number in the index; a changed file gets a new one.
        size: Its size in bytes.
        changed: The times of its last changes when it was read, in nanoseconds.
        checked: The time at which it was read, in nanoseconds.
        sha256: The SHA-256 of its bytes.
        begin: Where its texts begin in ``texts.bin``, in bytes.
        length: The length of its texts, in bytes.
        documents: The number of its documents.
        passages: The number of its passages.
        skipped: The rows that could not be read.
    """

    path: str
    id: int
    size: int
    changed: tuple[int, int]
    checked: int
    sha256: str
    begin: int
    length: int
    documents: int
    passages: int
    skipped: tuple[Skipped, ...] = ()

    @classmethod
    def from_json(cls, values: list[Any]) -> Source:
        """Reads the values as ``files_text`` writes them. Raises ValueError or TypeError on anything else."""
        path, id_, size, changed, checked, sha256, begin, length, documents, passages, skipped = values
        numbers = (id_, size, checked, begin, length, documents, passages)
        if not (isinstance(path, str) and isinstance(sha256, str) and len(changed) == 2):
            raise ValueError("a file of other values")
        if not all(isinstance(number, int) and 0 <= number < 2**62 for number in numbers):
            raise ValueError("a file with a number out of range")
        return cls(
            *(path, id_, size, (changed[0], changed[1]), checked, sha256, begin, length, documents, passages),
            tuple(Skipped(str(a), str(b)) for a, b in skipped),
        )


@dataclass(frozen=True, slots=True)
class Place:
    """The position of a passage, which is stored with it. Byte offsets count from the beginning of the texts of its file.

    Attributes:
        document: The document's name.
        place: The headings above the passage, its page, or its line.
        start: Its first code point in the document.
        end: One past its last code point.
        begin: The offset of its first byte.
        length: Its number of bytes.
        document_begin: The offset of the document's first byte.
        document_length: The document's number of bytes.
        checksum: CRC-32 of its bytes; detects a change of the file while the index is in use.
    """

    document: str
    place: str
    start: int
    end: int
    begin: int
    length: int
    document_begin: int
    document_length: int
    checksum: int

    def to_bytes(self) -> bytes:
        """The values as JSON."""
        return json.dumps(astuple(self), ensure_ascii=False, separators=(",", ":")).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Place:
        """Reads the output of ``to_bytes``. Raises ValueError or TypeError on anything else."""
        values = json.loads(data)
        found = cls(*values)
        if not isinstance(found.document, str) or not isinstance(found.place, str):
            raise ValueError("a place without names")
        if not all(isinstance(number, int) and 0 <= number < 2**63 for number in values[2:]):
            raise ValueError("a place with a number out of range")
        return found


def schema() -> Any:
    """The fields of a passage in Tantivy's index."""
    tantivy = require_tantivy()
    builder = tantivy.SchemaBuilder()
    builder.add_text_field("terms", tokenizer_name=ANALYZER, index_option="freq")
    builder.add_text_field("document", tokenizer_name="raw", index_option="basic")
    builder.add_unsigned_field("file", stored=True, indexed=True)
    builder.add_bytes_field("place", stored=True)
    return builder.build()


@dataclass(frozen=True, slots=True)
class IndexFolder:
    """A verified index. Its files stay open, so that it remains readable while another index replaces it.

    Attributes:
        folder: The folder of the index.
        sources: The indexed files.
        skipped: The files that were skipped, and why.
        hash: SHA-256 of the manifest, which holds the hashes of all files, so it identifies the index.
    """

    folder: Path
    sources: tuple[Source, ...]
    skipped: tuple[Skipped, ...]
    hash: str
    files: Mapping[str, OpenFile] = field(repr=False, compare=False)

    def bytes_of(self, source: Source, begin: int, length: int) -> bytes:
        """Bytes of the texts of a file. Raises CorpusError if there are fewer."""
        if begin + length > source.length:
            raise _damaged(self.folder / TEXTS)
        data = self.files[TEXTS].read(source.begin + begin, length)
        if len(data) != length:
            raise _damaged(self.folder / TEXTS)
        return data

    def text_of(self, source: Source, place: Place) -> str:
        """The text of a passage. Raises CorpusError if it is not the text that was indexed."""
        data = self.bytes_of(source, place.begin, place.length)
        if zlib.crc32(data) != place.checksum:
            raise _damaged(self.folder / TEXTS)
        return data.decode("utf-8", "replace")

    def open_search(self) -> Any:
        """Opens Tantivy's index, which then no longer needs its files. Raises CorpusError if it cannot be read."""
        tantivy = require_tantivy()
        # Tantivy makes a lock file in the folder that it reads, but the index may be read-only. So it reads a temporary folder of
        # links to the open files (or copies, without /proc), which are the verified ones even if the index has been replaced.
        with _vanishing_folder() as view:
            for name, file in self.files.items():
                if SEARCH_FILE.fullmatch(name):
                    _show(file.descriptor, os.path.join(view, name))
            with rust_errors(lambda _: CorpusError(f"{self.folder}: its search files cannot be read: {_REBUILD}")):
                index = tantivy.Index.open(view)
                index.register_tokenizer(ANALYZER, analyzer())
                index.config_reader(reload_policy="manual")
                index.reload()
                return index


def _show(descriptor: int, place: str) -> None:
    """Makes an open file readable under a path."""
    if _LINUX:
        os.symlink(f"/proc/self/fd/{descriptor}", place)
        return
    with open(descriptor, "rb", closefd=False) as source, open(place, "wb") as copy:
        source.seek(0)
        shutil.copyfileobj(source, copy)


@contextmanager
def _vanishing_folder() -> Iterator[str]:
    """A temporary folder that is removed even if a thread of Tantivy makes its lock file there meanwhile."""
    folder = tempfile.mkdtemp(prefix="qadeploy-")
    try:
        yield folder
    finally:
        for _ in range(100):
            shutil.rmtree(folder, ignore_errors=True)
            if not os.path.exists(folder):
                break


_LINUX = sys.platform == "linux"
_REBUILD = "delete the folder and build it again with qadeploy index"


def _damaged(path: Path) -> CorpusError:
    return CorpusError(
        f"{path}: does not match the manifest (size or SHA-256 differ): it is damaged or was changed; {_REBUILD}"
    )


def is_index(folder: Path) -> bool:
    """Whether a folder holds an index of any version. It is not verified."""
    path = folder / MANIFEST
    if not path.is_file():
        return False
    try:
        with path.open("rb") as stream:
            return KIND.encode() in stream.read(200)
    except OSError:
        return False


def open_index(folder: Path) -> IndexFolder:
    """Opens an index and verifies all of its files.

    Raises:
        InputError: There is no such folder.
        CorpusError: The folder is not an index, or one of another version, incomplete, damaged, or unsafe.
    """
    return opened(folder, lambda: _open(folder))


def _open(folder: Path) -> IndexFolder:
    if not folder.is_dir():
        raise InputError(f"{folder}: no such index: make one with qadeploy index")
    listed, hash_ = _read_manifest(folder)
    names = {FILES, TEXTS}
    if not names <= listed.keys() or not all(name in names or SEARCH_FILE.fullmatch(name) for name in listed):
        raise CorpusError(f"{folder / MANIFEST}: lists other files than an index has: {_REBUILD}")
    extra = sorted(entry.name for entry in folder.iterdir() if entry.name not in {*listed, MANIFEST})
    if extra:
        raise CorpusError(
            f"{folder}: holds {', '.join(map(repr, extra[:5]))}, which the manifest does not list: remove it"
        )
    files = {name: _verified(folder / name, about) for name, about in listed.items()}
    sources, skipped = _read_files(folder, files[FILES])
    if any(source.begin + source.length > files[TEXTS].size for source in sources):
        raise CorpusError(f"{folder / FILES}: a text lies outside of {TEXTS}: {_REBUILD}")
    return IndexFolder(folder, sources, skipped, hash_, files)


def _read_manifest(folder: Path) -> tuple[dict[str, Any], str]:
    """The files that the manifest lists, and the SHA-256 of the manifest."""
    path = folder / MANIFEST
    if path.is_symlink() or not path.is_file():
        raise CorpusError(f"{folder}: has no {MANIFEST}: this is no index, or an unfinished one")
    try:
        if path.stat().st_size > _MOST_MANIFEST:
            raise CorpusError(f"{path}: is larger than any manifest: {_REBUILD}")
        data = path.read_bytes()
        manifest = parse_json(data.decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CorpusError(f"{path}: cannot be read: {error}: {_REBUILD}") from error
    if not isinstance(manifest, dict) or manifest.get("kind") != KIND:
        raise CorpusError(f"{folder}: is no index of a corpus: make one with qadeploy index")
    if manifest.get("schema") != SCHEMA:
        raise CorpusError(
            f"{path}: version {manifest.get('schema')!r} of the index is not {SCHEMA}, which this version of qadeploy reads: {_REBUILD}"
        )
    own = manifest.pop("manifest_sha256", None)
    if not isinstance(own, str) or manifest_text(manifest).encode() != data:
        raise CorpusError(f"{path}: does not match its own SHA-256: it is damaged or was changed; {_REBUILD}")
    files = manifest.get("files")
    if not isinstance(files, dict) or not all(
        isinstance(about, dict) and isinstance(about.get("size"), int) and isinstance(about.get("sha256"), str)
        for about in files.values()
    ):
        raise CorpusError(f"{path}: has no list of files with their hashes: {_REBUILD}")
    return files, hashlib.sha256(data).hexdigest()


def _verified(path: Path, about: Mapping[str, Any]) -> OpenFile:
    """Opens a file. Raises CorpusError if its size or SHA-256 is not that of the manifest."""
    try:
        file = OpenFile(path)
    except OSError as error:
        raise CorpusError(f"{path}: is missing or not a plain file: {_REBUILD}") from error
    try:
        with open(file.descriptor, "rb", closefd=False) as stream:
            hash_ = hashlib.file_digest(stream, "sha256").hexdigest() if file.size == about["size"] else ""
    except OSError as error:
        raise CorpusError(f"{path}: cannot be read: {error.strerror}") from error
    if hash_ != about["sha256"]:
        raise _damaged(path)
    return file


def _read_files(folder: Path, file: OpenFile) -> tuple[tuple[Source, ...], tuple[Skipped, ...]]:
    try:
        values = json.loads(file.read(0, file.size))
        sources = tuple(map(Source.from_json, values["files"]))
        skipped = tuple(Skipped(str(path), str(reason)) for path, reason in values["skipped"])
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise CorpusError(f"{folder / FILES}: cannot be used: {_REBUILD}") from error
    return sources, skipped


def files_text(sources: list[Source], skipped: list[Skipped]) -> str:
    """The content of ``files.json``, a line per file: its values without names, because there may be a million files."""
    files = ",\n".join(json.dumps(astuple(source)) for source in sources)
    rest = ",\n".join(json.dumps(astuple(each)) for each in skipped)
    return f'{{"files": [\n{files}\n], "skipped": [\n{rest}\n]}}\n'
