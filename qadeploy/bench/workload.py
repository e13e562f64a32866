"""The questions that a bench asks, drawn evenly from annotated examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qadeploy.errors import InputError
from qadeploy.records import Example


@dataclass(frozen=True, slots=True)
class Workload:
    """Annotated questions and where they come from."""

    source: str
    examples: tuple[Example, ...]

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """(question, context) of every example."""
        return [(e.question, e.context) for e in self.examples]


def draw(source: str, examples: Sequence[Example], questions: int) -> Workload:
    """At most ``questions`` examples at even distances. Raises InputError on fewer than one."""
    if questions < 1:
        raise InputError(f"questions {questions} is below 1")
    step = max(1.0, len(examples) / questions)
    chosen = [examples[int(i * step)] for i in range(min(questions, len(examples)))]
    return Workload(source, tuple(chosen))
