"""One raw row to its fields: context, question, id, split, and the answers as the annotators gave them.

What is read here is well formed, not yet true: whether an answer stands where its offset says is for
``readers`` (which refuse it where not) and ``check`` (which says what is the matter).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from qadeploy.data.carriers import SPLITS, Row
from qadeploy.data.columns import guess, parse_columns, rename
from qadeploy.data.wording import kind_of, names, quote
from qadeploy.errors import InputError

OnAmbiguous = Literal["error", "first", "skip"]


@dataclass(frozen=True, slots=True)
class Reading:
    """How the rows of a source are understood.

    ``on_ambiguous`` says what happens to an answer without an offset that occurs several times in its context (as a
    substring): an error that counts them, the first occurrence, or the row is skipped and counted. ``columns``
    maps our field names to the data's. ``no_answer_token`` is an answer that means "none in this context".
    Raises InputError on a value that is none of these.
    """

    on_ambiguous: OnAmbiguous = "error"
    columns: Mapping[str, str] = field(default_factory=dict)
    no_answer_token: str | None = None

    def __post_init__(self) -> None:
        if self.on_ambiguous not in get_args(OnAmbiguous):
            raise InputError(f"on_ambiguous is {self.on_ambiguous!r}: choose one of {', '.join(get_args(OnAmbiguous))}")

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Reading:
        """From options as the command line and ``run.json`` have them; ``columns`` is text there."""
        return cls(
            options.get("on_ambiguous", "error"),
            parse_columns(options.get("columns")),
            options.get("no_answer_token") or None,
        )


class ProblemError(Exception):
    """A row that cannot be used: the field at fault (ours, or "field.part") and why."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


@dataclass(frozen=True, slots=True)
class Given:
    """An answer as it was given: ``start`` is anything a file can hold, None where there is no offset.

    ``end`` (exclusive) is a whole number where the data has spans; ``field`` is where the offset stood.
    """

    text: str
    start: Any
    end: int | None
    field: str


@dataclass(frozen=True, slots=True)
class Fields:
    """The fields of a row. ``answers`` is empty where the row says that its context holds none."""

    context: str
    question: str
    answers: tuple[Given, ...]
    id: str | None
    split: str


def parse(row: Row, reading: Reading, *, annotated: bool = True) -> Fields:
    """The fields of a row, without its answers unless ``annotated``. Raises ProblemError on the first that is amiss."""
    if row.problem:
        raise ProblemError("", row.problem)
    fields = rename(row.fields, reading.columns)
    context, question = (_text(fields, name, row) for name in ("context", "question"))
    split = row.split
    if fields.get("split") not in (None, ""):
        split = SPLITS.get(str(fields["split"]), "")
        if not split:
            raise ProblemError("split", f"is {quote(str(fields['split']))}, one of {', '.join(SPLITS)} is needed")
    answers: tuple[Given, ...] = ()
    if annotated and not _is_no_answer(fields, reading.no_answer_token):
        if "answers" in fields:
            answers = _listed(fields["answers"], reading.no_answer_token)
        elif "answer" in fields:
            answers = (
                Given(
                    _text(fields, "answer", row), fields.get("answer_start"), fields.get("answer_end"), "answer_start"
                ),
            )
        else:
            raise _missing("answer", row)
    identity = fields.get("id")
    if identity is not None and not isinstance(identity, str | int):
        raise ProblemError("id", f"is {kind_of(identity)}, text is needed")
    _encodable(str(identity), "id")
    return Fields(context, question, answers, None if identity is None else str(identity), split)


def is_offset(value: Any) -> bool:
    """Whether the value can be an offset: a whole number."""
    return isinstance(value, int) and not isinstance(value, bool)


def _is_no_answer(fields: Mapping[str, Any], token: str | None) -> bool:
    if fields.get("is_impossible") is True:
        return True
    answer = fields.get("answer")
    return bool(token) and isinstance(answer, str) and answer.strip() == token


def _missing(field: str, row: Row) -> ProblemError:
    option = guess(row.fields)
    hint = f"; did you mean {option}?" if option else ""
    return ProblemError(field, f"is missing; the fields found are {names(row.fields)}{hint}")


def _text(fields: Mapping[str, Any], name: str, row: Row) -> str:
    if name not in fields:
        raise _missing(name, row)
    value = fields[name]
    if not isinstance(value, str):
        raise ProblemError(name, f"is {kind_of(value)}, text is needed")
    if not value.strip():
        raise ProblemError(name, "is empty")
    _encodable(value, name)
    return value


def _encodable(text: str, name: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ProblemError(name, f"holds a lone surrogate at code point {error.start}: not valid Unicode") from error


def _listed(value: Any, token: str | None) -> tuple[Given, ...]:
    if isinstance(value, dict):
        texts, starts = value.get("text"), value.get("answer_start")
        if not isinstance(texts, list) or not isinstance(starts, list):
            raise ProblemError("answers", "needs the lists 'text' and 'answer_start'")
        if len(texts) != len(starts):
            raise ProblemError("answers", f"has {len(texts)} texts and {len(starts)} answer_starts: one start a text")
        pairs = list(zip(texts, starts, strict=True))
    elif isinstance(value, list) and all(isinstance(v, dict) for v in value):
        pairs = [(v.get("text"), v.get("answer_start")) for v in value]
    else:
        raise ProblemError("answers", f"is {kind_of(value)}, {{'text': [...], 'answer_start': [...]}} is needed")
    found = []
    for text, start in pairs:
        if not isinstance(text, str) or not text.strip():
            raise ProblemError(
                "answers.text", "is empty" if isinstance(text, str) else f"is {kind_of(text)}, text is needed"
            )
        _encodable(text, "answers.text")
        if not token or text.strip() != token:
            found.append(Given(text, start, None, "answers.answer_start"))
    return tuple(found)
