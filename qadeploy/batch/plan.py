"""The plan of one job: which rows of which files make which part of the output. It is fixed before the first answer.

A plan lies in the output folder as ``_plan.json``; a run that goes on after another one follows the plan that is there,
and is refused where it would make other answers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice

from qadeploy.batch.ranges import FINEST, Range, Reader, scan
from qadeploy.batch.sources import Source, expand
from qadeploy.data.fields import ProblemError, Reading, parse
from qadeploy.errors import InputError

SCHEMA = 1
_PARTS, _MOST_ROWS = 200, 8000  # parts are larger than FINEST rows where there would be more than so many
_LOOKED_AT = 100  # first rows of a file of which one at least must be usable


@dataclass(frozen=True, slots=True)
class Job:
    """What decides the answers: the bundle (its hash), how rows are read, whether "no answer" competes, windows read at most."""

    bundle: str
    columns: Mapping[str, str]
    allow_no_answer: bool
    prefilter: int | None = None

    @property
    def reading(self) -> Reading:
        """How rows are read."""
        return Reading(columns=self.columns)


@dataclass(frozen=True, slots=True)
class Shard:
    """One part of the output: a range of rows of one source. ``number`` counts from 0."""

    number: int
    source: Source
    part: Range


@dataclass(frozen=True, slots=True)
class Plan:
    """A job, its files, and the shards they are answered in. ``step`` is the number of rows of a whole shard."""

    job: Job
    sources: tuple[Source, ...]
    shards: tuple[Shard, ...]
    step: int

    @property
    def rows(self) -> int:
        """The rows of all shards."""
        return sum(shard.part.rows for shard in self.shards)

    def row_id(self, source: Source, number: int) -> str:
        """The id of a row without one: ``row-4``, with several files ``FILE:row-4``."""
        return f"row-{number}" if len(self.sources) == 1 else f"{source.name}:row-{number}"

    def to_json(self) -> str:
        """The plan as text, the same for the same plan; one line a shard."""
        head = {
            "schema": SCHEMA,
            **asdict(self.job),
            "shard_rows": self.step,
            "files": [asdict(source) for source in self.sources],
        }
        numbers = {source: n for n, source in enumerate(self.sources)}
        rows = [[numbers[s.source], s.part.first, s.part.rows, s.part.begin, s.part.end] for s in self.shards]
        lines = ",\n".join(json.dumps(row) for row in rows)
        return json.dumps(head, indent=1, ensure_ascii=False)[:-2] + f',\n "shards": [\n{lines}\n]\n}}\n'

    @classmethod
    def of(cls, text: str, name: str) -> Plan:
        """The plan of ``to_json``. Raises InputError, which names it ``name``, where the text is none."""
        try:
            value = json.loads(text)
            if value["schema"] != SCHEMA:
                raise InputError(f"{name}: schema {value['schema']!r} is not {SCHEMA}, which this version reads")
            job = Job(str(value["bundle"]), dict(value["columns"]), bool(value["allow_no_answer"]), value["prefilter"])
            sources = tuple(Source(**entry) for entry in value["files"])
            shards = tuple(
                Shard(number, sources[row[0]], Range(*row[1:])) for number, row in enumerate(value["shards"])
            )
            return cls(job, sources, shards, int(value["shard_rows"]))
        except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
            raise InputError(f"{name}: is no plan of qadeploy answer: remove the folder, or give another") from error

    def digest(self) -> str:
        """SHA-256 of ``to_json``."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def differences(self, job: Job, sources: Sequence[Source], step: int | None) -> list[str]:
        """Why a run with these does not go on with this plan, a line each; none where it does."""
        found = []
        if job.bundle != self.job.bundle:
            found.append(f"the bundle was {self.job.bundle[:12]}, now it is {job.bundle[:12]}")
        if dict(job.columns) != dict(self.job.columns):
            found.append(f"--columns was {_mapping(self.job.columns)}, now it is {_mapping(job.columns)}")
        if job.allow_no_answer != self.job.allow_no_answer:
            was, now = (("" if on else "not ") + "given" for on in (self.job.allow_no_answer, job.allow_no_answer))
            found.append(f"--allow-no-answer was {was}, now it is {now}")
        if job.prefilter != self.job.prefilter:
            windows = [value or "not given" for value in (self.job.prefilter, job.prefilter)]
            found.append(f"--prefilter was {windows[0]}, now it is {windows[1]}")
        if step is not None and step != self.step:
            found.append(f"--shard-rows was {self.step}, now it is {step}")
        return found + _changed(self.sources, sources)


def _changed(old: Sequence[Source], new: Sequence[Source]) -> list[str]:
    before, now = ({source.path: source for source in sources} for sources in (old, new))
    found = [f"{path} was an input, now it is none" for path in before if path not in now]
    found += [f"{path} is an input, it was none" for path in now if path not in before]
    for path, source in now.items():
        was = before.get(path)
        if was and (was.size, was.modified) != (source.size, source.modified):
            how = f"{was.size} bytes, now {source.size}" if was.size != source.size else "modified since"
            found.append(f"{path} was changed ({how})")
    if not found and [s.path for s in old] != [s.path for s in new]:
        found.append("the files of --input came in another order")
    return found


def _mapping(columns: Mapping[str, str]) -> str:
    return ",".join(f"{ours}={theirs}" for ours, theirs in columns.items()) or "not given"


def make_plan(job: Job, patterns: Sequence[str], step: int | None = None) -> Plan:
    """Looks at every file that the patterns name (``sources.expand``), and cuts their rows into shards.

    ``step`` is the number of rows of a shard; by default 250, and up to 8,000 where there are many rows. JSONL is read
    through once. Raises InputError (no such file, unreadable, no row that can be used among a file's first hundred).
    """
    sources = expand(patterns)
    reading = job.reading
    scans = []
    for source in sources:
        scans.append(scan(source, step, reading))
        _check_first_rows(source, scans[-1].ranges[0], reading)
    if step is None:
        step, rows = FINEST, sum(found.rows for found in scans)
        while step < _MOST_ROWS and step * _PARTS < rows:
            step *= 2
        step = max(step, *(found.step for found in scans))
    parts = [(source, part) for source, found in zip(sources, scans, strict=True) for part in found.coarser(step)]
    shards = tuple(Shard(number, source, part) for number, (source, part) in enumerate(parts))
    return Plan(job, tuple(sources), shards, step)


def _check_first_rows(source: Source, part: Range, reading: Reading) -> None:
    """Raises InputError where none of a file's first rows can be used: the wrong file, or the wrong columns."""
    first: str | None = None
    looked = 0
    rows = Reader(reading).rows(source, part)
    for row in islice(rows, _LOOKED_AT):
        looked += 1
        try:
            parse(row, reading, annotated=False)
            return
        except ProblemError as problem:
            field = reading.columns.get(problem.field, problem.field)
            where = f"row {row.number}, field {field}" if field else f"row {row.number}"
            first = first or f"{where}: {problem}"
    more = f", nor any other of the first {looked}" if looked > 1 else ""
    raise InputError(f"{source.path}: {first}; this row cannot be used{more}")
