"""Loading data: from files and hub data sets to validated ``Example`` lists.

``read`` returns every row or raises one DataError that lists every bad row. It drops rows only with
``on_ambiguous="skip"``, and counts them.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace

from qadeploy.data.fields import DataOptions, ParsedRow, RawAnswer, parse_rows
from qadeploy.data.formats import load_rows
from qadeploy.data.match import from_utf16, occurrences
from qadeploy.data.rows import Problem, RawRow, Reason, RowError
from qadeploy.data.wording import OVERRULED, WITHHELD, quote
from qadeploy.errors import DataError, DataWarning, InputError
from qadeploy.records import Annotation, Example


@dataclass(frozen=True, slots=True)
class DataSet:
    """Examples in file order, their source, and the numbers of rows skipped, or read with the first of several places."""

    source: str
    examples: tuple[Example, ...]
    skipped: int = 0
    first_taken: int = 0

    def part(self, split: str) -> tuple[Example, ...]:
        """Returns the examples whose fixed split is ``split``."""
        return tuple(e for e in self.examples if e.split == split)


def read(
    source: str | Sequence[str],
    options: DataOptions | None = None,
    *,
    token: str | None = None,
    annotated: bool = True,
    rows: Iterable[RawRow] | None = None,
) -> DataSet:
    """Reads a data set.

    Rows with the same question and context are several annotators of one question and become one example with all
    their answers. In SQuAD's own nesting every id stays an example, because every id is scored.

    Args:
        source: ``handbook``, a file, or ``hub:NAME[:SPLIT]``; or several, which ``joined`` joins. A source that is named
            twice is read once.
        options: The options for reading rows; None for the defaults.
        token: An access token for the hub.
        annotated: False to ignore answers (for questions to answer, not to train on).
        rows: The rows of a single source, if they are already loaded.

    Raises:
        DataError: Rows cannot be used; all such rows of a source are listed.
        InputError: A source, column or option cannot be used, or a source has no rows.
        MissingExtraError: The format needs an optional package.
    """
    if not isinstance(source, str):
        return joined([read(each, options, token=token, annotated=annotated) for each in sources(source)])
    loaded = load_rows(source, token) if rows is None else rows
    return _collect(source, list(loaded), options or DataOptions(), annotated)


def read_split(
    source: str, split: str, options: DataOptions, say: Callable[[str], object], *, annotated: bool = True
) -> tuple[Example, ...]:
    """Reads the examples of one split.

    Args:
        source: As for ``read``.
        split: ``train`` or ``validation``; ``all`` for every example; ``auto`` for the validation split, or all without one.
        options: The options for reading rows.
        say: Called with remarks on rows that were skipped or guessed, or belong to another split.
        annotated: As for ``read``.

    Raises:
        InputError: No row has the split. Also raises what ``read`` raises.
    """
    data = read(source, options, annotated=annotated)
    if data.skipped:
        say(f"{source}: {data.skipped} ambiguous rows skipped")
    if data.first_taken:
        say(f"{source}: {data.first_taken} answers taken at their first place")
    if split == "all":
        return data.examples
    part = data.part("validation" if split == "auto" else split)
    if split == "auto":
        if part and len(part) < len(data.examples):
            say(
                f"{source}: scoring the {len(part)} questions of its validation split (--split all scores all questions)"
            )
        return part or data.examples
    if not part:
        raise InputError(f"{source}: no row has the split {split!r}")
    return part


def joined(sets: Sequence[DataSet]) -> DataSet:
    """Joins data sets into one.

    A question on the same context in several sets becomes one example with all their answers. Ids need to be unique
    within each set only: "-2" is appended to an id that an earlier set uses for another question.

    Args:
        sets: The data sets, at least one.

    Raises:
        DataError: A question has an answer in one set and "no answer" in another; all such questions are listed.
    """
    examples: dict[str, Example] = {}
    asked: dict[tuple[str, str, str], str] = {}
    taken: set[str] = set()
    problems = []
    for data in sets:
        known = dict(asked)
        for example in data.examples:
            key = (example.context, example.question, example.split)
            if key in known:
                earlier = examples[known[key]]
                if bool(earlier.answers) != bool(example.answers):
                    text = quote((earlier.answers or example.answers)[0].text)
                    problems.append(
                        f"{data.source}: {quote(example.question)} (id {example.id}) is also in an earlier file, and only one "
                        f"of the two has the answer {text}: correct one, or leave it out"
                    )
                    continue
                ids = [i for i in (example.id, *example.also) if i not in (earlier.id, *earlier.also)]
                also = (*earlier.also, *(_free(i, taken) for i in ids))
                examples[earlier.id] = replace(earlier, answers=earlier.answers + example.answers, also=also)
                continue
            example = replace(example, id=_free(example.id, taken), also=tuple(_free(i, taken) for i in example.also))
            examples[example.id] = example
            asked.setdefault(key, example.id)
    if problems:
        raise DataError(problems, "")
    return DataSet(
        source_name([data.source for data in sets]),
        tuple(examples.values()),
        sum(data.skipped for data in sets),
        sum(data.first_taken for data in sets),
    )


def _free(identity: str, taken: set[str]) -> str:
    """Returns the id, with "-2" appended as long as it is taken, and adds it to ``taken``."""
    while identity in taken:
        identity += "-2"
    taken.add(identity)
    return identity


def sources(source: str | Sequence[str]) -> tuple[str, ...]:
    """One or several sources as a tuple, without duplicates.

    Raises:
        InputError: No source is given.
    """
    found = (source,) if isinstance(source, str) else tuple(dict.fromkeys(source))
    if not found:
        raise InputError("no data is named: give 'handbook', a file or 'hub:NAME'")
    return found


def source_name(source: str | Sequence[str]) -> str:
    """The name of one or several sources in messages."""
    return ", ".join(sources(source))


def hash_examples(examples: Iterable[Example]) -> str:
    """Returns the SHA-256 of the examples' content, whatever file format they came in."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps(asdict(example), sort_keys=True, ensure_ascii=False).encode())
    return digest.hexdigest()


# ---------------------------------------------------------------- rows to examples

# Problems that ``qadeploy check --fix`` may be able to repair.
_REPAIRABLE = {Reason.ABSENT, Reason.AMBIGUOUS, Reason.WRONG_OFFSET, Reason.SAME_ID}


def _collect(source: str, rows: list[RawRow], options: DataOptions, annotated: bool) -> DataSet:
    examples: list[Example] = []
    problems: list[tuple[int, Problem]] = []
    skipped = first_taken = 0
    seen: dict[str, int] = {}
    asked: dict[tuple[str, str, str], tuple[int, int]] = {}
    parsed = parse_rows(source, rows, options, annotated=annotated)
    fields = [found for found in parsed if isinstance(found, ParsedRow)]
    _warn_of_labels(source, len(rows), fields, options)
    given = {found.id for found in fields if found.id is not None}  # generated ids avoid these
    for row, found in zip(rows, parsed, strict=True):
        if isinstance(found, Problem):
            problems.append((row.number, found))
            continue
        try:
            example, guessed = _example(row, found, options)
            first_taken += guessed
            if found.id is None:
                while example.id in seen or example.id in given:
                    example = replace(example, id=f"{example.id}-2")
            elif example.id in seen:
                raise RowError(Problem(Reason.SAME_ID, "id", (quote(example.id), seen[example.id])))
            key = (example.context, example.question, example.split)
            if annotated and not row.nested and key in asked:
                at, number = asked[key]
                examples[at] = _merged(examples[at], example, number)
                seen[example.id] = row.number
                continue
        except RowError as error:
            if error.problem.reason is Reason.AMBIGUOUS and options.on_ambiguous == "skip":
                skipped += 1
            else:
                problems.append((row.number, error.problem))
            continue
        seen[example.id] = row.number
        asked[key] = len(examples), row.number
        examples.append(example)
    if problems:
        fix = ""
        if annotated and any(problem.reason in _REPAIRABLE for _, problem in problems):
            fix = f"See what can be repaired: qadeploy check {source} --fix OUT.jsonl"
        raise DataError([f"{source}: {_line(number, problem, options)}" for number, problem in problems], fix)
    if not examples:
        raise InputError(f"{source}: holds no rows that can be used")
    return DataSet(source, tuple(examples), skipped, first_taken)


def _line(number: int, problem: Problem, options: DataOptions) -> str:
    field = f", field {options.column(problem.field)}" if problem.field else ""
    return f"row {number}{field}: {problem.sentence}"


def _warn_of_labels(source: str, rows: int, fields: Sequence[ParsedRow], options: DataOptions) -> None:
    """Warns if labels may be withheld, or contradict a flag."""
    withheld, overruled = sum(row.withheld for row in fields), sum(row.overruled for row in fields)
    if withheld and options.empty_answers is None:
        warnings.warn(f"{source}: {withheld} of {rows} rows have {WITHHELD}", DataWarning, stacklevel=2)
    if overruled:
        warnings.warn(f"{source}: {overruled} of {rows} rows have {OVERRULED}", DataWarning, stacklevel=2)


def _merged(first: Example, again: Example, number: int) -> Example:
    """Merges the examples of two annotators of a question; ``number`` is the row of the first."""
    if bool(first.answers) != bool(again.answers):
        text = (first.answers or again.answers)[0].text
        raise RowError(Problem(Reason.CONTRADICTS, "", (number, quote(text))))
    return replace(first, answers=first.answers + again.answers, also=(*first.also, again.id))


def _example(row: RawRow, parsed: ParsedRow, options: DataOptions) -> tuple[Example, bool]:
    found = [_annotation(given, parsed.context, options, row.utf16) for given in parsed.answers]
    return Example(
        id=f"row-{row.number}" if parsed.id is None else parsed.id,
        question=parsed.question,
        context=parsed.context,
        answers=tuple(annotation for annotation, _ in found),
        split=parsed.split,
    ), any(guessed for _, guessed in found)


def _annotation(given: RawAnswer, context: str, options: DataOptions, utf16: bool) -> tuple[Annotation, bool]:
    """Returns the answer at its offset or at the place found, and whether that is the first of several places."""
    text, start = given.text, given.start
    if start is None:
        places = occurrences(text, context)
        field = "answers.text" if given.field == "answers.answer_start" else "answer"
        if not places:
            hint = ": it must be an exact copy of a part of the context"
            raise RowError(Problem(Reason.ABSENT, field, (quote(text), hint)))
        if len(places) > 1 and options.on_ambiguous != "first":
            choice = "choose with --on-ambiguous first|skip"
            raise RowError(Problem(Reason.AMBIGUOUS, field, (quote(text), len(places), choice)))
        return Annotation(text, places[0]), len(places) > 1
    at = from_utf16(start, context) if utf16 else start
    there = context[at : at + len(text)] if at is not None else ""
    if at is None or there != text:
        raise RowError(Problem(Reason.WRONG_OFFSET, given.field, (start, quote(there), quote(text))))
    return Annotation(text, at), False
