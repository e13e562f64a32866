"""The answerer: questions and contexts in, answers out, for any model that turns windows into logits."""

from __future__ import annotations

import warnings
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NoReturn, Protocol, Unpack

from qadeploy.core.bm25 import rank_parts
from qadeploy.core.decoding import decode
from qadeploy.core.encoded_text import EncodedText
from qadeploy.core.passages import JoinedText, passage_windows
from qadeploy.core.settings import AnswerOptions, Options, QaSettings
from qadeploy.core.windows import Encoder
from qadeploy.errors import BundleError, DataError, InputError, LogitsError, MachineWarning, QuestionTooLongError
from qadeploy.inference.aio import AnswerThreads, RunWindows
from qadeploy.inference.bundle import MODEL, Bundle, default_bundle, open_bundle
from qadeploy.inference.context_cache import DEFAULT_CACHE_BYTES, CacheStats, ContextCache
from qadeploy.inference.load_timeout import within
from qadeploy.inference.pairs import (
    Asked,
    DecodedPair,
    EncodedPair,
    Texts,
    check_passages,
    check_text,
    chunks_of,
    one_of,
    texts_of,
    to_answers,
    warn_of_skipped,
)
from qadeploy.inference.probe import prove
from qadeploy.inference.session import OnnxModel, Pending
from qadeploy.machine import machine, saturation_warning
from qadeploy.records import Answer, Example, Logits, Window

Pair = tuple[str, str]
OnWindows = Callable[[int, int], object]
# Windows between two calls of on_windows: per thread of the model on a CPU, in all on CUDA, which runs them in batches.
_REPORTED_PER_THREAD, _REPORTED_ON_CUDA = 8, 128
# Pairs per chunk: enough to keep each thread busy for a while. Two chunks are held at a time.
_CHUNK_PAIRS, _CHUNK_PAIRS_PER_THREAD = 32, 8


class LogitsModel(Protocol):
    """What an answerer needs of a model."""

    def run(self, windows: Sequence[Window]) -> list[Logits]:
        """Start and end logits of each window, float32 ``[tokens]`` each, in order."""
        ...

    def start(self, windows: Sequence[Window]) -> Pending:
        """Starts to run windows and returns at once, so that the caller can prepare the next ones; by default they run later."""
        return Pending(partial(self.run, windows))


class Answerer:
    """Answers questions from contexts. Threads, event loops and a forked child may share it.

    Every method that answers takes ``AnswerOptions`` as keywords.

    Args:
        encoder: Turns a question and a context into windows.
        settings: The defaults of every call: lengths in tokens, null threshold, temperature.
        model: Turns windows into start and end logits.
        bundle: The bundle that the other arguments come from, if any.
        context_cache_bytes: Bytes of tokenised contexts to keep for further questions; 0 keeps none.

    Raises:
        InputError: ``context_cache_bytes`` is not a whole number of at least 0.

    Example:
        >>> answerer = Answerer.load("bundles/handbook-int8")
        >>> answers = answerer.answer("Who trims the light?", "Mungo Strand trims the light.", top_k=3)
        >>> answers[0].text, answers[0].start, answers[0].end
        ('Mungo Strand', 0, 12)
        >>> found = answerer.answer("Who trims the light?", contexts=["The light is red.", "Mungo Strand trims the light."])
        >>> found[0].text, found[0].passage
        ('Mungo Strand', 1)
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
        self._chunk_pairs = max(_CHUNK_PAIRS, _CHUNK_PAIRS_PER_THREAD * threads)
        self._answer_threads = AnswerThreads(threads)

    @classmethod
    def load(
        cls,
        path: str | Path | None = None,
        *,
        device: str = "auto",
        threads: int | None = None,
        context_cache_bytes: int = DEFAULT_CACHE_BYTES,
        sha256: str | None = None,
        revision: str | None = None,
        load_timeout: float | None = None,
    ) -> Answerer:
        """Loads a bundle, verifies all of its files, and checks the model on the question whose logits the manifest stores.

        On CUDA it also captures graphs, which takes about a second.

        Args:
            path: The bundle folder, or ``hub:ORG/NAME`` for one on the hub; None uses the newest under ``bundles/`` or, if there
                is none, the one that qadeploy ships.
            device: auto, cpu, cuda or cuda:N.
            threads: The largest number of CPU threads; None uses all CPUs.
            context_cache_bytes: Bytes of tokenised contexts to keep for further questions; 0 keeps none.
            sha256: The SHA-256 of the expected ``manifest.json`` (from ``sha256sum``); any other bundle is refused.
            revision: The branch, tag or commit of a bundle on the hub; None uses main.
            load_timeout: Seconds that loading may take; None sets no limit. See LoadTimeoutError for what keeps running.

        Raises:
            InputError: The folder does not exist, or an argument is out of range.
            BundleError: The bundle is incomplete, damaged, unsafe or not the expected one, or its model is not the exported one.
            DeviceError: The device was requested but is not available.
            HubError: The hub cannot be reached, lacks the bundle or refuses the token.
            LoadTimeoutError: Loading took longer than ``load_timeout``.
            MissingExtraError: ONNX Runtime or, for a bundle on the hub, huggingface_hub is not installed.

        Warns:
            MachineWarning: The bundle's session settings were measured on another kind of CPU.
        """
        path = default_bundle() if path is None else path
        load = partial(cls._load, path, device, threads, context_cache_bytes, sha256, revision)
        answerer, warning = within(load_timeout, load, path)
        if warning:
            warnings.warn(f"{path}: {warning}", MachineWarning, stacklevel=2)
        return answerer

    @classmethod
    def _load(
        cls,
        path: str | Path,
        device: str,
        threads: int | None,
        context_cache_bytes: int,
        sha256: str | None,
        revision: str | None,
    ) -> tuple[Answerer, str]:
        """The answerer of a bundle, and a warning or ""."""
        bundle = open_bundle(path, sha256=sha256, revision=revision)
        refuse_in_graph(bundle)
        encoder = bundle.load_encoder()
        model = OnnxModel(
            lambda: bundle.read(MODEL),
            device=device,
            threads=threads,
            pad_token_id=bundle.encoder.pad_token_id,
            settings=bundle.checked.session,
            longest=bundle.encoder.position_limit,
        )
        if ("token_type_ids" in model.inputs) != bool(bundle.encoder.segments):
            raise BundleError(f"{bundle.folder}: model and encoder disagree on token_type_ids: export the bundle again")
        prove(bundle, encoder, model)
        if model.device == "cuda":  # so that the first question does not wait for graphs to be captured
            question, context = encoder.encode("what"), encoder.encode("warms up")
            model.warm_up(encoder.windows(question, context, max_seq_len=bundle.settings.max_seq_len, doc_stride=0)[0])
        warning = _machine_warning(bundle) if model.device == "cpu" else ""
        return cls(encoder, bundle.settings, model, bundle, context_cache_bytes=context_cache_bytes), warning

    def __reduce__(self) -> NoReturn:
        raise TypeError("an Answerer cannot be pickled: load the bundle in each process, with Answerer.load")

    def stats(self) -> CacheStats:
        """The counters of the context cache: ``hits``, ``misses``, and the ``entries`` and ``bytes`` in it."""
        return self._contexts.stats()

    def require_room(self, examples: Sequence[Example], source: str) -> None:
        """Checks, before many questions are answered, that each leaves room for its context.

        Args:
            examples: The questions.
            source: Where they come from, for the message.

        Raises:
            DataError: Some questions leave no room; the message names all of them.
        """
        problems = []
        questions = self.encoder.encode_many([e.question for e in examples])
        for number, (example, question) in enumerate(zip(examples, questions, strict=True), 1):
            try:
                self.encoder.room(question, self.settings.max_seq_len)
            except QuestionTooLongError as error:
                problems.append(f"{source}: question {number} (id {example.id}), field question: {error}")
        if problems:
            raise DataError(problems)

    def answer(
        self,
        question: str,
        context: str | None = None,
        *,
        contexts: Sequence[str] | None = None,
        on_windows: OnWindows | None = None,
        **options: Unpack[AnswerOptions],
    ) -> list[Answer]:
        """Answers one question from one context, or from several passages together.

        Passages are read like the windows of one long context: one ranking, one softmax over the spans of all passages, and one
        null answer. So scores compare across passages. Empty passages are skipped with a DataWarning that names their indices.

        Args:
            question: The question.
            context: The text to answer it from, of any length.
            contexts: Passages to answer it from, instead of ``context``: any number, each of any length.
            on_windows: Called as ``on_windows(done, total)``, first and as windows are done. If it raises, the call ends.
            **options: See ``AnswerOptions``. If "no answer" competes, it comes first when its logit exceeds that of the best
                span by more than the stored ``null_threshold`` (0 without one).

        Returns:
            Up to ``top_k`` answers, best first. ``start`` and ``end`` count code points (see ``offsets``) of the context, or of
            the passage with the index ``passage``.

        Raises:
            InputError: A text or every passage is empty or invalid, both or neither of ``context`` and ``contexts`` are given, or
                an option is out of range.
            QuestionTooLongError: The question leaves no room for the context.
            StrideError: ``doc_stride`` is at least ``max_seq_len``, and the context needs several windows.
            LogitsError: The model returned NaN or infinite logits.
        """
        chosen = Options(**options)
        pair = self.read(question, one_of(context, contexts), chosen, on_windows)
        warn_of_skipped(pair.skipped)
        return to_answers(pair, chosen)

    def answer_batch(self, pairs: Iterable[Asked], **options: Unpack[AnswerOptions]) -> list[list[Answer]]:
        """Answers many (question, context) pairs, in order.

        Args:
            pairs: (question, context) pairs; a list of passages may replace the context.
            **options: See ``AnswerOptions``.

        Returns:
            The answers of each pair, as ``answer`` returns them.

        Raises:
            QadeployError: As ``answer`` does; the message names the pair, counted from 1.
        """
        return list(self.answer_stream(pairs, **options))

    def answer_stream(self, pairs: Iterable[Asked], **options: Unpack[AnswerOptions]) -> Iterator[list[Answer]]:
        """``answer_batch`` for an iterable of any length: lazy, in order, in bounded memory."""
        chosen = Options(**options)
        return (_answers_of(pair, chosen, number) for number, pair in enumerate(self.read_stream(pairs, chosen), 1))

    async def aanswer(
        self,
        question: str,
        context: str | None = None,
        *,
        contexts: Sequence[str] | None = None,
        on_windows: OnWindows | None = None,
        **options: Unpack[AnswerOptions],
    ) -> list[Answer]:
        """``answer`` for coroutines: tokenises, runs and decodes in threads, so the event loop never waits.

        Any number of calls may be awaited at once, on any event loops; at most twice as many as the model has threads run at a
        time. A cancelled call stops before its next windows. ``on_windows`` is called in a thread. Raises as ``answer``.
        """
        chosen, texts = Options(**options), one_of(context, contexts)

        def work(run: RunWindows) -> list[Answer]:
            pair = self.encode(question, texts, chosen)
            warn_of_skipped(pair.skipped)
            return to_answers(self.decode(pair, self._run(pair.windows, run, on_windows), chosen), chosen)

        return await self._answer_threads.run(work, self.model.run, self.model.start)

    async def aanswer_batch(self, pairs: Iterable[Asked], **options: Unpack[AnswerOptions]) -> list[list[Answer]]:
        """``answer_batch`` for coroutines; a thread iterates over ``pairs``."""
        return [answers async for answers in self.aanswer_stream(pairs, **options)]

    def aanswer_stream(
        self, pairs: Iterable[Asked], **options: Unpack[AnswerOptions]
    ) -> AsyncGenerator[list[Answer], None]:
        """``answer_stream`` for coroutines: an async generator; a thread iterates over ``pairs``. It stops when closed early."""
        return self._answer_threads.stream(self.answer_stream(pairs, **options))

    def read(self, question: str, context: Texts, options: Options, on_windows: OnWindows | None = None) -> DecodedPair:
        """``answer`` for a context or passages, but returns the windows, logits and spans that answers are made from."""
        pair = self.encode(question, context, options)
        return self.decode(pair, self._run(pair.windows, self.model.run, on_windows), options)

    def encode(self, question: str, context: Texts, options: Options, *, max_windows: int | None = None) -> EncodedPair:
        """The first step of ``read``, for callers that run the windows themselves.

        Args:
            question: The question.
            context: The context, or the passages.
            options: The options of this call.
            max_windows: The largest number of windows allowed, in all passages together.

        Raises:
            InputError: As ``answer`` does for its texts and options.
            TooManyWindowsError: There would be more than ``max_windows``.
        """
        return self._encode(question, context, options, options.settings(self.settings), max_windows=max_windows)

    def decode(self, pair: EncodedPair, logits: Sequence[Logits], options: Options) -> DecodedPair:
        """The last step of ``read``, from the logits of ``pair.windows``, in order. Raises LogitsError."""
        settings = pair.settings
        scored = settings.window_logits(pair.windows, [s for s, _ in logits], [e for _, e in logits], pair.context)
        decoded = decode(
            scored,
            top_k=options.top_k,
            max_answer_len=settings.max_answer_len,
            align_to_words=options.align_to_words,
            allow_no_answer=options.null_competes(settings),
            temperature=settings.temperature,
            most_overlap=options.most_overlap,
        )
        encoded = (pair.question, pair.context, pair.windows, pair.ranking, settings, pair.skipped)
        return DecodedPair(*encoded, scored=scored, decoded=decoded)

    def _run(self, windows: Sequence[Window], run: RunWindows, on_windows: OnWindows | None) -> list[Logits]:
        """The logits of the windows; with ``on_windows`` they run in parts, and it is called between parts."""
        if on_windows is None:
            return run(windows)
        on_cuda = getattr(self.model, "device", "cpu") == "cuda"
        size = _REPORTED_ON_CUDA if on_cuda else _REPORTED_PER_THREAD * getattr(self.model, "threads", 1)
        logits: list[Logits] = []
        on_windows(0, len(windows))
        while len(logits) < len(windows):
            logits += run(windows[len(logits) : len(logits) + size])
            on_windows(len(logits), len(windows))
        return logits

    def read_stream(self, pairs: Iterable[Asked], options: Options) -> Iterator[DecodedPair]:
        """``read`` for an iterable of pairs: lazy, in order, in bounded memory. Errors name the pair, counted from 1.

        It works chunk by chunk, and tokenises the next chunk while the model runs the current one. An error in a chunk is
        raised after the results of the chunks before it.
        """
        chunks = self._started(pairs, options, options.settings(self.settings))
        running: tuple[list[EncodedPair], Pending] | None = None
        following: tuple[list[EncodedPair], Pending] | None = None
        failure: Exception | None = None
        done = 0
        try:
            while True:
                try:
                    following = next(chunks, None)
                except Exception as error:
                    failure = error
                if running is not None:
                    yield from self._decode_chunk(running[0], running[1].result(), options, done)
                    done += len(running[0])
                if failure is not None:
                    raise failure
                if following is None:
                    return
                running, following = following, None
        finally:
            for started in (running, following):
                if started is not None:
                    started[1].cancel()

    def _started(
        self, pairs: Iterable[Asked], options: Options, settings: QaSettings
    ) -> Iterator[tuple[list[EncodedPair], Pending]]:
        """Yields chunks of encoded pairs, each with its windows started."""
        done = 0
        for chunk in chunks_of(pairs, self._chunk_pairs):
            encoded = []
            # Even without a cache, each context of a chunk is tokenised once.
            contexts, questions = self._tokenise_ahead(chunk)
            for number, (question, context) in enumerate(chunk, done + 1):
                try:
                    encoded.append(self._encode(question, context, options, settings, contexts, questions))
                except InputError as error:
                    raise type(error)(f"pair {number}: {error}") from error
            alone = not done and len(chunk) == 1  # its caller waits for it, as for a single question
            windows = [w for pair in encoded for w in pair.windows]
            yield encoded, Pending(partial(self.model.run, windows)) if alone else self.model.start(windows)
            done += len(chunk)

    def _tokenise_ahead(self, chunk: Sequence[Asked]) -> tuple[dict[str, EncodedText], dict[str, EncodedText]]:
        """On CUDA, the contexts and questions of a chunk, tokenised on all cores; empty on a CPU.

        On a CPU the model needs the cores. ``_encode`` reports a text that cannot be tokenised.
        """
        if getattr(self.model, "device", "cpu") != "cuda" or len(chunk) < 2:
            return {}, {}
        given = [text for _, texts in chunk for text in texts_of(texts)]
        asked = [text for question, _ in chunk for text in texts_of(question)]
        try:
            contexts = self._contexts.ahead(given, self.encoder.encode_many)
            questions = list(dict.fromkeys(asked))
            return contexts, dict(zip(questions, self.encoder.encode_many(questions), strict=True))
        except InputError:
            return {}, {}

    def _encode(
        self,
        question: str,
        context: Texts,
        options: Options,
        settings: QaSettings,
        contexts: dict[str, EncodedText] | None = None,
        questions: Mapping[str, EncodedText] | None = None,
        max_windows: int | None = None,
    ) -> EncodedPair:
        check_text("question", question)
        if isinstance(context, list | tuple):
            numbers = check_passages(context)
            asked = (questions or {}).get(question) or self.encoder.encode(question)
            joined = JoinedText([self._passage(context, number, contexts) for number in numbers], numbers)
            windows, ranking = passage_windows(
                self.encoder, asked, joined, settings.lengths, prefilter=options.prefilter, max_windows=max_windows
            )
            skipped = tuple(sorted({*range(len(context))} - {*numbers}))
            return EncodedPair(asked, joined, windows, ranking, settings, skipped)
        context = check_text("context", context)
        encoded = self._contexts.get(context, contexts)
        asked = (questions or {}).get(question) or self.encoder.encode(question)
        cut = self.encoder.cut(asked, encoded, **settings.lengths)
        ranking = None
        begins: Sequence[int] = cut.begins
        if options.prefilter is not None and options.prefilter < len(cut.begins):
            ranking = rank_parts(asked.ids, encoded.ids, *cut.parts(), options.prefilter)
            begins = [cut.begins[i] for i in ranking.chosen]
        windows = self.encoder.make(asked, encoded, cut, begins, max_windows)
        return EncodedPair(asked, encoded, windows, ranking, settings)

    def _passage(self, passages: Sequence[str], number: int, contexts: dict[str, EncodedText] | None) -> EncodedText:
        try:
            return self._contexts.get(passages[number], contexts)
        except InputError as error:
            raise type(error)(f"contexts[{number}]: {error}") from error

    def _decode_chunk(
        self, pairs: Sequence[EncodedPair], logits: Sequence[Logits], options: Options, done: int
    ) -> Iterator[DecodedPair]:
        """``decode`` for the pairs that follow ``done`` others. A LogitsError names its pair."""
        first = 0
        for number, pair in enumerate(pairs, done + 1):
            try:
                decoded = self.decode(pair, logits[first : first + len(pair.windows)], options)
            except LogitsError as error:
                raise LogitsError(f"pair {number}: {error}") from error
            yield decoded
            first += len(pair.windows)


def refuse_in_graph(bundle: Bundle) -> None:
    """Raises BundleError, naming the bundle to load instead, if the graph of a bundle decodes answers itself."""
    if bundle.in_graph:
        raise BundleError(
            f"{bundle.folder}: its graph answers by itself ({bundle.in_graph} in the graph), for callers without qadeploy: "
            f"load the bundle that it was made from, {bundle.manifest['made']['from']}"
        )


def _answers_of(pair: DecodedPair, options: Options, number: int) -> list[Answer]:
    """The answers of one pair of a stream; warns about skipped passages."""
    warn_of_skipped(pair.skipped, f"pair {number}: ")
    return to_answers(pair, options)


def _machine_warning(bundle: Bundle) -> str:
    """A warning if the bundle was made for another CPU than this one, or ""."""
    saturation = saturation_warning(bundle.manifest)
    difference = machine().unlike(bundle.manifest.get("machine"))  # without that entry the settings are for any machine
    settings = difference and (
        f"this machine {difference}, unlike the one on which its session settings were measured: "
        f"qadeploy tune {bundle.folder} measures them again"
    )
    return "; ".join(filter(None, (saturation, settings)))
