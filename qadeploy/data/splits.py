"""Splits by passage: all questions on one passage stay on one side."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

from qadeploy.errors import InputError
from qadeploy.records import Example


def carve_by_passage(
    examples: Sequence[Example], fraction: float, seed: int
) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """Draws whole passages at random until they hold a given fraction of the questions.

    A passage with which they would hold more than twice as many is left out. If too few are left for half of the fraction,
    the smallest of them is drawn too.

    Args:
        examples: The questions.
        fraction: Share of the questions to draw, between 0 and 1.
        seed: Decides which passages are drawn.

    Returns:
        The questions left and those drawn, both in input order and never empty.

    Raises:
        InputError: ``fraction`` is out of range, or all questions are on one passage.
    """
    if not 0 < fraction < 1:
        raise InputError(f"dev-fraction {fraction} is not between 0 and 1")
    passages = Counter(example.context for example in examples)
    if len(passages) < 2:
        raise InputError("all questions are on one passage, which cannot be split: add questions on other passages")
    order = list(passages)
    random.Random(seed).shuffle(order)  # noqa: S311 - a split, not a secret
    wanted, taken = fraction * len(examples), 0
    chosen: set[str] = set()
    for passage in order:
        if taken >= wanted or len(chosen) == len(order) - 1:
            break
        if taken + passages[passage] <= 2 * wanted:
            chosen.add(passage)
            taken += passages[passage]
    if 2 * taken < wanted and len(chosen) < len(order) - 1:
        chosen.add(min((p for p in order if p not in chosen), key=passages.__getitem__))
    rest = tuple(e for e in examples if e.context not in chosen)
    return rest, tuple(e for e in examples if e.context in chosen)


def folds_by_passage(examples: Sequence[Example], folds: int, seed: int) -> tuple[tuple[Example, ...], ...]:
    """Splits into folds of whole passages with about the same number of questions each.

    As in scikit-learn's GroupKFold, the passages with the most questions are assigned first, each to the smallest
    fold so far.

    Args:
        examples: The questions.
        folds: Number of folds, at least 2.
        seed: Decides the order of passages with the same number of questions.

    Returns:
        The questions of each fold, in input order.

    Raises:
        InputError: ``folds`` is below 2, or there are fewer passages than folds.
    """
    if folds < 2:
        raise InputError(f"folds is {folds}: at least 2 are needed, one to train on and one to score")
    passages = Counter(example.context for example in examples)
    if len(passages) < folds:
        raise InputError(
            f"{len(passages)} passages cannot be split into {folds} folds, since questions on one passage stay together: "
            "choose fewer folds, or add questions on other passages"
        )
    order = list(passages)
    random.Random(seed).shuffle(order)  # noqa: S311 - a split, not a secret
    sizes = [0] * folds
    place: dict[str, int] = {}
    for passage in sorted(order, key=lambda p: -passages[p]):
        place[passage] = sizes.index(min(sizes))
        sizes[place[passage]] += passages[passage]
    return tuple(tuple(e for e in examples if place[e.context] == fold) for fold in range(folds))
