"""Interrupted runs: how an unfinished run is found and resumed.

An unfinished run is a folder whose ``run.json`` says ``"status": "running"``: the run folder itself, or ``NAME.unfinished``
beside it if the run folder still holds a finished run, which the new one will replace.

    run.json      the record: options, data hash, base; "complete" only when everything else is written
    checkpoints/  the saves (training/saves.py)
    checkpoint/   the result, while it is being written
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qadeploy.data.loading import source_name
from qadeploy.errors import CheckpointError, InputError
from qadeploy.files import lock, replace_folder, sweep, sync_folder, temporary_folder, write_json
from qadeploy.shipped import base_model_path
from qadeploy.training import distributed
from qadeploy.training.run_log import RunLog
from qadeploy.training.runs import (
    CHECKPOINT_FILES,
    RUN_FILE,
    UNFINISHED,
    check_replaceable,
    read_status,
    remove_unfinished,
)
from qadeploy.training.saves import SAVES, Save, newest_complete, remove_after, remove_all

# Options that do not change what is trained, or that are compared by content.
_MAY_DIFFER = frozenset(
    {"out", "save_steps", "report_to", "device", "data", "dev_data", "eval_data", "base", "token", "n_best_size"}
    | {"preprocessing_num_workers", "cache", "load_timeout", "allow_pickle"}
)


@dataclass(frozen=True, slots=True)
class OpenRun:
    """A run folder that is locked for a run.

    Attributes:
        folder: Where the run is written.
        record: The content of its ``run.json``.
        saved: The save to continue from, or None to start at the beginning.
        finished: Whether nothing is left to do.
    """

    folder: Path
    record: dict[str, Any]
    saved: Save | None = None
    finished: bool = False


def find_unfinished(out: Path) -> Path | None:
    """The folder of the unfinished run for ``out``, or None if there is none."""
    if read_status(out) == "running":
        return out
    beside = out.with_name(out.name + UNFINISHED)
    return beside if read_status(beside) is not None else None


def check_unfinished(out: Path, resume: bool) -> None:
    """Raises InputError if an unfinished run is in the way and not to be resumed."""
    found = find_unfinished(out)
    if found and not resume:
        raise InputError(
            f"{found}: holds an unfinished run (interrupted, or still training): give --resume to continue it, "
            "another --out, or remove the folder to start over"
        )


def recorded_options(out: Path) -> dict[str, Any]:
    """The options of the run in or beside ``out``, finished or not; {} if there is none."""
    try:
        options: dict[str, Any] = _read((find_unfinished(out) or out) / RUN_FILE)["options"]
    except (OSError, CheckpointError):
        return {}  # open_run reports what is wrong
    options.pop("out", None)
    with suppress(CheckpointError):
        if options.get("base") == base_model_path().name and not Path(options["base"]).exists():
            del options["base"]  # the model that ships is recorded by its name
    return options


@contextmanager
def open_run(out: Path, record: Mapping[str, Any], resume: bool, log: RunLog) -> Iterator[OpenRun]:
    """Locks the run's folder during the block; the first process creates or finds it.

    After a failure the folder stays if there is a complete save to resume from; otherwise it is removed.

    Raises:
        InputError: The unfinished run has other options, data or base, or another command is training in it.
    """
    with ExitStack() as locks:
        opened = distributed.from_first(lambda: _begin(out, json.loads(json.dumps(record)), resume, log, locks))
        try:
            yield opened
        except BaseException:
            if distributed.is_first():
                _leave(opened.folder, out, log)
            raise


def finish(opened: OpenRun, out: Path, checkpoint_files: list[str]) -> None:
    """Marks a run complete, with the ``checkpoint_files`` of its result, and moves it to ``out``. A kill loses nothing.

    Raises InputError if something other than a run was put into ``out`` since the start; the run then stays beside it.
    """
    sync_folder(opened.folder)
    record = {**opened.record, CHECKPOINT_FILES: checkpoint_files, "status": "complete"}
    write_json(opened.folder / RUN_FILE, record)
    _publish(opened.folder, out)


# ---------------------------------------------------------------- beginning


def _begin(out: Path, record: dict[str, Any], resume: bool, log: RunLog, locks: ExitStack) -> OpenRun:
    check_unfinished(out, resume)
    found = find_unfinished(out)
    if found is None and resume:
        if read_status(out) == "complete":
            found = out
        else:
            log.say(f"{out}: holds no run to resume, so training starts from the beginning")
    if found is None:
        folder = out if read_status(out) is None else out.with_name(out.name + UNFINISHED)
        _create(folder, record)
        _lock(folder, locks)
        return OpenRun(folder, record)
    _lock(found, locks)
    return _resume(out, found, record, log)


def _create(folder: Path, record: dict[str, Any]) -> None:
    try:
        with temporary_folder(folder) as fresh:
            write_json(fresh / RUN_FILE, record)
            os.replace(fresh, folder)  # record included, so that a killed run's folder can be recognised
    except OSError as error:
        if error.errno in {errno.ENOTEMPTY, errno.EEXIST}:
            raise InputError(f"{folder}: another command has just begun a run in it: give another --out") from error
        raise


def _resume(out: Path, folder: Path, record: dict[str, Any], log: RunLog) -> OpenRun:
    old = _read(folder / RUN_FILE)
    differing = find_differences(old, record)
    if differing:
        raise InputError(
            f"{folder}: the run cannot be resumed, because it was started differently:\n  "
            + "\n  ".join(differing)
            + "\nGive the original values (--resume takes the options that you leave out from the run), "
            "or remove the folder to start over"
        )
    check_replaceable(folder)
    if old.get("status") == "complete":  # perhaps killed before it was moved to its place
        _publish(folder, out)
        return OpenRun(out, old, finished=True)
    versions = old.get("versions", {})
    changed = {n: (versions.get(n), v) for n, v in record["versions"].items() if versions.get(n) != v}
    if changed:
        named = ", ".join(f"{name} {a} is now {b}" for name, (a, b) in changed.items())
        log.warning(f"{named}: the resumed run may differ in its last digits from an uninterrupted one")
    was, now = (r.get("machine", {}).get("device") for r in (old, record))
    if was and was != now:
        log.warning(f"the run began on {was} and continues on {now}, so its last digits may differ")
    saved = newest_complete(folder / SAVES, log.warning)
    step = saved.step if saved else 0
    remove_after(folder / SAVES, step)
    log.say(
        f"{folder}: resumes after step {step}"
        + (f", from {saved.folder.name}" if saved else ": it has no complete checkpoint yet")
    )
    record = {**record, "resumed_at_steps": [*old.get("resumed_at_steps", []), step]}
    write_json(folder / RUN_FILE, record)
    return OpenRun(folder, record, saved)


def find_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """A line for each difference between two records of a run, as read from JSON, that affects the weights."""
    before, after = old["options"], new["options"]
    lines = [
        f"--{name.replace('_', '-')} was {before[name]}, now {value}"
        for name, value in after.items()
        if name not in _MAY_DIFFER and name in before and before[name] != value
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
            lines.append(f"the {what} changed: {_named(before.get(name))} then, {_named(after[name])} now")
    for name in ("teacher", "unlabelled"):
        key = f"{name}_sha256"
        if key in old and old[key] != new[key] and before.get(name) == after[name]:
            lines.append(f"--{name} {after[name]} has another content now")
    base_before, base_after = old.get("base", {}), new["base"]
    same = "sha256" if base_before.get("sha256") and base_after["sha256"] else "name"
    if base_before.get(same) != base_after[same]:
        changed = " (its weights changed)" if base_before.get("name") == base_after["name"] else ""
        lines.append(f"the base was {base_before.get('name')}, now {base_after['name']}{changed}")
    return lines


def _named(source: Any) -> str:
    return "none" if source is None else source_name(source)


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON ({error}): remove the folder to start over") from error
    if not isinstance(value, dict) or not isinstance(value.get("options"), dict):
        raise CheckpointError(f"{path}: is not the record of a run: remove the folder to start over")
    return value


def _lock(folder: Path, locks: ExitStack) -> None:
    """Locks the folder until ``locks`` closes or the process ends. Raises InputError if it is locked."""
    descriptor = os.open(folder, os.O_RDONLY)
    locks.callback(os.close, descriptor)
    try:
        lock(descriptor)
    except BlockingIOError as error:
        raise InputError(f"{folder}: another command is training in it: wait for it, or give another --out") from error


# ---------------------------------------------------------------- ending


def _publish(folder: Path, out: Path) -> None:
    remove_all(folder / SAVES)
    sweep(folder)
    if folder != out:
        check_replaceable(out)  # something may have been put there meanwhile
        replace_folder(folder, out)


def _leave(folder: Path, out: Path, log: RunLog) -> None:
    """After a failure: keeps the run if it can be resumed, and says so; otherwise removes it."""
    if read_status(folder) != "running":
        return  # it is complete, whatever failed afterwards
    saved = newest_complete(folder / SAVES)
    if saved is None:
        remove_unfinished(folder)
        if folder.exists():
            log.say(f"{folder}: files that do not belong to this run are kept")
        return
    log.say(
        f"{folder}: the unfinished run is kept; its last complete checkpoint is {saved.folder.name}: "
        f"qadeploy train --resume --out {out} continues from there"
    )
