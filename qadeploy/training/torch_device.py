"""The device that torch computes on, with the same names and errors as for inference, and its precision."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from qadeploy.errors import DeviceError, DeviceWarning, FailureError, InputError
from qadeploy.inference.devices import find_driver, has_driver, parse_device, torch_cuda, torch_line
from qadeploy.machine import machine
from qadeploy.training import distributed


def torch_device(name: str) -> torch.device:
    """The device of a name: auto, cpu, cuda or cuda:N. CUDA is returned only if a tensor could be made on it.

    ``auto`` chooses the CPU if CUDA does not work, and warns (DeviceWarning) if there is a driver.

    Raises:
        InputError: Any other name.
        DeviceError: CUDA was requested but is not available.
    """
    wanted = parse_device(name)
    if wanted.kind == "cpu":
        return torch.device("cpu")
    why = _why_not(wanted.index)
    if not why:
        return torch.device("cuda", wanted.index)
    if wanted.kind == "cuda":
        raise DeviceError(f"{wanted} was requested but is not available: {why}. Or give --device cpu")
    if has_driver():
        warnings.warn(f"this runs on the CPU, although a GPU driver is installed: {why}", DeviceWarning, stacklevel=2)
    return torch.device("cpu")


def training_device(name: str) -> torch.device:
    """The ``torch_device`` of this process; each of several processes on a machine uses its own GPU.

    Raises:
        InputError: Several processes would share the one GPU that was named. Also what ``torch_device`` raises.
    """
    wanted = parse_device(name)
    if distributed.count() == 1:
        return torch_device(name)
    if wanted.number is not None:
        raise InputError(f"--device {wanted}: {distributed.count()} processes need a GPU each: give --device cuda")
    if wanted.kind == "auto" and not torch.cuda.is_available():
        return torch_device("auto")
    return torch_device("cpu" if wanted.kind == "cpu" else f"cuda:{distributed.local_rank()}")


def device_name(device: torch.device) -> str:
    """``cpu``, or ``cuda`` with the GPU's name."""
    return device.type if device.type == "cpu" else f"{device.type} ({torch.cuda.get_device_name(device)})"


def resolve_precision(wanted: str, device: str) -> str:
    """The precision on a ``device``, cpu or cuda; ``auto``: bf16 if native there, otherwise fp32. Raises InputError."""
    on_gpu = device == "cuda"
    if wanted == "fp16" and not on_gpu:
        raise InputError("precision fp16: needs a GPU, but this run trains on the CPU: use --precision bf16 or fp32")
    native = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    if wanted == "bf16" and on_gpu and not native:
        raise InputError("precision bf16: this GPU does not support bf16 natively: use --precision fp32")
    if wanted != "auto":
        return wanted
    if on_gpu:
        return "bf16" if native else "fp32"
    return "bf16" if machine().has_bf16 else "fp32"


@contextmanager
def memory_errors() -> Iterator[None]:
    """Raises FailureError, which says what to lower, if PyTorch runs out of memory."""
    try:
        yield
    except RuntimeError as error:
        # On a CPU PyTorch raises no specific type, only this text.
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            raise FailureError(
                "training ran out of memory: lower --batch-size, --batch-tokens or --max-seq-len"
            ) from error
        raise


def _why_not(number: int) -> str:
    """Why torch cannot compute on the GPU ``number``, and what to do about it; empty if it can."""
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        if number >= count:
            return f"there is no cuda:{number}, " + ("only cuda:0" if count == 1 else f"cuda:0 to cuda:{count - 1}")
        try:
            torch.zeros(1, device=torch.device("cuda", number))
        except RuntimeError as error:  # another process holds it, its memory is full, torch has no kernels for it
            return f"torch cannot use cuda:{number} ({' '.join(str(error).split())[:200]})"
        return ""
    found = []
    built = torch_cuda()
    if built is None:
        found.append(f"the installed torch {torch.__version__} is a CPU build: {torch_line()}")
    driver = find_driver()
    if driver.problem:
        found.append(driver.problem)
    elif built and driver.cuda and driver.cuda[0] < built[0]:
        older = f", or {torch_line(driver.cuda[0])}" if driver.cuda[0] == 12 else ""
        found.append(
            f"torch {torch.__version__} needs CUDA {built[0]}, but the driver supports CUDA {driver.cuda[0]}.{driver.cuda[1]} "
            f"at most: update the driver{older}"
        )
    return ". ".join(found) or f"torch {torch.__version__} finds no GPU and does not say why: see qadeploy doctor"
