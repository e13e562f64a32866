"""One queue for all requests, whose unit is the window.

    submit ─► encode (threads, a question at a time) ─► windows wait ─► workers run them ─► decode ─► Job.future

The first four windows of each request run in the order of arrival: where sizes are alike no other order has a better tail
(Wierman and Zwart 2012, "Is tail-optimal scheduling possible?"). What a request has beyond them, a long document or
a large batch, waits in a second line whose requests take turns, a window each; that line gets every fourth turn, and all
that the first leaves. So a long document never blocks a short question, and ends under any load of short ones.
Nothing waits for company: a free worker takes what is there. On a CPU each worker runs one window on one thread,
unpadded, which is the fastest there; on CUDA a batch of windows of like length within a budget of tokens.

The queue is bounded by questions and by time: the tokens of the first line over the tokens a second that were measured of
late; and a request that has more than the first line takes is refused where all that waits leaves it no time to end.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from qadeploy.errors import InputError
from qadeploy.inference.answerer import Answerer, Begun, Options, Reading
from qadeploy.records import FloatArray, Window
from qadeploy.serve.errors import RefusedError
from qadeploy.serve.metrics import Metrics

Logits = tuple[FloatArray, FloatArray]
_FRONT = 4  # windows of a request that run in the order of arrival
_BACK_EVERY = 4  # turns
_LIKE = 1.25  # lengths up to this ratio share a batch: padding costs a fifth at most
_LEARN = 0.05  # the weight of a new run in the measured speed
_CHARACTERS_A_TOKEN = 4.0  # a guess for texts that are not tokenised yet
_ENCODERS = 32  # threads that tokenise, at most


@dataclass(frozen=True, slots=True)
class Ask:
    """One question on one context, with the options of its call."""

    question: str
    context: str
    options: Options


Render = Callable[[Ask, Reading], Any]


@dataclass(slots=True, eq=False)
class _Part:
    """One question of a job, on its way through the model."""

    number: int
    begun: Begun
    logits: list[Logits | None]
    left: int


@dataclass(slots=True, eq=False)
class Job:
    """One request: its ``future`` gives a list with what ``render`` made of each question, in order, or raises.

    It raises what answering raises, and RefusedError where the deadline passed or the job was dropped.
    """

    asks: Sequence[Ask]
    render: Render
    deadline: float
    arrived: float = field(default_factory=time.monotonic)
    future: Future[list[Any]] = field(default_factory=Future)
    waiting: deque[tuple[_Part, int]] = field(default_factory=deque)
    results: list[Any] = field(default_factory=list)
    encoded: int = 0  # questions
    done: int = 0
    windows: int = 0
    taken: int = 0  # windows
    guess: int = 0  # tokens of the questions that are not encoded yet
    near: int = 0  # tokens that wait in the first line
    tokens: int = 0  # tokens that wait
    in_line: bool = False
    over: bool = False


_Unit = tuple[Job, _Part, int]


class Scheduler:
    """Runs the windows of many requests on ``workers`` threads. Safe under threads.

    ``batch_tokens`` None runs windows one by one, a number in batches of at most so many tokens, padding included.
    ``max_queue`` bounds the questions that wait or run, ``max_wait`` the seconds until a new request's first
    windows run, ``max_windows`` the windows of one request.
    """

    def __init__(
        self,
        answerer: Answerer,
        metrics: Metrics,
        *,
        workers: int,
        batch_tokens: int | None = None,
        max_queue: int = 512,
        max_wait: float = 3.5,
        max_windows: int = 256,
        tokens_a_second: float = 10_000.0,
    ) -> None:
        self._answerer = answerer
        self._metrics = metrics
        self._batch_tokens = batch_tokens
        self._padded = "attention_mask" in getattr(answerer.model, "inputs", ())
        self._max_queue = max_queue
        self._max_wait = max_wait
        self._max_windows = max_windows
        self._longest = answerer.settings.max_seq_len
        self._workers = workers
        self._rate = tokens_a_second  # of all workers together
        self._ready = threading.Condition()  # guards all that follows
        self._jobs: dict[Job, None] = {}  # oldest first
        self._front: deque[Job] = deque()
        self._back: deque[Job] = deque()
        self._turn = 0
        self._questions = self._tokens = self._near = self._windows = 0
        self._closed = False
        self._encoders = ThreadPoolExecutor(min(max(2, workers), _ENCODERS), thread_name_prefix="encode")
        self._threads = [threading.Thread(target=self._work, name=f"run-{i}", daemon=True) for i in range(workers)]
        for thread in self._threads:
            thread.start()
        metrics.watch(lambda: self._questions, lambda: self._windows, lambda: self._tokens, lambda: self.wait)

    @property
    def workers(self) -> int:
        """Threads that run windows."""
        return self._workers

    @property
    def alive(self) -> bool:
        """Whether all workers are at work."""
        return not self._closed and all(thread.is_alive() for thread in self._threads)

    @property
    def idle(self) -> bool:
        """Whether no request waits or runs."""
        return not self._jobs

    @property
    def wait(self) -> float:
        """Seconds until a new request's first windows run, by the speed of late."""
        share = 1 - 1 / _BACK_EVERY if self._back else 1
        return self._near / (share * self._rate)

    def submit(self, asks: Sequence[Ask], render: Render, *, timeout: float) -> Job:
        """Takes a request in; ``render`` makes a result of each reading, in a worker. Returns at once.

        Raises RefusedError (429) where the queue is full, with the seconds after which it has room.
        """
        job = Job(asks, render, time.monotonic() + timeout, results=[None] * len(asks))
        job.guess = sum(self._guess(ask) for ask in asks)
        job.future.set_running_or_notify_cancel()  # so that nobody cancels the future behind our back
        with self._ready:
            if self._closed:
                raise RefusedError(503, "closing", "the server is going down", retry_after=1)
            self._admit(job, timeout)
            self._jobs[job] = None
            self._questions += len(asks)
            self._add(job, job.guess, 0)
            self._recount(job)
            self._encoders.submit(self._encode, job)
        return job

    def _admit(self, job: Job, timeout: float) -> None:
        """Raises RefusedError (429) where a job would wait too long. An idle server takes anything."""
        if not self._jobs:
            return
        wait, questions = self.wait, self._questions
        if questions + len(job.asks) > self._max_queue:
            raise _full(f"{questions} questions wait or run", self._max_queue, "max_queue", wait)
        if wait > self._max_wait:
            raise _full(f"the wait is {wait:.1f} seconds", self._max_wait, "max_wait", wait - self._max_wait)
        if job.guess > _FRONT * self._longest:
            needed = (self._tokens + job.guess) / self._rate
            if needed > timeout:
                why = f"a text of this length would be answered after {needed:.0f} seconds"
                raise _full(why, timeout, "request_timeout", needed - timeout)

    def drop(self, job: Job, refused: RefusedError) -> None:
        """Ends a job before its time: the windows that no worker has begun are not run. Does nothing to one that is over."""
        self._end(job, refused)

    def close(self) -> None:
        """Ends the workers; jobs that are not over are refused (503)."""
        with self._ready:
            self._closed = True
            left = list(self._jobs)
            self._ready.notify_all()
        for job in left:
            self._end(
                job, RefusedError(503, "closing", "the server went down before the answer was there", retry_after=1)
            )
        self._encoders.shutdown(wait=True, cancel_futures=True)
        for thread in self._threads:
            thread.join()

    def _recount(self, job: Job) -> None:
        """Counts anew what waits of a job."""
        places = max(_FRONT - job.taken, 0)
        first = [len(part.begun.windows[i]) for part, i in islice(job.waiting, places)]
        near = sum(first) + min(job.guess, (places - len(first)) * self._longest)
        self._near += near - job.near
        job.near = near

    def _add(self, job: Job, tokens: int, windows: int) -> None:
        job.tokens += tokens
        self._tokens += tokens
        self._windows += windows

    def _guess(self, ask: Ask) -> int:
        """Tokens of the windows of texts that are not tokenised yet."""
        tokens = int((len(ask.question) + len(ask.context)) / _CHARACTERS_A_TOKEN)
        most = ask.options.prefilter
        return tokens if most is None else min(tokens, most * self._longest)

    # ------------------------------------------------------------ texts to windows

    def _encode(self, job: Job) -> None:
        """Encodes a job's next question, and queues for the one after it, behind the others' questions."""
        if job.over or self._late(job):
            return
        ask, number = job.asks[job.encoded], job.encoded
        started = time.monotonic()
        try:
            room = max(self._max_windows - job.windows, 0)
            begun = self._answerer.begin(ask.question, ask.context, ask.options, max_windows=room)
        except Exception as error:
            if isinstance(error, InputError) and len(job.asks) > 1:
                error = type(error)(f"question {number + 1}: {error}")
            self._end(job, error)
            return
        self._metrics.stage("tokenize", time.monotonic() - started)
        part = _Part(number, begun, [None] * len(begun.windows), len(begun.windows))
        with self._ready:
            if job not in self._jobs:  # it ended meanwhile
                return
            job.encoded += 1
            job.windows += part.left
            job.guess -= self._guess(ask)
            job.waiting.extend((part, i) for i in range(part.left))
            self._add(job, sum(len(w) for w in begun.windows) - self._guess(ask), part.left)
            self._recount(job)
            if not job.in_line:
                job.in_line = True
                (self._front if job.taken < _FRONT else self._back).append(job)
            self._ready.notify(part.left)
            more = job.encoded < len(job.asks) and not self._closed
            if more:
                self._encoders.submit(self._encode, job)

    # ------------------------------------------------------------ windows to logits

    def _work(self) -> None:
        while batch := self._take():
            self._run(batch)

    def _take(self) -> list[_Unit]:
        """The next windows to run, as soon as there are any; none where the scheduler was closed."""
        with self._ready:
            while not self._closed:
                first = self._next()
                if first is not None:
                    return [first] if self._batch_tokens is None else self._fill(first)
                self._ready.wait()
        return []

    def _next(self) -> _Unit | None:
        """The window whose turn it is."""
        self._turn += 1
        lines = (self._front, self._back) if self._turn % _BACK_EVERY else (self._back, self._front)
        for line in lines:
            while line:
                job = line.popleft()
                job.in_line = False
                if job.over or not job.waiting or self._late(job):
                    continue
                unit = self._pop(job)
                if job.waiting:
                    job.in_line = True
                    if job.taken < _FRONT:
                        line.appendleft(job)
                    else:
                        self._back.append(job)
                return unit
        return None

    def _pop(self, job: Job) -> _Unit:
        part, i = job.waiting.popleft()
        if not job.taken:
            self._metrics.stage("queue", time.monotonic() - job.arrived)
        job.taken += 1
        self._add(job, -len(part.begun.windows[i]), -1)
        self._recount(job)
        return job, part, i

    def _fill(self, first: _Unit) -> list[_Unit]:
        """A batch around a window: others of like length, a window of each job in turn, within the budget of tokens."""
        batch = [first]
        least = most = len(_window(first))
        taken = True
        while taken:
            taken = False
            for job in list(self._jobs):
                if not job.waiting:
                    continue
                part, i = job.waiting[0]
                size = len(part.begun.windows[i])
                low, high = min(least, size), max(most, size)
                alike = high <= _LIKE * low if self._padded else high == low
                if alike and high * (len(batch) + 1) <= (self._batch_tokens or 0) and not self._late(job):
                    batch.append(self._pop(job))
                    least, most, taken = low, high, True
        return batch

    def _run(self, batch: list[_Unit]) -> None:
        windows = [_window(unit) for unit in batch]
        started = time.monotonic()
        try:
            model: Any = self._answerer.model
            # On a device ``run`` knows the faster way for few windows and for many.
            alone = self._batch_tokens is None or getattr(model, "device", "cpu") != "cpu"
            logits = model.run(windows) if alone else model.run_batch(windows)
        except Exception as error:
            for job in {id(job): job for job, _, _ in batch}.values():
                self._end(job, error)
            return
        seconds = time.monotonic() - started
        tokens = sum(len(w) for w in windows)
        self._metrics.ran(seconds, len(windows), tokens)
        finished = []
        with self._ready:
            self._rate += _LEARN * (self._workers * tokens / max(seconds, 1e-6) - self._rate)
            for (job, part, i), found in zip(batch, logits, strict=True):
                part.logits[i] = found
                part.left -= 1
                if not part.left and not job.over:
                    finished.append((job, part))
        for job, part in finished:
            self._decode(job, part)

    # ------------------------------------------------------------ logits to results

    def _decode(self, job: Job, part: _Part) -> None:
        ask = job.asks[part.number]
        started = time.monotonic()
        try:
            logits = [found for found in part.logits if found is not None]
            result = job.render(ask, self._answerer.finish(part.begun, logits, ask.options))
        except Exception as error:
            self._end(job, error)
            return
        self._metrics.stage("decode", time.monotonic() - started)
        with self._ready:
            job.results[part.number] = result
            job.done += 1
            whole = job.done == len(job.asks)
        if whole:
            self._end(job)

    def _late(self, job: Job) -> bool:
        """Ends a job whose deadline has passed."""
        if time.monotonic() <= job.deadline:
            return False
        self._end(job, deadline_passed(job.deadline - job.arrived))
        return True

    def _end(self, job: Job, error: Exception | None = None) -> None:
        with self._ready:
            if job.over:
                return
            job.over = True
            del self._jobs[job]
            self._questions -= len(job.asks)
            self._add(job, -job.tokens, -len(job.waiting))
            self._near -= job.near
            job.near = 0
            job.waiting.clear()
        if error is None:
            job.future.set_result(job.results)
        else:
            job.future.set_exception(error)


def _full(why: str, limit: float, setting: str, seconds: float) -> RefusedError:
    message = f"the queue is full: {why}, the limit is {limit:g}: try again after Retry-After"
    return RefusedError(429, "queue_full", message, limit=limit, setting=setting, retry_after=seconds)


def deadline_passed(seconds: float) -> RefusedError:
    """The refusal of a request that took too long."""
    message = (
        f"no answer within {seconds:.3g} seconds: send less text at a time, or try again when the server is less busy"
    )
    return RefusedError(504, "deadline", message, limit=seconds, setting="request_timeout")


def _window(unit: _Unit) -> Window:
    _, part, i = unit
    return part.begun.windows[i]
