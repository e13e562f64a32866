"""Values and errors in messages: short, and on one line."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

WITHHELD = (
    "an empty list of answers and no is_impossible: read as 'no answer in this context'; confirm this with --empty-answers "
    "no-answer, or give --empty-answers reject if labels are withheld"
)

OVERRULED = (
    "an answer that the context holds, but is_impossible too: read as 'no answer in this context'; remove is_impossible where the "
    "answer is meant"
)


def quote(text: str) -> str:
    """Quotes a text on one line, shortened to 60 code points."""
    return printable(json.dumps(text if len(text) <= 60 else text[:57] + "...", ensure_ascii=False))


def shown(value: Any) -> str:
    """A value on one line, shortened to 60 code points; for a list or an object, its kind."""
    return kind_of(value) if isinstance(value, dict | list) else quote(value) if isinstance(value, str) else str(value)


def names(fields: Iterable[Any]) -> str:
    """Lists field names separated by commas, or ``none``."""
    return printable(", ".join(str(name) for name in fields)) or "none"


def plural(number: int, noun: str) -> str:
    """Returns ``1,234 questions``, ``1 question``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def printable(text: str) -> str:
    """Puts a text on one line, with line separators, lone surrogates and the like as escapes."""
    return "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text)


def kind_of(value: Any) -> str:
    """Names the kind of a value, with its article."""
    known = {dict: "an object", list: "a list", str: "text", bool: "a boolean", type(None): "null"}
    return known.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)
