"""The plan of a batch: which rows of which files go into which part of the output. It is fixed before the first answer.

The plan is stored in the output folder as ``_plan.json``. A run that continues an earlier one follows that plan, and is
refused if its answers would differ.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice

from qadeploy.batch.ranges import FINEST, Range, Reader, scan
from qadeploy.batch.sources import Source, expand
from qadeploy.core.settings import Offsets, Options, SnippetSize
from qadeploy.data.fields import DataOptions, parse_row
from qadeploy.data.rows import RowError
from qadeploy.errors import InputError
from qadeploy.options import check, flag_of

SCHEMA = 2
CALL_OPTIONS = ("allow_no_answer", "prefilter", "min_score", "snippet", "offsets")  # ``Options`` of a batch
_PARTS, _MOST_ROWS = 200, 8000  # beyond _PARTS parts, the rows of a part are doubled, up to _MOST_ROWS
_CHECKED_ROWS = 100  # one of the first rows of a file must be usable


@dataclass(frozen=True, slots=True)
class BatchSettings:
    """The settings that determine the answers. The other fields are those of ``Options``.

    Attributes:
        bundle: The hash of the bundle.
        columns: Our field names and the data's column names.
    """

    bundle: str
    columns: Mapping[str, str]
    allow_no_answer: bool
    prefilter: int | None = None
    min_score: float = 0.0
    snippet: SnippetSize = None
    offsets: Offsets = "codepoints"

    @property
    def options(self) -> Options:
        """The options of every call."""
        return Options(**{name: getattr(self, name) for name in CALL_OPTIONS})

    @property
    def data_options(self) -> DataOptions:
        """The options for reading rows."""
        return DataOptions(columns=_written(self.columns))


@dataclass(frozen=True, slots=True)
class Shard:
    """The rows of one part of the output: a range of one source. ``number`` counts from 0."""

    number: int
    source: Source
    range: Range


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """The settings, the input files, and the shards.

    ``step`` is the number of rows of a full shard; ``passages`` says whether any file has a column of passages.
    """

    settings: BatchSettings
    sources: tuple[Source, ...]
    shards: tuple[Shard, ...]
    step: int
    passages: bool = False

    @property
    def rows(self) -> int:
        """The rows of all shards."""
        return sum(shard.range.rows for shard in self.shards)

    def row_id(self, source: Source, number: int) -> str:
        """The id of a row that has none: ``row-4``, or ``FILE:row-4`` if there are several files."""
        return f"row-{number}" if len(self.sources) == 1 else f"{source.name}:row-{number}"

    def to_json(self) -> str:
        """The plan as JSON, the same text for the same plan, with one line per shard."""
        head = {
            "schema": SCHEMA,
            **asdict(self.settings),
            "shard_rows": self.step,
            "passages": self.passages,
            "files": [asdict(source) for source in self.sources],
        }
        numbers = {source: n for n, source in enumerate(self.sources)}
        rows = [[numbers[s.source], s.range.first, s.range.rows, s.range.begin, s.range.end] for s in self.shards]
        lines = ",\n".join(json.dumps(row) for row in rows)
        return json.dumps(head, indent=1)[:-2] + f',\n "shards": [\n{lines}\n]\n}}\n'

    @classmethod
    def of(cls, text: str, name: str) -> BatchPlan:
        """Reads the text of ``to_json``. Raises InputError, which names ``name``, if the text is not a plan."""
        try:
            value = json.loads(text)
            if value["schema"] != SCHEMA:
                raise InputError(f"{name}: schema {value['schema']!r} is not {SCHEMA}, which this version reads")
            chosen = {name: value[name] for name in CALL_OPTIONS}
            settings = BatchSettings(str(value["bundle"]), dict(value["columns"]), **chosen)
            check(settings.options)
            sources = tuple(Source(**entry) for entry in value["files"])
            shards = tuple(
                Shard(number, sources[row[0]], Range(*row[1:])) for number, row in enumerate(value["shards"])
            )
            return cls(settings, sources, shards, int(value["shard_rows"]), bool(value["passages"]))
        except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
            raise InputError(
                f"{name}: is not a plan of qadeploy answer: remove the folder, or give another --output"
            ) from error

    def digest(self) -> str:
        """SHA-256 of ``to_json``."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def differences(self, settings: BatchSettings, sources: Sequence[Source], step: int | None) -> list[str]:
        """The reasons why a run with these values cannot continue this plan, one line each; empty if it can."""
        found = []
        if settings.bundle != self.settings.bundle:
            found.append(f"the bundle was {self.settings.bundle[:12]}, now it is {settings.bundle[:12]}")
        if dict(settings.columns) != dict(self.settings.columns):
            found.append(
                f"--columns was {_written(self.settings.columns) or 'not given'}, now it is {_written(settings.columns) or 'not given'}"
            )
        if settings.allow_no_answer != self.settings.allow_no_answer:
            given = ["given" if each.allow_no_answer else "not given" for each in (self.settings, settings)]
            found.append(f"--allow-no-answer was {given[0]}, now it is {given[1]}")
        for name in CALL_OPTIONS[1:]:
            before, now = (getattr(each, name) for each in (self.settings, settings))
            if before != now:
                was, now = ("not given" if value is None else value for value in (before, now))
                found.append(f"{flag_of(name)} was {was}, now it is {now}")
        if step is not None and step != self.step:
            found.append(f"--shard-rows was {self.step}, now it is {step}")
        return found + _changed(self.sources, sources)


def _changed(old: Sequence[Source], new: Sequence[Source]) -> list[str]:
    before, now = ({source.path: source for source in sources} for sources in (old, new))
    found = [f"{path} was an input, now it is not" for path in before if path not in now]
    found += [f"{path} is an input, before it was not" for path in now if path not in before]
    for path, source in now.items():
        was = before.get(path)
        if was and (was.size, was.modified) != (source.size, source.modified):
            how = f"{was.size} bytes, now {source.size}" if was.size != source.size else "modified since"
            found.append(f"{path} was changed ({how})")
    if not found and [s.path for s in old] != [s.path for s in new]:
        found.append("the files of --input are in another order")
    return found


def _written(columns: Mapping[str, str]) -> str:
    """A mapping in the form that ``--columns`` accepts."""
    return ",".join(f"{ours}={theirs}" for ours, theirs in columns.items())


def make_plan(settings: BatchSettings, patterns: Sequence[str], step: int | None = None) -> BatchPlan:
    """Scans the input files and divides their rows into shards. JSONL files are read once.

    Args:
        settings: The settings that determine the answers.
        patterns: The input files, see ``sources.expand``.
        step: Rows per shard; None means 250, or up to 8,000 if there are many rows.

    Raises:
        InputError: A file does not exist, cannot be read, or none of its first hundred rows can be used.
    """
    sources = expand(patterns)
    data_options = settings.data_options
    scans = []
    for source in sources:
        scans.append(scan(source, step, data_options))
        _check_first_rows(source, scans[-1].ranges[0], data_options)
    if step is None:
        step, rows = FINEST, sum(found.rows for found in scans)
        while step < _MOST_ROWS and step * _PARTS < rows:
            step *= 2
        step = max(step, *(found.step for found in scans))
    parts = [(source, part) for source, found in zip(sources, scans, strict=True) for part in found.coarser(step)]
    shards = tuple(Shard(number, source, part) for number, (source, part) in enumerate(parts))
    return BatchPlan(settings, tuple(sources), shards, step, any(found.passages for found in scans))


def _check_first_rows(source: Source, part: Range, data_options: DataOptions) -> None:
    """Raises InputError if none of the first rows of a file can be used: the file is wrong, or has other columns."""
    first: str | None = None
    checked = 0
    rows = Reader(data_options).rows(source, part)
    for row in islice(rows, _CHECKED_ROWS):
        checked += 1
        try:
            parse_row(row, data_options, annotated=False)
            return
        except RowError as error:
            field = data_options.column(error.problem.field)
            where = f"row {row.number}, field {field}" if field else f"row {row.number}"
            first = first or f"{where}: {error}"
    more = f", nor any other of the first {checked}" if checked > 1 else ""
    raise InputError(f"{source.path}: {first}; this row cannot be used{more}")
