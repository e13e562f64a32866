"""Scoring an answerer, of a checkpoint or a bundle, on annotated questions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from qadeploy.core.calibration import expected_calibration_error
from qadeploy.core.drift import Distribution, Drift, Figure, Figures
from qadeploy.core.metrics import Metric, Scores, score
from qadeploy.core.settings import Options, any_unanswerable
from qadeploy.evaluation.predictions import Prediction, predict
from qadeploy.inference.answerer import Answerer
from qadeploy.inference.pairs import COMPARED, DecodedPair, figures_of, to_answers
from qadeploy.records import NO_ANSWER, Answer, Example

_SERVED = Options()


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The scores of an answerer and the answers behind them.

    Attributes:
        scores: The scores.
        answers: The best answer to each question, in the order of the examples.
        allow_no_answer: Whether the null answer competed.
        metric: How texts were compared.
        recorded: The entries of each question in the prediction files, if they were requested.
        drift: The figures that a server compares with its own, if they were requested.
    """

    scores: Scores
    answers: tuple[Answer, ...]
    allow_no_answer: bool
    metric: Metric
    recorded: tuple[Prediction, ...] = ()
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
    answerer: Answerer,
    examples: Sequence[Example],
    on_question: Callable[[], object] | None = None,
    *,
    allow_no_answer: bool | None = None,
    prefilter: int | None = None,
    metric: Metric | None = None,
    n_best_size: int | None = None,
    drift: bool = False,
) -> Evaluation:
    """Answers every example and scores the best answer.

    Args:
        answerer: The answerer to score.
        examples: The annotated questions.
        on_question: Called after each question.
        allow_no_answer: Whether the null answer competes; with None it does if any example has no answer.
        prefilter: The maximum windows of a context to read, as in ``Options``.
        metric: How texts are compared; None uses the answerer's metric.
        n_best_size: Maximum candidates to record for each question; None records nothing.
        drift: Whether to count the figures that a server counts by default.
    """
    metric = metric or answerer.settings.metric
    if allow_no_answer is None:
        allow_no_answer = any_unanswerable(examples)
    options, unknown = Options(allow_no_answer=allow_no_answer, prefilter=prefilter), answerer.encoder.unknown_id
    answers, recorded, counted = [], [], Drift()
    asked = ((e.question, e.context) for e in examples)
    for example, pair in zip(examples, answerer.read_stream(asked, options), strict=True):
        best = next(iter(to_answers(pair, options)), NO_ANSWER)
        answers.append(best)
        if n_best_size is not None:
            size, null = n_best_size, allow_no_answer
            recorded.append(predict(example, best, pair.scored, pair.settings, n_best_size=size, allow_no_answer=null))
        if drift:
            counted.add(_as_served(pair, unknown))
        if on_question:
            on_question()
    scores, figures = score(examples, answers, metric), counted.distributions() if drift else {}
    return Evaluation(scores, tuple(answers), allow_no_answer, metric, tuple(recorded), figures)


def _as_served(pair: DecodedPair, unknown: int | None) -> Figures:
    allowed = _SERVED.null_competes(pair.settings)
    decoded = pair.settings.decode(pair.scored, top_k=COMPARED, allow_no_answer=allowed)
    return figures_of(replace(pair, decoded=decoded), _SERVED, unknown)
