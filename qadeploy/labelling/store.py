"""The file of decisions: JSONL that is valid training data at any time.

A decision is one line, appended and flushed to the disk before the next row is shown; undoing it removes the line. A partial
line after a crash is removed at the next start, because it was never reported as saved. One process at a time holds the file.

``train`` refuses two rows on the same question of which only one has an answer. So a decision that contradicts another
annotator in this way goes to a second file, ``NAME.contradicting.jsonl``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qadeploy.errors import FailureError, InputError
from qadeploy.files import BINARY, append_line, holding, sync
from qadeploy.labelling.items import key_of

Row = dict[str, Any]
_BEGIN = '{"annotator": '  # the beginning of each line, which distinguishes a partial line from other data
_FIELDS: dict[str, type] = {
    "annotator": str, "time": str, "id": str, "context": str, "question": str, "answer": str, "answer_start": int,
    "is_impossible": bool,
}  # fmt: skip


class Store:
    """The decisions of all annotators, opened for one of them with ``open``."""

    def __init__(self, main: _Lines, aside: _Lines, annotator: str) -> None:
        self._main, self._aside = main, aside
        mine = [(row, lines) for lines in (main, aside) for row, _ in lines.rows if row["annotator"] == annotator]
        self._mine = sorted(mine, key=lambda each: each[0]["time"])

    @classmethod
    @contextmanager
    def open(cls, path: Path, annotator: str) -> Iterator[Store]:
        """Opens an existing or new file, and keeps it locked until the end.

        Raises:
            InputError: The name does not end in .jsonl, the file holds something else, its folder does not exist, or another
                process holds it.
        """
        if path.suffix != ".jsonl":
            raise InputError(f"--out {path}: must end in .jsonl, so that train can read it")
        if not path.absolute().parent.is_dir():
            raise InputError(f"--out {path}: its folder does not exist: make it first")
        with holding(path):
            yield cls(_Lines(path), _Lines(path.with_suffix(".contradicting.jsonl")), annotator)

    @property
    def rows(self) -> list[Row]:
        """The decisions of the annotator, oldest first."""
        return [row for row, _ in self._mine]

    def append(self, row: Row) -> None:
        """Saves a decision of the annotator. Raises OSError, FailureError; then no part of it is in the file."""
        key = key_of(row["question"], row["context"])
        others = (other for other, at in self._main.rows if at == key)
        lines = self._aside if any(o["is_impossible"] != row["is_impossible"] for o in others) else self._main
        lines.append(row)
        self._mine.append((row, lines))

    def undo(self) -> Row:
        """Undoes the annotator's last decision and returns it.

        Raises:
            FailureError: There is no decision, or another annotator's follows in the file.
            OSError: The file cannot be written.
        """
        if not self._mine:
            raise FailureError("there is no decision to undo")
        row, lines = self._mine[-1]
        lines.take_back(row)
        self._mine.pop()
        return row


class _Lines:
    """A file of rows, each with its key. The file is closed between two writes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.rows: list[tuple[Row, str]] = []
        self._ends = [0]
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return
        *lines, rest = content.split(b"\n")
        for number, line in enumerate(lines, 1):
            self._add(self._parsed(line, number), len(line) + 1)
        if rest:
            self._repair(rest, len(lines) + 1)

    def append(self, row: Row) -> None:
        data = (json.dumps(row, ensure_ascii=False) + "\n").encode()
        with self._writing() as descriptor:
            if not self._ends[-1]:
                sync(self._path.absolute().parent)
            append_line(descriptor, data)
        self._add(row, len(data))

    def take_back(self, row: Row) -> None:
        if self.rows[-1][0] is not row:
            raise FailureError("your last decision cannot be undone: another annotator's follows it in the file")
        with self._writing() as descriptor:
            os.ftruncate(descriptor, self._ends[-2])
            os.fsync(descriptor)
        self.rows.pop()
        self._ends.pop()

    def _add(self, row: Row, size: int) -> None:
        self.rows.append((row, key_of(row["question"], row["context"])))
        self._ends.append(self._ends[-1] + size)

    @contextmanager
    def _writing(self) -> Iterator[int]:
        """Opens the file. Raises FailureError if another program has changed it."""
        size = self._ends[-1]
        try:
            descriptor = os.open(self._path, os.O_WRONLY | BINARY | (0 if size else os.O_CREAT), 0o666)
        except FileNotFoundError as error:
            raise FailureError(f"{self._path}: has been moved or deleted: put it back") from error
        try:
            if os.fstat(descriptor).st_size != size:
                raise FailureError(f"{self._path}: another program has changed it: start qadeploy label again")
            yield descriptor
        except OSError as error:
            error.filename = str(self._path)  # the error for a full disk names no file
            raise
        finally:
            os.close(descriptor)

    def _parsed(self, line: bytes, number: int) -> Row:
        try:
            row = json.loads(line)
            if all(type(row[name]) is kind for name, kind in _FIELDS.items()):
                return dict(row)
            problem = "a field has a value of another type"
        except KeyError as error:
            problem = f"has no field {error.args[0]}"
        except (ValueError, TypeError, RecursionError):
            problem = "is not a JSON object"
        raise InputError(
            f"--out {self._path}: line {number}: {problem}, so this is not a file that qadeploy label wrote: give another --out"
        )

    def _repair(self, rest: bytes, number: int) -> None:
        """Completes or removes a last line without a line break. Raises InputError if it is not a line of this module."""
        size = self._ends[-1]
        try:
            row = self._parsed(rest, number)
        except InputError:
            begin = _BEGIN.encode()
            if not (rest.startswith(begin) or begin.startswith(rest)) or _is_json(rest):
                raise
            os.truncate(self._path, size)
        else:
            with self._path.open("ab") as stream:
                stream.write(b"\n")
            self._add(row, len(rest) + 1)
        sync(self._path)


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True
