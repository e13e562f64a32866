"""Exact match and F1 by one of two metrics, accuracy, and bootstrap intervals.

``squad`` is SQuAD's official script, made for English: Rajpurkar et al., "SQuAD: 100,000+ Questions for Machine Comprehension
of Text", EMNLP 2016, section 6.1, and the v2.0 script's rule for questions without an answer (the gold text is "").

``mixed`` is for every script. It has the same formulas and rule, but the tokens of MLQA's script (Lewis et al., "MLQA:
Evaluating Cross-lingual Extractive Question Answering", ACL 2020, mlqa_evaluation_v1.py), which removes all Unicode punctuation
and makes each Han character a token. That script is told the language and this metric is not, hence the differences:

- Each character (code point) of every script written without spaces is a token, in any text: Han, Hiragana, Katakana, Thai,
  Lao, Khmer, Myanmar, and Tibetan, whose mark between syllables is punctuation. Hangul has spaces, so its tokens are words.
- "a", "an" and "the" are removed if all letters of the text are Latin, as MLQA removes them from English; articles of other
  languages stay. So both metrics are equal on ASCII text.
- Full-width forms of ASCII symbols are removed too; a zero-width space, which may separate Khmer and Thai words, is a space.

CMRC 2018's script (Cui et al., "A Span-Extraction Dataset for Chinese Machine Reading Comprehension", EMNLP-IJCNLP 2019,
cmrc2018_evaluate.py) segments likewise, but its F1 counts the longest common run of tokens, not the tokens in common, so it
is lower or equal; it removes a short list of punctuation, and its exact match keeps spaces.
"""

from __future__ import annotations

import math
import re
import string
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np

from qadeploy.core.scripts import UNSPACED
from qadeploy.records import Answer, BoolArray, Example, Float64Array

Metric = Literal["squad", "mixed"]
MetricChoice = Literal["auto", "squad", "mixed"]
MOST_OTHER_LETTERS = 0.1  # the share of letters outside the Latin script up to which "auto" is "squad"

_HUNDREDS = 20  # of bootstrap samples
_TAIL = (1 - 0.95) / 2
_Z = 1.959963984540054  # of a 95 % interval
_ARTICLES = re.compile(r"\b(a|an|the)\b", re.UNICODE)
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_FULL_WIDTH = 0xFEE0  # from an ASCII character to its full-width form
_TOKEN = re.compile(rf"[{UNSPACED}]|[^\s\u200b{UNSPACED}]+")


def choose_metric(choice: MetricChoice, examples: Sequence[Example]) -> Metric:
    """Returns the metric to score with: ``choice``, or for "auto" the one that suits the script of the examples.

    That is "mixed" if more than ``MOST_OTHER_LETTERS`` of the letters of the contexts, or of the annotated answers, are not
    Latin: a few names or formulas in English texts change nothing. It is for whole data sets; choose once and keep the choice.

    Args:
        choice: The requested metric.
        examples: The annotated questions.
    """
    if choice != "auto":
        return choice
    answers = (a.text for e in examples for a in e.answers)
    share = max(_other_letters({e.context for e in examples}), _other_letters(answers))
    return "mixed" if share > MOST_OTHER_LETTERS else "squad"


def _other_letters(texts: Iterable[str]) -> float:
    """The share of letters that are not Latin, 0 to 1; 0 without letters."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text)
    letters = sum(n for char, n in counts.items() if char.isalpha())
    return sum(n for char, n in counts.items() if _is_other_letter(char)) / max(1, letters)


@cache
def _is_other_letter(char: str) -> bool:
    """Whether a character is a non-Latin letter. Letters below U+0370, where Greek begins, are Latin or of no script."""
    return char >= "\u0370" and char.isalpha() and "LATIN" not in unicodedata.name(char, "")


@cache
def _every_punctuation() -> dict[int, int | None]:
    """For ``str.translate``: drops the Unicode categories P*, the ASCII symbols and their full-width forms."""
    found = [char for char in map(chr, range(sys.maxunicode + 1)) if unicodedata.category(char)[0] == "P"]
    full_width = [chr(ord(char) + _FULL_WIDTH) for char in string.punctuation]
    return str.maketrans("", "", "".join(found) + string.punctuation + "".join(full_width))


def normalize(text: str, metric: Metric = "squad") -> str:
    """Lowers the case and drops punctuation, English articles and extra spaces.

    Args:
        text: The text.
        metric: "squad" drops ASCII punctuation. "mixed" drops Unicode punctuation, drops articles only from Latin text, and
            separates all tokens by one space, even characters of scripts without spaces.
    """
    if metric == "squad":
        return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())
    text = text.lower().translate(_every_punctuation())
    if not any(map(_is_other_letter, text)):
        text = _ARTICLES.sub(" ", text)
    return " ".join(_TOKEN.findall(text))


def exact_match(prediction: str, gold: str, metric: Metric = "squad") -> float:
    """Returns 1.0 if both texts are equal after ``normalize``, else 0.0.

    Args:
        prediction: The predicted text.
        gold: The annotated text.
        metric: How texts are normalised.
    """
    return float(normalize(prediction, metric) == normalize(gold, metric))


def f1(prediction: str, gold: str, metric: Metric = "squad") -> float:
    """Returns the harmonic mean of token precision and recall after ``normalize``, 0 to 1.

    If either text has no token left, it is 1.0 if both have none, else 0.0.

    Args:
        prediction: The predicted text.
        gold: The annotated text.
        metric: How texts are normalised.
    """
    predicted, wanted = normalize(prediction, metric).split(), normalize(gold, metric).split()
    if not predicted or not wanted:
        return float(predicted == wanted)
    shared = sum((Counter(predicted) & Counter(wanted)).values())
    if not shared:
        return 0.0
    precision, recall = shared / len(predicted), shared / len(wanted)
    return 2 * precision * recall / (precision + recall)


@dataclass(frozen=True, slots=True)
class Scores:
    """Scores of many questions: means in percent, and the rows behind them for intervals and paired tests.

    Attributes:
        rows_exact_match: Exact match of each question, 0 or 1, ``[questions]``.
        rows_f1: F1 of each question, 0 to 1, ``[questions]``.
        rows_accuracy: 1 if the predicted span (code points) is an annotated one, else 0, ``[questions]``.
        rows_has_answer: Whether the question is annotated with an answer, ``[questions]``.
    """

    rows_exact_match: Float64Array
    rows_f1: Float64Array
    rows_accuracy: Float64Array
    rows_has_answer: BoolArray

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
        """Share of questions whose span was predicted exactly, percent."""
        return _percent(self.rows_accuracy)

    def to_dict(self) -> dict[str, object]:
        """Returns exact_match, f1, accuracy and total with 95 % bootstrap intervals, as plain JSON values.

        If there are questions with an answer, HasAns_exact, HasAns_f1 and HasAns_total are added, and NoAns_* if there
        are questions without one, as in SQuAD v2's official script.
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


def _percent(rows: Float64Array) -> float:
    return 100.0 * float(rows.mean()) if len(rows) else 0.0


def score(examples: Sequence[Example], predictions: Sequence[Answer], metric: Metric = "squad") -> Scores:
    """Scores one prediction per question against its annotated answers, of which the best match counts.

    The right answer to a question without answers is the empty text. As in the official script, a gold text that
    normalises to nothing (an article alone) counts only if all of a question's gold texts do.

    Args:
        examples: The questions.
        predictions: One answer for each.
        metric: How texts are compared.
    """
    em, f, accuracy = [], [], []
    for example, answer in zip(examples, predictions, strict=True):
        golds = [a.text for a in example.answers if normalize(a.text, metric)] or [""]
        em.append(max(exact_match(answer.text, gold, metric) for gold in golds))
        f.append(max(f1(answer.text, gold, metric) for gold in golds))
        spans = {(a.start, a.end) for a in example.answers} or {(0, 0)}
        accuracy.append(float((answer.start, answer.end) in spans))
    has_answer = np.asarray([bool(e.answers) for e in examples], dtype=bool)
    return Scores(np.asarray(em), np.asarray(f), np.asarray(accuracy), has_answer)


def bootstrap_interval(rows: Float64Array) -> tuple[float, float]:
    """Computes the 95 % percentile bootstrap interval of a mean (Efron 1979), with a fixed seed.

    Args:
        rows: One value per question, 0 to 1, ``[questions]``.

    Returns:
        The lower and the upper bound, in percent.
    """
    if not len(rows):
        return (0.0, 0.0)
    generator, size = np.random.default_rng(0), (100, len(rows))
    means = [rows[generator.integers(0, len(rows), size=size)].mean(axis=1) for _ in range(_HUNDREDS)]
    low, high = np.quantile(np.concatenate(means), [_TAIL, 1 - _TAIL])
    return (100.0 * float(low), 100.0 * float(high))


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """Computes the 95 % interval of a share, 0 to 1, of ``count`` trials (Wilson 1927, "Probable Inference").

    Unlike a bootstrap interval, it has a width even if all trials succeeded, or none.
    """
    square = _Z * _Z
    middle = (share + square / (2 * count)) / (1 + square / count)
    half = _Z / (1 + square / count) * math.sqrt(share * (1 - share) / count + square / (4 * count * count))
    return max(0.0, middle - half), min(1.0, middle + half)
