"""Scoring any predictor on annotated questions: a checkpoint and a bundle go through the same code."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from qadeploy.qa.metrics import Scores, score
from qadeploy.records import Answer, Example


class Predictor(Protocol):
    """Questions in, answers out."""

    def answer_stream(self, pairs: Iterable[tuple[str, str]], *, top_k: int = 1) -> Iterator[list[Answer]]:
        """The answers of each (question, context) pair, best first, in order."""
        ...


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The scores and the one prediction a question behind them, in the order of the examples."""

    scores: Scores
    answers: tuple[Answer, ...]

    def predictions(self, examples: Sequence[Example]) -> dict[str, str]:
        """SQuAD's predictions format: id to answer text."""
        return {i: a.text for e, a in zip(examples, self.answers, strict=True) for i in (e.id, *e.also)}


def evaluate(
    predictor: Predictor, examples: Sequence[Example], on_question: Callable[[], object] | None = None
) -> Evaluation:
    """Answers every example and scores the best answer; ``on_question`` is called after each."""
    answers = []
    for found in predictor.answer_stream((e.question, e.context) for e in examples):
        answers.append(found[0] if found else Answer("", 0, 0, 0.0))
        if on_question:
            on_question()
    return Evaluation(score(examples, answers), tuple(answers))
