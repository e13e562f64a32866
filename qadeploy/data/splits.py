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
