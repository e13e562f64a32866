"""Exact match and F1 as SQuAD's official script computes them, accuracy, and bootstrap intervals.

Formulas: Rajpurkar et al., "SQuAD: 100,000+ Questions for Machine Comprehension of Text", EMNLP
2016, section 6.1, and the v2.0 script's rule for questions without an answer (the gold text is "").
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qadeploy.records import Answer, Example

_ARTICLES = re.compile(r"\b(a|an|the)\b", re.UNICODE)
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize(text: str) -> str:
    """Lower case, no ASCII punctuation, no English articles, single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, gold: str) -> float:
    """1.0 where both texts are equal after ``normalize``, else 0.0."""
    return float(normalize(prediction) == normalize(gold))


def f1(prediction: str, gold: str) -> float:
    """Harmonic mean of token precision and recall after ``normalize``, 0 to 1.

    Where either side has no token left, 1.0 if both have none, else 0.0.
    """
    predicted, wanted = normalize(prediction).split(), normalize(gold).split()
    if not predicted or not wanted:
        return float(predicted == wanted)
    shared = sum((Counter(predicted) & Counter(wanted)).values())
    if not shared:
        return 0.0
    precision, recall = shared / len(predicted), shared / len(wanted)
    return 2 * precision * recall / (precision + recall)


@dataclass(frozen=True, slots=True)
class Scores:
    """Scores of many questions: means in percent, and the rows behind them.

    ``rows_has_answer`` ``[questions]`` is true where the question is annotated with an answer.
    ``accuracy`` is the share of questions whose predicted span (code points) is exactly an annotated
    one. The ``rows_*`` arrays hold 0 to 1 a question, ``[questions]``, for intervals and paired tests.
    """

    rows_exact_match: NDArray[np.float64]
    rows_f1: NDArray[np.float64]
    rows_accuracy: NDArray[np.float64]
    rows_has_answer: NDArray[np.bool_]

    @property
    def total(self) -> int:
        """Number of questions."""
        return len(self.rows_f1)

    @property
    def exact_match(self) -> float:
        """Mean exact match, percent."""
        return _percent(self.rows_exact_match)

    @property
    def f1(self) -> float:
        """Mean F1, percent."""
        return _percent(self.rows_f1)

    @property
    def accuracy(self) -> float:
        """Share of exactly predicted spans, percent."""
        return _percent(self.rows_accuracy)

    def to_dict(self) -> dict[str, object]:
        """exact_match, f1, accuracy and total with 95 % bootstrap intervals, as plain JSON values.

        Where there are questions with an answer also HasAns_exact, HasAns_f1 and HasAns_total, and where there are
        some without NoAns_exact, NoAns_f1 and NoAns_total, as in SQuAD v2's official script.
        """
        kinds: dict[str, object] = {}
        for name, rows in (("HasAns", self.rows_has_answer), ("NoAns", ~self.rows_has_answer)):
            if rows.any():
                kinds |= {
                    f"{name}_exact": _percent(self.rows_exact_match[rows]),
                    f"{name}_f1": _percent(self.rows_f1[rows]),
                    f"{name}_total": int(rows.sum()),
                }
        return {
            "exact_match": self.exact_match,
            "f1": self.f1,
            "accuracy": self.accuracy,
            "total": self.total,
            "exact_match_interval": list(bootstrap_interval(self.rows_exact_match)),
            "f1_interval": list(bootstrap_interval(self.rows_f1)),
            "accuracy_interval": list(bootstrap_interval(self.rows_accuracy)),
            **kinds,
        }


def _percent(rows: NDArray[np.float64]) -> float:
    return 100.0 * float(rows.mean()) if len(rows) else 0.0


def score(examples: Sequence[Example], predictions: Sequence[Answer]) -> Scores:
    """Scores one prediction a question against all of its annotated answers, the best counting.

    A question without answers wants the empty text. As in the official script, a gold text that
    normalises to nothing (an article alone) counts only where all of a question's do.
    """
    em, f, accuracy = [], [], []
    for example, answer in zip(examples, predictions, strict=True):
        golds = [a.text for a in example.answers if normalize(a.text)] or [""]
        em.append(max(exact_match(answer.text, gold) for gold in golds))
        f.append(max(f1(answer.text, gold) for gold in golds))
        spans = {(a.start, a.end) for a in example.answers} or {(0, 0)}
        accuracy.append(float((answer.start, answer.end) in spans))
    has_answer = np.asarray([bool(e.answers) for e in examples], dtype=bool)
    return Scores(np.asarray(em), np.asarray(f), np.asarray(accuracy), has_answer)


def bootstrap_interval(
    rows: NDArray[np.float64], *, samples: int = 2000, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of ``rows``, in percent (Efron 1979)."""
    if not len(rows):
        return (0.0, 0.0)
    generator = np.random.default_rng(seed)
    means = np.concatenate(
        [
            rows[generator.integers(0, len(rows), size=(min(100, samples - done), len(rows)))].mean(axis=1)
            for done in range(0, samples, 100)
        ]
    )
    tail = (1 - level) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return (100.0 * float(low), 100.0 * float(high))
