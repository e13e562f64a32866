"""Estimates of the cost of a request, in tokens of its windows before it is tokenised, and of how fast tokens run.

The number of characters per token depends on the script: four in English, one in Chinese, a third if a tokenizer decomposes
Hangul. So the characters of each script are counted, in a sample of a long text, and weighted by a ratio learned per script.
"""

from __future__ import annotations

import math

import numpy as np

from qadeploy.core.settings import QaSettings
from qadeploy.core.windows import room_and_overlap
from qadeploy.records import Float64Array

# Unicode blocks in order: the first code point of each, and its script.
_LATIN, _LETTERS, _UNSPACED, _HAN, _HANGUL, _OTHER = range(6)
_BLOCKS = (
    (0x0000, _LATIN),
    (0x0370, _LETTERS),  # Greek, Cyrillic, Hebrew, Arabic, the scripts of India
    (0x0E00, _UNSPACED),  # Thai, Lao, Tibetan, Myanmar
    (0x1100, _HANGUL),
    (0x1200, _LETTERS),
    (0x1780, _UNSPACED),  # Khmer
    (0x1800, _LETTERS),
    (0x1E00, _LATIN),  # also punctuation and symbols
    (0x2E80, _HAN),  # also kana and the full stops beside them
    (0xA4D0, _LETTERS),
    (0xAC00, _HANGUL),
    (0xD7FC, _OTHER),
    (0xF900, _HAN),
    (0xFB00, _LETTERS),
    (0xFE30, _HAN),
    (0x10000, _OTHER),
    (0x20000, _HAN),
    (0x40000, _OTHER),
)
_STARTS = np.asarray([start for start, _ in _BLOCKS])
_SCRIPTS = np.asarray([script for _, script in _BLOCKS])
_FIRST = (0.25, 0.6, 1.0, 1.0, 2.0, 1.0)  # initial tokens per character of each script
_LEAST, _MOST = 0.02, 4.0  # a long word may be one unknown token; a character is at most four bytes
_SAMPLE = 1_024  # characters of a long text that are counted
_LEARN = 0.2  # the learning rate for a text of _SAMPLE characters or more
_MEMORY = 5.0  # seconds after which the weight of a measurement has fallen to 1/e


class TokenRatios:
    """Tokens per character of each script, as seen so far. Not thread-safe."""

    def __init__(self) -> None:
        self._ratios = np.asarray(_FIRST)

    def tokens(self, text: str) -> float:
        """The estimated number of tokens of a text."""
        return float(self._ratios @ _count(text))

    def learn(self, text: str, tokens: int) -> None:
        """Moves the ratios of the scripts in a text towards its real number of tokens (normalised least mean squares)."""
        if not text:
            return
        counts = _count(text)
        missed = tokens - float(self._ratios @ counts)
        weight = _LEARN * min(1.0, len(text) / _SAMPLE)
        self._ratios = np.clip(self._ratios + weight * missed * counts / (counts @ counts), _LEAST, _MOST)


def _count(text: str) -> Float64Array:
    """Characters of each script, ``[scripts]``; for a long text extrapolated from an evenly spaced sample."""
    if text.isascii():
        return np.asarray([len(text), 0, 0, 0, 0, 0], dtype=np.float64)
    sample = text[:: max(1, len(text) // _SAMPLE)]
    codes = np.frombuffer(sample.encode("utf-32-le", "surrogatepass"), dtype="<u4")
    scripts = _SCRIPTS[np.searchsorted(_STARTS, codes, side="right") - 1]
    return np.bincount(scripts, minlength=len(_FIRST)).astype(np.float64) * (len(text) / len(sample))


def window_tokens(question: float, context: float, special: int, settings: QaSettings, most: int) -> tuple[int, int]:
    """Estimates the number of windows of a question and a context, and of the tokens in all of them.

    Args:
        question: Tokens of the question.
        context: Tokens of the context.
        special: Special tokens per window.
        settings: The settings that determine the lengths of windows.
        most: The largest number of windows that are read.
    """
    around = question + special
    room = settings.max_seq_len - around
    if context <= room:
        return 1, math.ceil(context + around)
    # A question that is too long leaves no room; it is refused when it is tokenised.
    room, overlap = room_and_overlap(max(room, 2.0), settings.lengths)
    windows = min(max(1, math.ceil((context - overlap) / (room - overlap))), max(1, most))
    return windows, math.ceil(min(context + (windows - 1) * overlap, windows * room) + windows * around)


class Speed:
    """Tokens per second of all workers together, as measured in the last seconds. Not thread-safe.

    Args:
        tokens_per_second: The initial speed; it counts as one second of measurement.
        workers: How many workers run at a time.
    """

    def __init__(self, tokens_per_second: float, workers: int) -> None:
        self._workers = workers
        self._tokens, self._seconds = tokens_per_second, float(workers)
        self._short, self._at = 0.0, 0.0

    @property
    def all(self) -> float:
        """The speed of all workers, on short requests and long documents alike."""
        return self._workers * self._tokens / self._seconds

    def left(self, now: float, least: float) -> float:
        """The speed that recent short requests leave for long documents: at least the share ``least`` of ``all``."""
        busy = self._short * math.exp((self._at - now) / _MEMORY) / (self._workers * _MEMORY)
        return self.all * max(1 - busy, least)

    def ran(self, tokens: int, short: float, seconds: float, now: float) -> None:
        """Learns from a run of one worker.

        Args:
            tokens: Tokens that ran.
            short: The share of them that belongs to short requests.
            seconds: Seconds that the run took, decoding included.
            now: The time at the end of the run.
        """
        keep = math.exp(-seconds / (self._workers * _MEMORY))
        self._tokens = keep * self._tokens + tokens
        self._seconds = keep * self._seconds + max(seconds, 1e-6)
        self._short = self._short * math.exp((self._at - now) / _MEMORY) + short * seconds
        self._at = now
