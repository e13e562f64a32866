"""Raw rows, which all formats and shapes are read into, and why ``fields``, ``loading`` or ``check`` cannot use one."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

SPLITS = {"train": "train", **dict.fromkeys(("validation", "valid", "val", "dev", "eval", "test"), "validation")}


@dataclass(frozen=True, slots=True)
class RawRow:
    """A row as read from the source.

    Attributes:
        number: Its number, from 1.
        fields: Its fields, under the data's names.
        split: "train" or "validation" if the source itself has splits.
        problem: Why the fields cannot be read; "" if they can.
        nested: Whether it comes from nested data such as SQuAD's, with one row per id.
        utf16: Whether its offsets count UTF-16 units, as Label Studio's do.
        labels: The labels of its regions, if it comes from an annotation tool.
    """

    number: int
    fields: dict[str, Any]
    split: str = ""
    problem: str = ""
    nested: bool = False
    utf16: bool = False
    labels: tuple[str, ...] = ()


class Reason(Enum):
    """Why a row, or one of its answers, cannot be used. Each value is a sentence with placeholders for the details."""

    UNREADABLE = "{}"  # the reason from the file format
    MISSING = "is missing; the fields found are {}{}"
    EMPTY = "is empty"
    ALL_EMPTY = "holds no passage with text"
    EMPTY_LIST = "is an empty list: give at least one passage"
    BOTH = "is given together with {}: leave one of them out"
    WRONG_VALUE = "must be {1}, not {0}"
    NOT_WHOLE = "must be a whole number, not {}"
    SPELLED_TWICE = "is in two columns, {} and {}: choose one with --columns"
    SPAN_DISAGREES = "begins at {}, answer_start is {}: leave one of them out"
    OUTSIDE = "gives no text: {} to {} is not a span of the context, which has {} code points"
    NEGATIVE = "is {}, which means 'none here', but the row gives the answer {}: set is_impossible, or give its place"
    FLAGS_DISAGREE = "says the opposite of answerable"
    WITHHELD = "is empty, and --empty-answers reject says that labels are withheld"
    NONE_GIVEN = "is empty although the row says that there is an answer"
    TOO_LONG = "leaves no room for the context in windows of {} tokens: shorten it, or raise max_seq_len"
    NOT_UNICODE = "holds a lone surrogate at code point {}: not valid Unicode"
    NO_LISTS = "needs the list 'text'"
    UNEQUAL_LISTS = "has {} texts and {} answer_starts: one start per text"
    SAME_ID = "{} is also the id of row {}: ids are unique"
    ABSENT = "{} does not occur in the context{}"
    AMBIGUOUS = "{} occurs {} times in the context and no offset says which is meant: add answer_start, or {}"
    WRONG_OFFSET = "{} does not match: the context has {} there, the answer is {}"
    FAR = "{} is not at its offset {}, and it is uncertain which of its {} occurrences is meant"
    CONTRADICTS = "the row and row {} ask the same: one says that there is no answer, the other gives {}"
    INSIDE_WORD = "{} occurs only inside a longer word"


@dataclass(frozen=True, slots=True)
class Problem:
    """One reason, the faulty field ("" for the whole row or an answer), and the details that fill the sentence."""

    reason: Reason
    field: str = ""
    details: tuple[object, ...] = ()

    @property
    def sentence(self) -> str:
        """The reason in words, without the field."""
        return self.reason.value.format(*self.details)

    def __str__(self) -> str:
        return f"{self.field}: {self.sentence}" if self.field else self.sentence


class RowError(Exception):
    """A row that cannot be used. ``str(error)`` is the sentence; ``problem`` also names the field."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.sentence)
        self.problem = problem
