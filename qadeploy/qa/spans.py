"""Logits to answer spans: the one decoder, used for evaluation and for serving.

A span is valid where it lies in the context, start <= end, it is at most ``max_answer_len`` tokens
long, and neither end is blank. Its logit is start + end, the best over the windows that hold it.
Its score is ONE softmax over every valid span of all windows (and the null answer where allowed) of
logits divided by the model's temperature, so scores are probabilities that do not depend on ``top_k``
and never sum to more than 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qadeploy.errors import InputError, LogitsError
from qadeploy.qa.windows import EncodedText
from qadeploy.records import Answer, FloatArray, Span, Window

DEFAULT_MAX_ANSWER_LEN = 30


@dataclass(frozen=True, slots=True)
class Decoded:
    """What the decoder found in one context.

    ``spans`` are ranked, best first, one a text span. ``null_logit`` is the minimum over windows of
    the null position's start + end logit (Devlin et al. 2019, section 4.3, as in SQuAD v2 scripts),
    ``null_score`` its probability (0 where the null answer is not allowed).
    """

    spans: tuple[Span, ...]
    null_logit: float
    null_score: float

    @property
    def null_difference(self) -> float:
        """The null logit minus the best span's: what the null threshold is held against; +inf without a span."""
        return self.null_logit - self.spans[0].logit if self.spans else np.inf


def span_table(
    windows: Sequence[Window],
    start_logits: Sequence[FloatArray],
    end_logits: Sequence[FloatArray],
    context: EncodedText,
    max_answer_len: int,
) -> FloatArray:
    """``[context tokens, lengths]``: the logit of the span of length k + 1 at each token, -inf where invalid.

    ``start_logits[i]`` and ``end_logits[i]`` are float32 ``[at least the tokens of window i]``.
    Raises LogitsError on NaN or infinite logits, InputError on ``max_answer_len`` below 1.
    """
    if max_answer_len < 1:
        raise InputError(f"max_answer_len {max_answer_len} is below 1: it is the longest answer in tokens")
    lengths = min(max_answer_len, max((w.context_length for w in windows), default=1) or 1)
    table = np.full((len(context), lengths), -np.inf, dtype=np.float32)
    for window, starts, ends in zip(windows, start_logits, end_logits, strict=True):
        if not (np.isfinite(starts[: len(window)]).all() and np.isfinite(ends[: len(window)]).all()):
            raise LogitsError("the model returned NaN or infinite logits: its weights or precision are broken")
        size, begin = window.context_length, window.context_begin
        if not size:
            continue
        padded = np.full(size + lengths - 1, -np.inf, dtype=np.float32)
        padded[:size] = ends[begin : begin + size]
        scores = starts[begin : begin + size, None] + np.lib.stride_tricks.sliding_window_view(padded, lengths)
        rows = table[window.context_offset : window.context_offset + size]
        np.maximum(rows, scores, out=rows)
    if len(context) and context.blank.any():
        table[context.blank] = -np.inf
        last = np.add.outer(np.arange(len(context)), np.arange(lengths))
        blank_end = np.append(context.blank, np.zeros(lengths, dtype=bool))[last]
        table[blank_end] = -np.inf
    return table


def decode(
    windows: Sequence[Window],
    start_logits: Sequence[FloatArray],
    end_logits: Sequence[FloatArray],
    context: EncodedText,
    *,
    top_k: int = 1,
    max_answer_len: int = DEFAULT_MAX_ANSWER_LEN,
    align_to_words: bool = False,
    allow_no_answer: bool = False,
    temperature: float = 1.0,
) -> Decoded:
    """The ``top_k`` best spans of one context with their scores, and the null answer's.

    ``align_to_words`` widens an answer to the whole pre-tokenised words at its borders. Spans that
    cover the same text are one span, the best of them. Fewer than ``top_k`` come back where there
    are fewer. ``temperature`` divides the logits in the softmax: it moves scores, never ranks. Raises
    LogitsError and InputError like ``span_table``, InputError on ``top_k`` below 1.
    """
    if top_k < 1:
        raise InputError(f"top_k {top_k} is below 1: it is the number of answers to return")
    table = span_table(windows, start_logits, end_logits, context, max_answer_len)
    null_logit = least_null_logit(windows, start_logits, end_logits)
    flat = table.ravel()
    peak = float(flat.max()) if flat.size else -np.inf
    if allow_no_answer:
        peak = max(peak, null_logit)
    if not np.isfinite(peak):
        return Decoded((), null_logit, 0.0)
    total = float(np.exp((flat.astype(np.float64) - peak) / temperature).sum())
    null_weight = float(np.exp((null_logit - peak) / temperature)) if allow_no_answer else 0.0
    total += null_weight

    spans: list[Span] = []
    seen: set[tuple[int, int]] = set()
    ranked = 0
    valid = int(np.isfinite(flat).sum())
    want = min(valid, max(2 * top_k, 16))
    while len(spans) < top_k and ranked < valid:
        for cell in _best_cells(flat, want)[ranked:]:
            first, extra = divmod(int(cell), table.shape[1])
            span = _text_span(context, first, first + extra, align_to_words)
            if span in seen:
                continue
            seen.add(span)
            logit = float(flat[cell])
            score = float(np.exp((logit - peak) / temperature)) / total
            spans.append(Span(*span, first, first + extra, logit, score))
            if len(spans) == top_k:
                break
        ranked, want = want, min(valid, 4 * want)
    return Decoded(tuple(spans), null_logit, null_weight / total)


def least_null_logit(
    windows: Sequence[Window], start_logits: Sequence[FloatArray], end_logits: Sequence[FloatArray]
) -> float:
    """The minimum over windows of the null position's start + end logit: an answer in one window speaks for all."""
    return min(
        float(s[w.null_index] + e[w.null_index]) for w, s, e in zip(windows, start_logits, end_logits, strict=True)
    )


def rank_answers(
    decoded: Decoded, context: str, *, top_k: int, allow_no_answer: bool = False, null_threshold: float | None = None
) -> list[Answer]:
    """The ``top_k`` best answers of what was decoded, best first.

    With ``allow_no_answer`` the null answer stands before the first span whose logit it exceeds by more
    than ``null_threshold`` (None: 0, which ranks by probability): SQuAD v2's rule, ``null_score_diff_threshold``
    of transformers' ``run_qa.py``. Scores stay probabilities, so a threshold can rank it above likelier spans.
    """
    answers = [Answer(context[s.start : s.end], s.start, s.end, s.score) for s in decoded.spans]
    if allow_no_answer:
        threshold = null_threshold or 0.0
        before = sum(decoded.null_logit - s.logit <= threshold for s in decoded.spans)
        answers.insert(before, Answer("", 0, 0, decoded.null_score))
    return answers[:top_k]


def _best_cells(flat: FloatArray, count: int) -> list[int]:
    """Indices of the ``count`` largest values, best first, ties by position (earlier and shorter first)."""
    if count < flat.size:
        threshold = np.partition(flat, flat.size - count)[flat.size - count]
        above = np.flatnonzero(flat > threshold)
        cells = np.concatenate((above, np.flatnonzero(flat == threshold)[: count - len(above)]))
    else:
        cells = np.flatnonzero(np.isfinite(flat))
    order = np.lexsort((cells, -flat[cells]))
    return [int(c) for c in cells[order]]


def _text_span(context: EncodedText, first: int, last: int, align_to_words: bool) -> tuple[int, int]:
    source = context.words if align_to_words else context.offsets
    return context.visible(int(source[first, 0]), int(source[last, 1]))
