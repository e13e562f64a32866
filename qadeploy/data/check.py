"""The data check: classifies every row and says how it can be repaired.

A row has the first class of ``RowClass`` that fits; with several answers, the class of the worst. An offset is
"shifted" if the answer's exact text is elsewhere, but "utf16" or "utf8" if the text is exactly there once the offset is
read in UTF-16 units or UTF-8 bytes. ``repeated`` (an answer that occurs several times in its context) and ``duplicate``
(an earlier row has the same question and context) are flags, counted separately.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from qadeploy.data.fields import DataOptions, ParsedRow, RawAnswer, parse_rows
from qadeploy.data.match import (
    Slice,
    cuts_a_word,
    find_caseless,
    find_spaced,
    find_spelled,
    from_utf8,
    from_utf16,
    occurrences,
    whole_words,
)
from qadeploy.data.rows import Problem, RawRow, Reason
from qadeploy.data.wording import quote
from qadeploy.errors import InputError
from qadeploy.records import Annotation


class RowClass(StrEnum):
    """The class of a row or an answer, the worst last."""

    NO_ANSWER = "no_answer"
    EMPTY = "empty"
    EXACT = "exact"
    SHIFTED = "shifted"
    UTF16 = "utf16"
    UTF8 = "utf8"
    WHITESPACE = "whitespace"
    CASE = "case"
    DETOKENISED = "detokenised"
    ABSENT = "absent"


_CLASSES = list(RowClass)
_PRINTED = (
    "exact", "shifted", "whitespace", "case", "detokenised", "utf16", "utf8", "repeated", "absent", "empty", "duplicate", "no_answer",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class CheckedAnswer:
    """The result of checking one answer.

    Attributes:
        kind: Its class.
        given: The answer as given in the data.
        fixed: The slice of the context that is the answer; None if it is uncertain.
        repeated: Whether the answer occurs several times in the context.
        problem: Why there is no ``fixed``.
        shift: The given offset minus the true one, in code points.
    """

    kind: RowClass
    given: RawAnswer
    fixed: Annotation | None
    repeated: bool = False
    problem: Problem | None = None
    shift: int | None = None


@dataclass(frozen=True, slots=True)
class CheckedRow:
    """The result of checking one row.

    Attributes:
        raw: The row as it was read.
        kind: Its class.
        parsed: Its fields, None if they cannot be read.
        answers: One entry per answer.
        problem: Why the row can be neither used nor repaired, None if it can.
        duplicate_of: The number of the first row with the same question and context.
    """

    raw: RawRow
    kind: RowClass
    parsed: ParsedRow | None
    answers: tuple[CheckedAnswer, ...] = ()
    problem: Problem | None = None
    duplicate_of: int | None = None

    @property
    def repeated(self) -> bool:
        """Whether any of its answers occurs several times in the context."""
        return any(a.repeated for a in self.answers)

    @property
    def repaired(self) -> bool:
        """Whether the row can be used only after a repair."""
        return not self.problem and self.kind not in {RowClass.NO_ANSWER, RowClass.EXACT}

    @property
    def name(self) -> str:
        """The row's number, and its id if it has one."""
        identity = self.parsed.id if self.parsed else self.raw.fields.get("id")
        return f"row {self.raw.number}" + (f" (id {quote(str(identity))[1:-1]})" if identity is not None else "")


@dataclass(frozen=True, slots=True)
class CheckedData:
    """Every row of a source, checked."""

    source: str
    rows: tuple[CheckedRow, ...]

    @property
    def repaired(self) -> int:
        """The number of rows that can be used only after a repair."""
        return sum(row.repaired for row in self.rows)

    @property
    def rejected(self) -> int:
        """The number of rows that cannot be used."""
        return sum(row.problem is not None for row in self.rows)

    @property
    def bad_share(self) -> float:
        """The share of rows that cannot be used without a repair, 0 to 1."""
        return (self.repaired + self.rejected) / len(self.rows)

    def usable(self) -> list[tuple[CheckedRow, ParsedRow]]:
        """Returns the rows that can be used or repaired, with their fields."""
        return [(row, row.parsed) for row in self.rows if row.parsed and not row.problem]

    def by_context(self) -> dict[str, list[tuple[CheckedRow, ParsedRow]]]:
        """Returns the usable rows of each context."""
        groups: dict[str, list[tuple[CheckedRow, ParsedRow]]] = {}
        for row, parsed in self.usable():
            groups.setdefault(parsed.context, []).append((row, parsed))
        return groups

    def shifts(self) -> Counter[int]:
        """Counts by how many code points the offsets of "shifted" answers are off."""
        answers = (a for row in self.rows for a in row.answers if a.kind is RowClass.SHIFTED)
        return Counter(a.shift for a in answers if a.shift is not None)

    def to_dict(self) -> dict[str, Any]:
        """Returns the counts of rows: by class and flag, usable only after a repair, rejected, and with peculiarities.

        These are the id of an earlier row, an empty list of answers but no flag such as ``is_impossible``, and an answer in the
        context but also a flag that there is none.
        """
        parsed = [row.parsed for row in self.rows if row.parsed]
        ids = [row.id for row in parsed if row.id is not None]
        counts = Counter(str(row.kind) for row in self.rows)
        counts["repeated"] = sum(row.repeated for row in self.rows)
        counts["duplicate"] = sum(row.duplicate_of is not None for row in self.rows)
        return {
            "rows": len(self.rows),
            "classes": {name: counts[name] for name in _PRINTED},
            "repaired": self.repaired,
            "rejected": self.rejected,
            "same_ids": len(ids) - len(set(ids)),
            "empty_answers": sum(row.withheld for row in parsed),
            "overruled_answers": sum(row.overruled for row in parsed),
        }


_DRIFT = 3  # the least number of certain answers that must be off by the same amount


def check_rows(source: str, rows: Iterable[RawRow], options: DataOptions) -> CheckedData:
    """Classifies every row of a source.

    Args:
        source: The name of the source, for messages.
        rows: The rows.
        options: The options for reading them.

    Raises:
        InputError: The source has no rows, a column is missing from all of them, or ``label`` must be chosen.
    """
    raw = list(rows)
    if not raw:
        raise InputError(f"{source}: holds no rows")
    parsed = [
        replace(found, field=options.column(found.field)) if isinstance(found, Problem) else found
        for found in parse_rows(source, raw, options)
    ]
    first = parsed[0]
    if isinstance(first, Problem) and first.reason is Reason.MISSING and all(found == first for found in parsed):
        raise InputError(f"{source}: in every row, field {first}")  # the mapping is wrong, not the rows
    checked = [_check_row(row, found, options) for row, found in zip(raw, parsed, strict=True)]
    return CheckedData(source, tuple(_mark_duplicates(_resolve_by_drift(checked))))


def _check_row(row: RawRow, parsed: ParsedRow | Problem, options: DataOptions) -> CheckedRow:
    if isinstance(parsed, Problem):
        return CheckedRow(row, RowClass.EMPTY, None, problem=parsed)
    if not parsed.answers:
        return CheckedRow(row, RowClass.NO_ANSWER, parsed)
    answers = tuple(_check_answer(given, parsed.context, options, row.utf16) for given in parsed.answers)
    return _with_answers(CheckedRow(row, RowClass.EXACT, parsed), answers)


def _with_answers(row: CheckedRow, answers: tuple[CheckedAnswer, ...]) -> CheckedRow:
    worst = max((a.kind for a in answers), key=_CLASSES.index)
    return replace(row, kind=worst, answers=answers, problem=next((a.problem for a in answers if a.problem), None))


def _resolve_by_drift(rows: list[CheckedRow]) -> list[CheckedRow]:
    """Resolves repeated answers by the drift of the unique ones, if most of those are off by the same amount."""
    certain = Counter(a.shift for row in rows for a in row.answers if a.fixed and a.shift and not a.repeated)
    drift, count = certain.most_common(1)[0] if certain else (0, 0)
    if count < _DRIFT or 2 * count < certain.total():
        return rows
    return [_drifted(row, drift) if any(_may_drift(a) for a in row.answers) else row for row in rows]


def _may_drift(answer: CheckedAnswer) -> bool:
    return answer.kind is RowClass.SHIFTED and answer.repeated


def _drifted(row: CheckedRow, drift: int) -> CheckedRow:
    context = row.parsed.context if row.parsed else ""
    answers = []
    for answer in row.answers:
        text, at = answer.given.text, (answer.given.start or 0) - drift
        there = at >= 0 and context.startswith(text, at) and not cuts_a_word(Slice(at, at + len(text)), context)
        if _may_drift(answer) and there:
            answer = replace(answer, fixed=Annotation(text, at), problem=None, shift=drift)
        answers.append(answer)
    return _with_answers(row, tuple(answers))


def _mark_duplicates(rows: list[CheckedRow]) -> list[CheckedRow]:
    """Marks rows with the question and context of an earlier row, and rejects rows that contradict each other."""
    asked: dict[tuple[str, str], int] = {}
    found = list(rows)
    for i, row in enumerate(rows):
        if row.parsed is None:
            continue
        first = asked.setdefault((row.parsed.context, row.parsed.question), i)
        if first == i:
            continue
        other = rows[first]
        found[i] = replace(found[i], duplicate_of=other.raw.number)
        given = row.parsed.answers or (other.parsed.answers if other.parsed else ())
        same_set = other.parsed and row.parsed.split == other.parsed.split
        alike = other.parsed and bool(row.parsed.answers) == bool(other.parsed.answers)
        if alike or not same_set or row.raw.nested or row.problem or other.problem:
            continue
        for one, against in ((first, row), (i, other)):
            problem = Problem(Reason.CONTRADICTS, "", (against.raw.number, quote(given[0].text)))
            found[one] = replace(found[one], problem=found[one].problem or problem)
    return found


def _check_answer(given: RawAnswer, context: str, options: DataOptions, utf16: bool) -> CheckedAnswer:
    """Classifies one answer; ``utf16`` means that its offset is known to count UTF-16 units."""
    text, offset = given.text, given.start
    places = [Slice(at, at + len(text)) for at in occurrences(text, context)]
    repeated = len(places) > 1
    if places:
        if offset is None:
            place, problem = _only(places, given, options)
            fixed = Annotation(text, place.start) if place else None
            return CheckedAnswer(RowClass.EXACT, given, fixed, repeated, problem)
        if not utf16 and context.startswith(text, offset):
            return CheckedAnswer(RowClass.EXACT, given, Annotation(text, offset), repeated)
        units = [(RowClass.UTF16, from_utf16)] if utf16 else [(RowClass.UTF16, from_utf16), (RowClass.UTF8, from_utf8)]
        converted = [(kind, convert(offset, context)) for kind, convert in units]
        fitting = [(kind, at) for kind, at in converted if at is not None and context.startswith(text, at)]
        if len({at for _, at in fitting}) == 1:
            kind, at = fitting[0]
            if utf16 or not cuts_a_word(Slice(at, at + len(text)), context):
                kind = RowClass.EXACT if at == offset else kind
                return CheckedAnswer(kind, given, Annotation(text, at), repeated)
        return _nearest(RowClass.SHIFTED, given, places, context, options)
    span = Slice(offset, given.end) if offset is not None and given.end is not None else None
    for kind, found in (
        (RowClass.WHITESPACE, find_spaced(text, context)),
        (RowClass.CASE, find_caseless(text, context)),
        (RowClass.DETOKENISED, find_spelled(text, context, span)),
    ):
        if found:
            return _nearest(kind, given, found, context, options)
    return CheckedAnswer(RowClass.ABSENT, given, None, False, Problem(Reason.ABSENT, "", (quote(text), "")))


def _nearest(kind: RowClass, given: RawAnswer, found: list[Slice], context: str, options: DataOptions) -> CheckedAnswer:
    """Chooses the slice nearest to the offset, or none if it is uncertain which slice is meant."""
    whole, offset = whole_words(found, context), given.start
    place: Slice | None
    if offset is None:
        place, problem = _only(whole, given, options)
    else:
        whole = sorted(whole, key=lambda s: abs(s.start - offset))
        place, problem = whole[0], None
        if len(whole) > 1 and _could_be_another(offset, place.start, whole[1].start):
            problem = Problem(Reason.FAR, "", (quote(given.text), offset, len(whole)))
    if place and not problem and cuts_a_word(place, context):
        problem = Problem(Reason.INSIDE_WORD, "", (quote(given.text),))
    if place is None or problem:
        return CheckedAnswer(kind, given, None, len(found) > 1, problem)
    shift = offset - place.start if offset is not None else None
    fixed = Annotation(context[place.start : place.end], place.start)
    return CheckedAnswer(kind, given, fixed, len(found) > 1, None, shift)


def _could_be_another(offset: int, nearest: int, next_nearest: int) -> bool:
    """Whether the next nearest place may be meant.

    It may if it is less than twice as far from the offset, or from the nearest place, as those two are from each other.
    """
    return 2 * abs(offset - nearest) > min(abs(offset - next_nearest), abs(nearest - next_nearest))


def _only(places: list[Slice], given: RawAnswer, options: DataOptions) -> tuple[Slice | None, Problem | None]:
    """Returns the only place, or the first if the options allow it; otherwise None and the reason."""
    if len(places) == 1 or options.on_ambiguous == "first":
        return places[0], None
    choice = "take the first with --on-ambiguous first"
    return None, Problem(Reason.AMBIGUOUS, "", (quote(given.text), len(places), choice))
