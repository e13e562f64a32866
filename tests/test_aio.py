"""The asyncio face: equal to serial calls, bounded, never in the event loop's way, cancelled in time."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from qadeploy import Answerer
from qadeploy.errors import InputError, LogitsError
from qadeploy.inference.session import Logits
from qadeploy.records import Window
from tests.test_session_answerer import GOLD, LONG, MIXED, PAIRS, run_script, same

OPTIONS = [
    {},
    {"top_k": 3},
    {"max_seq_len": 40, "doc_stride": 8},
    {"max_seq_len": 64, "doc_stride": 20, "top_k": 2},
    {"allow_no_answer": True, "top_k": 2},
    {"align_to_words": True, "max_answer_len": 4},
]


@pytest.fixture(scope="module")
def answerer(bundle: Path) -> Answerer:
    return Answerer.load(bundle, device="cpu", threads=2)


class Held:
    """Stands between an answerer and its model: counts the windows that began, and holds them until released."""

    def __init__(self, answerer: Answerer, monkeypatch: pytest.MonkeyPatch) -> None:
        self.release, self.begun = threading.Event(), 0
        self._lock = threading.Lock()
        self._alone = answerer.model._run_one
        monkeypatch.setattr(answerer.model, "_run_one", self.run)

    def run(self, session: object, window: Window) -> Logits:
        with self._lock:
            self.begun += 1
        assert self.release.wait(60)
        return self._alone(session, window)

    async def until_begun(self) -> None:
        for _ in range(600):
            if self.begun:
                return
            await asyncio.sleep(0.01)
        raise AssertionError("nothing has begun within six seconds")


def test_many_awaits_at_once_answer_like_serial_calls(answerer):
    calls = [(MIXED[n % len(MIXED)], OPTIONS[n % len(OPTIONS)]) for n in range(300)]

    async def ask():
        return await asyncio.gather(*(answerer.aanswer(*pair, **chosen) for pair, chosen in calls))

    serial = [answerer.answer(*pair, **chosen) for pair, chosen in calls]
    assert same(asyncio.run(ask()), serial)


def test_batches_and_streams_answer_like_their_sync_forms(answerer):
    async def ask():
        batch = await answerer.aanswer_batch(iter(MIXED), top_k=2)
        return batch, [answers async for answers in answerer.aanswer_stream(MIXED, top_k=2)]

    batch, stream = asyncio.run(ask())
    assert same(batch, answerer.answer_batch(MIXED, top_k=2))
    assert same(stream, batch)
    assert asyncio.run(answerer.aanswer_batch([])) == []


def test_what_is_awaited_is_worked_on_by_a_bounded_number_of_threads(answerer, monkeypatch):
    held = Held(answerer, monkeypatch)
    encoded: list[str] = []
    begin = answerer.begin
    monkeypatch.setattr(answerer, "begin", lambda *a: encoded.append(a[0]) or begin(*a))

    async def ask():
        calls = [asyncio.ensure_future(answerer.aanswer(*pair)) for pair in PAIRS * 10]
        await held.until_begun()
        await asyncio.sleep(0.2)  # time in which more would begin
        waiting = len(encoded), held.begun
        held.release.set()
        return waiting, await asyncio.gather(*calls)

    (tokenised, begun), found = asyncio.run(ask())
    assert (tokenised, begun) == (4, 2)  # two threads of the model, twice as many work for coroutines
    assert [answers[0].text for answers in found] == GOLD * 10


def test_the_event_loop_goes_on_while_a_document_is_tokenised_and_read(answerer, monkeypatch):
    held = Held(answerer, monkeypatch)
    tokenise, gate = answerer.encoder.encode, threading.Event()
    monkeypatch.setattr(answerer._contexts, "_encode", lambda text: gate.wait(60) and tokenise(text))
    document = f"{LONG} Only here."

    async def ask():
        call = asyncio.ensure_future(answerer.aanswer("Who keeps the kettle?", document))
        for _ in range(20):  # the loop turns while the tokeniser waits,
            await asyncio.sleep(0.001)
        assert held.begun == 0
        gate.set()
        await held.until_begun()  # and while the model does
        assert not call.done()
        held.release.set()
        return await call

    assert same([asyncio.run(ask())], [answerer.answer("Who keeps the kettle?", document)])


def test_what_is_cancelled_before_it_begins_is_never_tokenised(answerer, monkeypatch):
    held = Held(answerer, monkeypatch)
    encoded: list[str] = []
    begin = answerer.begin
    monkeypatch.setattr(answerer, "begin", lambda *a: encoded.append(a[0]) or begin(*a))

    async def ask():
        first = [asyncio.ensure_future(answerer.aanswer(*pair)) for pair in PAIRS[:4]]
        await held.until_begun()
        rest = [asyncio.ensure_future(answerer.aanswer(*pair)) for pair in PAIRS[4:]]
        await asyncio.sleep(0.05)
        for call in rest:
            call.cancel()
        results = await asyncio.gather(*rest, return_exceptions=True)
        assert all(isinstance(result, asyncio.CancelledError) for result in results)
        held.release.set()
        assert [answers[0].text for answers in await asyncio.gather(*first)] == GOLD[:4]
        assert (await answerer.aanswer(*PAIRS[5]))[0].text == GOLD[5]

    asyncio.run(ask())
    assert sorted(encoded) == sorted([question for question, _ in PAIRS[:4]] + [PAIRS[5][0]])


@pytest.mark.parametrize("threads", [1, 2])
def test_a_long_document_stops_before_its_next_windows(bundle, monkeypatch, threads):
    own = Answerer.load(bundle, device="cpu", threads=threads)
    held = Held(own, monkeypatch)
    windows = len(
        own.encoder.windows(own.encoder.encode("Who?"), own.encoder.encode(LONG), max_seq_len=24, doc_stride=8)
    )

    async def ask():
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await own.aanswer("Who?", LONG, max_seq_len=24, doc_stride=8)
        held.release.set()
        assert (await own.aanswer(*PAIRS[0]))[0].text == GOLD[0]

    asyncio.run(ask())
    assert windows > 40
    assert held.begun <= 8 * threads + 1


def test_a_stream_that_is_left_or_cancelled_drops_its_work(answerer):
    taken = 0

    def source():
        nonlocal taken
        for pair in itertools.cycle(PAIRS):
            taken += 1
            yield pair

    async def ask():
        stream = answerer.aanswer_stream(source())
        async for answers in stream:
            assert answers[0].text == GOLD[0]
            break
        await stream.aclose()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await answerer.aanswer_batch(source())  # without end
        assert (await answerer.aanswer(*PAIRS[1]))[0].text == GOLD[1]

    asyncio.run(ask())
    until = time.monotonic() + 10
    while answerer.model._sessions.calls and time.monotonic() < until:
        time.sleep(0.01)
    before = taken
    time.sleep(0.1)
    assert (taken, answerer.model._sessions.calls) == (before, 0)


def test_event_loops_in_several_threads_share_one_answerer(answerer):
    found: list[list[str]] = [[], [], []]

    async def ask():
        return [answers[0].text for answers in await asyncio.gather(*(answerer.aanswer(*pair) for pair in PAIRS))]

    threads = [
        threading.Thread(target=lambda n=n: found.__setitem__(n, asyncio.run(ask()) + asyncio.run(ask())))
        for n in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == [GOLD * 2] * 3


def test_errors_are_those_of_the_sync_forms(answerer, monkeypatch):
    with pytest.raises(InputError, match=r"^question is empty"):
        asyncio.run(answerer.aanswer("", "Some text."))
    with pytest.raises(InputError, match=r"top_k is '3'"):
        asyncio.run(answerer.aanswer("Who?", "Some text.", top_k="3"))
    with pytest.raises(InputError, match=r"^pair 2: context is empty"):
        asyncio.run(answerer.aanswer_batch([PAIRS[0], ("Who?", " ")]))

    def broken(session: object, window: Window) -> Logits:
        wrong = np.full(len(window), np.nan, dtype=np.float32)
        return wrong, wrong

    monkeypatch.setattr(answerer.model, "_run_one", broken)
    with pytest.raises(LogitsError):
        asyncio.run(answerer.aanswer(*PAIRS[0]))


FORK = """
import asyncio, os, sys
from qadeploy import Answerer

pairs = [("Who keeps the lamp?", "Ada keeps the lamp in room 0. Fay keeps the boat outside.")] * 6
answerer = Answerer.load(sys.argv[1], device="cpu", threads=2)

async def ask():
    found = await asyncio.gather(*(answerer.aanswer(*pair) for pair in pairs))
    return [answers[0].text for answers in found + await answerer.aanswer_batch(pairs)]

assert asyncio.run(ask()) == ["Ada"] * 12
child = os.fork()
if not child:
    sys.exit(0 if asyncio.run(ask()) == ["Ada"] * 12 else 3)
status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
assert asyncio.run(ask()) == ["Ada"] * 12
sys.exit(status)
"""


def test_after_a_fork_parent_and_child_await(bundle, tmp_path):
    run_script(tmp_path, FORK, bundle, seconds=30)
