"""``qadeploy check`` as a function: the check, and its result as files of usable and of rejected rows."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qadeploy import options
from qadeploy.core.settings import QaSettings
from qadeploy.data.check import CheckedData, CheckedRow, check_rows
from qadeploy.data.fields import DataOptions, ParsedRow
from qadeploy.data.formats import load_rows
from qadeploy.data.lengths import Lengths, load_encoder, measure_lengths
from qadeploy.data.rows import Problem, Reason
from qadeploy.errors import InputError
from qadeploy.files import new_file, require_new, writing
from qadeploy.options import check as check_declared
from qadeploy.options import option
from qadeploy.shipped import base_model_path

_MUCH = 2**22  # characters of repeated contexts


@dataclass(frozen=True, slots=True)
class CheckOptions(DataOptions):
    """The options for checking a file and writing the result."""

    fix: str | None = option(None, "Write usable and repaired rows to this JSONL file, rejected rows beside it.")
    max_bad: float | None = option(
        None, "Exit with 1 if a larger share of the rows cannot be used without a repair.", least=0, most=1
    )
    show: int = option(3, "Rows to show per class.", least=0)
    base: str | None = option(
        None, "Checkpoint or hub name whose tokenizer counts the tokens.", shown="the shipped base model"
    )
    max_seq_len: int | None = option(None, "Longest window in tokens.", least=16, shown="384")
    doc_stride: int | None = option(None, "Overlap of windows in tokens.", least=0, shown="128")
    token: str | None = options.hub_token()


@dataclass(frozen=True, slots=True)
class Written:
    """Two JSONL files that together hold every row of the source; ``renamed`` counts the rows that had another row's id."""

    clean: Path
    clean_rows: int
    rejected: Path
    rejected_rows: int
    renamed: int


def check_file(
    source: str, chosen: CheckOptions, *, lengths: bool = True
) -> tuple[CheckedData, Lengths | None, Written | None]:
    """Checks every row of a source.

    Args:
        source: ``handbook``, a file, or ``hub:NAME[:SPLIT]``.
        chosen: The options of the check.
        lengths: Whether to count tokens and windows too, which finds questions that leave no room for a context; with
            ``fix`` they are always counted.

    Returns:
        The rows, their lengths if they were counted, and the files that were written if ``chosen.fix`` names one.

    Raises:
        InputError: The source, an option or the path of ``fix`` cannot be used.
        MissingExtraError: The format needs an optional package.
    """
    check_declared(chosen)
    if chosen.fix:
        check_places(source, Path(chosen.fix))
    checked = check_rows(source, load_rows(source, chosen.token), chosen)
    measured = None
    if lengths or chosen.fix:  # --fix rejects questions that leave no room
        settings = QaSettings().changed(max_seq_len=chosen.max_seq_len, doc_stride=chosen.doc_stride)
        measured = measure_lengths(checked, load_encoder(chosen.base or str(base_model_path())), settings)
        too_long = Problem(Reason.TOO_LONG, "question", (settings.max_seq_len,))
        rejected = {*measured.too_long_rows}
        rows = (replace(r, problem=too_long) if r.raw.number in rejected else r for r in checked.rows)
        checked = replace(checked, rows=tuple(rows))
    return checked, measured, write_fixed(checked, Path(chosen.fix)) if chosen.fix else None


def check_places(source: str, out: Path) -> Path:
    """Returns the path for the rejected rows, beside ``out``. Raises InputError if either file exists or cannot be written."""
    if out.suffix.lower() != ".jsonl":
        raise InputError(f"--fix {out}: the repaired rows are written as JSONL: give a name that ends in .jsonl")
    rejected = out.with_suffix(".rejected.jsonl")
    for place in (out, rejected):
        if place.is_dir():
            raise InputError(f"--fix {out}: {place} is a folder")
        if place.exists() and Path(source).exists() and place.samefile(source):
            raise InputError(f"--fix {out}: would overwrite its source {source}: give another name")
        require_new(place, "--fix")
    return rejected


def write_fixed(check: CheckedData, out: Path) -> Written:
    """Writes every checked row once, to ``out`` or to the file for rejected rows beside it.

    A row of ``out`` is {id, context, question, answers: {text, answer_start}}, with ``is_impossible`` if it has no answer and its
    split if it has one. If many questions share long contexts, a line is {context, qas: [...]} instead, as in SQuAD's
    paragraphs, so that each context is written once. Texts are slices of the context, and offsets count code points. A row
    without an id gets ``row-N``; a repeated id gets a number appended. A rejected row keeps its original fields.

    Args:
        check: The checked rows.
        out: The JSONL file for the usable rows.

    Raises:
        InputError: One of the files cannot be written (see ``check_places``).
    """
    rejected = check_places(check.source, out)
    usable = check.usable()
    bad = [row for row in check.rows if row.problem or row.parsed is None]
    identities, renamed = _identities(check)
    with ExitStack() as stack:
        for place in (rejected, out):
            stack.enter_context(new_file(place, "--fix"))
        with writing(rejected, new=True) as stream:
            for row in bad:
                entry = {"row": row.raw.number, "class": row.kind, "reason": str(row.problem), "fields": row.raw.fields}
                stream.write(_line(entry))
        with writing(out, new=True) as stream:
            if _shares_contexts(check):
                for context, rows in check.by_context().items():
                    qas = [_clean(row, parsed, identities[row.raw.number]) for row, parsed in rows]
                    stream.write(_line({"context": context, "qas": qas}))
            else:
                for row, parsed in usable:
                    stream.write(_line({"context": parsed.context} | _clean(row, parsed, identities[row.raw.number])))
    return Written(out, len(usable), rejected, len(bad), renamed)


def _identities(check: CheckedData) -> tuple[dict[int, str], int]:
    """The ids of the usable rows by row number, and how many rows had another row's id."""
    given = {row.parsed.id for row in check.rows if row.parsed and row.parsed.id is not None}
    found: dict[int, str] = {}
    taken: set[str] = set()
    renamed = 0
    for row, parsed in check.usable():
        stem = f"row-{row.raw.number}" if parsed.id is None else parsed.id
        identity, number = stem, 2
        while identity in taken or (identity in given and identity != parsed.id):
            identity, number = f"{stem}-{number}", number + 1
        renamed += parsed.id is not None and identity != parsed.id
        taken.add(identity)
        found[row.raw.number] = identity
    return found, renamed


def _shares_contexts(check: CheckedData) -> bool:
    """Whether to write each context once: contexts are long, or nested SQuAD rows repeat a question.

    ``read`` merges flat rows with the same question, but not rows nested as in SQuAD, so both keep their form.
    """
    again = [row.raw.nested for row in check.rows if row.duplicate_of is not None]
    if again:
        return all(again)
    usable = [parsed.context for _, parsed in check.usable()]
    return sum(map(len, usable)) - sum(map(len, set(usable))) > _MUCH


def _clean(row: CheckedRow, parsed: ParsedRow, identity: str) -> dict[str, Any]:
    answers = [a.fixed for a in row.answers if a.fixed]
    return {
        "id": identity,
        "question": parsed.question,
        "answers": {"text": [a.text for a in answers], "answer_start": [a.start for a in answers]},
        **({} if answers else {"is_impossible": True}),
        **({"split": parsed.split} if parsed.split else {}),
    }


def _line(value: dict[str, Any]) -> bytes:
    try:
        return json.dumps(value, ensure_ascii=False, default=str).encode() + b"\n"
    except UnicodeEncodeError:  # a lone surrogate, which must be escaped
        return json.dumps(value, default=str).encode() + b"\n"
