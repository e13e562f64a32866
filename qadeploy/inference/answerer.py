"""The answerer: questions and contexts in, answers out, for any model that turns windows into logits."""

from __future__ import annotations

import warnings
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NoReturn, Protocol

from tokenizers import Tokenizer

from qadeploy.core.decoding import Decoded, decode_many, rank_answers
from qadeploy.core.prefilter import Ranking, rank
from qadeploy.core.settings import QaSettings
from qadeploy.core.windows import EncodedText, Encoder
from qadeploy.errors import BundleError, InputError, MachineWarning, QadeployError
from qadeploy.inference.aio import Aside, Run
from qadeploy.inference.bundle import MODEL, TOKENIZER, Bundle, open_bundle
from qadeploy.inference.context_cache import DEFAULT_CACHE_BYTES, CacheStats, ContextCache
from qadeploy.inference.session import Logits, OnnxModel, Pending
from qadeploy.machine import machine
from qadeploy.records import Answer, FloatArray, Window

Pair = tuple[str, str]
OnWindows = Callable[[int, int], object]
# Windows between two reports of progress: a thread of the model's on a CPU, in all on CUDA, which runs them in batches.
_REPORTED_A_THREAD, _REPORTED_ON_CUDA = 8, 128
# Questions taken together: enough that each thread has work for a while. Two chunks are held at a time.
_CHUNK_PAIRS, _CHUNK_PAIRS_A_THREAD = 32, 8
_CHUNK_CHARACTERS = 200_000


class LogitsModel(Protocol):
    """What an answerer needs of a model."""

    def run(self, windows: Sequence[Window]) -> list[tuple[FloatArray, FloatArray]]:
        """Start and end logits of each window, float32 ``[tokens]`` each, in order."""
        ...

    def start(self, windows: Sequence[Window]) -> Pending:
        """Begins to run windows, so that the caller can prepare the next ones meanwhile."""
        ...


@dataclass(frozen=True, slots=True)
class Options:
    """The choices of one call; lengths in tokens. None means: what the bundle says.

    ``prefilter`` is how many windows of a context the model reads at most: the best by BM25 (``qa.prefilter``), so that
    answers, scores and the null answer are over these alone. None: it reads all.
    """

    top_k: int = 1
    max_answer_len: int | None = None
    max_seq_len: int | None = None
    doc_stride: int | None = None
    align_to_words: bool = False
    allow_no_answer: bool = False
    prefilter: int | None = None

    def settings(self, stored: QaSettings) -> QaSettings:
        """The stored settings with this call's choices. Raises InputError on numbers that are none, or below 1."""
        if isinstance(self.top_k, bool) or not isinstance(self.top_k, int):
            raise InputError(f"option: top_k is {self.top_k!r}, a positive whole number is needed")
        count = self.prefilter
        if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
            raise InputError(f"option: prefilter is {count!r}, a positive whole number of windows is needed")
        return stored.changed(
            max_seq_len=self.max_seq_len, doc_stride=self.doc_stride, max_answer_len=self.max_answer_len
        )


@dataclass(frozen=True, slots=True)
class Reading:
    """One question read over one context: what ``trace`` shows and ``answer`` is made of.

    ``ranking`` holds the scores of all windows where ``prefilter`` left some out; ``windows`` are those that were read.
    """

    question: EncodedText
    context: EncodedText
    windows: tuple[Window, ...]
    logits: tuple[tuple[FloatArray, FloatArray], ...]
    settings: QaSettings
    decoded: Decoded
    ranking: Ranking | None = None


@dataclass(frozen=True, slots=True)
class Begun:
    """One question and its context, cut into windows: what ``begin`` makes and ``finish`` takes.

    ``windows`` are those to be read, ``ranking`` the scores of all where ``prefilter`` left some out.
    """

    question: EncodedText
    context: EncodedText
    windows: list[Window]
    ranking: Ranking | None = None


class Answerer:
    """Answers questions from contexts. Safe to share between threads, event loops and a forked child.

    Every method takes the options of ``Options`` as keywords: ``top_k``, ``max_answer_len``,
    ``max_seq_len``, ``doc_stride`` (tokens), ``align_to_words``, ``allow_no_answer``, ``prefilter`` (windows).
    """

    def __init__(
        self,
        encoder: Encoder,
        settings: QaSettings,
        model: LogitsModel,
        bundle: Bundle | None = None,
        *,
        context_cache_bytes: int = DEFAULT_CACHE_BYTES,
    ) -> None:
        self.encoder = encoder
        self.settings = settings
        self.model = model
        self.bundle = bundle
        self._contexts = ContextCache(encoder.encode, context_cache_bytes)
        threads = getattr(model, "threads", 1)
        self._chunk_pairs = max(_CHUNK_PAIRS, _CHUNK_PAIRS_A_THREAD * threads)
        self._aside = Aside(threads)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        device: str = "auto",
        threads: int | None = None,
        context_cache_bytes: int = DEFAULT_CACHE_BYTES,
    ) -> Answerer:
        """Loads a verified bundle folder.

        ``device`` is auto, cpu, cuda or cuda:N; ``threads`` bounds the CPU threads (default: all);
        ``context_cache_bytes`` bounds the memory that keeps tokenised contexts for further questions
        (default 64 MiB, 0 keeps none). Warns (MachineWarning) on a CPU of another kind than the bundle's session
        settings were measured on. Raises InputError (no such folder, options out of range), BundleError,
        DeviceError, MissingExtraError. On CUDA it captures the graphs of one window's run, about a second's work.
        """
        bundle = open_bundle(path)
        refuse_in_graph(bundle)
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
            longest=bundle.encoder.position_limit,
        )
        if ("token_type_ids" in model.inputs) != bool(bundle.encoder.segments):
            raise BundleError(f"{bundle.folder}: model and encoder disagree on token_type_ids: export the bundle again")
        if model.device == "cuda":  # the first question must not wait for the capturing of graphs
            asked, read = encoder.encode("what"), encoder.encode("warms up")
            model.warm_up(encoder.windows(asked, read, max_seq_len=bundle.settings.max_seq_len, doc_stride=0)[0])
        difference = machine().unlike(bundle.manifest.get("machine")) if model.device == "cpu" else ""
        if difference:
            warnings.warn(
                f"{bundle.folder}: this machine {difference}, unlike the one that its session settings were measured on: "
                f"qadeploy tune {bundle.folder} measures them again",
                MachineWarning,
                stacklevel=2,
            )
        return cls(encoder, bundle.settings, model, bundle, context_cache_bytes=context_cache_bytes)

    def __reduce__(self) -> NoReturn:
        raise TypeError("an Answerer cannot be pickled: load the bundle in each process, with Answerer.load")

    def stats(self) -> CacheStats:
        """How often a context was tokenised (``misses``) and how often it was at hand (``hits``), and what is kept."""
        return self._contexts.stats()

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
        prefilter: int | None = None,
        on_windows: OnWindows | None = None,
    ) -> list[Answer]:
        """The ``top_k`` best answers, best first; fewer where there are fewer.

        With ``allow_no_answer`` the null answer ("" at 0) competes: it is the first where its logit exceeds the
        best span's by more than the stored ``null_threshold`` (a bundle without one: by probability).
        ``prefilter=N`` reads only the N windows of a long context that share most with the question, by BM25.
        ``on_windows(done, of)`` is called before the first window and as the model goes on; what it raises ends the call.
        Raises InputError (empty or invalid text, options out of range), QuestionTooLongError,
        StrideError, LogitsError.
        """
        options = Options(top_k, max_answer_len, max_seq_len, doc_stride, align_to_words, allow_no_answer, prefilter)
        return to_answers(self.read(question, context, options, on_windows), options)

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
        prefilter: int | None = None,
    ) -> list[list[Answer]]:
        """``answer`` for many (question, context) pairs, in order. Errors name the pair, from 1."""
        options = Options(top_k, max_answer_len, max_seq_len, doc_stride, align_to_words, allow_no_answer, prefilter)
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
        prefilter: int | None = None,
    ) -> Iterator[list[Answer]]:
        """``answer`` for any iterable of pairs, lazily, in input order, in bounded memory."""
        options = Options(top_k, max_answer_len, max_seq_len, doc_stride, align_to_words, allow_no_answer, prefilter)
        return self._stream(pairs, options)

    async def aanswer(
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
        prefilter: int | None = None,
        on_windows: OnWindows | None = None,
    ) -> list[Answer]:
        """``answer`` for coroutines: tokenised, run and decoded in threads, so that the event loop never waits.

        Any number may be awaited at once, on any event loops; twice as many as the model has threads are worked on.
        Cancelled, a call does not begin, or stops before its next windows. ``on_windows`` is called in a thread. Raises what ``answer`` raises.
        """
        options = Options(top_k, max_answer_len, max_seq_len, doc_stride, align_to_words, allow_no_answer, prefilter)

        def work(run: Run) -> list[Answer]:
            begun = self.begin(question, context, options)
            return to_answers(self.finish(begun, self._run(begun.windows, run, on_windows), options), options)

        return await self._aside.ask(work, self.model.run, self.model.start)

    async def aanswer_batch(
        self,
        pairs: Iterable[Pair],
        *,
        top_k: int = 1,
        max_answer_len: int | None = None,
        max_seq_len: int | None = None,
        doc_stride: int | None = None,
        align_to_words: bool = False,
        allow_no_answer: bool = False,
        prefilter: int | None = None,
    ) -> list[list[Answer]]:
        """``answer_batch`` for coroutines; ``pairs`` are taken in a thread."""
        options = Options(top_k, max_answer_len, max_seq_len, doc_stride, align_to_words, allow_no_answer, prefilter)
        return [answers async for answers in self._aside.stream(self._stream(pairs, options))]

    def aanswer_stream(
        self,
        pairs: Iterable[Pair],
        *,
        top_k: int = 1,
        max_answer_len: int | None = None,
        max_seq_len: int | None = None,
        doc_stride: int | None = None,
        align_to_words: bool = False,
        allow_no_answer: bool = False,
        prefilter: int | None = None,
    ) -> AsyncGenerator[list[Answer], None]:
        """``answer_stream`` for coroutines, an async generator; ``pairs`` are taken in a thread. Closed early, it stops."""
        options = Options(top_k, max_answer_len, max_seq_len, doc_stride, align_to_words, allow_no_answer, prefilter)
        return self._aside.stream(self._stream(pairs, options))

    def read(self, question: str, context: str, options: Options, on_windows: OnWindows | None = None) -> Reading:
        """One question with everything on the way to its answers, for a trace."""
        begun = self.begin(question, context, options)
        return self.finish(begun, self._run(begun.windows, self.model.run, on_windows), options)

    def begin(self, question: str, context: str, options: Options, *, max_windows: int | None = None) -> Begun:
        """The first half of ``read``, for callers who run the windows by themselves: all that is done before the model.

        Raises what ``answer`` raises for its texts and options, TooManyWindowsError above ``max_windows``.
        """
        return self._encode(question, context, options, options.settings(self.settings), max_windows=max_windows)

    def finish(self, begun: Begun, logits: Sequence[tuple[FloatArray, FloatArray]], options: Options) -> Reading:
        """The second half of ``read``: from the logits of ``begun.windows``, in order. Raises LogitsError, InputError."""
        return self._decode([begun], logits, options, options.settings(self.settings))[0]

    def _run(self, windows: Sequence[Window], run: Run, on_windows: OnWindows | None) -> list[Logits]:
        """What ``run`` gives for the windows; in parts, between which it is said how many are done, where somebody listens."""
        if on_windows is None:
            return run(windows)
        on_cuda = getattr(self.model, "device", "cpu") == "cuda"
        size = _REPORTED_ON_CUDA if on_cuda else _REPORTED_A_THREAD * getattr(self.model, "threads", 1)
        logits: list[Logits] = []
        on_windows(0, len(windows))
        while len(logits) < len(windows):
            logits += run(windows[len(logits) : len(logits) + size])
            on_windows(len(logits), len(windows))
        return logits

    def read_stream(self, pairs: Iterable[Pair], options: Options) -> Iterator[Reading]:
        """``read`` for any iterable of pairs, lazily, in input order, in bounded memory. Errors name the pair, from 1."""
        return self._readings(pairs, options)

    def _stream(self, pairs: Iterable[Pair], options: Options) -> Iterator[list[Answer]]:
        return (to_answers(reading, options) for reading in self._readings(pairs, options))

    def _readings(self, pairs: Iterable[Pair], options: Options) -> Iterator[Reading]:
        """Chunk by chunk, the next one tokenised while the model works on the one before.

        An error in a chunk comes after the readings of those before it.
        """
        settings = options.settings(self.settings)
        chunks = self._begun(pairs, options, settings)
        running: tuple[list[Begun], Pending] | None = None
        failure: Exception | None = None
        following: tuple[list[Begun], Pending] | None = None
        try:
            while True:
                try:
                    following = next(chunks, None)
                except Exception as error:
                    failure = error
                if running is not None:
                    yield from self._decode(running[0], running[1].result(), options, settings)
                if failure is not None:
                    raise failure
                if following is None:
                    return
                running, following = following, None
        finally:
            for begun in (running, following):
                if begun is not None:
                    begun[1].cancel()

    def _begun(
        self, pairs: Iterable[Pair], options: Options, settings: QaSettings
    ) -> Iterator[tuple[list[Begun], Pending]]:
        done = 0
        for chunk in _chunks(pairs, self._chunk_pairs):
            begun = []
            # Of one chunk at least, each context is tokenised once.
            contexts, questions = self._ahead(chunk)
            for number, (question, context) in enumerate(chunk, done + 1):
                try:
                    one = self._encode(question, context, options, settings, contexts, questions)
                except InputError as error:
                    raise type(error)(f"pair {number}: {error}") from error
                begun.append(one)
            alone = not done and len(chunk) == 1  # awaited like a single question
            windows = [w for one in begun for w in one.windows]
            yield begun, Pending(partial(self.model.run, windows)) if alone else self.model.start(windows)
            done += len(chunk)

    def _ahead(self, chunk: Sequence[Pair]) -> tuple[dict[str, EncodedText], dict[str, EncodedText]]:
        """Contexts and questions of a chunk, tokenised on all cores where CUDA would wait for one; else empty.

        On a CPU the cores are the model's. A text that cannot be tokenised is left for ``_encode`` to name.
        """
        if getattr(self.model, "device", "cpu") != "cuda" or len(chunk) < 2:
            return {}, {}
        pairs = [pair for pair in chunk if all(isinstance(text, str) and text.strip() for text in pair)]
        try:
            contexts = self._contexts.ahead([context for _, context in pairs], self.encoder.encode_many)
            questions = list(dict.fromkeys(question for question, _ in pairs))
            return contexts, dict(zip(questions, self.encoder.encode_many(questions), strict=True))
        except InputError:
            return {}, {}

    def _encode(
        self,
        question: str,
        context: str,
        options: Options,
        settings: QaSettings,
        contexts: dict[str, EncodedText] | None = None,
        questions: Mapping[str, EncodedText] | None = None,
        max_windows: int | None = None,
    ) -> Begun:
        _check_text("question", question)
        _check_text("context", context)
        encoded = self._contexts.get(context, contexts)
        asked = (questions or {}).get(question) or self.encoder.encode(question)
        cut = self.encoder.cut(asked, encoded, max_seq_len=settings.max_seq_len, doc_stride=settings.doc_stride)
        ranking: Ranking | None = None
        begins: Sequence[int] = cut.begins
        if options.prefilter is not None and options.prefilter < len(cut.begins):
            ranking = rank(asked.ids, encoded.ids, cut, options.prefilter)
            begins = [cut.begins[i] for i in ranking.chosen]
        return Begun(asked, encoded, self.encoder.make(asked, encoded, cut, begins, max_windows), ranking)

    def _decode(
        self,
        begun: Sequence[Begun],
        logits: Sequence[tuple[FloatArray, FloatArray]],
        options: Options,
        settings: QaSettings,
    ) -> list[Reading]:
        scored, first = [], 0
        for one in begun:
            part = logits[first : first + len(one.windows)]
            first += len(part)
            scored.append(settings.scored(one.windows, [s for s, _ in part], [e for _, e in part], one.context))
        found = decode_many(
            scored,
            top_k=options.top_k,
            max_answer_len=settings.max_answer_len,
            align_to_words=options.align_to_words,
            allow_no_answer=options.allow_no_answer,
            temperature=settings.temperature,
        )
        return [
            Reading(
                one.question,
                one.context,
                tuple(one.windows),
                tuple(zip(own.start_logits, own.end_logits, strict=True)),
                settings,
                decoded,
                one.ranking,
            )
            for one, own, decoded in zip(begun, scored, found, strict=True)
        ]


def refuse_in_graph(bundle: Bundle) -> None:
    """Raises BundleError on a bundle whose graph does the Answerer's work itself; names the one to load."""
    if bundle.in_graph:
        raise BundleError(
            f"{bundle.folder}: its graph answers by itself ({bundle.in_graph} in the graph), for callers without qadeploy: "
            f"load the bundle that it was made from, {bundle.manifest['made']['from']}"
        )


def to_answers(reading: Reading, options: Options) -> list[Answer]:
    """The answers of a reading, best first, the null answer among them where it is allowed."""
    return rank_answers(
        reading.decoded,
        reading.context.text,
        top_k=options.top_k,
        allow_no_answer=options.allow_no_answer,
        null_threshold=reading.settings.null_threshold,
    )


def _chunks(pairs: Iterable[Pair], size: int) -> Iterator[list[Pair]]:
    chunk: list[Pair] = []
    characters = 0
    for number, pair in enumerate(pairs, 1):
        if not (isinstance(pair, tuple | list) and len(pair) == 2):
            raise InputError(f"pair {number}: is {type(pair).__name__}, a (question, context) pair is needed")
        chunk.append((pair[0], pair[1]))
        characters += len(pair[1]) if isinstance(pair[1], str) else 0
        if len(chunk) == size or characters >= _CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _check_text(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise InputError(f"{name} is {type(value).__name__}, text is needed")
    if not value.strip():
        raise InputError(f"{name} is empty: give it some text")
