"""The files below a corpus folder. Links are not followed, so nothing outside the folder is read, even if it is untrusted."""

from __future__ import annotations

import errno
import io
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from qadeploy.corpus.records import Skipped
from qadeploy.errors import InputError
from qadeploy.files import NO_LINK, is_temporary

OnSkipped = Callable[[Skipped], object]
OnHidden = Callable[[str], object]
# Errors that are not going to pass: the file is gone or a link, or its reader has no right to it.
_LASTING = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EACCES, errno.EPERM, errno.ENXIO}


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


def scan(source: Path, skip: OnSkipped, hide: OnHidden = lambda _: None) -> Iterator[Found]:
    """Opens the files of a corpus one after the other, in the order of their paths.

    Args:
        source: The folder, or a single file.
        skip: Called with everything that is skipped: links, pipes, hidden files, files without read permission.
        hide: Called after ``skip`` with the path of a file or folder that an I/O error hides, which may pass.

    Raises:
        InputError: There is no such file or folder.
    """
    if not source.exists():
        raise InputError(f"{source}: no such file or folder: give a folder of documents, or a file")
    source = source.resolve()  # only this link is followed, because the caller named it
    if not source.is_dir():
        yield from _opened(_Folder(str(source.parent)), source.name, "", skip, hide)
        return

    yield from _walk(_Folder.opened(source), "", skip, hide)


@dataclass(frozen=True, slots=True)
class _Folder:
    """A folder, named by its path or, except on Windows, by a descriptor, which stays valid if the folder is replaced."""

    path: str
    descriptor: int | None = None

    @classmethod
    def opened(cls, path: str | Path, parent: int | None = None) -> _Folder:
        if not hasattr(os, "O_DIRECTORY"):
            return cls(os.fspath(path))
        return cls(os.fspath(path), os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=parent))

    def named(self, name: str) -> str:
        return name if self.descriptor is not None else os.path.join(self.path, name)

    def entries(self) -> list[tuple[str, bool]]:
        """The names in it, in order, and whether each is a folder, not a link to one."""
        with os.scandir(self.path if self.descriptor is None else self.descriptor) as found:
            return sorted((each.name, each.is_dir(follow_symlinks=False)) for each in found)

    def is_link(self, name: str) -> bool:
        return stat.S_ISLNK(os.lstat(self.named(name), dir_fd=self.descriptor).st_mode)

    def close(self) -> None:
        if self.descriptor is not None:
            os.close(self.descriptor)


def _walk(folder: _Folder, below: str, skip: OnSkipped, hide: OnHidden) -> Iterator[Found]:
    """The files of a folder, then those of the folders in it."""
    with closing(folder):
        try:
            entries = folder.entries()
        except OSError as error:
            _lost(below or "./", error, skip, hide)
            return
        for name, inside in entries:
            if name.startswith(".") and not is_temporary(name):
                skip(Skipped(shown(below + name) + "/" * inside, "hidden"))
            elif not inside and not is_temporary(name):
                yield from _opened(folder, name, below, skip, hide)
        for name in (name for name, inside in entries if inside and not name.startswith(".")):
            try:
                deeper = _Folder.opened(folder.named(name), folder.descriptor)
            except OSError as error:
                _lost(f"{below}{name}/", error, skip, hide)
            else:
                yield from _walk(deeper, f"{below}{name}/", skip, hide)


def _lost(path: str, error: OSError, skip: OnSkipped, hide: OnHidden) -> None:
    link = error.errno == errno.ELOOP
    skip(Skipped(shown(path), "a link, which is not followed" if link else f"cannot be read: {error.strerror}"))
    if error.errno not in _LASTING:
        hide(path.rstrip("/"))


def shown(path: str) -> str:
    """A path with escapes for bytes that are not UTF-8, and for characters that are not printable."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _opened(folder: _Folder, name: str, below: str, skip: OnSkipped, hide: OnHidden) -> Iterator[Found]:
    label = shown(below + name)
    try:
        if not hasattr(os, "O_NOFOLLOW") and folder.is_link(name):
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        descriptor = os.open(folder.named(name), NO_LINK, dir_fd=folder.descriptor)
    except OSError as error:
        _lost(below + name, error, skip, hide)
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
