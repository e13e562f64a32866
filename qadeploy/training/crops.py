"""Crops: questions on a part of their context, so that a model sees few texts in more than one form."""

from __future__ import annotations

import random
from collections.abc import Sequence

from qadeploy.records import Annotation, Example
from qadeploy.training.negatives import sentences


def crops_of(examples: Sequence[Example], count: int, seed: int) -> tuple[Example, ...]:
    """Makes ``count`` copies of each question, each on a random run of sentences that holds all of its answers.

    A copy is left out if its run is the whole context, and if the question has no answer.

    Args:
        examples: The questions.
        count: Copies per question; 0 makes none.
        seed: Of the random runs.
    """
    generator = random.Random(seed)  # noqa: S311 - parts of a text, not a secret
    made: list[Example] = []
    for example in examples if count else ():
        if not example.answers:
            continue
        first, last = min(a.start for a in example.answers), max(a.end for a in example.answers)
        found = sentences(example.context)
        starts = [start for start, _ in found if start <= first]
        ends = [end for _, end in found if end >= last]
        for number in range(1, count + 1):
            start, end = generator.choice(starts), generator.choice(ends)
            if end - start < len(example.context):
                answers = tuple(Annotation(a.text, a.start - start) for a in example.answers)
                made.append(
                    Example(f"{example.id}#crop-{number}", example.question, example.context[start:end], answers)
                )
    return tuple(made)
