"""The questions that choose between candidates, and what a candidate loses on them against the float model.

With a small dev set single answers decide: one of 86 is 1.16 points of F1. So training questions are added, and each question
is answered by the float model and by the candidate. The model knows training questions by heart: it is surer of its answers,
rounding then changes them less often, and plain means would understate the loss. So questions are weighted by class to
match the dev set; the class is how sure the float model is of its answer (quarters of the dev set's scores;
post-stratification, Holt & Smith 1979). If the training part has no unsure questions, those of the dev set are alone in
their class, and the interval becomes wider.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from qadeploy.core.metrics import bootstrap_interval
from qadeploy.core.settings import any_unanswerable
from qadeploy.evaluation.scoring import evaluate
from qadeploy.export.reference import Reference
from qadeploy.inference.answerer import Answerer
from qadeploy.records import Example, Float64Array
from qadeploy.timing import spread
from qadeploy.training.runs import known_examples

ENOUGH = 500  # a dev set of this size needs no training questions
MOST = 400  # questions of the training part
_CLASSES = 4


@dataclass(frozen=True, slots=True, eq=False)
class Judges:
    """The judging questions, of which the first ``dev`` are the dev set's, and the float model's F1 on each, 0 to 1.

    ``weights`` ``[questions]`` have a mean of 1.
    """

    examples: tuple[Example, ...]
    dev: int
    rows_f1: Float64Array
    weights: Float64Array
    allow_no_answer: bool

    @property
    def worth(self) -> float:
        """The number of equally weighted questions with the same information (Kish's effective sample size)."""
        return float(self.weights.sum() ** 2 / (self.weights**2).sum()) if len(self.weights) else 0.0

    def to_dict(self) -> dict[str, Any]:
        """How many questions of each part, as plain JSON values."""
        return {"dev": self.dev, "training": len(self.examples) - self.dev, "worth": round(self.worth, 1)}

    def change(self, candidate: Answerer) -> dict[str, Any]:
        """The change of F1 in points from the float model to the candidate, question by question, as ``MeasuredRecipe`` has it.

        ``f1_lost`` is the weighted loss over all questions; the others are changes: its 95 % interval, and the plain means over
        the dev set's and the training questions (None without any).
        """
        found = evaluate(candidate, self.examples, allow_no_answer=self.allow_no_answer).scores.rows_f1
        difference = found - self.rows_f1
        weighed = self.weights * difference
        training = 100 * float(difference[self.dev :].mean()) if self.dev < len(difference) else None
        return {
            "f1_lost": -100 * float(weighed.mean()),
            "f1_change_interval": bootstrap_interval(weighed),
            "f1_change_dev": 100 * float(difference[: self.dev].mean()),
            "f1_change_training": training,
        }


def find_judges(reference: Reference, model: Answerer, seconds: float | None = None) -> Judges:
    """The judging questions of a run: its dev set and, if that is small, as many training questions as ``seconds`` allow.

    ``model`` is the float model; it answers them all. Contexts of the dev set and of the held-out questions are left out.
    If the training data are not available, the dev set judges alone.
    """
    dev = reference.choosing
    further: list[Example] = []
    if reference.dev and len(dev) < ENOUGH:
        taken = {e.context for e in (*dev, *reference.examples)}
        further = [e for e in known_examples(reference.run.checkpoint) if e.context not in taken]
    allow = any_unanswerable((*dev, *further))
    started = time.monotonic()
    judged = evaluate(model, dev, allow_no_answer=allow)
    each = (time.monotonic() - started) / max(1, len(dev))
    count = fitting_questions(len(dev), len(further), each, seconds)
    further = spread(further, count) if count else []
    more = evaluate(model, further, allow_no_answer=allow)
    sure = [np.asarray([a.score for a in part.answers]) for part in (judged, more)]
    return Judges(
        (*dev, *further),
        len(dev),
        np.concatenate([judged.scores.rows_f1, more.scores.rows_f1]),
        weights(sure[0], sure[1]),
        allow,
    )


def fitting_questions(dev: int, further: int, each: float, seconds: float | None) -> int:
    """How many of ``further`` training questions judge besides ``dev`` ones, if a question takes ``each`` seconds.

    Halved until they fit, so that the next search on this machine uses the same number and finds the cached measurements.
    """
    count = max(0, min(MOST, ENOUGH - dev, further))
    while seconds is not None and count and (dev + count) * each > seconds:
        count //= 2
    return count


def weights(dev: Float64Array, training: Float64Array) -> Float64Array:
    """Weights ``[dev + training]`` with a mean of 1 for scores ``[dev]`` and ``[training]`` of the float model.

    Each class of scores, a quarter of the dev set, has the same weight as there, shared among all questions in it.
    """
    every = np.concatenate([dev, training])
    if not len(training) or not len(dev):
        return np.ones(len(every))
    edges = np.quantile(dev, np.arange(1, _CLASSES) / _CLASSES)
    classes = np.searchsorted(edges, every, side="right")
    of_dev = np.bincount(classes[: len(dev)], minlength=_CLASSES) / len(dev)
    # A class without dev questions (equal scores at an edge) has weight 0, and so do its training questions.
    of_all = np.bincount(classes, minlength=_CLASSES) / len(every)
    return np.asarray((of_dev / np.maximum(of_all, 1e-12))[classes])
