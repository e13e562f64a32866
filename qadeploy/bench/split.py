"""How our time divides into tokenising, running the model and decoding; and the whole compared with the model alone."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from qadeploy.bench.variant import Pairs
from qadeploy.core.decoding import rank_answers
from qadeploy.inference.answerer import Answerer

PARTS = ("tokenise", "run", "decode")


@dataclass(frozen=True, slots=True)
class Split:
    """Milliseconds per question, medians over rounds: of each part, run one after the other, and of the whole call.

    The parts add up to ``apart``. The ``whole`` is answer_batch on the same questions in the same rounds, which may be
    less than ``apart`` (parts overlap) or more (there is work between them). ``windows`` are the lengths in tokens of the
    model's windows in one round.
    """

    tokenise: float
    run: float
    decode: float
    whole: float
    whole_of_model: float
    windows: tuple[int, ...]
    questions: int
    rounds: int

    @property
    def apart(self) -> float:
        """The sum of the parts."""
        return self.tokenise + self.run + self.decode

    def to_dict(self) -> dict[str, Any]:
        """The figures as plain JSON values; ``shares`` are the parts as shares of their sum, 0 to 1.

        ``text_to_answers_of_model_alone`` is the speed of the whole divided by that of the model alone, the median of
        the ratios within a round: 1 if host work costs nothing.
        """
        parts = {name: float(getattr(self, name)) for name in PARTS}
        return {
            "ms_per_question": {**parts, "whole": self.whole},
            "shares": {name: value / self.apart for name, value in parts.items()},
            "text_to_answers_of_model_alone": self.whole_of_model,
            "questions": self.questions,
            "rounds": self.rounds,
        }


def measure_split(answerer: Answerer, pairs: Pairs, rounds: int, *, allow_no_answer: bool = False) -> Split:
    """Runs the parts and the whole in turns on the same questions, after one round that is not counted.

    Each context is tokenised once, as ``answer_batch`` does. Raises what ``answer_batch`` raises.
    """
    found: list[list[float]] = []
    windows: tuple[int, ...] = ()
    for _ in range(rounds + 1):
        seconds, windows = _parts(answerer, pairs, allow_no_answer)
        started = time.perf_counter()
        answerer.answer_batch(pairs, allow_no_answer=allow_no_answer)
        found.append([*seconds, time.perf_counter() - started])
    counted = np.asarray(found[1:])
    tokenise, run, decoding, whole = (float(v) for v in 1000 * np.median(counted, axis=0) / len(pairs))
    of_model = float(np.median(counted[:, 1] / counted[:, 3]))
    return Split(tokenise, run, decoding, whole, of_model, windows, len(pairs), rounds)


def _parts(answerer: Answerer, pairs: Pairs, allow_no_answer: bool) -> tuple[list[float], tuple[int, ...]]:
    """Seconds of tokenising, running and decoding the pairs, one step after the other, and the lengths of their windows."""
    settings = answerer.settings
    marks = [time.perf_counter()]
    contexts = {context: answerer.encoder.encode(context) for context in dict.fromkeys(c for _, c in pairs)}
    read = [
        answerer.encoder.windows(answerer.encoder.encode(question), contexts[context], **settings.lengths)
        for question, context in pairs
    ]
    marks.append(time.perf_counter())
    logits = answerer.model.start([window for windows in read for window in windows]).result()
    marks.append(time.perf_counter())
    scored, first = [], 0
    for (_, context), windows in zip(pairs, read, strict=True):
        part = logits[first : first + len(windows)]
        first += len(windows)
        starts, ends = [s for s, _ in part], [e for _, e in part]
        scored.append(settings.window_logits(windows, starts, ends, contexts[context]))
    found = [settings.decode(one, allow_no_answer=allow_no_answer) for one in scored]
    for (_, context), decoded in zip(pairs, found, strict=True):
        rank_answers(decoded, context, top_k=1, allow_no_answer=allow_no_answer, null_threshold=settings.null_threshold)
    marks.append(time.perf_counter())
    return [float(x) for x in np.diff(marks)], tuple(len(w) for windows in read for w in windows)
