"""The files below a corpus folder. Links are not followed, so nothing outside the folder is read, whatever its author put in it."""

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
    """A plain file of a corpus.

    Attributes:
        path: Its path below the folder, with ``/``; bytes that are no UTF-8 are lone surrogates, as ``os`` has it.
        name: The path as people and JSON have it.
        stream: Its bytes, open as long as the file is the current one of ``scan``.
        size: Its size in bytes.
        changed: Nanoseconds of its last changes (content, then content or entry).
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
        skip: Told of what is passed over: links, pipes, hidden files, what may not be read.

    Raises:
        InputError: There is no such file or folder.
    """
    if not source.exists():
        raise InputError(f"{source}: no such file or folder: give a folder of documents, or a file")
    source = source.resolve()  # the one link that is followed: the caller named it
    if not source.is_dir():
        folder = os.open(source.parent, os.O_RDONLY)
        try:
            yield from _opened(folder, source.name, "", skip)
        finally:
            os.close(folder)
        return

    def refused(error: OSError) -> None:
        below = os.path.relpath(os.fsdecode(error.filename or "."), source)
        skip(Skipped(shown(below) + "/", f"cannot be read: {error.strerror}"))

    for at, folders, names, descriptor in os.fwalk(source, onerror=refused):
        below = os.path.relpath(at, source)
        below = "" if below == "." else below + "/"
        for name in folders.copy():
            link = stat.S_ISLNK(os.lstat(name, dir_fd=descriptor).st_mode)
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
                yield from _opened(descriptor, name, below, skip)


def shown(path: str) -> str:
    """A path with the bytes that are no UTF-8, and what is not printable, as escapes."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _opened(folder: int, name: str, below: str, skip: OnSkipped) -> Iterator[Found]:
    label = shown(below + name)
    try:
        descriptor = os.open(name, NO_LINK, dir_fd=folder)
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
    """Makes an error of the system while a file is read an InputError that names it."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{name}: cannot be read: {error.strerror}") from error
