"""Text to token windows: the one encoder, used for training and for serving.

The question and the context are tokenised apart, without truncation or padding, and numpy cuts the
windows. So a context tokenised once serves many questions, any ``max_seq_len`` and ``doc_stride``
can be used from any thread, and the windows are those of a Hugging Face fast tokenizer called with
``return_overflowing_tokens=True, stride=doc_stride, truncation="only_second"`` (tests hold the two
against each other). ``doc_stride`` is therefore the OVERLAP of neighbouring windows, in tokens.

Models whose tokenizer pads on the left (XLNet's kind) take the context first and the question last,
as in transformers' question-answering example; their windows equal ``truncation="only_first"``.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer
from tokenizers import __version__ as tokenizers_version

from qadeploy.errors import InputError, QuestionTooLongError, StrideError, TooManyWindowsError
from qadeploy.records import IntArray, Window

DEFAULT_MAX_SEQ_LEN = 384
DEFAULT_DOC_STRIDE = 128
CONTEXT_MASK = "context_mask"  # the input of a graph with a span head (docs/spans-in-graph.md)
_PROBES = ("a", "the", "1", ".", "\u4e00")
_LONG = 2_000  # code points; shorter ones take about a millisecond at most
_LAST_SPACE = 0x3000  # the highest code point that is white space
# ids 8, offsets 16, blank 1, words 16; an Encoding of tokenizers 0.22 takes about 100 a token (measured).
_TOKEN_BYTES = 141


@dataclass(frozen=True, slots=True)
class EncoderConfig:
    """What the encoder must know beside ``tokenizer.json``; stored in checkpoints and bundles.

    ``segments`` is the number of token types the model's forward takes, 0 where it takes none;
    ``context_first`` swaps the pair; ``null_token_id`` is the token that stands for "no answer"
    (CLS); ``pad_token_id`` fills batches; ``position_limit`` is the longest input in tokens.
    """

    segments: int
    context_first: bool
    null_token_id: int | None
    pad_token_id: int
    position_limit: int

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EncoderConfig:
        """Reads what ``to_dict`` wrote. Raises KeyError on a missing value, TypeError on one of a wrong type."""
        null = values["null_token_id"]
        if not isinstance(values["context_first"], bool) or not (null is None or _is_count(null)):
            raise TypeError("encoder: context_first or null_token_id is of a wrong type")
        numbers = {name: values[name] for name in ("segments", "pad_token_id", "position_limit")}
        if not all(_is_count(number) for number in numbers.values()):
            raise TypeError(f"encoder: whole numbers are needed in {numbers}")
        return cls(context_first=values["context_first"], null_token_id=null, **numbers)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


@dataclass(frozen=True, slots=True, eq=False)
class Frame:
    """What stands around a pair: ids and token types of the special tokens, and the token type of either text.

    The ids are int64, in the order of the window; ``types`` are those of the three in turn, ``parts`` of the first text
    and of the second.
    """

    before: IntArray
    between: IntArray
    after: IntArray
    types: tuple[IntArray, IntArray, IntArray]
    parts: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Cut:
    """How a context of ``tokens`` is cut: window i holds the tokens from ``begins[i]`` on, at most ``room`` of them.

    Neighbours share ``overlap`` tokens.
    """

    begins: range
    room: int
    tokens: int
    overlap: int


class EncodedText:
    """A text tokenised once, without special tokens: immutable, and shared by threads and questions.

    ``ids`` is int64 ``[tokens]``, ``offsets`` int64 ``[tokens, 2]`` in code points. ``source`` is the encoding
    they come from or, for tokens kept from an earlier one, the tokenizer, asked only if more is wanted.
    """

    def __init__(self, text: str, ids: IntArray, offsets: IntArray, source: Encoding | Tokenizer) -> None:
        self.text = text
        self.ids = ids
        self.offsets = offsets
        self._source = source

    @classmethod
    def of(cls, text: str, encoding: Encoding) -> EncodedText:
        """The text as just tokenised."""
        ids = np.asarray(encoding.ids, dtype=np.int64)
        offsets = np.fromiter(chain.from_iterable(encoding.offsets), np.int64, 2 * len(ids)).reshape(-1, 2)
        return cls(text, ids, offsets, encoding)

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
        """Bytes of memory that this holds at most: the text, its arrays (``spoken`` apart), and tokenizers' encoding."""
        return sys.getsizeof(self.text) + len(self) * _TOKEN_BYTES

    @cached_property
    def spoken(self) -> IntArray:
        """``[code points + 1]``: how many non-space code points stand before each position."""
        return self._count_spoken()

    def _count_spoken(self) -> IntArray:
        codes = np.frombuffer(self.text.encode("utf-32-le"), dtype="<u4")
        spoken = np.zeros(len(codes) + 1, dtype=np.int64)
        np.cumsum(_visible_codes().take(codes, mode="clip"), out=spoken[1:])
        return spoken

    @cached_property
    def blank(self) -> NDArray[np.bool_]:
        """``[tokens]``: true where a token covers no visible text, so that no span may start or end on it."""
        spoken = self._count_spoken()  # not kept: it is larger than all else, and serving asks for it once
        return np.asarray(spoken[self.offsets[:, 1]] <= spoken[self.offsets[:, 0]])

    @cached_property
    def words(self) -> IntArray:
        """``[tokens, 2]``: code points of the whole (pre-tokenised) word around each token."""
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
        """``text[start:end]`` without white space at its borders, as code points."""
        while start < end and self.text[start].isspace():
            start += 1
        while end > start and self.text[end - 1].isspace():
            end -= 1
        return start, end

    def tokens_of(self, start: int, end: int) -> tuple[int, int] | None:
        """First and last token (inclusive) that hold visible text of ``text[start:end]``, or None where none does."""
        # Sentencepiece's tokens hold the space before a word: touching that space alone does not count.
        last = np.minimum(self.offsets[:, 1], end)
        first = np.minimum(np.maximum(self.offsets[:, 0], start), last)
        touching = np.flatnonzero(self.spoken[last] > self.spoken[first])
        return (int(touching[0]), int(touching[-1])) if len(touching) else None


@cache
def _visible_codes() -> NDArray[np.bool_]:
    """Whether a code point is no white space, as ``str.isspace`` says; the last entry stands for all above it."""
    return np.asarray([not chr(code).isspace() for code in range(_LAST_SPACE + 2)])


class Encoder:
    """Turns questions and contexts into windows. Safe to share between threads.

    Raises InputError where the tokenizer's pair template does not put the first text before the second;
    special tokens around them are learned from it, none where it has none.
    """

    def __init__(self, tokenizer: Tokenizer, config: EncoderConfig) -> None:
        self.config = config
        # A copy: a tokenizer file may have truncation and padding baked in, and ours must have neither.
        self._tokenizer = Tokenizer.from_str(tokenizer.to_str())
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._read_template()

    @classmethod
    def from_file(cls, path: str | Path, config: EncoderConfig) -> Encoder:
        """Reads ``tokenizer.json``. Raises InputError where it cannot be read."""
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the Rust binding raises bare Exception
            raise InputError(f"{path}: not a tokenizer file that can be read: {error}") from error
        return cls(tokenizer, config)

    def _read_template(self) -> None:
        """Learns the special tokens before, between and after the pair from one probe pair."""
        probe = next((p for p in _PROBES if len(self._raw(p))), None)
        if probe is None:
            raise InputError("the tokenizer turns every probe text into nothing: is its vocabulary empty?")
        piece = self._raw(probe)
        size = len(piece)
        pair = self._tokenizer.encode(probe, probe)
        ids = np.asarray(pair.ids, dtype=np.int64)
        types = np.asarray(pair.type_ids, dtype=np.int64)
        part = np.asarray([-1 if s is None else s for s in pair.sequence_ids])
        first, second = np.flatnonzero(part == 0), np.flatnonzero(part == 1)
        if len(first) != size or len(second) != size or first[-1] >= second[0]:
            raise InputError("the tokenizer does not build (question, context) pairs: it needs a pair template")
        a, b, c, d = first[0], first[-1] + 1, second[0], second[-1] + 1
        top = max(self.config.segments - 1, 0)
        types = np.minimum(types, top)  # a model with one token type takes zeros only
        self._before, self._between, self._after = ids[:a], ids[b:c], ids[d:]
        self._special_types = (types[:a], types[b:c], types[d:])
        self._part_types = (int(types[a]), int(types[c]))
        self.special_tokens = len(ids) - 2 * size

    @property
    def frame(self) -> Frame:
        """The special tokens around question and context, for who builds windows elsewhere."""
        return Frame(self._before, self._between, self._after, self._special_types, self._part_types)

    def _raw(self, text: str) -> EncodedText:
        return EncodedText.of(text, self._encoding(text))

    def _encoding(self, text: str) -> Encoding:
        # ``encode`` keeps the GIL until it is done (0.1 s for 200,000 characters), ``encode_batch`` lets others run. With
        # parallelism on that makes threads, which warn at every fork, so it is left to those who switched it off.
        if len(text) > _LONG and os.environ.get("TOKENIZERS_PARALLELISM") == "false":
            return self._tokenizer.encode_batch([text], add_special_tokens=False)[0]
        return self._tokenizer.encode(text, add_special_tokens=False)

    def encode(self, text: str) -> EncodedText:
        """Tokenises one question or context. Raises InputError on text that is not valid Unicode."""
        try:
            return self._raw(text)
        except (UnicodeEncodeError, TypeError) as error:
            raise InputError(
                "the text holds a lone surrogate, which no tokenizer can read: "
                "decode it from its original bytes, or drop it with text.encode('utf-8', 'ignore').decode()"
            ) from error

    def encode_many(self, texts: Sequence[str]) -> list[EncodedText]:
        """Tokenises many texts on all cores, in order. Raises InputError like ``encode``."""
        try:
            encodings = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        except (UnicodeEncodeError, TypeError):
            return [self.encode(text) for text in texts]  # names the text at fault
        return [EncodedText.of(text, encoding) for text, encoding in zip(texts, encodings, strict=True)]

    def restore(self, text: str, ids: IntArray, offsets: IntArray) -> EncodedText:
        """What ``encode(text)`` gave an encoder of the same ``digest``, without tokenising: int64 ``[tokens]``, ``[tokens, 2]``."""
        return EncodedText(text, ids, offsets, self._tokenizer)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all that decides on windows beside texts and limits: tokenizer, configuration, tokenizers' version."""
        known = (self._tokenizer.to_str(), self.config.to_dict(), tokenizers_version)
        return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()

    def room(self, question: EncodedText, max_seq_len: int) -> int:
        """Context tokens that fit beside the question. Raises QuestionTooLongError, InputError."""
        if max_seq_len > self.config.position_limit:
            raise InputError(
                f"max_seq_len {max_seq_len} is more than the model's limit of "
                f"{self.config.position_limit} tokens: use at most that"
            )
        room = max_seq_len - len(question) - self.special_tokens
        if room < 1:
            raise QuestionTooLongError(
                f"the question has {len(question)} tokens and leaves no room for the context in "
                f"max_seq_len {max_seq_len}: shorten the question or raise max_seq_len"
            )
        return room

    def windows(
        self,
        question: EncodedText,
        context: EncodedText,
        *,
        max_seq_len: int = DEFAULT_MAX_SEQ_LEN,
        doc_stride: int = DEFAULT_DOC_STRIDE,
        max_windows: int | None = None,
    ) -> list[Window]:
        """All windows of one question over one context, in order.

        ``max_seq_len`` is the longest window, ``doc_stride`` the overlap of neighbours, both in
        tokens. A context that fits is one window, an empty context (no tokens) too.
        Raises QuestionTooLongError, StrideError and InputError (limits that make no sense), and, before any is
        made, TooManyWindowsError above ``max_windows``.
        """
        cut = self.cut(question, context, max_seq_len=max_seq_len, doc_stride=doc_stride)
        return self.make(question, context, cut, cut.begins, max_windows)

    def cut(self, question: EncodedText, context: EncodedText, *, max_seq_len: int, doc_stride: int) -> Cut:
        """Where the windows of one question over one context begin. Raises what ``windows`` raises, limits apart."""
        if doc_stride < 0:
            raise InputError(f"doc_stride {doc_stride} is negative: it is the overlap of windows in tokens")
        room = self.room(question, max_seq_len)
        total = len(context)
        if total <= room:
            return Cut(range(1), room, total, doc_stride)
        if doc_stride >= room:
            raise StrideError(
                f"doc_stride {doc_stride} is not below the {room} context tokens that a window holds beside "
                f"this question (max_seq_len {max_seq_len}): lower doc_stride or raise max_seq_len"
            )
        return Cut(range(0, total - doc_stride, room - doc_stride), room, total, doc_stride)

    def make(
        self,
        question: EncodedText,
        context: EncodedText,
        cut: Cut,
        begins: Sequence[int],
        max_windows: int | None = None,
    ) -> list[Window]:
        """The windows of a cut that begin at ``begins``. Raises TooManyWindowsError above ``max_windows``, before any is made."""
        if max_windows is not None and len(begins) > max_windows:
            if len(begins) < len(cut.begins):
                raise TooManyWindowsError(
                    f"prefilter reads {len(begins)} of {len(cut.begins)} windows, at most {max_windows} are taken: lower prefilter"
                )
            raise TooManyWindowsError(
                f"the context of {cut.tokens} tokens makes {len(begins)} windows of {cut.room} tokens that overlap by {cut.overlap}, "
                f"at most {max_windows} are taken: shorten the context, lower doc_stride, raise max_seq_len, or read only some of them "
                "with prefilter"
            )
        types: dict[int, IntArray | None] = {}  # windows of one length have the same, and share them
        windows = []
        for begin in begins:
            end = min(begin + cut.room, cut.tokens)
            if end - begin not in types:
                types[end - begin] = self._types(len(question), end - begin)
            windows.append(self._window(question, context, begin, end, types[end - begin]))
        return windows

    def _types(self, question: int, context: int) -> IntArray | None:
        """The token types of a window with so many tokens of each."""
        if not self.config.segments:
            return None
        first, second = (context, question) if self.config.context_first else (question, context)
        before, between, after = self._special_types
        one, two = self._part_types
        return np.concatenate(
            (before, np.full(first, one, dtype=np.int64), between, np.full(second, two, dtype=np.int64), after)
        )

    def _window(
        self, question: EncodedText, context: EncodedText, begin: int, end: int, token_type_ids: IntArray | None
    ) -> Window:
        piece = context.ids[begin:end]
        first, second = (piece, question.ids) if self.config.context_first else (question.ids, piece)
        input_ids = np.concatenate((self._before, first, self._between, second, self._after))
        context_begin = len(self._before)
        if not self.config.context_first:
            context_begin += len(question) + len(self._between)
        return Window(
            input_ids=input_ids,
            token_type_ids=token_type_ids,
            context_begin=context_begin,
            context_length=end - begin,
            context_offset=begin,
            null_index=self._null_index(len(input_ids)),
        )

    def _null_index(self, length: int) -> int:
        before, after = self._before.tolist(), self._after.tolist()
        null = self.config.null_token_id
        if null in before:
            return int(before.index(null))
        if null in after:
            return length - len(after) + int(after.index(null))
        return 0

    def token_text(self, token_id: int) -> str:
        """The token as the vocabulary writes it."""
        return self._tokenizer.id_to_token(token_id) or f"<{token_id}>"


def pad_batch(windows: Sequence[Window], pad_token_id: int, *, tokens: int | None = None) -> dict[str, IntArray]:
    """Model inputs ``[windows, tokens]`` (None: the longest), padded on the right: ids, attention_mask, token_type_ids.

    ``token_type_ids`` is there exactly where the windows have it.
    """
    shape = (len(windows), tokens or max(len(w) for w in windows))
    ids = np.full(shape, pad_token_id, dtype=np.int64)
    mask = np.zeros(shape, dtype=np.int64)
    types = np.zeros(shape, dtype=np.int64)
    for row, window in enumerate(windows):
        ids[row, : len(window)] = window.input_ids
        mask[row, : len(window)] = 1
        if window.token_type_ids is not None:
            types[row, : len(window)] = window.token_type_ids
    batch = {"input_ids": ids, "attention_mask": mask}
    if windows[0].token_type_ids is not None:
        batch["token_type_ids"] = types
    return batch


def context_mask(window: Window, context: EncodedText) -> IntArray:
    """``[tokens]``: 1 at the window's context tokens that are not blank, where a span may start or end."""
    mask = np.zeros(len(window), dtype=np.int64)
    held = slice(window.context_offset, window.context_offset + window.context_length)
    mask[window.context_begin : window.context_begin + window.context_length] = ~context.blank[held]
    return mask


def pad_context_masks(windows: Sequence[Window], contexts: Sequence[EncodedText]) -> IntArray:
    """``[windows, tokens of the longest]``: the ``context_mask`` of each window of its context, beside ``pad_batch``."""
    masks = np.zeros((len(windows), max(len(w) for w in windows)), dtype=np.int64)
    for mask, window, context in zip(masks, windows, contexts, strict=True):
        mask[: len(window)] = context_mask(window, context)
    return masks
