"""The queue: fair to short questions, bounded, on time, and equal to answers given one by one."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from qadeploy import Answerer
from qadeploy.core.settings import Options
from qadeploy.errors import LogitsError, QuestionTooLongError, TooManyWindowsError
from qadeploy.inference.pairs import to_answers
from qadeploy.serve.errors import RefusedError
from qadeploy.serve.metrics import Metrics
from qadeploy.serve.scheduler import Ask, Job, Scheduler
from qadeploy.serve.settings import Settings
from tests.conftest import triplets
from tests.servers_for_tests import Fixed, Gate, around
from tests.sessions_for_tests import until

PAIRS = [(str(row["question"]), str(row["context"])) for row in triplets(24)]
LONG = " ".join(c for _, c in PAIRS * 3)
OPTIONS = Options()


@contextmanager
def scheduling(
    answerer: Answerer, workers: int = 1, batched: bool = False, tokens_per_second: float = 10_000.0, **settings
) -> Iterator[Scheduler]:
    scheduler = Scheduler(
        answerer, Metrics(), Settings(**settings), workers=workers, batched=batched, tokens_per_second=tokens_per_second
    )
    try:
        yield scheduler
    finally:
        scheduler.close()


def ask(question: str, context: str, options: Options = OPTIONS) -> Ask:
    return Ask(question, context, options)


def submit(scheduler: Scheduler, *asks: Ask, timeout: float = 30) -> Job:
    return scheduler.submit(asks, lambda one, pair: to_answers(pair, one.options), timeout=timeout)


def held(answerer: Answerer) -> tuple[Answerer, Gate]:
    """An answerer whose model waits until its gate is opened."""
    gate = Gate(answerer.model, closed=True)
    return around(answerer, gate), gate


# ---------------------------------------------------------------- answers


@pytest.mark.parametrize(
    "options", [{"workers": 1}, {"workers": 3}, {"workers": 2, "batched": True, "max_batch_tokens": 2048}]
)
def test_many_threads_get_the_answers_of_one_by_one(answerer, options):
    asks = [ask(q, LONG if i % 7 == 0 else c, Options(top_k=1 + i % 3)) for i, (q, c) in enumerate(PAIRS)]
    expected = [to_answers(answerer.read(a.question, a.context, a.options), a.options) for a in asks]
    with scheduling(answerer, max_wait=1e9, **options) as scheduler:
        with ThreadPoolExecutor(8) as threads:
            jobs = list(threads.map(lambda one: submit(scheduler, one), asks))
        found = {job.asks[0]: job.future.result(20)[0] for job in jobs}
        assert scheduler.idle
    for one, answers in zip(asks, expected, strict=True):
        assert [(a.text, a.start, a.end) for a in found[one]] == [(a.text, a.start, a.end) for a in answers]
        assert [a.score for a in found[one]] == pytest.approx([a.score for a in answers], abs=1e-5)


def test_a_prefilter_bounds_what_a_long_text_is_taken_for(answerer):
    question, longest = PAIRS[0][0], answerer.settings.max_seq_len
    with scheduling(answerer) as scheduler:
        assert scheduler._guess(ask(question, LONG))[1] > 2 * longest
        windows, tokens = scheduler._guess(ask(question, LONG, Options(prefilter=2)))
        assert windows == 2
        assert 1.8 * longest < tokens <= 2 * longest
        assert scheduler._guess(ask(question, "Ada.", Options(prefilter=2)))[1] < 20
        answers = submit(scheduler, ask(question, LONG, Options(prefilter=2))).future.result(20)[0]
    expected = answerer.answer(question, LONG, prefilter=2)
    assert [(a.text, a.start) for a in answers] == [(a.text, a.start) for a in expected]


def test_the_questions_of_one_request_come_back_in_order(answerer):
    with scheduling(answerer, workers=2) as scheduler:
        found = submit(scheduler, *(ask(q, c) for q, c in PAIRS)).future.result(20)
    assert [answers[0].text for answers in found] == [answers[0].text for answers in answerer.answer_batch(PAIRS)]


# ---------------------------------------------------------------- order


def test_a_long_document_never_blocks_short_questions_and_ends_under_their_load(answerer):
    slow = Gate(answerer.model, seconds=0.01)
    document = [len(w) for w in answerer.encode("Who keeps the bell?", LONG, OPTIONS).windows]
    assert len(document) >= 12
    order: list[str] = []
    with scheduling(around(answerer, slow), max_wait=1e9) as scheduler:
        long = submit(scheduler, ask("Who keeps the bell?", LONG))
        long.future.add_done_callback(lambda _: order.append("long"))
        until(lambda: long.taken >= 4)
        waits = []
        for number in range(100):  # there is always one that waits
            before, started = len(slow.ran), time.monotonic()
            job = submit(scheduler, ask(*PAIRS[number % 24]))
            job.future.result(10)
            waits.append((time.monotonic() - started, len(slow.ran) - before))
            if long.over:
                break
        assert order == ["long"]
    # Behind the window that runs, and at most one of the document whose turn it is.
    assert max(runs for _, runs in waits) <= 4
    assert sorted(waits)[len(waits) // 2][1] <= 3


def test_beyond_their_first_four_windows_long_documents_get_one_turn_in_four_the_earlier_first(answerer):
    held_answerer, gate = held(answerer)
    with scheduling(held_answerer, max_wait=1e9) as scheduler:
        first = submit(scheduler, ask("Who keeps the bell?", LONG))
        until(lambda: first.taken == 1)
        second = submit(scheduler, ask("Who keeps the rope?", LONG))
        short = [submit(scheduler, ask(*pair)) for pair in PAIRS[:12]]
        until(lambda: all(job.waiting for job in [second, *short]))
        gate.open.set()
        for job in (first, second, *short):
            job.future.result(20)
    by_question = {"bell": "A", "rope": "B"}
    told = []
    for (window,) in gate.ran:
        text = " ".join(answerer.encoder.token_text(int(i)) for i in window.input_ids[:9])
        told.append(
            next((name for word, name in by_question.items() if f"the {word} ?" in text and len(window) > 60), "s")
        )
    line = "".join(told)
    last = line.rindex("s")
    beyond = line[4 : last + 1]
    assert line[:4] == "AAAA", line
    assert line.count("s") == 12, line
    # Until the last short question ran, a document had one turn in four beyond its first four windows.
    share = (beyond.count("A") + max(0, beyond.count("B") - 4)) / len(beyond)
    assert 0.2 <= share <= 0.3, line
    assert [i for i, who in enumerate(line) if who == "B"][4] > line.rindex("A"), line


def test_batches_hold_windows_of_like_length_within_the_budget(answerer):
    held_answerer, gate = held(answerer)
    with scheduling(held_answerer, batched=True, max_batch_tokens=400, max_wait=1e9) as scheduler:
        blocker = submit(scheduler, ask(*PAIRS[0]))
        until(lambda: gate.ran)
        jobs = [submit(scheduler, ask(*PAIRS[i % 24])) for i in range(40)]
        jobs += [submit(scheduler, ask("Who keeps the bell?", LONG))]
        until(lambda: all(job.waiting for job in jobs))
        gate.open.set()
        for job in (blocker, *jobs):
            job.future.result(20)
    sizes = [[len(w) for w in batch] for batch in gate.ran]
    assert max(len(batch) for batch in sizes) > 4
    for batch in sizes:
        assert len(batch) == 1 or max(batch) * len(batch) <= 400
        assert max(batch) <= 1.25 * min(batch)
    assert sum(len(batch) for batch in sizes) == sum(job.windows for job in (blocker, *jobs))


# ---------------------------------------------------------------- bounds


def test_a_full_queue_refuses_at_once_and_has_room_again(answerer):
    held_answerer, gate = held(answerer)
    with scheduling(held_answerer, max_queue=3, max_wait=1e9) as scheduler:
        jobs = [submit(scheduler, ask(*PAIRS[i])) for i in range(3)]
        with pytest.raises(RefusedError, match="3 questions wait or run, the limit is 3") as refused:
            submit(scheduler, ask(*PAIRS[3]))
        assert (refused.value.status, refused.value.flag) == (429, "--max-queue")
        assert int(refused.value.headers["retry-after"]) >= 1
        gate.open.set()
        for job in jobs:
            job.future.result(10)
        assert submit(scheduler, ask(*PAIRS[3])).future.result(10)


def test_work_that_would_wait_too_long_is_refused(answerer):
    held_answerer, gate = held(answerer)
    with scheduling(held_answerer, max_wait=2.0, tokens_per_second=100.0) as scheduler:
        jobs = []

        def fill() -> None:
            while len(jobs) < 200:
                jobs.append(submit(scheduler, ask(*PAIRS[0])))

        with pytest.raises(RefusedError, match="the wait is") as refused:
            fill()
        assert refused.value.flag == "--max-wait"
        tokens = len(answerer.encode(*PAIRS[0], OPTIONS).windows[0])
        assert 200 / tokens - 2 <= len(jobs) <= 800 / tokens + 2  # estimated until encoded
        gate.open.set()
        for job in jobs:
            job.future.result(10)


def test_a_document_that_cannot_be_read_in_time_is_refused_unless_the_server_is_idle(answerer):
    held_answerer, gate = held(answerer)
    with scheduling(held_answerer, tokens_per_second=100.0, max_wait=1e9) as scheduler:
        alone = submit(scheduler, ask("Who keeps the bell?", LONG), timeout=5)
        with pytest.raises(RefusedError, match="would be answered after") as refused:
            submit(scheduler, ask("Who keeps the bell?", LONG), timeout=5)
        assert (refused.value.status, refused.value.flag) == (429, "--request-timeout")
        gate.open.set()
        assert alone.future.result(10)


def test_the_windows_of_all_questions_count_together(answerer):
    count = len(answerer.encode("Who keeps the bell?", LONG, OPTIONS).windows)
    with scheduling(answerer, max_windows=2 * count) as scheduler:
        assert len(submit(scheduler, *[ask("Who keeps the bell?", LONG)] * 2).future.result(20)) == 2
        job = submit(scheduler, *[ask("Who keeps the bell?", LONG)] * 3)
        with pytest.raises(TooManyWindowsError, match=r"question 3: .* at most 0 are allowed"):
            job.future.result(20)
        assert scheduler.idle


def test_a_wrong_question_of_several_is_named(answerer):
    with scheduling(answerer) as scheduler:
        job = submit(scheduler, ask(*PAIRS[0]), ask("who " * 300, "Ada keeps the lamp."))
        with pytest.raises(QuestionTooLongError, match="question 2: the question has"):
            job.future.result(10)
        assert scheduler.idle


# ---------------------------------------------------------------- ends


def test_windows_of_a_job_that_was_dropped_do_not_run(answerer):
    held_answerer, gate = held(answerer)
    with scheduling(held_answerer) as scheduler:
        job = submit(scheduler, ask("Who keeps the bell?", LONG))
        until(lambda: job.taken == 1)
        scheduler.end(job, RefusedError(499, "gone", "gone"))
        with pytest.raises(RefusedError, match="gone"):
            job.future.result(1)
        assert scheduler.idle
        assert scheduler.wait == 0
        other = submit(scheduler, ask(*PAIRS[0]))
        gate.open.set()
        assert other.future.result(10)
    assert len(gate.ran) == 2


def test_a_deadline_ends_a_job_that_waits(answerer):
    held_answerer, gate = held(answerer)
    with scheduling(held_answerer) as scheduler:
        first = submit(scheduler, ask(*PAIRS[0]))
        until(lambda: gate.ran)
        late = submit(scheduler, ask(*PAIRS[1]), timeout=0.05)
        until(lambda: late.waiting)
        time.sleep(0.06)
        gate.open.set()
        assert first.future.result(10)
        with pytest.raises(RefusedError, match=r"no answer within 0\.05 seconds") as refused:
            late.future.result(10)
        assert refused.value.status == 504
    assert len(gate.ran) == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_logits_that_are_no_numbers_fail_their_job_alone(answerer, value):
    with scheduling(around(answerer, Fixed(value))) as scheduler:
        with pytest.raises(LogitsError):
            submit(scheduler, ask(*PAIRS[0])).future.result(10)
        assert scheduler.alive
        assert scheduler.idle


def test_a_model_that_raises_fails_the_job_and_the_worker_goes_on(answerer):
    class Breaks:
        inputs = ()

        def __init__(self) -> None:
            self.runs = 0

        def run(self, windows):
            self.runs += 1
            if self.runs == 1:
                raise MemoryError("no memory left")
            return answerer.model.run(windows)

    with scheduling(around(answerer, Breaks())) as scheduler:
        with pytest.raises(MemoryError):
            submit(scheduler, ask(*PAIRS[0])).future.result(10)
        assert submit(scheduler, ask(*PAIRS[0])).future.result(10)
        assert scheduler.alive


def test_closing_refuses_what_waits_and_ends_the_threads(answerer):
    held_answerer, gate = held(answerer)
    with scheduling(held_answerer) as scheduler:
        running = submit(scheduler, ask(*PAIRS[0]))
        until(lambda: gate.ran)
        threading.Timer(0.05, gate.open.set).start()
    with pytest.raises(RefusedError, match="shut down") as refused:
        running.future.result(1)
    assert refused.value.status == 503
    assert not scheduler.alive
    with pytest.raises(RefusedError, match="shutting down"):
        submit(scheduler, ask(*PAIRS[0]))
    assert not [t for t in threading.enumerate() if t.name.startswith(("run-", "encode"))]
