"""How values and errors are worded in messages: short, and on one line."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any


def quote(text: str) -> str:
    """The text in quotes, cut at 60 code points, on one line."""
    return printable(json.dumps(text if len(text) <= 60 else text[:57] + "...", ensure_ascii=False))


def names(fields: Iterable[Any]) -> str:
    """Field names by commas, or ``none``."""
    return printable(", ".join(str(name) for name in fields)) or "none"


def printable(text: str) -> str:
    """The text on one line: line separators, lone surrogates and the like as escapes."""
    return "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text)


def kind_of(value: Any) -> str:
    """What kind of value this is, with its article."""
    known = {dict: "an object", list: "a list", str: "text", bool: "a boolean", type(None): "null"}
    return known.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)


def one_line(error: BaseException) -> str:
    """An error's message on one line, or its class where it has none."""
    return " ".join(str(error).split()) or type(error).__name__
