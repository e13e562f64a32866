"""One queue of windows for all requests.

    submit ─► search, encode (threads, one question at a time) ─► windows wait ─► workers run them ─► decode ─► Job.future

The first four windows of each request run in order of arrival: for similar sizes no other order has a better tail latency
(Wierman and Zwart 2012, "Is tail-optimal scheduling possible?"). Further windows, of a long document or a large batch, wait in
a second line, where the earliest deadline goes first: if documents took turns, an overload would make all of them late.
The second line gets every fourth turn, and every turn that the first line does not need. So a long document never blocks a
short question, and finishes under any load of short ones.
No window waits for a batch to fill: a free worker takes what is there. On a CPU each worker runs one unpadded window on one
thread, which is fastest there; on CUDA it runs a batch of windows of similar length, within a budget of tokens.

The queue is limited by the number of questions and by the waiting time: the tokens in the first line divided by the recent
tokens per second. A request with more than four windows is refused if it would be late, or would make an accepted request late.
A request that can no longer be in time, because it has more tokens than estimated or the machine is slower, is refused then.
"""

from __future__ import annotations

import math
import threading
import time
from bisect import insort
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice
from operator import attrgetter
from typing import Any

from qadeploy.core.settings import Options
from qadeploy.corpus.records import Passage
from qadeploy.errors import InputError
from qadeploy.inference.answerer import Answerer
from qadeploy.inference.pairs import COMPARED, DecodedPair, EncodedPair, Texts
from qadeploy.records import Logits, Window
from qadeploy.serve.cost import Speed, TokenRatios, window_tokens
from qadeploy.serve.errors import RefusedError
from qadeploy.serve.metrics import Metrics
from qadeploy.serve.settings import Settings

_FRONT = 4  # windows of a request that run in order of arrival
_BACK_EVERY = 4  # in every fourth turn the second line goes first
_LIKE = 1.25  # lengths up to this ratio share a batch, so padding is at most a fifth
_SLACK = 0.9  # a new document must be answered within this share of its time, because the speed varies
# A document of which at most four windows have run must be in time even at 4/5 of the speed. A document of which more have run
# is given up only if it would be late even at 5/4 of the speed, because the work on it would be lost.
_BEFORE, _BEGUN = 1.25, 0.8
_TRIED = 16  # windows that a document may run before it is given up, if it arrived at an idle server
_ENCODERS = 32  # the largest number of threads that tokenise
_PASSAGE = 150.0  # the initial average of the tokens of a passage that a search finds
_LEARN = 0.1  # the weight of a new question's passages in that average


@dataclass(frozen=True, slots=True)
class Ask:
    """One question on one context, or on passages, with its options and its ``number`` in the request, from 0.

    An encoder thread calls ``search``, if there is one, and replaces this Ask by the result, with passages in ``found``.
    """

    question: str
    context: Texts
    options: Options
    search: Callable[[Ask], Ask] | None = None
    found: tuple[Passage, ...] = ()
    number: int = 0

    @property
    def texts(self) -> Sequence[str]:
        """The context alone, or the passages."""
        return [self.context] if isinstance(self.context, str) else self.context


Render = Callable[[Ask, DecodedPair | None], Any]  # None if a search found nothing to read
Watch = Callable[[DecodedPair | None, Options], object]


@dataclass(slots=True, eq=False)
class _Question:
    """One question of a job: its number, its windows, their logits so far, and how many windows are left to run."""

    number: int
    pair: EncodedPair | None
    windows: Sequence[Window]
    logits: list[Logits | None]
    left: int


@dataclass(slots=True, eq=False)
class Job:
    """One request. The result of ``future`` is a list of what ``render`` returned for each question, in order.

    ``future`` raises what answering raises, and RefusedError if the deadline passed or the job was dropped.
    """

    asks: list[Ask]
    render: Render
    deadline: float
    arrived: float
    future: Future[list[Any]] = field(default_factory=Future)
    waiting: deque[tuple[_Question, int]] = field(default_factory=deque)
    results: list[Any] = field(default_factory=list)
    encoded: int = 0  # questions
    done: int = 0
    windows: int = 0
    taken: int = 0  # windows that have begun to run
    guesses: list[int] = field(default_factory=list)  # estimated tokens of each question
    guess: int = 0  # estimated tokens of the questions that are not encoded yet
    near: int = 0  # tokens waiting in the first line
    tokens: int = 0  # tokens waiting
    long: bool = False  # it has more than _FRONT windows, or is estimated to
    alone: bool = False  # the server was idle when it arrived
    over: bool = False


_Unit = tuple[Job, _Question, int]
_DEADLINE = attrgetter("deadline")


class Scheduler:
    """Runs the windows of many requests on ``workers`` threads. Thread-safe.

    Args:
        answerer: Encodes, runs and decodes.
        metrics: Counts what happens.
        settings: ``max_queue``, ``max_wait``, ``max_windows`` and ``max_batch_tokens`` bound the queue and batches.
        workers: Threads that run windows.
        batched: Whether windows run in batches of at most ``max_batch_tokens`` tokens, or one by one.
        tokens_per_second: The initial speed of all workers together, until it is measured.
        watch: Called with each decoded question, in a worker thread.

    Attributes:
        questions: How many questions wait or run.
        windows: How many windows wait.
        tokens: How many tokens wait; estimated for texts that are not tokenised yet.
    """

    def __init__(
        self,
        answerer: Answerer,
        metrics: Metrics,
        settings: Settings,
        *,
        workers: int,
        batched: bool = False,
        tokens_per_second: float = 10_000.0,
        watch: Watch = lambda *_: None,
    ) -> None:
        self._answerer = answerer
        self._watch = watch
        self._metrics = metrics
        self._settings = settings
        self._batched = batched
        self._padded = "attention_mask" in getattr(answerer.model, "inputs", ())
        self._longest = answerer.settings.max_seq_len
        self.workers = workers
        self._ready = threading.Condition()  # guards all that follows
        self._jobs: dict[Job, None] = {}  # oldest first
        self._front: dict[Job, None] = {}  # jobs with waiting windows among their first four, in order of arrival
        self._back: list[Job] = []  # all long jobs, the earliest deadline first
        self._speed = Speed(tokens_per_second, max(1, workers))
        self._ratios = TokenRatios()
        self._passage = _PASSAGE
        self._turn = 0
        self.questions = self.tokens = self._near = self.windows = 0
        self._closed = False
        self._encoders = ThreadPoolExecutor(min(max(2, workers), _ENCODERS), thread_name_prefix="encode")
        self._threads = [threading.Thread(target=self._work, name=f"run-{i}", daemon=True) for i in range(workers)]
        for thread in self._threads:
            thread.start()

    @property
    def alive(self) -> bool:
        """Whether all workers are running."""
        return not self._closed and all(thread.is_alive() for thread in self._threads)

    @property
    def idle(self) -> bool:
        """Whether no request waits or runs."""
        return not self._jobs

    @property
    def wait(self) -> float:
        """Seconds until the first windows of a new request would run, at the recent speed."""
        share = 1 - 1 / _BACK_EVERY if self._back else 1
        return self._near / (share * self._speed.all)

    def submit(self, asks: Sequence[Ask], render: Render, *, timeout: float) -> Job:
        """Queues a request and returns at once.

        Args:
            asks: The questions.
            render: Turns each decoded question into a result; called in a worker thread.
            timeout: Seconds that the request may take.

        Raises:
            RefusedError: The queue is full (429, with the seconds after which it has room), or closed (503).
        """
        now = time.monotonic()
        job = Job(list(asks), render, now + timeout, now, results=[None] * len(asks))
        guesses = [self._guess(ask) for ask in asks]
        job.guesses = [tokens for _, tokens in guesses]
        job.guess = sum(job.guesses)
        job.long = sum(windows for windows, _ in guesses) > _FRONT
        job.future.set_running_or_notify_cancel()  # so that nobody else can cancel the future
        with self._ready:
            if self._closed:
                raise RefusedError(503, "closing", "the server is shutting down", retry_after=1)
            self._admit(job, timeout)
            self._jobs[job] = None
            if job.long:
                insort(self._back, job, key=_DEADLINE)
            self.questions += len(asks)
            self._add(job, job.guess, 0)
            self._recount(job)
            self._encoders.submit(self._encode, job)
        return job

    def _admit(self, job: Job, timeout: float) -> None:
        """Raises RefusedError (429) if a job would wait too long, or make another late. An idle server accepts any job."""
        job.alone = not self._jobs
        if job.alone:
            return
        self._give_up()
        wait, questions, settings = self.wait, self.questions, self._settings
        if questions + len(job.asks) > settings.max_queue:
            raise _full(f"{questions} questions wait or run", settings.max_queue, "max_queue", wait)
        if wait > settings.max_wait:
            raise _full(f"the wait is {wait:.1f} seconds", settings.max_wait, "max_wait", wait - settings.max_wait)
        if job.long:
            job.tokens = job.guess
            line = sorted([*self._back, job], key=_DEADLINE)
            excess = max((seconds for _, seconds in self._hopeless(line)), default=0.0)
            job.tokens = 0
            if excess > 0:
                raise _too_long(timeout, excess)

    def _hopeless(self, line: Iterable[Job]) -> Iterator[tuple[Job, float]]:
        """Yields the long jobs that would be late, and by how many seconds, if the jobs in ``line`` run one after the other."""
        now = time.monotonic()
        speed = self._speed.left(now, 1 / _BACK_EVERY)
        ahead = self.tokens - sum(job.tokens for job in self._back)  # short requests
        for job in line:
            if not job.tokens:  # no window is waiting
                continue
            own = job.tokens * (_BEFORE if job.taken <= _FRONT else _BEGUN)
            left = (job.deadline - now) * (1 if job in self._jobs else _SLACK)
            excess = (ahead + own) / speed - left
            if excess > 0 and not (job.alone and job.taken < _TRIED):
                yield job, excess
            else:
                ahead += job.tokens

    def _give_up(self) -> None:
        """Refuses the long jobs that cannot be answered in time."""
        for job, excess in list(self._hopeless(self._back)):
            timeout = job.deadline - job.arrived
            self._metrics.dropped.labels("full").inc()
            self.end(job, _too_long(timeout, excess))

    def close(self) -> None:
        """Ends the workers. Unfinished jobs are refused (503)."""
        with self._ready:
            self._closed = True
            left = list(self._jobs)
            self._ready.notify_all()
        for job in left:
            self.end(
                job, RefusedError(503, "closing", "the server shut down before there was an answer", retry_after=1)
            )
        self._encoders.shutdown(wait=True, cancel_futures=True)
        for thread in self._threads:
            thread.join()

    def _recount(self, job: Job) -> None:
        """Updates the number of tokens that a job has in the first line."""
        places = max(_FRONT - job.taken, 0)
        first = [len(question.windows[i]) for question, i in islice(job.waiting, places)]
        near = sum(first) + min(job.guess, (places - len(first)) * self._longest)
        self._near += near - job.near
        job.near = near

    def _add(self, job: Job, tokens: int, windows: int) -> None:
        job.tokens += tokens
        self.tokens += tokens
        self.windows += windows

    def _guess(self, ask: Ask) -> tuple[int, int]:
        """Estimates the number of windows of a question that is not tokenised yet, and of the tokens in them."""
        question = self._ratios.tokens(ask.question)
        most = min(ask.options.prefilter or self._settings.max_windows, self._settings.max_windows)
        try:
            settings = ask.options.settings(self._answerer.settings)
        except InputError:  # raised again by ``_encode``
            return 1, 0
        special = self._answerer.encoder.special_tokens
        contexts = [self._ratios.tokens(text) for text in ask.texts if text.strip()]
        if ask.search:
            contexts = [self._passage] * self._settings.corpus_passages
        guesses = [window_tokens(question, context, special, settings, most) for context in contexts]
        windows, tokens = (sum(each) for each in zip(*guesses, strict=True)) if guesses else (1, 0)
        return min(windows, most), tokens if windows <= most else math.ceil(tokens * most / windows)

    # ------------------------------------------------------------ texts to windows

    def _encode(self, job: Job) -> None:
        """Searches for and encodes the next question of a job, then queues the following one behind those of other jobs."""
        if job.over or self._late(job):
            return
        ask, number = job.asks[job.encoded], job.encoded
        started = time.monotonic()
        try:
            if ask.search:
                ask = job.asks[number] = ask.search(ask)
                self._metrics.stage("search", time.monotonic() - started)
                started = time.monotonic()
            room = max(self._settings.max_windows - job.windows, 0)
            pair = (
                self._answerer.encode(ask.question, ask.context, ask.options, max_windows=room) if ask.texts else None
            )
        except Exception as error:
            if isinstance(error, InputError | RefusedError) and len(job.asks) > 1:
                error.args = (f"question {number + 1}: {error}",)
            self.end(job, error)
            return
        if pair:
            self._metrics.stage("tokenize", time.monotonic() - started)
        windows: Sequence[Window] = pair.windows if pair else ()
        question = _Question(number, pair, windows, [None] * len(windows), len(windows))
        with self._ready:
            if pair:
                self._ratios.learn("".join(ask.texts), len(pair.context))
            if pair and ask.found:
                self._passage += _LEARN * (len(pair.context) / len(ask.found) - self._passage)
            if job not in self._jobs:  # the job ended meanwhile
                return
            job.encoded += 1
            job.windows += question.left
            job.guess -= job.guesses[number]
            job.waiting.extend((question, i) for i in range(question.left))
            self._add(job, sum(len(w) for w in windows) - job.guesses[number], question.left)
            self._recount(job)
            if job.taken < _FRONT:
                self._front[job] = None
            if job.windows > _FRONT and not job.long:
                job.long = True
                insort(self._back, job, key=_DEADLINE)
            self._give_up()
            if job not in self._jobs:
                return
            self._ready.notify(question.left)
            if job.encoded < len(job.asks) and not self._closed:
                self._encoders.submit(self._encode, job)
        if not windows:
            self._decode(job, question)

    # ------------------------------------------------------------ windows to logits

    def _work(self) -> None:
        while batch := self._take():
            self._run(batch)

    def _take(self) -> list[_Unit]:
        """Waits for windows and returns the next ones to run; an empty list if the scheduler was closed."""
        with self._ready:
            while not self._closed:
                self._give_up()
                self._turn += 1
                lines: list[Iterable[Job]] = [self._front, self._back]
                if self._turn % _BACK_EVERY == 0:
                    lines.reverse()
                first = self._first(lines)
                if first is not None:
                    unit = self._pop(first)
                    return self._fill(unit, lines) if self._batched else [unit]
                self._ready.wait()
        return []

    def _first(self, lines: Sequence[Iterable[Job]]) -> Job | None:
        """The next job with waiting windows. Ends late jobs on the way."""
        while (job := next((job for line in lines for job in line if job.waiting), None)) and self._late(job):
            pass
        return job

    def _pop(self, job: Job) -> _Unit:
        question, i = job.waiting.popleft()
        if not job.taken:
            self._metrics.stage("queue", time.monotonic() - job.arrived)
        job.taken += 1
        if job.taken >= _FRONT or not job.waiting:
            self._front.pop(job, None)
        self._add(job, -len(question.windows[i]), -1)
        self._recount(job)
        return job, question, i

    def _fill(self, first: _Unit, lines: Sequence[Iterable[Job]]) -> list[_Unit]:
        """A batch of ``first`` and the next windows of similar length, within the budget of tokens."""
        batch = [first]
        least = most = len(_window(first))
        for line in lines:
            for job in list(line):
                while job.waiting and (line is self._back or job in self._front) and not self._late(job):
                    question, i = job.waiting[0]
                    size = len(question.windows[i])
                    low, high = min(least, size), max(most, size)
                    alike = high <= _LIKE * low if self._padded else high == low
                    if not alike or high * (len(batch) + 1) > self._settings.max_batch_tokens:
                        break
                    batch.append(self._pop(job))
                    least, most = low, high
        return batch

    def _run(self, batch: list[_Unit]) -> None:
        windows = [_window(unit) for unit in batch]
        started = time.monotonic()
        try:
            model: Any = self._answerer.model
            # On a GPU, ``run`` chooses the faster method for the number of windows.
            padded = self._batched and getattr(model, "device", "cpu") == "cpu"
            logits = model.run_batch(windows) if padded else model.run(windows)
        except Exception as error:
            for job in {id(job): job for job, _, _ in batch}.values():
                self.end(job, error)
            return
        seconds = time.monotonic() - started
        tokens = sum(len(w) for w in windows)
        self._metrics.ran(seconds, len(windows), tokens)
        finished = []
        with self._ready:
            for (job, question, i), found in zip(batch, logits, strict=True):
                question.logits[i] = found
                question.left -= 1
                if not question.left and not job.over:
                    finished.append((job, question))
        for job, question in finished:
            self._decode(job, question)
        short = sum(len(_window(unit)) for unit in batch if not unit[0].long) / tokens
        now = time.monotonic()
        with self._ready:
            self._speed.ran(tokens, short, now - started, now)

    # ------------------------------------------------------------ logits to results

    def _decode(self, job: Job, question: _Question) -> None:
        ask = job.asks[question.number]
        started = time.monotonic()
        try:
            logits = [found for found in question.logits if found is not None]
            options = replace(ask.options, top_k=max(ask.options.top_k, COMPARED))
            pair = None if question.pair is None else self._answerer.decode(question.pair, logits, options)
            self._watch(pair, ask.options)
            result = job.render(ask, pair)
        except Exception as error:
            self.end(job, error)
            return
        self._metrics.stage("decode", time.monotonic() - started)
        with self._ready:
            job.results[question.number] = result
            job.done += 1
            whole = job.done == len(job.asks)
        if whole:
            self.end(job)

    def _late(self, job: Job) -> bool:
        """Ends a job if its deadline has passed, and returns whether it did."""
        if time.monotonic() <= job.deadline:
            return False
        self.end(job, deadline_passed(job.deadline - job.arrived))
        return True

    def end(self, job: Job, error: Exception | None = None) -> None:
        """Ends a job with its results or an error: waiting windows are discarded. Does nothing if the job is over."""
        with self._ready:
            if job.over:
                return
            job.over = True
            del self._jobs[job]
            self.questions -= len(job.asks)
            self._add(job, -job.tokens, -len(job.waiting))
            self._near -= job.near
            job.near = 0
            job.waiting.clear()
            self._front.pop(job, None)
            if job.long:
                self._back.remove(job)
        if error is None:
            job.future.set_result(job.results)
        else:
            job.future.set_exception(error)


def _full(why: str, limit: float, setting: str, seconds: float) -> RefusedError:
    message = f"the queue is full: {why}, the limit is {limit:g}: try again after Retry-After"
    return RefusedError(429, "queue_full", message, limit=limit, setting=setting, retry_after=seconds)


def _too_long(timeout: float, excess: float) -> RefusedError:
    why = f"a text of this length would be answered after {timeout + excess:.0f} seconds"
    return _full(why, timeout, "request_timeout", excess)


def deadline_passed(seconds: float) -> RefusedError:
    """The refusal of a request that took too long."""
    message = (
        f"no answer within {seconds:.3g} seconds: send less text at a time, or try again when the server is less busy"
    )
    return RefusedError(504, "deadline", message, limit=seconds, setting="request_timeout")


def _window(unit: _Unit) -> Window:
    _, question, i = unit
    return question.windows[i]
