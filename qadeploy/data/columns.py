"""Column names: the user's mapping of columns to our fields, and a suggested mapping when a column is missing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

from qadeploy.data.rows import Problem, Reason, RowError
from qadeploy.data.values import is_missing, literal, offset_of, plain
from qadeploy.errors import InputError

FIELDS = (
    "context", "contexts", "question", "answer", "answers", "answer_start", "answer_end", "span", "id", "split", "is_impossible", "answerable",
)  # fmt: skip
# Names seen in public data sets and exports, the most specific first.
_ALSO = {
    "context": (
        "passage", "paragraph", "document", "document_text", "document_plaintext", "review", "article", "text", "body", "content",
        "ctx",
    ),
    "question": ("query", "question_text", "q", "prompt"),
    "answer": (
        "human_ans_spans", "answer_text", "selected_text", "answer_span", "span_text", "response", "target", "label", "a",
    ),
    "span": (
        "human_ans_indices", "answer_indices", "indices", "offsets", "char_span", "start", "offset", "answer_offset",
    ),
}  # fmt: skip
# Endings of columns that describe a field but are not one.
_DESCRIBES = ("id", "type", "lang", "language", "index", "length", "url", "source", "title", "score")
_OPPOSITE = frozenset({"answerable", "isanswerable", "hasanswer"})  # the opposites of is_impossible
_BY_PLAIN = {plain(name): name for name in FIELDS}


@lru_cache(maxsize=256)
def _aliases(found: tuple[Any, ...]) -> dict[str, Any]:
    """Our names for columns that are spelled in another case or with spaces; a column with our exact name takes precedence."""
    aliases: dict[str, Any] = {}
    for name in found:
        ours = _BY_PLAIN.get(plain(name))
        if ours and ours != name and ours not in found:
            if ours in aliases:
                raise RowError(Problem(Reason.SPELLED_TWICE, ours, (aliases[ours], name)))
            aliases[ours] = name
    return aliases


@lru_cache(maxsize=256)
def parse_columns(text: str | None) -> Mapping[str, str]:
    """Parses ``context=review,answer=span`` into {ours: theirs}. Raises InputError that names the faulty pair."""
    mapping: dict[str, str] = {}
    for part in (text or "").split(","):
        if not part.strip():
            continue
        ours, equals, theirs = (piece.strip() for piece in part.partition("="))
        if not equals or not theirs or ours not in FIELDS:
            raise InputError(
                f"--columns {part.strip()!r}: give OURS=YOURS pairs separated by commas, OURS one of {', '.join(FIELDS)}, "
                "e.g. --columns context=review,answer=human_ans_spans,span=human_ans_indices"
            )
        if ours in mapping:
            raise InputError(f"--columns: {ours} is given twice")
        if ours == "is_impossible" and plain(theirs) in _OPPOSITE:
            raise InputError(f"--columns {part.strip()}: it says the opposite: give answerable={theirs}")
        mapping[ours] = theirs
    return mapping


def columns_of(fields: Iterable[Any], mapping: Mapping[str, str]) -> dict[str, Any]:
    """Returns {ours: theirs} for the columns that are mapped, or spelled differently from our names."""
    given = tuple(fields)
    if not mapping:
        return _aliases(given)
    mapped = {ours: theirs for ours, theirs in mapping.items() if theirs in given}
    return {ours: theirs for ours, theirs in _aliases(given).items() if theirs not in mapped.values()} | mapped


def rename(fields: Mapping[str, Any], mapping: Mapping[str, str]) -> dict[str, Any]:
    """Returns the fields under our names, with a span split into ``answer_start`` and ``answer_end``.

    If a mapped column is absent, a field with our own name is used, so that one mapping works for data in both forms. Our
    own names may be written in any case and with spaces.
    """
    found = columns_of(fields, mapping)
    if not found and "span" not in fields:
        return dict(fields)
    result = {name: value for name, value in fields.items() if name not in found.values() and name not in found}
    result.update({ours: fields[theirs] for ours, theirs in found.items()})
    if "span" in result:
        start, end = _start_and_end(result.pop("span"))
        given = result.get("answer_start")
        if not is_missing(start):
            if not is_missing(given) and _differ(given, start):
                raise RowError(Problem(Reason.SPAN_DISAGREES, "span", (start, given)))
            result["answer_start"] = start
            if end is not None:
                result["answer_end"] = end
    return result


def _differ(one: Any, other: Any) -> bool:
    try:
        return offset_of(one) != offset_of(other)
    except ValueError:
        return True


def _start_and_end(value: Any) -> tuple[Any, Any]:
    """Of a span "(3, 9)", [3, 9] or {"start": 3, "end": 9}; of anything else, the value itself and None."""
    if isinstance(value, str):
        value = literal(value)
    if isinstance(value, Mapping):
        value = (value.get("start"), value.get("end"))
    if isinstance(value, tuple | list) and len(value) == 2:
        return value[0], value[1]
    return value, None


def guess(found: Mapping[str, Any]) -> str:
    """Suggests a ``--columns`` option for a row with these fields; "" if no column fits.

    Only usable columns are suggested: texts for the context, the question and the answer, each for one field.
    """
    taken = {_BY_PLAIN[each] for each in map(plain, found) if each in _BY_PLAIN}
    free = [name for name in found if plain(name) not in _BY_PLAIN]
    pairs = []
    for ours, others in _ALSO.items():
        if ours in taken or (ours == "span" and "answer_start" in taken) or (ours == "answer" and "answers" in taken):
            continue
        usable = [name for name in free if not set(",='") & set(str(name))]
        fits = [name for name in usable if ours == "span" or (isinstance(found[name], str) and found[name].strip())]
        names = {plain(name): name for name in fits}
        best = next((names[plain(other)] for other in others if plain(other) in names), None)
        if best is None and ours != "span":  # question_translated, translated_context
            best = next((name for each, name in names.items() if _is_variant(each, ours)), None)
        if best is not None:
            pairs.append(f"{ours}={best}")
            free.remove(best)
    if not pairs:
        return ""
    text = ",".join(pairs)
    return f"--columns '{text}'" if " " in text else f"--columns {text}"


def _is_variant(name: str, ours: str) -> bool:
    """Whether a plain name is one of ours with a prefix or suffix, and not a description of the field."""
    return (name.startswith(ours) or name.endswith(ours)) and not name.endswith(_DESCRIBES)
