"""The answerer: questions and contexts in, answers out, for any model that turns windows into logits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tokenizers import Tokenizer

from qadeploy.bundle import MODEL, TOKENIZER, Bundle, open_bundle
from qadeploy.errors import BundleError, InputError, QadeployError
from qadeploy.qa.settings import QaSettings
from qadeploy.qa.spans import Decoded, decode, rank_answers
from qadeploy.qa.windows import EncodedText, Encoder
from qadeploy.records import Answer, FloatArray, Window
from qadeploy.runtime.session import OnnxModel

Pair = tuple[str, str]
_CHUNK_PAIRS = 64
_CHUNK_CHARACTERS = 400_000


class LogitsModel(Protocol):
    """What an answerer needs of a model."""

    def run(self, windows: Sequence[Window]) -> list[tuple[FloatArray, FloatArray]]:
        """Start and end logits of each window, float32 ``[tokens]`` each, in order."""
        ...


@dataclass(frozen=True, slots=True)
class Options:
    """The choices of one call; lengths in tokens. None means: what the bundle says."""

    top_k: int = 1
    max_answer_len: int | None = None
    max_seq_len: int | None = None
    doc_stride: int | None = None
    align_to_words: bool = False
    allow_no_answer: bool = False

    def settings(self, stored: QaSettings) -> QaSettings:
        """The stored settings with this call's choices. Raises InputError on numbers that are none, or below 1."""
        if isinstance(self.top_k, bool) or not isinstance(self.top_k, int):
            raise InputError(f"option: top_k is {self.top_k!r}, a positive whole number is needed")
        return stored.changed(
            max_seq_len=self.max_seq_len, doc_stride=self.doc_stride, max_answer_len=self.max_answer_len
        )


@dataclass(frozen=True, slots=True)
class Reading:
    """One question read over one context: what ``trace`` shows and ``answer`` is made of."""

    question: EncodedText
    context: EncodedText
    windows: tuple[Window, ...]
    logits: tuple[tuple[FloatArray, FloatArray], ...]
    settings: QaSettings
    decoded: Decoded


class Answerer:
    """Answers questions from contexts. Safe to share between threads.

    Every method takes the options of ``Options`` as keywords: ``top_k``, ``max_answer_len``,
    ``max_seq_len``, ``doc_stride`` (tokens), ``align_to_words``, ``allow_no_answer``.
    """

    def __init__(
        self, encoder: Encoder, settings: QaSettings, model: LogitsModel, bundle: Bundle | None = None
    ) -> None:
        self.encoder = encoder
        self.settings = settings
        self.model = model
        self.bundle = bundle

    @classmethod
    def load(cls, path: str | Path, *, device: str = "auto", threads: int | None = None) -> Answerer:
        """Loads a verified bundle folder.

        ``device`` is auto, cpu, cuda or cuda:N; ``threads`` bounds the CPU threads (default: all).
        Raises InputError (no such folder), BundleError, DeviceError, MissingExtraError.
        """
        bundle = open_bundle(path)
        try:
            tokenizer = Tokenizer.from_str(bundle.read(TOKENIZER).decode("utf-8"))
        except QadeployError:
            raise
        except Exception as error:  # the Rust binding raises bare Exception
            raise BundleError(f"{bundle.folder / TOKENIZER}: cannot be read: {error}") from error
        encoder = Encoder(tokenizer, bundle.encoder)
        model = OnnxModel(
            lambda: bundle.read(MODEL),
            device=device,
            threads=threads,
            pad_token_id=bundle.encoder.pad_token_id,
            options=bundle.manifest.get("session"),
        )
        if ("token_type_ids" in model.inputs) != bool(bundle.encoder.segments):
            raise BundleError(f"{bundle.folder}: model and encoder disagree on token_type_ids: export the bundle again")
        return cls(encoder, bundle.settings, model, bundle)

    def answer(
        self,
        question: str,
        context: str,
        *,
        top_k: int = 1,
        max_answer_len: int | None = None,
        max_seq_len: int | None = None,
        doc_stride: int | None = None,
        align_to_words: bool = False,
        allow_no_answer: bool = False,
    ) -> list[Answer]:
        """The ``top_k`` best answers, best first; fewer where there are fewer.

        With ``allow_no_answer`` the null answer ("" at 0) competes: it is the first where its logit exceeds the
        best span's by more than the stored ``null_threshold`` (a bundle without one: by probability).
        Raises InputError (empty or invalid text, options out of range), QuestionTooLongError,
        StrideError, LogitsError.
        """
        options = Options(top_k, max_answer_len, max_seq_len, doc_stride, align_to_words, allow_no_answer)
        return next(self._stream([(question, context)], options, numbered=False))

    def answer_batch(
        self,
        pairs: Iterable[Pair],
        *,
        top_k: int = 1,
        max_answer_len: int | None = None,
        max_seq_len: int | None = None,
        doc_stride: int | None = None,
        align_to_words: bool = False,
        allow_no_answer: bool = False,
    ) -> list[list[Answer]]:
        """``answer`` for many (question, context) pairs, in order. Errors name the pair, from 1."""
        options = Options(top_k, max_answer_len, max_seq_len, doc_stride, align_to_words, allow_no_answer)
        return list(self._stream(pairs, options))

    def answer_stream(
        self,
        pairs: Iterable[Pair],
        *,
        top_k: int = 1,
        max_answer_len: int | None = None,
        max_seq_len: int | None = None,
        doc_stride: int | None = None,
        align_to_words: bool = False,
        allow_no_answer: bool = False,
    ) -> Iterator[list[Answer]]:
        """``answer`` for any iterable of pairs, lazily, in input order, in bounded memory."""
        options = Options(top_k, max_answer_len, max_seq_len, doc_stride, align_to_words, allow_no_answer)
        return self._stream(pairs, options)

    def read(self, question: str, context: str, options: Options) -> Reading:
        """One question with everything on the way to its answers, for a trace."""
        return self._read([(question, context)], options, None)[0]

    def read_stream(self, pairs: Iterable[Pair], options: Options) -> Iterator[Reading]:
        """``read`` for any iterable of pairs, lazily, in input order, in bounded memory. Errors name the pair, from 1."""
        return self._readings(pairs, options, numbered=True)

    def _stream(self, pairs: Iterable[Pair], options: Options, *, numbered: bool = True) -> Iterator[list[Answer]]:
        return (to_answers(reading, options) for reading in self._readings(pairs, options, numbered))

    def _readings(self, pairs: Iterable[Pair], options: Options, numbered: bool) -> Iterator[Reading]:
        done = 0
        for chunk in _chunks(pairs, numbered):
            yield from self._read(chunk, options, done if numbered else None)
            done += len(chunk)

    def _read(self, pairs: Sequence[Pair], options: Options, done: int | None) -> list[Reading]:
        settings = options.settings(self.settings)
        contexts: dict[str, EncodedText] = {}
        read: list[tuple[EncodedText, EncodedText, list[Window]]] = []
        for number, (question, context) in enumerate(pairs, 1 + (done or 0)):
            try:
                _check_text("question", question)
                _check_text("context", context)
                if context not in contexts:
                    contexts[context] = self.encoder.encode(context)
                encoded = self.encoder.encode(question)
                windows = self.encoder.windows(
                    encoded, contexts[context], max_seq_len=settings.max_seq_len, doc_stride=settings.doc_stride
                )
            except InputError as error:
                if done is None:
                    raise
                raise type(error)(f"pair {number}: {error}") from error
            read.append((encoded, contexts[context], windows))
        logits = self.model.run([w for _, _, windows in read for w in windows])
        readings, first = [], 0
        for encoded, text, windows in read:
            part = logits[first : first + len(windows)]
            first += len(windows)
            decoded = decode(
                windows,
                [starts for starts, _ in part],
                [ends for _, ends in part],
                text,
                top_k=options.top_k,
                max_answer_len=settings.max_answer_len,
                align_to_words=options.align_to_words,
                allow_no_answer=options.allow_no_answer,
                temperature=settings.temperature,
            )
            readings.append(Reading(encoded, text, tuple(windows), tuple(part), settings, decoded))
        return readings


def to_answers(reading: Reading, options: Options) -> list[Answer]:
    """The answers of a reading, best first, the null answer among them where it is allowed."""
    return rank_answers(
        reading.decoded,
        reading.context.text,
        top_k=options.top_k,
        allow_no_answer=options.allow_no_answer,
        null_threshold=reading.settings.null_threshold,
    )


def _chunks(pairs: Iterable[Pair], numbered: bool) -> Iterator[list[Pair]]:
    chunk: list[Pair] = []
    characters = 0
    for number, pair in enumerate(pairs, 1):
        if numbered and not (isinstance(pair, tuple | list) and len(pair) == 2):
            raise InputError(f"pair {number}: is {type(pair).__name__}, a (question, context) pair is needed")
        chunk.append((pair[0], pair[1]))
        characters += len(pair[1]) if isinstance(pair[1], str) else 0
        if len(chunk) == _CHUNK_PAIRS or characters >= _CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _check_text(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise InputError(f"{name} is {type(value).__name__}, text is needed")
    if not value.strip():
        raise InputError(f"{name} is empty: give it some text")
