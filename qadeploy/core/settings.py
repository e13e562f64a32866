"""The settings that turn a model's logits into answers, stored beside its weights, and the options of one call."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, TypedDict, get_args

import numpy as np

from qadeploy import options
from qadeploy.core.bm25 import relevance
from qadeploy.core.decoding import DEFAULT_MAX_ANSWER_LEN, Decoded, WindowLogits, decode
from qadeploy.core.encoded_text import EncodedText
from qadeploy.core.metrics import Metric
from qadeploy.core.windows import DEFAULT_DOC_STRIDE, DEFAULT_MAX_SEQ_LEN, Lengths
from qadeploy.errors import InputError
from qadeploy.options import check, option
from qadeploy.records import Example, FloatArray, Window

SnippetSize = int | Literal["sentence"] | None
Offsets = Literal["codepoints", "utf16", "utf8"]


@dataclass(frozen=True, slots=True)
class QaSettings:
    """How windows are cut, spans are ranked and answers are scored.

    Attributes:
        max_seq_len: Longest window, in tokens.
        doc_stride: Overlap of neighbouring windows, in tokens.
        max_answer_len: Longest answer, in tokens.
        null_threshold: "No answer" wins, if allowed, when its logit exceeds the best span's by more than this. None
            for a model trained on answerable questions alone; it then counts as 0.
        temperature: Divides the logits before the softmax that makes scores (Guo et al. 2017).
        relative_to_null: Whether spans are ranked by their logit minus the null logit of their window. These odds
            compare across windows if the model learned to recognise windows without an answer.
        metric: How EM and F1 compare texts (see ``core/metrics.py``), when the model is chosen and when bundles are judged.
        bm25_weight: If a context has several windows, each window's BM25 score (see ``core/bm25.py``) minus the best
            window's, times this weight, is added to the logits of its spans. The model scores each window as if there were
            no others; this makes windows that share words with the question win.
        long_seq_len: Longest window, in tokens, of a context that does not fit in one window of ``max_seq_len``; None
            keeps ``max_seq_len``. The overlap shrinks in proportion.
    """

    max_seq_len: int = DEFAULT_MAX_SEQ_LEN
    doc_stride: int = DEFAULT_DOC_STRIDE
    max_answer_len: int = DEFAULT_MAX_ANSWER_LEN
    null_threshold: float | None = None
    temperature: float = 1.0
    relative_to_null: bool = False
    metric: Metric = "squad"
    bm25_weight: float = 0.0
    long_seq_len: int | None = None

    def window_logits(
        self,
        windows: Sequence[Window],
        start_logits: Sequence[FloatArray],
        end_logits: Sequence[FloatArray],
        context: EncodedText,
    ) -> WindowLogits:
        """Prepares a model's logits for the decoder, with the shifts that these settings ask for.

        Args:
            windows: The windows of one question over one context.
            start_logits: The start logits of each window, float32 ``[tokens]`` or longer.
            end_logits: The end logits of each window, likewise.
            context: The context.
        """
        if self.relative_to_null:
            start_logits, end_logits = (
                [x - x[w.null_index] for w, x in zip(windows, logits, strict=True)]
                for logits in (start_logits, end_logits)
            )
        if self.bm25_weight and len(windows) > 1:
            shifts = (self.bm25_weight / 2 * relevance(windows, context)).astype(np.float32)
            start_logits, end_logits = (
                [_shifted(x, w, shift) for w, x, shift in zip(windows, logits, shifts, strict=True)]
                for logits in (start_logits, end_logits)
            )
        return WindowLogits(windows, start_logits, end_logits, context)

    def decode(self, scored: WindowLogits, *, allow_no_answer: bool, top_k: int = 1) -> Decoded:
        """Calls ``decoding.decode`` with the longest answer and the temperature of these settings.

        Args:
            scored: The windows of a question with their logits.
            allow_no_answer: Whether the null answer competes.
            top_k: Most spans.
        """
        return decode(
            scored,
            top_k=top_k,
            max_answer_len=self.max_answer_len,
            allow_no_answer=allow_no_answer,
            temperature=self.temperature,
        )

    @property
    def lengths(self) -> Lengths:
        """The arguments of ``Encoder.windows`` and ``Encoder.cut`` that say how long windows are, in tokens."""
        return {"max_seq_len": self.max_seq_len, "doc_stride": self.doc_stride, "long_seq_len": self.long_seq_len}

    def to_dict(self) -> dict[str, Any]:
        """Returns the settings as plain JSON values."""
        return asdict(self)

    def changed(
        self, *, max_seq_len: int | None = None, doc_stride: int | None = None, max_answer_len: int | None = None
    ) -> QaSettings:
        """Returns a copy of these settings with the values that are not None.

        If only ``max_seq_len`` is given, ``doc_stride`` shrinks to at most a third of it. ``max_seq_len`` unsets ``long_seq_len``.

        Raises:
            InputError: A value below 1, or a ``doc_stride`` below 0.
        """
        if max_seq_len is not None and doc_stride is None:
            doc_stride = min(self.doc_stride, max_seq_len // 3)
        chosen = {"max_seq_len": max_seq_len, "doc_stride": doc_stride, "max_answer_len": max_answer_len}
        stored = self if max_seq_len is None else replace(self, long_seq_len=None)
        return self.from_dict({**stored.to_dict(), **{k: v for k, v in chosen.items() if v is not None}}, "option")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str) -> QaSettings:
        """Reads stored settings. Unknown keys are ignored; missing keys and nulls get their defaults.

        Args:
            values: What ``to_dict`` returned.
            where: Where they were stored, for messages.

        Raises:
            InputError: A value is wrong.
        """
        found = {name: values[name] for name in cls.__slots__ if values.get(name) is not None}
        for name, value in found.items():
            if name == "relative_to_null":
                fits, needed = isinstance(value, bool), "true or false"
            elif name == "metric":
                fits, needed = value in get_args(Metric), " or ".join(get_args(Metric))
            elif name in {"null_threshold", "temperature", "bm25_weight"}:
                fits, needed = _is_number(value), "a number"
                if name == "bm25_weight":
                    fits, needed = fits and value >= 0, "a number of at least 0"
                if name == "temperature":
                    fits, needed = fits and value > 0, "a number above 0"
                found[name] = float(value) if fits else value
            else:
                whole = isinstance(value, int) and not isinstance(value, bool)
                least = int(name != "doc_stride")
                fits, needed = whole and value >= least, f"a whole number of at least {least}"
            if not fits:
                raise InputError(f"{where}: {name} must be {needed}, not {value!r}")
        return cls(**found)


class AnswerOptions(TypedDict, total=False):
    """The keyword arguments of every method that answers; the defaults are those of ``Options``.

    Attributes:
        top_k: The number of answers, best first.
        max_answer_len: The longest answer in tokens.
        max_seq_len: The longest window in tokens.
        doc_stride: The overlap of neighbouring windows in tokens.
        align_to_words: Whether answers are widened to whole words.
        allow_no_answer: Whether "no answer" (the empty text) competes.
        prefilter: The largest number of windows to read per question, the best by BM25.
        distinct: Whether answers that overlap a better one are left out.
        overlap_threshold: With ``distinct``, the share of the shorter answer that may be common to both.
        min_score: The lowest score of an answer.
        snippet: "sentence", or the number of code points on each side of an answer to return with it.
        offsets: The unit of ``start`` and ``end``: "codepoints", "utf16" or "utf8".
    """

    top_k: int
    max_answer_len: int | None
    max_seq_len: int | None
    doc_stride: int | None
    align_to_words: bool
    allow_no_answer: bool | None
    prefilter: int | None
    distinct: bool
    overlap_threshold: float
    min_score: float
    snippet: SnippetSize
    offsets: Offsets


@dataclass(frozen=True, slots=True)
class Options:
    """The options of one call. Lengths are in tokens. None means the value stored in the bundle.

    With ``prefilter``, answers, scores and the null answer come from the windows that were read and no others.
    """

    top_k: int = option(1, "Number of answers, best first; there may be fewer.", least=1)
    max_answer_len: int | None = option(None, "Longest answer in tokens.", least=1, shown="the bundle's")
    max_seq_len: int | None = option(None, "Longest window in tokens.", least=1, shown="the bundle's")
    doc_stride: int | None = option(None, "Overlap of neighbouring windows in tokens.", least=0, shown="the bundle's")
    align_to_words: bool = option(False, "Widen answers to whole words.")
    allow_no_answer: bool | None = option(
        None,
        "Whether 'no answer' (the empty text at 0) competes, by the bundle's null threshold.",
        off="--always-answer",
        shown="if the model was trained to say so",
    )
    prefilter: int | None = options.prefilter()
    distinct: bool = option(False, "Leave out answers that overlap a better one.")
    overlap_threshold: float = option(
        0.0,
        "With distinct, the share of the shorter answer's characters that two answers may have in common.",
        least=0,
        most=1,
    )
    min_score: float = options.min_score()
    snippet: SnippetSize = options.snippet()
    offsets: Offsets = options.offsets()

    def settings(self, stored: QaSettings) -> QaSettings:
        """The stored settings with the values of this call. Raises InputError on a value out of range."""
        check(self)
        return stored.changed(
            max_seq_len=self.max_seq_len, doc_stride=self.doc_stride, max_answer_len=self.max_answer_len
        )

    @property
    def most_overlap(self) -> float | None:
        """The overlap that ``distinct`` allows, None if any is allowed."""
        return self.overlap_threshold if self.distinct else None

    def null_competes(self, stored: QaSettings) -> bool:
        """Whether "no answer" competes: as requested or, by default, if the model was trained for it (has a null threshold)."""
        return stored.null_threshold is not None if self.allow_no_answer is None else self.allow_no_answer


def _shifted(logits: FloatArray, window: Window, shift: np.float32) -> FloatArray:
    """A copy of the logits with ``shift`` added to those of the context. The null logit stays."""
    moved = np.array(logits, dtype=np.float32)
    moved[window.context_begin : window.context_begin + window.context_length] += shift
    return moved


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def any_unanswerable(examples: Iterable[Example]) -> bool:
    """Whether "no answer" competes when examples are scored: if any of them has no answer.

    This is the one rule for training, gates and evaluation. If all have answers, as in SQuAD v1.1, every question gets one.
    """
    return any(not e.answers for e in examples)
