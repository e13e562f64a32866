"""The figures of held-out questions, with which a server compares those of the questions that it answers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Unpack

from qadeploy.core.drift import Drift
from qadeploy.core.settings import AnswerOptions, Options
from qadeploy.inference.answerer import Answerer
from qadeploy.inference.drift import COMPARED, figures_of
from qadeploy.inference.pairs import to_answers
from qadeploy.records import Answer

_SERVED = Options()


class Watched:
    """A predictor for ``evaluate`` that wraps an answerer and counts the figures that a server counts by default.

    Args:
        answerer: The answerer to wrap.
    """

    def __init__(self, answerer: Answerer) -> None:
        self.settings = answerer.settings
        self.drift = Drift()
        self._answerer = answerer

    def answer_stream(self, pairs: Iterable[tuple[str, str]], **given: Unpack[AnswerOptions]) -> Iterator[list[Answer]]:
        """Yields the answers to each (question, context) pair."""
        options, unknown = Options(**given), self._answerer.encoder.unknown_id
        for pair in self._answerer.read_stream(pairs, options):
            allowed = _SERVED.null_competes(pair.settings)
            served = pair.settings.decode(pair.scored, top_k=COMPARED, allow_no_answer=allowed)
            self.drift.add(figures_of(replace(pair, decoded=served), _SERVED, unknown))
            yield to_answers(pair, options)
