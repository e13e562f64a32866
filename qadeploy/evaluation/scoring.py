"""Scoring any predictor, a checkpoint or a bundle, on annotated questions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, Unpack

import numpy as np

from qadeploy.core.calibration import expected_calibration_error
from qadeploy.core.drift import Distribution, Figure
from qadeploy.core.metrics import Metric, Scores, score
from qadeploy.core.settings import AnswerOptions, QaSettings, any_unanswerable
from qadeploy.records import NO_ANSWER, Answer, Example


class Predictor(Protocol):
    """Anything that answers questions."""

    settings: QaSettings

    def answer_stream(
        self, pairs: Iterable[tuple[str, str]], **options: Unpack[AnswerOptions]
    ) -> Iterator[list[Answer]]:
        """Yields the answers to each (question, context) pair in order, best first."""
        ...


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The scores of a predictor and the predictions behind them.

    Attributes:
        scores: The scores.
        answers: One prediction per question, in the order of the examples.
        allow_no_answer: Whether the null answer competed.
        metric: How texts were compared.
        drift: The figures that a server compares with its own, if the predictor was ``Watched``.
    """

    scores: Scores
    answers: tuple[Answer, ...]
    allow_no_answer: bool
    metric: Metric
    drift: Mapping[Figure, Distribution] = field(default_factory=dict)

    @property
    def calibration_error(self) -> float:
        """Expected calibration error of the answers' scores, 0 to 1; an exact match counts as right."""
        confidences = np.asarray([a.score for a in self.answers], dtype=np.float64)
        return expected_calibration_error(confidences, self.scores.rows_exact_match)

    def predictions(self, examples: Sequence[Example]) -> dict[str, str]:
        """Returns SQuAD's predictions format: id to answer text."""
        return {i: a.text for e, a in zip(examples, self.answers, strict=True) for i in (e.id, *e.also)}


def evaluate(
    predictor: Predictor,
    examples: Sequence[Example],
    on_question: Callable[[], object] | None = None,
    *,
    allow_no_answer: bool | None = None,
    prefilter: int | None = None,
    metric: Metric | None = None,
) -> Evaluation:
    """Answers every example and scores the best answer.

    Args:
        predictor: The predictor to score.
        examples: The annotated questions.
        on_question: Called after each question.
        allow_no_answer: Whether the null answer competes; with None it does if any example has no answer.
        prefilter: The maximum windows of a context to read, as in ``Options``.
        metric: How texts are compared; None uses the predictor's metric.
    """
    metric = metric or predictor.settings.metric
    if allow_no_answer is None:
        allow_no_answer = any_unanswerable(examples)
    answers = []
    pairs = ((e.question, e.context) for e in examples)
    for found in predictor.answer_stream(pairs, allow_no_answer=allow_no_answer, prefilter=prefilter):
        answers.append(found[0] if found else NO_ANSWER)
        if on_question:
            on_question()
    return Evaluation(score(examples, answers, metric), tuple(answers), allow_no_answer, metric)
