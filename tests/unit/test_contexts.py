"""The cache of tokenised contexts: each tokenised once, bounded in memory, safe under threads and forks."""

from __future__ import annotations

import itertools
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qadeploy.errors import InputError
from qadeploy.inference.context_cache import CacheStats, ContextCache
from tests.tokenizers_for_tests import CORPUS, encoder

ENCODER = encoder("bert")
SIZES = {text: ENCODER.encode(text).nbytes for text in CORPUS}


def test_a_context_is_tokenised_once_and_given_again():
    cache = ContextCache(ENCODER.encode)
    first = cache.get(CORPUS[0])
    assert all(cache.get("".join(CORPUS[0])) is first for _ in range(19))
    assert cache.stats() == CacheStats(19, 1, 1, SIZES[CORPUS[0]])
    assert first.ids.tolist() == ENCODER.encode(CORPUS[0]).ids.tolist()


@settings(deadline=None)
@given(st.lists(st.sampled_from(CORPUS[:8]), max_size=40), st.integers(0, sum(SIZES.values()) // 4))
def test_what_was_asked_for_last_stays_within_the_bound(asked, limit):
    cache = ContextCache(ENCODER.encode, limit)
    kept: list[str] = []  # a simple model of the rule, the newest last
    hits = 0
    for number, text in enumerate(asked, 1):
        assert cache.get(text).text == text
        if text in kept:
            kept.remove(text)
            hits += 1
        if SIZES[text] <= limit:
            kept.append(text)
        while sum(SIZES[t] for t in kept) > limit:
            kept.pop(0)
        assert cache.stats() == CacheStats(hits, number - hits, len(kept), sum(SIZES[t] for t in kept))


def test_the_size_of_a_context_covers_its_arrays_and_text():
    text = " ".join(CORPUS)
    read = ENCODER.encode(text)
    arrays = read.ids.nbytes + read.offsets.nbytes + read.blank.nbytes + read.words.nbytes
    assert read.nbytes > arrays + len(text)


def test_no_memory_keeps_nothing_but_one_call_still_tokenises_once():
    cache = ContextCache(ENCODER.encode, 0)
    near = {}
    assert cache.get(CORPUS[0], near) is cache.get(CORPUS[0], near)
    assert cache.get(CORPUS[0]) is not near[CORPUS[0]]
    assert cache.stats() == CacheStats(1, 2, 0, 0)


def test_threads_that_ask_at_once_wait_for_one_of_them():
    begun, go, calls = threading.Event(), threading.Event(), []

    def slow(text):
        calls.append(text)
        begun.set()
        assert go.wait(60)
        return ENCODER.encode(text)

    cache = ContextCache(slow)
    with ThreadPoolExecutor(8) as pool:
        found = [pool.submit(cache.get, CORPUS[1]) for _ in range(8)]
        assert begun.wait(60)
        go.set()
        assert len({id(f.result()) for f in found}) == 1
    assert calls == [CORPUS[1]]
    assert cache.stats() == CacheStats(7, 1, 1, SIZES[CORPUS[1]])


def test_many_threads_in_a_small_cache_keep_the_sum_of_bytes_right():
    limit = 3 * max(SIZES.values())
    cache = ContextCache(ENCODER.encode, limit)
    with ThreadPoolExecutor(8) as pool:
        for text, read in zip(CORPUS * 20, pool.map(cache.get, CORPUS * 20), strict=True):
            assert read.text == text
    stats = cache.stats()
    assert stats.hits + stats.misses == 20 * len(CORPUS)
    assert 0 < stats.bytes <= limit
    for text in CORPUS:  # one by one: now the last ones that fit are kept
        cache.get(text)
    sums = list(itertools.accumulate(SIZES[text] for text in reversed(CORPUS)))
    kept = [total for total in sums if total <= limit]
    assert (cache.stats().entries, cache.stats().bytes) == (len(kept), kept[-1])


def test_a_context_that_cannot_be_tokenised_leaves_nothing_behind():
    cache = ContextCache(ENCODER.encode)
    for _ in range(2):
        with pytest.raises(InputError, match="lone surrogate"):
            cache.get("half \ud800 pair")
    assert cache.stats() == CacheStats(0, 0, 0, 0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_child_forked_while_the_lock_is_held_has_a_cache_of_its_own():
    looked_up, go = threading.Event(), threading.Event()

    class Slow(str):
        """A context whose look-up takes as long as the test wants."""

        def __hash__(self) -> int:
            looked_up.set()
            assert go.wait(60)
            return super().__hash__()

    cache = ContextCache(ENCODER.encode)
    cache.get(CORPUS[0])
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(cache.get, Slow(CORPUS[0]))
        assert looked_up.wait(60)
        child = os.fork()
        if not child:
            signal.alarm(30)  # ends a child that waits for the lock
            sound = cache.get(CORPUS[0]).text == CORPUS[0] and cache.stats().misses == 1
            os._exit(0 if sound else 3)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        go.set()
        assert other.result().text == CORPUS[0]
    assert cache.stats().misses == 1


@pytest.mark.parametrize("limit", [-1, 1.5, True, None, "64"])
def test_a_bound_that_is_no_count_of_bytes_is_refused(limit):
    with pytest.raises(InputError, match="context_cache_bytes is"):
        ContextCache(ENCODER.encode, limit)


def test_many_new_contexts_are_tokenised_together_and_kept():
    cache = ContextCache(ENCODER.encode)
    cache.get(CORPUS[0])
    asked: list[list[str]] = []

    def together(texts):
        asked.append(list(texts))
        return ENCODER.encode_many(texts)

    near = cache.ahead([CORPUS[0], CORPUS[1], CORPUS[2], CORPUS[1]], together)
    assert asked == [[CORPUS[1], CORPUS[2]]]  # neither cached contexts nor any twice
    assert list(near) == [CORPUS[1], CORPUS[2]]
    assert near[CORPUS[1]].ids.tolist() == ENCODER.encode(CORPUS[1]).ids.tolist()
    assert cache.get(CORPUS[1], near) is near[CORPUS[1]]
    assert cache.get(CORPUS[2]) is near[CORPUS[2]]
    assert cache.stats() == CacheStats(2, 3, 3, sum(SIZES[text] for text in CORPUS[:3]))
    assert cache.ahead(CORPUS[:2], together) == {}
    assert len(asked) == 1


def test_contexts_tokenised_together_keep_the_bound():
    limit = SIZES[CORPUS[3]]
    cache = ContextCache(ENCODER.encode, limit)
    near = cache.ahead(CORPUS[:4], ENCODER.encode_many)
    assert len(near) == 4  # the call has them all, whatever is kept
    assert cache.stats().bytes <= limit
    nothing = ContextCache(ENCODER.encode, 0)
    assert len(nothing.ahead(CORPUS[:4], ENCODER.encode_many)) == 4
    assert nothing.stats() == CacheStats(0, 4, 0, 0)
