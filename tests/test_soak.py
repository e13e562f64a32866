"""Honest clients among hostile ones, for minutes (pytest -m slow): each is answered rightly, or refused at once."""

from __future__ import annotations

import collections
import os
import random
import socket
import threading
import time
from collections.abc import Callable
from urllib.parse import urlsplit

import httpx
import pytest

from qadeploy import Answerer
from qadeploy.shipped import base_bundle_path
from tests.conftest import triplets
from tests.servers_for_tests import JSON, started

SECONDS = float(os.environ.get("QADEPLOY_SOAK_SECONDS", "1200"))
HONEST, SILENT = 4, 1_100
AT_ONCE = 2.0  # seconds within which a refusal must come, on a machine that also runs the clients
DOCUMENT = "\u827e\u8fbe\u5728\u6e2f\u53e3\u70b9\u706f\u3002" * 1_725  # 13,800 characters
BODIES = [
    b"[" + b",".join([b"{}"] * 1_000_000) + b"]",
    b'{"context":"Ada.","questions":[' + b",".join([b'"a"'] * 500_000) + b"]}",
    b"[" * 2**21,
    b'{"top_k":' + b"9" * 2**20 + b"}",
]


class Crowd:
    """Threads that repeat their work until the end."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.address = (urlsplit(url).hostname or "", urlsplit(url).port or 0)
        self.end = time.monotonic() + SECONDS
        self.counts: collections.Counter[str] = collections.Counter()
        self.wrong: list[str] = []
        self.threads: list[threading.Thread] = []

    def add(self, work: Callable[[], None], pause: float = 0.0) -> None:
        def go() -> None:
            while time.monotonic() < self.end:
                try:
                    work()
                except (OSError, httpx.HTTPError) as error:  # hostile clients are cut off
                    self.counts[f"{work.__name__}: {type(error).__name__}"] += 1
                time.sleep(pause)

        self.threads.append(threading.Thread(target=go, daemon=True))
        self.threads[-1].start()

    def bodies(self) -> None:
        found = httpx.post(f"{self.url}/v1/answer", content=random.choice(BODIES), headers=JSON, timeout=60)
        self.counts[f"bodies: {found.status_code}"] += 1

    def heads(self) -> None:
        with socket.create_connection(self.address, 30) as connection:
            connection.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n")
            for _ in range(200):
                connection.sendall(b"X: " + b"a" * 2**16 + b"\r\n")

    def silence(self) -> None:
        """Connections that say nothing, and some that say it slowly."""
        held = []
        try:
            for i in range(SILENT // 4):
                held.append(socket.create_connection(self.address, 30))
                if i % 10 == 0:
                    held[-1].sendall(b"POST /v1/answer HTTP/1.1\r\n")
            time.sleep(15)
        finally:
            for connection in held:
                connection.close()

    def documents(self) -> None:
        asked = {"question": "\u8c01\u70b9\u706f\uff1f", "context": DOCUMENT}
        found = httpx.post(f"{self.url}/v1/answer", json=asked, timeout=60)
        self.counts[f"documents: {found.status_code}"] += 1
        if found.status_code == 429:
            time.sleep(float(found.headers.get("retry-after", 1)))


@pytest.mark.slow
def test_every_honest_request_is_answered_or_refused_at_once(tmp_path, capsys):
    bundle = base_bundle_path()
    pairs = [(str(row["question"]), str(row["context"])) for row in triplets(24)]
    expected = dict(zip(pairs, Answerer.load(bundle, device="cpu").answer_batch(pairs), strict=True))
    times: list[float] = []
    with started(tmp_path, bundle) as server, httpx.Client(base_url=server.url, timeout=60) as client:
        crowd = Crowd(server.url)

        def honest() -> None:
            question, context = pair = random.choice(pairs)
            begun = time.monotonic()
            try:
                found = client.post("/v1/answer", json={"question": question, "context": context})
            except httpx.HTTPError as error:
                crowd.wrong.append(f"{type(error).__name__} after {time.monotonic() - begun:.1f} s: {error}")
                return
            took = time.monotonic() - begun
            crowd.counts[f"honest: {found.status_code}"] += 1
            if found.status_code == 200:
                times.append(took)
                texts = [answer["text"] for answer in found.json()["answers"]]
                if texts != [answer.text for answer in expected[pair]]:
                    crowd.wrong.append(f"{pair}: {texts}")
            elif found.status_code not in {429, 503} or took > AT_ONCE:
                crowd.wrong.append(f"{found.status_code} after {took:.1f} s: {found.text[:200]}")

        for _ in range(HONEST):
            crowd.add(honest, pause=0.1)
        for _ in range(2):
            crowd.add(crowd.bodies, pause=0.5)
        for _ in range(4):
            crowd.add(crowd.silence)
        crowd.add(crowd.heads, pause=0.5)
        for _ in range(16):
            crowd.add(crowd.documents)
        for thread in crowd.threads:
            thread.join(SECONDS + 120)
        live = httpx.get(f"{server.url}/health/live", timeout=5).status_code
        errors = [line for line in server.log.read_text().splitlines() if "Traceback" in line]
        stopped = server.stop()
    times.sort()
    with capsys.disabled():
        print(dict(crowd.counts), f"honest: median {times[len(times) // 2]:.3f} s, slowest {times[-1]:.3f} s")
    assert not crowd.wrong[:5], (
        f"{len(crowd.wrong)} of {sum(n for k, n in crowd.counts.items() if k.startswith('honest'))}"
    )
    assert (live, errors, stopped) == (200, [], 0)
    assert len(times) > SECONDS / 10
