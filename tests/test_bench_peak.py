"""The machine's peak and a model's operations: real matmuls, and the count by the textbook formula."""

from __future__ import annotations

import json
import os
import sys

import numpy as np
import onnxruntime as ort
import pytest

from qadeploy.bench.operations import Operations, count_operations
from qadeploy.bench.peak import SHAPES, Peak, matmul_model, measure_peak
from qadeploy.errors import FailureError, MissingExtraError
from qadeploy.machine import usable_cpus
from tests.test_imports import run


@pytest.mark.parametrize("kind", ["fp32", "int8"])
def test_the_matmul_is_what_it_says(kind):
    session = ort.InferenceSession(matmul_model(kind, 64, 32), providers=["CPUExecutionProvider"])
    generator = np.random.default_rng(0)
    # 7 bits, with which int8 saturates on no CPU.
    a = generator.integers(0, 128, (8, 64)).astype(np.uint8 if kind == "int8" else np.float32)
    (found,) = session.run(None, {"a": a})
    b = np.random.default_rng(1)
    weights = b.integers(-127, 128, (64, 32)) if kind == "int8" else b.standard_normal((64, 32), dtype=np.float32)
    assert found.dtype == (np.int32 if kind == "int8" else np.float32)
    np.testing.assert_allclose(found, a.astype(np.float64) @ weights, rtol=1e-4, atol=1e-2)


def test_the_peak_is_plausible_and_int8_is_faster_where_the_cpu_has_vnni():
    peak = measure_peak(1)
    assert peak.threads == 1
    # One core does at least a few operations a cycle, and no core has 2**13 int8 operations in one at 8 GHz.
    assert 1e9 < peak.fp32 < 2e12
    assert 1e9 < peak.int8 < 6.5e13
    with open("/proc/cpuinfo", encoding="utf-8") as stream:
        flags = set(stream.read().split())
    if flags & {"avx512_vnni", "avx_vnni"}:
        assert peak.int8 > 1.3 * peak.fp32


@pytest.mark.skipif(usable_cpus() < 2, reason="one CPU has no second thread")
def test_threads_are_added_up():
    one, two = measure_peak(1), measure_peak(2)
    for _ in range(4):  # the best of several, because other work on the machine only lowers a figure
        if 0.8 * one.int8 < two.int8 < 3 * one.int8:  # two threads of one core share its execution units
            break
        one, two = one.best(measure_peak(1)), two.best(measure_peak(2))
    assert 0.8 * one.int8 < two.int8 < 3 * one.int8


def test_a_model_is_held_against_the_peak_of_its_precision():
    peak = Peak(10.0, 40.0, 2).best(Peak(20.0, 30.0, 2))
    assert (peak.of("fp32"), peak.of("int8"), peak.of("bf16")) == (20.0, 40.0, None)
    assert peak == Peak(20.0, 40.0, 2)
    assert len(SHAPES) > 1


def test_without_onnx_the_peak_names_the_pip_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(MissingExtraError, match=r"qadeploy\[train\]"):
        matmul_model("fp32", 4, 4)


def test_operations_are_those_of_the_textbook(tiny_checkpoint):
    config = json.loads((tiny_checkpoint / "config.json").read_text())
    h, i, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    # Four projections and two feed-forward matmuls per layer, scores and weighted values, and the head's two columns.
    found = count_operations(tiny_checkpoint)
    assert found == Operations(0.0, layers * 2.0 * (4 * h * h + 2 * h * i) + 2 * 2 * h, layers * 4.0 * h)
    assert found.of([10, 20]) == 30 * found.per_token + 500 * found.per_square


def test_a_checkpoint_that_cannot_be_counted_is_named(tmp_path):
    with pytest.raises(FailureError, match="its operations cannot be counted"):
        count_operations(tmp_path)


def test_the_memory_of_a_large_parent_is_not_counted_as_the_childs():
    script = (
        "import numpy, subprocess, sys\n"
        "ballast = numpy.ones(40_000_000)\n"  # 320 MB
        "code = 'from qadeploy.machine import peak_memory; print(peak_memory())'\n"
        "print(int(subprocess.check_output([sys.executable, '-c', code])))"
    )
    found = int(run(script).stdout)
    assert 5e6 < found < 3e8
    assert os.path.exists("/proc/self/status")
