"""``qadeploy answer --engine ray`` with its own Ray: processes that die, its output, and what it leaves behind."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.conftest import triplets, write_jsonl

ROWS = [{"context": row["context"], "question": row["question"]} for row in triplets(80)]
LONG = [row | {"context": f"{row['context']} " * 60} for row in ROWS] * 40  # enough that a command is still at work


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that the command is run in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def ray_processes(session: int) -> list[str]:
    """The processes of an operating system session, without the command itself."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if os.getsid(process.pid) == session and process.pid != session and process.status() != "zombie":
                found.append(" ".join(process.cmdline())[:80])
    return found


@contextlib.contextmanager
def command(bundle: Path, source: Path, *more: str) -> Iterator[subprocess.Popen[str]]:
    """``qadeploy answer --engine ray`` in its own operating system session."""
    line = [sys.executable, "-m", "qadeploy", "answer", str(bundle), "--input", str(source), "--output", "out"]
    line += ["--engine", "ray", "--actors", "2", *more]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    process = subprocess.Popen(
        line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert process.stdout
        assert process.stderr
        process.stdout.close()
        process.stderr.close()


def none_left(session: int) -> list[str]:
    until = time.monotonic() + 20
    while (left := ray_processes(session)) and time.monotonic() < until:
        time.sleep(0.2)
    return left


def actors(session: int) -> list[int]:
    """The processes of the pool's actors, by the title that Ray gives them."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if os.getsid(process.pid) == session and "".join(process.cmdline()).startswith("ray::MapWorker"):
                found.append(process.pid)
    return found


@pytest.mark.slow
def test_the_command_is_quiet_whatever_dies_and_leaves_no_process(bundle, folder):
    """Ray holds back repeated messages until it ends; those about later deaths must not reach stdout."""
    rows = LONG[:240]
    source = write_jsonl(folder / "many.jsonl", rows)
    killed: set[int] = set()
    with command(bundle, source, "--json", "--shard-rows", "20") as process:
        until = time.monotonic() + 100
        while len(killed) < 3 and process.poll() is None and time.monotonic() < until:
            if list(Path("out").glob("part-*")):
                for pid in set(actors(process.pid)) - killed:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                    killed.add(pid)
            time.sleep(0.05)
        out, err = process.communicate(timeout=200)
        assert process.returncode == 0, err
        assert len(killed) >= 3
        assert json.loads(out) == {"rows": len(rows), "rejected": 0, "output": "out"}
        assert err.strip() == "answering"
        assert none_left(process.pid) == []


def first_part(process: subprocess.Popen[str]) -> None:
    """Waits until a part of the answers is there."""
    until = time.monotonic() + 150
    while not list(Path("out").glob("part-*")) and process.poll() is None and time.monotonic() < until:
        time.sleep(0.02)


def test_a_local_ray_is_closed_to_others_and_ctrl_c_ends_it_all(bundle, folder, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    source = write_jsonl(folder / "many.jsonl", LONG)
    with command(bundle, source, "--shard-rows", "20") as process:
        first_part(process)
        heard: dict[str, set[str]] = {}
        for each in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if os.getsid(each.pid) == process.pid:
                    places = {c.laddr.ip for c in each.net_connections("inet") if c.status == psutil.CONN_LISTEN}
                    heard[each.name()] = places
                    if each.name() == "raylet":
                        environment = each.environ()
        assert set().union(*heard.values()) <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}, heard
        assert heard["raylet"]
        assert heard["gcs_server"]
        assert environment["RAY_AUTH_MODE"] == "token"
        assert len(environment["RAY_AUTH_TOKEN"]) == 64

        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        _, err = process.communicate(timeout=60)
        assert process.returncode == 130, err
        assert "stopped: finished parts are kept, and the same command continues from there" in err
        assert "Traceback" not in err
        assert none_left(process.pid) == []
    assert list(Path("out").glob("part-*"))


@pytest.mark.slow
def test_a_local_ray_that_is_killed_is_named(bundle, folder):
    with command(bundle, write_jsonl(folder / "many.jsonl", LONG), "--shard-rows", "20") as process:
        first_part(process)
        for each in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if os.getsid(each.pid) == process.pid and each.name() == "raylet":
                    each.kill()
        _, err = process.communicate(timeout=100)
        assert process.returncode == 1
        assert "Error: Ray has ended: its process raylet was killed or crashed" in err
        assert "Traceback" not in err
        assert none_left(process.pid) == []


@contextlib.contextmanager
def own_cluster(patch: pytest.MonkeyPatch) -> Iterator[tuple[str, Callable[[str], None]]]:
    """A cluster that ``ray start`` makes on 127.0.0.1: its address, and a function that kills its processes by name."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    # These also apply to those who join it. The second makes it listen on 127.0.0.1 only.
    for name, value in {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    }.items():
        patch.setenv(name, value)
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as folder:  # sockets need a short path

        def kill(name: str) -> None:
            for each in psutil.process_iter():
                with contextlib.suppress(psutil.Error):
                    if each.name().startswith(name) and folder in " ".join(each.cmdline()):
                        each.kill()

        line = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--node-ip-address", "127.0.0.1"]
        line += ["--port", port, "--temp-dir", folder, "--num-cpus", "2", "--include-dashboard", "false"]
        line += ["--object-store-memory", str(100 * 2**20), "--disable-usage-stats"]
        try:
            subprocess.run(line, check=True, capture_output=True, timeout=150)
            yield f"127.0.0.1:{port}", kill
        finally:
            kill("")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "seconds"), [("raylet", 25), ("gcs_server", 60)])
def test_a_cluster_that_was_joined_and_dies_ends_the_command_with_a_message(name, seconds, bundle, folder, monkeypatch):
    source = write_jsonl(folder / "many.jsonl", LONG)
    with (
        own_cluster(monkeypatch) as (address, kill),
        command(bundle, source, "--shard-rows", "20", "--address", address) as process,
    ):
        first_part(process)
        kill(name)
        begun = time.monotonic()
        _, err = process.communicate(timeout=150)
        assert time.monotonic() - begun < seconds
        assert process.returncode == 1
        assert f"Error: Ray has ended: its process {name}" in err
        assert "Traceback" not in err


def test_an_address_without_a_cluster_is_named(bundle, folder):
    with command(bundle, write_jsonl(folder / "one.jsonl", ROWS[:1]), "--address", "127.0.0.1:1") as process:
        _, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "Error: --address 127.0.0.1:1: cannot be reached" in err
    assert "Traceback" not in err
