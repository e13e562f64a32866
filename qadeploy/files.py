"""Files on disk: hashing, atomic writes, and locks that allow one writer per path.

A file or folder is written to a temporary beside its final path, ``.NAME.qadeploy-RANDOM.tmp``, and then renamed. The writer
holds a lock on the temporary, which the system releases when the process ends, in any container of the host. So the next writer
can delete what a killed writer left behind, and never touches the temporary of a running one. Windows has no such locks: there
leftovers are not deleted, and two writers of one path are not kept apart.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import re
import secrets
import shutil
import socket
import stat
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from qadeploy.errors import InputError, QadeployError

if sys.platform != "win32":
    import fcntl

_TEMPORARY = re.compile(r"\.(?P<name>.+)\.qadeploy-[0-9a-f]{16}\.(?P<kind>tmp|old)", re.DOTALL)
_LOCK = "qadeploy lock: "
# Windows cannot rename an open file or open a folder, and translates line ends unless a file is opened as binary.
_WINDOWS = sys.platform == "win32"
BINARY = getattr(os, "O_BINARY", 0)
# Opening with these flags fails on a symbolic link, and does not wait on a pipe.
NO_LINK = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | BINARY
_PART = 2**26  # bytes per read
_TRIES = 3
_T = TypeVar("_T")
_position = threading.Lock()
_NO_REPLACE, _EXCHANGE, _HERE = 1, 2, -100  # RENAME_NOREPLACE, RENAME_EXCHANGE, AT_FDCWD of Linux
# Errors of a kernel, a file system or a container's seccomp filter without support for renameat2 or its flags.
_CANNOT = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM}


def cache_folder() -> Path | None:
    """Returns ``$QADEPLOY_CACHE``, or ``qadeploy`` in ``$XDG_CACHE_HOME`` or ``~/.cache``; None without a home folder."""
    own, shared = os.environ.get("QADEPLOY_CACHE"), os.environ.get("XDG_CACHE_HOME", "")
    if own:
        return Path(own)
    if Path(shared).is_absolute():  # the XDG specification says to ignore relative paths
        return Path(shared) / "qadeploy"
    try:
        return Path.home() / ".cache" / "qadeploy"
    except RuntimeError:
        return None


def hash_file(path: Path) -> str:
    """Returns the SHA-256 of a file, as hexadecimal text."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_at(descriptor: int, size: int, offset: int) -> bytes:
    """Does what ``os.pread`` does, also on Windows. Thread-safe."""
    if hasattr(os, "pread"):
        return os.pread(descriptor, size, offset)
    with _position:
        os.lseek(descriptor, offset, os.SEEK_SET)
        return os.read(descriptor, size)


class OpenFile:
    """A regular file, held open as long as this object lives: it stays readable even if another file replaces it.

    Args:
        path: The file.

    Raises:
        OSError: The file does not exist, or is a symbolic link or not a regular file.
    """

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, NO_LINK)
        weakref.finalize(self, os.close, self.descriptor)
        if not stat.S_ISREG(os.fstat(self.descriptor).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), str(path))

    @property
    def size(self) -> int:
        """The size of the file in bytes."""
        return os.fstat(self.descriptor).st_size

    def parts(self, begin: int, length: int) -> Iterator[bytes]:
        """Yields ``length`` bytes from ``begin`` in chunks; fewer bytes if the file ends before."""
        end = begin + length
        while begin < end and (part := read_at(self.descriptor, min(_PART, end - begin), begin)):
            yield part
            begin += len(part)

    def read(self, begin: int, length: int) -> bytes:
        """Returns ``length`` bytes from ``begin``, or fewer if the file ends before."""
        return b"".join(self.parts(begin, length))


def opened(folder: Path, open_: Callable[[], _T]) -> _T:
    """Returns what ``open_`` returns, and calls it again if it failed because ``folder`` was replaced meanwhile."""
    for _ in range(_TRIES):
        found = folder.stat().st_ino if folder.is_dir() else None
        try:
            return open_()
        except (QadeployError, OSError):
            if found is None or (folder.is_dir() and folder.stat().st_ino == found):
                raise
    return open_()


# ---------------------------------------------------------------- writing


def write_text(path: Path, text: str) -> None:
    """Writes text as UTF-8, atomically as ``write_bytes`` does."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Writes a value as indented JSON, atomically as ``write_bytes`` does."""
    write_text(path, json_text(value) + "\n")


def json_text(value: Any) -> str:
    """Returns a value as indented JSON. Bytes of a path that are not UTF-8 become escapes."""
    return json.dumps(value, indent=2, ensure_ascii=False).encode("utf-8", "backslashreplace").decode()


def write_bytes(path: Path, data: bytes) -> None:
    """Writes bytes to a temporary beside ``path``, flushes it to the disk, and renames it to ``path``."""
    with writing(path) as stream:
        stream.write(data)


def append_line(descriptor: int, line: bytes) -> None:
    """Appends a line to an open file and flushes it to the disk.

    Args:
        descriptor: The file, open for writing.
        line: The line, including its line break.

    Raises:
        OSError: The line could not be written; then no part of it is in the file.
    """
    size = os.lseek(descriptor, 0, os.SEEK_END)
    try:
        while line:
            line = line[os.write(descriptor, line) :]
        os.fsync(descriptor)
    except OSError:
        with suppress(OSError):
            os.ftruncate(descriptor, size)
        raise


class _Named(io.FileIO):
    """A stream whose errors name its file: the error for a full disk does not say which file was being written."""

    def __init__(self, descriptor: int, path: Path) -> None:
        super().__init__(descriptor, "wb")
        self._path = path

    def write(self, data: Any, /) -> int:
        """Writes bytes. Raises OSError with the path of the file."""
        try:
            return super().write(data)
        except OSError as error:
            error.filename = str(self._path)
            raise


@contextmanager
def writing(path: Path, *, new: bool = False) -> Iterator[BinaryIO]:
    """Opens a temporary beside ``path`` for writing; on exit without an error it is flushed to the disk and renamed to ``path``.

    With ``new``, it raises FileExistsError if ``path`` exists by then.
    """
    try:
        temporary, descriptor = _begin(path, lambda at: os.open(at, os.O_RDWR | os.O_CREAT | os.O_EXCL | BINARY, 0o666))
        try:
            with io.BufferedWriter(_Named(descriptor, path)) as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
                if _WINDOWS:
                    stream.close()
                (_rename_new if new else os.replace)(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        if error.filename is None or _TEMPORARY.fullmatch(Path(os.fsdecode(error.filename)).name):
            error.filename = str(path)  # the error for a full disk names no file
        raise


@contextmanager
def temporary_folder(place: Path) -> Iterator[Path]:
    """Yields a new folder beside ``place``, which the caller may rename to ``place``; otherwise it is deleted on exit.

    Missing parent folders are created. Temporaries that killed writers of ``place`` left behind are deleted first.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    sweep(place.parent, place.name)
    temporary, descriptor = _begin(place, _make_folder)
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        os.close(descriptor)


def sweep(folder: Path, name: str | None = None) -> None:
    """Deletes the temporaries in ``folder`` whose writers are gone: those for ``name``, or all."""
    for path in _temporaries(folder, name, "tmp"):
        with suppress(OSError):  # another process may be sweeping too
            descriptor = os.open(path, NO_LINK)
            try:
                if lock(descriptor):
                    _delete(path)
            finally:
                os.close(descriptor)


def _begin(place: Path, make: Callable[[Path], int]) -> tuple[Path, int]:
    """Returns the path of a new temporary and its locked descriptor. ``make`` creates and opens the temporary."""
    while True:
        path = _beside(place, "tmp")
        try:
            descriptor = make(path)
        except FileNotFoundError:
            if not place.parent.is_dir():
                raise
            continue  # another process swept it before it was opened
        with suppress(BlockingIOError, FileNotFoundError):  # another process sweeps or swept it before it was locked
            if not lock(descriptor) or os.path.samestat(os.fstat(descriptor), path.lstat()):
                return path, descriptor
        os.close(descriptor)


def _make_folder(path: Path) -> int:
    path.mkdir()
    return os.open(os.devnull if _WINDOWS else path, os.O_RDONLY)


def _beside(place: Path, kind: str) -> Path:
    return place.with_name(f".{place.name}.qadeploy-{secrets.token_hex(8)}.{kind}")


def is_temporary(name: str) -> bool:
    """Returns whether a file name is that of a temporary or a lock of this module."""
    return bool(_TEMPORARY.fullmatch(name)) or (name.startswith(".") and name.endswith(".qadeploy-lock"))


def _temporaries(folder: Path, name: str | None, kind: str) -> list[Path]:
    try:
        found = [(_TEMPORARY.fullmatch(entry.name), Path(entry.path)) for entry in os.scandir(folder)]
    except OSError:
        return []
    return [path for match, path in found if match and match["kind"] == kind and name in {None, match["name"]}]


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


# ---------------------------------------------------------------- one writer at a time


def lock(descriptor: int) -> bool:
    """Locks an open file or folder until it is closed. Returns False on Windows or a file system without locks.

    Raises BlockingIOError if another process or thread holds the lock.
    """
    if sys.platform == "win32":
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        return False
    return True


@contextmanager
def holding(place: Path, shown: Path | None = None) -> Iterator[None]:
    """Reserves a path for one writer, and cleans up after killed writers.

    Their temporaries are deleted, and a folder that one of them had moved away to replace it is moved back. The lock is on the
    file ``.NAME.qadeploy-lock`` beside the path, which is removed on exit; the system releases the lock if its holder dies.
    It works across containers that share the folder, and across hosts if their file system has locks.

    Args:
        place: A file or folder, which need not exist.
        shown: What messages call it.

    Raises:
        InputError: Another process, or thread, holds the lock; the message says which, if that is known.
    """
    if sys.platform == "win32":
        yield
        return
    path = place.with_name(f".{place.name}.qadeploy-lock")
    descriptor, locked = _acquire(path, shown or place)
    try:
        if locked:
            sweep(place.parent, place.name)
            for old in _temporaries(place.parent, place.name, "old"):
                _delete(old) if os.path.lexists(place) else os.replace(old, place)
            os.ftruncate(descriptor, 0)
            since = time.strftime("%Y-%m-%d %H:%M:%S")
            os.pwrite(descriptor, f"{_LOCK}process {os.getpid()} on {socket.gethostname()}, since {since}".encode(), 0)
        yield
    finally:
        if locked:
            path.unlink(missing_ok=True)
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing alone would not unlock it in children forked meanwhile
        os.close(descriptor)


def _acquire(path: Path, place: Path) -> tuple[int, bool]:
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            error.filename = str(place)
            raise
        try:
            holder = os.pread(descriptor, 300, 0).decode(errors="replace")
            if holder and not holder.startswith(_LOCK):
                raise InputError(f"{path}: is in the way and not a lock of qadeploy: move it away")
            locked = lock(descriptor)
            if not locked or os.path.samestat(os.fstat(descriptor), path.lstat()):
                return descriptor, locked
        except FileNotFoundError:
            pass  # its holder has just removed it
        except BlockingIOError as error:
            os.close(descriptor)
            known = "".join(letter for letter in holder.removeprefix(_LOCK) if letter.isprintable())
            raise InputError(
                f"{place}: another command is writing it{f' ({known})' if known else ''}: wait until it ends, or give another "
                "name"
            ) from error
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


@contextmanager
def new_file(place: Path, flag: str) -> Iterator[Path]:
    """Reserves the path of a file that is yet to be written, so that no file is overwritten.

    Args:
        place: The file.
        flag: The option that names it, for messages.

    Raises:
        InputError: The path exists, another command is writing it, or its folder does not exist.
    """
    require_new(place, flag)
    with holding(place):
        require_new(place, flag)  # nobody else has written it meanwhile
        yield place


def require_new(place: Path, flag: str) -> None:
    """Raises InputError if ``place`` exists, or its folder does not; ``flag`` is the option that names it."""
    if not place.absolute().parent.is_dir():
        raise InputError(f"{flag} {place}: its folder does not exist")
    if os.path.lexists(place):
        raise InputError(f"{place}: exists already: remove it or give another {flag}")


# ---------------------------------------------------------------- folders


def sync(path: Path) -> None:
    """Flushes a file's bytes, or a folder's entries, to the disk. Windows can flush only files that are open for writing."""
    if _WINDOWS and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if _WINDOWS else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Flushes a folder and everything in it to the disk."""
    for path in (*folder.rglob("*"), folder):
        sync(path)


def replace_folder(new: Path, place: Path) -> None:
    """Renames the folder ``new`` to ``place``. If ``place`` exists, the two are exchanged and the old folder is deleted.

    A kill at any moment leaves the old or the new folder. Where the system cannot exchange folders, the old one is moved away,
    and moved back on failure or, after a kill in between, by the next ``holding(place)``.
    """
    if not os.path.lexists(place):
        os.replace(new, place)
    elif _rename(new, place, _EXCHANGE):
        _delete(new)
    else:
        old = _beside(place, "old")
        os.replace(place, old)
        try:
            os.replace(new, place)
        except BaseException:
            os.replace(old, place)
            raise
        _delete(old)
    sync(place.parent)


def _rename_new(source: Path, place: Path) -> None:
    """Renames a file, or raises FileExistsError if ``place`` exists."""
    if _rename(source, place, _NO_REPLACE):
        return
    if os.path.lexists(place):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(place))
    os.rename(source, place)


def _rename(source: Path, place: Path, flags: int) -> bool:
    """Renames with the flags of renameat2. Returns False if the system or file system lacks them. Raises OSError."""
    function = _renameat2()
    if function is None:
        return False
    import ctypes

    if function(_HERE, os.fsencode(source), _HERE, os.fsencode(place), flags) == 0:
        return True
    number = ctypes.get_errno()
    if number in _CANNOT:
        return False
    raise OSError(number, os.strerror(number), str(place))


@cache
def _renameat2() -> Callable[..., int] | None:
    import ctypes

    if sys.platform != "linux":
        return None
    try:
        function: Callable[..., int] = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):  # no glibc, or one before 2.28
        return None
    return function
