"""Prediction files: a model's answers to every question, in the three files of transformers' run_qa.py.

``predictions.json`` ``{id: text}`` is what was scored, and what SQuAD's scripts read. ``nbest_predictions.json``
``{id: [{text, start_logit, end_logit, probability, start, end}]}`` holds the best spans, best first, with the null
answer if it competes. In that case there is also ``null_odds.json`` ``{id: null logit minus the best span's logit}``,
which SQuAD v2's script takes as ``--na-prob-file``.

The format is that of ``postprocess_qa_predictions`` (transformers 4.57, examples/pytorch/question-answering/utils_qa.py),
with the differences that docs/run-qa.md lists. We consider every valid span, once per text; theirs combines the n best
starts and ends of each window.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qadeploy.core.decoding import WindowLogits
from qadeploy.core.settings import QaSettings
from qadeploy.files import new_file, require_new, write_json
from qadeploy.records import Answer, Example, FloatArray, Span, Window

PREDICTIONS, N_BEST, NULL_ODDS = "predictions.json", "nbest_predictions.json", "null_odds.json"
DEFAULT_N_BEST = 20


@dataclass(frozen=True, slots=True)
class Prediction:
    """One question's entries in the three files; ``null_odds`` is None if the null answer does not compete."""

    ids: tuple[str, ...]
    text: str
    n_best: tuple[dict[str, Any], ...]
    null_odds: float | None


def predict(
    example: Example,
    answer: Answer,
    scored: WindowLogits,
    settings: QaSettings,
    *,
    n_best_size: int = DEFAULT_N_BEST,
    allow_no_answer: bool = False,
) -> Prediction:
    """Makes the entries of one question. Raises what ``decode`` raises.

    Args:
        example: The question.
        answer: The answer that was given.
        scored: Its windows and logits, from ``settings.window_logits``.
        settings: The model's settings.
        n_best_size: Maximum candidates to list. If the null answer competes it is always listed, as an extra if needed.
        allow_no_answer: Whether the null answer competes. Without any span its null odds are the largest float.
    """
    decoded = settings.decode(scored, top_k=n_best_size, allow_no_answer=allow_no_answer)
    ranked = []
    for span in decoded.spans:
        logits = _span_logits(span, scored)
        text = example.context[span.start : span.end]
        ranked.append((span.logit, _entry(text, *logits, span.score, span.start, span.end)))
    odds = None
    if allow_no_answer:
        pairs = [(s[w.null_index], e[w.null_index]) for w, s, e in _windows(scored)]
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


def _windows(scored: WindowLogits) -> Iterator[tuple[Window, FloatArray, FloatArray]]:
    return zip(scored.windows, scored.start_logits, scored.end_logits, strict=True)


def _span_logits(span: Span, scored: WindowLogits) -> tuple[float, float]:
    """Returns a span's start and end logit in the window with the best sum, which ranked it."""
    found = []
    for window, starts, ends in _windows(scored):
        shift = window.context_begin - window.context_offset
        if window.context_offset <= span.start_token and span.end_token < window.context_offset + window.context_length:
            found.append((starts[span.start_token + shift], ends[span.end_token + shift]))
    return max(found, key=sum)


@contextmanager
def new_predictions(file: Path | None, folder: Path | None) -> Iterator[None]:
    """Reserves the files of ``--predictions`` and ``--predictions-dir``, whose folder it creates; overwrites no file.

    Raises InputError if a file is there already, another command is writing it, or the folder of ``file`` does not exist.
    """
    places = {file: "--predictions"} if file else {}
    if folder:
        inside = {folder / name: "--predictions-dir" for name in (PREDICTIONS, N_BEST, NULL_ODDS)}
        for place in inside if folder.exists() else ():
            require_new(place, "--predictions-dir")  # before anything is created
        places |= inside
    with ExitStack() as stack:
        for place, flag in places.items():
            if flag == "--predictions-dir":
                place.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(new_file(place, flag))
        yield


def write_predictions(folder: Path, predictions: Iterable[Prediction]) -> None:
    """Writes the files into a folder. If there are no null odds, an older ``null_odds.json`` is deleted."""
    rows = list(predictions)
    write_json(folder / PREDICTIONS, {i: p.text for p in rows for i in p.ids})
    write_json(folder / N_BEST, {i: p.n_best for p in rows for i in p.ids})
    odds = {i: p.null_odds for p in rows for i in p.ids if p.null_odds is not None}
    if odds:
        write_json(folder / NULL_ODDS, odds)
    else:
        (folder / NULL_ODDS).unlink(missing_ok=True)
