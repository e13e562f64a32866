"""The asyncio interface: equal to serial calls, bounded, never blocking the event loop, cancelled in time."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qadeploy import Answerer
from qadeploy.errors import InputError, LogitsError
from qadeploy.inference import session
from tests.sessions_for_tests import Sessions, until
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
def watched() -> Iterator[Sessions]:
    with pytest.MonkeyPatch.context() as patch:
        yield Sessions(patch)


@pytest.fixture(scope="module")
def answerer(bundle: Path, watched: Sessions) -> Answerer:
    return Answerer.load(bundle, device="cpu", threads=2)


@pytest.fixture
def sessions(watched: Sessions) -> Iterator[Sessions]:
    """The sessions of all answerers here, repaired after the test."""
    yield watched
    watched.broken = False
    watched.release()


async def soon(condition: Callable[[], object]) -> None:
    """Waits in a thread until a condition holds."""
    await asyncio.to_thread(until, condition)


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


def test_what_is_awaited_is_worked_on_by_a_bounded_number_of_threads(answerer, sessions, monkeypatch):
    encoded: list[str] = []
    encode = answerer.encode
    monkeypatch.setattr(answerer, "encode", lambda *a: encoded.append(a[0]) or encode(*a))
    sessions.hold()

    def waiting() -> tuple[int, int]:
        return len(encoded), sum(run.threads == 1 for run in sessions.begun)

    async def ask():
        calls = [asyncio.ensure_future(answerer.aanswer(*pair)) for pair in PAIRS * 10]
        await soon(lambda: waiting() >= (4, 2))
        await asyncio.sleep(0.2)  # time in which more would begin
        found = waiting()
        sessions.release()
        return found, await asyncio.gather(*calls)

    waited, found = asyncio.run(ask())
    assert waited == (4, 2)  # the model has two threads, so four calls of coroutines are in progress
    assert [answers[0].text for answers in found] == GOLD * 10


def test_the_event_loop_goes_on_while_a_document_is_tokenised_and_read(answerer, sessions, monkeypatch):
    document, gate = f"{LONG} Only here.", threading.Event()
    tokenise, expected = answerer.encoder.encode, answerer.answer("Who keeps the kettle?", document)
    monkeypatch.setattr(answerer.encoder, "encode", lambda text: gate.wait(60) and tokenise(text))
    own = Answerer(answerer.encoder, answerer.settings, answerer.model)
    sessions.hold()

    async def ask():
        call = asyncio.ensure_future(own.aanswer("Who keeps the kettle?", document))
        for _ in range(20):  # the loop runs while the tokeniser waits,
            await asyncio.sleep(0.001)
        assert not sessions.begun
        gate.set()
        await soon(lambda: sessions.begun)  # and while the model does
        assert not call.done()
        sessions.release()
        return await call

    assert same([asyncio.run(ask())], [expected])


def test_what_is_cancelled_before_it_begins_is_never_tokenised(answerer, sessions, monkeypatch):
    encoded: list[str] = []
    encode = answerer.encode
    monkeypatch.setattr(answerer, "encode", lambda *a: encoded.append(a[0]) or encode(*a))
    sessions.hold()

    async def ask():
        first = [asyncio.ensure_future(answerer.aanswer(*pair)) for pair in PAIRS[:4]]
        await soon(lambda: sessions.begun)
        rest = [asyncio.ensure_future(answerer.aanswer(*pair)) for pair in PAIRS[4:]]
        await asyncio.sleep(0.05)
        for call in rest:
            call.cancel()
        results = await asyncio.gather(*rest, return_exceptions=True)
        assert all(isinstance(result, asyncio.CancelledError) for result in results)
        sessions.release()
        assert [answers[0].text for answers in await asyncio.gather(*first)] == GOLD[:4]
        assert (await answerer.aanswer(*PAIRS[5]))[0].text == GOLD[5]

    asyncio.run(ask())
    assert sorted(encoded) == sorted([question for question, _ in PAIRS[:4]] + [PAIRS[5][0]])


@pytest.mark.parametrize("threads", [1, 2])
def test_a_long_document_stops_before_its_next_windows(bundle, sessions, threads):
    own = Answerer.load(bundle, device="cpu", threads=threads)
    windows = len(
        own.encoder.windows(own.encoder.encode("Who?"), own.encoder.encode(LONG), max_seq_len=24, doc_stride=8)
    )
    sessions.hold()

    async def ask():
        call = asyncio.ensure_future(own.aanswer("Who?", LONG, max_seq_len=24, doc_stride=8))
        await soon(lambda: sessions.begun)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        sessions.release()
        assert (await own.aanswer(*PAIRS[0]))[0].text == GOLD[0]

    asyncio.run(ask())
    assert windows > 40
    assert len(sessions.begun) <= 8 * threads + 1


def test_a_stream_that_is_left_or_cancelled_drops_its_work(answerer, sessions, monkeypatch):
    monkeypatch.setattr(session, "LARGE", 1)  # every call
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

    def quiet() -> bool:
        before = taken, len(sessions.begun)
        time.sleep(0.2)
        return before == (taken, len(sessions.begun))

    asyncio.run(ask())
    until(quiet)
    until(lambda: sessions.shrink_after(lambda: answerer.answer(*PAIRS[1])))  # no call counts as running


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


def test_errors_are_those_of_the_sync_forms(answerer, sessions):
    with pytest.raises(InputError, match=r"^question is empty"):
        asyncio.run(answerer.aanswer("", "Some text."))
    with pytest.raises(InputError, match=r"top_k must be a whole number from 1, not '3'"):
        asyncio.run(answerer.aanswer("Who?", "Some text.", top_k="3"))
    with pytest.raises(InputError, match=r"^pair 2: context is empty"):
        asyncio.run(answerer.aanswer_batch([PAIRS[0], ("Who?", " ")]))

    sessions.broken = True
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
