"""The Dockerfile, as far as it can be checked without a container engine; tests/container_steps.py runs its steps."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from qadeploy.cli import main
from qadeploy.errors import InputError
from qadeploy.options import declared
from qadeploy.serve.settings import Settings
from qadeploy.shipped import base_bundle_path
from tests.container_steps import ROOT, Container, ignored, order, parse

TEXT = (ROOT / "Dockerfile").read_text("utf-8")
RULES = [line for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines() if line and line[0] != "#"]
STAGES = parse(TEXT, {})


def steps(target: str) -> list[tuple[str, str]]:
    return [step for stage in order(STAGES, target) for step in stage.steps]


def test_targets_and_what_they_are_built_of():
    assert [stage.name for stage in order(STAGES, "cpu")] == ["runtime", "source", "build-cpu", "cpu"]
    assert [stage.name for stage in order(STAGES, "gpu")] == ["runtime", "source", "build-gpu", "gpu"]
    assert [stage.name for stage in order(STAGES, "baked")] == ["runtime", "source", "build-cpu", "cpu", "baked"]
    assert list(STAGES)[-1] == "default"  # what is built without --target
    assert STAGES["default"].base == "cpu"
    gpu = order(parse(TEXT, {"TARGET": "gpu"}), "baked")
    assert [stage.name for stage in gpu][-2:] == ["gpu", "baked"]
    (base,) = {stage.base for stage in STAGES.values()} - set(STAGES)
    assert re.fullmatch(r"python:3\.12\.[0-9]+-slim-[a-z]+@sha256:[0-9a-f]{64}", base)
    pinned = "python:3.12-slim@sha256:" + 64 * "0"
    every = parse(TEXT, {"PYTHON_IMAGE": pinned})
    assert {stage.base for stage in every.values()} - set(every) == {pinned}  # one argument pins every base
    with pytest.raises(InputError, match="no target tpu: choose source,"):
        order(STAGES, "tpu")


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_each_target_installs_nothing_but_by_hash(target):
    runs = [rest for name, rest in steps(target) if name == "RUN" and "pip " in rest]
    fetching = [run for run in runs if "--no-index" not in run]
    assert [run.rpartition(" ")[2] for run in fetching] == ["requirements/build.txt", f"requirements/{target}.txt"]
    assert all("--require-hashes --only-binary=:all: -r" in run for run in fetching)
    assert all("--no-deps" in run for run in runs if run not in fetching)


@pytest.mark.parametrize("target", ["cpu", "gpu", "baked"])
def test_the_process_has_no_rights_and_gets_the_signal(target):
    values = dict(steps(target))
    user, _, group = values["USER"].partition(":")
    assert int(user) > 0
    assert int(group) > 0
    assert values["STOPSIGNAL"] == "SIGTERM"
    entry = json.loads(values["ENTRYPOINT"])  # JSON: no shell stands between the signal and the process
    assert entry == ["qadeploy", "serve"]
    assert entry[1] in main.commands
    assert json.loads(values["CMD"]) == ["/bundle"]


def test_the_environment_names_settings_that_there_are():
    known = {row.env for row in declared(Settings).values()} | {"QADEPLOY_CACHE"}
    named = {part.split("=")[0] for name, rest in steps("cpu") if name == "ENV" for part in rest.split()}
    assert {"QADEPLOY_HOST", "QADEPLOY_PORT"} <= {name for name in named if name.startswith("QADEPLOY_")} <= known


def test_what_is_copied_is_there_and_nothing_else_is_sent():
    for name, rest in steps("cpu"):
        if name == "COPY" and not rest.startswith("--from="):
            for source in rest.split()[:-1]:
                assert (ROOT / source).exists(), source
                assert not ignored(source, RULES), source
    assert not ignored("bundles/handbook-int8/model.onnx", RULES)
    for path in (".git/config", ".venv/bin/python", "runs/faq/checkpoint", "models/minilm-l6-qa/model.safetensors"):
        assert ignored(path, RULES), path
    assert ignored("qadeploy/__pycache__/bundle.cpython-312.pyc", RULES)
    assert not ignored("qadeploy/data/handbook.jsonl", RULES)


HEALTHY = """
import http.server, sys
class Ready(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(int(sys.argv[1]) if self.path == "/health/ready" else 404)
        self.end_headers()
    def log_message(self, *_): pass
server = http.server.HTTPServer(("127.0.0.1", 0), Ready)
print(server.server_port, flush=True)
server.serve_forever()
"""


def check(machine: Container, port: int) -> int:
    command = [sys.executable, *machine.health[1:]]
    variables = {**os.environ, "QADEPLOY_PORT": str(port)}
    return subprocess.run(command, env=variables, capture_output=True, timeout=30, check=False).returncode


def test_the_health_check_tells_ready_from_not(tmp_path: Path):
    machine = Container(tmp_path, order(STAGES, "cpu"))
    machine.take("HEALTHCHECK", dict(steps("cpu"))["HEALTHCHECK"])
    assert machine.health[0] == "python"
    for status, expected in ((200, 0), (503, 1)):
        server = subprocess.Popen([sys.executable, "-c", HEALTHY, str(status)], stdout=subprocess.PIPE, text=True)
        with server:
            assert server.stdout is not None
            port = int(server.stdout.readline())
            assert check(machine, port) == expected
            server.kill()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    assert check(machine, port) == 1


NOBODY = """
import pwd, sys
def getpwuid(uid): raise KeyError(uid)  # a number that the image's /etc/passwd does not name: docker run --user 4711
pwd.getpwuid = getpwuid
from qadeploy.cli import main
main(sys.argv[1:])
"""


@pytest.mark.parametrize("home", [None, "", "/proc/nowhere"])
def test_a_user_without_a_name_or_a_home_can_serve(home, tmp_path):
    unset = ("HOME", "USER", "LOGNAME", "QADEPLOY_", "XDG_")
    variables = {name: value for name, value in os.environ.items() if not name.startswith(unset)}
    variables |= {"PYTHONPATH": str(ROOT)} | ({} if home is None else {"HOME": home})
    command = [sys.executable, "-c", NOBODY, "serve", str(base_bundle_path()), "--port", "0", "--drain-delay", "0"]
    with subprocess.Popen(
        command, env=variables, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as server:
        assert server.stdout is not None
        said = []
        for line in server.stdout:
            said.append(line)
            if " answers with " in line:
                server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0, "".join(said)
    assert not any(tmp_path.iterdir())  # nor is anything left where it was started


def test_steps_stay_within_their_folder(tmp_path: Path):
    machine = Container(tmp_path, order(STAGES, "cpu"))
    machine.take("WORKDIR", "/src")
    machine.take("ENV", "PATH=/opt/venv/bin:$PATH QADEPLOY_CACHE=/tmp/qadeploy QADEPLOY_PORT=8000")
    assert machine.environment["PATH"].startswith(f"{tmp_path}/opt/venv/bin:{tmp_path}/python/bin:")
    assert machine.environment["QADEPLOY_CACHE"] == f"{tmp_path}/tmp/qadeploy"
    machine.take("COPY", "pyproject.toml LICENSE ./")
    machine.take("RUN", "mkdir -p models && echo here > /src/models/x")
    assert (tmp_path / "src" / "models" / "x").read_text() == "here\n"
    assert (tmp_path / "src" / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    with pytest.raises(InputError, match=r"COPY models: is not there, or .dockerignore keeps it out"):
        machine.take("COPY", "models ./")


def test_an_instruction_that_is_not_known_stops_the_parser():
    with pytest.raises(InputError, match="instruction VOLUME is not known"):
        parse("FROM python AS one\nVOLUME /data\n", {})
