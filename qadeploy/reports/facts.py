"""What the report of a run shows: facts computed from its questions, answers, epochs and record.

The facts are about the held-out set if the run has one, otherwise about its dev set. No torch is needed.
``findings`` puts them into sentences, ``report_page`` and ``run_card`` show them.
"""

from __future__ import annotations

import re
import shlex
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from enum import Enum
from itertools import pairwise
from typing import Any

import numpy as np

from qadeploy.core.calibration import ConfidenceBin, confidence_bins, expected_calibration_error
from qadeploy.core.metrics import Scores, bootstrap_interval, score, wilson_interval
from qadeploy.data.loading import source_name
from qadeploy.records import Answer, Example, Float64Array
from qadeploy.shipped import BASE_MODEL

ROLES = (("train", "learned from"), ("dev", "chose the epoch"), ("held out", "only reported on"))
WORST = 20
SURE = 0.9
SMALLEST_GROUP = 10  # fewer questions tell nothing: the bootstrap of a handful gives intervals of width 0
_WINDOWS = (1, 2, 4, 8)
_ANSWER_WORDS = (1, 2, 4, 8, 16)
_CONTEXT_WORDS = (50, 100, 200, 400, 800)
_QUESTION_WORDS = ("who", "what", "when", "where", "why", "how", "which")
_FIRST_QUESTION_WORD = re.compile(r"\b(who|whom|whose|what|when|where|why|how|which)\b", re.IGNORECASE)
# Chinese and Japanese write no spaces, so there each character counts as a word.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]|[^\s\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]+")

Interval = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Part:
    """A part of the data of a run: its questions, and the number of windows of each.

    Nobody annotated the last ``unlabelled`` questions, so they do not count as questions without an answer.
    """

    examples: tuple[Example, ...]
    windows: tuple[int, ...]
    unlabelled: int = 0


@dataclass(frozen=True, slots=True)
class RunRecord:
    """What a run records about itself: its folder's name, and the contents of ``run.json`` and ``metrics.json``."""

    name: str
    record: Mapping[str, Any]
    metrics: Mapping[str, Any]

    @property
    def source(self) -> str:
        """The name of the run's data."""
        return source_name(self.record["options"]["data"])

    @property
    def command(self) -> str:
        """The ``qadeploy train`` command that sets every option of the run but the base that ships, one per line."""
        flags = []
        for name, value in self.record["options"].items():
            if value is None or value is False or (name == "base" and value == BASE_MODEL):
                continue
            flag = f"--{name.replace('_', '-')}"
            if isinstance(value, Mapping):
                value = ",".join(f"{key}={item}" for key, item in value.items())
            each = value if isinstance(value, list | tuple) else [value]
            flags += [flag if one is True else f"{flag} {shlex.quote(str(one))}" for one in each]
        return " \\\n  ".join(["qadeploy train", *flags])

    @property
    def export_command(self) -> str:
        """The command that exports the run."""
        return shlex.join(["qadeploy", "export", str(self.record["options"]["out"]), "--quantize"])


@dataclass(frozen=True, slots=True)
class PartFacts:
    """The counts of a part: distinct contexts, and the questions in each of ``WINDOW_GROUPS``.

    ``context_words`` and ``answer_words`` are median and maximum, over the distinct contexts and the first answers.
    """

    name: str
    role: str
    questions: int
    contexts: int
    without_answer: int
    windows: int
    by_windows: tuple[int, ...]
    context_words: tuple[int, int]
    answer_words: tuple[int, int]


@dataclass(frozen=True, slots=True)
class ScoreFacts:
    """Scores in percent on ``total`` questions, with 95 % intervals.

    An interval is None if it is not known or there are fewer than ``SMALLEST_GROUP`` questions.
    """

    exact_match: float
    f1: float
    accuracy: float
    total: int
    exact_match_interval: Interval | None = None
    f1_interval: Interval | None = None
    accuracy_interval: Interval | None = None


class GroupedBy(Enum):
    """What the questions of a group have in common."""

    QUESTION_WORD = "question word"
    ANSWER_LENGTH = "answer length"
    CONTEXT_LENGTH = "context length"


Groups = Mapping[str, ScoreFacts]  # the scores of each group by its name; none is empty


@dataclass(frozen=True, slots=True)
class Calibration:
    """Confidence against exact match, both 0 to 1; ``error`` is the expected calibration error.

    ``temperature`` and ``error_before`` (at temperature 1) are None if the run fitted none.
    """

    bins: tuple[ConfidenceBin, ...]
    error: float
    confidence: float
    accuracy: float
    temperature: float | None = None
    error_before: float | None = None


@dataclass(frozen=True, slots=True)
class Mistake:
    """A question, the model's answer, and the answer's F1 (0 to 1)."""

    example: Example
    answer: Answer
    f1: float


@dataclass(frozen=True, slots=True)
class RunFacts:
    """What the report and the model card show besides what the run records: its data, and the model's results.

    The results are about the held-out set or, without one, about the dev set, which also chose the epoch. ``skipped`` counts
    the ambiguous rows that were skipped, ``first_taken`` the answers that were located at the first of several occurrences,
    ``leaked`` the held-out contexts that are also in the training data. ``before`` are the base model's scores, None if it was
    not measured. ``no_answer`` has the ``null_threshold`` that the run chose, and F1 in percent with it (``f1``), with a
    threshold of 0 (``f1_threshold_0``) and without any (``f1_always_answer``); it is None if none was chosen. ``wrong`` counts
    the answers with an F1 below 1, ``surely_wrong`` those with an F1 of 0 at a confidence of ``SURE`` or more.
    """

    run: RunRecord
    parts: tuple[PartFacts, ...]
    skipped: int
    first_taken: int
    leaked: int
    held_out: bool
    before: ScoreFacts | None
    after: ScoreFacts
    groupings: Mapping[GroupedBy, Groups]
    calibration: Calibration
    no_answer: Mapping[str, float] | None
    mistakes: tuple[Mistake, ...]
    wrong: int
    surely_wrong: int


def make_facts(
    run: RunRecord, parts: Sequence[Part], answers: Sequence[Answer], *, skipped: int = 0, first_taken: int = 0
) -> RunFacts:
    """Computes the facts of a run.

    Args:
        run: What the run records about itself.
        parts: The train set, the dev set and, if there is one, the held-out set.
        answers: The best answers to the last part, in order.
        skipped: Ambiguous rows that were skipped.
        first_taken: Answers that were located at the first of several occurrences.
    """
    metrics, held_out = run.metrics, len(parts) > 2
    judged = parts[-1].examples
    learned = {e.context for part in parts[:-1] for e in part.examples}
    scores = score(judged, answers, metrics["settings"].get("metric", "squad"))
    confidences = np.asarray([a.score for a in answers], dtype=np.float64)
    name = "held_out" if held_out else "dev"
    base, fitted, chosen = metrics.get(f"{name}_base"), metrics.get("calibration") or {}, metrics.get("no_answer")
    return RunFacts(
        run=run,
        parts=tuple(_part_facts(*role, part) for role, part in zip(ROLES, parts, strict=False)),
        skipped=skipped,
        first_taken=first_taken,
        leaked=len({e.context for e in judged} & learned) if held_out else 0,
        held_out=held_out,
        before=ScoreFacts(**{field.name: base.get(field.name) for field in fields(ScoreFacts)}) if base else None,
        after=_score_facts(scores, np.arange(scores.total)),
        groupings=group_scores(judged, scores),
        calibration=Calibration(
            confidence_bins(confidences, scores.rows_exact_match),
            expected_calibration_error(confidences, scores.rows_exact_match),
            float(confidences.mean()),
            float(scores.rows_exact_match.mean()),
            fitted.get("temperature"),
            fitted.get(name, {}).get("ece_before"),
        ),
        no_answer={"null_threshold": chosen["null_threshold"], **chosen[name]} if chosen else None,
        mistakes=worst_mistakes(judged, answers, scores),
        wrong=int((scores.rows_f1 < 1).sum()),
        surely_wrong=int(((scores.rows_f1 == 0) & (confidences >= SURE)).sum()),
    )


def overfitting(rows: Sequence[Mapping[str, Any]]) -> list[int]:
    """Returns the epochs that overfit, from the rows of ``metrics.json``."""
    return [after["epoch"] for before, after in pairwise(rows) if overfits(before, after)]


def overfits(before: Mapping[str, Any], row: Mapping[str, Any]) -> bool:
    """Returns whether the dev loss rises while the train loss falls, from one row of ``metrics.json`` to the next."""
    trained = before["train_loss"] is not None
    return trained and bool(row["eval_loss"] > before["eval_loss"] and row["train_loss"] < before["train_loss"])


def count_words(text: str) -> int:
    """Counts runs of characters that are not white space; each Chinese or Japanese character counts as one."""
    return len(_WORD.findall(text))


def question_word(question: str) -> str:
    """Returns the first of who, what, when, where, why, how and which (whom and whose count as who), else other."""
    found = _FIRST_QUESTION_WORD.search(question)
    word = found[0].lower() if found else "other"
    return "who" if word in {"whom", "whose"} else word


def _part_facts(name: str, role: str, part: Part) -> PartFacts:
    contexts = {e.context for e in part.examples}
    by_windows = Counter(_bucket(n, _WINDOWS) for n in part.windows)
    return PartFacts(
        name,
        role,
        questions=len(part.examples),
        contexts=len(contexts),
        without_answer=sum(not e.answers for e in part.examples) - part.unlabelled,
        windows=sum(part.windows),
        by_windows=tuple(by_windows[g] for g in WINDOW_GROUPS),
        context_words=_median_and_maximum([count_words(c) for c in contexts]),
        answer_words=_median_and_maximum([count_words(e.answers[0].text) for e in part.examples if e.answers]),
    )


def _median_and_maximum(counts: Sequence[int]) -> tuple[int, int]:
    return (int(np.median(counts)), max(counts)) if counts else (0, 0)


def _bucket_names(tops: Sequence[int]) -> tuple[str, ...]:
    """Names of the ranges that end at each of ``tops``, and of the one above."""
    names = [str(top) if top - low == 1 else f"{low + 1}–{top}" for low, top in pairwise((0, *tops))]
    return (*names, f"over {tops[-1]}")


def _bucket(count: int, tops: Sequence[int]) -> str:
    return _bucket_names(tops)[bisect_left(tops, count)]


WINDOW_GROUPS = _bucket_names(_WINDOWS)


def _score_facts(scores: Scores, rows: Any) -> ScoreFacts:
    """The scores of some of the questions."""
    exact, f1, accuracy = (found[rows] for found in (scores.rows_exact_match, scores.rows_f1, scores.rows_accuracy))
    means = [100 * float(kind.mean()) for kind in (exact, f1, accuracy)]
    return ScoreFacts(means[0], means[1], means[2], len(exact), _interval(exact), _interval(f1), _interval(accuracy))


def group_scores(examples: Sequence[Example], scores: Scores) -> dict[GroupedBy, Groups]:
    """Groups EM and F1 by question word, by the first answer's length and by the context's length, both in words."""
    contexts = {text: _bucket(count_words(text), _CONTEXT_WORDS) for text in {e.context for e in examples}}
    answers = [_bucket(count_words(e.answers[0].text), _ANSWER_WORDS) if e.answers else "no answer" for e in examples]
    found = {
        GroupedBy.QUESTION_WORD: ([question_word(e.question) for e in examples], (*_QUESTION_WORDS, "other")),
        GroupedBy.ANSWER_LENGTH: (answers, ("no answer", *_bucket_names(_ANSWER_WORDS))),
        GroupedBy.CONTEXT_LENGTH: ([contexts[e.context] for e in examples], _bucket_names(_CONTEXT_WORDS)),
    }
    return {
        by: {name: _score_facts(scores, np.asarray(labels) == name) for name in names if name in labels}
        for by, (labels, names) in found.items()
    }


def _interval(rows: Float64Array) -> Interval | None:
    """None for few rows. If all are 0 or all are 1 the bootstrap has no width, and Wilson's interval is used."""
    if len(rows) < SMALLEST_GROUP:
        return None
    if rows.min() == rows.max() and rows[0] in {0.0, 1.0}:
        low, high = wilson_interval(float(rows[0]), len(rows))
        return (100 * low, 100 * high)
    return bootstrap_interval(rows)


def worst_mistakes(
    examples: Sequence[Example], answers: Sequence[Answer], scores: Scores, count: int = WORST
) -> tuple[Mistake, ...]:
    """Returns at most ``count`` answers with an F1 below 1: lowest F1 first, then highest confidence."""
    wrong = [Mistake(e, a, float(f)) for e, a, f in zip(examples, answers, scores.rows_f1, strict=True) if f < 1]
    return tuple(sorted(wrong, key=lambda m: (m.f1, -m.answer.score))[:count])
