"""Writing what a data check found: the usable and repaired rows, and the rejected ones with the reason."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qadeploy.data.check import DataCheck, Judged
from qadeploy.errors import InputError
from qadeploy.files import write_text


@dataclass(frozen=True, slots=True)
class Written:
    """Two JSONL files, whose rows together are all rows of the source; ``renamed`` rows had the id of another."""

    clean: Path
    clean_rows: int
    rejected: Path
    rejected_rows: int
    renamed: int


def check_places(source: str, out: Path) -> Path:
    """The file for the rejected rows beside ``out``. Raises InputError where ``out`` cannot be written."""
    if out.suffix.lower() != ".jsonl":
        raise InputError(f"--fix {out}: the repaired rows are written as JSONL: give a name in .jsonl")
    if not out.absolute().parent.is_dir():
        raise InputError(f"--fix {out}: no such folder to write into")
    rejected = out.with_suffix(".rejected.jsonl")
    for place in (out, rejected):
        if place.is_dir():
            raise InputError(f"--fix {out}: {place} is a folder")
        if place.exists() and Path(source).exists() and place.samefile(source):
            raise InputError(f"--fix {out}: would overwrite {source}, which it is made from: give another name")
    return rejected


def write_fixed(check: DataCheck, out: Path) -> Written:
    """Writes every row of the check once: to ``out``, or to the file for rejected rows beside it.

    A row of ``out`` is {id, context, question, answers: {text, answer_start}} and its split where it has one; the texts
    are slices of the context, the offsets code points. A row without an id gets ``row-N``; one whose id
    another row has gets a number behind it. A rejected row keeps its fields as they were.
    Raises InputError (see ``check_places``).
    """
    rejected = check_places(check.source, out)
    lines: dict[Path, list[str]] = {out: [], rejected: []}
    given = {row.fields.id for row in check.rows if row.fields and row.fields.id is not None}
    taken: set[str] = set()
    renamed = 0
    for row in check.rows:
        if row.reason or row.fields is None:
            lines[rejected].append(_line(_rejected(row)))
            continue
        wanted = row.fields.id
        identity, number = f"row-{row.row.number}" if wanted is None else wanted, 2
        stem = identity
        while identity in taken or (identity in given and identity != wanted):
            identity, number = f"{stem}-{number}", number + 1
        renamed += wanted is not None and identity != wanted
        taken.add(identity)
        lines[out].append(_line(_clean(row, identity)))
    for place in (rejected, out):
        write_text(place, "".join(lines[place]))
    return Written(out, len(lines[out]), rejected, len(lines[rejected]), renamed)


def _clean(row: Judged, identity: str) -> dict[str, Any]:
    assert row.fields is not None  # noqa: S101 - a row without fields is rejected
    answers = [f.fixed for f in row.findings if f.fixed is not None]
    value: dict[str, Any] = {
        "id": identity,
        "context": row.fields.context,
        "question": row.fields.question,
        "answers": {"text": [a.text for a in answers], "answer_start": [a.start for a in answers]},
    }
    if row.fields.split:
        value["split"] = row.fields.split
    return value


def _rejected(row: Judged) -> dict[str, Any]:
    return {"row": row.row.number, "class": row.kind, "reason": row.reason, "fields": row.row.fields}


def _line(value: dict[str, Any]) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # a lone surrogate, which only an escape can carry
        text = json.dumps(value, default=str)
    return text + "\n"
