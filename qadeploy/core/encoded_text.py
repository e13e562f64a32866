"""A text tokenised once: its tokens, their offsets, and the words they belong to."""

from __future__ import annotations

import sys
from functools import cache, cached_property

import numpy as np
from tokenizers import Encoding, Tokenizer

from qadeploy.core.scripts import within_script
from qadeploy.records import BoolArray, IntArray

_LAST_SPACE = 0x3000  # the highest white space code point
# ids 8, offsets 16, blank 1, aligned 16; an Encoding of tokenizers 0.22 takes about 100 a token (measured).
_TOKEN_BYTES = 141


class EncodedText:
    """A text tokenised once, without special tokens: immutable, and shared by threads and questions.

    Args:
        text: The text.
        ids: Token ids, int64 ``[tokens]``.
        offsets: Start and end of each token in code points, int64 ``[tokens, 2]``.
        source: The encoding that ids and offsets come from or, if these were restored, the tokenizer, which then encodes
            the text only when more is needed.
    """

    def __init__(self, text: str, ids: IntArray, offsets: IntArray, source: Encoding | Tokenizer) -> None:
        self.text = text
        self.ids = ids
        self.offsets = offsets
        self._source = source

    def __len__(self) -> int:
        return int(self.ids.shape[0])

    @cached_property
    def _encoding(self) -> Encoding:
        if isinstance(self._source, Tokenizer):
            return self._source.encode(self.text, add_special_tokens=False)
        return self._source

    @property
    def tokens(self) -> list[str]:
        """The tokens as the vocabulary writes them."""
        return list(self._encoding.tokens)

    @property
    def nbytes(self) -> int:
        """Upper bound of the memory used, in bytes: the text, its arrays (not ``visible_before``), and the encoding."""
        return sys.getsizeof(self.text) + len(self) * _TOKEN_BYTES

    @cached_property
    def visible_before(self) -> IntArray:
        """Number of non-space code points before each position, ``[code points + 1]``."""
        return count_before(visible_flags(self.text))

    @cached_property
    def blank(self) -> BoolArray:
        """Whether a token covers no visible text, so that no span may start or end on it, ``[tokens]``."""
        # Not cached: it is the largest array, and serving needs it once.
        visible_before = count_before(visible_flags(self.text))
        return np.asarray(visible_before[self.offsets[:, 1]] <= visible_before[self.offsets[:, 0]])

    @cached_property
    def aligned(self) -> IntArray:
        """Start and end of the text that ``align_to_words`` widens each token to, in code points, ``[tokens, 2]``."""
        return within_script(self.text, self.offsets, self.words)

    @property
    def words(self) -> IntArray:
        """Start and end of the whole (pre-tokenised) word around each token in code points, ``[tokens, 2]``."""
        words = self.offsets.copy()
        ids = np.asarray([-1 if w is None else w for w in self._encoding.word_ids], dtype=np.int64)
        if not len(ids):
            return words
        first = np.flatnonzero(np.concatenate(([True], (ids[1:] != ids[:-1]) | (ids[1:] < 0))))
        last = np.concatenate((first[1:], [len(ids)])) - 1
        counts = last - first + 1
        words[:, 0] = np.repeat(self.offsets[first, 0], counts)
        words[:, 1] = np.repeat(self.offsets[last, 1], counts)
        return words

    def visible(self, start: int, end: int) -> tuple[int, int]:
        """Shrinks ``text[start:end]`` to exclude white space at its ends; returns its code points."""
        return trimmed(self.text, start, end)

    def tokens_of(self, start: int, end: int) -> tuple[int, int] | None:
        """Returns the first and last token (inclusive) with visible text of ``text[start:end]``, or None if there is none."""
        # A SentencePiece token includes the space before its word: overlapping that space alone does not count.
        last = np.minimum(self.offsets[:, 1], end)
        first = np.minimum(np.maximum(self.offsets[:, 0], start), last)
        touching = np.flatnonzero(self.visible_before[last] > self.visible_before[first])
        return (int(touching[0]), int(touching[-1])) if len(touching) else None


def trimmed(text: str, start: int, end: int) -> tuple[int, int]:
    """Shrinks ``text[start:end]`` to exclude white space at its ends; returns its code points."""
    while start < end and text[start].isspace():
        start += 1
    while end > start and text[end - 1].isspace():
        end -= 1
    return start, end


@cache
def _visible_codes() -> BoolArray:
    """Whether each code point is not white space (``str.isspace``); the last entry stands for all above it."""
    return np.asarray([not chr(code).isspace() for code in range(_LAST_SPACE + 2)])


def visible_flags(text: str) -> BoolArray:
    """Whether each code point of a text is not white space."""
    codes = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    return _visible_codes().take(codes, mode="clip")


def count_before(flags: BoolArray) -> IntArray:
    """Counts the true flags before each position, ``[flags + 1]``."""
    before = np.zeros(len(flags) + 1, dtype=np.int64)
    np.cumsum(flags, out=before[1:])
    return before
