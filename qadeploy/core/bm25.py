"""BM25 scores of the windows of a long context: they choose the windows to read, and shift the logits of their spans.

The windows of one context are the documents, the question's distinct tokens (sub-words) the query. With k1 = 1.2
and b = 0.75 the score of a window is

    sum over the question's tokens t of  idf(t) * tf * (k1 + 1) / (tf + k1 * (1 - b + b * length / mean length))
    idf(t) = ln(1 + (windows - df + 0.5) / (df + 0.5))

where tf counts t in the window and df the windows that contain it: Robertson and Zaragoza 2009, "The Probabilistic Relevance
Framework: BM25 and Beyond", section 3; the 1 in the logarithm keeps the idf of a token in most windows above 0, as in Lucene.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qadeploy.core.encoded_text import EncodedText
from qadeploy.records import Float64Array, IntArray, Window

K1, B = 1.2, 0.75


@dataclass(frozen=True, slots=True, eq=False)
class Ranking:
    """The BM25 scores of a context's windows, and the windows chosen by them.

    Attributes:
        scores: BM25 score of each window, ``[windows]``.
        chosen: Indices of the best windows, in the order of the context, ``[chosen windows]``.
    """

    scores: Float64Array
    chosen: IntArray


def rank_parts(question: IntArray, context: IntArray, begins: IntArray, ends: IntArray, count: int) -> Ranking:
    """Chooses the best windows of a context. Ties go to the earlier window.

    If no token of the question occurs in the context, all scores are 0 and the first windows are chosen. Each context
    token is looked at once.

    Args:
        question: Token ids without special tokens, ``[tokens]``.
        context: Token ids without special tokens, ``[tokens]``.
        begins: The first context token of each window, ``[windows]``.
        ends: The token after its last, ``[windows]``.
        count: How many windows to choose.
    """
    scores = part_scores(question, context, begins, ends)
    best = np.argsort(-scores, kind="stable")[:count]
    return Ranking(scores, np.sort(best))


def part_scores(question: IntArray, context: IntArray, begins: IntArray, ends: IntArray) -> Float64Array:
    """The score, ``[windows]``, of each window; the arguments are those of ``rank_parts``."""
    lengths = ends - begins
    norms = K1 * (1 - B + B * lengths / max(lengths.mean(), 1))
    scores = np.zeros(len(begins))
    for places in _places(question, context):
        counts = np.searchsorted(places, ends) - np.searchsorted(places, begins)
        holding = np.count_nonzero(counts)
        idf = np.log1p((len(begins) - holding + 0.5) / (holding + 0.5))
        scores += idf * counts * (K1 + 1) / (counts + norms)
    return scores


def relevance(windows: Sequence[Window], context: EncodedText) -> Float64Array:
    """The score of each window of one question minus the best window's, ``[windows]``: 0 or less.

    All tokens outside the context count as the question: special tokens do not occur in texts, so they match nothing.
    """
    begins = np.asarray([w.context_offset for w in windows], dtype=np.int64)
    ends = begins + np.asarray([w.context_length for w in windows], dtype=np.int64)
    first = windows[0]
    question = np.delete(first.input_ids, np.s_[first.context_begin : first.context_begin + first.context_length])
    scores = part_scores(question, context.ids, begins, ends)
    return np.asarray(scores - scores.max())


def _places(question: IntArray, context: IntArray) -> list[IntArray]:
    """Returns the positions in the context of each token of the question that occurs there, in order."""
    terms = np.unique(question)
    if not len(terms) or not len(context):
        return []
    wanted = np.zeros(max(int(terms[-1]), int(context.max())) + 1, dtype=np.bool_)
    wanted[terms] = True
    places = np.flatnonzero(wanted[context])  # usually far fewer than tokens
    found = context[places]
    order = np.argsort(found, kind="stable")
    borders = np.flatnonzero(np.diff(found[order])) + 1
    return np.split(places[order], borders) if len(places) else []
