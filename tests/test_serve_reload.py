"""Reloading under load: no request is lost, running ones are answered by the old bundle, a bad bundle changes nothing."""

from __future__ import annotations

import asyncio
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from qadeploy import Answerer
from qadeploy.errors import InputError
from qadeploy.inference.bundle import MODEL, open_bundle
from tests.conftest import sealed_copy, triplets
from tests.servers_for_tests import Gate, around, serving, started
from tests.sessions_for_tests import until

PAIRS = [(str(row["question"]), str(row["context"])) for row in triplets(4)]
ASKED = {"question": PAIRS[0][0], "context": PAIRS[0][1]}
TOKEN = {"authorization": "Bearer secret"}


@pytest.fixture
def folder(bundle, tmp_path) -> Path:
    """The folder that is served; a link, as deployments have it."""
    link = tmp_path / "current"
    link.symlink_to(bundle)
    return link


@pytest.fixture(scope="module")
def other(bundle, tmp_path_factory) -> Path:
    """A bundle with other scores."""
    settings = {**open_bundle(bundle).manifest["settings"], "temperature": 3.0}
    return sealed_copy(bundle, tmp_path_factory.mktemp("other") / "keepers-2", settings=settings)


def point(link: Path, target: Path) -> None:
    new = link.with_name("new")
    new.symlink_to(target)
    new.replace(link)


def hashes(url: str) -> list[str]:
    lines = httpx.get(f"{url}/metrics", timeout=30).text.splitlines()
    return [line.partition('hash="')[2].partition('"')[0] for line in lines if line.startswith("qadeploy_bundle_info{")]


def scores(folder: Path) -> list[float]:
    answers = Answerer.load(folder, device="cpu", threads=1).answer_batch(PAIRS)
    return [each[0].score for each in answers]


def asking(url: str, stop: threading.Event, found: list[tuple[int, int, float]]) -> Iterator[threading.Thread]:
    def work(number: int) -> None:
        question, context = PAIRS[number]
        with httpx.Client(timeout=30) as client:
            while not stop.is_set():
                reply = client.post(f"{url}/v1/answer", json={"question": question, "context": context})
                score = reply.json()["answers"][0]["score"] if reply.status_code == 200 else 0.0
                found.append((number, reply.status_code, score))

    for number in range(len(PAIRS)):
        yield threading.Thread(target=work, args=(number,))


def test_sighup_changes_the_bundle_without_losing_a_request(folder, bundle, other, tmp_path):
    expected = {path: scores(path) for path in (bundle, other)}
    found: list[tuple[int, int, float]] = []
    stop = threading.Event()
    with started(tmp_path, folder) as server:
        threads = list(asking(server.url, stop, found))
        for thread in threads:
            thread.start()
        for target in (other, bundle, other):
            point(folder, target)
            reloads = len(server.events("reloaded"))
            server.process.send_signal(signal.SIGHUP)
            until(lambda before=reloads: len(server.events("reloaded")) > before)
            wanted = [open_bundle(target).hash]
            until(lambda expected=wanted: hashes(server.url) == expected)  # the previous one is forgotten
        seen = len(found)
        until(lambda: len(found) > seen + 2 * len(PAIRS))
        stop.set()
        for thread in threads:
            thread.join()
        assert server.stop() == 0
    assert {status for _, status, _ in found} == {200}
    near = {
        path: sum(score == pytest.approx(values[number], abs=1e-6) for number, _, score in found)
        for path, values in expected.items()
    }
    assert min(near.values()) > 0
    assert sum(near.values()) == len(found)  # each answer is that of one of the two bundles
    last = found[-len(PAIRS) :]
    assert [score for _, _, score in last] == pytest.approx(
        [expected[other][number] for number, _, _ in last], abs=1e-6
    )


def broken(folder: Path) -> None:
    (folder / MODEL).write_bytes((folder / MODEL).read_bytes()[:-1])


@pytest.mark.parametrize("harm", [broken, shutil.rmtree], ids=["damaged", "gone"])
def test_a_bad_bundle_changes_nothing(harm, bundle, tmp_path):
    copy = tmp_path / "keepers"
    shutil.copytree(bundle, copy)
    with started(tmp_path, copy, "--token", "secret") as server:
        before = httpx.post(f"{server.url}/v1/answer", json=ASKED, headers=TOKEN, timeout=30).json()
        harm(copy)
        refused = httpx.post(f"{server.url}/admin/reload", headers=TOKEN, timeout=30)
        assert (refused.status_code, refused.json()["error"]["type"]) == (409, "not_reloaded")
        assert str(copy) in refused.json()["error"]["message"]
        server.process.send_signal(signal.SIGHUP)
        until(lambda: server.events("not reloaded"))
        assert httpx.post(f"{server.url}/v1/answer", json=ASKED, headers=TOKEN, timeout=30).json() == before
        assert 'qadeploy_reloads_total{result="failed"} 2.0' in httpx.get(f"{server.url}/metrics", timeout=30).text
        assert hashes(server.url) == [open_bundle(bundle).hash]


BREAKS = """
from qadeploy.cli import main
from qadeploy.serve.service import Service

async def reload(service):
    raise ValueError("for no reason")

Service.reload = reload
main()
"""


def test_a_reload_by_signal_that_fails_for_an_unknown_reason_is_logged(bundle, tmp_path):
    with started(tmp_path, bundle, command=(sys.executable, "-c", BREAKS, "serve", str(bundle))) as server:
        server.process.send_signal(signal.SIGHUP)
        until(lambda: server.events("not reloaded"))
        assert "ValueError: for no reason" in server.events("not reloaded")[0]["traceback"]


def test_the_route_reloads_behind_the_token_and_is_absent_without_one(folder, bundle, other):
    answerer = Answerer.load(bundle, device="cpu", threads=1)
    with serving(answerer) as local:
        assert local.post("/admin/reload", None).status_code == 404
    with serving(answerer, token="secret") as local:
        local.service.bundle = folder
        assert local.post("/admin/reload", None).status_code == 401
        same = local.post("/admin/reload", None, headers=TOKEN).json()
        assert same == {"name": "current", "hash": open_bundle(bundle).hash, "changed": False}
        point(folder, other)
        found = local.post("/admin/reload", None, headers=TOKEN).json()
        assert (found["hash"], found["changed"]) == (open_bundle(other).hash, True)
        assert local.get("/v1/model", headers=TOKEN).json()["hash"] == found["hash"]


def test_a_reload_of_the_same_bundle_goes_on_counting_its_drift(folder, bundle, other):
    with serving(Answerer.load(bundle, device="cpu", threads=1)) as local:
        local.service.bundle = folder

        async def counted(client: httpx.AsyncClient, target: Path) -> dict[str, float]:
            await client.post("/v1/answer", json=ASKED)
            point(folder, target)
            await local.service.reload()
            await client.post("/v1/answer", json=ASKED)
            await asyncio.gather(*local.service._before.values())  # the previous one has ended
            text = (await client.get("/metrics")).text
            return {h: float(n) for h, n in re.findall(r'drift_count{figure="score",hash="(.+)"} (.+)', text)}

        async def all_of_them(client: httpx.AsyncClient) -> list[dict[str, float]]:
            return [await counted(client, target) for target in (bundle, other, bundle)]

        first, second = (open_bundle(path).hash for path in (bundle, other))
        assert local.run(all_of_them) == [{first: 2}, {second: 1}, {first: 1}]  # each has a reference of its own


def test_what_runs_is_answered_by_the_bundle_before(folder, bundle, other):
    answerer = Answerer.load(bundle, device="cpu", threads=1)
    gate = Gate(answerer.model)
    with serving(around(answerer, gate)) as local:
        expected = local.ask(ASKED)
        gate.closed = True
        point(folder, other)
        local.service.bundle = folder

        async def both(client: httpx.AsyncClient) -> tuple[httpx.Response, httpx.Response, list[str]]:
            running = asyncio.ensure_future(client.post("/v1/answer", json=ASKED))
            while len(gate.ran) < 4:  # two to warm up, one above
                await asyncio.sleep(0.01)
            assert await local.service.reload()
            with pytest.raises(InputError, match="another reload is running"):
                await asyncio.gather(local.service.reload(), local.service.reload())
            after = await client.post("/v1/answer", json=ASKED)
            shown = (await client.get("/metrics")).text
            gate.open.set()
            first = await running
            end = time.monotonic() + 30
            while answerer.bundle.hash in (later := (await client.get("/metrics")).text) and time.monotonic() < end:
                await asyncio.sleep(0.02)
            return first, after, [shown, later]

        first, after, (during, later) = local.run(both)
        assert first.json() == expected
        assert after.json()["answers"][0]["score"] == pytest.approx(scores(other)[0], abs=1e-6)
        old, new = (open_bundle(path).hash for path in (bundle, other))
        assert [f'hash="{each}"' in during for each in (old, new)] == [True, True]
        assert [f'hash="{each}"' in later for each in (old, new)] == [False, True]


def test_a_bundle_that_takes_too_long_is_given_up(folder, bundle, monkeypatch):
    answerer = Answerer.load(bundle, device="cpu", threads=1)
    with serving(answerer, token="secret", load_timeout=0.05) as local:
        local.service.bundle = folder
        waits = threading.Event()
        real = Answerer.load
        monkeypatch.setattr(Answerer, "load", lambda *args, **options: waits.wait(30) and real(*args, **options))
        refused = local.post("/admin/reload", None, headers=TOKEN)
        assert refused.status_code == 409
        assert "was not loaded within 0.05 s: raise --load-timeout" in refused.json()["error"]["message"]
        waits.set()
        until(lambda: "reload" not in {thread.name for thread in threading.enumerate()})
        assert local.post("/v1/answer", ASKED, headers=TOKEN).status_code == 200
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("run-")][1:]
