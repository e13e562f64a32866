"""Shared by the parts of benchmarks/gpu.py: names, the plan of a model's process, a variant, and the GPU's monitor."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from qadeploy.records import Answer, Logits, Window

LATENCY, THROUGHPUT = "ours, latency path", "ours, throughput path"
ORT_PLAIN, ORT_SORTED, OPTIMUM, PIPELINE = (
    "ONNX Runtime fp16, padded",
    "ONNX Runtime fp16, length-sorted",
    "optimum ORT model",
    "transformers pipeline",
)
EAGER, SDPA, SORTED = "torch eager fp16", "torch SDPA fp16, padded", "torch SDPA fp16, length-sorted"
COMPILED = "torch compiled fp16"
REFERENCE = "torch fp32"

ONE_128, ONE_384, MANY_384, MIXED = "1 x 128", "1 x 384", "32 x 384", "mixed lengths"
E2E_ONE, E2E_ALL = "one question", "many questions"
EVERY = frozenset({ONE_128, ONE_384, MANY_384, MIXED, E2E_ONE, E2E_ALL})
MLPERF_INT8 = 9369  # BERT-large samples of 384 tokens per second, one H100, int8 (MLPerf Inference, offline)

# hidden, layers, heads, intermediate (Devlin et al. 2019, section 3); a dry run uses tiny models instead.
SHAPES = {"BERT-base shape": (768, 12, 12, 3072), "BERT-large shape": (1024, 24, 16, 4096)}
DWARFS = {"BERT-base shape": (64, 2, 2, 128), "BERT-large shape": (64, 3, 2, 128)}
BASE = "base model"
SHARES = {BASE: 0.34, "BERT-base shape": 0.23, "BERT-large shape": 0.43}  # of the time


@dataclass(frozen=True, slots=True)
class ModelPlan:
    """The task of one model's process.

    ``until`` is its deadline (``time.time``), ``rows`` the file that it writes, ``exports`` the folder of the models.
    """

    model: str
    device: str
    dry: bool
    questions: int
    rounds: int
    until: float
    rows: str
    exports: str
    skip: tuple[str, ...] = ()

    @property
    def on_gpu(self) -> bool:
        """Whether this is a real run, not a dry run on the CPU."""
        return self.device.startswith("cuda")


@dataclass
class GpuVariant:
    """A variant to measure: ``run`` is the model alone, ``one`` and ``all`` are end to end; None if not supported."""

    name: str
    precision: str
    run: Callable[[Sequence[Window]], list[Logits]] | None = None
    one: Callable[[str, str], Answer] | None = None
    all: Callable[[Sequence[tuple[str, str]]], list[Answer]] | None = None
    notes: Callable[[], list[str]] = list
    scenarios: frozenset[str] = frozenset()


def smi_name(device: str) -> str:
    """nvidia-smi's name of cuda or cuda:N: it ignores CUDA_VISIBLE_DEVICES, which may number GPUs differently."""
    number = int(device.partition(":")[2] or 0)
    visible = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return visible[number] if number < len(visible) else str(number)


class GpuWatch:
    """nvidia-smi, watched in the background: utilisation in percent and used memory in MiB; None without nvidia-smi."""

    def __init__(self, device: str) -> None:
        self._samples: list[tuple[float, int, int]] = []
        tool = shutil.which("nvidia-smi")
        self._process: subprocess.Popen[str] | None = None
        if tool and device.startswith("cuda"):
            query = [
                "--query-gpu=utilization.gpu,memory.used",
                "--format=csv,noheader,nounits",
                "-lms",
                "50",
                "-i",
                smi_name(device),
            ]
            self._process = subprocess.Popen(
                [tool, *query], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
            self._reader = threading.Thread(target=self._read, daemon=True)
            self._reader.start()

    def _read(self) -> None:
        stream = self._process.stdout if self._process else None
        for line in stream or ():
            parts = [part.strip() for part in line.split(",")]
            if len(parts) == 2 and all(part.isdigit() for part in parts):
                self._samples.append((time.monotonic(), int(parts[0]), int(parts[1])))

    def memory(self) -> int | None:
        """MiB in use now."""
        if self._process is None:
            return None
        time.sleep(0.15)  # waits for samples from after the last step
        return self._samples[-1][2] if self._samples else None

    def utilisation(self, work: Callable[[], object], seconds: float = 1.0) -> float | None:
        """Utilisation in percent while ``work`` is repeated for ``seconds``."""
        if self._process is None:
            return None
        started = time.monotonic()
        while time.monotonic() - started < seconds:
            work()
        return self.since(started)

    def since(self, started: float) -> float | None:
        """Utilisation in percent in the second half of the time since ``started`` (``time.monotonic``)."""
        middle = (started + time.monotonic()) / 2  # nvidia-smi averages over up to a second
        own = [percent for at, percent, _ in self._samples if at > middle]
        return float(np.mean(own)) if own else None

    def close(self) -> None:
        """Stops nvidia-smi."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
            self._reader.join()
            if self._process.stdout:
                self._process.stdout.close()
