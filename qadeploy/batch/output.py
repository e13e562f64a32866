"""The folder of answers, in which every file is complete at any time, and the single file for small inputs.

    _plan.json                      the inputs, the settings, and the division into parts
    part-00000.parquet              the answers of shard 0, in the order of its rows
    rejected/_part-00000.jsonl      its rows without an answer, if there are any
    .shard-00000.journal            while the shard is being answered

A part is renamed into place after its rejected rows are written; its metadata count both. Readers of parquet folders
ignore names that begin with ``_`` or ``.``, so they can read the folder directly.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qadeploy.batch.answering import COLUMNS, PASSAGE_COLUMNS, SNIPPET_COLUMNS, Answered, Rejected, Result, to_dict
from qadeploy.batch.journal import Journal
from qadeploy.batch.plan import BatchPlan, BatchSettings
from qadeploy.batch.ranges import import_parquet
from qadeploy.batch.sources import Source
from qadeploy.errors import FailureError, InputError, one_line
from qadeploy.files import holding, is_temporary, new_file, sweep, write_bytes, write_text, writing

PLAN = "_plan.json"
REJECTED = "rejected"
_COUNT = b"qadeploy.rejected"


@dataclass(frozen=True, slots=True)
class Counts:
    """The numbers of rows with an answer and without."""

    rows: int = 0
    rejected: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.rows + other.rows, self.rejected + other.rejected)


class Folder:
    """A folder of answers. ``make`` creates it, ``plan`` reads its plan, ``write`` adds a part."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def begun(self) -> bool:
        """Whether the folder holds a plan. Raises InputError if it holds other files or cannot be created."""
        if (self.path / PLAN).is_file():
            return True
        if self.path.is_dir():
            if not all(is_temporary(path.name) for path in self.path.iterdir()):
                raise InputError(f"{self.path}: exists already and holds other files: give another --output")
        elif os.path.lexists(self.path):
            raise InputError(f"{self.path}: exists already and is not a folder: give another --output")
        elif not self.path.absolute().parent.is_dir():
            raise InputError(f"{self.path.parent}: no such folder to write to")
        return False

    @contextmanager
    def held(self) -> Iterator[None]:
        """Creates the folder and locks it. Raises InputError if another run holds it."""
        self.path.mkdir(exist_ok=True)
        with holding(self.path / PLAN, self.path):  # inside, because the folder may be all that two machines share
            yield

    def make(self, plan: BatchPlan) -> None:
        """Writes the plan."""
        write_text(self.path / PLAN, plan.to_json())

    def plan(self) -> BatchPlan:
        """The plan in the folder. Raises InputError if it cannot be read."""
        path = self.path / PLAN
        try:
            return BatchPlan.of(path.read_text(encoding="utf-8"), str(path))
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: cannot be read: {one_line(error)}") from error

    def plan_for(self, settings: BatchSettings, sources: Sequence[Source], step: int | None) -> BatchPlan:
        """The plan in the folder, for a run that continues it. Raises InputError, which names the differences."""
        plan = self.plan()
        different = plan.differences(settings, sources, step)
        if different:
            reasons = "\n".join(f"  {line}" for line in different)
            raise InputError(
                f"{self.path}: holds answers of another job:\n{reasons}\n"
                "Give another --output, or remove the folder to start again"
            )
        return plan

    def done(self, plan: BatchPlan) -> dict[int, Counts]:
        """The shards whose parts are complete, by number. Removes unfinished files of killed workers."""
        sweep(self.path)
        sweep(self.path / REJECTED)
        names = set(os.listdir(self.path))
        parquet = import_parquet("writing parquet (or name the output .jsonl)")
        found = {}
        for shard in plan.shards:
            path = self.part(shard.number)
            if path.name in names:
                try:
                    metadata = parquet.read_metadata(path)
                    counts = Counts(metadata.num_rows, int(metadata.metadata[_COUNT]))
                except (OSError, ValueError, KeyError, TypeError):  # a damaged part is written again
                    continue
                if counts.rows + counts.rejected == shard.range.rows:
                    found[shard.number] = counts
        return found

    def part(self, number: int) -> Path:
        """The file with the answers of a shard."""
        return self.path / f"part-{number:05d}.parquet"

    def rejected(self, number: int) -> Path:
        """The file with the rejected rows of a shard, if there are any."""
        return self.path / REJECTED / f"_part-{number:05d}.jsonl"

    def journal(self, number: int, run: str = "") -> Journal:
        """The journal of a shard, for a worker of the given run."""
        return Journal(self.path / f".shard-{number:05d}.journal", run)

    def leave(self) -> None:
        """Notes in every journal that its worker was interrupted with the run, so that no row is blamed for its end."""
        for path in self.path.glob(".shard-*.journal"):
            with suppress(OSError):  # the original error matters more
                Journal(path).left()

    def write(
        self, number: int, results: Sequence[Result], bundle: str, *, passages: bool = False, snippets: bool = False
    ) -> Counts:
        """Writes the results of a shard: the rejected rows first, so that a part that exists is complete."""
        answered, rejected = split(results)
        where = self.rejected(number)
        if rejected:
            where.parent.mkdir(exist_ok=True)
            write_bytes(where, "".join(map(rejected_line, rejected)).encode())
        else:
            where.unlink(missing_ok=True)  # left by an earlier worker that died before it wrote the part
        write_bytes(self.part(number), _parquet(answered, bundle, len(rejected), passages=passages, snippets=snippets))
        return Counts(len(answered), len(rejected))


class OneFile:
    """Answers in one JSONL file, and rejected rows in a second one. Both appear when complete, and cannot be continued."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rejected = path.with_name(f"{path.stem}.{REJECTED}{path.suffix}")

    @contextmanager
    def held(self) -> Iterator[None]:
        """Locks the paths of both files. Raises InputError if one exists, or another run holds its lock."""
        with ExitStack() as stack:
            for place in (self.path, self.rejected):
                stack.enter_context(new_file(place, "--output"))
            yield

    @contextmanager
    def writing(self, bundle: str) -> Iterator[Any]:
        """Yields a function that adds the results of the next shard. The files appear on exit."""
        total = Counts()
        with (
            writing(self.path, new=True) as good,
            suppress(_NoneRejectedError),
            writing(self.rejected, new=True) as bad,  # appears first, so that the answers appear last
        ):

            def add(results: Sequence[Result]) -> Counts:
                nonlocal total
                answered, rejected = split(results)
                for row in answered:
                    good.write((json.dumps({**to_dict(row), "bundle": bundle}, ensure_ascii=False) + "\n").encode())
                bad.writelines(rejected_line(row).encode() for row in rejected)
                counts = Counts(len(answered), len(rejected))
                total += counts
                return counts

            yield add
            if not total.rejected:
                raise _NoneRejectedError


class _NoneRejectedError(Exception):
    """Prevents an empty file of rejected rows."""


def split(results: Sequence[Result]) -> tuple[list[Answered], list[Rejected]]:
    """The rows with an answer and those without, in order."""
    return [r for r in results if isinstance(r, Answered)], [r for r in results if isinstance(r, Rejected)]


def rejected_line(row: Rejected) -> str:
    """A rejected row as a line of JSON."""
    return json.dumps(to_dict(row)) + "\n"


def _parquet(rows: Sequence[Answered], bundle: str, rejected: int, *, passages: bool, snippets: bool) -> bytes:
    """The bytes of a part, with the number of rejected rows of the shard in its metadata."""
    parquet = import_parquet("writing parquet (or name the output .jsonl)")
    import pyarrow

    text, number = pyarrow.string(), pyarrow.int64()
    kinds = {"score": pyarrow.float64(), "skipped": pyarrow.list_(number)}
    kinds |= dict.fromkeys(("id", "answer", "snippet", "bundle"), text)
    passages = passages or any(row.passage is not None or row.skipped for row in rows)
    names = (*COLUMNS[:-1], *PASSAGE_COLUMNS * passages, *SNIPPET_COLUMNS * snippets)
    columns = {name: [getattr(row, name) for row in rows] for name in names} | {COLUMNS[-1]: [bundle] * len(rows)}
    schema = pyarrow.schema([(name, kinds.get(name, number)) for name in columns], {_COUNT: str(rejected)})
    stream = io.BytesIO()
    parquet.write_table(pyarrow.table(columns, schema), stream)
    return stream.getvalue()


def explain(error: OSError, place: str, done: int, of: int) -> FailureError:
    """Turns an OSError into an error that says where it occurred and that finished parts are kept."""
    where = f"{error.filename or place}: "
    return FailureError(
        f"{where}{error.strerror or one_line(error)}. {done} of {of} parts are finished and kept: fix this and run the "
        "same command again, which continues from there"
    )
