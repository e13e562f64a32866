"""What the report of a run shows: facts computed from its questions, answers, epochs and record.

The facts are of the held-out questions where a run has some, else of its dev part. No torch is needed.
``findings`` says them in sentences, ``report_page`` and ``run_card`` show them.
"""

from __future__ import annotations

import math
import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qadeploy.core.calibration import ConfidenceBin, Rows, confidence_bins, expected_calibration_error
from qadeploy.core.metrics import Scores, bootstrap_interval, score
from qadeploy.records import Answer, Example

WORST = 20
SURE = 0.9
SMALLEST_GROUP = 10  # fewer questions tell nothing: the bootstrap of a handful gives intervals of width 0
CHECK_FLAGS = ("repeated", "duplicate")  # counted besides the classes of a data check
_Z = 1.959964  # of a 95 % interval
_WINDOWS = (1, 2, 4, 8)
_ANSWER_WORDS = (1, 2, 4, 8, 16)
_CONTEXT_WORDS = (50, 100, 200, 400, 800)
_QUESTION_WORDS = ("who", "what", "when", "where", "why", "how", "which")
_FIRST_QUESTION_WORD = re.compile(r"\b(who|whom|whose|what|when|where|why|how|which)\b", re.IGNORECASE)
# Chinese and Japanese write no spaces, so there each character counts as a word.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]|[^\s\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]+")


@dataclass(frozen=True, slots=True)
class Part:
    """A part of the data as a run used it: what for, its examples, and how many windows each became."""

    name: str
    role: str
    examples: tuple[Example, ...]
    windows: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PartFacts:
    """Counts of a part. The word pairs are (median, longest) of distinct contexts and of first answers.

    ``by_windows`` counts the questions whose context takes so many windows, by the names of
    ``RunFacts.window_groups``.
    """

    name: str
    role: str
    questions: int
    passages: int
    without_answer: int
    windows: int
    by_windows: tuple[int, ...]
    context_words: tuple[int, int]
    answer_words: tuple[int, int]


@dataclass(frozen=True, slots=True)
class ScoreFacts:
    """Scores in percent on ``total`` questions; an interval (95 %, bootstrap) is None where it is not known."""

    exact_match: float
    f1: float
    accuracy: float
    total: int
    exact_match_interval: tuple[float, float] | None = None
    f1_interval: tuple[float, float] | None = None
    accuracy_interval: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True)
class Group:
    """The questions that have something in common: how many, and their scores in percent.

    The intervals (95 %, bootstrap; Wilson's where all rows are 0 or all are 1) are None below ``SMALLEST_GROUP`` questions.
    """

    name: str
    count: int
    exact_match: float
    f1: float
    exact_match_interval: tuple[float, float] | None
    f1_interval: tuple[float, float] | None


@dataclass(frozen=True, slots=True)
class Grouping:
    """All questions, each in exactly one group; empty groups are left out."""

    title: str
    note: str
    groups: tuple[Group, ...]


@dataclass(frozen=True, slots=True)
class Calibration:
    """Confidence against exact match, both 0 to 1. ``error`` is the expected calibration error.

    ``temperature`` and ``error_before`` (at temperature 1) are None where the run fitted none.
    """

    bins: tuple[ConfidenceBin, ...]
    error: float
    confidence: float
    accuracy: float
    temperature: float | None = None
    error_before: float | None = None


@dataclass(frozen=True, slots=True)
class DataCheck:
    """What the check of the data found: rows by class, which add up to ``rows``; flags are counted besides."""

    rows: int
    classes: dict[str, int]
    flags: dict[str, int]
    repaired: int
    rejected: int


@dataclass(frozen=True, slots=True)
class Mistake:
    """A question, what was answered, and how much of it was right (F1, 0 to 1)."""

    example: Example
    answer: Answer
    f1: float


@dataclass(frozen=True, slots=True)
class Epoch:
    """A row of the table of epochs: losses, and the dev part's scores in percent. Epoch 0 is the base model.

    ``windows_per_second`` and ``peak_memory_bytes`` are those of its training, None where they were not measured.
    """

    number: int
    train_loss: float | None
    eval_loss: float
    accuracy: float
    exact_match: float
    f1: float
    observation: str
    windows_per_second: float | None = None
    peak_memory_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class RunFacts:
    """Everything that the report and the model card show.

    ``held_out`` tells whether the judged questions were held out, or are the dev part that also chose
    the epoch. ``before`` are the base model's scores on them, where it was measured. ``wrong`` counts the
    answers with an F1 below 1, ``surely_wrong`` those with an F1 of 0 at a confidence of ``SURE`` or more.
    ``no_answer`` holds the null threshold and F1 in percent with it, where the run chose one.
    """

    name: str
    source: str
    base: str
    base_license: str | None
    command: str
    export_command: str
    held_out: bool
    parts: tuple[PartFacts, ...]
    window_groups: tuple[str, ...]
    data_check: DataCheck | None
    data_remarks: tuple[str, ...]
    before: ScoreFacts | None
    after: ScoreFacts
    epochs: tuple[Epoch, ...]
    best_epoch: int
    groupings: tuple[Grouping, ...]
    calibration: Calibration
    no_answer: dict[str, float]
    mistakes: tuple[Mistake, ...]
    wrong: int
    surely_wrong: int
    settings: dict[str, Any]
    record: dict[str, Any]
    seconds: float

    @property
    def judged(self) -> str:
        """How many questions the scores are of, and which."""
        return f"{self.after.total:,} {'held-out questions' if self.held_out else 'questions of the dev part'}"


def make_facts(
    name: str,
    record: Mapping[str, Any],
    metrics: Mapping[str, Any],
    parts: Sequence[Part],
    answers: Sequence[Answer],
    *,
    skipped: int = 0,
    first_taken: int = 0,
    shipped_base: str | None = None,
) -> RunFacts:
    """The facts of a run.

    ``record`` and ``metrics`` are the contents of ``run.json`` and ``metrics.json``; ``parts`` are the
    train part, the dev part and, where there is one, the held-out part; ``answers`` are the best
    answers to the last of them, in order. ``skipped`` and ``first_taken`` are the reader's counts;
    ``shipped_base`` is the name of the base that qadeploy takes where none is given.
    """
    *learned, judged = parts
    held_out = len(learned) > 1
    scores = score(judged.examples, answers)
    after = _score_facts(scores.to_dict())
    speed = {row["epoch"]: row for row in metrics.get("speed", {}).get("epochs", ())}
    epochs = tuple(_epoch(row, speed.get(row["epoch"], {})) for row in metrics["epochs"])
    before = _before(metrics, epochs, after.total, held_out)
    groupings = group_scores(judged.examples, scores)
    key = "held_out" if held_out else "dev"
    no_answer = metrics.get("no_answer") or {}
    confidences = np.asarray([a.score for a in answers], dtype=np.float64)
    calibration = _calibration(confidences, scores.rows_exact_match, metrics.get("calibration") or {}, key)
    return RunFacts(
        name=name,
        source=str(record["options"]["data"]),
        base=str(record["base"]["name"]),
        base_license=record["base"].get("license"),
        command=train_command(record["options"], shipped_base),
        export_command=shlex.join(["qadeploy", "export", str(record["options"]["out"]), "--quantize"]),
        held_out=held_out,
        parts=tuple(_part_facts(p) for p in parts),
        window_groups=_bucket_names(_WINDOWS),
        data_check=_data_check(metrics.get("data_check")),
        data_remarks=_data_remarks(learned, judged if held_out else None, skipped, first_taken),
        before=before,
        after=after,
        epochs=epochs,
        best_epoch=int(metrics["best_epoch"]),
        groupings=groupings,
        calibration=calibration,
        no_answer={"null_threshold": no_answer["null_threshold"], **no_answer[key]} if key in no_answer else {},
        mistakes=worst_mistakes(judged.examples, answers, scores),
        wrong=int((scores.rows_f1 < 1).sum()),
        surely_wrong=int(((scores.rows_f1 == 0) & (confidences >= SURE)).sum()),
        settings=dict(metrics["settings"]),
        record=dict(record),
        seconds=float(metrics.get("seconds", 0.0)),
    )


def count_words(text: str) -> int:
    """Runs of characters that are not white space; each Chinese or Japanese character counts as one."""
    return len(_WORD.findall(text))


def question_word(question: str) -> str:
    """who, what, when, where, why, how or which: the first in the question (whom and whose are who), else other."""
    found = _FIRST_QUESTION_WORD.search(question)
    word = found[0].lower() if found else "other"
    return "who" if word in {"whom", "whose"} else word


def train_command(options: Mapping[str, Any], shipped_base: str | None = None) -> str:
    """The call of ``qadeploy train`` that sets every option as the run had it, an option a line.

    ``shipped_base`` is a base that needs no naming: it is what is taken where none is given.
    """
    flags = []
    for name, value in options.items():
        if value is None or value is False or (name == "base" and value == shipped_base):
            continue
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, Mapping):
            value = ",".join(f"{key}={item}" for key, item in value.items())
        flags.append(flag if value is True else f"{flag} {shlex.quote(str(value))}")
    return " \\\n  ".join(["qadeploy train", *flags])


# ---------------------------------------------------------------- data


def _part_facts(part: Part) -> PartFacts:
    contexts = {e.context for e in part.examples}
    return PartFacts(
        name=part.name,
        role=part.role,
        questions=len(part.examples),
        passages=len(contexts),
        without_answer=sum(not e.answers for e in part.examples),
        windows=sum(part.windows),
        by_windows=tuple(Counter(_bucket(n, _WINDOWS) for n in part.windows)[g] for g in _bucket_names(_WINDOWS)),
        context_words=_median_and_longest([count_words(c) for c in contexts]),
        answer_words=_median_and_longest([count_words(e.answers[0].text) for e in part.examples if e.answers]),
    )


def _median_and_longest(counts: Sequence[int]) -> tuple[int, int]:
    return (int(np.median(counts)), max(counts)) if counts else (0, 0)


def _data_check(found: Mapping[str, Any] | None) -> DataCheck | None:
    if not found:
        return None
    counts = {str(name): int(count) for name, count in found["classes"].items()}
    return DataCheck(
        rows=int(found["rows"]),
        classes={name: count for name, count in counts.items() if name not in CHECK_FLAGS},
        flags={name: count for name, count in counts.items() if name in CHECK_FLAGS},
        repaired=int(found["repaired"]),
        rejected=int(found["rejected"]),
    )


def _data_remarks(learned: Sequence[Part], held_out: Part | None, skipped: int, first_taken: int) -> tuple[str, ...]:
    remarks = []
    if skipped:
        remarks.append(f"{skipped:,} ambiguous rows were skipped.")
    if first_taken:
        remarks.append(f"{first_taken:,} answers occur several times in their context; the first place was taken.")
    if held_out:
        leaked = {e.context for e in held_out.examples} & {e.context for p in learned for e in p.examples}
        if leaked:
            remarks.append(f"{len(leaked):,} held-out passages are also in the training data: the scores flatter.")
    return tuple(remarks)


# ---------------------------------------------------------------- scores


def _score_facts(values: Mapping[str, Any]) -> ScoreFacts:
    def interval(name: str) -> tuple[float, float] | None:
        found = values.get(f"{name}_interval")
        return (float(found[0]), float(found[1])) if found else None

    return ScoreFacts(
        float(values["exact_match"]),
        float(values["f1"]),
        float(values["accuracy"]),
        int(values["total"]),
        interval("exact_match"),
        interval("f1"),
        interval("accuracy"),
    )


def _epoch(row: Mapping[str, Any], speed: Mapping[str, Any]) -> Epoch:
    return Epoch(
        int(row["epoch"]),
        row["train_loss"],
        float(row["eval_loss"]),
        100 * float(row["eval_accuracy"]),
        float(row["eval_exact_match"]),
        float(row["eval_f1"]),
        str(row["observation"]),
        speed.get("windows_per_second"),
        speed.get("peak_memory_bytes"),
    )


def _before(metrics: Mapping[str, Any], epochs: Sequence[Epoch], total: int, held_out: bool) -> ScoreFacts | None:
    if held_out:
        return _score_facts(metrics["held_out_base"]) if metrics.get("held_out_base") else None
    first = next((e for e in epochs if e.number == 0), None)
    return ScoreFacts(first.exact_match, first.f1, first.accuracy, total) if first else None


def group_scores(examples: Sequence[Example], scores: Scores) -> tuple[Grouping, ...]:
    """EM and F1 by question word, by the first answer's length and by the context's length, both in words."""
    contexts = {text: count_words(text) for text in {e.context for e in examples}}
    return (
        _grouping(
            "By question word",
            "The first question word in the question; whom and whose count as who.",
            [question_word(e.question) for e in examples],
            (*_QUESTION_WORDS, "other"),
            scores,
        ),
        _grouping(
            "By answer length",
            "Words of the annotated answer, the first where there are several.",
            [_bucket(count_words(e.answers[0].text), _ANSWER_WORDS) if e.answers else "no answer" for e in examples],
            ("no answer", *_bucket_names(_ANSWER_WORDS)),
            scores,
        ),
        _grouping(
            "By context length",
            "Words of the passage that the question is asked on.",
            [_bucket(contexts[e.context], _CONTEXT_WORDS) for e in examples],
            _bucket_names(_CONTEXT_WORDS),
            scores,
        ),
    )


def _bucket_names(tops: Sequence[int]) -> tuple[str, ...]:
    """Names of the ranges that end at each of ``tops``, and of the one above."""
    lows = (0, *tops)
    names = [str(top) if top - low == 1 else f"{max(1, low + 1)}–{top}" for low, top in zip(lows, tops, strict=False)]
    return (*names, f"over {tops[-1]}")


def _bucket(count: int, tops: Sequence[int]) -> str:
    return _bucket_names(tops)[sum(count > top for top in tops)]


def _grouping(title: str, note: str, labels: Sequence[str], names: Sequence[str], scores: Scores) -> Grouping:
    groups = []
    label = np.asarray(labels)
    for name in names:
        inside = label == name
        count = int(inside.sum())
        if not count:
            continue
        exact, f1 = scores.rows_exact_match[inside], scores.rows_f1[inside]
        groups.append(
            Group(
                name,
                count,
                100 * float(exact.mean()),
                100 * float(f1.mean()),
                _group_interval(exact),
                _group_interval(f1),
            )
        )
    return Grouping(title, note, tuple(groups))


def _group_interval(rows: Rows) -> tuple[float, float] | None:
    """None for few rows. Where all are 0 or all are 1 the bootstrap has no width, and Wilson's interval stands in."""
    if len(rows) < SMALLEST_GROUP:
        return None
    if rows.min() == rows.max() and rows[0] in {0.0, 1.0}:
        low, high = wilson_interval(float(rows[0]), len(rows))
        return (100 * low, 100 * high)
    return bootstrap_interval(rows)


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a share, 0 to 1, of ``count`` trials (Wilson 1927, "Probable Inference")."""
    square = _Z * _Z
    middle = (share + square / (2 * count)) / (1 + square / count)
    half = _Z / (1 + square / count) * math.sqrt(share * (1 - share) / count + square / (4 * count * count))
    return max(0.0, middle - half), min(1.0, middle + half)


def worst_mistakes(
    examples: Sequence[Example], answers: Sequence[Answer], scores: Scores, count: int = WORST
) -> tuple[Mistake, ...]:
    """At most ``count`` answers with an F1 below 1: the lowest F1 first, the most confident of equals first."""
    wrong = [Mistake(e, a, float(f)) for e, a, f in zip(examples, answers, scores.rows_f1, strict=True) if f < 1]
    return tuple(sorted(wrong, key=lambda m: (m.f1, -m.answer.score))[:count])


def _calibration(confidences: Rows, correct: Rows, fitted: Mapping[str, Any], key: str) -> Calibration:
    total = max(1, len(confidences))
    return Calibration(
        confidence_bins(confidences, correct),
        expected_calibration_error(confidences, correct),
        float(confidences.sum()) / total,
        float(correct.sum()) / total,
        fitted.get("temperature"),
        fitted.get(key, {}).get("ece_before"),
    )
