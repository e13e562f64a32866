"""Where a model can run: device names, and what CUDA lacks on this machine, with the pip command that fixes it.

CUDA needs three things: an onnxruntime built for it, an NVIDIA driver at least as new as the CUDA of that build,
and the CUDA libraries of the same major version. Each is checked separately, so that an error names the one that
is missing. Nothing here imports torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from qadeploy.errors import DeviceError, DeviceWarning, InputError

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
DRIVER = "libcuda.so.1"
_PROVIDER = ("shared", "cuda")
GPU_WHEEL = "onnxruntime-gpu"
FIX_WHEEL = "pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'qadeploy[gpu]'"
# The last wheel on PyPI that was built for CUDA 12; its extras install nvidia-*-cu12, those of 1.27.0 CUDA 13.
_LAST_FOR_CUDA_12 = "1.26.0"
_NO_DRIVER = f"there is no NVIDIA driver ({DRIVER} cannot be loaded): install it, or start a container with --gpus all"


@dataclass(frozen=True, slots=True)
class Device:
    """A device as requested: ``kind`` is auto, cpu or cuda, ``number`` is the GPU's, or None if none was named."""

    kind: str
    number: int | None = None

    @property
    def index(self) -> int:
        """The number of the GPU, 0 if none was named."""
        return self.number or 0

    def __str__(self) -> str:
        return self.kind if self.number is None else f"{self.kind}:{self.number}"


def parse_device(name: str) -> Device:
    """The device of a name: auto, cpu, cuda or cuda:N. Raises InputError on any other name."""
    match = re.fullmatch(r"(auto|cpu|cuda)|cuda:([0-9]{1,4})", name)
    if match is None:
        raise InputError(f"device is {name!r}: choose auto, cpu, cuda or cuda:N")
    return Device(match[1]) if match[1] else Device("cuda", int(match[2]))


# ---------------------------------------------------------------- the driver


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU: its name, its memory in bytes and its compute capability."""

    name: str
    memory_bytes: int
    capability: tuple[int, int]

    @property
    def memory_gib(self) -> float:
        """Its memory in GiB."""
        return round(self.memory_bytes / 2**30, 1)


@dataclass(frozen=True, slots=True)
class Driver:
    """The NVIDIA driver.

    Attributes:
        version: Its version, or None if the system does not show it.
        cuda: The newest CUDA version that it runs.
        gpus: Its GPUs.
        problem: Why no GPU can be used; empty if one can.
    """

    version: str | None = None
    cuda: tuple[int, int] | None = None
    gpus: tuple[Gpu, ...] = ()
    problem: str = ""

    def __str__(self) -> str:
        """The driver on one line, empty if there is none."""
        if self.cuda is None:
            return ""
        gpus = "; ".join(f"{g.name}, {g.memory_gib} GiB" for g in self.gpus)
        return f"{self.version or 'of unknown version'} for CUDA {dotted(self.cuda)}: {gpus or 'no GPU'}"


def has_driver() -> bool:
    """Whether an NVIDIA driver can be loaded. This takes microseconds if there is none."""
    return _loads(DRIVER)


def find_driver() -> Driver:
    """The driver and its GPUs, from the CUDA driver API.

    This initialises CUDA in this process, so that a child forked later cannot use a GPU.
    """
    try:
        api = ctypes.CDLL(DRIVER)
        number, count = ctypes.c_int(0), ctypes.c_int(0)
        api.cuDriverGetVersion(ctypes.byref(number))  # 1000 * major + 10 * minor, without initialising
        cuda = (number.value // 1000, number.value % 1000 // 10)
        code = api.cuInit(0) or api.cuDeviceGetCount(ctypes.byref(count))
        gpus = [] if code else [_gpu(api, i) for i in range(count.value)]
    except OSError:
        return Driver(problem=_NO_DRIVER)
    except AttributeError as error:
        return Driver(_driver_version(), problem=f"the NVIDIA driver's {DRIVER} is damaged ({error}): install it again")
    problem = ""
    if code:
        text = ctypes.c_char_p()
        api.cuGetErrorString(code, ctypes.byref(text))
        meaning = (text.value or b"unknown error").decode(errors="replace")
        problem = f"the NVIDIA driver does not start: {meaning} (CUDA error {code})"
    elif not gpus:
        problem = "the NVIDIA driver finds no GPU"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if problem and visible is not None:
        problem += f"; CUDA_VISIBLE_DEVICES is {visible!r}, which may hide the GPUs: unset it"
    return Driver(_driver_version(), cuda, tuple(gpus), problem)


def _gpu(api: Any, index: int) -> Gpu:
    device, name, memory = ctypes.c_int(), ctypes.create_string_buffer(256), ctypes.c_size_t()
    api.cuDeviceGet(ctypes.byref(device), index)
    api.cuDeviceGetName(name, len(name), device)
    api.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    capability = []
    for attribute in (75, 76):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR of cuda.h
        value = ctypes.c_int()
        api.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
        capability.append(value.value)
    return Gpu(name.value.decode(errors="replace"), memory.value, (capability[0], capability[1]))


def _driver_version() -> str | None:
    """The version of the kernel module, such as 580.65.06; None if the system does not show it (WSL)."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    match = re.search(r"\b\d{3,}\.\d+(\.\d+)?\b", text)
    return match[0] if match else None


# ---------------------------------------------------------------- ONNX Runtime's build


@dataclass(frozen=True, slots=True)
class Build:
    """The imported onnxruntime.

    Attributes:
        package: The wheel whose files were installed last, overwriting those of other wheels.
        version: The version of the module.
        wheels: All installed wheels that provide it, with their versions.
        cuda: The CUDA version of the build; None without CUDA, or if the build does not say.
        has_cuda: Whether it has the CUDA provider.
    """

    package: str
    version: str
    wheels: Mapping[str, str]
    cuda: tuple[int, int] | None
    has_cuda: bool

    @property
    def conflict(self) -> str:
        """The problem if several wheels share the folder; empty if there is only one."""
        if len(self.wheels) < 2:
            return ""
        named = " and ".join(f"{name} {version}" for name, version in sorted(self.wheels.items()))
        return (
            f"{named} are both installed into one folder and break each other; the files of {self.package or 'one'} "
            f"were installed last: {FIX_WHEEL} (on a machine without a GPU: 'qadeploy[cpu]')"
        )


def find_build(ort: Any) -> Build:
    """The build of the imported onnxruntime module ``ort``. Reads the metadata of the installed packages."""
    from importlib.metadata import PackageNotFoundError, packages_distributions, version

    wheels = {}
    for name in packages_distributions().get("onnxruntime", []):
        with contextlib.suppress(PackageNotFoundError):
            wheels[re.sub(r"[-_.]+", "-", name).lower()] = version(name)
    return Build(
        package=str(getattr(ort, "package_name", "")),
        version=str(ort.__version__),
        wheels=wheels,
        cuda=_version_pair(str(getattr(ort, "cuda_version", "") or "")),
        has_cuda=CUDA in ort.get_available_providers(),
    )


def cuda_libraries(major: int) -> dict[str, str]:
    """The libraries that a build for CUDA ``major`` loads, by file name, with the PyPI package of each.

    They are those of onnxruntime's preload_dlls (1.32). From CUDA 13 on, only cuDNN's package has a suffix -cuNN.
    """
    suffix = "" if major >= 13 else f"-cu{major}"
    cufft = 12 if major >= 13 else 11
    return {
        f"libcudart.so.{major}": f"nvidia-cuda-runtime{suffix}",
        f"libcublasLt.so.{major}": f"nvidia-cublas{suffix}",
        f"libcublas.so.{major}": f"nvidia-cublas{suffix}",
        "libcurand.so.10": f"nvidia-curand{suffix}",
        f"libcufft.so.{cufft}": f"nvidia-cufft{suffix}",
        f"libnvrtc.so.{major}": f"nvidia-cuda-nvrtc{suffix}",
        "libcudnn.so.9": f"nvidia-cudnn-cu{major}",
    }


def missing_libraries(major: int) -> dict[str, str]:
    """The ``cuda_libraries`` that cannot be loaded; loads the others. Call ``preload`` first."""
    return {name: package for name, package in cuda_libraries(major).items() if not _loads(name)}


def provider_loads(folder: Path | None = None) -> bool:
    """Whether ONNX Runtime's CUDA provider can be loaded, that is, no library that it requires is missing.

    Builds require different libraries: 1.31 works without cuDNN, cuFFT and NVRTC (``readelf -d``). ``folder`` contains
    the provider; None means the installed onnxruntime's.
    """
    if folder is None:
        spec = find_spec("onnxruntime")
        if spec is None or spec.origin is None:
            return False
        folder = Path(spec.origin).parent / "capi"
    # In ONNX Runtime's own order and mode: the second library needs symbols of the first.
    return all(_loads(str(folder / f"libonnxruntime_providers_{name}.so"), ctypes.RTLD_GLOBAL) for name in _PROVIDER)


def _loads(name: str, mode: int = ctypes.DEFAULT_MODE) -> bool:
    try:
        ctypes.CDLL(name, mode)
    except OSError:
        return False
    return True


@cache
def preload(ort: Any) -> None:
    """Loads the libraries of CUDA and cuDNN from their pip packages, once per process.

    Without this, onnxruntime searches only the system's paths. preload_dlls prints what is missing: stdout is captured.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        ort.preload_dlls()


def torch_cuda() -> tuple[int, int] | None:
    """The CUDA version of the installed torch, found without importing it; None for a CPU build or without torch."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    try:
        text = (Path(spec.origin).parent / "version.py").read_text(encoding="utf-8")
    except OSError:
        return None
    match = re.search(r"^cuda\b[^=\n]*= *['\"]([\d.]+)['\"]", text, re.MULTILINE)
    return _version_pair(match[1]) if match else None


# ---------------------------------------------------------------- what is missing


def obstacles(build: Build, driver: Driver, number: int = 0) -> list[str]:
    """Why ONNX Runtime cannot use the GPU ``number``: one sentence per cause, with the fix; empty if no cause is found.

    Call ``preload`` first. This function loads the libraries of CUDA.
    """
    found = []
    if not build.has_cuda:
        if GPU_WHEEL in build.wheels and len(build.wheels) > 1:
            found.append(build.conflict)
        else:
            kind = "a CPU build" if build.package in {"", "onnxruntime"} else f"the build {build.package}, without CUDA"
            found.append(f"the installed onnxruntime {build.version} is {kind}: {FIX_WHEEL}")
    if driver.problem:
        found.append(driver.problem)
    elif number >= len(driver.gpus):
        have = "only cuda:0" if len(driver.gpus) == 1 else f"cuda:0 to cuda:{len(driver.gpus) - 1}"
        found.append(f"there is no cuda:{number}, {have}")
    if not build.has_cuda or build.cuda is None:
        return found
    major = build.cuda[0]
    wants = f"onnxruntime-gpu {build.version} needs CUDA {major}"
    if driver.cuda and driver.cuda[0] < major:
        older = f": pip install 'onnxruntime-gpu[cuda,cudnn]=={_LAST_FOR_CUDA_12}'" if driver.cuda[0] == 12 else ""
        found.append(
            f"{wants}, but the driver supports CUDA {dotted(driver.cuda)} at most: update the driver"
            + (f", or install the last build for CUDA 12{older}" if older else "")
        )
    missing = {} if provider_loads() else missing_libraries(major)
    if missing:
        other = next((n for n in (13, 12, 11) if n != major and _loads(f"libcudart.so.{n}")), None)
        found.append(
            f"{wants} and cuDNN 9, but cannot load {', '.join(missing)}"
            + (f" (those of CUDA {other} are installed, but do not fit)" if other else "")
            + f": pip install 'onnxruntime-gpu[cuda,cudnn]=={build.version}'"
        )
    return found


def cuda_majors(build: Build) -> str:
    """The problem if torch and ONNX Runtime were built for different major versions of CUDA; empty if there is none.

    Each has a cuDNN package of its own major version, and both packages install the same files
    (nvidia/cudnn/lib/libcudnn.so.9).
    """
    torch = torch_cuda()
    if torch is None or build.cuda is None or torch[0] == build.cuda[0]:
        return ""
    line = torch_line(build.cuda[0])
    return (
        f"torch was built for CUDA {dotted(torch)} and onnxruntime for CUDA {dotted(build.cuda)}; their cuDNN packages "
        f"overwrite each other's files: install a torch for CUDA {build.cuda[0]}: {line}"
    )


def torch_line(major: int | None = None) -> str:
    """The pip command for a torch with CUDA ``major``; other builds: https://pytorch.org/get-started/locally."""
    return f"pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu{126 if major == 12 else 130}"


# ---------------------------------------------------------------- the choice


def providers(ort: Any, device: Device) -> list[Any]:
    """The providers for a session on ``device``. Only creating the session shows whether CUDA starts.

    Raises DeviceError if CUDA is requested and the build lacks it. ``auto`` then uses the CPU, and warns (DeviceWarning) if
    a driver and a GPU wheel are installed all the same.
    """
    if device.kind == "cpu":
        return [CPU]
    if CUDA not in ort.get_available_providers():
        if device.kind == "cuda" or (has_driver() and GPU_WHEEL in find_build(ort).wheels):
            refuse(ort, device)
        return [CPU]
    preload(ort)
    return [(CUDA, {"device_id": device.index}), CPU]


def refuse(ort: Any, device: Device, reason: str = "") -> None:
    """Reports that CUDA did not start: raises DeviceError if CUDA was requested; with ``auto`` warns if there is a driver.

    ``reason`` is ONNX Runtime's message, shown if no cause is found.
    """
    if device.kind == "auto" and not has_driver():
        return  # a GPU build on a machine without a GPU
    found = obstacles(find_build(ort), find_driver(), device.index)
    why = ". ".join(found) or reason or "ONNX Runtime fell back to the CPU without a reason: see qadeploy doctor"
    if device.kind == "auto":
        warnings.warn(f"this runs on the CPU although there is a GPU driver: {why}", DeviceWarning, stacklevel=2)
        return
    raise DeviceError(f"{device} was requested but is not available: {why}. Or give --device cpu")


def _version_pair(text: str) -> tuple[int, int] | None:
    match = re.match(r"(\d+)(?:\.(\d+))?", text)
    return (int(match[1]), int(match[2] or 0)) if match else None


def dotted(version: tuple[int, int]) -> str:
    """A CUDA version as MAJOR.MINOR."""
    return f"{version[0]}.{version[1]}"
