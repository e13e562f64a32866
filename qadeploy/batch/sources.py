"""The files that ``--input`` names: paths, folders and globs, on this machine or in an object store.

A name with ``://`` is opened by a file system of pyarrow (s3, gs, hdfs, abfs, file; its options, such as ``region``,
follow a ``?``), any other name by the operating system.
"""

from __future__ import annotations

import glob
import io
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast
from urllib.parse import quote

from qadeploy.data.formats import READERS
from qadeploy.errors import InputError, one_line
from qadeploy.extras import import_extra
from qadeploy.shipped import HANDBOOK

LINES = frozenset({".jsonl", ".ndjson"})
PARQUET = ".parquet"
_WHOLE = frozenset(suffix for reader in READERS for suffix in reader.suffixes) - LINES - {PARQUET} | {".gz"}
_USABLE = LINES | _WHOLE | {PARQUET}
_KINDS = ", ".join(sorted(_USABLE))
_WILD = re.compile(r"[*\[]")


@dataclass(frozen=True, slots=True)
class Source:
    """One input file.

    Attributes:
        path: The path or URI, which opens the file on any machine that can reach it.
        name: The name that distinguishes it from the other files in ids and messages.
        size: Its size in bytes when the plan was made; 0 for ``hub:NAME``.
        modified: Its modification time then, in ns since 1970; 0 for ``hub:NAME``.
    """

    path: str
    name: str
    size: int
    modified: int

    @property
    def kind(self) -> str:
        """Its suffix in lower case; "" for ``hub:NAME``."""
        return "" if self.path.startswith("hub:") else PurePosixPath(_bare(self.path)).suffix.lower()

    @property
    def remote(self) -> bool:
        """Whether a file system of pyarrow opens it."""
        return "://" in self.path

    def stat(self) -> Source:
        """The file with its current size and time. Raises InputError if it is gone."""
        return replace(source_at(self.path), name=self.name) if self.kind else self

    def open(self) -> BinaryIO:
        """A seekable stream of its bytes. Raises OSError, InputError (pyarrow cannot open the file system)."""
        if not self.remote:
            return open(self.path, "rb")
        system, path = _system(self.path)
        return cast(BinaryIO, io.BufferedReader(system.open_input_file(path), 2**20))


def source_at(path: str) -> Source:
    """The source at a path, with its current size and time, named by its path. Raises InputError if there is none."""
    if path.startswith("hub:"):
        return Source(path, path, 0, 0)
    if "://" in path:
        system, place = _system(path)
        found = _listed(path, lambda: system.get_file_info(place))
        if not found.is_file:
            raise InputError(f"{path}: no such file")
        return Source(path, path, found.size, found.mtime_ns or 0)
    try:
        state = os.stat(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: no such file, or not readable ({one_line(error)})") from error
    return Source(path, path, state.st_size, state.st_mtime_ns)


def expand(patterns: Sequence[str]) -> list[Source]:
    """The files that patterns name, each once, in the order of the patterns and by name within a pattern.

    A pattern is a path, a folder (its files with a known suffix, except those that begin with ``.`` or ``_``), a glob
    (``**`` for folders at any depth), ``handbook``, ``hub:NAME``, or a URI with ``://`` in an object store.
    Local paths become absolute. Raises InputError if a pattern names no file, or a file of another kind.
    """
    paths = dict.fromkeys(path for pattern in patterns for path in _expanded(pattern))
    if not paths:
        raise InputError("--input: name at least one file of questions")
    sources = [source_at(path) for path in paths]
    for source in sources:
        if source.kind and source.kind not in _USABLE:
            raise InputError(f"{source.path}: unknown ending {source.kind!r}: give files in {_KINDS}")
        if source.kind and not source.size:
            raise InputError(f"{source.path}: the file is empty; it needs at least one row with context and question")
    return [replace(source, name=name) for source, name in zip(sources, _names(sources), strict=True)]


def _names(sources: Sequence[Source]) -> list[str]:
    """Names that distinguish the sources: their paths relative to the deepest folder that contains all of them.

    Bytes that are not UTF-8 become escapes, so that ids with these names can be written.
    """
    paths = [PurePosixPath(_bare(source.path)) for source in sources]
    parents = [path.parent.parts for path in paths]
    shared = 0
    while all(len(parts) > shared and parts[shared] == parents[0][shared] for parts in parents):
        shared += 1
    return ["/".join(path.parts[shared:]).encode("utf-8", "backslashreplace").decode() for path in paths]


def _bare(path: str) -> str:
    """The path; of a URI, what precedes its options."""
    return path.partition("?")[0] if "://" in path else path


def _expanded(pattern: str) -> Iterable[str]:
    if pattern.startswith("hub:"):
        return [pattern]
    if "://" in pattern:
        return _remote(pattern)
    if pattern == "handbook":
        return [os.path.abspath(HANDBOOK)]
    if os.path.isdir(pattern):
        return [
            os.path.abspath(path) for path in _usable(pattern, [e.path for e in os.scandir(pattern) if e.is_file()])
        ]
    if os.path.exists(pattern):
        return [os.path.abspath(pattern)]
    if not re.search(r"[*?\[]", pattern):
        raise InputError(
            f"{pattern}: no such file. Give files, folders or globs of {_KINDS}, 'handbook', 'hub:NAME' or s3://..."
        )
    found = sorted(path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path))
    if not found:
        raise InputError(f"{pattern}: no file matches")
    return [os.path.abspath(path) for path in found]


def _usable(folder: str, paths: Iterable[str]) -> list[str]:
    """The paths with a known suffix, sorted. Raises InputError if there are none."""
    named = ((path, PurePosixPath(path)) for path in sorted(paths))
    found = [path for path, p in named if not p.name.startswith((".", "_")) and p.suffix.lower() in _USABLE]
    if not found:
        raise InputError(f"{folder}: the folder holds no file in {_KINDS}")
    return found


def _remote(pattern: str) -> list[str]:
    """The URIs that a URI names: itself, the files of a folder, or the matches of a glob."""
    bare, mark, query = pattern.partition("?")  # options follow ?, so it is not a wildcard here
    scheme, _, rest = bare.partition("://")
    wild = _WILD.search(rest)
    base = rest[: rest.rfind("/", 0, wild.start()) + 1] if wild else rest

    def uri(path: str) -> str:
        return f"{scheme}://{'/' if rest.startswith('/') else ''}{path.lstrip('/')}{mark}{query}"

    system, place = _system(f"{scheme}://{base}{mark}{query}")
    from pyarrow import fs

    if not wild:
        found = _listed(pattern, lambda: system.get_file_info(place))
        if found.is_file:
            return [pattern]
        below = _listed(pattern, lambda: system.get_file_info(fs.FileSelector(place, allow_not_found=True)))
        if not below:
            raise InputError(f"{pattern}: no such file")
        return [uri(path) for path in _usable(pattern, [e.path for e in below if e.is_file])]
    deep = "/" in rest[len(base) :]
    below = _listed(pattern, lambda: system.get_file_info(fs.FileSelector(place, recursive=deep, allow_not_found=True)))
    wanted = rest[len(base) :].split("/")
    head = place.rstrip("/") + "/"
    paths = [e.path for e in below if e.is_file and _matches(e.path.removeprefix(head).split("/"), wanted)]
    if not paths:
        raise InputError(f"{pattern}: no file matches")
    return [uri(path) for path in sorted(paths)]


def _matches(parts: Sequence[str], wanted: Sequence[str]) -> bool:
    """Whether the parts of a path match those of a glob, in which ``**`` stands for any number of folders."""
    if not wanted:
        return not parts
    if wanted[0] == "**":
        return _matches(parts, wanted[1:]) or (bool(parts) and _matches(parts[1:], wanted))
    return bool(parts) and fnmatchcase(parts[0], wanted[0]) and _matches(parts[1:], wanted[1:])


def _system(uri: str) -> tuple[Any, str]:
    fs = import_extra("pyarrow.fs", f"reading {uri}", "parquet")
    bare, mark, query = uri.partition("?")
    scheme, _, rest = bare.partition("://")
    try:  # users write names unquoted; pyarrow expects them quoted as in a URI
        system, path = fs.FileSystem.from_uri(f"{scheme}://{quote(rest, safe='/:@')}{mark}{query}")
    except (OSError, ValueError, TypeError, ImportError) as error:  # ArrowInvalid is a ValueError
        raise InputError(f"{uri}: the file system cannot be opened: {one_line(error)}") from error
    return system, path


def _listed(uri: str, ask: Any) -> Any:
    try:
        return ask()
    except OSError as error:
        raise InputError(f"{uri}: cannot be listed: {one_line(error)}") from error


def local_folder(path: str) -> Path:
    """The path as a folder on this machine. Raises InputError on a URI."""
    if "://" in path:
        raise InputError(
            f"{path}: answers are written to a local folder, which on a cluster every machine must see: name one and copy it later"
        )
    return Path(path)
