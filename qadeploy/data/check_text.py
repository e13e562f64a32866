"""A data check as text: the table of classes, the shifts, and the first rows of each class with their repair."""

from __future__ import annotations

from collections import Counter

from qadeploy.data.check import CheckedAnswer, CheckedData, CheckedRow, RowClass
from qadeploy.data.wording import OVERRULED, WITHHELD, plural, quote

MEANING = {
    RowClass.NO_ANSWER: "the row says that its context has no answer",
    RowClass.EMPTY: "a field is missing, blank or unreadable",
    RowClass.EXACT: "the answer is at its offset, or occurs once",
    RowClass.SHIFTED: "the answer is not at its offset",
    RowClass.UTF16: "the offset counts UTF-16 units",
    RowClass.UTF8: "the offset counts UTF-8 bytes",
    RowClass.WHITESPACE: "white space differs",
    RowClass.CASE: "letter case differs",
    RowClass.DETOKENISED: "punctuation or spacing differs",
    RowClass.ABSENT: "the answer is not in the context",
}
_SHIFTS = 6


def check_lines(check: CheckedData, show: int = 3) -> list[str]:
    """Returns the check as lines of text.

    Args:
        check: The checked rows.
        show: How many rows of each faulty class to show.
    """
    counted = check.to_dict()
    counts = counted["classes"]
    text = [f"{check.source}: {plural(len(check.rows), 'row')}", "", "  class          rows   share  repair"]
    for kind, meaning in MEANING.items():
        rows = [row for row in check.rows if row.kind is kind]
        numbers = (sum(row.repaired for row in rows), "repaired"), (sum(bool(row.problem) for row in rows), "rejected")
        done = ", ".join(f"{n:,} {what}" for n, what in numbers if n)
        text.append(f"  {kind:<12} {len(rows):>6,}  {len(rows) / len(check.rows):>6.1%}  {done or '-':<28} {meaning}")
    text.append(
        f"  also: {plural(counts['repeated'], 'row')} whose answer occurs several times in its context (repeated), "
        f"{counts['duplicate']:,} with the question and context of an earlier row (duplicate)"
    )
    if counted["same_ids"]:
        text.append(
            f"  {counted['same_ids']:,} rows have the id of an earlier row: train refuses them, --fix numbers them"
        )
    for key, what in (("empty_answers", WITHHELD), ("overruled_answers", OVERRULED)):
        if counted[key]:
            text.append(f"  {plural(counted[key], 'row')} with {what}")
    shifts = check.shifts()
    if shifts:
        text.append(f"  offsets are off by {_shifts(shifts)} code points")
    for kind in RowClass:
        rows = [row for row in check.rows if row.kind is kind and (row.problem or row.repaired)]
        text += _section(kind, [(row.name, _remark(row)) for row in rows], show)
    repeated = [row for row in check.rows if row.repeated and not row.problem]
    text += _section("repeated", [(row.name, _repeated(row)) for row in repeated], show)
    again = [row for row in check.rows if row.duplicate_of is not None]
    text += _section(
        "duplicate", [(row.name, f"has the question and context of row {row.duplicate_of}") for row in again], show
    )
    return text


def check_summary(check: CheckedData) -> str:
    """Returns the nonzero counts on one line."""
    counts = check.to_dict()["classes"]
    return f"{plural(len(check.rows), 'row')}: " + ", ".join(f"{n} {name}" for name, n in counts.items() if n)


def _remark(row: CheckedRow) -> str:
    """Says what is wrong with a row, or how it is repaired."""
    if row.problem:
        return str(row.problem)
    return "; ".join(_repair(a) for a in row.answers if a.kind == row.kind)


def _repair(answer: CheckedAnswer) -> str:
    given, fixed = answer.given, answer.fixed
    if fixed is None:
        return str(answer.problem)
    if fixed.text == given.text:
        units = {RowClass.UTF16: " (UTF-16 units)", RowClass.UTF8: " (UTF-8 bytes)"}.get(answer.kind, "")
        return f"{quote(given.text)}: answer_start {given.start}{units} -> {fixed.start}"
    return f"{quote(given.text)} -> {quote(fixed.text)} at {fixed.start}"


def _repeated(row: CheckedRow) -> str:
    fixed = next(a.fixed for a in row.answers if a.repeated and a.fixed)
    return f"{quote(fixed.text)} occurs several times, the one at {fixed.start} is meant"


def _section(name: str, rows: list[tuple[str, str]], show: int) -> list[str]:
    if not rows or not show:
        return []
    more = [f"  ... and {len(rows) - show:,} more"] if len(rows) > show else []
    return ["", name, *(f"  {who}: {what}" for who, what in rows[:show]), *more]


def _shifts(shifts: Counter[int]) -> str:
    common = shifts.most_common(_SHIFTS)
    others = shifts.total() - sum(n for _, n in common)
    text = ", ".join(f"{shift:+,d} ({n:,})" for shift, n in common)
    return text + (f", other amounts ({others:,})" if others else "")
