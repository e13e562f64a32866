"""The steps of an answer in readable form: encoding, forward pass, span selection."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice, pairwise
from typing import Any

import numpy as np

from qadeploy.core.bm25 import Ranking
from qadeploy.core.settings import Options
from qadeploy.inference.answerer import Answerer
from qadeploy.inference.pairs import DecodedPair, to_answers
from qadeploy.records import IntArray, Window

_TOP = 5
_SHOWN_WINDOWS = 4
_SHOWN_TOKENS = 48


def candidates(reading: DecodedPair, options: Options) -> Iterator[dict[str, Any]]:
    """The strongest pairs of start and end tokens in all windows, valid or not, best first, as plain JSON values.

    ``window`` is the number of the window, from 1, among those that were read, and ``tokens`` are the first and the last position
    in it. ``text`` is empty if the span is not valid. ``answer`` is its rank among the answers, from 1, or None if it is not one,
    and ``verdict`` says why.
    """
    pairs: list[tuple[float, int, int, int]] = []
    for number, (window, (starts, ends)) in enumerate(zip(reading.windows, reading.logits, strict=True)):
        size = len(window)
        pairs += [
            (float(starts[s] + ends[e]), number, int(s), int(e))
            for s in np.argsort(-starts[:size])[:_TOP]
            for e in np.argsort(-ends[:size])[:_TOP]
        ]
    pairs.sort(key=lambda p: -p[0])
    plain = replace(options, snippet=None, offsets="codepoints")
    joined = reading.passages
    begins: dict[int | None, int] = dict(zip(joined.numbers, joined.begins.tolist(), strict=True)) if joined else {}
    answers: dict[tuple[int, int], tuple[int, float]] = {}
    for rank, answer in enumerate(to_answers(reading, plain), 1):
        begin = begins.get(answer.passage, 0)
        answers[answer.start + begin, answer.end + begin] = (rank, answer.score)
    seen: set[tuple[int, int]] = set()
    for logit, number, start, end in pairs[: 4 * _TOP]:
        window, text, place = reading.windows[number], "", None
        verdict = _fault(reading, window, start, end)
        if not verdict:
            first, last = _span(reading, window, start, end, options)
            text = reading.context.text[first:last]
            if (first, last) in seen:
                verdict = "the same text as a better span, from another window or other tokens"
            else:
                seen.add((first, last))
                verdict = "valid, but not among the answers"
                if (first, last) in answers:
                    place, score = answers[first, last]
                    verdict = f"answer {place}, score {score:.4f}"
        yield {
            "window": number + 1,
            "tokens": [start, end],
            "logit": logit,
            "text": text,
            "answer": place,
            "verdict": verdict,
        }


def _span(reading: DecodedPair, window: Window, start: int, end: int, options: Options) -> tuple[int, int]:
    shift = window.context_offset - window.context_begin
    offsets = reading.context.aligned if options.align_to_words else reading.context.offsets
    return reading.context.visible(int(offsets[start + shift, 0]), int(offsets[end + shift, 1]))


def _fault(reading: DecodedPair, window: Window, start: int, end: int) -> str:
    """Why a candidate is not a valid span; empty if it is one."""
    inside = range(window.context_begin, window.context_begin + window.context_length)
    if start == end == window.null_index:
        return "the null position: no answer in this window"
    if start not in inside or end not in inside:
        return "lies outside the context (in the question or a special token)"
    if end < start:
        return "ends before it starts"
    if end - start + 1 > reading.settings.max_answer_len:
        return f"is {end - start + 1} tokens long, max_answer_len is {reading.settings.max_answer_len}"
    shift = window.context_offset - window.context_begin
    if reading.context.blank[start + shift] or reading.context.blank[end + shift]:
        return "starts or ends with white space"
    return ""


def _origin(reading: DecodedPair, window: Window) -> tuple[int, int, int | None]:
    """The first token and code point of a window's context or passage, and the passage's index (None for a context)."""
    joined = reading.passages
    if joined is None:
        return 0, 0, None
    part = joined.part_of(window)
    return int(joined.token_begins[part]), int(joined.begins[part]), joined.numbers[part]


def trace_lines(answerer: Answerer, reading: DecodedPair, options: Options) -> Iterator[str]:
    """The trace as lines of text."""
    encoder, settings = answerer.encoder, reading.settings
    yield "1 INPUT ENCODING"
    joined = reading.passages
    longest = max(map(len, reading.windows))
    shared = [a.context_offset + a.context_length - b.context_offset for a, b in pairwise(reading.windows)]
    overlap = max([0, *shared])
    passages = f"{len(joined.parts)} passages" if joined else "context"
    yield (
        f"  question {len(reading.question)} tokens, {passages} {len(reading.context)} tokens, "
        f"{len(reading.windows)} window{'s' if len(reading.windows) > 1 else ''} of at most {longest} tokens, overlap {overlap}"
    )
    if reading.ranking is not None:
        yield _prefilter_line(reading.ranking)
    for number, window in enumerate(reading.windows[:_SHOWN_WINDOWS], 1):
        begin, _, where = _origin(reading, window)
        first, held = window.context_offset - begin, "context" if where is None else f"passage {where}"
        yield f"  window {number}: {len(window)} tokens, {held} tokens {first}-{first + window.context_length - 1}"
        shown = min(len(window), _SHOWN_TOKENS)
        types = window.token_type_ids
        yield f"    {'position':>8} {'token':<16} {'id':>6} {'mask':>4} {'segment':>7}"
        for position in range(shown if number == 1 else min(shown, 6)):
            token = encoder.token_text(int(window.input_ids[position]))
            segment = "-" if types is None else str(int(types[position]))
            yield f"    {position:>8} {token:<16} {int(window.input_ids[position]):>6} {1:>4} {segment:>7}"
        if len(window) > shown or number > 1:
            yield "         ..."
    if len(reading.windows) > _SHOWN_WINDOWS:
        yield f"  ... and {len(reading.windows) - _SHOWN_WINDOWS} more windows"
    yield ""
    yield "2 FORWARD PASS"
    for number, (window, (starts, ends)) in enumerate(zip(reading.windows, reading.logits, strict=True), 1):
        if number > _SHOWN_WINDOWS:
            yield f"  ... and {len(reading.windows) - _SHOWN_WINDOWS} more windows"
            break
        size = len(window)
        yield f"  window {number}: input_ids [1, {size}] -> start_logits [1, {size}], end_logits [1, {size}]"
        for name, logits in (("start", starts), ("end", ends)):
            best = np.argsort(-logits[:size])[:_TOP]
            tops = ", ".join(f"{p}:{encoder.token_text(int(window.input_ids[p]))} {logits[p]:+.2f}" for p in best)
            yield f"    top {name:<5} {tops}"
    yield ""
    yield f"3 SPAN SELECTION (best valid start <= end, at most {settings.max_answer_len} tokens, over all windows)"
    yield f"  {'window':>6} {'tokens':>9} {'logit':>8}  verdict"
    for c in islice(candidates(reading, options), 2 * _TOP + 2):
        text = f' "{c["text"]}"' if c["text"] else ""
        tokens = "-".join(map(str, c["tokens"]))
        yield f"  {c['window']:>6} {tokens:>9} {c['logit']:>+8.2f} {text} {c['verdict']}"
    threshold = settings.null_threshold or 0.0
    yield (
        f"  null logit {reading.decoded.null_logit:+.2f} (the minimum over windows): if the null answer is allowed, it wins "
        f"when this exceeds the logit of the best span by more than {threshold:.2f}"
    )
    yield f"  scores: one softmax over all valid spans at temperature {settings.temperature:.3f}"


def _prefilter_line(ranking: Ranking) -> str:
    read = ranking.chosen.tolist()
    shown = ", ".join(f"{n + 1} ({ranking.scores[n]:.2f})" for n in read[:_SHOWN_WINDOWS])
    more = ", ..." if len(read) > _SHOWN_WINDOWS else ""
    out = np.delete(ranking.scores, read).max()
    none = "" if ranking.scores.any() else "; no token of the question occurs in the context, so these are the first"
    return (
        f"  prefilter: of {len(ranking.scores)} windows the {len(read)} best by BM25 are read, {shown}{more}; "
        f"{len(ranking.scores) - len(read)} are left out, the best of them with score {out:.2f}{none}"
    )


def trace_dict(answerer: Answerer, reading: DecodedPair, options: Options) -> dict[str, Any]:
    """The trace as plain JSON values: windows with ids, tokens, offsets and logits, and candidates with verdicts.

    ``offsets`` are code points of the context or passage, null for special tokens and those of the question. ``context_begin``
    is the position of the first context token in a window, ``context_offset`` its index in the whole context or passage.
    ``prefilter`` is null if all windows were read; otherwise it has the numbers (from 1) of those read, and all scores.
    """

    def held(window: Window) -> IntArray:
        return reading.context.offsets[window.context_offset : window.context_offset + window.context_length]

    return {
        "settings": reading.settings.to_dict(),
        "question_tokens": reading.question.tokens,
        "context_tokens": len(reading.context),
        "prefilter": reading.ranking
        and {
            "read": [n + 1 for n in reading.ranking.chosen.tolist()],
            "scores": [round(score, 4) for score in reading.ranking.scores.tolist()],
        },
        "windows": [
            {
                "tokens": len(window),
                **({} if passage is None else {"passage": passage}),
                "context_begin": window.context_begin,
                "context_offset": window.context_offset - first_token,
                "context_length": window.context_length,
                "input_ids": window.input_ids.tolist(),
                "pieces": [answerer.encoder.token_text(number) for number in window.input_ids.tolist()],
                "offsets": [
                    *[None] * window.context_begin,
                    *(held(window) - first_character).tolist(),
                    *[None] * (len(window) - window.context_begin - window.context_length),
                ],
                "token_type_ids": None if window.token_type_ids is None else window.token_type_ids.tolist(),
                "start_logits": [round(float(x), 4) for x in starts],
                "end_logits": [round(float(x), 4) for x in ends],
            }
            for window, (starts, ends) in zip(reading.windows, reading.logits, strict=True)
            for first_token, first_character, passage in [_origin(reading, window)]
        ],
        "candidates": list(candidates(reading, options)),
        "null_logit": reading.decoded.null_logit,
    }
