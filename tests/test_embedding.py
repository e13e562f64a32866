"""The examples of docs/embedding.md, read from the page and run unchanged, on the tests' bundle."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from qadeploy import Answerer
from tests.processes_for_tests import succeeded

PAGE = Path(__file__).parents[1] / "docs" / "embedding.md"
BLOCKS = dict(re.findall(r"^```(?:python|sh) (\S+)\n(.*?)^```$", PAGE.read_text("utf-8"), re.DOTALL | re.MULTILINE))
LAMP = {"question": "Who keeps the lamp?", "context": "Ada keeps the lamp in room 7."}


@pytest.fixture(scope="module")
def place(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the page's files and the bundle that they load."""
    folder = tmp_path_factory.mktemp("embedding")
    shutil.copytree(bundle, folder / "bundles" / "handbook-int8")
    for name, text in BLOCKS.items():
        if name.endswith(".py"):
            (folder / name).write_text(text, encoding="utf-8")
    for name in ("queue", "results"):
        (folder / name).mkdir()
    return folder


def environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(PAGE.parents[1]), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "PYTHONWARNINGS": "default"}


def run(place: Path, name: str) -> list[str]:
    done = succeeded([sys.executable, name], cwd=place, env=environment(), timeout=60)
    return done.stdout.splitlines()


@contextlib.contextmanager
def started(place: Path, command: str, ready: str) -> Iterator[tuple[subprocess.Popen[str], re.Match[str]]]:
    """A program of the environment that runs until the block ends, from the moment its log matches ``ready``."""
    log = place / f"{shlex.split(command)[0]}.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", *shlex.split(command)],
            cwd=place,
            env=environment(),
            stdout=file,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
    try:
        yield process, _wait(process, log, ready)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)


def _wait(process: subprocess.Popen[str], log: Path, ready: str) -> re.Match[str]:
    for _ in range(600):
        if found := re.search(ready, log.read_text()):
            return found
        assert process.poll() is None, log.read_text()
        time.sleep(0.05)
    raise AssertionError(f"not ready within 30 s:\n{log.read_text()}")


def stop(process: subprocess.Popen[str]) -> int:
    process.send_signal(signal.SIGTERM)
    return process.wait(20)


def test_the_page_has_the_examples_that_are_run_here():
    assert set(BLOCKS) == {
        *("pool.py", "gather.py", "app.py", "tasks.py", "forked.py", "spawned.py", "gunicorn", "celery")
    }


@pytest.mark.parametrize(
    ("name", "output"),
    [
        ("pool.py", ["Ada", "Bela", "Cora"]),
        ("gather.py", ["Ada", "Bela", "Cora"] * 2 + ["took too long, and was dropped"]),
        ("forked.py", ["Ada Bela Cora", "Dora"]),
        ("spawned.py", ["Ada Bela Cora"]),
    ],
)
def test_scripts_answer(place, name, output):
    assert run(place, name) == output


def ask_both_ways(port: str) -> None:
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=20) as client:
        for _ in range(6):
            answers = client.post("/answer", json=LAMP)
            assert answers.status_code == 200, answers.text
            assert answers.json()[0]["text"] == "Ada"
        refused = client.post("/answer", json={**LAMP, "context": " "})
        assert (refused.status_code, refused.json()["detail"]) == (422, "context is empty: give it some text")


def test_fastapi_under_uvicorn(place):
    with started(place, "uvicorn app:app --port 0", r"running on http://127\.0\.0\.1:(\d+)") as (process, found):
        ask_both_ways(found[1])
        assert stop(process) in {0, -signal.SIGTERM}  # once it has shut down, uvicorn sends itself the signal again


def test_gunicorn_with_preload(place):
    command = BLOCKS["gunicorn"].strip()
    assert "--preload" in command
    command = command.replace(":8000", ":0")
    with started(place, command, r"Listening at: http://127\.0\.0\.1:(\d+)") as (process, found):
        _wait(process, place / "gunicorn.log", r"(?s)(Application startup complete.*){2}")
        ask_both_ways(found[1])
        assert stop(process) == 0
    assert (place / "gunicorn.log").read_text().count("Booting worker") == 2


ENQUEUE = """
import json, sys, tasks
names = ["Ada", "Bela", "Cora"]
sent = [tasks.answer.delay("Who keeps the lamp?", f"{name} keeps the lamp in room 7.") for name in names]
print(json.dumps([one.get(timeout=20, interval=0.02)["text"] for one in sent]))
"""


def test_celery_with_its_prefork_pool(place):
    quick = "--without-mingle --without-gossip --without-heartbeat"  # which a folder as the broker makes slow
    # Killed at the end, because its own shutdown takes 6 s.
    with started(place, f"{BLOCKS['celery'].strip()} {quick}", r"celery@"):
        done = succeeded([sys.executable, "-c", ENQUEUE], cwd=place, env=environment())
        assert json.loads(done.stdout) == ["Ada", "Bela", "Cora"]


def test_an_answerer_cannot_be_pickled(bundle):
    with pytest.raises(TypeError, match=r"an Answerer cannot be pickled: load the bundle in each process"):
        pickle.dumps(Answerer.load(bundle, device="cpu", threads=1))
