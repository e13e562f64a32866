"""Logits to answer spans: the one decoder, used for evaluation and for serving.

A span is valid where it lies in the context, start <= end, it is at most ``max_answer_len`` tokens
long, and neither end is blank. Its logit is start + end, the best over the windows that hold it.
Its score is ONE softmax over every valid span of all windows (and the null answer where allowed) of
logits divided by the model's temperature, so scores are probabilities that do not depend on ``top_k``
and never sum to more than 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from qadeploy.core.windows import EncodedText
from qadeploy.errors import InputError, LogitsError
from qadeploy.records import Answer, FloatArray, Span, Window

DEFAULT_MAX_ANSWER_LEN = 30
_CELLS = 2**16  # of spans in one table: 256 KB of logits and 512 KB of weights, which a core's cache holds
Index = NDArray[np.intp]
_Best = tuple[tuple[int, int], int, int, float]  # a span: its code points, first and last token, logit


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
    windows = [w for one in scored for w in one.windows]
    starts = _joined(windows, [logits for one in scored for logits in one.start_logits])
    ends = _joined(windows, [logits for one in scored for logits in one.end_logits])
    _check_finite(starts, ends)
    longest, lengths = _sizes(windows, max_answer_len)
    table = np.full((sum(len(one.context) for one in scored), lengths), -np.inf, dtype=np.float32)
    reach = _Reach(longest, lengths)
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
            reach.add(own, last, table[base + window.context_offset : base + window.context_offset + size])
            place += len(window)
        base += len(one.context)
    return table


def _sizes(windows: Sequence[Window], max_answer_len: int) -> tuple[int, int]:
    """The context tokens of the longest window, and the lengths that a span may have. Raises InputError."""
    if max_answer_len < 1:
        raise InputError(f"max_answer_len {max_answer_len} is below 1: it is the longest answer in tokens")
    longest = max((w.context_length for w in windows), default=0)
    return longest, min(max_answer_len, longest or 1)


def _check_finite(starts: FloatArray, ends: FloatArray) -> None:
    if not (np.isfinite(starts).all() and np.isfinite(ends).all()):
        raise LogitsError("the model returned NaN or infinite logits: its weights or precision are broken")


class _Reach:
    """What the tokens of a window reach: the room for it is taken once, for windows of up to ``longest`` tokens."""

    def __init__(self, longest: int, lengths: int) -> None:
        # The ends of one window, then so many that no span goes past its last token; and row i of ``_reach`` is
        # what token i reaches: ends i to i + lengths - 1.
        self._padded = np.empty(longest + lengths - 1, dtype=np.float32)
        self._reach = np.ndarray((longest, lengths), np.float32, self._padded, strides=2 * self._padded.strides)

    def add(self, starts: FloatArray, ends: FloatArray, rows: FloatArray) -> None:
        """Raises ``rows`` ``[tokens, lengths]`` of a table to the logits of the spans that start at these tokens.

        ``ends`` are those of the same tokens, and may go on, to the last token that a span reaches.
        """
        size = len(starts)
        self._padded[: len(ends)] = ends
        self._padded[len(ends) : size + rows.shape[1] - 1] = -np.inf
        np.maximum(rows, starts[:, None] + self._reach[:size], out=rows)


class _Rows:
    """The span table of one long context, a block of rows at a time: whole it would be ``4 * lengths`` bytes a token."""

    def __init__(self, scored: Scored, max_answer_len: int) -> None:
        self.longest, self.lengths = _sizes(scored.windows, max_answer_len)
        for window, starts, ends in zip(scored.windows, scored.start_logits, scored.end_logits, strict=True):
            _check_finite(starts[: len(window)], ends[: len(window)])
        self._scored = scored
        self._begins = np.asarray([w.context_offset for w in scored.windows])
        self._ends = self._begins + [w.context_length for w in scored.windows]

    def blocks(self) -> Iterator[tuple[int, FloatArray]]:
        """First token and table of each block, in order, without the tokens that no window holds."""
        reach = _Reach(self.longest + self.lengths - 1, self.lengths)
        most = max(1, _CELLS // self.lengths)
        for first, last in _covered(self._begins, self._ends):
            for begin in range(first, last, most):
                yield begin, self._block(begin, min(begin + most, last), reach)

    def _block(self, begin: int, end: int, reach: _Reach) -> FloatArray:
        blank = self._scored.context.blank
        table = np.full((end - begin, self.lengths), -np.inf, dtype=np.float32)
        for i in np.flatnonzero((self._begins < end) & (self._ends > begin)).tolist():
            window = self._scored.windows[i]
            first, last = max(begin, int(self._begins[i])), min(end, int(self._ends[i]))
            beyond = min(last + self.lengths - 1, int(self._ends[i]))  # where the last of them reaches to
            shift = window.context_begin - window.context_offset
            starts = np.where(blank[first:last], -np.inf, self._scored.start_logits[i][first + shift : last + shift])
            ends = np.where(blank[first:beyond], -np.inf, self._scored.end_logits[i][first + shift : beyond + shift])
            reach.add(starts.astype(np.float32), ends.astype(np.float32), table[first - begin : last - begin])
        return table


def _covered(begins: Index, ends: Index) -> Iterator[tuple[int, int]]:
    """The runs of tokens that any window holds, in order."""
    run: tuple[int, int] | None = None
    for i in np.argsort(begins, kind="stable"):
        begin, end = int(begins[i]), int(ends[i])
        if run is not None and begin <= run[1]:
            run = (run[0], max(run[1], end))
            continue
        if run is not None:
            yield run
        run = (begin, end)
    if run is not None:
        yield run


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
    are fewer. ``temperature`` divides the logits in the softmax: it moves scores, never ranks. Time is
    O(tokens x ``max_answer_len``), memory bounded, however many and long the contexts are. Raises
    LogitsError and InputError like ``span_table``, InputError on ``top_k`` below 1.
    """
    if top_k < 1:
        raise InputError(f"top_k {top_k} is below 1: it is the number of answers to return")
    found: list[Decoded] = []
    for group in _groups(scored, max_answer_len):
        if len(group) == 1 and _cells(group[0], max_answer_len) > _CELLS:
            one = group[0]
            null = least_null_logit(one.windows, one.start_logits, one.end_logits)
            competing = null if allow_no_answer else None
            found.append(_decode_long(one, null, competing, top_k, max_answer_len, align_to_words, temperature))
            continue
        table = _table(group, max_answer_len)
        counts = np.asarray([len(one.context) for one in group])
        begins = np.cumsum(counts) - counts
        nulls = [least_null_logit(one.windows, one.start_logits, one.end_logits) for one in group]
        peaks, totals = _normalisers(table, begins, counts, temperature, nulls if allow_no_answer else None)
        for i, one in enumerate(group):
            part = table[begins[i] : begins[i] + counts[i]]
            peak, total = float(peaks[i]), float(totals[i])
            cells = partial(_best_cells, part.ravel())
            best = _best_spans(cells, part.size, table.shape[1], one.context, top_k, align_to_words)
            found.append(_scores(best, nulls[i], allow_no_answer, peak, total, temperature))
    return found


def _scores(
    best: Sequence[_Best], null: float, allow_no_answer: bool, peak: float, total: float, temperature: float
) -> Decoded:
    spans = [
        Span(*text, first, last, logit, math.exp((logit - peak) / temperature) / total)
        for text, first, last, logit in best
    ]
    return Decoded(tuple(spans), null, math.exp((null - peak) / temperature) / total if allow_no_answer else 0.0)


def _decode_long(
    one: Scored,
    null: float,
    competing: float | None,
    top_k: int,
    max_answer_len: int,
    align_to_words: bool,
    temperature: float,
) -> Decoded:
    """``decode_many`` for a context whose table is not made whole; ``competing`` is the null logit where it is allowed."""
    rows = _Rows(one, max_answer_len)
    peak, total = (-np.inf, 0.0) if competing is None else (competing, 1.0)
    weighed = False

    def cells(count: int) -> list[tuple[int, float]]:
        nonlocal peak, total, weighed
        best: list[tuple[int, float]] = []
        for begin, table in rows.blocks():
            some = _best_cells(table.ravel(), min(count, table.size))
            if some and not weighed:
                # The sum so far counts in units of its own highest logit; where a higher one comes, in that one's.
                higher = max(peak, some[0][1])
                weights = np.subtract(table, higher, dtype=np.float64)
                weights /= temperature
                total = total * math.exp((peak - higher) / temperature) + float(np.exp(weights, out=weights).sum())
                peak = higher
            shift = begin * rows.lengths
            best += [(cell + shift, logit) for cell, logit in some]
            best = sorted(best, key=lambda c: (-c[1], c[0]))[:count]
        weighed = True
        return best

    best = _best_spans(cells, len(one.context) * rows.lengths, rows.lengths, one.context, top_k, align_to_words)
    if peak == -np.inf:  # nothing can be an answer
        peak, total = 0.0, 1.0
    return _scores(best, null, competing is not None, peak, total, temperature)


def _cells(one: Scored, max_answer_len: int) -> int:
    return sum(w.context_length for w in one.windows) * max_answer_len


def _groups(scored: Sequence[Scored], max_answer_len: int) -> Iterator[list[Scored]]:
    """Neighbours whose table together stays below ``_CELLS``, one at least."""
    group: list[Scored] = []
    cells = 0
    for one in scored:
        own = _cells(one, max_answer_len)
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
    best_cells: Callable[[int], list[tuple[int, float]]],
    size: int,
    lengths: int,
    context: EncodedText,
    top_k: int,
    align_to_words: bool,
) -> list[_Best]:
    """The ``top_k`` best spans of one context that differ in text.

    ``best_cells`` gives that many cells of its table of ``size``, as ``_best_cells`` does.
    """
    spans: dict[tuple[int, int], _Best] = {}
    ranked, want = 0, min(size, 1 if top_k == 1 else max(2 * top_k, 16))
    while len(spans) < top_k and ranked < want:
        cells = best_cells(want)
        for cell, logit in cells[ranked:]:
            first, extra = divmod(cell, lengths)
            text = _text_span(context, first, first + extra, align_to_words)
            if text not in spans:
                spans[text] = (text, first, first + extra, logit)
                if len(spans) == top_k:
                    break
        if len(cells) < want:  # there are no more valid ones
            break
        ranked, want = want, min(size, 4 * want)
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


def _best_cells(flat: FloatArray, count: int) -> list[tuple[int, float]]:
    """Index and value of the ``count`` largest finite values, best first, ties by position (earlier and shorter first)."""
    if count == 1:
        best = int(flat.argmax())
        return [(best, float(flat[best]))] if flat[best] > -np.inf else []
    if count < flat.size:
        threshold = np.partition(flat, flat.size - count)[flat.size - count]
        above = np.flatnonzero(flat > threshold)
        ties = np.flatnonzero(flat == threshold)[: count - len(above)]
        cells = np.concatenate((above, ties)) if threshold > -np.inf else above
    else:
        cells = np.flatnonzero(flat > -np.inf)
    return [(int(c), float(flat[c])) for c in cells[np.lexsort((cells, -flat[cells]))]]


def _text_span(context: EncodedText, first: int, last: int, align_to_words: bool) -> tuple[int, int]:
    source = context.words if align_to_words else context.offsets
    return context.visible(int(source[first, 0]), int(source[last, 1]))
