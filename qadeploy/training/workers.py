"""Makes windows in several processes (``--preprocessing-num-workers``), chunk by chunk, with the same result as in one.

The tokenizer already uses every core, and the rest takes a fraction of a millisecond per window in Python. So one process is
the default; more pay off on large data and many cores.

Workers are spawned, never forked: a forked child would inherit the locks of PyTorch's and the tokenizer's threads. They send
flat arrays, since pickling a hundred thousand small arrays takes longer than making them.
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

from qadeploy.core.encoded_text import EncodedText
from qadeploy.core.settings import QaSettings
from qadeploy.core.windows import Encoder
from qadeploy.errors import DataError, FailureError
from qadeploy.records import Example
from qadeploy.training.features import Arrays, Feature, FeatureSet, make_features, pack_features, unpack_features

_CHUNKS_PER_WORKER = 4  # so that no worker is left alone with the long passages


def make_features_in(
    workers: int, examples: Sequence[Example], encoder: Encoder, settings: QaSettings, source: str
) -> FeatureSet:
    """Like ``make_features``, but in ``workers`` processes; with 1, in this process.

    Raises:
        DataError: As in ``make_features``.
        FailureError: A worker was killed or cannot start.
    """
    if workers == 1 or len(examples) < 2:
        return make_features(examples, encoder, settings, source)
    bounds = np.linspace(0, len(examples), min(workers * _CHUNKS_PER_WORKER, len(examples)) + 1).astype(int)
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _start, (encoder, settings, source))
    try:
        with pool:
            chunks = [pool.submit(_make, examples[a:b], int(a)) for a, b in pairwise(bounds)]
            packed = [chunk.result() for chunk in chunks]
    except BrokenProcessPool as error:
        raise FailureError(
            "a process that makes windows ended unexpectedly (out of memory, or the program that called train has no "
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
        features += unpack_features(chunk.arrays)
    return FeatureSet(tuple(examples), tuple(contexts[e.context] for e in examples), tuple(features), tuple(first))


@dataclass(frozen=True, slots=True)
class _Chunk:
    """The features of consecutive examples, packed by ``pack_features``, and their contexts, or why there are none."""

    arrays: Arrays
    contexts: tuple[EncodedText, ...] = ()
    first: tuple[int, ...] = ()
    problems: tuple[str, ...] = ()


_given: dict[str, Any] = {}


def _start(encoder: Encoder, settings: QaSettings, source: str) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes already run in parallel
    _given.update(encoder=encoder, settings=settings, source=source)


def _make(examples: Sequence[Example], before: int) -> _Chunk:
    try:
        made = make_features(examples, _given["encoder"], _given["settings"], _given["source"], before)
    except DataError as error:
        return _Chunk({}, problems=error.problems)
    return _Chunk(pack_features(made.features), tuple({id(c): c for c in made.contexts}.values()), made.first)
