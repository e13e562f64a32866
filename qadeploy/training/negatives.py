"""Further questions made from the training data: negatives, and crops.

Negatives are questions on texts that do not answer them, so that a model learns to give no answer. Two kinds, both
labelled "no answer":

- the question on another passage that contains none of its answers: alternately the best by BM25 (Robertson and
  Zaragoza 2009) and the nearest in the data, which is usually from the same document;
- the question on its own passage without the sentences that contain its answer. None is made if the answer also occurs
  elsewhere in the passage, or if too little text is left.

Training normalises the windows of a question and of its negatives together (Clark and Gardner, "Simple and Effective
Multi-Paragraph Reading Comprehension", ACL 2018), so ``groups`` records which examples belong together.

Crops are questions on a part of their context, so that a model sees few texts in more than one form.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice, pairwise, zip_longest

from qadeploy.data.match import Slice, cuts_a_word
from qadeploy.errors import MissingExtraError
from qadeploy.records import Annotation, Example

LONGEST = 2_000  # code points of another passage; a longer one is cut
_SHORTEST = 30  # code points that must be left of a passage without its answer
_CANDIDATES = 16  # per negative; many contain the answer too
# A sentence ends at a full stop, question or exclamation mark, with any closing quotes and brackets, that no lower-case
# letter follows, or at a line break.
_SENTENCE_END = re.compile(r"(?:(?<=[.!?])[\"'”’)\]]*\s+(?![a-zß-ÿ])|(?<=[。！？])|\n+)")


@dataclass(frozen=True, slots=True)
class ExamplesWithNegatives:
    """Questions with their negatives.

    Attributes:
        examples: The questions as given, then the negatives.
        groups: ``[examples]``, the index of the question that each example belongs to; of a question, its own index.
        on_other_passages: How many negatives are on another passage.
        answer_removed: How many negatives are on the question's own passage without the answer.
    """

    examples: tuple[Example, ...]
    groups: tuple[int, ...]
    on_other_passages: int = 0
    answer_removed: int = 0


def with_negatives(examples: Sequence[Example], count: int, passages: Sequence[str] = ()) -> ExamplesWithNegatives:
    """Adds ``count`` negatives to each question that has an answer.

    Every second question (with a ``count`` above 1, every question) gets its own passage without the answer as a
    negative. The rest are on other passages, which also replace a negative that cannot be made.

    Args:
        examples: The questions. Those without an answer get no negatives.
        count: Negatives per question; 0 adds none.
        passages: Further passages to take negatives from.

    Returns:
        The questions and their negatives. If none could be made for a question, it stands alone.

    Raises:
        MissingExtraError: bm25s is not installed.
    """
    answered = [number for number, example in enumerate(examples) if example.answers]
    if not count or not answered:
        return ExamplesWithNegatives(tuple(examples), tuple(range(len(examples))))
    texts = list(dict.fromkeys((*(e.context for e in examples), *passages)))
    place = {text: number for number, text in enumerate(texts)}
    known = {(e.question, e.context) for e in examples}
    ranked = _ranked([examples[number].question for number in answered], texts, count * _CANDIDATES)
    made: list[Example] = []
    groups = list(range(len(examples)))
    counts = {"elsewhere": 0, "removed": 0}
    for turn, (number, order) in enumerate(zip(answered, ranked, strict=True)):
        example = examples[number]
        own: list[tuple[str, str]] = []
        if count > 1 or turn % 2:
            rest = without_answer(example)
            own += [("removed", rest)] if rest else []
        near = _nearest(place[example.context], len(texts))
        candidates = _in_turns(order, near) if turn % 4 < 2 else _in_turns(near, order)
        fresh = (texts[i] for i in candidates if (example.question, texts[i]) not in known)
        others = filter(None, (_excerpt(text, example) for text in fresh))
        own += [("elsewhere", text) for text in islice(others, count - len(own))]
        for which, (kind, text) in enumerate(own, 1):
            counts[kind] += 1
            made.append(replace(example, id=f"{example.id}#{kind}-{which}", context=text, answers=(), also=()))
            groups.append(number)
    return ExamplesWithNegatives((*examples, *made), tuple(groups), counts["elsewhere"], counts["removed"])


def without_answer(example: Example) -> str | None:
    """The context without the sentences that overlap an annotated answer; None if the rest is no negative."""
    spans = sentences(example.context)
    kept = [(a, b) for a, b in spans if not any(x.start < b and x.end > a for x in example.answers)]
    text = "".join(example.context[a:b] for a, b in kept).strip()
    return None if len(text) < _SHORTEST or holds_answer(example, text) else text


def sentences(text: str) -> list[tuple[int, int]]:
    """Start and end of each sentence, with the white space after it; together they are the whole text."""
    return list(pairwise([0, *(match.end() for match in _SENTENCE_END.finditer(text)), len(text)]))


def holds_answer(example: Example, text: str) -> bool:
    """Whether one of the answers occurs in ``text``, in any case, and not only as a part of a word or a number."""
    return any(
        not cuts_a_word(Slice(*found.span()), text)
        for a in example.answers
        for found in re.finditer(re.escape(a.text), text, re.IGNORECASE)
    )


def _nearest(place: int, count: int) -> list[int]:
    """The indices around ``place``, nearest first."""
    return [i for step in range(1, _CANDIDATES) for i in (place + step, place - step) if 0 <= i < count]


def _in_turns(first: Sequence[int], second: Sequence[int]) -> list[int]:
    """The items of both sequences in turns, without repeats."""
    pairs = zip_longest(first, second)
    return list(dict.fromkeys(i for pair in pairs for i in pair if i is not None))


def _excerpt(text: str, example: Example) -> str | None:
    """The first excerpt of a passage, cut at white space, that is not too long and contains no answer."""
    for begin in range(0, len(text), LONGEST):
        excerpt = text[begin : begin + LONGEST]
        if begin + LONGEST < len(text):
            excerpt = excerpt.rpartition(" ")[0] or excerpt
        excerpt = excerpt.strip()
        if len(excerpt) >= _SHORTEST and not holds_answer(example, excerpt):
            return excerpt
    return None


def _ranked(questions: Sequence[str], texts: Sequence[str], most: int) -> list[list[int]]:
    """For each question, the indices of the texts that share a word with it, best first by BM25."""
    try:
        import bm25s
    except ImportError as error:
        raise MissingExtraError("training with negatives", "bm25s", "train") from error
    words = bm25s.tokenize(list(texts), stopwords="en", show_progress=False)
    if not words.vocab:  # which bm25s cannot index: no text has a word of two letters
        return [[] for _ in questions]
    index = bm25s.BM25()
    index.index(words, show_progress=False)
    queries = bm25s.tokenize(list(questions), stopwords="en", show_progress=False)
    numbers, scores = index.retrieve(queries, k=min(most, len(texts)), show_progress=False)
    return [
        [int(i) for i, s in zip(row, values, strict=True) if s > 0] for row, values in zip(numbers, scores, strict=True)
    ]


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
