"""The values that pass between the floors of qadeploy. All offsets count Unicode code points."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float32]


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
    """One question on one context. No ``answers`` means that the context holds no answer.

    ``split`` is ``"train"`` or ``"validation"`` where the data fixes it, else ``""``. ``also`` holds the
    ids of further rows on the same question and context, whose answers are among ``answers``.
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

    ``input_ids`` and ``token_type_ids`` are int64 ``[tokens]``; ``token_type_ids`` is None where the
    model takes none. The context tokens stand at positions ``context_begin : context_begin +
    context_length`` and are tokens ``context_offset : context_offset + context_length`` of the whole
    context. ``null_index`` is the position that stands for "no answer in this window".
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

    ``start_token``/``end_token`` are inclusive token indices into the whole context, ``start``/``end``
    code points (end exclusive), ``logit`` the sum of its start and end logits in its best window,
    ``score`` its probability (one softmax over all valid spans of all windows, at the model's temperature).
    """

    start: int
    end: int
    start_token: int
    end_token: int
    logit: float
    score: float


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer: ``context[start:end] == text`` in code points; ``score`` is a probability.

    The empty text with ``start == end == 0`` is the null answer ("not in this context").
    """

    text: str
    start: int
    end: int
    score: float

    def to_dict(self) -> dict[str, Any]:
        """The answer as plain JSON values."""
        return asdict(self)
