"""Answering a file of questions into a file or folder of answers."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from qadeploy.errors import InputError, MissingExtraError
from qadeploy.records import Answer, Example
from qadeploy.runtime.answerer import Answerer

PART_ROWS = 50_000
COLUMNS = ("id", "answer", "score", "start", "end", "bundle")


def check_output(output: Path) -> None:
    """Raises InputError where ``output`` cannot be written: its folder is missing, or something is there."""
    if output.exists():
        raise InputError(f"{output}: exists already: remove it or give another --output")
    if not output.absolute().parent.is_dir():
        raise InputError(f"{output.parent}: no such folder to write into")


def answer_file(
    answerer: Answerer,
    examples: Sequence[Example],
    output: Path,
    on_question: Callable[[], object] | None = None,
    *,
    allow_no_answer: bool = False,
) -> int:
    """Writes one row a question, in order: JSONL for a name in .jsonl, else a folder of parquet parts.

    The rows have the columns ``COLUMNS``; the null answer is the empty text at 0. The output appears when it is
    whole. Returns the number of rows. Raises InputError (see ``check_output``), MissingExtraError (parquet without pyarrow).
    """
    check_output(output)
    bundle = answerer.bundle.hash if answerer.bundle else ""
    answers = answerer.answer_stream(((e.question, e.context) for e in examples), allow_no_answer=allow_no_answer)

    def rows() -> Iterator[dict[str, Any]]:
        for example, found in zip(examples, answers, strict=True):
            yield _row(example, found[0] if found else Answer("", 0, 0, 0.0), bundle)
            if on_question:
                on_question()

    temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        if output.suffix == ".jsonl":
            with temporary.open("w", encoding="utf-8") as stream:
                for row in rows():
                    stream.write(json.dumps(row, ensure_ascii=False) + "\n")
        else:
            temporary.mkdir()
            _write_parquet(rows(), temporary)
        os.replace(temporary, output)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        temporary.unlink(missing_ok=True)
    return len(examples)


def _row(example: Example, answer: Answer, bundle: str) -> dict[str, Any]:
    values = (example.id, answer.text, answer.score, answer.start, answer.end, bundle)
    return dict(zip(COLUMNS, values, strict=True))


def _write_parquet(rows: Iterator[dict[str, Any]], folder: Path) -> None:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise MissingExtraError("writing parquet (or name the output .jsonl)", "pyarrow", "parquet") from error
    part: list[dict[str, Any]] = []
    number = 0
    for row in rows:
        part.append(row)
        if len(part) == PART_ROWS:
            parquet.write_table(pyarrow.Table.from_pylist(part), folder / f"part-{number:05d}.parquet")
            part, number = [], number + 1
    if part or not number:
        parquet.write_table(pyarrow.Table.from_pylist(part), folder / f"part-{number:05d}.parquet")
