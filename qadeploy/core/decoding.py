"""Logits to answer spans: the one decoder, used for evaluation and for serving.

A span is valid if it lies in the context, start <= end, it is at most ``max_answer_len`` tokens long, and neither
end is blank. Its logit is start + end, the best over the windows that contain it. Its score comes from ONE softmax
over every valid span of all windows (and the null answer if allowed) of logits divided by the model's temperature,
so scores are probabilities that do not depend on ``top_k`` and never sum to more than 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from qadeploy.core.encoded_text import EncodedText
from qadeploy.errors import InputError, LogitsError
from qadeploy.records import Answer, BoolArray, FloatArray, IntArray, Span, Window

DEFAULT_MAX_ANSWER_LEN = 30
_CELLS = 2**16  # spans in one block: 256 KB of logits and 512 KB of weights, which fit a core's cache
_Best = tuple[tuple[int, int], int, int, float]  # a span: its code points, first and last token, logit


@dataclass(frozen=True, slots=True)
class Decoded:
    """What the decoder found in one context.

    Attributes:
        spans: The best spans, best first, one per text.
        null_logit: Minimum over windows of the null position's start + end logit (Devlin et al. 2019, section 4.3, as
            in SQuAD v2 scripts).
        null_score: Probability of the null answer, 0 if it is not allowed.
    """

    spans: tuple[Span, ...]
    null_logit: float
    null_score: float

    @property
    def null_difference(self) -> float:
        """The null logit minus the best span's, to compare with the null threshold; +inf without a span."""
        return self.null_logit - self.spans[0].logit if self.spans else np.inf


@dataclass(frozen=True, slots=True, eq=False)
class WindowLogits:
    """The windows of one question over one context, with a model's logits.

    Attributes:
        windows: The windows.
        start_logits: The start logits of each window, float32 ``[tokens]`` or longer.
        end_logits: The end logits of each window, likewise.
        context: The context.
    """

    windows: Sequence[Window]
    start_logits: Sequence[FloatArray]
    end_logits: Sequence[FloatArray]
    context: EncodedText

    @property
    def null_logit(self) -> float:
        """Minimum over windows of the null position's start + end logit, because one window with an answer is enough."""
        pairs = zip(self.windows, self.start_logits, self.end_logits, strict=True)
        return min(float(s[w.null_index] + e[w.null_index]) for w, s, e in pairs)


def span_table(scored: WindowLogits, max_answer_len: int) -> FloatArray:
    """Computes the logits of all spans of a context.

    Args:
        scored: One question over one context, with logits.
        max_answer_len: Longest span, in tokens.

    Returns:
        ``[tokens, lengths]``: at ``[i, k]`` the logit of the span of k + 1 tokens that starts at token i, -inf if it is not
        valid.

    Raises:
        LogitsError: The logits are NaN or infinite.
        InputError: ``max_answer_len`` is below 1.
    """
    return _Table(scored, max_answer_len).rows(0, len(scored.context))


class _Table:
    """The span table of one context, made in blocks of rows, because the whole takes ``4 * lengths`` bytes per token."""

    def __init__(self, scored: WindowLogits, max_answer_len: int) -> None:
        if max_answer_len < 1:
            raise InputError(f"max_answer_len {max_answer_len} is below 1: it is the longest answer in tokens")
        for window, starts, ends in zip(scored.windows, scored.start_logits, scored.end_logits, strict=True):
            if not (np.isfinite(starts[: len(window)]).all() and np.isfinite(ends[: len(window)]).all()):
                raise LogitsError("the model returned NaN or infinite logits: its weights or precision are broken")
        self.lengths = min(max_answer_len, max((w.context_length for w in scored.windows), default=0) or 1)
        self._scored = scored
        self._begins = np.asarray([w.context_offset for w in scored.windows])
        self._ends = self._begins + [w.context_length for w in scored.windows]

    def blocks(self) -> Iterator[tuple[int, FloatArray]]:
        """Yields the first token and the rows of each block, in order; skips blocks that no window overlaps."""
        tokens, most = len(self._scored.context), max(1, _CELLS // self.lengths)
        for begin in range(0, tokens, most):
            end = min(begin + most, tokens)
            if ((self._begins < end) & (self._ends > begin)).any():
                yield begin, self.rows(begin, end)

    def rows(self, begin: int, end: int) -> FloatArray:
        """The rows of the tokens from ``begin`` to ``end``, ``[tokens, lengths]``."""
        blank = self._scored.context.blank
        table = np.full((end - begin, self.lengths), -np.inf, dtype=np.float32)
        for i in np.flatnonzero((self._begins < end) & (self._ends > begin)).tolist():
            window = self._scored.windows[i]
            first, last = max(begin, int(self._begins[i])), min(end, int(self._ends[i]))
            beyond = min(last + self.lengths - 1, int(self._ends[i]))  # where the last spans end
            shift = window.context_begin - window.context_offset
            starts = np.where(blank[first:last], -np.inf, self._scored.start_logits[i][first + shift : last + shift])
            ends = np.full(last - first + self.lengths - 1, -np.inf, dtype=np.float32)  # no span goes past the window
            ends[: beyond - first] = np.where(
                blank[first:beyond], -np.inf, self._scored.end_logits[i][first + shift : beyond + shift]
            )
            # Row i: the end logits of tokens i to i + lengths - 1.
            reach = np.ndarray((last - first, self.lengths), np.float32, ends, strides=2 * ends.strides)
            held = table[first - begin : last - begin]
            np.maximum(held, starts.astype(np.float32)[:, None] + reach, out=held)
        return table


def decode(
    scored: WindowLogits,
    *,
    top_k: int = 1,
    max_answer_len: int = DEFAULT_MAX_ANSWER_LEN,
    align_to_words: bool = False,
    allow_no_answer: bool = False,
    temperature: float = 1.0,
    most_overlap: float | None = None,
) -> Decoded:
    """Finds the best spans of a context, with their scores and the null answer's.

    Spans that cover the same text count as one, the best of them. Time is O(tokens x ``max_answer_len``); memory is
    bounded, however long the context is.

    Args:
        scored: One question over one context, with logits.
        top_k: Most spans to return.
        max_answer_len: Longest span, in tokens.
        align_to_words: Whether to widen spans to whole pre-tokenised words.
        allow_no_answer: Whether the null answer competes in the softmax.
        temperature: Divides the logits in the softmax; it changes scores, never ranks.
        most_overlap: Skips spans that share more than this fraction of the shorter text with a better span;
            None skips none. Scores do not change.

    Raises:
        LogitsError: The logits are NaN or infinite.
        InputError: ``top_k`` or ``max_answer_len`` is below 1.
    """
    if top_k < 1:
        raise InputError(f"top_k {top_k} is below 1: it is the number of answers to return")
    rule = _Rule(scored.context, top_k, align_to_words, most_overlap)
    table, null = _Table(scored, max_answer_len), scored.null_logit
    size = len(scored.context) * table.lengths
    short = list(table.blocks()) if size <= _CELLS else None  # a table of a single block is computed only once
    peak, total = (null, 1.0) if allow_no_answer else (-np.inf, 0.0)
    weighed = False

    def best_cells(count: int) -> list[tuple[int, float]]:
        nonlocal peak, total, weighed
        best: list[tuple[int, float]] = []
        for begin, rows in short or table.blocks():
            some = _best_cells(rows.ravel(), min(count, rows.size))
            if some and not weighed:
                # The sum so far is relative to its highest logit; rescale it when a higher one comes.
                higher = max(peak, some[0][1])
                weights = np.subtract(rows, higher, dtype=np.float64)
                weights /= temperature
                total = total * math.exp((peak - higher) / temperature) + float(np.exp(weights, out=weights).sum())
                peak = higher
            best += [(cell + begin * table.lengths, logit) for cell, logit in some]
            best = sorted(best, key=lambda c: (-c[1], c[0]))[:count]
        weighed = True
        return best

    spans: dict[tuple[int, int], _Best] = {}
    ranked, want = 0, min(size, 1 if top_k == 1 else max(2 * top_k, 16))
    while len(spans) < top_k and ranked < want:
        cells = best_cells(want)
        rule.choose([rule.best(cell, logit, table.lengths) for cell, logit in cells[ranked:]], spans)
        if len(cells) < want:  # there are no more valid spans
            break
        ranked, want = want, min(size, 4 * want)
    if peak == -np.inf:  # nothing can be an answer
        peak, total = 0.0, 1.0
    found = (
        Span(*text, first, last, logit, math.exp((logit - peak) / temperature) / total)
        for text, first, last, logit in spans.values()
    )
    null_score = math.exp((null - peak) / temperature) / total if allow_no_answer else 0.0
    return Decoded(tuple(found), null, null_score)


@dataclass(frozen=True, slots=True)
class _Rule:
    """Which spans of a context are returned; see ``decode``."""

    context: EncodedText
    top_k: int
    align_to_words: bool
    most_overlap: float | None

    def best(self, cell: int, logit: float, lengths: int) -> _Best:
        """The span of a cell of a table with this many lengths."""
        first, extra = divmod(cell, lengths)
        source = self.context.aligned if self.align_to_words else self.context.offsets
        text = self.context.visible(int(source[first, 0]), int(source[first + extra, 1]))
        return text, first, first + extra, logit

    def choose(self, ranked: Sequence[_Best], spans: dict[tuple[int, int], _Best]) -> None:
        """Adds the spans of ``ranked``, best first, to ``spans``, which holds those chosen so far by text."""
        if self.most_overlap is None:
            for each in ranked:
                if len(spans) == self.top_k:
                    return
                spans.setdefault(each[0], each)
            return
        places = np.asarray([text for text, *_ in ranked], dtype=np.int64).reshape(-1, 2)
        fits = np.ones(len(ranked), dtype=np.bool_)
        for text in spans:
            fits &= self._apart(places, text)
        while len(spans) < self.top_k and fits.any():
            best = ranked[int(fits.argmax())]
            spans[best[0]] = best
            fits &= self._apart(places, best[0])

    def _apart(self, places: IntArray, text: tuple[int, int]) -> BoolArray:
        """Whether each of ``places``, ``[spans, 2]``, differs from ``text`` and overlaps it by no more than is allowed."""
        start, end = text
        shared = np.minimum(places[:, 1], end) - np.maximum(places[:, 0], start)
        shorter = np.minimum(places[:, 1] - places[:, 0], end - start)
        same = (places[:, 0] == start) & (places[:, 1] == end)
        return np.asarray(~same & (shared <= (self.most_overlap or 0.0) * shorter))


def rank_answers(
    decoded: Decoded, context: str, *, top_k: int, allow_no_answer: bool = False, null_threshold: float | None = None
) -> list[Answer]:
    """Turns decoded spans and the null answer into answers, best first.

    The null answer comes before the first span whose logit it exceeds by more than the threshold: SQuAD v2's rule,
    ``null_score_diff_threshold`` of transformers' ``run_qa.py``. Scores stay probabilities, so a threshold can rank
    it above spans with higher scores.

    Args:
        decoded: Spans and null logit of one context.
        context: The context's text.
        top_k: Most answers to return.
        allow_no_answer: Whether the null answer is among them.
        null_threshold: The threshold; None counts as 0, which ranks by probability.
    """
    answers = [Answer(context[s.start : s.end], s.start, s.end, s.score) for s in decoded.spans]
    if allow_no_answer:
        threshold = null_threshold or 0.0
        before = sum(decoded.null_logit - s.logit <= threshold for s in decoded.spans)
        answers.insert(before, Answer("", 0, 0, decoded.null_score))
    return answers[:top_k]


def _best_cells(flat: FloatArray, count: int) -> list[tuple[int, float]]:
    """Returns index and value of the ``count`` largest finite values, best first; ties in order of position."""
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
