"""Splits by passage: two questions on one passage never stand on both sides."""

from __future__ import annotations

import random
from collections.abc import Sequence

from qadeploy.errors import InputError
from qadeploy.records import Example


def carve_by_passage(
    examples: Sequence[Example], fraction: float, seed: int
) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """Splits into (rest, part): whole passages, drawn by ``seed``, until the part holds ``fraction`` of the questions.

    Both sides keep the input order and are never empty. Raises InputError on a fraction outside
    (0, 1) or where all questions share one passage.
    """
    if not 0 < fraction < 1:
        raise InputError(f"dev-fraction {fraction} is not between 0 and 1")
    passages: dict[str, int] = {}
    for example in examples:
        passages[example.context] = passages.get(example.context, 0) + 1
    if len(passages) < 2:
        raise InputError(
            "all questions are on one passage, so no held-out part can be carved from it: "
            "add questions on other passages"
        )
    order = list(passages)
    random.Random(seed).shuffle(order)  # noqa: S311 - a split, not a secret
    wanted, taken, chosen = fraction * len(examples), 0, set()
    for passage in order[:-1]:
        chosen.add(passage)
        taken += passages[passage]
        if taken >= wanted:
            break
    rest = tuple(e for e in examples if e.context not in chosen)
    return rest, tuple(e for e in examples if e.context in chosen)


def folds_by_passage(examples: Sequence[Example], folds: int, seed: int) -> tuple[tuple[Example, ...], ...]:
    """Splits into ``folds`` parts of whole passages with about as many questions each, in input order.

    The passages with the most questions are dealt first, each to the smallest part so far (as scikit-learn's
    GroupKFold does); those of equal size in an order drawn by ``seed``. Raises InputError on
    ``folds`` below 2 or fewer passages than ``folds``.
    """
    if folds < 2:
        raise InputError(f"folds is {folds}: at least 2 are needed, one to train on and one to score")
    passages: dict[str, int] = {}
    for example in examples:
        passages[example.context] = passages.get(example.context, 0) + 1
    if len(passages) < folds:
        raise InputError(
            f"{len(passages)} passages cannot be split into {folds} folds, since questions on one passage stay together: "
            "ask for fewer folds, or add questions on other passages"
        )
    order = list(passages)
    random.Random(seed).shuffle(order)  # noqa: S311 - a split, not a secret
    sizes = [0] * folds
    place: dict[str, int] = {}
    for passage in sorted(order, key=lambda p: -passages[p]):
        place[passage] = sizes.index(min(sizes))
        sizes[place[passage]] += passages[passage]
    return tuple(tuple(e for e in examples if place[e.context] == fold) for fold in range(folds))
