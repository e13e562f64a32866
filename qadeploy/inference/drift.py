"""The figures of an answered question that are watched for drift."""

from __future__ import annotations

from qadeploy.core.drift import Figure, Figures
from qadeploy.core.settings import Options
from qadeploy.core.unknown import unknown_share
from qadeploy.inference.pairs import DecodedPair

COMPARED = 2  # answers that must be decoded for the margin


def figures_of(pair: DecodedPair, options: Options, unknown: int | None) -> Figures:
    """The figures of a question, from its two best answers, whatever ``top_k`` and ``min_score`` are.

    Args:
        pair: The question, decoded with a ``top_k`` of at least ``COMPARED``.
        options: The options of the call that asked it.
        unknown: The id of the unknown token, or None if the tokenizer has none.
    """
    ranked = pair.ranked(options, COMPARED)
    best, second = (*(answer.score for answer in ranked), 0.0, 0.0)[:COMPARED]
    return {
        Figure.SCORE: best,
        Figure.MARGIN: max(best - second, 0.0),  # a null threshold may rank the less probable one first
        Figure.NO_ANSWER: float(not ranked or not ranked[0].text),
        Figure.QUESTION_TOKENS: len(pair.question),
        Figure.CONTEXT_TOKENS: len(pair.context),
        Figure.UNKNOWN_TOKENS: unknown_share([pair.question.ids, pair.context.ids], unknown),
    }
