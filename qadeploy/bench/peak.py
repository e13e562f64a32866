"""The peak speed of this machine's cores: matmuls with constant weights in ONNX Runtime, fp32 and int8.

The int8 matmul is MatMulInteger of uint8 by int8 into int32, which a quantized model depends on (with VNNI if the CPU has
it). One operation is a multiplication or an addition, so a matmul of [m, k] by [k, n] has 2 m k n operations.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from threading import Barrier
from typing import Any

import numpy as np

from qadeploy.extras import import_extra
from qadeploy.inference.session import onnxruntime, session_options

SHAPES = ((256, 512, 512), (384, 2048, 512))  # m, k, n; the best shape differs by CPU
_BURST = 0.004  # seconds of one timing
_BURSTS = 16


@dataclass(frozen=True, slots=True)
class Peak:
    """Operations per second of all ``threads`` together, each running its own matmul."""

    fp32: float
    int8: float
    threads: int

    def of(self, precision: str) -> float | None:
        """The peak for models of this precision; None if none was measured."""
        return {"fp32": self.fp32, "int8": self.int8}.get(precision)

    def best(self, other: Peak) -> Peak:
        """The larger figures of two measurements."""
        return Peak(max(self.fp32, other.fp32), max(self.int8, other.int8), self.threads)


def measure_peak(threads: int) -> Peak:
    """Measures the best of many short bursts of matmuls, on all threads at once.

    Each thread is timed by its own CPU time, so that a busy machine does not look like a slow one.
    Raises MissingExtraError without the onnx package.
    """
    with ThreadPoolExecutor(threads, thread_name_prefix="peak") as pool:
        fp32, int8 = (max(_rate(kind, shape, threads, pool) for shape in SHAPES) for kind in ("fp32", "int8"))
    return Peak(fp32, int8, threads)


def _rate(kind: str, shape: tuple[int, int, int], threads: int, pool: ThreadPoolExecutor) -> float:
    m, k, n = shape
    model = matmul_model(kind, k, n)
    generator = np.random.default_rng(0)
    a: Any = generator.standard_normal((m, k), dtype=np.float32)
    if kind == "int8":
        a = generator.integers(0, 256, (m, k)).astype(np.uint8)
    make = partial(onnxruntime().InferenceSession, model, providers=["CPUExecutionProvider"])
    runs = [partial(make(session_options(1)).run, None, {"a": a}) for _ in range(threads)]
    meet = Barrier(threads)
    best = pool.map(_best_seconds, runs, [meet] * threads)
    return sum(2.0 * m * k * n / seconds for seconds in best)


def _best_seconds(run: Callable[[], object], meet: Barrier) -> float:
    """The lowest CPU seconds of one ``run`` over the bursts; all threads begin together."""
    run()
    started = time.thread_time()
    run()
    count = max(1, round(_BURST / max(time.thread_time() - started, 1e-6)))
    meet.wait()
    best = np.inf
    for _ in range(_BURSTS):
        started = time.thread_time()
        for _ in range(count):
            run()
        best = min(best, (time.thread_time() - started) / count)
    return float(best)


def matmul_model(kind: str, k: int, n: int) -> bytes:
    """An ONNX model of one matmul: ``a [m, k]`` by constant ``[k, n]``: fp32 (MatMul) or int8 (MatMulInteger)."""
    onnx = import_extra("onnx", "the machine's peak", "train")
    generator = np.random.default_rng(1)
    if kind == "int8":
        weights: Any = generator.integers(-127, 128, (k, n)).astype(np.int8)
        operator, given, made = "MatMulInteger", onnx.TensorProto.UINT8, onnx.TensorProto.INT32
    else:
        weights = generator.standard_normal((k, n), dtype=np.float32)
        operator, given, made = "MatMul", onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node(operator, ["a", "b"], ["c"])],
        "matmul",
        [onnx.helper.make_tensor_value_info("a", given, ["m", k])],
        [onnx.helper.make_tensor_value_info("c", made, ["m", n])],
        [onnx.numpy_helper.from_array(weights, "b")],
    )
    # Opset 13 with IR 8: readable by every ONNX Runtime since 1.10.
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 13)], ir_version=8)
    return bytes(model.SerializeToString())
