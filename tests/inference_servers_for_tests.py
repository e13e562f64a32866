"""Third-party servers of the Open Inference Protocol v2, each in its own process: Triton and MLServer.

They have a separate environment (``make inference-servers``), since they need other versions of the packages that qadeploy
uses. Triton is the server of the nvidia-pytriton package, whose only backend is Python's: see backends/onnxruntime.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from qadeploy.inference.bundle import MODEL, open_bundle
from qadeploy.integrations.triton.model_config import tensors_of

HERE = Path(__file__).resolve().parent
ENVIRONMENT = Path(os.environ.get("QADEPLOY_INFERENCE_SERVERS", HERE.parent / ".venv-servers"))
OURS = HERE / "inference_servers"
needs_servers = pytest.mark.skipif(
    not (ENVIRONMENT / "bin/python").exists(), reason=f"{ENVIRONMENT} is not there: make inference-servers"
)
_SECONDS = 60
_FIRST = 10_000 + os.getpid() * 97 % 4_000  # each process of a test run starts at another port
_ports = iter(range(_FIRST, 16_000))


@dataclass
class Server:
    """A running server; ``stop`` can use a signal other than SIGTERM, to see how a client reacts."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=10) as reply:
            return json.load(reply)

    def stop(self, number: int = signal.SIGTERM) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)  # its workers too
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(20)


@contextlib.contextmanager
def triton(repository: Path, work: Path, port: int | None = None) -> Iterator[Server]:
    """Triton on a model repository. ``work`` is a folder for its backends and log."""
    packages = _packages()
    release = ENVIRONMENT / "bin/python"
    version = subprocess.run([release, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"], capture_output=True)
    source = packages / "pytriton/tritonserver"
    backends = work / "backends"
    if not backends.exists():
        shutil.copytree(OURS / "backends", backends)
        (backends / "python").mkdir()
        stub = source / "python_backend_stubs" / version.stdout.decode().strip() / "triton_python_backend_stub"
        for path in (*(source / "backends/python").glob("*.*"), stub):
            shutil.copy(path, backends / "python")  # Triton follows no link out of the folder
    libraries = subprocess.run(
        [release, "-c", "import sysconfig; print(sysconfig.get_config_var('LIBDIR'))"], capture_output=True
    )
    environment = {
        "LD_LIBRARY_PATH": f"{packages / 'nvidia_pytriton.libs'}:{libraries.stdout.decode().strip()}",
        "PYTHONPATH": str(packages),
        "PATH": f"{ENVIRONMENT / 'bin'}:{os.environ['PATH']}",
    }
    port = port or free_port()
    command = [
        *(source / "bin/tritonserver", f"--model-repository={repository}", f"--backend-directory={backends}"),
        *("--http-address=127.0.0.1", f"--http-port={port}", "--allow-grpc=false", "--allow-metrics=false"),
        "--exit-timeout-secs=2",
    ]
    with _running(command, work / "triton.log", environment, port, "/v2/health/ready") as server:
        yield server


@contextlib.contextmanager
def mlserver(bundle: Path, name: str, work: Path) -> Iterator[Server]:
    """MLServer with one bundle's model behind it."""
    opened = open_bundle(bundle)
    tensors = tensors_of(opened.read(MODEL))

    def told(group: Any) -> list[dict[str, Any]]:
        return [{"name": t.name, "datatype": t.data_type.removeprefix("TYPE_"), "shape": [-1, *t.dims]} for t in group]

    port = free_port()
    model = {
        "name": name,
        "implementation": "mlserver_onnx.OnnxModel",
        "parameters": {"uri": str(bundle), "version": "7"},
        "inputs": told(tensors.inputs),
        "outputs": told(tensors.outputs),
    }
    settings = {
        "host": "127.0.0.1",
        "http_port": port,
        "grpc_port": free_port(),
        "metrics_port": free_port(),
        "parallel_workers": 0,
        "debug": False,
    }
    folder = work / "mlserver"
    folder.mkdir()
    (folder / "model-settings.json").write_text(json.dumps(model))
    (folder / "settings.json").write_text(json.dumps(settings))
    environment = {"PYTHONPATH": str(OURS)}
    command = [ENVIRONMENT / "bin/mlserver", "start", folder]
    with _running(command, work / "mlserver.log", environment, port, f"/v2/models/{name}/ready") as server:
        yield server


@contextlib.contextmanager
def _running(command: list[Any], log: Path, environment: Mapping[str, str], port: int, ready: str) -> Iterator[Server]:
    with log.open("ab") as stream:
        process = subprocess.Popen(
            [str(part) for part in command],
            stdout=stream,
            stderr=stream,
            env={**os.environ, **environment},
            start_new_session=True,
        )
    server = Server(f"http://127.0.0.1:{port}", process, log)
    try:
        end = time.monotonic() + _SECONDS
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(server.url + ready, timeout=5):
                break
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < end, log.read_text()[-3000:]
            time.sleep(0.1)
        yield server
    finally:
        server.stop()


def _packages() -> Path:
    found = sorted(ENVIRONMENT.glob("lib/python*/site-packages"))
    assert found, ENVIRONMENT
    return found[-1]


def free_port() -> int:
    """A port that nobody listens on, returned only once. It is below the kernel's range for outgoing connections."""
    for port in _ports:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no free port is left")
