"""JSONL: each row is a document, read line by line, so that a file of any size needs little memory."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from hashlib import blake2b
from typing import Any

from qadeploy.corpus.records import Document, Skipped
from qadeploy.corpus.scanning import Found, OnSkipped
from qadeploy.data.wording import kind_of, plural, printable
from qadeploy.errors import InputError

TEXT_FIELDS = ("text", "context", "passage", "content", "contents", "body", "document")
_MOST_LINE = 2**24  # characters
_MOST_NAMED = 20  # faulty rows of a file that are named, each with its reason; the rest are counted
_MOST_NAME = 200


def row_documents(found: Found, skip: OnSkipped) -> Iterator[Document]:
    """Reads the rows of a file. Rows that repeat the text of an earlier row are skipped: data sets repeat it per question.

    Raises:
        InputError: The file is neither UTF-8 nor UTF-16 with a byte order mark, or none of its rows can be read.
    """
    seen: set[bytes] = set()
    ids: set[str] = set()
    repeated = faulty = count = 0
    for number, line in _lines(found):
        try:
            text, id_, title = _fields(line)
        except InputError as error:
            faulty += 1
            if faulty <= _MOST_NAMED:
                skip(Skipped(f"{found.name}:{number}", str(error)))
            continue
        key = blake2b(text.encode(), digest_size=16).digest()
        if key in seen:
            repeated += 1
            continue
        seen.add(key)
        count += 1
        name = f"{found.name}#{id_}" if id_ and id_ not in ids else f"{found.name}:{number}"
        ids.add(id_)
        yield Document(name, text, title=title, place=f"line {number}")
    if faulty > _MOST_NAMED:
        skip(Skipped(found.name, f"and {faulty - _MOST_NAMED:,} more rows that cannot be read"))
    if repeated:
        skip(Skipped(found.name, f"{plural(repeated, 'row')} with the text of an earlier row"))
    if not count:
        raise InputError(f"{found.name}: none of its rows can be read")


def _lines(found: Found) -> Iterator[tuple[int, str]]:
    """The lines that are not blank, counted from 1."""
    mark = found.stream.read(2)
    found.stream.seek(0)
    encoding = "utf-16" if mark in {b"\xff\xfe", b"\xfe\xff"} else "utf-8-sig"
    stream = io.TextIOWrapper(found.stream, encoding, newline="\n")
    number = 0
    try:
        while line := stream.readline(_MOST_LINE):
            number += 1
            if len(line) == _MOST_LINE and not line.endswith("\n"):
                raise InputError(
                    f"{found.name}: line {number} is longer than {_MOST_LINE:,} characters: split its text"
                )
            if line.strip():
                yield number, line
    except UnicodeDecodeError as error:
        raise InputError(f"{found.name}: not UTF-8 text after line {number}: save it as UTF-8") from error
    finally:
        stream.detach()


def _fields(line: str) -> tuple[str, str, str]:
    """The text, id and title of a row; id and title may be empty. Raises InputError with the reason."""
    try:
        row: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        where = f": {error.msg} in column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        raise InputError(f"not valid JSON{where}") from error
    if not isinstance(row, dict):
        raise InputError(f"must be an object with a field text, not {kind_of(row)}")
    field = next((name for name in TEXT_FIELDS if name in row), None)
    if field is None:
        raise InputError(f"has no field text (or {', '.join(TEXT_FIELDS[1:])})")
    text = row[field]
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"field {field} must be text that is not blank, not {kind_of(text)}")
    if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise InputError(f"field {field} holds a lone surrogate, which is no character")
    id_, title = (row.get(name) for name in ("id", "title"))
    known = isinstance(id_, str | int) and not isinstance(id_, bool)
    name = printable(str(id_))[:_MOST_NAME] if known else ""
    return text, name, printable(" ".join(title.split()))[:_MOST_NAME] if isinstance(title, str) else ""
