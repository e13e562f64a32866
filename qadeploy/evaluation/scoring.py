"""Scoring any predictor on annotated questions: a checkpoint and a bundle go through the same code."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from qadeploy.core.calibration import expected_calibration_error
from qadeploy.core.metrics import Scores, score
from qadeploy.core.settings import QaSettings
from qadeploy.records import Answer, Example


class Predictor(Protocol):
    """Questions in, answers out."""

    settings: QaSettings

    def answer_stream(
        self,
        pairs: Iterable[tuple[str, str]],
        *,
        top_k: int = 1,
        allow_no_answer: bool = False,
        prefilter: int | None = None,
    ) -> Iterator[list[Answer]]:
        """The answers of each (question, context) pair, best first, in order."""
        ...


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The scores and the one prediction a question behind them, in the order of the examples.

    ``allow_no_answer`` says whether the null answer competed.
    """

    scores: Scores
    answers: tuple[Answer, ...]
    allow_no_answer: bool

    @property
    def calibration_error(self) -> float:
        """Expected calibration error of the answers' scores, 0 to 1; right is what matches exactly."""
        confidences = np.asarray([a.score for a in self.answers], dtype=np.float64)
        return expected_calibration_error(confidences, self.scores.rows_exact_match)

    def predictions(self, examples: Sequence[Example]) -> dict[str, str]:
        """SQuAD's predictions format: id to answer text."""
        return {i: a.text for e, a in zip(examples, self.answers, strict=True) for i in (e.id, *e.also)}


def evaluate(
    predictor: Predictor,
    examples: Sequence[Example],
    on_question: Callable[[], object] | None = None,
    *,
    allow_no_answer: bool | None = None,
    prefilter: int | None = None,
) -> Evaluation:
    """Answers every example and scores the best answer; ``on_question`` is called after each.

    ``allow_no_answer`` None goes by ``QaSettings.null_competes``: the null answer competes where the model was
    trained with questions without an answer, or the examples hold some. ``prefilter`` bounds the windows of a context
    that are read, as in ``Options``.
    """
    if allow_no_answer is None:
        allow_no_answer = predictor.settings.null_competes(examples)
    answers = []
    pairs = ((e.question, e.context) for e in examples)
    for found in predictor.answer_stream(pairs, allow_no_answer=allow_no_answer, prefilter=prefilter):
        answers.append(found[0] if found else Answer("", 0, 0, 0.0))
        if on_question:
            on_question()
    return Evaluation(score(examples, answers), tuple(answers), allow_no_answer)
