"""What the report of a run shows: facts computed from its questions, answers, epochs and record.

The facts are about the held-out set if the run has one, otherwise about its dev set. No torch is needed.
``findings`` puts them into sentences, ``report_page`` and ``run_card`` show them.
"""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np

from qadeploy.core.calibration import ConfidenceBin, confidence_bins, expected_calibration_error
from qadeploy.core.metrics import Scores, bootstrap_interval, score, wilson_interval
from qadeploy.data.check import RowClass
from qadeploy.data.loading import source_name
from qadeploy.records import Answer, Example, Float64Array
from qadeploy.shipped import BASE_MODEL

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
    """A part of the data of a run: its role, its questions, and the number of windows of each question.

    Nobody annotated the last ``unlabelled`` questions, so they do not count as questions without an answer.
    """

    name: str
    role: str
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
        """The command that repeats the run."""
        return train_command(self.record["options"])

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
class DataCheck:
    """The result of the data check: rows by class, which add up to ``rows``, and rows by flag."""

    rows: int
    classes: dict[RowClass, int]
    flags: dict[str, int]
    repaired: int
    rejected: int


@dataclass(frozen=True, slots=True)
class DataFacts:
    """The data of a run: the train set, the dev set and, if there is one, the held-out set.

    ``skipped`` counts the ambiguous rows that were skipped, ``first_taken`` the answers that were located at the first
    of several occurrences, ``leaked`` the held-out contexts that are also in the training data.
    """

    parts: tuple[PartFacts, ...]
    check: DataCheck | None
    skipped: int
    first_taken: int
    leaked: int


@dataclass(frozen=True, slots=True)
class Epoch:
    """A row of the table of epochs, with scores on the dev set in percent. Epoch 0 is the base model.

    ``overfits`` tells whether the dev loss rose while the train loss fell. Values that were not measured are None.
    """

    number: int
    train_loss: float | None
    eval_loss: float
    accuracy: float
    exact_match: float
    f1: float
    overfits: bool = False
    observation: str = ""
    windows_per_second: float | None = None
    peak_memory_bytes: int | None = None


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


@dataclass(frozen=True, slots=True)
class Group:
    """Questions with a common property, and their scores."""

    name: str
    scores: ScoreFacts


@dataclass(frozen=True, slots=True)
class Grouping:
    """All questions, each in exactly one group; there are no empty groups."""

    by: GroupedBy
    groups: tuple[Group, ...]


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
class NoAnswer:
    """The null threshold that the run chose, and F1 in percent with it, with a threshold of 0 and without any."""

    null_threshold: float
    f1: float
    f1_threshold_0: float
    f1_always_answer: float


@dataclass(frozen=True, slots=True)
class Mistake:
    """A question, the model's answer, and the answer's F1 (0 to 1)."""

    example: Example
    answer: Answer
    f1: float


@dataclass(frozen=True, slots=True)
class Results:
    """The model's results on the held-out set or, without one, on the dev set, which also chose the epoch.

    ``before`` are the base model's scores, or None if it was not measured. ``wrong`` counts the answers with an F1
    below 1, ``surely_wrong`` those with an F1 of 0 at a confidence of ``SURE`` or more.
    """

    held_out: bool
    before: ScoreFacts | None
    after: ScoreFacts
    groupings: tuple[Grouping, ...]
    calibration: Calibration
    no_answer: NoAnswer | None
    mistakes: tuple[Mistake, ...]
    wrong: int
    surely_wrong: int


@dataclass(frozen=True, slots=True)
class Trial:
    """A trial of a search: its settings by name, and its F1 in percent, which is None if it failed, with the ``error``."""

    number: int
    settings: Mapping[str, float]
    f1: float | None
    seconds: float
    error: str


@dataclass(frozen=True, slots=True)
class Search:
    """The trials of a search, the one whose settings the run has, and the folds that scored them; None: the dev set."""

    trials: tuple[Trial, ...]
    best: Trial
    folds: int | None

    @property
    def scored(self) -> tuple[Trial, ...]:
        """The trials that did not fail."""
        return tuple(t for t in self.trials if t.f1 is not None)


@dataclass(frozen=True, slots=True)
class RunFacts:
    """Everything that the report and the model card show; ``search`` is None if no search chose the settings.

    ``best_epoch`` is the number of the epoch that was kept, unless there is a ``mean``, the row of the mean of the epochs.
    """

    run: RunRecord
    data: DataFacts
    epochs: tuple[Epoch, ...]
    best_epoch: int
    mean: Epoch | None
    results: Results
    search: Search | None


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
    metrics = run.metrics
    *learned, judged = parts
    held_out = len(learned) > 1
    leaked = {e.context for e in judged.examples} & {e.context for p in learned for e in p.examples}
    data = DataFacts(
        parts=tuple(_part_facts(p) for p in parts),
        check=_data_check(metrics.get("data_check")),
        skipped=skipped,
        first_taken=first_taken,
        leaked=len(leaked) if held_out else 0,
    )
    epochs = read_epochs(metrics["epochs"], metrics.get("speed", {}).get("epochs", ()))
    return RunFacts(
        run,
        data,
        epochs,
        int(metrics["best_epoch"]),
        _mean(metrics.get("mean_of_epochs")),
        _results(judged, answers, metrics, held_out),
        _search(metrics.get("search")),
    )


def read_epochs(rows: Sequence[Mapping[str, Any]], speed: Sequence[Mapping[str, Any]] = ()) -> tuple[Epoch, ...]:
    """Reads the rows of the table of epochs from ``metrics.json``, and the rows of ``speed``."""
    speeds = {row["epoch"]: row for row in speed}
    return tuple(
        Epoch(
            number=int(row["epoch"]),
            train_loss=row["train_loss"],
            eval_loss=float(row["eval_loss"]),
            accuracy=100 * float(row["eval_accuracy"]),
            exact_match=float(row["eval_exact_match"]),
            f1=float(row["eval_f1"]),
            overfits=before is not None and overfits(before, row),
            observation=str(row["observation"]),
            windows_per_second=speeds.get(row["epoch"], {}).get("windows_per_second"),
            peak_memory_bytes=speeds.get(row["epoch"], {}).get("peak_memory_bytes"),
        )
        for before, row in zip((None, *rows), rows, strict=False)
    )


def _mean(found: Mapping[str, Any] | None) -> Epoch | None:
    if not found:
        return None
    (mean,) = read_epochs(
        [{**found, "epoch": found["epochs"], "train_loss": None, "observation": "the mean of the weights"}]
    )
    return mean


def _search(found: Mapping[str, Any] | None) -> Search | None:
    if not found:
        return None
    trials = tuple(
        Trial(number, row["settings"], row["f1"], float(row["seconds"]), row.get("error", ""))
        for number, row in enumerate(found["trials"], 1)
    )
    return Search(trials, trials[int(found["best"]) - 1], found["folds"])


def overfits(before: Mapping[str, Any], row: Mapping[str, Any]) -> bool:
    """Returns whether the dev loss rises while the train loss falls, from one row of ``metrics.json`` to the next."""
    if before["train_loss"] is None:
        return False
    return bool(row["eval_loss"] > before["eval_loss"] and row["train_loss"] < before["train_loss"])


def count_words(text: str) -> int:
    """Counts runs of characters that are not white space; each Chinese or Japanese character counts as one."""
    return len(_WORD.findall(text))


def question_word(question: str) -> str:
    """Returns the first of who, what, when, where, why, how and which (whom and whose count as who), else other."""
    found = _FIRST_QUESTION_WORD.search(question)
    word = found[0].lower() if found else "other"
    return "who" if word in {"whom", "whose"} else word


def train_command(options: Mapping[str, Any]) -> str:
    """Returns the ``qadeploy train`` command that sets every option of a run but the base that ships, one per line."""
    flags = []
    for name, value in options.items():
        if value is None or value is False or (name == "base" and value == BASE_MODEL):
            continue
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, Mapping):
            value = ",".join(f"{key}={item}" for key, item in value.items())
        each = value if isinstance(value, list | tuple) else [value]
        flags += [flag if one is True else f"{flag} {shlex.quote(str(one))}" for one in each]
    return " \\\n  ".join(["qadeploy train", *flags])


# ---------------------------------------------------------------- data


def _part_facts(part: Part) -> PartFacts:
    contexts = {e.context for e in part.examples}
    by_windows = Counter(_bucket(n, _WINDOWS) for n in part.windows)
    return PartFacts(
        name=part.name,
        role=part.role,
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


def _data_check(found: Mapping[str, Any] | None) -> DataCheck | None:
    if not found:
        return None
    classes = set(RowClass)
    return DataCheck(
        rows=int(found["rows"]),
        classes={RowClass(name): int(n) for name, n in found["classes"].items() if name in classes},
        flags={name: int(n) for name, n in found["classes"].items() if name not in classes},
        repaired=int(found["repaired"]),
        rejected=int(found["rejected"]),
    )


def _bucket_names(tops: Sequence[int]) -> tuple[str, ...]:
    """Names of the ranges that end at each of ``tops``, and of the one above."""
    lows = (0, *tops)
    names = [str(top) if top - low == 1 else f"{max(1, low + 1)}–{top}" for low, top in zip(lows, tops, strict=False)]
    return (*names, f"over {tops[-1]}")


def _bucket(count: int, tops: Sequence[int]) -> str:
    return _bucket_names(tops)[sum(count > top for top in tops)]


WINDOW_GROUPS = _bucket_names(_WINDOWS)


# ---------------------------------------------------------------- scores


def _results(judged: Part, answers: Sequence[Answer], metrics: Mapping[str, Any], held_out: bool) -> Results:
    scores = score(judged.examples, answers, metrics["settings"].get("metric", "squad"))
    key = "held_out" if held_out else "dev"
    no_answer = metrics.get("no_answer") or {}
    confidences = np.asarray([a.score for a in answers], dtype=np.float64)
    return Results(
        held_out=held_out,
        before=_before(metrics.get(f"{key}_base"), scores.total),
        after=_score_facts(scores, np.arange(scores.total)),
        groupings=group_scores(judged.examples, scores),
        calibration=_calibration(confidences, scores.rows_exact_match, metrics.get("calibration") or {}, key),
        no_answer=NoAnswer(
            float(no_answer["null_threshold"]),
            *(float(no_answer[key][name]) for name in ("f1", "f1_threshold_0", "f1_always_answer")),
        )
        if key in no_answer
        else None,
        mistakes=worst_mistakes(judged.examples, answers, scores),
        wrong=int((scores.rows_f1 < 1).sum()),
        surely_wrong=int(((scores.rows_f1 == 0) & (confidences >= SURE)).sum()),
    )


def _score_facts(scores: Scores, rows: Any) -> ScoreFacts:
    """The scores of some of the questions."""
    exact, f1, accuracy = (found[rows] for found in (scores.rows_exact_match, scores.rows_f1, scores.rows_accuracy))
    means = [100 * float(kind.mean()) for kind in (exact, f1, accuracy)]
    return ScoreFacts(means[0], means[1], means[2], len(exact), _interval(exact), _interval(f1), _interval(accuracy))


def _before(found: Mapping[str, Any] | None, total: int) -> ScoreFacts | None:
    if not found:
        return None
    names = [f"{kind}_interval" for kind in ("exact_match", "f1", "accuracy")]
    intervals = {name: (float(found[name][0]), float(found[name][1])) for name in names if found.get(name)}
    return ScoreFacts(float(found["exact_match"]), float(found["f1"]), float(found["accuracy"]), total, **intervals)


def group_scores(examples: Sequence[Example], scores: Scores) -> tuple[Grouping, ...]:
    """Groups EM and F1 by question word, by the first answer's length and by the context's length, both in words."""
    contexts = {text: count_words(text) for text in {e.context for e in examples}}
    answers = [_bucket(count_words(e.answers[0].text), _ANSWER_WORDS) if e.answers else "no answer" for e in examples]
    found = {
        GroupedBy.QUESTION_WORD: ([question_word(e.question) for e in examples], (*_QUESTION_WORDS, "other")),
        GroupedBy.ANSWER_LENGTH: (answers, ("no answer", *_bucket_names(_ANSWER_WORDS))),
        GroupedBy.CONTEXT_LENGTH: (
            [_bucket(contexts[e.context], _CONTEXT_WORDS) for e in examples],
            _bucket_names(_CONTEXT_WORDS),
        ),
    }
    return tuple(
        Grouping(by, tuple(Group(n, _score_facts(scores, np.asarray(labels) == n)) for n in names if n in labels))
        for by, (labels, names) in found.items()
    )


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


def _calibration(confidences: Float64Array, correct: Float64Array, fitted: Mapping[str, Any], key: str) -> Calibration:
    total = max(1, len(confidences))
    return Calibration(
        confidence_bins(confidences, correct),
        expected_calibration_error(confidences, correct),
        float(confidences.sum()) / total,
        float(correct.sum()) / total,
        fitted.get("temperature"),
        fitted.get(key, {}).get("ece_before"),
    )
