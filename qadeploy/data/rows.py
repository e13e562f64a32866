"""Raw rows, which all formats and shapes are read into, and which ``fields``, ``loading`` and ``check`` examine."""

from __future__ import annotations

from dataclasses import dataclass
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
