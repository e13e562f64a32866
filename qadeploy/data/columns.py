"""Column names: the user's mapping onto ours, and a guess of it for the error that a column is missing."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterable, Mapping
from typing import Any

from qadeploy.errors import InputError

FIELDS = ("context", "question", "answer", "answers", "answer_start", "span", "id", "split", "is_impossible")
# Names seen in public data sets and exports, most telling first.
_ALSO = {
    "context": ("passage", "paragraph", "document", "review", "article", "text", "body", "content", "ctx"),
    "question": ("query", "question_text", "q", "prompt"),
    "answer": ("human_ans_spans", "answer_text", "answer_span", "span_text", "response", "target", "label", "a"),
    "span": (
        "human_ans_indices",
        "answer_indices",
        "indices",
        "offsets",
        "char_span",
        "start",
        "offset",
        "answer_offset",
    ),
}


def parse_columns(text: str | None) -> dict[str, str]:
    """``context=review,answer=span`` to {ours: theirs}. Raises InputError naming what is wrong with it."""
    mapping: dict[str, str] = {}
    for part in (text or "").split(","):
        if not part.strip():
            continue
        ours, equals, theirs = (piece.strip() for piece in part.partition("="))
        if not equals or not theirs or ours not in FIELDS:
            raise InputError(
                f"--columns {part.strip()!r}: give OURS=YOURS pairs by commas, OURS one of {', '.join(FIELDS)}, "
                "e.g. --columns context=review,answer=human_ans_spans,span=human_ans_indices"
            )
        if ours in mapping:
            raise InputError(f"--columns: {ours} is given twice")
        mapping[ours] = theirs
    return mapping


def rename(fields: Mapping[str, Any], mapping: Mapping[str, str]) -> dict[str, Any]:
    """The fields under our names; a span is taken apart into ``answer_start`` and ``answer_end``.

    A field of ours counts where its column is absent, so that one mapping does for data in both forms.
    """
    found = {ours: theirs for ours, theirs in mapping.items() if theirs in fields}
    if not found:
        return dict(fields)
    result = {name: value for name, value in fields.items() if name not in found.values() and name not in found}
    result.update({ours: fields[theirs] for ours, theirs in found.items()})
    if "span" in result:
        start, end = parse_span(result.pop("span"))
        result["answer_start"] = start
        if end is not None:
            result["answer_end"] = end
    return result


def parse_span(value: Any) -> tuple[Any, int | None]:
    """(start, end or None) of a span: "(3, 9)", [3, 9], {"start": 3, "end": 9}, "3" or 3.

    What is none of these comes back as the start, for the reader to refuse by name.
    """
    if isinstance(value, str):
        for parse in (json.loads, ast.literal_eval):
            try:
                value = parse(value)
                break
            except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
                continue
    if isinstance(value, Mapping):
        value = (value.get("start"), value.get("end"))
    if isinstance(value, tuple | list) and len(value) == 2 and all(_whole(v) for v in value):
        return value[0], value[1]
    return value, None


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def guess(found: Iterable[Any]) -> str:
    """A ``--columns`` option for data with these columns, or "" where nothing fits."""
    names = {str(name).lower(): str(name) for name in found}
    pairs = []
    for ours, others in _ALSO.items():
        if ours in names or (ours == "span" and "answer_start" in names) or (ours == "answer" and "answers" in names):
            continue
        fits = next((names[o] for o in others if o in names), None)
        if fits:
            pairs.append(f"{ours}={fits}")
    return f"--columns {','.join(pairs)}" if pairs else ""
