"""What a model says of every question, in the three files of transformers' run_qa.py.

``predictions.json`` ``{id: text}`` is what was scored, and what SQuAD's scripts read. ``nbest_predictions.json``
``{id: [{text, start_logit, end_logit, probability, start, end}]}`` holds the best spans (and, where it competes, the null
answer), best first. ``null_odds.json`` ``{id: null logit minus the best span's logit}`` is there where the null answer
competes: SQuAD v2's script takes it as ``--na-prob-file``.

The format is that of ``postprocess_qa_predictions`` (transformers 4.57, examples/pytorch/question-answering/utils_qa.py),
with ``start`` and ``end`` (code points) added. Two things differ. ``probability`` is our score, a softmax over all
valid spans of all windows at the model's temperature, so it does not depend on how many are listed; theirs is a softmax
over those listed. And every valid span is looked at, once a text, where theirs combines the n best starts and ends of each
window and lists a span of two windows twice.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qadeploy.core.decoding import decode
from qadeploy.core.settings import QaSettings
from qadeploy.core.windows import EncodedText
from qadeploy.files import write_json
from qadeploy.inference.answerer import Answerer, Options, to_answers
from qadeploy.records import Answer, Example, FloatArray, Span, Window

PREDICTIONS, N_BEST, NULL_ODDS = "predictions.json", "nbest_predictions.json", "null_odds.json"
DEFAULT_N_BEST = 20


@dataclass(frozen=True, slots=True)
class Prediction:
    """One question's entries in the three files; ``null_odds`` is None where the null answer does not compete."""

    ids: tuple[str, ...]
    text: str
    n_best: tuple[dict[str, Any], ...]
    null_odds: float | None


def predict(
    example: Example,
    answer: Answer,
    windows: Sequence[Window],
    start_logits: Sequence[FloatArray],
    end_logits: Sequence[FloatArray],
    context: EncodedText,
    settings: QaSettings,
    *,
    n_best_size: int = DEFAULT_N_BEST,
    allow_no_answer: bool = False,
) -> Prediction:
    """The entries of a question that was answered with ``answer``; the logits are those that ``decode`` takes.

    At most ``n_best_size`` candidates are listed, and where the null answer competes it always is, as one more if
    it must. Where there is no span at all its null odds are the largest float. Raises what ``decode`` raises.
    """
    scored = settings.scored(windows, start_logits, end_logits, context)
    start_logits, end_logits = scored.start_logits, scored.end_logits
    decoded = decode(
        windows,
        start_logits,
        end_logits,
        context,
        top_k=n_best_size,
        max_answer_len=settings.max_answer_len,
        allow_no_answer=allow_no_answer,
        temperature=settings.temperature,
    )
    ranked = []
    for span in decoded.spans:
        logits = _span_logits(span, windows, start_logits, end_logits)
        text = example.context[span.start : span.end]
        ranked.append((span.logit, _entry(text, *logits, span.score, span.start, span.end)))
    odds = None
    if allow_no_answer:
        pairs = [(s[w.null_index], e[w.null_index]) for w, s, e in zip(windows, start_logits, end_logits, strict=True)]
        null = _entry("", *min(pairs, key=sum), decoded.null_score, 0, 0)
        # Python's sort is stable: among equals the null answer comes last, as in run_qa.py.
        ranked = sorted([*ranked, (decoded.null_logit, null)], key=lambda r: -r[0])
        if null not in (entry for _, entry in ranked[:n_best_size]):
            ranked[n_best_size:] = [(decoded.null_logit, null)]
        else:
            ranked = ranked[:n_best_size]
        odds = float(min(decoded.null_difference, sys.float_info.max))
    return Prediction((example.id, *example.also), answer.text, tuple(entry for _, entry in ranked), odds)


def _entry(text: str, start_logit: float, end_logit: float, probability: float, start: int, end: int) -> dict[str, Any]:
    return {
        "text": text,
        "start_logit": float(start_logit),
        "end_logit": float(end_logit),
        "probability": probability,
        "start": start,
        "end": end,
    }


def _span_logits(
    span: Span, windows: Sequence[Window], start_logits: Sequence[FloatArray], end_logits: Sequence[FloatArray]
) -> tuple[float, float]:
    """Start and end logit of a span in the window whose sum is the best, which is the one that ranked it."""
    found = []
    for window, starts, ends in zip(windows, start_logits, end_logits, strict=True):
        shift = window.context_begin - window.context_offset
        if window.context_offset <= span.start_token and span.end_token < window.context_offset + window.context_length:
            found.append((starts[span.start_token + shift], ends[span.end_token + shift]))
    return max(found, key=sum)


def write_predictions(folder: Path, predictions: Iterable[Prediction]) -> None:
    """Writes the files into ``folder``; a ``null_odds.json`` of another model goes where this one has none."""
    rows = list(predictions)
    write_json(folder / PREDICTIONS, {i: p.text for p in rows for i in p.ids})
    write_json(folder / N_BEST, {i: p.n_best for p in rows for i in p.ids})
    odds = {i: p.null_odds for p in rows for i in p.ids if p.null_odds is not None}
    if odds:
        write_json(folder / NULL_ODDS, odds)
    else:
        (folder / NULL_ODDS).unlink(missing_ok=True)


class Recorder:
    """An answerer as ``evaluate`` takes it, which keeps the prediction of every example that it answers."""

    def __init__(self, answerer: Answerer, examples: Sequence[Example], n_best_size: int) -> None:
        self.settings = answerer.settings
        self.predictions: list[Prediction] = []
        self._answerer = answerer
        self._examples = examples
        self._n_best_size = n_best_size

    def answer_stream(
        self,
        pairs: Iterable[tuple[str, str]],
        *,
        top_k: int = 1,
        allow_no_answer: bool = False,
        prefilter: int | None = None,
    ) -> Iterator[list[Answer]]:
        """The answerer's answers to the examples, whose questions and contexts ``pairs`` are."""
        options = Options(top_k=top_k, allow_no_answer=allow_no_answer, prefilter=prefilter)
        for example, reading in zip(self._examples, self._answerer.read_stream(pairs, options), strict=True):
            answers = to_answers(reading, options)
            starts, ends = zip(*reading.logits, strict=True)
            self.predictions.append(
                predict(
                    example,
                    answers[0] if answers else Answer("", 0, 0, 0.0),
                    reading.windows,
                    starts,
                    ends,
                    reading.context,
                    reading.settings,
                    n_best_size=self._n_best_size,
                    allow_no_answer=allow_no_answer,
                )
            )
            yield answers
