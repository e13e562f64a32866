"""Examples to training features: windows with token-aligned answer positions, in example order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qadeploy.core.settings import QaSettings
from qadeploy.core.windows import EncodedText, Encoder
from qadeploy.errors import DataError, QuestionTooLongError, StrideError
from qadeploy.records import Example, IntArray, Window

NO_LABEL = -100


@dataclass(frozen=True, slots=True, eq=False)
class Feature:
    """A window and its labels: ``positions`` is int64 ``[annotations, 2]``, inclusive token positions.

    Every annotated span that lies whole in the window is one row; a window that holds none has the
    single row (null_index, null_index).
    """

    window: Window
    positions: IntArray


@dataclass(frozen=True, slots=True)
class FeatureSet:
    """All features of a list of examples; ``first[i] : first[i + 1]`` are those of example ``i``."""

    examples: tuple[Example, ...]
    contexts: tuple[EncodedText, ...]
    features: tuple[Feature, ...]
    first: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, index: int) -> Feature:
        return self.features[index]

    @property
    def with_answer(self) -> int:
        """How many windows hold an annotated answer."""
        return sum(bool(f.positions[0, 0] != f.window.null_index) for f in self.features)


def make_features(
    examples: Sequence[Example], encoder: Encoder, settings: QaSettings, source: str, before: int = 0
) -> FeatureSet:
    """Windows and labels of all examples; each distinct context is tokenised once.

    Raises DataError naming every row whose question leaves no room for its context; ``before`` examples of the
    source come before the first of these.
    """
    texts = list(dict.fromkeys(e.context for e in examples))
    encoded = dict(zip(texts, encoder.encode_many(texts), strict=True))
    questions = encoder.encode_many([e.question for e in examples])
    features: list[Feature] = []
    first = [0]
    problems = []
    for number, (example, question) in enumerate(zip(examples, questions, strict=True), 1 + before):
        context = encoded[example.context]
        try:
            windows = encoder.windows(
                question, context, max_seq_len=settings.max_seq_len, doc_stride=settings.doc_stride
            )
        except (QuestionTooLongError, StrideError) as error:
            problems.append(f"{source}: question {number} (id {example.id}), field question: {error}")
            continue
        spans = [context.tokens_of(a.start, a.end) for a in example.answers]
        features += [Feature(w, label(w, [s for s in spans if s is not None])) for w in windows]
        first.append(len(features))
    if problems:
        raise DataError(problems)
    return FeatureSet(tuple(examples), tuple(encoded[e.context] for e in examples), tuple(features), tuple(first))


def label(window: Window, spans: Sequence[tuple[int, int]]) -> IntArray:
    """Positions in the window ``[spans inside, 2]`` of context token spans, or the null position alone."""
    shift = window.context_begin - window.context_offset
    end = window.context_offset + window.context_length
    inside = [(a + shift, b + shift) for a, b in spans if a >= window.context_offset and b < end]
    return np.asarray(inside or [(window.null_index, window.null_index)], dtype=np.int64)


def collate_labels(features: Sequence[Feature], length: int) -> dict[str, NDArray[Any]]:
    """``start_positions``/``end_positions`` ``[windows, annotations]`` (-100 fills) and ``answer_mask`` ``[windows, length]``.

    The mask is true on context tokens and the null position: where an answer may start or end.
    """
    most = max(len(f.positions) for f in features)
    positions = np.full((len(features), most, 2), NO_LABEL, dtype=np.int64)
    mask = np.zeros((len(features), length), dtype=bool)
    for row, feature in enumerate(features):
        window = feature.window
        positions[row, : len(feature.positions)] = feature.positions
        mask[row, window.context_begin : window.context_begin + window.context_length] = True
        mask[row, window.null_index] = True
    return {"start_positions": positions[..., 0], "end_positions": positions[..., 1], "answer_mask": mask}
