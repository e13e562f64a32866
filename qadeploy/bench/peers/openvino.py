"""OpenVINO: optimum's ONNX export quantized by NNCF (static int8, calibrated), run with our encoder and decoder.

Matmuls that stay in float are computed in bfloat16 if the CPU has it. Many windows go through asynchronous requests on a
model compiled for throughput, one window through a model compiled for latency, as OpenVINO's performance hints say (https://docs.openvino.ai, "High-level Performance Hints").
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qadeploy.bench.peers.setup import Setup, exported, quiet
from qadeploy.bench.variant import Asker, Variant, around, host
from qadeploy.bench.workload import windows_of
from qadeploy.core.windows import pad_batch
from qadeploy.errors import FailureError
from qadeploy.extras import import_extra
from qadeploy.inference.answerer import LogitsModel
from qadeploy.records import LOGIT_NAMES, Logits, Window

_CALIBRATION_WINDOWS = 128


def prepare(setup: Setup) -> Variant:
    """Quantizes by NNCF and saves in OpenVINO's format. Raises FailureError, MissingExtraError, and what both raise."""
    openvino, nncf = _library("openvino"), _library("nncf")
    if setup.device != "cpu":
        raise FailureError(f"only runs on the CPU here, and this bench runs on {setup.device}")
    if not setup.calibration:
        raise FailureError(
            "there are no questions to calibrate int8 with, other than those of the bench: "
            "lower --questions, or bench a bundle whose run still exists"
        )
    source = exported(setup)
    path = setup.folder / "openvino-int8" / "model.xml"

    encoder = setup.bundle.load_encoder()
    windows = windows_of(encoder, setup.bundle.settings, setup.calibration)[:_CALIBRATION_WINDOWS]
    model = openvino.Core().read_model(source / "model.onnx")
    names = [port.get_any_name() for port in model.inputs]
    with quiet():
        quantized = nncf.quantize(
            model,
            nncf.Dataset([inputs(window, names) for window in windows]),
            subset_size=len(windows),
            model_type=nncf.ModelType.TRANSFORMER,
        )
    openvino.save_model(quantized, path, compress_to_fp16=False)
    arithmetic = "bf16" if "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES") else "f32"
    return Variant(
        f"OpenVINO int8 (NNCF) + {'bf16' if arithmetic == 'bf16' else 'fp32'}",
        "int8",
        path.stat().st_size + path.with_suffix(".bin").stat().st_size,
        "qadeploy.bench.peers.openvino:load",
        {
            "model": str(path),
            "bundle": str(setup.bundle.folder),
            "arithmetic": arithmetic,
            **setup.given("threads", "allow_no_answer"),
        },
        "openvino",
        f"with our windows and spans; calibrated on {len(windows)} windows of questions on other contexts",
    )


def load(model: str, bundle: str, arithmetic: str, threads: int, allow_no_answer: bool) -> Asker:
    """The quantized model with the bundle's encoder and our decoder."""
    return around(host(bundle, lambda encoder: OpenVinoModel(Path(model), arithmetic, threads)), allow_no_answer)


class OpenVinoModel(LogitsModel):
    """An OpenVINO model file as a function from windows to logits: ``latency`` for one window, ``throughput`` for many.

    ``arithmetic`` is OpenVINO's inference precision (f32, bf16). Raises MissingExtraError.
    """

    def __init__(self, path: Path, arithmetic: str, threads: int) -> None:
        openvino = _library("openvino")
        core = openvino.Core()
        model = core.read_model(path)
        self._names = [port.get_any_name() for port in model.inputs]
        common = {"INFERENCE_PRECISION_HINT": arithmetic, "INFERENCE_NUM_THREADS": threads}
        self._latency = core.compile_model(model, "CPU", {**common, "PERFORMANCE_HINT": "LATENCY"})
        throughput = core.compile_model(model, "CPU", {**common, "PERFORMANCE_HINT": "THROUGHPUT"})
        self._one = self._latency.create_infer_request()
        self._many = openvino.AsyncInferQueue(throughput)
        self._logits: dict[int, Logits] = {}
        self._many.set_callback(self._keep)

    def run(self, windows: Sequence[Window]) -> list[Logits]:
        """Start and end logits of each window, float32 ``[tokens]`` each, in order; each window alone and unpadded."""
        if len(windows) == 1:
            self._one.infer(inputs(windows[0], self._names), share_inputs=True)
            return [_outputs(self._one)]
        self._logits.clear()
        for i in sorted(range(len(windows)), key=lambda i: -len(windows[i])):
            self._many.start_async(inputs(windows[i], self._names), i)
        self._many.wait_all()
        return [self._logits[i] for i in range(len(windows))]

    def _keep(self, request: Any, number: int) -> None:
        self._logits[number] = _outputs(request)


def inputs(window: Window, names: Iterable[str]) -> dict[str, Any]:
    """One window as the inputs in ``names``, int64 ``[1, tokens]`` each."""
    values = pad_batch([window], 0)
    return {name: values[name] for name in names}


def _outputs(request: Any) -> Logits:
    starts, ends = (request.get_tensor(name).data[0].astype(np.float32) for name in LOGIT_NAMES)
    return starts, ends


def _library(name: str) -> Any:
    os.environ.setdefault("NNCF_CI", "1")  # the only switch for the telemetry of nncf, read at import
    with quiet():
        return import_extra(name, "the peer openvino", "peers")
