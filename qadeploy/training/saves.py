"""The saves of a run, ``checkpoint-STEP`` as the Trainer writes them: which are complete, which may be removed.

A save is complete once it has a ``complete.json``, which is written after all else is on the disk and holds the size of every
file. So what a kill or a full disk leaves of a save is never taken for a whole one.
"""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from qadeploy.errors import FailureError
from qadeploy.files import sync, sync_folder, write_json

MARKER = "complete.json"
_PREFIX = "checkpoint-"
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# safetensors (by the names of Rust's io::ErrorKind) and torch.save say only in words what errno says in numbers.
_FULL_SIGNS = ("StorageFull", "QuotaExceeded", "FileTooLarge", "No space left", "File too large")
_TORCH_SAVE_SIGNS = ("PytorchStreamWriter", "unexpected pos")


@dataclass(frozen=True, slots=True)
class Save:
    """A complete save: its folder, its step, and the state of the run that ``mark_complete`` was given."""

    folder: Path
    step: int
    run_state: dict[str, Any]


def mark_complete(folder: Path, run_state: Mapping[str, Any]) -> None:
    """Flushes a save's files to the disk, then writes the marker that makes it complete."""
    sync_folder(folder)
    sizes = {str(p.relative_to(folder)): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}
    write_json(folder / MARKER, {"files": sizes, "progress": run_state})
    sync(folder)
    sync(folder.parent)


def find_flaw(folder: Path) -> str | None:
    """Why a save is not complete; None if it is."""
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        sizes, _ = dict(marker["files"]), marker["progress"]["best_step"]
    except FileNotFoundError:
        return f"it has no {MARKER}, so it was not written to its end"
    except (ValueError, KeyError, TypeError):
        return f"its {MARKER} is damaged"
    for name, size in sizes.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, not {size}"
    return None


def newest_complete(saves: Path, warn: Callable[[str], object] | None = None) -> Save | None:
    """The complete save of the highest step, None if there is none. ``warn`` gets a line for each that is skipped.

    A save is useless without that of the best epoch before it, which may become the result.
    """
    steps = {_step(p): p for p in saves.glob(f"{_PREFIX}*") if _step(p) >= 0}
    for step in sorted(steps, reverse=True):
        flaw = find_flaw(steps[step])
        if flaw is None:
            run_state = json.loads((steps[step] / MARKER).read_text(encoding="utf-8"))["progress"]
            best = run_state["best_step"]
            if not best or find_flaw(saves / f"{_PREFIX}{best}") is None:
                return Save(steps[step], step, run_state)
            flaw = f"the save of the best epoch before it, {_PREFIX}{best}, is not complete"
        if warn:
            warn(f"{steps[step]} is skipped: {flaw}")
    return None


def remove_after(saves: Path, step: int) -> None:
    """Removes the saves of higher steps, which are not complete."""
    for path in saves.glob(f"{_PREFIX}*"):
        if _step(path) > step:
            remove(path)


def prune(saves: Path, newest: int, best: int | None) -> None:
    """Removes all saves but the newest and the best one; if these are the same, all but the newest two."""
    older = sorted(step for step in map(_step, saves.iterdir()) if step not in {newest, best, -1})
    for step in older[:-1] if best in {newest, None} else older:
        remove(saves / f"{_PREFIX}{step}")


def remove(folder: Path) -> None:
    """Removes a save, its marker first, so that what a kill leaves of it is not taken for a whole one."""
    (folder / MARKER).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def _step(folder: Path) -> int:
    number = folder.name.removeprefix(_PREFIX)
    return int(number) if number.isdecimal() else -1


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Raises FailureError if writing fails in the block, and says whether the disk is full."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        text = " ".join(str(error).split())
        by_torch = any(sign in text for sign in _TORCH_SAVE_SIGNS)  # it does not say why
        if isinstance(error, RuntimeError) and not by_torch:
            raise  # writing did not fail
        full = getattr(error, "errno", None) in _FULL or any(sign in text for sign in _FULL_SIGNS)
        why = "the disk is full, or a limit on the size of files is reached" if full else "the disk may be full"
        raise FailureError(f"{folder}: cannot be written, {why} ({text[:160]})") from error
