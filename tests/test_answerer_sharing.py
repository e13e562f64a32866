"""One answerer for many: contexts that are kept, streams, threads and processes."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest

from qadeploy import Answerer
from qadeploy.errors import InputError
from qadeploy.inference import session
from tests.conftest import NAMES, THINGS
from tests.test_session_answerer import GOLD, LONG, MIXED, PAIRS, run_script, same

THREADS = 2  # of the answerer


# ---------------------------------------------------------------- contexts that are kept, and streams


def test_twenty_questions_on_one_document_tokenise_it_once(bundle, monkeypatch):
    document = " ".join(LONG for _ in range(20))[:20_000]
    asked = [(f"Who keeps the {thing} of {name}?", document) for thing in THINGS[:4] for name in NAMES[:5]]
    loaded, seen = Answerer.load(bundle, device="cpu", threads=2), []
    encode = loaded.encoder.encode
    monkeypatch.setattr(loaded.encoder, "encode", lambda text: seen.append(text) or encode(text))
    with_cache = Answerer(loaded.encoder, loaded.settings, loaded.model)
    alone = [with_cache.answer(*pair) for pair in asked]
    assert same(alone, with_cache.answer_batch(asked))
    assert seen.count(document) == 1
    stats = with_cache.stats()
    assert (stats.misses, stats.hits, stats.entries) == (1, 39, 1)
    assert stats.bytes == with_cache.encoder.encode(document).nbytes
    without = Answerer.load(bundle, device="cpu", threads=2, context_cache_bytes=0)
    assert same([without.answer(*pair) for pair in asked[:2]], alone[:2])
    assert (without.stats().misses, without.stats().entries) == (2, 0)
    assert same(without.answer_batch(asked[:2]), alone[:2])  # one call still tokenises it only once
    assert (without.stats().misses, without.stats().hits) == (3, 1)


def test_a_stream_gives_all_answers_before_the_error(answerer):
    def source(broken):
        yield from PAIRS * 4
        if broken:
            raise OSError("the file went away")
        yield "", "text"

    found = []

    def take(broken):
        found.clear()
        found.extend(answers[0].text for answers in answerer.answer_stream(source(broken)))

    with pytest.raises(InputError, match=r"^pair 97: question is empty"):
        take(broken=False)
    assert found == GOLD * 4  # three chunks of 32
    with pytest.raises(OSError, match="the file went away"):
        take(broken=True)
    assert found == GOLD * 4


def test_the_next_questions_are_tokenised_while_the_model_works(bundle, sessions, monkeypatch):
    own = Answerer.load(bundle, device="cpu", threads=2)
    begin, order = own.model.start, []

    def start(windows):
        order.append(len(windows))
        if len(order) == 2:  # the second chunk is cut into windows, and none of the first has run
            sessions.release()
        return begin(windows)

    monkeypatch.setattr(own.model, "start", start)
    sessions.hold()
    assert [a[0].text for a in own.answer_batch(PAIRS * 3)] == GOLD * 3
    assert sum(order) == len(PAIRS * 3)


def test_a_stream_that_is_left_drops_its_work(bundle, sessions, monkeypatch):
    monkeypatch.setattr(session, "LARGE", 1)  # every call
    own = Answerer.load(bundle, device="cpu", threads=2)
    stream = own.answer_stream(itertools.cycle(PAIRS))
    assert next(stream)[0].text == GOLD[0]
    stream.close()
    found = []
    assert sessions.shrink_after(lambda: found.extend(own.answer(*PAIRS[1])))  # no call counts as running
    assert found[0].text == GOLD[1]


def test_work_that_could_not_start_does_not_count_as_running(bundle, sessions, monkeypatch):
    monkeypatch.setattr(session, "LARGE", 1)  # every call
    own = Answerer.load(bundle, device="cpu", threads=2)

    def fails(*given):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(ThreadPoolExecutor, "submit", fails)
        with pytest.raises(RuntimeError, match="new thread"):
            own.answer_batch(PAIRS)
    assert sessions.shrink_after(lambda: own.answer(*PAIRS[1]))


# ---------------------------------------------------------------- threads and processes


def test_sixteen_threads_with_mixed_options_answer_like_one(answerer):
    options = [
        {},
        {"top_k": 3},
        {"max_seq_len": 40, "doc_stride": 8},
        {"max_seq_len": 64, "doc_stride": 20, "top_k": 2},
        {"allow_no_answer": True, "top_k": 2},
        {"align_to_words": True, "max_answer_len": 4},
    ]
    calls = [(MIXED[n % len(MIXED)], options[n % len(options)]) for n in range(240)]

    def ask(call):
        (question, context), chosen = call
        if len(question) % 2:
            return answerer.answer(question, context, **chosen)
        return answerer.answer_batch([(question, context)], **chosen)[0]

    serial = [ask(call) for call in calls]
    with ThreadPoolExecutor(16) as pool:
        assert same(list(pool.map(ask, calls)), serial)


FORK = """
import os, sys
from qadeploy import Answerer

def answers(answerer):
    found = answerer.answer_batch(pairs) + [answerer.answer(*pairs[0])]
    return [(a[0].text, a[0].start) for a in found]

pairs = [("Who keeps the lamp?", "Ada keeps the lamp in room 0. Fay keeps the boat outside.")] * 6
answerer = Answerer.load(sys.argv[1], device="cpu", threads=2)
expected = answers(answerer)  # every session and the pool are in use before the fork
for asks in (True, False):
    child = os.fork()
    if not child:
        sys.exit(0 if not asks or answers(answerer) == expected else 3)  # the interpreter shuts down as usual
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status:
        sys.exit(f"child that asks={asks} ended with {status}")
stream = answerer.answer_stream(pairs * 40)
first = next(stream)  # and now windows of the stream are on their way
child = os.fork()
if not child:
    rest = [(a[0].text, a[0].start) for a in stream]
    sys.exit(0 if rest == (expected[:-1] * 40)[1:] else 5)
status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
if status or len(list(stream)) != 239:
    sys.exit(f"child within a stream ended with {status}")
sys.exit(0 if answers(answerer) == expected and expected[0][0] == "Ada" else 4)
"""

SPAWN = """
import multiprocessing, sys
from qadeploy import Answerer

def load(path):
    global answerer
    answerer = Answerer.load(path, device="cpu", threads=1)

def ask(pair):
    return answerer.answer(*pair)[0].text

if __name__ == "__main__":
    pairs = [("Who keeps the lamp?", f"{name} keeps the lamp in room 0.") for name in ("Ada", "Bela", "Cora")]
    with multiprocessing.get_context("spawn").Pool(2, load, (sys.argv[1],)) as pool:
        found = pool.map(ask, pairs)
    sys.exit(0 if found == ["Ada", "Bela", "Cora"] else f"found {found}")
"""


def test_after_a_fork_parent_and_child_answer(bundle, tmp_path):
    run_script(tmp_path, FORK, bundle)


def test_spawned_processes_answer(bundle, tmp_path):
    run_script(tmp_path, SPAWN, bundle)
