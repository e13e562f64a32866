"""Run folders: finding them, and the data that a run held out."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qadeploy.data.fields import DataOptions
from qadeploy.data.loading import hash_examples, read, source_name
from qadeploy.data.splits import carve_by_passage
from qadeploy.errors import CheckpointError, InputError
from qadeploy.evaluation.predictions import N_BEST, NULL_ODDS, PREDICTIONS
from qadeploy.files import is_temporary
from qadeploy.records import Example
from qadeploy.training.saves import SAVES, files_in, foreign_beside, foreign_files, remove, remove_all

RUN_FILE = "run.json"
UNFINISHED = ".unfinished"
TENSORBOARD = "tensorboard"  # its event files
_PARTS = frozenset(
    {RUN_FILE, "checkpoint", SAVES, TENSORBOARD, "metrics.json", "curves.png", "report.html", "README.md"}
    | {PREDICTIONS, N_BEST, NULL_ODDS}
)
# The record's list of the files of ``checkpoint/``, which records of 0.2.0 and earlier do not have.
CHECKPOINT_FILES = "checkpoint_files"


@dataclass(frozen=True, slots=True)
class Run:
    """A checkpoint folder, and the record of the run that made it (None if it is not from a run)."""

    name: str
    checkpoint: Path
    record: dict[str, Any] | None


def find_run(path: str | Path | None) -> Run:
    """Finds a run folder, a checkpoint folder, or with None the newest finished run under ``runs/``.

    Raises:
        InputError: There is no such folder or no finished run.
        CheckpointError: The run is not finished.
    """
    if path is None:
        # A name that begins with a dot was left by a killed command.
        found = [p.parent for p in Path("runs").glob(f"[!.]*/{RUN_FILE}") if p.is_file()]
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
        own = folder.parent if folder.name == "checkpoint" else folder
        return Run(own.name, folder, _read_record(own / RUN_FILE) if (own / RUN_FILE).is_file() else None)
    raise CheckpointError(f"{folder}: neither a finished run (run.json) nor a checkpoint (config.json)")


def read_status(folder: Path) -> str | None:
    """The status in a run folder's record: "complete", "running", "unknown" for anything else; None without a record."""
    try:
        record = _read_json(folder / RUN_FILE)
    except OSError:
        return None
    except ValueError:
        return "unknown"
    status = record.get("status") if isinstance(record, dict) else None
    return status if status in {"complete", "running"} else "unknown"


def check_replaceable(out: Path) -> None:
    """Raises InputError unless ``out`` does not exist, is an empty folder, or holds a run and nothing else."""
    if not out.name or out.is_symlink():
        raise InputError(f"{out}: a run needs its own folder, not a link: give --out a name")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    ours = out.is_dir() and read_status(out) in {"complete", "running"}
    # Other tools name files run.json too.
    if not ours or not isinstance(_read_json(out / RUN_FILE).get("options"), dict):
        raise InputError(f"{out}: exists and is not a run folder, so it is not overwritten: give another --out")
    if foreign := foreign_in(out):
        raise InputError(
            f"{out}: holds {', '.join(foreign[:5])} beside a run, which would be deleted: move it away, or give another --out"
        )


def foreign_in(folder: Path) -> list[str]:
    """The files in a run folder that do not belong to the run, by their paths in it."""
    found = sorted(p.name for p in folder.iterdir() if p.name not in _PARTS and not is_temporary(p.name))
    own = _read_json(folder / RUN_FILE).get(CHECKPOINT_FILES)
    checkpoint = folder / "checkpoint"
    foreign = foreign_files(checkpoint) if own is None else [n for n in files_in(checkpoint) if n not in own]
    found += [f"checkpoint/{name}" for name in foreign]
    found += [f"{TENSORBOARD}/{name}" for name in foreign_files(folder / TENSORBOARD)]
    return found + [f"{SAVES}/{name}" for name in foreign_beside(folder / SAVES)]


def remove_unfinished(folder: Path) -> None:
    """Removes a run that is not finished. If its folder holds foreign files, they stay."""
    if not foreign_in(folder):
        shutil.rmtree(folder, ignore_errors=True)
        return
    remove(folder / "checkpoint")
    remove(folder / TENSORBOARD)
    remove_all(folder / SAVES)
    for name in _PARTS:
        with suppress(OSError):  # a folder that holds foreign files
            (folder / name).unlink(missing_ok=True)


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _unfinished(folder: Path) -> str:
    out = folder.with_name(folder.name.removesuffix(UNFINISHED))
    return (
        f"{folder} is not finished (interrupted, or still training): qadeploy train --resume --out {out} continues it"
    )


def _read_record(path: Path) -> dict[str, Any]:
    try:
        record = _read_json(path)
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from error
    if isinstance(record, dict) and record.get("status") == "running":
        raise CheckpointError(_unfinished(path.parent))
    if not isinstance(record, dict) or record.get("status") != "complete" or "options" not in record:
        raise CheckpointError(f"{path}: is not the record of a finished run: train again")
    return record


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Questions to evaluate a run on: their source, and whether they are the dev set carved from that source."""

    source: str
    examples: tuple[Example, ...]
    dev_set: bool = False

    @property
    def name(self) -> str:
        """The source, as it is shown to users."""
        return f"{self.source} (dev set)" if self.dev_set else self.source


def held_out(run: Run, eval_data: str | None, reading: DataOptions | None = None) -> HeldOut:
    """The examples to evaluate a run on, never those that it trained on.

    They are the first of these that exists: ``eval_data``, the run's own evaluation data, the fixed validation split of
    its data, or its dev set, carved again from the same data with the same seed.

    Args:
        run: The run.
        eval_data: A data set to use instead of the run's own.
        reading: How to read it.

    Raises:
        InputError: None of them is available, or the data changed since the run.
    """
    if eval_data is not None:
        data = read(eval_data, reading)
        return HeldOut(eval_data, data.part("validation") or data.examples)
    if run.record is None:
        raise InputError(
            f"{run.checkpoint}: it is not known what this checkpoint was trained on: give --eval-data FILE"
        )
    options = run.record["options"]
    given = options["eval_data"] or options["data"]
    source = source_name(given)
    try:
        data = read(given, DataOptions.of(options))
    except InputError as error:
        raise InputError(f"the run's data cannot be read: {error}\nGive --eval-data FILE") from error
    if given == options["data"] and hash_examples(data.examples) != run.record["data_sha256"]:
        raise InputError(
            f"{source}: is not what the run was trained on (its content changed), so its held-out questions are "
            "no longer known: give --eval-data FILE, or train again"
        )
    validation = data.part("validation")
    if options["eval_data"] or validation:
        examples = (validation or data.examples)[: options.get("max_eval_samples")]
        recorded = run.record.get("eval_data_sha256")
        if recorded and hash_examples(examples) != recorded:
            raise InputError(
                f"{source}: changed since the run was evaluated on it: give --eval-data FILE to judge the run on what it holds now"
            )
        return HeldOut(source, examples)
    dev_data = options.get("dev_data")
    examples = dev_set(run)
    if dev_data and not examples:
        raise InputError(f"{dev_data}: is not the dev data that the run was made with: give --eval-data FILE")
    return HeldOut(dev_data or source, examples, dev_set=not dev_data)


def known_examples(checkpoint: Path) -> tuple[Example, ...]:
    """The run's data without the fixed validation split: what it trained on or chose by. Empty if not available."""
    try:
        return _learned(find_run(checkpoint))
    except (InputError, CheckpointError):
        return ()


def _learned(run: Run) -> tuple[Example, ...]:
    """``known_examples`` of a run. Raises InputError if its data cannot be read."""
    if run.record is None:
        return ()
    options = run.record["options"]
    examples = read(options["data"], DataOptions.of(options)).examples
    if hash_examples(examples) != run.record["data_sha256"]:
        return ()  # a dev set carved again would contain questions that the run trained on
    return tuple(e for e in examples if e.split != "validation")


def dev_set(run: Run) -> tuple[Example, ...]:
    """The run's dev data, or its dev set carved again with the same seed. Empty if not available."""
    if run.record is None:
        return ()
    options = run.record["options"]
    given, most = options.get("dev_data"), options.get("max_eval_samples")
    with suppress(InputError):
        if given:
            examples = read(given, DataOptions.of(options)).examples[:most]
            return examples if hash_examples(examples) == run.record["dev_data_sha256"] else ()
        if learned := _learned(run):
            return carve_by_passage(learned, options["dev_fraction"], options["seed"])[1][:most]
    return ()
