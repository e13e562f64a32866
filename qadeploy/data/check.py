"""The data check: every row in one class, and what its repair would be.

A row's class is the first that fits, in the order of ``CLASSES``; with several answers it is the class of the worst.
An offset is "shifted" where the answer's own text stands elsewhere, but "utf16" where it stands exactly at the offset
read in UTF-16 units and characters beyond the basic plane come before it: then that is why it is shifted.
``repeated`` (an answer that stands several times in its context) and ``duplicate`` (a question and context that an
earlier row has too) are flags, counted besides.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from qadeploy.data.carriers import Row
from qadeploy.data.fields import Fields, Given, ProblemError, Reading, is_offset, parse
from qadeploy.data.match import (
    Slice,
    cuts_a_word,
    find_caseless,
    find_spaced,
    find_spelled,
    from_utf16,
    occurrences,
    whole_words,
)
from qadeploy.data.wording import quote
from qadeploy.errors import InputError
from qadeploy.records import Annotation

CLASSES = ("no_answer", "empty", "exact", "shifted", "utf16", "whitespace", "case", "detokenised", "absent")
FLAGS = ("repeated", "duplicate")
GOOD = ("no_answer", "exact")
_PRINTED = (
    "exact", "shifted", "whitespace", "case", "detokenised", "utf16", "repeated", "absent", "empty", "duplicate", "no_answer",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Finding:
    """What is the matter with one answer. ``fixed`` is the context's own slice, None where it is not certain.

    ``reason`` says why not; ``shift`` is the offset given minus the true one, in code points.
    """

    kind: str
    given: Given
    fixed: Annotation | None
    repeated: bool = False
    reason: str = ""
    shift: int | None = None


@dataclass(frozen=True, slots=True)
class Judged:
    """A row's class and flags, and its findings, one an answer. ``fields`` is None where it has none to read.

    ``reason`` says why the row cannot be used nor repaired, "" where it can. ``duplicate_of`` is the number of the
    first row with the same question and context.
    """

    row: Row
    kind: str
    fields: Fields | None
    findings: tuple[Finding, ...] = ()
    reason: str = ""
    duplicate_of: int | None = None

    @property
    def repeated(self) -> bool:
        """Whether any of its answers stands several times in the context."""
        return any(f.repeated for f in self.findings)

    @property
    def repaired(self) -> bool:
        """Whether the row can be used only when repaired."""
        return not self.reason and self.kind not in GOOD

    @property
    def name(self) -> str:
        """The row by number, and by id where it has one."""
        identity = self.fields.id if self.fields else self.row.fields.get("id")
        return f"row {self.row.number}" + (f" (id {quote(str(identity))[1:-1]})" if identity is not None else "")


@dataclass(frozen=True, slots=True)
class DataCheck:
    """Every row of a source, judged."""

    source: str
    rows: tuple[Judged, ...]

    @property
    def repaired(self) -> int:
        """Rows that can be used when repaired."""
        return sum(row.repaired for row in self.rows)

    @property
    def rejected(self) -> int:
        """Rows that cannot be used."""
        return sum(bool(row.reason) for row in self.rows)

    @property
    def bad_share(self) -> float:
        """Share of the rows that cannot be used as they are, 0 to 1."""
        return (self.repaired + self.rejected) / len(self.rows)

    @property
    def same_ids(self) -> int:
        """Rows whose id an earlier row has."""
        ids = [row.fields.id for row in self.rows if row.fields and row.fields.id is not None]
        return len(ids) - len(set(ids))

    def shifts(self) -> Counter[int]:
        """How often an offset is off by how much, over the answers of the class "shifted"."""
        return Counter(
            f.shift for row in self.rows for f in row.findings if f.kind == "shifted" and f.shift is not None
        )

    def to_dict(self) -> dict[str, Any]:
        """The counts: rows, classes (with the two flags), repaired, rejected."""
        counts = Counter(row.kind for row in self.rows)
        counts["repeated"] = sum(row.repeated for row in self.rows)
        counts["duplicate"] = sum(row.duplicate_of is not None for row in self.rows)
        return {
            "rows": len(self.rows),
            "classes": {name: counts[name] for name in _PRINTED},
            "repaired": self.repaired,
            "rejected": self.rejected,
        }


def check_rows(source: str, rows: Iterable[Row], reading: Reading) -> DataCheck:
    """Judges every row of ``source``. Raises InputError where there are none, or a column is in none of them."""
    judged: list[Judged] = []
    asked: dict[tuple[str, str], int] = {}
    for row in rows:
        found = judge(row, reading)
        if found.fields:
            key = (found.fields.context, found.fields.question)
            first = asked.setdefault(key, row.number)
            if first != row.number:
                found = replace(found, duplicate_of=first)
        judged.append(found)
    if not judged:
        raise InputError(f"{source}: holds no rows")
    _refuse_missing_columns(source, judged)
    return DataCheck(source, tuple(judged))


def judge(row: Row, reading: Reading) -> Judged:
    """The class of one row, its duplicates not looked at."""
    try:
        fields = parse(row, reading)
    except ProblemError as problem:
        field = reading.columns.get(problem.field, problem.field)
        return Judged(row, "empty", None, reason=f"{field}: {problem}" if field else str(problem))
    if not fields.answers:
        return Judged(row, "no_answer", fields)
    findings = tuple(_find(given, fields.context, reading, row.label_studio) for given in fields.answers)
    worst = max((f.kind for f in findings), key=CLASSES.index)
    return Judged(row, worst, fields, findings, next((f.reason for f in findings if f.reason), ""))


def _find(given: Given, context: str, reading: Reading, utf16: bool) -> Finding:
    """The class of one answer; ``utf16``: its offset is known to count UTF-16 units."""
    text, start = given.text, given.start
    offset = start if is_offset(start) and start >= 0 else None
    places = [Slice(at, at + len(text)) for at in occurrences(text, context)]
    repeated = len(places) > 1
    if places:
        if offset is not None:
            readings = (offset, from_utf16(offset, context))
            for at in reversed(readings) if utf16 else readings:
                if at is not None and context.startswith(text, at):
                    return Finding("exact" if at == offset else "utf16", given, Annotation(text, at), repeated)
        if start is None:
            place, reason = _only(places, given, reading)
            return Finding("exact", given, Annotation(text, place.start) if place else None, repeated, reason)
        return _chosen("shifted", given, places, context, offset, reading, repeated)
    span = Slice(offset, given.end) if offset is not None and given.end is not None else None
    for kind, found in (
        ("whitespace", find_spaced(text, context)),
        ("case", find_caseless(text, context)),
        ("detokenised", find_spelled(text, context, span)),
    ):
        if found:
            return _chosen(kind, given, found, context, offset, reading, len(found) > 1)
    return Finding("absent", given, None, False, f"{quote(text)} does not occur in the context")


def _chosen(
    kind: str, given: Given, found: list[Slice], context: str, offset: int | None, reading: Reading, repeated: bool
) -> Finding:
    """The finding with the slice nearest to the offset, or without one where that is not certain."""
    whole = whole_words(found, context)
    fixed: Slice | None
    if offset is None:
        fixed, reason = _only(whole, given, reading)
    else:
        whole = sorted(whole, key=lambda s: abs(s.start - offset))
        fixed, reason = whole[0], ""
        if len(whole) > 1 and abs(whole[1].start - offset) == abs(whole[0].start - offset):
            fixed, reason = None, f"{quote(given.text)} stands as near before its offset {offset} as after it"
    if fixed and kind != "shifted" and cuts_a_word(fixed, context):
        fixed, reason = None, f"{quote(given.text)} occurs only inside a longer word"
    if fixed is None:
        return Finding(kind, given, None, repeated, reason)
    shift = offset - fixed.start if offset is not None else None
    return Finding(kind, given, Annotation(context[fixed.start : fixed.end], fixed.start), repeated, "", shift)


def _only(places: list[Slice], given: Given, reading: Reading) -> tuple[Slice | None, str]:
    """The only place, or the first where that is asked for, else None and why."""
    if len(places) == 1 or reading.on_ambiguous == "first":
        return places[0], ""
    return None, (
        f"{quote(given.text)} occurs {len(places)} times in the context and no offset says which is meant: "
        "add answer_start, or take the first with --on-ambiguous first"
    )


def _refuse_missing_columns(source: str, rows: list[Judged]) -> None:
    """Raises InputError where every row lacks a field: then the mapping is wrong, not the rows."""
    first = rows[0].reason
    if ": is missing; " in first and all(row.reason == first for row in rows):
        raise InputError(f"{source}: in every row the field {first}")
