"""From a raw row to its fields: context, question, id, split, and the answers as the annotators gave them.

The fields are well formed, but not yet verified: ``loading`` refuses an answer that is not at its offset, ``check``
classifies it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from qadeploy import options
from qadeploy.data.annotation_tools import labels_of
from qadeploy.data.columns import guess, parse_columns, rename
from qadeploy.data.match import from_utf16
from qadeploy.data.rows import SPLITS, Problem, RawRow, Reason, RowError
from qadeploy.data.values import flag_of, is_missing, literal, offset_of
from qadeploy.data.wording import kind_of, names, quote, shown
from qadeploy.errors import InputError
from qadeploy.options import declared

OnAmbiguous = Literal["error", "first", "skip"]
EmptyAnswers = Literal["no-answer", "reject"]
_ANSWERS_SHAPE = "a list of answers or {'text': [...], 'answer_start': [...]}"
_STARTS = ("answer_start", "start", "start_offset", "start_char", "answer_starts", "offset", "offsets")
_ENDS = ("answer_end", "end", "end_offset", "end_char")
_NOT_GIVEN = frozenset({"NOT_GIVEN", "NO_ANSWER"})  # Haystack's categories of answers


@dataclass(frozen=True, slots=True, kw_only=True)
class DataOptions:
    """The options for reading the rows of a source. Raises InputError on an invalid value.

    An answer without an offset that occurs several times in its context (as a substring) is ambiguous: "error" reports and
    counts such rows, "first" takes the first place, "skip" skips and counts the row. If ``empty_answers`` is None, an empty
    list of answers means "no answer" with a warning; if all rows have one, that is an error.
    """

    columns: str | None = options.columns()
    no_answer_token: str | None = options.no_answer_token()
    on_ambiguous: OnAmbiguous = options.on_ambiguous()
    label: str | None = options.label()
    empty_answers: EmptyAnswers | None = options.empty_answers()

    def __post_init__(self) -> None:
        parse_columns(self.columns)
        if self.on_ambiguous not in get_args(OnAmbiguous):
            raise InputError(f"on_ambiguous is {self.on_ambiguous!r}: choose one of {', '.join(get_args(OnAmbiguous))}")
        if self.empty_answers not in {None, *get_args(EmptyAnswers)}:
            raise InputError(
                f"empty_answers is {self.empty_answers!r}: choose one of {', '.join(get_args(EmptyAnswers))}"
            )

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> DataOptions:
        """The options among ``values``, for example those of ``run.json``; missing ones take their defaults."""
        return cls(**{name: values[name] for name in declared(DataOptions) if name in values})

    @property
    def mapping(self) -> Mapping[str, str]:
        """The mapping of our field names to the data's column names, as given."""
        return parse_columns(self.columns)

    def column(self, name: str) -> str:
        """The data's name for one of our fields."""
        return self.mapping.get(name, name)

    def is_none(self, text: Any) -> bool:
        """Whether an answer means that there is none."""
        token = self.no_answer_token
        if token is None:
            return False
        return not token.strip() if is_missing(text) else isinstance(text, str) and text.strip() == token.strip()


@dataclass(frozen=True, slots=True)
class RawAnswer:
    """An answer as given in the data.

    Attributes:
        text: Its text, not blank.
        start: Its offset, in the units of the data; None if there is none.
        end: The end of its span (exclusive), if the data gives spans.
        field: The field that held the offset.
        cut: Whether its text was cut from the context by its offsets, because the data gives no text.
    """

    text: str
    start: int | None
    end: int | None
    field: str
    cut: bool = False


@dataclass(frozen=True, slots=True)
class ParsedRow:
    """The fields of a row.

    ``answers`` is empty if the row says that there is no answer. The row is ``withheld`` if its list of answers is empty but no
    other field says that there is none, and ``overruled`` if it gives an answer in its context, but also says that there is none.
    If answers are not read, the row may have passages, ``contexts``, of which some may be blank; ``context`` is then empty.
    """

    context: str
    question: str
    answers: tuple[RawAnswer, ...]
    id: str | None
    split: str
    withheld: bool = False
    contexts: tuple[str, ...] = ()
    overruled: bool = False


def parse_row(row: RawRow, options: DataOptions, *, annotated: bool = True) -> ParsedRow:
    """Reads the fields of a row.

    Args:
        row: The row.
        options: The data's column names and no-answer token.
        annotated: Whether to read the answers too.

    Raises:
        RowError: A field is missing or malformed; names the first such field by our name for it.
    """
    if row.problem:
        raise RowError(Problem(Reason.UNREADABLE, "", (row.problem,)))
    fields = rename(row.fields, options.mapping)
    contexts: tuple[str, ...] = ()
    if annotated or is_missing(fields.get("contexts")):
        context, question = (_text(fields, name, row) for name in ("context", "question"))
    else:
        contexts, context, question = _passages(fields), "", _text(fields, "question", row)
    split = row.split
    if not is_missing(fields.get("split")):
        split = SPLITS.get(str(fields["split"]).lower(), "")
        if not split:
            raise _wrong("split", quote(str(fields["split"])), f"one of {', '.join(SPLITS)}")
    answers: tuple[RawAnswer, ...] = ()
    withheld = overruled = False
    if annotated:
        impossible = _impossible(fields)
        if impossible:
            overruled = _gives_answer(fields, context, row, options)
        else:
            answers, withheld = _answers(fields, context, row, options, said=impossible is not None)
        if withheld and options.empty_answers == "reject":
            raise RowError(Problem(Reason.WITHHELD, "answers"))
    identity = None if is_missing(fields.get("id")) else fields.get("id")
    if isinstance(identity, float) and identity.is_integer():
        identity = int(identity)
    if identity is not None and not isinstance(identity, str | int):
        raise _wrong("id", kind_of(identity), "text")
    _refuse_surrogates(str(identity), "id")
    name = None if identity is None else str(identity)
    return ParsedRow(context, question, answers, name, split, withheld, contexts, overruled)


def parse_rows(
    source: str, rows: Sequence[RawRow], options: DataOptions, *, annotated: bool = True
) -> list[ParsedRow | Problem]:
    """Reads the fields of all rows of a source.

    Args:
        source: The name of the source, for messages.
        rows: The rows.
        options: The options for reading them.
        annotated: Whether to read the answers too.

    Returns:
        ``[rows]``, the fields of each, or why they cannot be read.

    Raises:
        InputError: ``label`` must be chosen or does not occur, or the labels of all rows seem to be withheld.
    """
    if annotated:
        _check_labels(source, rows, options)
    found: list[ParsedRow | Problem] = []
    for row in rows:
        try:
            found.append(parse_row(row, options, annotated=annotated))
        except RowError as error:
            found.append(error.problem)
    parsed = [row for row in found if isinstance(row, ParsedRow)]
    if rows and options.empty_answers is None and sum(row.withheld for row in parsed) == len(rows):
        raise InputError(
            f"{source}: every row has an empty list of answers, so the labels seem to be withheld: "
            "give data with answers, or --empty-answers no-answer if no context holds one"
        )
    return [_without_offsets(row) for row in found] if _are_placeholders(parsed) else found


def _check_labels(source: str, rows: Iterable[RawRow], options: DataOptions) -> None:
    """Raises InputError if regions have several labels and none is chosen, or the chosen label does not occur."""
    found = list(dict.fromkeys(label for row in rows for label in row.labels))
    if options.label is None and len(found) > 1:
        raise InputError(f"{source}: its regions have the labels {names(found)}: give that of the answers with --label")
    if options.label is not None and found and options.label not in found:
        raise InputError(f"{source}: no region has the label {options.label!r}; the labels found are {names(found)}")


def _are_placeholders(parsed: Sequence[ParsedRow]) -> bool:
    """Whether all offsets are 0, in several rows, but not every answer is at the start of its context."""
    given = [(row, a) for row in parsed for a in row.answers if a.start is not None]
    if sum(bool(row.answers) for row in parsed) < 2 or any(a.start or a.end or a.cut for _, a in given):
        return False
    return not all(row.context.startswith(a.text) for row, a in given)


def _without_offsets(row: ParsedRow | Problem) -> ParsedRow | Problem:
    if isinstance(row, Problem):
        return row
    return replace(row, answers=tuple(replace(a, start=None) for a in row.answers))


def _impossible(fields: Mapping[str, Any]) -> bool | None:
    """Whether the row is flagged as having no answer in its context; None without a flag."""
    said = {}
    for name, means in (("is_impossible", True), ("answerable", False)):
        try:
            found = flag_of(fields.get(name))
        except ValueError as error:
            raise _wrong(name, shown(fields[name]), "true or false") from error
        if found is not None:
            said[name] = found is means
    if len(set(said.values())) == 2:
        raise RowError(Problem(Reason.FLAGS_DISAGREE, "is_impossible"))
    return next(iter(said.values()), None)


def _gives_answer(fields: Mapping[str, Any], context: str, row: RawRow, options: DataOptions) -> bool:
    """Whether the row gives an answer that occurs in its context, whatever its flags are."""
    with suppress(RowError):  # a negative offset, for one, agrees with "no answer"
        return any(answer.text in context for answer in _answers(fields, context, row, options, said=False)[0])
    return False


def _answers(
    fields: Mapping[str, Any], context: str, row: RawRow, options: DataOptions, *, said: bool
) -> tuple[tuple[RawAnswer, ...], bool]:
    """The answers, and whether they are withheld; ``said`` means that the row is flagged as having an answer."""
    if "answers" not in fields:
        entry = {"text": fields.get("answer"), **{name: fields.get(name) for name in ("answer_start", "answer_end")}}
        if _is_none(entry, options):
            return (), False
        if "answer" not in fields and is_missing(entry["answer_end"]):
            _text(fields, "answer", row)
        return (_entry(entry, "answer", "answer_start", context, row),), False
    entries = _listed(fields["answers"])
    if not entries:
        if said:
            raise RowError(Problem(Reason.NONE_GIVEN, "answers"))
        return (), True
    if options.label is not None:
        entries = [e for e in entries if options.label in labels_of(e) or not labels_of(e)]
    given = [e for e in entries if not _is_none(e, options)]
    return tuple(_entry(e, "answers.text", "answers.answer_start", context, row) for e in given), False


def _entry(entry: Mapping[str, Any], name: str, place: str, context: str, row: RawRow) -> RawAnswer:
    """One answer; its text is cut from the context if only its offsets are given."""
    start, end = _offset(entry, _STARTS, place), _offset(entry, _ENDS, place)
    text = entry.get("text")
    if start is not None and start < 0:
        raise RowError(Problem(Reason.NEGATIVE, place, (start, shown(text))))
    if text is not None or start is None or end is None:
        return RawAnswer(_visible(text, name), start, end, place)
    first, last = (from_utf16(x, context) if row.utf16 else x for x in (start, end))
    if first is None or last is None or not 0 <= first < last <= len(context):
        raise RowError(Problem(Reason.OUTSIDE, place, (start, end, len(context))))
    return RawAnswer(_visible(context[first:last], name), start, end, place, cut=True)


def _is_none(entry: Mapping[str, Any], options: DataOptions) -> bool:
    """Whether an entry means that there is no answer: by the token, its category, or a blank text at a negative offset."""
    text, category = entry.get("text"), entry.get("answer_category")
    if options.is_none(text) or (isinstance(category, str) and category in _NOT_GIVEN):
        return True
    with suppress(ValueError):  # reported when the entry is read
        return is_missing(text) and (offset_of(_first(entry, _STARTS)) or 0) < 0
    return False


def _offset(entry: Mapping[str, Any], names: Sequence[str], place: str) -> int | None:
    value = _first(entry, names)
    try:
        return offset_of(value)
    except ValueError as error:
        raise RowError(Problem(Reason.NOT_WHOLE, place, (shown(value),))) from error


def _first(entry: Mapping[str, Any], names: Sequence[str]) -> Any:
    """The first of the named values that is not None."""
    return next((entry[name] for name in names if entry.get(name) is not None), None)


def _wrong(field: str, found: str, needed: str) -> RowError:
    return RowError(Problem(Reason.WRONG_VALUE, field, (found, needed)))


def _text(fields: Mapping[str, Any], name: str, row: RawRow) -> str:
    if name not in fields:
        option = guess(row.fields)
        hint = f"; did you mean {option}?" if option else ""
        raise RowError(Problem(Reason.MISSING, name, (names(row.fields), hint)))
    return _visible(fields[name], name)


def _passages(fields: Mapping[str, Any]) -> tuple[str, ...]:
    """The passages of a row: a list of texts, or a cell with such a list in Python or JSON syntax."""
    value = fields["contexts"]
    if not is_missing(fields.get("context")):
        raise RowError(Problem(Reason.BOTH, "contexts", ("context",)))
    if isinstance(value, str):
        value = literal(value)
    if not isinstance(value, list | tuple):
        raise _wrong("contexts", kind_of(value), "a list of texts")
    if not value:
        raise RowError(Problem(Reason.EMPTY_LIST, "contexts"))
    for number, passage in enumerate(value):
        if not isinstance(passage, str):
            raise _wrong(f"contexts[{number}]", kind_of(passage), "text")
        _refuse_surrogates(passage, f"contexts[{number}]")
    if not any(passage.strip() for passage in value):
        raise RowError(Problem(Reason.ALL_EMPTY, "contexts"))
    return tuple(value)


def _visible(value: Any, field: str) -> str:
    """Returns the value if it is valid text and not blank."""
    if not isinstance(value, str):
        raise _wrong(field, kind_of(value), "text")
    if not value.strip():
        raise RowError(Problem(Reason.EMPTY, field))
    _refuse_surrogates(value, field)
    return value


def _refuse_surrogates(text: str, field: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError(Problem(Reason.NOT_UNICODE, field, (error.start,))) from error


def _listed(value: Any) -> list[dict[str, Any]]:
    """The entries of ``answers`` in any shape, each with ``text`` and possibly offsets."""
    if isinstance(value, str):
        value = literal(value) if value.strip() else None
    if isinstance(value, dict):
        columns = {name: x for name, x in value.items() if isinstance(x, list)}
        if not columns:
            return [{"text": None, **value}]
        if "text" not in columns:
            raise RowError(Problem(Reason.NO_LISTS, "answers"))
        starts = next((name for name in _STARTS if value.get(name) is not None), None)
        if starts is None:
            return [{"text": text} for text in columns["text"]]
        columns.setdefault(starts, [value[starts]])
        if len(columns["text"]) != len(columns[starts]):
            raise RowError(Problem(Reason.UNEQUAL_LISTS, "answers", (len(columns["text"]), len(columns[starts]))))
        return [{"text": text, starts: start} for text, start in zip(columns["text"], columns[starts], strict=True)]
    if isinstance(value, list | tuple) and all(isinstance(v, dict | str) for v in value):
        return [{"text": v} if isinstance(v, str) else {"text": None, **v} for v in value]
    found = kind_of(value)
    if isinstance(value, list | tuple):
        found += f" with {kind_of(next(v for v in value if not isinstance(v, dict | str)))}"
    raise _wrong("answers", found, _ANSWERS_SHAPE)
