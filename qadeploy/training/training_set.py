"""The Trainer's input: windows with their labels, their questions, and a teacher's labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from qadeploy.core.encoded_text import EncodedText
from qadeploy.core.windows import pad_batch
from qadeploy.data.match import Slice, cuts_a_word, occurrences
from qadeploy.records import Example, FloatArray, IntArray, Window
from qadeploy.training.features import Feature, FeatureSet, collate_labels


@dataclass(frozen=True, slots=True, eq=False)
class SoftLabels:
    """A teacher's distributions over the start and the end positions of one window, without negligible ones.

    Attributes:
        starts: ``[k]`` token positions in the window.
        start_probabilities: ``[k]`` probabilities that sum to 1.
        ends: ``[m]`` token positions.
        end_probabilities: ``[m]`` probabilities that sum to 1.
    """

    starts: IntArray
    start_probabilities: FloatArray
    ends: IntArray
    end_probabilities: FloatArray


@dataclass(frozen=True, slots=True, eq=False)
class TrainingWindow:
    """A window to train on.

    Attributes:
        feature: The window and its labels.
        group: The number of the question that it belongs to.
        labelled: Whether the labels come from an annotator; if not, only the teacher's are used.
        soft: The teacher's labels, or None without a teacher.
    """

    feature: Feature
    group: int
    labelled: bool = True
    soft: SoftLabels | None = None


@dataclass(frozen=True, slots=True)
class TrainingSet:
    """The windows of training questions, of their negatives, and of questions that only a teacher labels.

    Attributes:
        features: Windows and labels.
        groups: ``[examples]``, the index of each example's question; ``()`` if every example is a question of its own.
        unlabelled: How many of the last examples have no annotated labels.
        soft: ``[windows]``, the teacher's labels, ``()`` without a teacher.
        masked: Indices of windows whose labels may be wrong: only a teacher labels them; without one they are left out.
    """

    features: FeatureSet
    groups: Sequence[int] = ()
    unlabelled: int = 0
    soft: Sequence[SoftLabels] = ()
    masked: frozenset[int] = frozenset()
    _items: list[TrainingWindow] = field(default_factory=list)

    def __post_init__(self) -> None:
        first, labelled = self.features.first, len(self.features.examples) - self.unlabelled
        for number in range(len(self.features.examples)):
            group = self.groups[number] if self.groups else number
            for i in range(first[number], first[number + 1]):
                if i in self.masked and not self.soft:
                    continue
                soft = self.soft[i] if self.soft else None
                annotated = number < labelled and i not in self.masked
                self._items.append(TrainingWindow(self.features.features[i], group, annotated, soft))

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> TrainingWindow:
        return self._items[index]

    @property
    def lengths(self) -> list[int]:
        """The number of tokens of each window."""
        return [len(item.feature.window) for item in self._items]

    @property
    def units(self) -> list[list[int]]:
        """The windows that share a batch: those of a question and of its negatives."""
        found: dict[int, list[int]] = {}
        for index, item in enumerate(self._items):
            found.setdefault(item.group, []).append(index)
        return list(found.values())

    @property
    def answered(self) -> frozenset[int]:
        """The indices of the windows with an answer."""
        features = enumerate(item.feature for item in self._items)
        return frozenset(i for i, f in features if f.positions[0, 0] != f.window.null_index)


def masked_windows(features: FeatureSet) -> frozenset[int]:
    """Finds the windows whose label "no answer" may be wrong.

    Such a window contains no annotated span, but an answer's text that is not annotated: as whole words, in the same
    letter case, overlapping no annotation.

    Args:
        features: Windows and labels.

    Returns:
        The indices of these windows in ``features``.
    """
    found: list[int] = []
    for number, (example, context) in enumerate(zip(features.examples, features.contexts, strict=True)):
        windows = range(features.first[number], features.first[number + 1])
        without = [i for i in windows if features[i].positions[0, 0] == features[i].window.null_index]
        if without and len(context) and len(places := _unannotated(example)):
            found += [i for i in without if _holds(features[i].window, context, places)]
    return frozenset(found)


def _unannotated(example: Example) -> IntArray:
    """Starts and ends, ``[places, 2]``, of whole-word occurrences of the answers that overlap no annotation."""
    context, texts = example.context, {a.text.strip() for a in example.answers}
    places = [Slice(at, at + len(text)) for text in texts for at in occurrences(text, context)]
    free = [p for p in places if all(p.end <= a.start or a.end <= p.start for a in example.answers)]
    whole = [(p.start, p.end) for p in free if not cuts_a_word(p, context)]
    return np.asarray(whole, dtype=np.int64).reshape(-1, 2)


def _holds(window: Window, context: EncodedText, places: IntArray) -> bool:
    """Whether one of the places, ``[places, 2]``, lies in the window's part of the context."""
    last = window.context_offset + window.context_length - 1
    start, end = context.offsets[window.context_offset, 0], context.offsets[last, 1]
    return bool(((places[:, 0] >= start) & (places[:, 1] <= end)).any())


def collate(items: Sequence[Feature | TrainingWindow], pad_token_id: int) -> dict[str, torch.Tensor]:
    """A batch, padded to its longest window.

    Args:
        items: Windows to evaluate (``Feature``) or to train on (``TrainingWindow``).
        pad_token_id: Pads ``input_ids``.

    Returns:
        The model's inputs and the arrays of ``collate_labels``. For windows to train on also ``null_positions``, ``groups`` and
        ``labelled``, ``[windows]``, and with a teacher ``soft_starts`` and ``soft_ends``, ``[windows, tokens]``.
    """
    features = [item.feature if isinstance(item, TrainingWindow) else item for item in items]
    batch: dict[str, NDArray[Any]] = dict(pad_batch([f.window for f in features], pad_token_id))
    length = batch["input_ids"].shape[1]
    batch.update(collate_labels(features, length))
    own = [item for item in items if isinstance(item, TrainingWindow)]
    if own:
        batch["null_positions"] = np.asarray([f.window.null_index for f in features])
        batch["groups"] = np.asarray([item.group for item in own])
        batch["labelled"] = np.asarray([item.labelled for item in own])
    if own and own[0].soft is not None:
        starts, ends = np.zeros((2, len(own), length), dtype=np.float32)
        for row, item in enumerate(own):
            if item.soft is not None:
                starts[row, item.soft.starts] = item.soft.start_probabilities
                ends[row, item.soft.ends] = item.soft.end_probabilities
        batch["soft_starts"], batch["soft_ends"] = starts, ends
    return {name: torch.from_numpy(values) for name, values in batch.items()}
