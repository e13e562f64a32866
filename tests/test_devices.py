"""Missing parts of CUDA, as child processes report them on simulated machines, whose drivers and libraries are stubs.

Real parts: onnxruntime (a CPU build that reports being another), its preload_dlls, its session that falls
back to the CPU, the dynamic loader, pip's metadata.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch

from qadeploy.errors import DeviceError, DeviceWarning, InputError
from qadeploy.inference import devices
from qadeploy.inference.devices import Build, Device, Driver, Gpu, obstacles, parse_device
from qadeploy.training.torch_device import torch_device
from tests.processes_for_tests import ended, succeeded

REPOSITORY = Path(__file__).resolve().parent.parent
COMPILER = shutil.which("cc")
HAS_GPU = torch.cuda.is_available() or devices.has_driver()
simulated = [
    pytest.mark.skipif(COMPILER is None, reason="no C compiler to make a driver with"),
    pytest.mark.skipif(HAS_GPU, reason="a real driver is here"),
]
GIB = 2**30
DRIVER = """
#include <stddef.h>
#include <string.h>
int cuDriverGetVersion(int *v) { *v = VERSION; return 0; }
int cuInit(unsigned flags) { return INIT; }
int cuDeviceGetCount(int *n) { *n = GPUS; return 0; }
int cuDeviceGet(int *d, int i) { *d = i; return 0; }
int cuDeviceGetName(char *name, int length, int d) { strncpy(name, d ? "Second" : "First", length); return 0; }
int cuDeviceTotalMem_v2(size_t *m, int d) { *m = (size_t)80 << 30; return 0; }
int cuDeviceGetAttribute(int *v, int what, int d) { *v = what == 75 ? 9 : what == 76 ? 1 : -1; return 0; }
int cuGetErrorString(int code, const char **s) { *s = "no CUDA-capable device is detected"; return 0; }
"""
CHILD = """
import json, sys
import onnxruntime
said = json.loads(sys.argv[1])
for name in ("package_name", "cuda_version"):
    setattr(onnxruntime, name, said.get(name, ""))
if said.get("has_cuda", True):
    onnxruntime.get_available_providers = lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
if "fails" in said:
    real = onnxruntime.InferenceSession
    def session(*args, providers, **kwargs):
        if providers != ["CPUExecutionProvider"]:
            raise RuntimeError(said["fails"])
        return real(*args, providers=providers, **kwargs)
    onnxruntime.InferenceSession = session
from qadeploy.cli import main
main(sys.argv[2:])
"""


def compiled(folder: Path, source: str, name: str, **defined: int) -> None:
    (folder / "source.c").write_text(source)
    flags = [f"-D{key}={value}" for key, value in defined.items()]
    command = [str(COMPILER), "-shared", "-fPIC", "-w", *flags, "-o", str(folder / name), str(folder / "source.c")]
    subprocess.run(command, check=True, capture_output=True)


def wheel(folder: Path, name: str, version: str) -> None:
    """What pip leaves of an installed package."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "top_level.txt").write_text("onnxruntime\n")


Machine = Callable[..., Callable[..., subprocess.CompletedProcess[str]]]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """Makes a machine: a driver for ``cuda`` (12040 is 12.4) with ``gpus``, libraries, wheels; calls qadeploy there."""

    def make(
        *,
        cuda: int | None = None,
        gpus: int = 1,
        init: int = 0,
        libraries: Sequence[str] = (),
        wheels: Sequence[tuple[str, str]] = (),
        env: dict[str, str] | None = None,
        **said: Any,
    ) -> Callable[..., subprocess.CompletedProcess[str]]:
        lib, site = tmp_path / "lib", tmp_path / "site"
        lib.mkdir()
        site.mkdir()
        if cuda is not None:
            compiled(lib, DRIVER, "libcuda.so.1", VERSION=cuda, GPUS=gpus, INIT=init)
        for name in libraries:
            compiled(lib, "int here = 1;", name)
        for name, version in wheels:
            wheel(site, name, version)
        path = {"LD_LIBRARY_PATH": str(lib), "PYTHONPATH": os.pathsep.join([str(site), str(REPOSITORY)])}

        def call(*args: object) -> subprocess.CompletedProcess[str]:
            command = [sys.executable, "-c", CHILD, json.dumps(said), *map(str, args)]
            return ended(command, env={**os.environ, **path, **(env or {})})

        return call

    return make


def ask(call: Callable[..., subprocess.CompletedProcess[str]], bundle: Path, device: str) -> Any:
    question = ("--question", "Who keeps the lamp?", "--context", "Ada keeps the lamp.")
    return call("ask", bundle, *question, "--device", device, "--json")


def refused(done: subprocess.CompletedProcess[str]) -> str:
    """The only message of a command that failed with empty stdout."""
    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    messages = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert len(messages) == 1
    return messages[0]


def answered(done: subprocess.CompletedProcess[str]) -> list[str]:
    """The warnings of a command that answered; stdout is one JSON object."""
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["answers"]
    return [line for line in done.stderr.splitlines() if line.startswith("Warning: ")]


FOR_13 = list(devices.cuda_libraries(13))


# ---------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("name", "device"),
    [
        ("auto", Device("auto")),
        ("cpu", Device("cpu")),
        ("cuda", Device("cuda")),
        ("cuda:0", Device("cuda", 0)),
        ("cuda:12", Device("cuda", 12)),
    ],
)
def test_names(name, device):
    assert parse_device(name) == device
    assert str(device) == name
    assert device.index == (device.number or 0)


@pytest.mark.parametrize(
    "name", ["", "CUDA", "cuda:", "cuda:-1", "cuda:x", "cuda:0 ", "cpu:0", "auto:1", "cuda:²", "gpu"]
)
def test_other_names_are_refused_by_both_runtimes(name):
    for parse in (parse_device, torch_device):
        with pytest.raises(InputError, match="choose auto, cpu, cuda or cuda:N"):
            parse(name)


# ---------------------------------------------------------------- machines that are made up


class TestSimulated:
    pytestmark = simulated

    def test_libraries_that_the_provider_does_without_are_no_obstacle(self, tmp_path):
        """A provider in parts, like ONNX Runtime's, that needs cuBLAS but not cuDNN; in one case cuBLAS is missing."""
        compiled(tmp_path, "int Provider_GetHost = 1;", "libonnxruntime_providers_shared.so")
        compiled(tmp_path, "int cublas = 1;", "libcublas_made_up.so.13")
        source = tmp_path / "provider.c"
        source.write_text(
            "extern int Provider_GetHost, cublas; int found(void) { return Provider_GetHost + cublas; }\n"
        )
        library, needed = tmp_path / "libonnxruntime_providers_cuda.so", tmp_path / "libcublas_made_up.so.13"
        flags = ["-shared", "-fPIC", "-Wl,-z,now", "-Wl,--no-as-needed", f"-Wl,-rpath,{tmp_path}"]
        made = [str(COMPILER), *flags, "-o", str(library), str(source), f"-L{tmp_path}", f"-l:{needed.name}"]
        subprocess.run(made, check=True, capture_output=True)
        asks = (
            "import sys; from pathlib import Path; from qadeploy.inference import devices as d\n"
            "d.missing_libraries = lambda major: {'libcudnn.so.9': 'nvidia-cudnn-cu13'}\n"
            "loads = d.provider_loads(Path(sys.argv[1])); d.provider_loads = lambda: loads\n"
            "build = d.Build('onnxruntime-gpu', '1.31.0', {}, (13, 0), True)\n"
            "print(loads, len(d.obstacles(build, d.Driver(cuda=(13, 0), gpus=(d.Gpu('One', 1, (9, 0)),)))))"
        )

        def asked() -> str:
            command = [sys.executable, "-c", asks, str(tmp_path)]
            return succeeded(command, cwd=REPOSITORY).stdout.strip()

        assert asked() == "True 0"
        needed.unlink()
        assert asked() == "False 1"

    def test_without_a_driver_cuda_says_so_and_auto_is_silent(self, machine, bundle):
        call = machine(libraries=FOR_13, cuda_version="13.0", package_name="onnxruntime-gpu")
        message = refused(ask(call, bundle, "cuda"))
        assert (
            "cuda was requested but is not available: there is no NVIDIA driver (libcuda.so.1 cannot be loaded)"
            in message
        )
        assert "needs CUDA" not in message  # the libraries are there
        assert message.endswith("Or give --device cpu")
        assert answered(ask(call, bundle, "auto")) == []
        assert answered(ask(call, bundle, "cpu")) == []

    def test_missing_libraries_are_named_with_the_pip_line_and_auto_warns_once(self, machine, bundle):
        call = machine(
            cuda=13000,
            libraries=[name for name in FOR_13 if "cublas" not in name and "cudnn" not in name],
            cuda_version="13.0",
            package_name="onnxruntime-gpu",
        )
        version = onnxruntime.__version__
        found = (
            f"onnxruntime-gpu {version} needs CUDA 13 and cuDNN 9, but cannot load libcublasLt.so.13, libcublas.so.13, "
            f"libcudnn.so.9: pip install 'onnxruntime-gpu[cuda,cudnn]=={version}'"
        )
        assert refused(ask(call, bundle, "cuda:0")) == (
            f"Error: cuda:0 was requested but is not available: {found}. Or give --device cpu"
        )
        assert answered(ask(call, bundle, "auto")) == [
            f"Warning: this runs on the CPU although there is a GPU driver: {found}"
        ]

    def test_a_driver_and_libraries_of_an_older_cuda(self, machine, bundle):
        call = machine(
            cuda=12040,
            libraries=["libcudart.so.12", "libcudnn.so.9"],
            cuda_version="13.0",
            package_name="onnxruntime-gpu",
        )
        message = refused(ask(call, bundle, "cuda"))
        assert (
            "needs CUDA 13, but the driver supports CUDA 12.4 at most: update the driver, or install the last build"
            in message
        )
        assert "pip install 'onnxruntime-gpu[cuda,cudnn]==1.26.0'" in message
        assert "libcublas.so.13" in message
        assert "libcudnn" not in message  # it is there
        assert "(those of CUDA 12 are installed, but do not fit)" in message

    def test_the_cpu_wheel_that_shadows_the_gpu_wheel(self, machine, bundle):
        call = machine(cuda=13000, wheels=[("onnxruntime-gpu", "1.31.1")], has_cuda=False, package_name="onnxruntime")
        version = onnxruntime.__version__
        both = f"onnxruntime {version} and onnxruntime-gpu 1.31.1 are both installed into one folder"
        message = refused(ask(call, bundle, "cuda"))
        assert both in message
        assert "the files of onnxruntime were installed last" in message
        assert "pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'qadeploy[gpu]'" in message
        assert [both in line for line in answered(ask(call, bundle, "auto"))] == [True]
        report = json.loads(call("doctor", "--json").stdout)
        assert sum(both in problem for problem in report["problems"]) == 1
        assert report["onnxruntime_build"]["installed"] == {"onnxruntime": version, "onnxruntime-gpu": "1.31.1"}

    def test_a_gpu_that_is_not_there(self, machine, bundle):
        call = machine(cuda=13000, gpus=2, libraries=FOR_13, cuda_version="13.0", package_name="onnxruntime-gpu")
        assert "there is no cuda:3, cuda:0 to cuda:1" in refused(ask(call, bundle, "cuda:3"))

    def test_a_driver_that_does_not_start(self, machine, bundle):
        call = machine(
            cuda=13000, init=100, libraries=FOR_13, env={"CUDA_VISIBLE_DEVICES": ""}, package_name="onnxruntime-gpu"
        )
        message = refused(ask(call, bundle, "cuda"))
        assert (
            "does not start: no CUDA-capable device is detected (CUDA error 100); CUDA_VISIBLE_DEVICES is ''" in message
        )

    def test_what_onnxruntime_said_where_nothing_is_found_to_lack(self, machine, bundle):
        call = machine(
            cuda=13000,
            libraries=FOR_13,
            cuda_version="13.0",
            package_name="onnxruntime-gpu",
            fails="CUDA failure 2: out of memory",
        )
        assert "cannot start the model on CUDA: CUDA failure 2: out of memory" in refused(ask(call, bundle, "cuda"))
        assert ["out of memory" in line for line in answered(ask(call, bundle, "auto"))] == [True]

    def test_doctor_tells_the_driver_the_gpus_and_the_libraries(self, machine):
        call = machine(cuda=13010, gpus=2, libraries=FOR_13[:-1], cuda_version="13.0", package_name="onnxruntime-gpu")
        report = json.loads(call("doctor", "--json").stdout)
        first = {"name": "First", "memory_gib": 80.0, "compute_capability": "9.1"}
        assert report["gpus"] == [first, {**first, "name": "Second"}]
        assert report["nvidia_driver"].endswith("for CUDA 13.1: First, 80.0 GiB; Second, 80.0 GiB")
        assert report["cuda"]["driver"] == "13.1"
        assert report["cuda"]["onnxruntime"] == "13.0"
        assert report["cuda"]["driver_problem"] is None
        assert report["cuda"]["libraries"] == {name: name != "libcudnn.so.9" for name in FOR_13}
        problems = "\n".join(report["problems"])
        assert "cannot load libcudnn.so.9: pip install 'onnxruntime-gpu[cuda,cudnn]==" in problems
        assert "torch is a CPU build" in problems
        text = call("doctor").stdout
        assert "NVIDIA driver: of unknown version for CUDA 13.1" in text
        assert "missing libcudnn.so.9" in text
        assert "ONNX Runtime: onnxruntime-gpu " in text

    def test_doctor_tells_the_majors_of_torch_and_onnxruntime_apart(self, machine, tmp_path):
        call = machine(cuda=13000, libraries=FOR_13, cuda_version="13.0", package_name="onnxruntime-gpu")
        fake = tmp_path / "site" / "torch"
        fake.mkdir()
        (fake / "__init__.py").write_text("raise ImportError('doctor imports no torch')\n")
        for built, told in (("'12.8'", True), ("'13.0'", False), ("None", False)):
            (fake / "version.py").write_text(f"__all__ = ['cuda']\ncuda: Optional[str] = {built}\n")
            report = json.loads(call("doctor", "--json").stdout)
            assert report["cuda"]["torch"] == (None if built == "None" else built.strip("'"))
            found = [
                p for p in report["problems"] if "torch was built for CUDA 12.8 and onnxruntime for CUDA 13.0" in p
            ]
            assert len(found) == told
            assert all("--index-url https://download.pytorch.org/whl/cu130" in line for line in found)

    def test_a_checkpoint_has_the_same_errors(self, machine, tiny):
        call = machine(cuda=13000, has_cuda=False, package_name="onnxruntime")
        context = ("--question", "Who?", "--context", "Ada keeps the lamp.")
        message = refused(call("ask", tiny.run, *context, "--device", "cuda"))
        assert (
            f"cuda was requested but is not available: the installed torch {torch.__version__} is a CPU build"
            in message
        )
        assert "pip install --force-reinstall torch --index-url" in message


# ---------------------------------------------------------------- the parts


GPU = Gpu("One", 80 * GIB, (9, 0))
GOOD = Driver("580.65.06", (13, 0), (GPU,))


def test_a_lone_cpu_build_and_a_lone_gpu_build():
    cpu = Build("onnxruntime", "1.32.0", {"onnxruntime": "1.32.0"}, None, has_cuda=False)
    assert obstacles(cpu, GOOD) == [
        "the installed onnxruntime 1.32.0 is a CPU build: "
        "pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'qadeploy[gpu]'"
    ]
    assert cpu.conflict == ""
    other = Build("onnxruntime-openvino", "1.24.1", {"onnxruntime-openvino": "1.24.1"}, None, has_cuda=False)
    assert "is the build onnxruntime-openvino, without CUDA" in obstacles(other, GOOD)[0]
    silent = Build("onnxruntime-gpu", "1.20.2", {"onnxruntime-gpu": "1.20.2"}, None, has_cuda=True)
    assert obstacles(silent, GOOD) == []  # it does not say which version it was built for, so nothing is reported
    assert obstacles(silent, GOOD, 1) == ["there is no cuda:1, only cuda:0"]
    assert str(GOOD) == "580.65.06 for CUDA 13.0: One, 80.0 GiB"
    assert str(Driver(problem="gone")) == ""


def test_the_libraries_are_those_of_onnxruntime_itself():
    if not hasattr(onnxruntime, "_get_nvidia_dll_paths"):
        pytest.skip("this onnxruntime has no table of its own")
    told = onnxruntime.cuda_version
    for major in (12, 13):
        onnxruntime.cuda_version = f"{major}.0"
        try:
            theirs = {path[-1] for path in onnxruntime._get_nvidia_dll_paths(is_windows=False)}
        finally:
            onnxruntime.cuda_version = told
        assert set(devices.cuda_libraries(major)) == theirs


@pytest.mark.skipif(HAS_GPU, reason="torch may find a GPU here")
def test_torch_without_a_gpu(recwarn):
    with pytest.raises(DeviceError, match=r"cuda:1 was requested .*torch .*there is no NVIDIA driver"):
        torch_device("cuda:1")
    assert torch_device("auto") == torch_device("cpu") == torch.device("cpu")
    assert not recwarn.list


def test_torch_takes_a_gpu_only_after_it_computed_there(monkeypatch):
    made: list[torch.device] = []

    def zeros(*size: int, device: torch.device) -> None:
        made.append(device)
        if device.index == 1:
            raise RuntimeError("CUDA error: out of\nmemory")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch, "zeros", zeros)
    assert torch_device("auto") == torch_device("cuda") == torch_device("cuda:0") == torch.device("cuda", 0)
    assert made == [torch.device("cuda", 0)] * 3
    with pytest.raises(
        DeviceError, match=r"torch cannot use cuda:1 \(CUDA error: out of memory\)\. Or give --device cpu"
    ):
        torch_device("cuda:1")
    with pytest.raises(DeviceError, match="there is no cuda:2, cuda:0 to cuda:1"):
        torch_device("cuda:2")
    assert torch_device("cpu") == torch.device("cpu")

    def full(*size: int, device: torch.device) -> None:
        raise RuntimeError("CUDA error: busy")

    monkeypatch.setattr(torch, "zeros", full)
    monkeypatch.setattr("qadeploy.training.torch_device.has_driver", lambda: True)
    with pytest.warns(DeviceWarning, match=r"torch cannot use cuda:0 \(CUDA error: busy\)"):
        assert torch_device("auto") == torch.device("cpu")
