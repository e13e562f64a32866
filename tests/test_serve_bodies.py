"""Bodies made to block the server: no step of the event loop takes long, and items are counted first."""

from __future__ import annotations

import asyncio
import json
import re
import threading
import time
from pathlib import Path

import httpx
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from qadeploy import Answerer
from qadeploy.serve import body as bodies
from qadeploy.serve.settings import Settings
from tests.servers_for_tests import JSON, Local, serving, started

PAIR = {"question": "Who keeps the lamp?", "context": "Ada keeps the lamp in room 0."}
MOST = Settings().max_body_bytes
LONGEST_STEP = 0.05  # seconds of the event loop


def objects(size: int) -> bytes:
    return b"[" + b",".join([b"{}"] * (size // 3 - 1)) + b"]"


def text(piece: str, size: int = MOST) -> bytes:
    """One question whose context repeats a piece."""
    head = b'{"question": "Who?", "context": "'
    return head + piece.encode() * ((size - len(head) - 2) // len(piece.encode())) + b'"}'


def longest_step(local: Local, path: str, content: bytes, monkeypatch) -> tuple[httpx.Response, float]:
    """The response to a body, and the longest time that the event loop's thread worked without a pause."""
    worst = 0.0
    run = asyncio.events.Handle._run

    def timed(handle):
        nonlocal worst
        begun = time.thread_time()
        run(handle)
        worst = max(worst, time.thread_time() - begun)

    monkeypatch.setattr(asyncio.events.Handle, "_run", timed)
    found = local.request("POST", path, content=content, headers=JSON)
    monkeypatch.undo()
    return found, worst


def keys(count: int) -> bytes:
    return b"{" + b",".join(b'"k%d":1' % i for i in range(count)) + b"}"


def listed(item: bytes, count: int) -> bytes:
    return b"[" + b",".join([item] * count) + b"]"


# The path, the body, and the status and type of the refusal.
HOSTILE = {
    "1.4 million empty objects": ("/v1/answer", lambda: objects(MOST), 422, "batch_too_large"),
    "300 KB of empty objects": ("/v1/answer", lambda: objects(300_000), 422, "batch_too_large"),
    "the same as inputs": ("/", lambda: b'{"inputs":' + objects(MOST - 20) + b"}", 422, "batch_too_large"),
    "a million questions of one letter": (
        "/v1/answer",
        lambda: b'{"context":"Ada.","questions":' + listed(b'"a"', 1_000_000) + b"}",
        422,
        "batch_too_large",
    ),
    "a list in a question": ("/v1/answer", lambda: b'{"question":' + objects(MOST - 20) + b"}", 422, "invalid_request"),
    "a list in options": ("/", lambda: b'{"options":' + objects(MOST - 20) + b"}", 422, "invalid_request"),
    "many keys": ("/v1/answer", lambda: keys(300_000), 422, "invalid_request"),
    "as many keys as are let through": ("/v1/answer", lambda: keys(2_300), 422, "invalid_request"),
    "as many in each of 64": ("/v1/answer", lambda: listed(keys(35), 64), 422, "invalid_request"),
    "nested lists": ("/v1/answer", lambda: b"[" * MOST, 400, "bad_request"),
    "nested objects": ("/v1/answer", lambda: b'{"question":' * (MOST // 12), 400, "bad_request"),
    "a number of megabytes": ("/v1/answer", lambda: b'{"top_k":' + b"9" * (MOST - 20) + b"}", 400, "bad_request"),
    "a fraction": ("/v1/answer", lambda: b'{"top_k":0.' + b"1" * (MOST - 20) + b"}", 422, "invalid_request"),
    "long numbers": ("/v1/answer", lambda: listed(b"1" * 4300, 900), 422, "invalid_request"),
    "quotes": ("/v1/answer", lambda: b'"' * MOST, 422, "invalid_request"),
    "spaces": ("/v1/answer", lambda: b" " * MOST, 422, "invalid_request"),
    "backslashes": ("/v1/answer", lambda: b"\\" * MOST, 422, "invalid_request"),
    "brackets behind a backslash": ("/v1/answer", lambda: b'\\"' + objects(MOST - 2), 400, "bad_request"),
    "a long question": (
        "/v1/answer",
        lambda: b'{"context":"Ada.","question":"' + b"a" * (MOST - 40) + b'"}',
        422,
        "question_too_long",
    ),
    "a context of spaces": ("/v1/answer", lambda: text(" "), 422, "invalid_request"),
    "a context of letters": ("/v1/answer", lambda: text("a"), 422, "context_too_long"),
    "a context of escapes": ("/v1/answer", lambda: text("a\\n"), 422, "context_too_long"),
    "a context of escaped quotes": ("/v1/answer", lambda: text('\\"'), 422, "context_too_long"),
    "a context of numbered escapes": ("/v1/answer", lambda: text("\\u00e9"), 422, "context_too_long"),
    "a context of pairs of escapes": ("/v1/answer", lambda: text("\\ud83d\\ude00"), 422, "context_too_long"),
    "a context of emoji": ("/v1/answer", lambda: text("a\U0001f600"), 422, "context_too_long"),
    "64 long contexts": ("/v1/answer", lambda: listed(text("\u00e4 ", MOST // 64 - 8), 64), 422, "too_many_windows"),
    "UTF-16": ("/v1/answer", lambda: objects(MOST // 2).decode().encode("utf-16-le"), 400, "bad_request"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_no_body_holds_up_the_event_loop(server, monkeypatch, name):
    path, made, status, kind = HOSTILE[name]
    content = made()
    assert len(content) <= MOST
    times = []
    for _ in range(3):  # the machine may be busy
        response, seconds = longest_step(server, path, content, monkeypatch)
        times.append(seconds)
        if seconds < LONGEST_STEP:
            break
    error = response.json()["error"]
    assert (response.status_code, error["type"]) == (status, kind)
    assert set(error) == {"type", "message", "limit", "flag"}
    assert len(response.content) < 2_000
    print(f"{name}: {1000 * min(times):.1f} ms")
    assert min(times) < LONGEST_STEP, times


@pytest.mark.parametrize(
    ("path", "value", "count"),
    [
        ("/v1/answer", [{}] * 65, "65"),
        ("/v1/answer", [1] * 65, "65"),
        ("/v1/answer", [PAIR] * 65, "65"),
        ("/v1/answer", {"questions": [None] * 70}, "70"),
        ("/", {"inputs": [{}] * 66, "parameters": {"top_k": "many"}}, "66"),
        # What the first 64 KiB hold: two bytes and a comma each.
        ("/v1/answer", [{}] * 30_000, "21845 questions or more"),
    ],
)
def test_questions_are_counted_before_anything_is_validated(server, path, value, count):
    response = server.request("POST", path, content=json.dumps(value, separators=(",", ":")), headers=JSON)
    error = response.json()["error"]
    assert (response.status_code, error["type"]) == (422, "batch_too_large")
    assert f"the request holds {count}" in error["message"]
    assert (error["limit"], error["flag"]) == (64, "--max-batch")


def test_a_whole_batch_with_all_options_is_not_too_much(server):
    numbers = {"top_k": 3.0, "max_answer_len": 12, "max_seq_len": 128, "doc_stride": 16, "prefilter": 2}
    flags = {"align_to_words": False, "allow_no_answer": False}
    items = [{"question": 'Who "keeps" \\ the [lamp]?', "context": "{Ada}: keeps, the lamp", **numbers, **flags}] * 64
    for indent in (None, 8):
        response = server.request("POST", "/v1/answer", content=json.dumps(items, indent=indent), headers=JSON)
        assert response.status_code == 200, response.text
    many = {"context": PAIR["context"], "questions": ['"\\"'] * 64, **numbers, **flags}
    assert server.request("POST", "/v1/answer", content=json.dumps(many), headers=JSON).status_code == 200


def test_a_larger_batch_is_allowed_more(bundle):
    with serving(
        Answerer.load(bundle, device="cpu", threads=1), max_batch=300, max_queue=300, max_windows=300
    ) as local:
        assert local.post("/v1/answer", [PAIR] * 300).status_code == 200


def test_a_byte_order_mark_is_read_over_and_other_encodings_are_refused(server):
    text = json.dumps(PAIR)
    for encoding, status in (("utf-8-sig", 200), ("utf-16", 400), ("utf-32-le", 422)):
        response = server.request("POST", "/v1/answer", content=text.encode(encoding), headers=JSON)
        assert response.status_code == status, encoding


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')


@given(value=JSON_VALUES, step=st.integers(1, 40), indent=st.none() | st.integers(0, 3), ascii_only=st.booleans())
@hypothesis_settings(max_examples=300, deadline=None)
def test_strings_and_what_is_outside_them_are_counted_in_any_steps(value, step, indent, ascii_only):
    text = json.dumps(value, indent=indent, ensure_ascii=ascii_only)
    strings = len(_STRING.findall(text))
    outside = "".join(_STRING.sub("", text).split())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bodies, "_STEP", step)
        found = sum(parts for _, parts in bodies._parts(text.encode()))
    # A string that lies in two steps is counted in either, by the step in which it opens or ends.
    assert len(outside) <= found <= len(outside) + 2 * strings
    if step == 40 and len(text.encode()) <= 40:
        assert found == len(outside) + strings


def test_a_hostile_body_costs_little_memory_and_no_silence(bundle, tmp_path):
    with started(tmp_path, bundle) as remote:
        assert httpx.post(f"{remote.url}/v1/answer", json=PAIR).status_code == 200
        before = resident(remote.process.pid)
        silences = [longest_silence(remote.url)]
        # Other work on this machine can delay a server too, but not every time.
        while min(silences) >= 1 and len(silences) < 4:
            silences.append(longest_silence(remote.url))
        assert resident(remote.process.pid, "VmHWM") - before < 100  # it was 3,700
        assert min(silences) < 1  # it was 14 s and more


def longest_silence(url: str) -> float:
    """The longest time in seconds for which a server answers no live check while it gets hostile bodies."""
    worst, done = 0.0, threading.Event()

    def pulse() -> None:
        nonlocal worst
        while not done.is_set():
            begun = time.monotonic()
            assert httpx.get(f"{url}/health/live", timeout=60).status_code == 200
            worst = max(worst, time.monotonic() - begun)

    watch = threading.Thread(target=pulse)
    watch.start()
    for name in ("1.4 million empty objects", "the same as inputs", "a million questions of one letter"):
        path, made, status, _ = HOSTILE[name]
        response = httpx.post(f"{url}{path}", content=made(), headers=JSON, timeout=60)
        assert response.status_code == status
    done.set()
    watch.join()
    return worst


def resident(pid: int, what: str = "VmRSS") -> float:
    """The memory of a process in MiB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(what))
