"""The questions of a bench, drawn evenly from annotated examples, and other examples to calibrate a peer with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qadeploy.core.settings import QaSettings
from qadeploy.core.windows import Encoder
from qadeploy.records import Example, Window
from qadeploy.timing import spread


@dataclass(frozen=True, slots=True)
class Workload:
    """Annotated questions and the name of their source."""

    source: str
    examples: tuple[Example, ...]

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """(question, context) of every example."""
        return [(e.question, e.context) for e in self.examples]


def draw(source: str, examples: Sequence[Example], questions: int) -> Workload:
    """At most ``questions`` examples, evenly spaced."""
    return Workload(source, tuple(spread(examples, questions)))


def calibration(known: Sequence[Example], workload: Workload, count: int) -> tuple[Example, ...]:
    """At most ``count`` of the ``known`` examples on contexts that are not in the workload, evenly spaced."""
    used = {e.context for e in workload.examples}
    return tuple(spread([e for e in known if e.context not in used], count))


def windows_of(encoder: Encoder, settings: QaSettings, examples: Sequence[Example]) -> list[Window]:
    """The windows of every example, in order. Raises QuestionTooLongError, StrideError, InputError."""
    pairs = encoder.encode_pairs([(e.question, e.context) for e in examples])
    return [window for pair in pairs for window in encoder.windows(*pair, **settings.lengths)]
