"""The files below a corpus folder. Links are not followed, so nothing outside the folder is read, even if it is untrusted."""

from __future__ import annotations

import errno
import io
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from qadeploy.corpus.records import Skipped
from qadeploy.errors import InputError
from qadeploy.files import NO_LINK, is_temporary

OnSkipped = Callable[[Skipped], object]


@dataclass(frozen=True, slots=True)
class Found:
    """A regular file of a corpus.

    Attributes:
        path: Its path below the folder, with ``/``; bytes that are not UTF-8 are lone surrogates, as in ``os``.
        name: The path as printable text, for messages and JSON.
        stream: Its bytes, open as long as the file is the current one of ``scan``.
        size: Its size in bytes.
        changed: The times of its last changes in nanoseconds (mtime, ctime).
    """

    path: str
    name: str
    stream: io.BufferedReader
    size: int
    changed: tuple[int, int]


def scan(source: Path, skip: OnSkipped) -> Iterator[Found]:
    """Opens the files of a corpus one after the other, in the order of their paths.

    Args:
        source: The folder, or a single file.
        skip: Called with everything that is skipped: links, pipes, hidden files, files without read permission.

    Raises:
        InputError: There is no such file or folder.
    """
    if not source.exists():
        raise InputError(f"{source}: no such file or folder: give a folder of documents, or a file")
    source = source.resolve()  # only this link is followed, because the caller named it
    if not source.is_dir():
        yield from _opened(_Folder(str(source.parent)), source.name, "", skip)
        return

    def refused(error: OSError) -> None:
        below = os.path.relpath(os.fsdecode(error.filename or "."), source)
        skip(Skipped(shown(below) + "/", f"cannot be read: {error.strerror}"))

    for folder, folders, names in _walk(source, refused):
        below = os.path.relpath(folder.path, source).replace(os.sep, "/")
        below = "" if below == "." else below + "/"
        for name in folders.copy():
            link = folder.is_link(name)
            if link or name.startswith("."):
                skip(Skipped(f"{shown(below + name)}/", "a link, which is not followed" if link else "hidden"))
                folders.remove(name)
        folders.sort()
        for name in sorted(names):
            if is_temporary(name):
                continue
            if name.startswith("."):
                skip(Skipped(shown(below + name), "hidden"))
            else:
                yield from _opened(folder, name, below, skip)


@dataclass(frozen=True, slots=True)
class _Folder:
    """A folder, named by its path or, except on Windows, by a descriptor, which stays valid if the folder is replaced."""

    path: str
    descriptor: int | None = None

    def named(self, name: str) -> str:
        return name if self.descriptor is not None else os.path.join(self.path, name)

    def is_link(self, name: str) -> bool:
        return stat.S_ISLNK(os.lstat(self.named(name), dir_fd=self.descriptor).st_mode)


def _walk(source: Path, refused: Callable[[OSError], object]) -> Iterator[tuple[_Folder, list[str], list[str]]]:
    if hasattr(os, "fwalk"):
        for at, folders, names, descriptor in os.fwalk(source, onerror=refused):
            yield _Folder(at, descriptor), folders, names
    else:
        for at, folders, names in os.walk(source, onerror=refused):
            yield _Folder(at), folders, names


def shown(path: str) -> str:
    """A path with escapes for bytes that are not UTF-8, and for characters that are not printable."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _opened(folder: _Folder, name: str, below: str, skip: OnSkipped) -> Iterator[Found]:
    label = shown(below + name)
    try:
        if not hasattr(os, "O_NOFOLLOW") and folder.is_link(name):
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        descriptor = os.open(folder.named(name), NO_LINK, dir_fd=folder.descriptor)
    except OSError as error:
        link = error.errno == errno.ELOOP
        skip(Skipped(label, "a link, which is not followed" if link else f"cannot be read: {error.strerror}"))
        return
    with os.fdopen(descriptor, "rb") as stream:
        about = os.fstat(descriptor)
        if stat.S_ISREG(about.st_mode):
            yield Found(below + name, label, stream, about.st_size, (about.st_mtime_ns, about.st_ctime_ns))
        else:
            skip(Skipped(label, "not a plain file"))


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Turns an OSError while a file is read into an InputError that names the file."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{name}: cannot be read: {error.strerror}") from error
