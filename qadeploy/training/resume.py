"""Interrupted runs: where an unfinished run lies, and how it goes on.

An unfinished run is a folder whose ``run.json`` says ``"status": "running"``: the run folder itself,
or ``NAME.unfinished`` beside it where a finished run stands there until the new one replaces it.

    run.json      the record: options, data hash, base; "complete" only when everything else is written
    checkpoints/  the saves (training/saves.py)
    checkpoint/   the result, while it is being written
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qadeploy.errors import CheckpointError, InputError
from qadeploy.files import replace_folder, sync_folder, write_json
from qadeploy.shipped import base_model_path
from qadeploy.training import distributed
from qadeploy.training.callbacks import Say
from qadeploy.training.runs import RUN_FILE, UNFINISHED, read_status
from qadeploy.training.saves import Save, newest_complete, remove_after

SAVES = "checkpoints"
# These do not change what is trained, or are compared by content.
_FREE = frozenset(
    {
        "out",
        "save_steps",
        "device",
        "data",
        "dev_data",
        "eval_data",
        "base",
        "token",
        "n_best_size",
        "preprocessing_num_workers",
        "cache",
    }
)


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be done in ``folder``: all of the run, the rest after ``saved``, or (``finished``) nothing."""

    folder: Path
    record: dict[str, Any]
    saved: Save | None = None
    finished: bool = False


def find_unfinished(out: Path) -> Path | None:
    """The folder of the unfinished run whose run folder is to be ``out``, None where there is none."""
    if read_status(out) == "running":
        return out
    beside = out.with_name(out.name + UNFINISHED)
    return beside if read_status(beside) is not None else None


def check_unfinished(out: Path, resume: bool) -> None:
    """Raises InputError on an unfinished run in the way that is not to be resumed."""
    found = find_unfinished(out)
    if found and not resume:
        raise InputError(
            f"{found}: holds an unfinished run (interrupted, or still training): give --resume to go on with it, "
            "another --out, or remove the folder to start over"
        )


def recorded_options(out: Path) -> dict[str, Any]:
    """The options of the run in or beside ``out`` (unfinished or finished), {} where there is none."""
    try:
        options: dict[str, Any] = _read((find_unfinished(out) or out) / RUN_FILE)["options"]
    except (OSError, CheckpointError):
        return {}  # what is wrong there is said when the run is opened
    options.pop("out", None)
    with suppress(CheckpointError):
        if options.get("base") == base_model_path().name and not Path(options["base"]).exists():
            del options["base"]  # the model that ships is recorded by its name
    return options


@contextmanager
def open_run(out: Path, record: Mapping[str, Any], resume: bool, say: Say) -> Iterator[Plan]:
    """The run's folder for the time of the block, made or found by the first process and held by it alone.

    After a failure the folder stays where there is a complete save to resume from, else it goes.
    Raises InputError where the unfinished run has other options, data or base, and where another
    command is training in it.
    """
    locks: list[int] = []

    def begin() -> Plan:
        plan, lock = _begin(out, json.loads(json.dumps(record)), resume, say)
        locks.append(lock)
        return plan

    try:
        plan = distributed.from_first(begin)
        try:
            yield plan
        except BaseException:
            if distributed.is_first():
                _leave(plan.folder, out, say)
            raise
    finally:
        for lock in locks:
            os.close(lock)


def finish(plan: Plan, out: Path) -> None:
    """Marks a run complete that is whole but for that, and gives it its place. A kill at any point loses nothing."""
    sync_folder(plan.folder)
    write_json(plan.folder / RUN_FILE, {**plan.record, "status": "complete"})
    _publish(plan.folder, out)


# ---------------------------------------------------------------- beginning


def _begin(out: Path, record: dict[str, Any], resume: bool, say: Say) -> tuple[Plan, int]:
    """The plan, and the lock on its folder: a file descriptor."""
    check_unfinished(out, resume)
    found = find_unfinished(out)
    if found is None and resume:
        if read_status(out) == "complete":
            found = out
        else:
            say(f"{out}: holds no run to resume, so this one starts at its beginning")
    if found is None:
        folder = out if read_status(out) is None else out.with_name(out.name + UNFINISHED)
        _create(folder, record)
        return Plan(folder, record), _lock(folder)
    lock = _lock(found)
    try:
        return _go_on(out, found, record, say), lock
    except BaseException:
        os.close(lock)
        raise


def _create(folder: Path, record: dict[str, Any]) -> None:
    fresh = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        fresh.mkdir(parents=True)
        write_json(fresh / RUN_FILE, record)
        os.replace(fresh, folder)  # only with its record in it: a kill leaves nothing that is not known for what it is
    except OSError as error:
        if error.errno in {errno.ENOTEMPTY, errno.EEXIST}:
            raise InputError(f"{folder}: another command began a run in it just now: give another --out") from error
        raise
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _go_on(out: Path, folder: Path, record: dict[str, Any], say: Say) -> Plan:
    old = _read(folder / RUN_FILE)
    differing = find_differences(old, record)
    if differing:
        raise InputError(
            f"{folder}: the run cannot be resumed, because it was started otherwise:\n  "
            + "\n  ".join(differing)
            + "\nGive what it was started with (--resume takes over the options that are not given), "
            "or remove the folder to start over"
        )
    if old.get("status") == "complete":  # perhaps killed between its last line and its place
        _publish(folder, out)
        return Plan(out, old, finished=True)
    versions = old.get("versions", {})
    changed = {n: (versions.get(n), v) for n, v in record["versions"].items() if versions.get(n) != v}
    if changed:
        named = ", ".join(f"{name} {a} is now {b}" for name, (a, b) in changed.items())
        say(
            f"                 WARNING: {named}: the resumed run may differ in its last digits from one without a break"
        )
    was, now = (r.get("machine", {}).get("device") for r in (old, record))
    if was and was != now:
        say(f"                 WARNING: it was begun on {was} and goes on on {now}, so its last digits may differ")
    saved = newest_complete(folder / SAVES, say)
    step = saved.step if saved else 0
    remove_after(folder / SAVES, step)
    say(
        f"{folder}: resumes after step {step}"
        + (f", from {saved.folder.name}" if saved else ": it has no complete checkpoint yet")
    )
    record = {**record, "resumed_at_steps": [*old.get("resumed_at_steps", []), step]}
    write_json(folder / RUN_FILE, record)
    return Plan(folder, record, saved)


def find_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """A line for each thing that decides the weights and is not the same in two records of a run, as read from JSON."""
    before, after = old["options"], new["options"]
    lines = [
        f"--{name.replace('_', '-')} was {before[name]}, now {value}"
        for name, value in after.items()
        if name not in _FREE and name in before and before[name] != value
    ]
    if before.get("precision") == after.get("precision") and old.get("precision") != new["precision"]:
        lines.append(f"--precision {after.get('precision')} meant {old.get('precision')}, now {new['precision']}")
    if old.get("processes", 1) != new["processes"]:
        lines.append(f"the number of processes was {old.get('processes', 1)}, now {new['processes']}")
    for what, key, name in (
        ("data", "data_sha256", "data"),
        ("dev data", "dev_data_sha256", "dev_data"),
        ("held-out data", "eval_data_sha256", "eval_data"),
    ):
        if old.get(key) != new.get(key):
            lines.append(f"the {what} of {before.get(name)} are not those of {after[name]} now")
    base_before, base_after = old.get("base", {}), new["base"]
    same = "sha256" if base_before.get("sha256") and base_after["sha256"] else "name"
    if base_before.get(same) != base_after[same]:
        changed = " (its weights changed)" if base_before.get("name") == base_after["name"] else ""
        lines.append(f"the base was {base_before.get('name')}, now {base_after['name']}{changed}")
    return lines


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON ({error}): remove the folder to start over") from error
    if not isinstance(value, dict) or not isinstance(value.get("options"), dict):
        raise CheckpointError(f"{path}: is not the record of a run: remove the folder to start over")
    return value


def _lock(folder: Path) -> int:
    """Holds the folder until closed, or the process ends, however it ends. Raises InputError where another holds it."""
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(lock)
        raise InputError(f"{folder}: another command is training in it: wait for it, or give another --out") from error
    except OSError:
        pass  # a file system without locks
    return lock


# ---------------------------------------------------------------- ending


def _publish(folder: Path, out: Path) -> None:
    shutil.rmtree(folder / SAVES, ignore_errors=True)
    for left in folder.glob(".*.tmp"):  # half-written files of a process that was killed
        left.unlink(missing_ok=True)
    if folder != out:
        replace_folder(folder, out)


def _leave(folder: Path, out: Path, say: Say) -> None:
    """After a failure: keeps the run where it can be resumed, and says so; removes it where nothing was reached."""
    if read_status(folder) != "running":
        return  # complete, whatever came after
    saved = newest_complete(folder / SAVES)
    if saved is None:
        shutil.rmtree(folder, ignore_errors=True)
        return
    say(
        f"{folder}: the unfinished run is kept; its last complete checkpoint is {saved.folder.name}: "
        f"qadeploy train --resume --out {out} goes on from there"
    )
