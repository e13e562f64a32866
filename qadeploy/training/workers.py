"""Windows made in several processes (``--preprocessing-num-workers``): the same features, chunk by chunk.

The tokenizer already uses every core for the texts, and what is left to do in Python costs a fraction of a millisecond a
window, so one process is the rule and the number is there for large data on many cores.

Workers are spawned, never forked: the parent has PyTorch's and the tokenizer's threads running by then, whose locks a
forked child would inherit. They send flat arrays, since a pickle of a hundred thousand small arrays takes longer than
making them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing import get_context
from typing import Any

import numpy as np

from qadeploy.core.settings import QaSettings
from qadeploy.core.windows import EncodedText, Encoder
from qadeploy.errors import DataError, FailureError
from qadeploy.records import Example, IntArray, Window
from qadeploy.training.features import Feature, FeatureSet, make_features

CHUNKS_A_WORKER = 4  # so that no worker is left alone with the long passages


def make_features_in(
    workers: int, examples: Sequence[Example], encoder: Encoder, settings: QaSettings, source: str
) -> FeatureSet:
    """What ``make_features`` returns and raises, made in ``workers`` processes; 1 is this one.

    Raises FailureError besides, where a worker is killed or cannot start.
    """
    if workers == 1 or len(examples) < 2:
        return make_features(examples, encoder, settings, source)
    bounds = np.linspace(0, len(examples), min(workers * CHUNKS_A_WORKER, len(examples)) + 1).astype(int)
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _start, (encoder, settings, source))
    try:
        with pool:
            chunks = [pool.submit(_make, examples[a:b], int(a)) for a, b in pairwise(bounds)]
            packed = [chunk.result() for chunk in chunks]
    except BrokenProcessPool as error:
        raise FailureError(
            "a process that makes windows ended by itself (out of memory, or the program that called train has no "
            'if __name__ == "__main__"): lower --preprocessing-num-workers'
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)
    problems = [problem for chunk in packed for problem in chunk.problems]
    if problems:
        raise DataError(problems)
    contexts: dict[str, EncodedText] = {}
    features: list[Feature] = []
    first = [0]
    for chunk in packed:
        for context in chunk.contexts:
            contexts.setdefault(context.text, context)
        first += [len(features) + n for n in chunk.first[1:]]
        features += _unpack(chunk)
    return FeatureSet(tuple(examples), tuple(contexts[e.context] for e in examples), tuple(features), tuple(first))


@dataclass(frozen=True, slots=True)
class _Chunk:
    """The features of a run of examples, as flat int64 arrays.

    ``tokens`` ``[ids (and types, where there are any), tokens of all windows]``, ``positions`` ``[annotations of all
    windows, 2]``, ``places`` ``[windows, 6]``: tokens, annotations, context_begin, context_length, context_offset, null_index.
    """

    tokens: IntArray
    positions: IntArray
    places: IntArray
    contexts: tuple[EncodedText, ...]
    first: tuple[int, ...]
    problems: tuple[str, ...] = ()


_given: dict[str, Any] = {}


def _start(encoder: Encoder, settings: QaSettings, source: str) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _given.update(encoder=encoder, settings=settings, source=source)


def _make(examples: Sequence[Example], before: int) -> _Chunk:
    none = np.zeros((0, 0), dtype=np.int64)
    try:
        made = make_features(examples, _given["encoder"], _given["settings"], _given["source"], before)
    except DataError as error:
        return _Chunk(none, none, none, (), (), error.problems)
    windows = [f.window for f in made.features]
    rows = [np.concatenate([w.input_ids for w in windows])]
    if windows[0].token_type_ids is not None:
        rows.append(np.concatenate([w.token_type_ids for w in windows if w.token_type_ids is not None]))
    places = [
        (len(w), len(f.positions), w.context_begin, w.context_length, w.context_offset, w.null_index)
        for f, w in zip(made.features, windows, strict=True)
    ]
    return _Chunk(
        np.stack(rows),
        np.concatenate([f.positions for f in made.features]),
        np.asarray(places, dtype=np.int64),
        tuple({id(c): c for c in made.contexts}.values()),
        made.first,
    )


def _unpack(chunk: _Chunk) -> list[Feature]:
    features = []
    token = row = 0
    for length, rows, *place in chunk.places.tolist():
        ids = chunk.tokens[0, token : token + length]
        types = chunk.tokens[1, token : token + length] if len(chunk.tokens) == 2 else None
        positions = chunk.positions[row : row + rows]
        features.append(Feature(Window(ids, types, *place), positions))
        token += length
        row += rows
    return features
