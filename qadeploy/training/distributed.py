"""Training in several processes (``torchrun``): which of them prints and writes, and a single message for an error.

With a single process nothing here has an effect. Process 0 is the first: only it prints and writes, except for the random
state that each process adds to a save.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState

from qadeploy.errors import FailureError, InputError

_Value = TypeVar("_Value")


def count() -> int:
    """How many processes train together, according to torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1


def is_first() -> bool:
    """Whether this process is the one that prints and writes."""
    return count() == 1 or os.environ.get("RANK", "0") == "0"


def local_rank() -> int:
    """The index of this process on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def windows_per_process(batch_size: int) -> int:
    """The windows of each process in a batch. Raises InputError if ``batch_size`` cannot be shared evenly."""
    if batch_size % count():
        low = batch_size // count() * count()
        choices = " or ".join(str(n) for n in (low, low + count()) if n)
        raise InputError(
            f"batch-size {batch_size} cannot be shared by {count()} processes: give --batch-size {choices}"
        )
    return batch_size // count()


@contextmanager
def together(on_cpu: bool = False) -> Iterator[None]:
    """Joins the processes during the block. If several fail, one raises and the others exit silently.

    The first process to fail raises its error. The others, which failed in the same way or because another process
    ended, raise SystemExit with the exit code of their error.

    Args:
        on_cpu: Compute on the CPU even if there are GPUs; otherwise each process uses one GPU.
    """
    if count() == 1:
        yield
        return
    PartialState(cpu=on_cpu or not torch.cuda.is_available())
    try:
        yield
    except Exception as error:
        if not _is_first_to_fail():
            raise SystemExit(getattr(error, "exit_code", 1)) from error
        if _is_lost_neighbour(error):
            raise FailureError(
                f"another of the {count()} processes ended without an error message (killed?), so this run cannot go on"
            ) from error
        raise
    dist.destroy_process_group()


def _is_first_to_fail() -> bool:
    """Called once by each process that fails. The store belongs to torchrun, so it outlives all of them."""
    try:
        return bool(dist.distributed_c10d._get_default_store().add("qadeploy/errors", 1) == 1)
    except (RuntimeError, ValueError):  # torchrun has ended, or the processes have not joined yet
        return is_first()


def _is_lost_neighbour(error: Exception) -> bool:
    # PyTorch raises no specific type, only these texts.
    signs = ("connection closed by peer", "connection reset", "broken pipe", "nccl", "gloo")
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in signs)


def from_first(make: Callable[[], _Value]) -> _Value:
    """Calls ``make`` in the first process only, and returns its result in all of them."""
    if count() == 1:
        return make()
    parcel: list[Any] = [make() if is_first() else None]
    dist.broadcast_object_list(parcel)
    value: _Value = parcel[0]
    return value


def wait() -> None:
    """Waits until every process has called it."""
    if count() > 1:
        dist.barrier()
