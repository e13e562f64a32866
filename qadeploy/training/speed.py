"""How fast training is, and what makes it faster: TF32, attention in float32 on a CPU, compilation."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional
from transformers import TrainerCallback

from qadeploy.errors import FailureError
from qadeploy.machine import peak_memory

AMPERE = (8, 0)  # the first compute capability whose tensor cores multiply TF32


def has_tf32(device: torch.device) -> bool:
    """Whether the device can compute float32 matmuls in TF32."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= AMPERE


@contextmanager
def tf32_matmuls(device: torch.device) -> Iterator[None]:
    """Computes float32 matmuls in TF32 during the block if the device can: 10 bits of mantissa, not 23.

    Float32 computations after the block, such as the reference for exports, have full precision again.
    """
    if not has_tf32(device):
        yield
        return
    before = _set_matmul_precision("high")
    try:
        yield
    finally:
        _set_matmul_precision(before)


def _set_matmul_precision(wanted: str) -> str:
    """Sets the precision of float32 matmuls and returns the previous one.

    It uses the calls that torch 2.9 warns about: torch.compile reads this setting itself and fails if it was set
    through the new fp32_precision, because torch forbids mixing both (pytorch pull request 189955).
    """
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="Please use the new API settings to control TF32", category=UserWarning
        )
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(wanted)
    return before


@contextmanager
def float32_attention(device: torch.device) -> Iterator[None]:
    """Computes PyTorch's fused attention in float32 during the block if the device is a CPU, under autocast as well.

    On a CPU its kernels are slower in bfloat16 than in float32: with them a training step took 1.1 to 1.4 times the CPU
    time (torch 2.13, AMX, 96 to 384 tokens, 12 heads of 32).
    """
    if device.type != "cpu":
        yield
        return
    fused = functional.scaled_dot_product_attention

    def attention(query: Any, key: Any, value: Any, attn_mask: Any = None, *args: Any, **options: Any) -> Any:
        if not torch.is_autocast_enabled("cpu"):
            return fused(query, key, value, attn_mask, *args, **options)
        with torch.autocast("cpu", enabled=False):
            mask = attn_mask.float() if attn_mask is not None and attn_mask.is_floating_point() else attn_mask
            return fused(query.float(), key.float(), value.float(), mask, *args, **options)

    functional.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = fused


@contextmanager
def compiled(model: torch.nn.Module, wanted: bool, backend: Any = "inductor") -> Iterator[None]:
    """Runs ``model`` compiled during the block, if ``wanted``; its class, its weights and their names stay the same.

    One compilation serves all lengths. Raises FailureError if the compiler fails.
    """
    if not wanted:
        yield
        return
    import torch._dynamo.exc

    model.compile(backend=backend, dynamic=True)
    try:
        yield
    except torch._dynamo.exc.TorchDynamoException as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]
        raise FailureError(
            f"--torch-compile: torch cannot compile this model here ({reason}): leave it out, or install what is "
            "missing (a C++ compiler on a CPU, triton on a GPU)"
        ) from error
    finally:
        model._compiled_call_impl = None


class Speed(TrainerCallback):
    """Windows per second and peak memory of each epoch.

    The time includes saves inside the epoch but not the evaluation after it; for a resumed epoch it is the time since
    the resumption. The memory is PyTorch's peak on a GPU, and the process's largest resident set so far on a CPU.

    Args:
        device: Where the model is trained.
        windows: Returns how many windows this process has trained on so far.
        processes: How many processes train.
        rows: The rows of the epochs before the run was resumed.
    """

    def __init__(
        self, device: torch.device, windows: Callable[[], int], processes: int = 1, rows: Sequence[dict[str, Any]] = ()
    ) -> None:
        self.device = device
        self.windows = windows
        self.processes = processes
        self.rows = list(rows)
        self._begun = (0.0, 0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Resets the peak memory."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Starts the clock."""
        self._begun = (time.perf_counter(), self.windows())

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Adds the row of an epoch."""
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            torch.cuda.synchronize(self.device)  # it may still be busy
        windows = (self.windows() - self._begun[1]) * self.processes
        seconds = time.perf_counter() - self._begun[0]
        self.rows.append(
            {
                "epoch": round(state.epoch),
                "windows": windows,
                "seconds": round(seconds, 3),
                "windows_per_second": round(windows / seconds, 1),
                "peak_memory_bytes": torch.cuda.max_memory_allocated(self.device) if on_gpu else peak_memory(),
            }
        )

    def row(self, epoch: int) -> dict[str, Any] | None:
        """The row of an epoch; None if it was not trained."""
        return next((row for row in self.rows if row["epoch"] == epoch), None)

    def summary(self) -> dict[str, Any]:
        """The rows, the overall windows per second and the largest peak memory; these two are None without rows."""
        seconds = sum(row["seconds"] for row in self.rows)
        peaks = [row["peak_memory_bytes"] for row in self.rows if row["peak_memory_bytes"] is not None]
        return {
            "windows_per_second": round(sum(row["windows"] for row in self.rows) / seconds, 1) if seconds else None,
            "peak_memory_bytes": max(peaks, default=None),
            "epochs": self.rows,
        }
