"""Servers for tests: an application called in this process, and a real one in its own process."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from qadeploy import Answerer
from qadeploy.inference.answerer import LogitsModel
from qadeploy.records import Logits, Window
from qadeploy.serve.app import create_app
from qadeploy.serve.feedback import Feedback
from qadeploy.serve.metrics import Metrics
from qadeploy.serve.search import open_corpus
from qadeploy.serve.service import Engine, Service
from qadeploy.serve.settings import Settings

JSON = {"content-type": "application/json"}


class Gate(LogitsModel):
    """A model whose runs last ``seconds``, or until ``open`` is set. Keeps the windows in the order of their runs."""

    device = "cpu"
    inputs = ("input_ids", "attention_mask")

    def __init__(self, model: Any, seconds: float = 0.0, closed: bool = False) -> None:
        self.model = model
        self.seconds = seconds
        self.open = threading.Event()
        self.closed = closed
        self.ran: list[list[Window]] = []

    def run(self, windows: Sequence[Window]) -> list[Logits]:
        self.ran.append(list(windows))
        if self.closed:
            self.open.wait(30)
        elif self.seconds:
            threading.Event().wait(self.seconds)
        return self.model.run(windows)

    run_batch = run


class Fixed:
    """A model that returns the same logit everywhere."""

    device = "cpu"
    inputs = ("input_ids",)

    def __init__(self, value: float) -> None:
        self.value = value

    def run(self, windows: Sequence[Window]) -> list[Logits]:
        return [(np.full(len(w), self.value, np.float32), np.full(len(w), self.value, np.float32)) for w in windows]


def around(answerer: Answerer, model: Any) -> Answerer:
    """The answerer with another model."""
    return Answerer(answerer.encoder, answerer.settings, model, answerer.bundle)


def service_of(answerer: Answerer, settings: Settings) -> Service:
    """The service of an answerer instead of a bundle."""
    metrics = Metrics()
    return Service(Engine.of(answerer, settings, metrics), settings, metrics)


@contextlib.contextmanager
def serving(answerer: Answerer, **settings: Any) -> Iterator[Local]:
    """An application in this process."""
    service = service_of(answerer, Settings(**{"threads": 1, **settings}))
    if service.settings.corpus is not None:
        service.corpus = open_corpus(service.settings.corpus)
    if service.settings.feedback is not None:
        service.feedback = Feedback(Path(service.settings.feedback), service.settings.feedback_bytes)
    try:
        yield Local(service)
    finally:
        service.close()


@dataclass
class Local:
    """An application, called without a network."""

    service: Service
    app: Any = field(init=False)

    def __post_init__(self) -> None:
        self.app = create_app(self.service)

    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        async def call(client: httpx.AsyncClient) -> httpx.Response:
            return await client.request(method, path, **options)

        return self.run(call)

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.request("GET", path, **options)

    def post(self, path: str, value: Any, **options: Any) -> httpx.Response:
        return self.request("POST", path, json=value, **options)

    def ask(self, value: Any) -> Any:
        response = self.post("/v1/answer", value)
        assert response.status_code == 200, response.text
        return response.json()

    def run(self, work: Callable[[httpx.AsyncClient], Any]) -> Any:
        async def all_of_it() -> Any:
            transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=30) as client:
                return await work(client)

        return asyncio.run(all_of_it())

    def metric(self, line: str) -> float:
        """The value of a line of /metrics, named with its labels."""
        found = [row.rpartition(" ")[2] for row in self.get("/metrics").text.splitlines() if row.startswith(line + " ")]
        assert len(found) == 1, f"{line} in\n{self.get('/metrics').text}"
        return float(found[0])


@dataclass
class Remote:
    """A server in its own process."""

    process: subprocess.Popen[str]
    url: str
    log: Path

    def stop(self, number: int = signal.SIGTERM, seconds: float = 20) -> int:
        self.process.send_signal(number)
        return self.process.wait(seconds)

    def events(self, name: str) -> list[dict[str, Any]]:
        """The log's entries of one event."""
        lines = [json.loads(line) for line in self.log.read_text().splitlines()]
        return [line for line in lines if line["event"] == name]


@contextlib.contextmanager
def started(
    folder: Path, bundle: Path, *flags: str, command: Sequence[str] = (), **environment: str
) -> Iterator[Remote]:
    """``qadeploy serve`` on a free port; killed at the end if it still runs."""
    log = folder / "log.jsonl"
    start = command or (sys.executable, "-m", "qadeploy", "serve", str(bundle))
    arguments = [*start, "--port", "0", "--threads", "1", "--json", *flags]
    with log.open("w") as stream:
        process = subprocess.Popen(
            arguments, stdout=subprocess.PIPE, stderr=stream, text=True, env={**os.environ, **environment}
        )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, log.read_text()
        yield Remote(process, json.loads(line)["url"], log)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
