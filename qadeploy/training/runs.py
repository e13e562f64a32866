"""Run folders: finding them, and the data that a run held out."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qadeploy.data.fields import Reading
from qadeploy.data.readers import hash_examples, read
from qadeploy.data.splits import carve_by_passage
from qadeploy.errors import CheckpointError, InputError
from qadeploy.records import Example

RUN_FILE = "run.json"
UNFINISHED = ".unfinished"


@dataclass(frozen=True, slots=True)
class Run:
    """A checkpoint folder, and the record of the run that made it (None for any other checkpoint)."""

    name: str
    checkpoint: Path
    record: dict[str, Any] | None


def find_run(path: str | Path | None) -> Run:
    """A run folder, a checkpoint folder, or (None) the newest finished run under ``runs/``.

    Raises InputError where there is nothing of the kind, CheckpointError where a run is not finished.
    """
    if path is None:
        runs = Path("runs")
        found = [p for p in runs.iterdir() if (p / RUN_FILE).is_file()] if runs.is_dir() else []
        found = [p for p in found if not p.name.startswith(".")]  # work that was cut off
        unfinished = [p for p in found if read_status(p) == "running"]
        found = [p for p in found if p not in unfinished]
        if not found:
            hint = f"; {_unfinished(unfinished[0])}" if unfinished else ""
            raise InputError(f"runs: holds no finished run yet: run qadeploy train first, or name a run{hint}")
        path = max(found, key=lambda p: (p / RUN_FILE).stat().st_mtime_ns)
    folder = Path(path)
    folder = folder if folder.name else folder.resolve()
    if not folder.is_dir():
        beside = folder.with_name(folder.name + UNFINISHED)
        hint = f"; {_unfinished(beside)}" if read_status(beside) else ""
        raise InputError(f"{folder}: no such folder: give a run or a checkpoint folder{hint}")
    if (folder / RUN_FILE).is_file():
        checkpoint, record = folder / "checkpoint", _read_record(folder / RUN_FILE)
        if not (checkpoint / "config.json").is_file():
            raise CheckpointError(f"{folder}: the run has no checkpoint: it was not finished or was moved; train again")
        return Run(folder.name, checkpoint, record)
    if (folder / "config.json").is_file():
        name = folder.parent.name if folder.name == "checkpoint" else folder.name
        parent = folder.parent / RUN_FILE
        if folder.name == "checkpoint" and parent.is_file():
            return Run(name, folder, _read_record(parent))
        return Run(name, folder, None)
    raise CheckpointError(f"{folder}: neither a finished run (run.json) nor a checkpoint (config.json)")


def read_status(folder: Path) -> str | None:
    """What a run folder's record says, "complete" or "running"; "unknown" where it says neither; None without one."""
    try:
        record = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
    except OSError:
        return None
    except ValueError:
        return "unknown"
    status = record.get("status") if isinstance(record, dict) else None
    return status if status in {"complete", "running"} else "unknown"


def _unfinished(folder: Path) -> str:
    out = folder.with_name(folder.name.removesuffix(UNFINISHED))
    return f"{folder} is not finished (interrupted, or still training): qadeploy train --resume --out {out} goes on with it"


def _read_record(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from error
    if isinstance(record, dict) and record.get("status") == "running":
        raise CheckpointError(_unfinished(path.parent))
    if not isinstance(record, dict) or record.get("status") != "complete" or "options" not in record:
        raise CheckpointError(f"{path}: is not the record of a finished run: train again")
    return record


def held_out(run: Run, eval_data: str | None, reading: Reading | None = None) -> tuple[str, tuple[Example, ...]]:
    """Where the held-out examples come from, and the examples: never those that the run trained on.

    ``eval_data`` if given (understood by ``reading``), else the run's own evaluation data, the fixed validation
    split of its data, or its dev data or part, carved again from the same data by the same seed. Raises InputError where
    none of them can be had, or the data changed since the run.
    """
    if eval_data is not None:
        data = read(eval_data, reading)
        return eval_data, data.part("validation") or data.examples
    if run.record is None:
        raise InputError(
            f"{run.checkpoint}: it is not known what this checkpoint was trained on: give --eval-data FILE"
        )
    options = run.record["options"]
    source = options["eval_data"] or options["data"]
    try:
        data = read(source, Reading.of(options))
    except InputError as error:
        raise InputError(f"the run's data cannot be read: {error}\nGive --eval-data FILE") from error
    if source == options["data"] and hash_examples(data.examples) != run.record["data_sha256"]:
        raise InputError(
            f"{source}: is not what the run was trained on (its content changed), so what it held out is "
            "not known any more: give --eval-data FILE, or train again"
        )
    validation = data.part("validation")
    if options["eval_data"] or validation:
        return source, (validation or data.examples)[: options.get("max_eval_samples")]
    given = options.get("dev_data")
    part = dev_part(run)
    if given and not part:
        raise InputError(f"{given}: is not the dev data that the run was made with: give --eval-data FILE")
    return given or f"{source} (dev part)", part


def known_examples(checkpoint: Path) -> tuple[Example, ...]:
    """What a run learned from or chose by: its data but for a fixed validation split; empty where it is not to be had."""
    try:
        run = find_run(checkpoint)
        if run.record is None:
            return ()
        data = read(run.record["options"]["data"], Reading.of(run.record["options"]))
    except (InputError, CheckpointError):
        return ()
    if hash_examples(data.examples) != run.record["data_sha256"]:
        return ()
    return tuple(e for e in data.examples if e.split != "validation")


def dev_part(run: Run) -> tuple[Example, ...]:
    """The run's dev data, or its dev part carved again by the same seed; empty where it is not to be had."""
    if run.record is None:
        return ()
    options = run.record["options"]
    given, most = options.get("dev_data"), options.get("max_eval_samples")
    try:
        data = read(given or options["data"], Reading.of(options))
    except InputError:
        return ()
    if given:
        part = data.examples[:most]
        return part if hash_examples(part) == run.record["dev_data_sha256"] else ()
    if hash_examples(data.examples) != run.record["data_sha256"]:
        return ()  # another carving, which would hold questions that the run trained on
    rest = tuple(e for e in data.examples if e.split != "validation")
    return carve_by_passage(rest, options["dev_fraction"], options["seed"])[1][:most]
