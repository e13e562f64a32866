"""The folder of answers, of which every file is whole at any time, and the one file that stands for it on small jobs.

    _plan.json                      what is answered, with what, and in which parts
    part-00000.parquet              the answers of shard 0, in the order of its rows
    rejected/_part-00000.jsonl      its rows without an answer, where there are any
    .shard-00000.journal            while a shard is worked on

A part appears with its rename, after its rejected rows; its metadata count both. Readers of parquet folders
pass over names that begin with ``_`` or ``.``, so they read the folder as it is.
"""

from __future__ import annotations

import fcntl
import io
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qadeploy.batch.answering import COLUMNS, Answered, Rejected, Result, to_dict
from qadeploy.batch.journal import Journal
from qadeploy.batch.plan import Job, Plan
from qadeploy.batch.ranges import import_parquet
from qadeploy.batch.sources import Source
from qadeploy.data.wording import one_line
from qadeploy.errors import FailureError, InputError
from qadeploy.files import write_bytes, write_text

PLAN = "_plan.json"
REJECTED = "rejected"
_COUNT = b"qadeploy.rejected"


@dataclass(frozen=True, slots=True)
class Counts:
    """Rows with an answer, and without."""

    rows: int = 0
    rejected: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.rows + other.rows, self.rejected + other.rejected)


class Folder:
    """A folder of answers. ``make`` begins one, ``plan`` reads its plan, ``write`` adds a part."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def begun(self) -> bool:
        """Whether a plan lies in it. Raises InputError where it is no such folder, and could not become one."""
        if (self.path / PLAN).is_file():
            return True
        if self.path.is_dir():
            if any(self.path.iterdir()):
                raise InputError(f"{self.path}: exists already and holds other things: give another --output")
        elif os.path.lexists(self.path):
            raise InputError(f"{self.path}: exists already and is no folder: give another --output")
        elif not self.path.absolute().parent.is_dir():
            raise InputError(f"{self.path.parent}: no such folder to write into")
        return False

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keeps a second run out of the folder, which it makes. Raises InputError where another has it."""
        self.path.mkdir(exist_ok=True)
        folder = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(folder)
            raise InputError(f"{self.path}: another qadeploy answer is writing into it: wait for its end") from error
        except OSError:  # a file system without locks: whoever writes there twice, writes the same parts
            pass
        try:
            yield
        finally:
            os.close(folder)

    def make(self, plan: Plan) -> None:
        """Writes the plan."""
        write_text(self.path / PLAN, plan.to_json())

    def plan(self) -> Plan:
        """The plan that lies in it. Raises InputError."""
        path = self.path / PLAN
        try:
            return Plan.of(path.read_text(encoding="utf-8"), str(path))
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: cannot be read: {one_line(error)}") from error

    def plan_for(self, job: Job, sources: Sequence[Source], step: int | None) -> Plan:
        """The plan that lies in it, for a run that goes on with it. Raises InputError, naming what differs."""
        plan = self.plan()
        different = plan.differences(job, sources, step)
        if different:
            reasons = "\n".join(f"  {line}" for line in different)
            raise InputError(
                f"{self.path}: holds answers of another job:\n{reasons}\n"
                "Give another --output, or remove the folder to begin anew"
            )
        return plan

    def done(self, plan: Plan) -> dict[int, Counts]:
        """The shards whose parts stand, by number. Sweeps up the half files of workers that were killed."""
        names = set(os.listdir(self.path))
        for name in names:
            if name.startswith(".part-") and name.endswith(".tmp"):
                (self.path / name).unlink(missing_ok=True)
        parquet = import_parquet("writing parquet (or name the output .jsonl)")
        found = {}
        for shard in plan.shards:
            path = self.part(shard.number)
            if path.name in names:
                try:
                    metadata = parquet.read_metadata(path)
                    counts = Counts(metadata.num_rows, int(metadata.metadata[_COUNT]))
                except (OSError, ValueError, KeyError, TypeError):  # damaged since: it is made again
                    continue
                if counts.rows + counts.rejected == shard.part.rows:
                    found[shard.number] = counts
        return found

    def part(self, number: int) -> Path:
        """Where the answers of a shard stand."""
        return self.path / f"part-{number:05d}.parquet"

    def rejected(self, number: int) -> Path:
        """Where the rejected rows of a shard stand, if there are any."""
        return self.path / REJECTED / f"_part-{number:05d}.jsonl"

    def journal(self, number: int) -> Journal:
        """The journal of a shard."""
        return Journal(self.path / f".shard-{number:05d}.journal")

    def write(self, number: int, results: Sequence[Result], bundle: str) -> Counts:
        """A shard's results: rejected rows first, then the part, so that a part that stands is whole."""
        answered, rejected = split(results)
        where = self.rejected(number)
        if rejected:
            where.parent.mkdir(exist_ok=True)
            write_bytes(where, "".join(map(line, rejected)).encode())
        else:
            where.unlink(missing_ok=True)  # an earlier worker's, which died before the part stood
        write_bytes(self.part(number), _parquet(answered, bundle, len(rejected)))
        return Counts(len(answered), len(rejected))


class OneFile:
    """Answers as one JSONL file, which appears when it is whole; its rejected rows beside it. Nothing goes on after a stop."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rejected = path.with_name(f"{path.stem}.{REJECTED}{path.suffix}")
        for taken in (path, self.rejected):
            if os.path.lexists(taken):
                raise InputError(f"{taken}: exists already: remove it or give another --output")
        if not path.absolute().parent.is_dir():
            raise InputError(f"{path.parent}: no such folder to write into")

    @contextmanager
    def writing(self, bundle: str) -> Iterator[Any]:
        """Within it the function that it gives adds the results of the next shard; after it the files stand."""
        files = {path: path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in (self.path, self.rejected)}
        total = Counts()
        try:
            with files[self.path].open("w", encoding="utf-8") as good, files[self.rejected].open("w") as bad:

                def add(results: Sequence[Result]) -> Counts:
                    nonlocal total
                    answered, rejected = split(results)
                    for row in answered:
                        good.write(json.dumps({**to_dict(row), "bundle": bundle}, ensure_ascii=False) + "\n")
                    bad.writelines(map(line, rejected))
                    counts = Counts(len(answered), len(rejected))
                    total += counts
                    return counts

                yield add
                for stream in (good, bad):
                    stream.flush()
                    os.fsync(stream.fileno())
            if total.rejected:
                os.replace(files[self.rejected], self.rejected)
            os.replace(files[self.path], self.path)
        except OSError as error:
            error.filename = error.filename or str(self.path)
            raise
        finally:
            for temporary in files.values():
                temporary.unlink(missing_ok=True)


def split(results: Sequence[Result]) -> tuple[list[Answered], list[Rejected]]:
    """The rows with an answer, and those without, in order."""
    return [r for r in results if isinstance(r, Answered)], [r for r in results if isinstance(r, Rejected)]


def line(row: Rejected) -> str:
    """A rejected row as a line of JSON."""
    return json.dumps(to_dict(row)) + "\n"


def _parquet(rows: Sequence[Answered], bundle: str, rejected: int) -> bytes:
    """A part's bytes: the columns ``COLUMNS``; its metadata tell how many rows of the shard were rejected."""
    parquet = import_parquet("writing parquet (or name the output .jsonl)")
    import pyarrow

    kinds = (pyarrow.string(), pyarrow.string(), pyarrow.float64(), pyarrow.int64(), pyarrow.int64(), pyarrow.string())
    schema = pyarrow.schema(list(zip(COLUMNS, kinds, strict=True)), {_COUNT: str(rejected)})
    columns = {name: [getattr(row, name) for row in rows] for name in COLUMNS[:-1]}
    stream = io.BytesIO()
    parquet.write_table(pyarrow.table({**columns, COLUMNS[-1]: [bundle] * len(rows)}, schema), stream)
    return stream.getvalue()


def explain(error: OSError, place: str, done: int, of: int) -> FailureError:
    """An error of the system as one that says where, and that the parts that stand remain."""
    where = f"{error.filename or place}: "
    return FailureError(
        f"{where}{error.strerror or one_line(error)}. {done} of {of} parts stand and remain: put this right and run the "
        "same command again, which goes on from there"
    )
