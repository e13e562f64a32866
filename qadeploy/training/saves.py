"""The saves of a run, ``checkpoint-STEP`` as the Trainer writes them: which are complete, which may be removed.

A save is complete once it has a ``complete.json``, which is written after all other files are on the disk and holds
their sizes. So a save that was cut short by a kill or a full disk is never taken for a complete one.
"""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qadeploy.errors import FailureError
from qadeploy.files import is_temporary, sync, sync_folder, write_json

SAVES = "checkpoints"
MARKER = "complete.json"
_PREFIX = "checkpoint-"
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# safetensors (by the names of Rust's io::ErrorKind) and torch.save give the reason only as text, not as an errno.
_FULL_SIGNS = ("StorageFull", "QuotaExceeded", "FileTooLarge", "No space left", "File too large")
# The files that transformers and TensorBoard write into their folders; used if a folder has no list of its files.
_USUAL = re.compile(
    r"(model|pytorch_model|tokenizer|optimizer|scheduler|scaler|rng_state|training_args|spm|spiece|sentencepiece)[\w.-]*"
    r"\.(safetensors|bin|pt|pth|model|index\.json)"
    r"|mean_of_epochs\.safetensors|(config|generation_config|qadeploy|special_tokens_map|added_tokens|tokenizer|tokenizer_config|vocab|trainer_state)\.json"
    r"|(vocab|merges)\.txt|[\w.-]+\.py|events\.out\.tfevents\.[\w.-]+"
)
_SAFETENSORS_TEMPORARY = re.compile(r"\.tmp\w{6}")  # safetensors renames it at the end
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
        return f"it has no {MARKER}, so it was not written completely"
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
    """The complete save of the highest step, or None. ``warn`` is called with a line for each save that is skipped.

    A save is useless without the save of the best epoch before it, which may become the result.
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
    older = {step for step in map(_step, saves.iterdir()) if step not in {newest, best, -1}}
    if best in {newest, None}:
        older -= {max((step for step in older if (saves / f"{_PREFIX}{step}" / MARKER).is_file()), default=-1)}
    for step in older:
        remove(saves / f"{_PREFIX}{step}")


def remove(folder: Path) -> None:
    """Removes the files of a save, its marker first, so that an interrupted removal leaves no save that looks complete.

    Foreign files stay, and then their folder stays too.
    """
    foreign = set(foreign_files(folder))
    (folder / MARKER).unlink(missing_ok=True)
    for path in sorted(folder.rglob("*"), reverse=True):  # a folder's contents before the folder
        with suppress(OSError):
            if path.is_dir() and not path.is_symlink():
                path.rmdir()
            elif path.relative_to(folder).as_posix() not in foreign:
                path.unlink()
    with suppress(OSError):
        folder.rmdir()


def remove_all(saves: Path) -> None:
    """Removes all saves, and their common folder if it is then empty."""
    remove_after(saves, -1)
    with suppress(OSError):
        saves.rmdir()


def files_in(folder: Path) -> list[str]:
    """The files of a folder, by their paths in it."""
    files = (p for p in folder.rglob("*") if p.is_symlink() or not p.is_dir())
    return sorted(p.relative_to(folder).as_posix() for p in files)


def foreign_files(folder: Path) -> list[str]:
    """The files in a save's or checkpoint's folder that do not belong to it, by their paths in it."""
    try:
        own = {MARKER, *json.loads((folder / MARKER).read_text(encoding="utf-8"))["files"]}
    except (OSError, ValueError, KeyError, TypeError):  # no marker, or a damaged one
        own = {MARKER, *filter(_USUAL.fullmatch, files_in(folder))}
    return [name for name in files_in(folder) if name not in own and not _is_left_behind(name)]


def _is_left_behind(name: str) -> bool:
    """Whether a kill in the middle of writing leaves a file of this name."""
    last = name.rpartition("/")[2]
    return bool(_SAFETENSORS_TEMPORARY.fullmatch(last)) or is_temporary(last)


def foreign_beside(saves: Path) -> list[str]:
    """The files in the folder of all saves that belong to none of them, by their paths in it."""
    found = []
    for path in saves.iterdir() if saves.is_dir() else ():
        inside = path.is_dir() and not path.is_symlink()
        if inside and _step(path) >= 0:
            found += [f"{path.name}/{name}" for name in foreign_files(path)]
        else:
            found += [f"{path.name}/{name}" for name in files_in(path)] if inside else [path.name]
    return sorted(found)


def _step(folder: Path) -> int:
    number = folder.name.removeprefix(_PREFIX)
    return int(number) if number.isdecimal() else -1


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Raises FailureError if writing fails in the block, and says whether the disk is full."""
    from safetensors import SafetensorError  # not needed by commands that only read runs

    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        text = " ".join(str(error).split())
        by_torch = any(sign in text for sign in _TORCH_SAVE_SIGNS)  # torch.save does not say why
        if isinstance(error, RuntimeError) and not by_torch:
            raise  # writing did not fail
        full = getattr(error, "errno", None) in _FULL or any(sign in text for sign in _FULL_SIGNS)
        why = "the disk is full, or a limit on the size of files is reached" if full else "the disk may be full"
        raise FailureError(f"{folder}: cannot be written, {why} ({text[:160]})") from error
