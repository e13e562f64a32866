"""The values that the rooms of qadeploy exchange. All offsets count Unicode code points."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float32]
Float64Array = NDArray[np.float64]
BoolArray = NDArray[np.bool_]
Logits = tuple[FloatArray, FloatArray]  # start and end logits: [tokens] of one window, or [windows, tokens] of a batch
LOGIT_NAMES = ("start_logits", "end_logits")  # a model's outputs, as transformers and ONNX graphs name them


@dataclass(frozen=True, slots=True)
class Annotation:
    """One annotated answer: ``context[start:start + len(text)] == text``."""

    text: str
    start: int

    @property
    def end(self) -> int:
        """One past the last code point of the answer."""
        return self.start + len(self.text)


@dataclass(frozen=True, slots=True)
class Example:
    """One question on one context.

    Attributes:
        id: Unique in its data set.
        question: The question.
        context: The context.
        answers: The annotated answers, empty if the context holds none.
        split: ``"train"`` or ``"validation"`` if the data fixes it, else ``""``.
        also: Ids of further rows on the same question and context, whose answers are among ``answers``.
    """

    id: str
    question: str
    context: str
    answers: tuple[Annotation, ...] = ()
    split: str = ""
    also: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Window:
    """One model input: the question and a run of context tokens, with special tokens, unpadded.

    Attributes:
        input_ids: Int64 ``[tokens]``.
        token_type_ids: Int64 ``[tokens]``, or None if the model has no such input.
        context_begin: Position of the first context token in the window.
        context_length: Number of context tokens.
        context_offset: Index of the first context token in the whole context.
        null_index: Position whose logits mean "no answer in this window".
    """

    input_ids: IntArray
    token_type_ids: IntArray | None
    context_begin: int
    context_length: int
    context_offset: int
    null_index: int

    def __len__(self) -> int:
        return int(self.input_ids.shape[0])


@dataclass(frozen=True, slots=True)
class Span:
    """A candidate answer inside a context.

    Attributes:
        start: Index of its first code point.
        end: One past its last code point.
        start_token: Index of its first token in the whole context.
        end_token: Index of its last token, inclusive.
        logit: Sum of its start and end logits in its best window.
        score: Its probability: one softmax over all valid spans of all windows, at the model's temperature.
    """

    start: int
    end: int
    start_token: int
    end_token: int
    logit: float
    score: float


@dataclass(frozen=True, slots=True)
class Snippet:
    """The text around an answer: ``context[start:end] == text``, in the units of the answer."""

    text: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer: ``context[start:end] == text`` in code points, or in the units that were requested.

    The empty text with ``start == end == 0`` is the null answer ("not in this context").

    Attributes:
        text: The answer.
        start: Where it starts in its context or passage.
        end: Where it ends there, exclusive.
        score: A probability.
        passage: The index of its passage among the ``contexts`` of the question, from 0; None if the question had a single
            context, and for the null answer, which applies to all passages.
        snippet: The text around it, if that was requested; None for the null answer.
    """

    text: str
    start: int
    end: int
    score: float
    passage: int | None = None
    snippet: Snippet | None = None

    def to_dict(self) -> dict[str, Any]:
        """Returns the answer as plain JSON values, without ``passage`` and ``snippet`` if they are None."""
        return {name: value for name, value in asdict(self).items() if value is not None}


NO_ANSWER = Answer("", 0, 0, 0.0)  # returned if no span of the context can be an answer
