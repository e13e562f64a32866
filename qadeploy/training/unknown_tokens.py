"""The share of the data that is unknown to the tokenizer, counted on existing windows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qadeploy.core.unknown import unknown_share
from qadeploy.core.windows import Encoder
from qadeploy.records import IntArray, Window
from qadeploy.training.features import FeatureSet


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
        example.question: _question(features[features.first[number]].window, encoder)
        for features in sets
        for number, example in enumerate(features.examples)
    }
    return unknown_share([*contexts.values(), *questions.values()], encoder.unknown_id)


def _question(window: Window, encoder: Encoder) -> IntArray:
    """The ids of the window's question."""
    rest = np.delete(window.input_ids, slice(window.context_begin, window.context_begin + window.context_length))
    frame = encoder.frame
    begin = len(frame.before) + (len(frame.between) if encoder.config.context_first else 0)
    return rest[begin : begin + len(rest) - encoder.special_tokens]
