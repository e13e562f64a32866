"""Single values in data files: offsets, flags, and cells that hold a Python or JSON value."""

from __future__ import annotations

import ast
import io
import json
import math
import tokenize
import warnings
from typing import Any

_FLAGS = {
    **dict.fromkeys(("true", "t", "yes", "y", "1", "1.0"), True),
    **dict.fromkeys(("false", "f", "no", "n", "0", "0.0"), False),
}
_ATOMS = frozenset({tokenize.STRING, tokenize.NUMBER})
_SILENT = frozenset({tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER})
_NUMPY = frozenset({"array", "int32", "int64", "float32", "float64", "str_"})


def plain(name: object) -> str:
    """A name without case, spaces and punctuation: "Answer Start" and "answer_start" become "answerstart"."""
    return "".join(c for c in str(name).lower() if c.isalnum())


def is_missing(value: Any) -> bool:
    """Whether a value is missing: null, a blank text, or NaN, which data frames use for missing values."""
    return (
        value is None
        or (isinstance(value, float) and math.isnan(value))
        or (isinstance(value, str) and not value.strip())
    )


def offset_of(value: Any) -> int | None:
    """Reads an offset.

    Args:
        value: The value in the file: 255, 255.0 or the text of either.

    Returns:
        The offset; None if the value is missing.

    Raises:
        ValueError: The value is anything else.
    """
    if is_missing(value):
        return None
    number = value
    if isinstance(value, str):
        number = int(value) if value.strip().lstrip("+-").isdecimal() else float(value)
    if isinstance(number, int) and not isinstance(number, bool):
        return number
    if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number) or number % 1:
        raise ValueError(f"{value!r} is no offset")
    return int(number)


def flag_of(value: Any) -> bool | None:
    """Reads a flag such as ``is_impossible``: true, TRUE, yes, 1, 1.0 and their opposites.

    Returns:
        The flag; None if the value is missing.

    Raises:
        ValueError: The value is anything else.
    """
    if is_missing(value):
        return None
    text = str(value).strip().lower() if isinstance(value, str | bool | int | float) else ""
    if text not in _FLAGS:
        raise ValueError(f"{value!r} is neither true nor false")
    return _FLAGS[text]


def literal(text: str) -> Any:
    """Reads a cell that holds JSON or a Python literal, including numpy's notation: ``array([...])``, ``['a' 'b']``.

    Returns:
        The value; any other text is returned unchanged.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the parser warns of some texts that are not literals: '\\d', 1if
            return ast.literal_eval(_Arrays().visit(ast.parse(_with_commas(text.strip()), mode="eval")))
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError, tokenize.TokenError):
        return text


def _with_commas(text: str) -> str:
    """Inserts the commas that numpy leaves out between values; Python would join ``'New' 'York'`` into one text."""
    parts: list[str] = []
    before = None
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in _SILENT:
            continue
        ends = before is not None and (before.type in _ATOMS or before.string in ")]}")
        begins = token.type in _ATOMS or (token.string in "[{" and token.type == tokenize.OP)
        parts += [", ", token.string] if ends and begins else [token.string]
        before = token
    return "".join(parts)


class _Arrays(ast.NodeTransformer):
    """Replaces numpy's arrays and numbers by their contents."""

    def visit_Call(self, node: ast.Call) -> ast.AST:
        name = getattr(node.func, "id", None) or getattr(node.func, "attr", "")  # array(...), np.int64(...)
        return self.visit(node.args[0]) if name in _NUMPY and len(node.args) == 1 else node
