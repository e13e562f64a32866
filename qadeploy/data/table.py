"""A data check as text: the table of classes, the shifts, and the first rows of each class with their repair."""

from __future__ import annotations

from collections import Counter

from qadeploy.data.check import CLASSES, DataCheck, Finding, Judged
from qadeploy.data.wording import quote

_MEANING = {
    "no_answer": "the row says that its context holds none",
    "empty": "a field is missing, blank or cannot be read",
    "exact": "the answer stands where its offset says, or once",
    "shifted": "the answer stands elsewhere than its offset says",
    "utf16": "the offset counts UTF-16 units",
    "whitespace": "white space differs",
    "case": "letter case differs",
    "detokenised": "equal but for signs that are no letters or digits",
    "absent": "the answer does not stand in its context",
}
_SHIFTS = 6


def lines(check: DataCheck, show: int = 3) -> list[str]:
    """The check as text, with at most ``show`` rows of each class that is amiss."""
    counts = check.to_dict()["classes"]
    text = [f"{check.source}: {len(check.rows)} rows", "", "  class          rows   share  repair"]
    for name in CLASSES:
        rows = [row for row in check.rows if row.kind == name]
        rejected = sum(bool(row.reason) for row in rows)
        repaired = sum(row.repaired for row in rows)
        done = ", ".join(f"{n} {what}" for n, what in ((repaired, "repaired"), (rejected, "rejected")) if n)
        text.append(
            f"  {name:<12} {len(rows):>6}  {len(rows) / len(check.rows):>6.1%}  {done or '-':<28} {_MEANING[name]}"
        )
    text += [
        f"  and besides: {counts['repeated']} rows whose answer stands several times in its context (repeated), "
        f"{counts['duplicate']} whose question and context an earlier row has (duplicate)"
    ]
    if check.same_ids:
        text.append(f"  {check.same_ids} rows have the id of an earlier row: train refuses them, --fix numbers them")
    shifts = check.shifts()
    if shifts:
        text.append(f"  offsets are off by {_shifts(shifts)} code points")
    for name in CLASSES:
        rows = [row for row in check.rows if row.kind == name and (row.reason or row.repaired)]
        text += _section(name, [(row.name, remark(row)) for row in rows], show)
    repeated = [row for row in check.rows if row.repeated and not row.reason]
    text += _section("repeated", [(row.name, _repeated(row)) for row in repeated], show)
    again = [row for row in check.rows if row.duplicate_of is not None]
    text += _section("duplicate", [(row.name, f"asks what row {row.duplicate_of} asks") for row in again], show)
    return text


def one_line(check: DataCheck) -> str:
    """The counts on one line, those that are 0 left out."""
    counts = check.to_dict()["classes"]
    return f"{len(check.rows)} rows: " + ", ".join(f"{n} {name}" for name, n in counts.items() if n)


def remark(row: Judged) -> str:
    """What is the matter with a row, and the suggested repair."""
    if row.reason:
        return row.reason
    return "; ".join(_repair(f) for f in row.findings if f.kind == row.kind)


def _repair(finding: Finding) -> str:
    given, fixed = finding.given, finding.fixed
    assert fixed is not None  # noqa: S101 - else the row has a reason
    if fixed.text == given.text:
        units = " (UTF-16 units)" if finding.kind == "utf16" else ""
        return f"{quote(given.text)}: answer_start {given.start}{units} -> {fixed.start}"
    return f"{quote(given.text)} -> {quote(fixed.text)} at {fixed.start}"


def _repeated(row: Judged) -> str:
    finding = next(f for f in row.findings if f.repeated)
    assert finding.fixed is not None  # noqa: S101 - the row has no reason
    return f"{quote(finding.fixed.text)} stands there several times, the one at {finding.fixed.start} is meant"


def _section(name: str, rows: list[tuple[str, str]], show: int) -> list[str]:
    if not rows or not show:
        return []
    more = [f"  ... and {len(rows) - show} more"] if len(rows) > show else []
    return ["", f"{name}", *(f"  {who}: {what}" for who, what in rows[:show]), *more]


def _shifts(shifts: Counter[int]) -> str:
    common = shifts.most_common(_SHIFTS)
    others = sum(shifts.values()) - sum(n for _, n in common)
    text = ", ".join(f"{shift:+d} ({n})" for shift, n in common)
    return text + (f", other amounts ({others})" if others else "")
