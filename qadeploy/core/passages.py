"""One question on many passages: a context in parts, whose windows never cross from one part into the next.

The passages are tokenised one by one, so that each is cached like any other context, and their tokens are put one after the
other. To the decoder that is one long context in many windows. So whatever holds for the windows of a long context holds for
those of all passages: spans are ranked by the raw start + end logit (relative to the null logit of their window if the model
learned that), the scores are one softmax over all spans, and there is one null answer, whose logit is the lowest over all
windows, because one window with an answer is enough.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np

from qadeploy.core.bm25 import Ranking, rank_parts
from qadeploy.core.encoded_text import EncodedText
from qadeploy.core.windows import Encoder, Lengths
from qadeploy.errors import TooManyWindowsError
from qadeploy.records import BoolArray, IntArray, Window


class JoinedText(EncodedText):
    """Tokenised passages as one text, with nothing between them.

    Args:
        parts: The passages, none of them empty.
        numbers: The index of each part in the caller's list of passages.
    """

    def __init__(self, parts: Sequence[EncodedText], numbers: Sequence[int]) -> None:
        self.parts = tuple(parts)
        self.numbers = tuple(numbers)
        self.begins = _begins([len(part.text) for part in parts])
        self.token_begins = _begins([len(part) for part in parts])
        super().__init__(
            "".join(part.text for part in parts),
            np.concatenate([part.ids for part in parts]),
            np.concatenate([part.offsets + begin for part, begin in zip(parts, self.begins, strict=True)]),
            parts[0]._source,  # never used: everything derived from it comes from the parts
        )

    @property
    def tokens(self) -> list[str]:
        """The tokens as the vocabulary writes them."""
        return [token for part in self.parts for token in part.tokens]

    @cached_property
    def blank(self) -> BoolArray:
        """Whether a token covers no visible text, ``[tokens]``."""
        return np.concatenate([part.blank for part in self.parts])

    @cached_property
    def aligned(self) -> IntArray:
        """Start and end of the text that ``align_to_words`` widens each token to, ``[tokens, 2]``."""
        return np.concatenate([part.aligned + begin for part, begin in zip(self.parts, self.begins, strict=True)])

    def part_at(self, position: int) -> int:
        """The index in ``parts`` of the passage that contains a code point of the joined text."""
        return int(np.searchsorted(self.begins, position, side="right")) - 1

    def part_of(self, window: Window) -> int:
        """The index in ``parts`` of the passage that a window is cut from."""
        return int(np.searchsorted(self.token_begins, window.context_offset, side="right")) - 1


def _begins(sizes: Sequence[int]) -> IntArray:
    return np.cumsum([0, *sizes[:-1]], dtype=np.int64)


def passage_windows(
    encoder: Encoder,
    question: EncodedText,
    passages: JoinedText,
    lengths: Lengths,
    *,
    prefilter: int | None = None,
    max_windows: int | None = None,
) -> tuple[list[Window], Ranking | None]:
    """Makes the windows of one question over all passages, in order.

    Args:
        encoder: Cuts each passage as it cuts any context.
        question: The question.
        passages: The passages.
        lengths: The lengths of the windows of each passage.
        prefilter: Most windows to read of all passages together, the best by BM25; None reads all.
        max_windows: Most windows allowed for all passages together, None for no limit.

    Returns:
        The windows, whose ``context_offset`` counts the tokens of all passages, and the scores of all windows if ``prefilter``
        left some out.

    Raises:
        QuestionTooLongError, StrideError, InputError: As ``Encoder.windows`` does.
        TooManyWindowsError: There are more than ``max_windows``; none has been made.
    """
    cuts = [encoder.cut(question, part, **lengths) for part in passages.parts]
    owners = np.repeat(np.arange(len(cuts)), [len(cut.begins) for cut in cuts])
    begins, ends = (np.concatenate(each) for each in zip(*(cut.parts() for cut in cuts), strict=True))
    total = len(begins)
    ranking: Ranking | None = None
    if prefilter is not None and prefilter < total:
        shifts = passages.token_begins[owners]
        ranking = rank_parts(question.ids, passages.ids, begins + shifts, ends + shifts, prefilter)
        owners, begins = owners[ranking.chosen], begins[ranking.chosen]
    if max_windows is not None and len(begins) > max_windows:
        read = f"prefilter reads {len(begins)} of their {total} windows" if ranking else f"they make {total} windows"
        fix = (
            "lower prefilter" if ranking else "give fewer or shorter passages, or read only some windows with prefilter"
        )
        raise TooManyWindowsError(
            f"{len(cuts)} passages of {len(passages)} tokens: {read}, but at most {max_windows} are allowed: {fix}"
        )
    windows: list[Window] = []
    for i in np.unique(owners).tolist():
        made = encoder.make(question, passages.parts[i], cuts[i], begins[owners == i].tolist())
        shift = int(passages.token_begins[i])
        windows += [replace(window, context_offset=window.context_offset + shift) for window in made] if shift else made
    return windows, ranking
