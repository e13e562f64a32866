"""The queue under more long documents than it can answer: a simulated clock, model and clients; nothing sleeps."""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from collections.abc import Callable
from functools import partial
from math import inf
from statistics import median
from types import SimpleNamespace
from typing import Any

import pytest

from qadeploy.core.settings import Options, QaSettings
from qadeploy.inference.pairs import EncodedPair
from qadeploy.serve import scheduler as module
from qadeploy.serve.errors import RefusedError
from qadeploy.serve.metrics import Metrics
from qadeploy.serve.scheduler import Ask, Job, Scheduler
from qadeploy.serve.settings import Settings

CHINESE = "灯" * 13_800  # a token each
ENGLISH = ("lamp " * 13_800)[:69_000]  # a token per word
QUESTION = "who keeps it"
SHORT = "Ada keeps the lamp."
QUESTION_TOKENS, SPECIAL, ROOM, OVERLAP = 3, 3, 378, 128  # windows of 384 tokens
SECONDS_PER_TOKEN = 0.02 / 384
WORKERS = 2


class NothingWaitsError(Exception):
    """A worker would wait."""


class Reader:
    """An answerer of texts with a token per word, or per character without spaces."""

    settings = QaSettings()
    encoder = SimpleNamespace(special_tokens=SPECIAL)

    def __init__(self, run: Callable[[Any], Any]) -> None:
        self.model = SimpleNamespace(run=run, device="cuda")

    def encode(self, question: str, context: str, options: Options, *, max_windows: int) -> Any:
        total = context.count(" ") + 1 if context.isascii() else len(context)
        begins = [0]
        while begins[-1] + ROOM < total:
            begins.append(begins[-1] + ROOM - OVERLAP)
        windows = [range(QUESTION_TOKENS + SPECIAL + min(ROOM, total - begin)) for begin in begins]
        return EncodedPair(range(QUESTION_TOKENS), range(total), windows, None, self.settings)  # type: ignore[arg-type]

    def decode(self, pair: Any, logits: Any, options: Options) -> Any:
        return pair


class Stepped(Scheduler):
    """A scheduler without threads of its own."""

    def _work(self) -> None:
        pass


class Simulation:
    """Clients and workers as events on one clock; ``slow`` stretches the runs."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, *, guessed: float = 1.0, batched: bool = False, **settings: Any
    ) -> None:
        self.now, self.slow = 0.0, 1.0
        self.counts: Counter[str] = Counter()
        self.waits: list[float] = []  # of short questions
        self.ran: Counter[Job] = Counter()  # windows
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._texts: list[tuple[Any, ...]] = []
        self._free, self._run_end = WORKERS, 0.0
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: self.now))
        self.settings = Settings(**settings)
        self.scheduler = Stepped(
            Reader(self._run),  # type: ignore[arg-type]
            Metrics(),
            self.settings,
            workers=WORKERS,
            batched=batched,
            tokens_per_second=guessed * WORKERS / SECONDS_PER_TOKEN,
        )
        self.scheduler._encoders.shutdown()
        inline = SimpleNamespace(submit=lambda *call: self._texts.append(call))
        monkeypatch.setattr(self.scheduler, "_encoders", inline)
        monkeypatch.setattr(self.scheduler._ready, "wait", self._wait)

    def run(self, seconds: float) -> None:
        """Lets time pass."""
        until = self.now + seconds
        self._settle()
        while self._events and self._events[0][0] <= until:
            self.now, _, what = heapq.heappop(self._events)
            what()
            self._settle()
        self.now = until

    def submit(self, context: str, timeout: float = 30) -> Job:
        job = self.scheduler.submit([Ask(QUESTION, context, Options())], lambda ask, pair: pair, timeout=timeout)
        late = RefusedError(504, "deadline", "the server ends what is late")
        self._at(self.now + timeout, lambda: self.scheduler.end(job, late))
        return job

    def fill(self, timeout: float = 30) -> list[Job]:
        """Sends documents until one is refused."""
        jobs = []
        while len(jobs) < 100:
            try:
                jobs.append(self.submit(CHINESE, timeout))
            except RefusedError:
                break
        return jobs

    def ask(self, context: str, then: Callable[[str, float], None]) -> None:
        """Sends a question; ``then`` is called with the outcome and the seconds until a retry."""

        def told(error: BaseException | None) -> None:
            assert error is None or isinstance(error, RefusedError)
            outcome = {None: "answered", 429: "refused", 504: "late"}[error and error.status]
            then(outcome, float(error.headers["retry-after"]) if error and error.status == 429 else 0)

        try:
            job = self.submit(context)
        except RefusedError as refused:
            told(refused)
        else:
            job.future.add_done_callback(lambda future: told(future.exception()))

    def client(self, context: str) -> None:
        """A client that asks again as soon as it is answered, and after Retry-After when it is refused."""

        def then(outcome: str, wait: float) -> None:
            self.counts[outcome] += 1
            self._at(self.now + wait, lambda: self.ask(context, then))

        self._at(self.now, lambda: self.ask(context, then))

    def short(self, per_second: float, context: str = SHORT) -> None:
        """Short questions at a constant rate."""

        def again() -> None:
            asked = self.now
            self.ask(context, lambda outcome, _: self.waits.append(self.now - asked if outcome == "answered" else inf))
            self._at(asked + 1 / per_second, again)

        self._at(self.now, again)

    @property
    def share(self) -> float:
        """The share of the windows of long documents that contributed to an answer."""
        long = {job: windows for job, windows in self.ran.items() if job.windows > 4}
        return sum(windows for job, windows in long.items() if job.done) / sum(long.values())

    def _at(self, when: float, what: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when, next(self._order), what))

    def _wait(self) -> None:
        raise NothingWaitsError

    def _settle(self) -> None:
        """Tokenises the waiting questions, and gives waiting windows to the free workers."""
        while self._texts:
            encode, *arguments = self._texts.pop(0)
            encode(*arguments)
        while self._free:
            try:
                batch = self.scheduler._take()
            except NothingWaitsError:
                return
            self._free -= 1
            self.ran.update(job for job, _, _ in batch)
            tokens = sum(len(question.pair.windows[i]) for _, question, i in batch)
            end = self.now + self.slow * SECONDS_PER_TOKEN * tokens
            self._at(end, partial(self._end, batch, self.now, end))

    def _end(self, batch: Any, started: float, end: float) -> None:
        self.now, self._run_end = started, end
        self.scheduler._run(batch)
        self._free += 1

    def _run(self, windows: Any) -> Any:
        self.now = self._run_end
        return [()] * len(windows)


@pytest.mark.parametrize("context", [CHINESE, ENGLISH], ids=["Chinese", "English"])
@pytest.mark.parametrize(("guessed", "batched"), [(0.5, False), (2, False), (1, True)])
def test_64_clients_with_long_documents_get_the_answers_that_the_windows_allow(context, guessed, batched, monkeypatch):
    simulation = Simulation(monkeypatch, guessed=guessed, batched=batched, max_batch_tokens=1600)
    for _ in range(64):
        simulation.client(context)
    simulation.short(per_second=5)
    simulation.run(100)
    windows = sum(count for job, count in simulation.ran.items() if job.asks[0].context == context)
    assert windows > 9_000  # of 10,000 in 100 seconds
    # Windows of 378 tokens that move by 250: (13,800 - 128) / 250, rounded up.
    assert simulation.counts["answered"] >= 0.9 * windows / 55
    assert simulation.counts["late"] == 0
    assert median(simulation.waits) < 0.06


@pytest.mark.parametrize("slow", [0.5, 2, 4])
def test_a_machine_that_changes_its_speed_keeps_most_windows_useful(slow, monkeypatch):
    simulation = Simulation(monkeypatch)
    for _ in range(64):
        simulation.client(CHINESE)
    simulation.short(per_second=5)
    simulation.run(50)
    simulation.slow = slow
    simulation.run(100)
    assert simulation.share >= 0.8


def test_long_documents_are_answered_beside_many_short_questions(monkeypatch):
    simulation = Simulation(monkeypatch)
    for _ in range(64):
        simulation.client(CHINESE)
    simulation.short(per_second=80, context=SHORT * 46)  # 190 tokens take 10 ms: two fifths of what the workers can do
    simulation.run(100)
    assert simulation.share >= 0.8
    assert simulation.counts["answered"] > 60
    assert median(simulation.waits) < 0.06


def test_documents_of_many_lengths_share_an_overload(monkeypatch):
    simulation = Simulation(monkeypatch)
    for number in range(64):
        simulation.client(CHINESE[: 2_000 + 500 * number])
    simulation.run(100)
    assert simulation.share >= 0.8


def test_a_document_longer_than_estimated_is_refused_before_a_window_of_it_runs(monkeypatch):
    simulation = Simulation(monkeypatch)
    first = simulation.submit("ab " * 60_000, timeout=4)  # 240 windows: 2.4 seconds
    second = simulation.submit("a " * 60_000, timeout=4)  # as many, but estimated at half of that
    simulation.run(0)
    with pytest.raises(RefusedError, match="would be answered after 5 seconds, the limit is 4") as refused:
        second.future.result(0)
    assert (refused.value.status, refused.value.flag) == (429, "--request-timeout")
    assert refused.value.headers["retry-after"] == "2"
    simulation.run(3)
    assert first.done
    assert simulation.ran[second] == 0


def test_the_earliest_deadline_goes_first(monkeypatch):
    simulation = Simulation(monkeypatch)
    late, early = simulation.submit(CHINESE), simulation.submit(CHINESE, timeout=10)
    simulation.run(0.7)
    assert early.done
    assert not late.done
    simulation.run(0.6)
    assert late.done


def test_who_would_make_an_accepted_document_late_is_refused(monkeypatch):
    simulation = Simulation(monkeypatch)
    accepted = [simulation.submit(CHINESE, timeout=2) for _ in range(2)]  # 0.55 seconds each
    accepted += simulation.fill(timeout=1.9)
    simulation.run(2)
    assert len(accepted) == 3  # a fourth would have been in time, but not the second as well
    assert all(job.done for job in accepted)


def test_windows_of_clients_who_leave_make_room_at_once(monkeypatch):
    simulation = Simulation(monkeypatch, max_wait=1e9)
    jobs = simulation.fill()
    simulation.run(0.1)
    scheduler = simulation.scheduler
    assert scheduler.windows == 55 * len(jobs) - sum(simulation.ran.values())
    for job in jobs[1:]:
        scheduler.end(job, RefusedError(499, "gone", "gone"))
    assert scheduler.windows == 55 - simulation.ran[jobs[0]]
    assert scheduler._back == [jobs[0]]
    gone, last = sum(simulation.ran[job] for job in jobs[1:]), simulation.submit(CHINESE)
    simulation.run(2)
    assert jobs[0].done
    assert last.done
    assert sum(simulation.ran[job] for job in jobs[1:]) == gone


def test_a_document_that_no_server_could_answer_in_time_runs_few_windows(monkeypatch):
    simulation = Simulation(monkeypatch, guessed=1)
    simulation.slow = 100  # 100 seconds of the document's 30
    job = simulation.submit(CHINESE)  # the server is idle
    simulation.run(30)
    with pytest.raises(RefusedError, match="would be answered after"):
        job.future.result(0)
    assert simulation.ran[job] <= 20
