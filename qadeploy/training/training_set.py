"""What the trainer is fed: windows with their labels, which of them belong to one question, and what a teacher says of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qadeploy.core.windows import pad_batch
from qadeploy.records import FloatArray, IntArray
from qadeploy.training.features import Feature, FeatureSet, collate_labels


@dataclass(frozen=True, slots=True, eq=False)
class SoftLabels:
    """A teacher's distributions over the start and the end positions of one window, where they are not negligible.

    Attributes:
        starts: ``[k]`` token positions in the window.
        start_shares: ``[k]`` probabilities that sum to 1.
        ends: ``[m]`` token positions.
        end_shares: ``[m]`` probabilities that sum to 1.
    """

    starts: IntArray
    start_shares: FloatArray
    ends: IntArray
    end_shares: FloatArray


@dataclass(frozen=True, slots=True, eq=False)
class Item:
    """A window to train on.

    Attributes:
        feature: The window and its labels.
        group: The number of the question that it belongs to.
        labelled: Whether the labels are an annotator's, not only a teacher's.
        soft: What a teacher says, None without one.
    """

    feature: Feature
    group: int
    labelled: bool = True
    soft: SoftLabels | None = None


@dataclass(frozen=True, slots=True)
class TrainingSet:
    """The windows of training questions, with their negatives and those that a teacher alone labels.

    Attributes:
        features: Windows and labels.
        groups: ``[examples]``, the question's number of each; ``()`` where every example is a question of its own.
        unlabelled: How many of the last examples have no annotated labels.
        soft: ``[windows]``, what a teacher says of each, ``()`` without a teacher.
    """

    features: FeatureSet
    groups: Sequence[int] = ()
    unlabelled: int = 0
    soft: Sequence[SoftLabels] = ()
    _items: list[Item] = field(default_factory=list)

    def __post_init__(self) -> None:
        first, labelled = self.features.first, len(self.features.examples) - self.unlabelled
        for number in range(len(self.features.examples)):
            group = self.groups[number] if self.groups else number
            for i in range(first[number], first[number + 1]):
                soft = self.soft[i] if self.soft else None
                self._items.append(Item(self.features.features[i], group, number < labelled, soft))

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Item:
        return self._items[index]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each window."""
        return [len(item.feature.window) for item in self._items]

    @property
    def units(self) -> list[list[int]]:
        """The windows that must share a batch: those of one question and of its negatives."""
        found: dict[int, list[int]] = {}
        for index, item in enumerate(self._items):
            found.setdefault(item.group, []).append(index)
        return list(found.values())


def collate(items: Sequence[Feature | Item], pad_token_id: int) -> dict[str, NDArray[Any]]:
    """A batch, padded to its longest window.

    Args:
        items: Windows to evaluate (features) or to train on (items).
        pad_token_id: What fills ``input_ids``.

    Returns:
        The model's inputs, ``collate_labels``'s arrays, and of items ``null_positions``, ``groups`` and ``labelled`` ``[windows]``, and
        ``soft_starts`` and ``soft_ends`` ``[windows, tokens]`` where a teacher taught them.
    """
    features = [item.feature if isinstance(item, Item) else item for item in items]
    batch: dict[str, NDArray[Any]] = dict(pad_batch([f.window for f in features], pad_token_id))
    length = batch["input_ids"].shape[1]
    batch.update(collate_labels(features, length))
    own = [item for item in items if isinstance(item, Item)]
    if not own:
        return batch
    batch["null_positions"] = np.asarray([f.window.null_index for f in features])
    batch["groups"] = np.asarray([item.group for item in own])
    batch["labelled"] = np.asarray([item.labelled for item in own])
    if own[0].soft is not None:
        starts, ends = np.zeros((2, len(own), length), dtype=np.float32)
        for row, item in enumerate(own):
            if item.soft is not None:
                starts[row, item.soft.starts] = item.soft.start_shares
                ends[row, item.soft.ends] = item.soft.end_shares
        batch["soft_starts"], batch["soft_ends"] = starts, ends
    return batch
