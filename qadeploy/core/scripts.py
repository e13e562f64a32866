"""Scripts that are written without spaces between words, and how far a word reaches in a text that contains them."""

from __future__ import annotations

import re

import numpy as np

from qadeploy.records import IntArray

UNSPACED = (  # for a character class of ``re``
    "\u0e00-\u109f\ua9e0-\ua9ff\uaa60-\uaa7f"  # Thai, Lao, Tibetan, Myanmar
    "\u1780-\u17ff\u19e0-\u19ff"  # Khmer
    "\u2e80-\u2fdf\u3005-\u3007\u3021-\u3029\u3038-\u303b\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Han
    "\u3040-\u30ff\u31f0-\u31ff\uff66-\uff9f\U0001aff0-\U0001b16f"  # Hiragana, Katakana
)
# Includes East Asian punctuation, which has no spaces around it either.
_APART = re.compile(rf"[{UNSPACED}\u3000-\u303f\uff00-\uff65]")


def within_script(text: str, tokens: IntArray, words: IntArray) -> IntArray:
    """Ends words at the characters of unspaced scripts, because there a whole clause is one "word" to a tokenizer.

    Args:
        text: The text.
        tokens: Start and end of each token in code points, ``[tokens, 2]``.
        words: Start and end of the word around each token, ``[tokens, 2]``.

    Returns:
        The words, ``[tokens, 2]``, each still around its token, but widened neither by a character of an unspaced script nor
        past one. ``words`` itself if the text has no such character.
    """
    if text.isascii() or not len(words) or not (places := [found.start() for found in _APART.finditer(text)]):
        return words
    apart = np.asarray(places, dtype=np.int64)
    borders = np.unique(np.concatenate(([0], apart, apart + 1, [len(text)])))
    before = borders[np.searchsorted(borders, tokens[:, 0], side="right") - 1]
    after = borders[np.searchsorted(borders, tokens[:, 1], side="left")]
    return np.stack((np.maximum(words[:, 0], before), np.minimum(words[:, 1], after)), axis=1)
