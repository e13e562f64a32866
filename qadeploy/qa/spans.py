"""Logits to answer spans: the one decoder, used for evaluation and for serving.

A span is valid where it lies in the context, start <= end, it is at most ``max_answer_len`` tokens
long, and neither end is blank. Its logit is start + end, the best over the windows that hold it.
Its score is ONE softmax over every valid span of all windows (and the null answer where allowed) of
logits divided by the model's temperature, so scores are probabilities that do not depend on ``top_k``
and never sum to more than 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qadeploy.errors import InputError, LogitsError
from qadeploy.qa.windows import EncodedText
from qadeploy.records import Answer, FloatArray, Span, Window

DEFAULT_MAX_ANSWER_LEN = 30
_CELLS = 2**16  # of spans in one table: 256 KB of logits and 512 KB of weights, which a core's cache holds
Index = NDArray[np.intp]


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


@dataclass(frozen=True, slots=True, eq=False)
class Scored:
    """The windows of one question over one context, with a model's logits for them.

    ``start_logits[i]`` and ``end_logits[i]`` are float32 ``[at least the tokens of window i]``.
    """

    windows: Sequence[Window]
    start_logits: Sequence[FloatArray]
    end_logits: Sequence[FloatArray]
    context: EncodedText


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
    return _table([Scored(windows, start_logits, end_logits, context)], max_answer_len)


def _table(scored: Sequence[Scored], max_answer_len: int) -> FloatArray:
    """The span tables of several contexts, one below the other: ``[all their tokens, lengths]``."""
    if max_answer_len < 1:
        raise InputError(f"max_answer_len {max_answer_len} is below 1: it is the longest answer in tokens")
    windows = [w for one in scored for w in one.windows]
    starts = _joined(windows, [logits for one in scored for logits in one.start_logits])
    ends = _joined(windows, [logits for one in scored for logits in one.end_logits])
    if not (np.isfinite(starts).all() and np.isfinite(ends).all()):
        raise LogitsError("the model returned NaN or infinite logits: its weights or precision are broken")
    longest = max((w.context_length for w in windows), default=0)
    lengths = min(max_answer_len, longest or 1)
    table = np.full((sum(len(one.context) for one in scored), lengths), -np.inf, dtype=np.float32)
    # The ends of one window, then so many that no span goes past its last token; and row i of ``reach`` is
    # what token i reaches: ends i to i + lengths - 1.
    padded = np.empty(longest + lengths - 1, dtype=np.float32)
    reach = np.ndarray((longest, lengths), np.float32, padded, strides=2 * padded.strides)
    base = place = 0
    for one in scored:
        blank = one.context.blank
        blanks = bool(blank.any())
        for window in one.windows:
            size, first = window.context_length, place + window.context_begin
            own, last = starts[first : first + size], ends[first : first + size]
            if blanks:
                dark = blank[window.context_offset : window.context_offset + size]
                own[dark] = last[dark] = -np.inf
            padded[:size], padded[size : size + lengths - 1] = last, -np.inf
            rows = table[base + window.context_offset : base + window.context_offset + size]
            np.maximum(rows, own[:, None] + reach[:size], out=rows)
            place += len(window)
        base += len(one.context)
    return table


def _joined(windows: Sequence[Window], logits: Sequence[FloatArray]) -> FloatArray:
    """The logits of all windows, one behind the other, without those of padding."""
    return np.concatenate([np.empty(0, np.float32), *(x[: len(w)] for w, x in zip(windows, logits, strict=True))])


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
    """``decode_many`` for one context."""
    return decode_many(
        [Scored(windows, start_logits, end_logits, context)],
        top_k=top_k,
        max_answer_len=max_answer_len,
        align_to_words=align_to_words,
        allow_no_answer=allow_no_answer,
        temperature=temperature,
    )[0]


def decode_many(
    scored: Sequence[Scored],
    *,
    top_k: int = 1,
    max_answer_len: int = DEFAULT_MAX_ANSWER_LEN,
    align_to_words: bool = False,
    allow_no_answer: bool = False,
    temperature: float = 1.0,
) -> list[Decoded]:
    """The ``top_k`` best spans of each context with their scores, and the null answer's.

    ``align_to_words`` widens an answer to the whole pre-tokenised words at its borders. Spans that
    cover the same text are one span, the best of them. Fewer than ``top_k`` come back where there
    are fewer. ``temperature`` divides the logits in the softmax: it moves scores, never ranks. Time and
    memory are O(tokens x ``max_answer_len``), memory for a bounded number of contexts at a time. Raises
    LogitsError and InputError like ``span_table``, InputError on ``top_k`` below 1.
    """
    if top_k < 1:
        raise InputError(f"top_k {top_k} is below 1: it is the number of answers to return")
    found: list[Decoded] = []
    for group in _groups(scored, max_answer_len):
        table = _table(group, max_answer_len)
        counts = np.asarray([len(one.context) for one in group])
        begins = np.cumsum(counts) - counts
        nulls = [least_null_logit(one.windows, one.start_logits, one.end_logits) for one in group]
        peaks, totals = _normalisers(table, begins, counts, temperature, nulls if allow_no_answer else None)
        for i, one in enumerate(group):
            part = table[begins[i] : begins[i] + counts[i]]
            peak, total = float(peaks[i]), float(totals[i])
            spans = [
                Span(*text, first, last, logit, math.exp((logit - peak) / temperature) / total)
                for text, first, last, logit in _best_spans(part, one.context, top_k, align_to_words)
            ]
            null_score = math.exp((nulls[i] - peak) / temperature) / total if allow_no_answer else 0.0
            found.append(Decoded(tuple(spans), nulls[i], null_score))
    return found


def _groups(scored: Sequence[Scored], max_answer_len: int) -> Iterator[list[Scored]]:
    """Neighbours whose table together stays below ``_CELLS``, one at least."""
    group: list[Scored] = []
    cells = 0
    for one in scored:
        own = sum(w.context_length for w in one.windows) * max_answer_len
        if group and cells + own > _CELLS:
            yield group
            group, cells = [], 0
        group.append(one)
        cells += own
    if group:
        yield group


def _normalisers(
    table: FloatArray, begins: Index, counts: Index, temperature: float, nulls: Sequence[float] | None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """``[contexts]`` each: the highest logit, and the sum of exp((logit - highest) / temperature) over all spans.

    ``nulls`` are the null logits where they compete. Where nothing does, the highest is 0 and the sum 1.
    """
    peaks = np.full(len(counts), -np.inf) if nulls is None else np.asarray(nulls, dtype=np.float64)
    some = np.flatnonzero(counts)
    cells = begins[some] * table.shape[1]
    if len(some):
        peaks[some] = np.maximum(peaks[some], np.maximum.reduceat(table.ravel(), cells))
    nothing = np.isneginf(peaks)
    peaks[nothing] = 0.0
    totals = nothing.astype(np.float64) if nulls is None else np.exp((np.asarray(nulls) - peaks) / temperature)
    if len(some):
        weights = np.subtract(table, np.repeat(peaks, counts)[:, None], dtype=np.float64)
        weights /= temperature
        np.exp(weights, out=weights)
        totals[some] += np.add.reduceat(weights.ravel(), cells)
    return peaks, totals


def _best_spans(
    table: FloatArray, context: EncodedText, top_k: int, align_to_words: bool
) -> list[tuple[tuple[int, int], int, int, float]]:
    """The ``top_k`` best spans of one context that differ in text: code points, first and last token, logit."""
    flat = table.ravel()
    spans: dict[tuple[int, int], tuple[tuple[int, int], int, int, float]] = {}
    ranked, want = 0, min(flat.size, 1 if top_k == 1 else max(2 * top_k, 16))
    while len(spans) < top_k and ranked < want:
        cells = _best_cells(flat, want)
        for cell in cells[ranked:]:
            first, extra = divmod(cell, table.shape[1])
            text = _text_span(context, first, first + extra, align_to_words)
            if text not in spans:
                spans[text] = (text, first, first + extra, float(flat[cell]))
                if len(spans) == top_k:
                    break
        if len(cells) < want:  # there are no more valid ones
            break
        ranked, want = want, min(flat.size, 4 * want)
    return list(spans.values())


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
    """Indices of the ``count`` largest finite values, best first, ties by position (earlier and shorter first)."""
    if count == 1:
        best = int(flat.argmax())
        return [best] if flat[best] > -np.inf else []
    if count < flat.size:
        threshold = np.partition(flat, flat.size - count)[flat.size - count]
        above = np.flatnonzero(flat > threshold)
        ties = np.flatnonzero(flat == threshold)[: count - len(above)]
        cells = np.concatenate((above, ties)) if threshold > -np.inf else above
    else:
        cells = np.flatnonzero(flat > -np.inf)
    return [int(c) for c in cells[np.lexsort((cells, -flat[cells]))]]


def _text_span(context: EncodedText, first: int, last: int, align_to_words: bool) -> tuple[int, int]:
    source = context.words if align_to_words else context.offsets
    return context.visible(int(source[first, 0]), int(source[last, 1]))
