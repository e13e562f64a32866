"""Which windows of a long context are worth the model's time: BM25 over the windows, from the tokens that are there.

The windows of one context are the documents, the question's tokens (sub-words, each counted once) the query. With k1 = 1.2
and b = 0.75 a window's score is

    sum over the question's tokens t of  idf(t) * tf * (k1 + 1) / (tf + k1 * (1 - b + b * length / mean length))
    idf(t) = ln(1 + (windows - df + 0.5) / (df + 0.5))

where tf counts t in the window and df the windows that hold it: Robertson and Zaragoza 2009, "The Probabilistic Relevance
Framework: BM25 and Beyond", section 3; the 1 in the logarithm keeps the idf of a token in most windows above 0, as in Lucene.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qadeploy.core.windows import Cut
from qadeploy.records import IntArray

K1, B = 1.2, 0.75


@dataclass(frozen=True, slots=True, eq=False)
class Ranking:
    """The windows of a context by their scores.

    ``scores`` is float64 ``[windows]``; ``chosen`` int64 ``[at most as many as were asked for]`` holds the numbers, from 0, of
    the best, in the order of the context.
    """

    scores: NDArray[np.float64]
    chosen: IntArray


def rank(question: IntArray, context: IntArray, cut: Cut, count: int) -> Ranking:
    """The ``count`` best of the windows into which ``cut`` divides a context, by their scores, equal ones by their place.

    ``question`` and ``context`` are token ids ``[tokens]``, without special tokens. Where no token of the question occurs in the context
    all scores are 0, so that the first ``count`` windows are taken. Time is that of one look at each token of the context.
    """
    begins = np.asarray(cut.begins, dtype=np.int64)
    ends = np.minimum(begins + cut.room, cut.tokens)
    lengths = ends - begins
    norms = K1 * (1 - B + B * lengths / lengths.mean())
    scores = np.zeros(len(begins))
    for places in _places(question, context):
        counts = np.searchsorted(places, ends) - np.searchsorted(places, begins)
        holding = np.count_nonzero(counts)
        idf = np.log1p((len(begins) - holding + 0.5) / (holding + 0.5))
        scores += idf * counts * (K1 + 1) / (counts + norms)
    best = np.argsort(-scores, kind="stable")[:count]
    return Ranking(scores, np.sort(best))


def _places(question: IntArray, context: IntArray) -> list[IntArray]:
    """Where each of the question's tokens stands in the context, in order; those that stand nowhere are left out."""
    terms = np.unique(question)
    if not len(terms) or not len(context):
        return []
    asked = np.zeros(max(int(terms[-1]), int(context.max())) + 1, dtype=np.bool_)
    asked[terms] = True
    places = np.flatnonzero(asked[context])  # far fewer than tokens, as a rule
    found = context[places]
    order = np.argsort(found, kind="stable")
    borders = np.flatnonzero(np.diff(found[order])) + 1
    return np.split(places[order], borders) if len(places) else []
