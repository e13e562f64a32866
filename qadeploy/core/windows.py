"""Text to token windows: the one encoder, used for training and for serving.

The question and the context are tokenised separately, without truncation or padding, and numpy cuts the
windows. A context tokenised once therefore serves many questions, and any thread can use any ``max_seq_len`` and
``doc_stride``. The windows are those of a Hugging Face fast tokenizer called with
``return_overflowing_tokens=True, stride=doc_stride, truncation="only_second"`` (the tests compare the two),
so ``doc_stride`` is the OVERLAP of neighbouring windows, in tokens. If the question is so long that a window holds no more than
``doc_stride`` context tokens, where the Hugging Face tokenizer fails, windows overlap by half of their context tokens.

Models whose tokenizer pads on the left (such as XLNet) take the context first and the question last,
as in transformers' question-answering example; their windows equal those of ``truncation="only_first"``.

Some tokenizers leave visible characters without a token: ``Whitespace`` before ``ByteLevel`` with a prefix space trims the first
letter off each word. Such characters are given to the token after them, whose start is moved back.
"""

from __future__ import annotations

import hashlib
import json
import os
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, TypedDict, TypeVar

import numpy as np
from tokenizers import Encoding, Tokenizer
from tokenizers import __version__ as tokenizers_version

from qadeploy.core.encoded_text import EncodedText, count_before, visible_flags
from qadeploy.core.unknown import unknown_id
from qadeploy.errors import InputError, QuestionTooLongError, StrideError, TooManyWindowsError
from qadeploy.records import IntArray, Window

DEFAULT_MAX_SEQ_LEN = 384
DEFAULT_DOC_STRIDE = 128
CONTEXT_MASK = "context_mask"  # the input of a graph with a span head (docs/spans-in-graph.md)
_PROBES = ("a", "the", "1", ".", "\u4e00")
# Texts that a tokenizer must cover to their ends: words, capitals, digits, punctuation, other scripts, symbols, emoji.
_COVERED = (
    *("word", "Two Words", "NASA", "Størrelse", "1969", "$12.50", "(a)", "well-known", "end.", "why?"),
    *("Москва", "Αθήνα", "القاهرة", "ירושלים", "दिल्ली", "東京", "서울", "ไทย", "½", "€", "→", "🚀"),
)
_RULES = 2  # increased whenever a change of this module gives other ids or offsets with the same tokenizer
_LONG = 2_000  # code points; shorter texts take about a millisecond at most
_Tokens = TypeVar("_Tokens", int, float)  # estimates have fractions


@dataclass(frozen=True, slots=True)
class EncoderConfig:
    """What the encoder must know besides ``tokenizer.json``; stored in checkpoints and bundles.

    Attributes:
        segments: Number of token types that the model's forward accepts, 0 if it accepts none.
        context_first: Whether the context comes before the question.
        null_token_id: The token that stands for "no answer" (CLS).
        pad_token_id: The token that fills batches.
        position_limit: Longest input in tokens.
    """

    segments: int
    context_first: bool
    null_token_id: int | None
    pad_token_id: int
    position_limit: int

    def to_dict(self) -> dict[str, Any]:
        """Returns the configuration as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EncoderConfig:
        """Reads what ``to_dict`` wrote. Raises KeyError if a value is missing, TypeError if one has a wrong type."""
        null = values["null_token_id"]
        if not isinstance(values["context_first"], bool) or not (null is None or _is_count(null)):
            raise TypeError("encoder: context_first or null_token_id has a wrong type")
        numbers = {name: values[name] for name in ("segments", "pad_token_id", "position_limit")}
        if not all(_is_count(number) for number in numbers.values()):
            raise TypeError(f"encoder: whole numbers are needed in {numbers}")
        return cls(context_first=values["context_first"], null_token_id=null, **numbers)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


@dataclass(frozen=True, slots=True, eq=False)
class Frame:
    """The special tokens around a pair of texts, and the token types.

    Attributes:
        before: Ids of the special tokens before the first text, int64.
        between: Ids of those between the texts.
        after: Ids of those after the second text.
        types: Token types of these three in turn.
        parts: Token type of the first text and of the second.
    """

    before: IntArray
    between: IntArray
    after: IntArray
    types: tuple[IntArray, IntArray, IntArray]
    parts: tuple[int, int]


class Lengths(TypedDict):
    """Lengths of windows in tokens; see ``Encoder.windows``."""

    max_seq_len: int
    doc_stride: int
    long_seq_len: int | None


@dataclass(frozen=True, slots=True)
class Cut:
    """How a context is cut into windows.

    Attributes:
        begins: First context token of each window.
        room: Most context tokens that a window holds.
        tokens: Tokens of the whole context.
        overlap: Tokens that neighbouring windows share.
    """

    begins: range
    room: int
    tokens: int
    overlap: int

    def parts(self) -> tuple[IntArray, IntArray]:
        """The first context token of each window and the one after its last, ``[windows]`` each."""
        begins = np.asarray(self.begins, dtype=np.int64)
        return begins, np.minimum(begins + self.room, self.tokens)


class Encoder:
    """Turns questions and contexts into windows. Threads can share it.

    Args:
        tokenizer: A fast tokenizer; the special tokens are learned from its pair template.
        config: What the tokenizer does not know.

    Attributes:
        config: The same configuration.
        frame: The special tokens around question and context, for code that builds windows elsewhere.
        special_tokens: The number of special tokens in ``frame``.

    Raises:
        InputError: The tokenizer finds no tokens, or its pair template does not put the first text before the second.
    """

    def __init__(self, tokenizer: Tokenizer, config: EncoderConfig) -> None:
        self.config = config
        # A copy, because a tokenizer file may set truncation and padding, which must be off here.
        self._tokenizer = Tokenizer.from_str(tokenizer.to_str())
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._skipped: dict[str, bool] = {}
        self._read_template()

    @classmethod
    def from_file(cls, path: str | Path, config: EncoderConfig) -> Encoder:
        """Reads ``tokenizer.json``. Raises InputError if it cannot be read."""
        with rust_errors(lambda error: InputError(f"{path}: not a readable tokenizer file: {error}")):
            tokenizer = Tokenizer.from_file(str(path))
        return cls(tokenizer, config)

    def _read_template(self) -> None:
        """Learns the special tokens before, between and after the pair from one probe pair."""
        probe = next((p for p in _PROBES if len(self._raw(p))), None)
        if probe is None:
            raise InputError("the tokenizer returns no tokens for any probe text: is its vocabulary empty?")
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
        types = np.minimum(types, top)  # a model with one token type accepts only zeros
        special_types, part_types = (types[:a], types[b:c], types[d:]), (int(types[a]), int(types[c]))
        self.frame = Frame(ids[:a], ids[b:c], ids[d:], special_types, part_types)
        self.special_tokens = len(ids) - 2 * size

    def _raw(self, text: str) -> EncodedText:
        return self._read(text, self._encoding(text))

    def _read(self, text: str, encoding: Encoding) -> EncodedText:
        ids = np.asarray(encoding.ids, dtype=np.int64)
        offsets = np.fromiter(chain.from_iterable(encoding.offsets), np.int64, 2 * len(ids)).reshape(-1, 2)
        if len(ids):
            self._reach_back(text, offsets)
        return EncodedText(text, ids, offsets, encoding)

    def _reach_back(self, text: str, offsets: IntArray) -> None:
        """Moves each token's start back, in place, to the first visible character that no token before it covers."""
        visible = visible_flags(text)
        starts, covered = offsets[:, 0], np.zeros(len(offsets), dtype=np.int64)
        np.maximum.accumulate(offsets[:-1, 1], out=covered[1:])
        between = starts - covered
        if between.max() <= 1 and not visible[covered[between == 1]].any():
            return  # only single spaces between tokens, as in most texts: nothing is left out
        before = count_before(visible)
        late = np.flatnonzero(before[starts] > before[covered])
        if not len(late):
            return
        sizes = starts[late] - covered[late]
        gaps = np.arange(sizes.sum()) + np.repeat(starts[late] - np.cumsum(sizes), sizes)
        visible[gaps] &= [not self._is_skipped(text[place]) for place in gaps.tolist()]
        before = count_before(visible)
        late = late[before[starts[late]] > before[covered[late]]]
        starts[late] = np.searchsorted(before, before[covered[late]], side="right") - 1

    def _is_skipped(self, character: str) -> bool:
        """Whether the normalizer deletes a character or joins it to the one before it, so that no token has to cover it."""
        found = self._skipped.get(character)
        if found is None:
            found = self._skipped[character] = self._skips(character)
        return found

    def _skips(self, character: str) -> bool:
        normalizer = self._tokenizer.normalizer
        if normalizer is None:
            return False
        first = unicodedata.normalize("NFKD", character)[0]
        # A combining mark; a Hangul vowel or final consonant.
        if unicodedata.category(first).startswith("M") or "\u1160" <= first <= "\u11ff":
            return True
        normalised = normalizer.normalize_str
        return normalised(f"a{character}a") in (normalised("aa"), normalised("a a"))

    def check_coverage(self, source: str) -> None:
        """Checks that the tokenizer covers a few texts in several scripts.

        Args:
            source: The model's name, for the message.

        Raises:
            InputError: The tokenizer fails on one of them, or leaves visible characters at its end without a token.
        """
        for text in _COVERED:
            with rust_errors(
                lambda error: InputError(f"{source}: its tokenizer cannot read {text!r} ({error}): use another model")  # noqa: B023
            ):
                read = self._raw(text)
            rest = text[int(read.offsets[:, 1].max(initial=0)) :]
            if lost := "".join(c for c in rest if not c.isspace() and not self._is_skipped(c)):
                raise InputError(
                    f"{source}: its tokenizer has no token for {lost!r} at the end of {text!r}, so no answer could contain "
                    "these characters: use a model whose tokenizer covers every character, by bytes or an unknown token"
                )

    def _encoding(self, text: str) -> Encoding:
        # ``encode`` keeps the GIL until it is done (0.1 s for 200,000 characters), ``encode_batch`` releases it, but
        # starts threads if parallelism is on, and tokenizers then warns at every fork: so only with parallelism off.
        if len(text) > _LONG and os.environ.get("TOKENIZERS_PARALLELISM") == "false":
            return self._tokenizer.encode_batch([text], add_special_tokens=False)[0]
        return self._tokenizer.encode(text, add_special_tokens=False)

    def encode(self, text: str) -> EncodedText:
        """Tokenises one question or context. Raises InputError on a lone surrogate, or if the tokenizer fails on the text."""
        try:
            return self._raw(text)
        except (UnicodeEncodeError, TypeError) as error:
            raise InputError(
                "the text holds a lone surrogate, which no tokenizer can read: "
                "decode it from its original bytes, or drop it with text.encode('utf-8', 'ignore').decode()"
            ) from error
        except BaseException as error:
            if not is_rust_error(error):
                raise
            raise InputError(f"the tokenizer of the model cannot read the text: {error}") from error

    def encode_many(self, texts: Sequence[str]) -> list[EncodedText]:
        """Tokenises many texts on all cores, in order. Raises InputError like ``encode``."""
        try:
            encodings = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        except BaseException as error:
            if not is_rust_error(error):
                raise
            return [self.encode(text) for text in texts]  # names the text at fault
        return [self._read(text, encoding) for text, encoding in zip(texts, encodings, strict=True)]

    def encode_pairs(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[EncodedText, EncodedText]]:
        """Tokenises questions with their contexts, each distinct context once.

        Args:
            pairs: (question, context) pairs.

        Raises:
            InputError: As ``encode`` does.
        """
        texts = list(dict.fromkeys(context for _, context in pairs))
        contexts = dict(zip(texts, self.encode_many(texts), strict=True))
        questions = self.encode_many([question for question, _ in pairs])
        return [(question, contexts[context]) for question, (_, context) in zip(questions, pairs, strict=True)]

    def restore(self, text: str, ids: IntArray, offsets: IntArray) -> EncodedText:
        """Rebuilds, without tokenising, what ``encode(text)`` of an encoder with the same ``digest`` returned.

        Args:
            text: The text.
            ids: Its token ids, int64 ``[tokens]``.
            offsets: Its offsets, int64 ``[tokens, 2]``.
        """
        return EncodedText(text, ids, offsets, self._tokenizer)

    @property
    def vocabulary(self) -> int:
        """The number of tokens, without added tokens."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=False))

    @cached_property
    def unknown_id(self) -> int | None:
        """The id of the unknown token, or None if there is none."""
        return unknown_id(self._tokenizer)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of what determines windows besides texts and lengths: tokenizer, configuration, version of tokenizers."""
        known = (_RULES, self._tokenizer.to_str(), self.config.to_dict(), tokenizers_version)
        return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()

    def room(self, question: EncodedText, max_seq_len: int) -> int:
        """Returns how many context tokens fit beside the question. Raises QuestionTooLongError, InputError."""
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
        long_seq_len: int | None = None,
        max_windows: int | None = None,
    ) -> list[Window]:
        """Makes all windows of one question over one context, in order.

        A context that fits is one window, and so is an empty context (no tokens).

        Args:
            question: The question.
            context: The context.
            max_seq_len: Longest window, in tokens.
            doc_stride: Overlap of neighbouring windows, in tokens. If the question leaves room for no more than that, the
                overlap is half of the room, rounded down.
            long_seq_len: Longest window, in tokens, of a context that does not fit in one window of ``max_seq_len``; None keeps
                ``max_seq_len``. The overlap shrinks in proportion. Ignored if the question leaves no room beyond that overlap.
            max_windows: Most windows allowed, None for no limit.

        Raises:
            QuestionTooLongError: The question leaves no room for the context.
            StrideError: ``doc_stride`` is at least ``max_seq_len``, and the context does not fit.
            InputError: ``max_seq_len`` or ``doc_stride`` is out of range.
            TooManyWindowsError: There are more than ``max_windows``; none has been made.
        """
        cut = self.cut(question, context, max_seq_len=max_seq_len, doc_stride=doc_stride, long_seq_len=long_seq_len)
        return self.make(question, context, cut, cut.begins, max_windows)

    def cut(
        self,
        question: EncodedText,
        context: EncodedText,
        *,
        max_seq_len: int,
        doc_stride: int,
        long_seq_len: int | None = None,
    ) -> Cut:
        """Decides where windows begin. Arguments and errors are those of ``windows``, without ``max_windows``."""
        if doc_stride < 0:
            raise InputError(f"doc_stride {doc_stride} is negative: it is the overlap of windows in tokens")
        room = self.room(question, max_seq_len)
        total = len(context)
        if total <= room:
            return Cut(range(1), room, total, doc_stride)
        if doc_stride >= max_seq_len:
            raise StrideError(
                f"doc_stride must be below max_seq_len {max_seq_len}, not {doc_stride}: it is the overlap of windows in tokens"
            )
        room, overlap = room_and_overlap(
            room, {"max_seq_len": max_seq_len, "doc_stride": doc_stride, "long_seq_len": long_seq_len}
        )
        return Cut(range(0, total - overlap, room - overlap), room, total, overlap)

    def make(
        self,
        question: EncodedText,
        context: EncodedText,
        cut: Cut,
        begins: Sequence[int],
        max_windows: int | None = None,
    ) -> list[Window]:
        """Makes some windows of a cut.

        Args:
            question: The question.
            context: The context.
            cut: The cut of this question and context.
            begins: First context token of each window to make.
            max_windows: Most windows allowed, None for no limit.

        Raises:
            TooManyWindowsError: There are more than ``max_windows``; none has been made.
        """
        if max_windows is not None and len(begins) > max_windows:
            if len(begins) < len(cut.begins):
                raise TooManyWindowsError(
                    f"prefilter reads {len(begins)} of {len(cut.begins)} windows, but at most {max_windows} are allowed: lower prefilter"
                )
            raise TooManyWindowsError(
                f"the context of {cut.tokens} tokens makes {len(begins)} windows of {cut.room} tokens that overlap by {cut.overlap}, "
                f"but at most {max_windows} are allowed: shorten the context, lower doc_stride, raise max_seq_len, or read only some "
                "windows with prefilter"
            )
        types: dict[int, IntArray | None] = {}  # windows of the same length share them
        windows = []
        for begin in begins:
            end = min(begin + cut.room, cut.tokens)
            if end - begin not in types:
                types[end - begin] = self._types(len(question), end - begin)
            windows.append(self._window(question, context, begin, end, types[end - begin]))
        return windows

    def _types(self, question: int, context: int) -> IntArray | None:
        """Returns the token types of a window with that many question and context tokens."""
        if not self.config.segments:
            return None
        first, second = (context, question) if self.config.context_first else (question, context)
        before, between, after = self.frame.types
        one, two = self.frame.parts
        return np.concatenate(
            (before, np.full(first, one, dtype=np.int64), between, np.full(second, two, dtype=np.int64), after)
        )

    def _window(
        self, question: EncodedText, context: EncodedText, begin: int, end: int, token_type_ids: IntArray | None
    ) -> Window:
        piece = context.ids[begin:end]
        first, second = (piece, question.ids) if self.config.context_first else (question.ids, piece)
        input_ids = np.concatenate((self.frame.before, first, self.frame.between, second, self.frame.after))
        context_begin = len(self.frame.before)
        if not self.config.context_first:
            context_begin += len(question) + len(self.frame.between)
        return Window(
            input_ids=input_ids,
            token_type_ids=token_type_ids,
            context_begin=context_begin,
            context_length=end - begin,
            context_offset=begin,
            null_index=self._null_index(len(input_ids)),
        )

    def _null_index(self, length: int) -> int:
        before, after = self.frame.before.tolist(), self.frame.after.tolist()
        null = self.config.null_token_id
        if null in before:
            return int(before.index(null))
        if null in after:
            return length - len(after) + int(after.index(null))
        return 0

    def token_text(self, token_id: int) -> str:
        """Returns the token as the vocabulary writes it."""
        return self._tokenizer.id_to_token(token_id) or f"<{token_id}>"


def room_and_overlap(room: _Tokens, lengths: Lengths) -> tuple[_Tokens, _Tokens]:
    """How many context tokens each of several windows holds, and how many neighbours share; see ``Encoder.windows``.

    Args:
        room: The context tokens that fit in a window of ``max_seq_len``.
        lengths: The lengths of windows.
    """
    most, stride = lengths["max_seq_len"], lengths["doc_stride"]
    longest = min(lengths["long_seq_len"] or most, most)
    shorter, shorter_stride = room - (most - longest), stride * longest // most
    if shorter > shorter_stride:
        room, stride = shorter, shorter_stride
    return room, stride if stride < room else room // 2


def is_rust_error(error: BaseException) -> bool:
    """Whether tokenizers may have raised this: it raises a bare Exception or, if Rust panics, a class that is no Exception."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


@contextmanager
def rust_errors(ours: Callable[[BaseException], Exception]) -> Iterator[None]:
    """Converts an error for which ``is_rust_error`` holds with ``ours``, and raises the result."""
    try:
        yield
    except BaseException as error:
        if not is_rust_error(error):
            raise
        raise ours(error) from error


def pad_batch(windows: Sequence[Window], pad_token_id: int, *, tokens: int | None = None) -> dict[str, IntArray]:
    """Pads windows on the right to one batch of model inputs.

    Args:
        windows: The windows.
        pad_token_id: The token to pad with.
        tokens: Length of the batch, None for that of the longest window.

    Returns:
        ``input_ids``, ``attention_mask`` and, if the windows have them, ``token_type_ids``: int64 ``[windows, tokens]``.
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
    """Returns 1 for the window's context tokens that are not blank, where a span may start or end, else 0, ``[tokens]``."""
    mask = np.zeros(len(window), dtype=np.int64)
    held = slice(window.context_offset, window.context_offset + window.context_length)
    mask[window.context_begin : window.context_begin + window.context_length] = ~context.blank[held]
    return mask


def pad_context_masks(windows: Sequence[Window], contexts: Sequence[EncodedText]) -> IntArray:
    """Pads the ``context_mask`` of each window the way ``pad_batch`` pads inputs, ``[windows, tokens]``."""
    masks = np.zeros((len(windows), max(len(w) for w in windows)), dtype=np.int64)
    for mask, window, context in zip(masks, windows, contexts, strict=True):
        mask[: len(window)] = context_mask(window, context)
    return masks
