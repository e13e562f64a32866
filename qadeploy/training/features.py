"""Examples to training features: windows with token-aligned answer positions, in example order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qadeploy.core.encoded_text import EncodedText
from qadeploy.core.settings import QaSettings
from qadeploy.core.unknown import unknown_share
from qadeploy.core.windows import Encoder
from qadeploy.errors import DataError, QuestionTooLongError
from qadeploy.records import Example, IntArray, Window

NO_LABEL = -100
_WINDOW_FIELDS = ("context_begin", "context_length", "context_offset", "null_index")
Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True, slots=True, eq=False)
class Feature:
    """A window and its labels.

    Attributes:
        window: The window.
        positions: int64 ``[annotations, 2]``, inclusive token positions of each annotated span that lies whole in the
            window. A window without such a span has the single row (null_index, null_index).
    """

    window: Window
    positions: IntArray


@dataclass(frozen=True, slots=True)
class FeatureSet:
    """The features of a list of examples.

    Attributes:
        examples: The questions.
        contexts: ``[examples]``, their contexts.
        features: All windows, in the order of the examples.
        first: ``first[i] : first[i + 1]`` are the features of example ``i``.
    """

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
    """Makes the windows and labels of all examples; each distinct context is tokenised once.

    Args:
        examples: The questions.
        encoder: Cuts the windows.
        settings: Gives the length and overlap of windows.
        source: Where the examples come from, for messages.
        before: How many examples of the source precede these.

    Raises:
        DataError: Questions leave no room for their context; every such row is named.
        StrideError: ``doc_stride`` is at least ``max_seq_len``, and a context needs several windows.
    """
    pairs = encoder.encode_pairs([(e.question, e.context) for e in examples])
    features: list[Feature] = []
    first = [0]
    problems = []
    for number, (example, (question, context)) in enumerate(zip(examples, pairs, strict=True), 1 + before):
        try:
            windows = encoder.windows(question, context, **settings.lengths)
        except QuestionTooLongError as error:
            problems.append(f"{source}: question {number} (id {example.id}), field question: {error}")
            continue
        spans = [context.tokens_of(a.start, a.end) for a in example.answers]
        features += [Feature(w, label(w, [s for s in spans if s is not None])) for w in windows]
        first.append(len(features))
    if problems:
        raise DataError(problems)
    return FeatureSet(tuple(examples), tuple(context for _, context in pairs), tuple(features), tuple(first))


def label(window: Window, spans: Sequence[tuple[int, int]]) -> IntArray:
    """The positions, ``[spans inside, 2]``, of context token spans inside the window, or the null position alone."""
    shift = window.context_begin - window.context_offset
    end = window.context_offset + window.context_length
    inside = [(a + shift, b + shift) for a, b in spans if a >= window.context_offset and b < end]
    return np.asarray(inside or [(window.null_index, window.null_index)], dtype=np.int64)


def collate_labels(features: Sequence[Feature], length: int) -> dict[str, NDArray[Any]]:
    """The labels of a batch.

    Args:
        features: The windows.
        length: The tokens that windows are padded to.

    Returns:
        ``start_positions`` and ``end_positions``, ``[windows, annotations]``, padded with -100, and ``answer_mask``,
        ``[windows, length]``, true on context tokens and the null position: where an answer may start or end.
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


def unknown_tokens(sets: Sequence[FeatureSet], encoder: Encoder) -> float:
    """Counts the unknown tokens of the contexts, which include the answers, and of the questions, each text once.

    Args:
        sets: Windows and labels.
        encoder: The encoder that cut the windows.

    Returns:
        Their share of all tokens, from 0 to 1.
    """
    contexts = {context.text: context.ids for features in sets for context in features.contexts}
    questions = {
        example.question: _question_ids(features[features.first[number]].window, encoder)
        for features in sets
        for number, example in enumerate(features.examples)
    }
    return unknown_share([*contexts.values(), *questions.values()], encoder.unknown_id)


def _question_ids(window: Window, encoder: Encoder) -> IntArray:
    """The ids of the window's question."""
    rest = np.delete(window.input_ids, slice(window.context_begin, window.context_begin + window.context_length))
    frame = encoder.frame
    begin = len(frame.before) + (len(frame.between) if encoder.config.context_first else 0)
    return rest[begin : begin + len(rest) - encoder.special_tokens]


# ---------------------------------------------------------------- flat arrays


def pack_features(features: Sequence[Feature]) -> Arrays:
    """Features as a few flat arrays: small on disk, and quick to send to another process.

    Rows ``window_borders[i] : window_borders[i + 1]`` of the ids are those of window ``i``; labels likewise.
    """
    windows = [f.window for f in features]
    return {
        "window_borders": borders(windows),
        "window_ids": flat([w.input_ids for w in windows]),
        "window_types": flat([w.token_type_ids for w in windows if w.token_type_ids is not None]),
        "window_fields": np.asarray([[getattr(w, f) for f in _WINDOW_FIELDS] for w in windows]),
        "label_borders": borders([f.positions for f in features]),
        "labels": flat([f.positions for f in features], 2),
    }


def unpack_features(arrays: Arrays) -> list[Feature]:
    """The features of arrays that ``pack_features`` made."""
    ids, types, labels = (arrays[name].astype(np.int64) for name in ("window_ids", "window_types", "labels"))
    return [
        Feature(Window(ids[a:b], types[a:b] if len(types) else None, *fields), labels[c:d])
        for (a, b), (c, d), fields in zip(
            pairwise(arrays["window_borders"].tolist()),
            pairwise(arrays["label_borders"].tolist()),
            arrays["window_fields"].tolist(),
            strict=True,
        )
    ]


def borders(items: Sequence[Any]) -> NDArray[Any]:
    """The row at which each item begins when all are concatenated, and the row at which the last ends."""
    return np.cumsum([0, *(len(item) for item in items)])


def flat(items: Sequence[IntArray], *width: int) -> NDArray[Any]:
    """The rows of all items in one array, in the smallest type that holds them."""
    rows = np.concatenate([np.zeros((0, *width), dtype=np.int64), *items])
    return rows.astype(np.min_scalar_type(int(rows.max(initial=0))))
