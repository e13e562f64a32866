"""Optimum's ONNX model, quantized with optimum's preset if the bundle is int8: in the pipeline, and called directly.

Directly means ``ORTModelForQuestionAnswering`` on one unpadded window per call, with our encoder and decoder: optimum's
model without the pipeline's own work.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qadeploy.bench.peers.pipeline import in_pipeline, options, require_pipeline
from qadeploy.bench.peers.setup import Setup, exported, quiet, torch_with
from qadeploy.bench.variant import Asker, Variant, around, host
from qadeploy.core.windows import pad_batch
from qadeploy.extras import import_extra
from qadeploy.inference.answerer import LogitsModel
from qadeploy.inference.session import session_options
from qadeploy.records import Logits, Window


def prepare(setup: Setup) -> Variant:
    """Optimum's model in transformers' pipeline. Raises FailureError, MissingExtraError, and what optimum raises."""
    path, what, precision = _model(setup)
    require_pipeline()
    arguments = {
        "checkpoint": setup.found_checkpoint(),
        "model": str(path),
        "options": options(setup),
        **setup.given("device", "threads", "trust_remote_code"),
    }
    name, size = f"optimum ONNX {what} in the pipeline", path.stat().st_size
    return Variant(name, precision, size, "qadeploy.bench.peers.optimum:load", arguments, "optimum")


def prepare_direct(setup: Setup) -> Variant:
    """The same model without the pipeline. Raises what ``prepare`` raises."""
    path, what, precision = _model(setup)
    return Variant(
        f"optimum ONNX {what} called directly",
        precision,
        path.stat().st_size,
        "qadeploy.bench.peers.optimum:load_direct",
        {
            "model": str(path),
            "bundle": str(setup.bundle.folder),
            **setup.given("device", "threads", "allow_no_answer"),
        },
        "optimum-direct",
        "with our windows and spans",
    )


def _model(setup: Setup) -> tuple[Path, str, str]:
    """The model file, its description, and its precision."""
    optimum = import_extra("optimum.onnxruntime", "the peer optimum", "optimum", "optimum-onnx")
    source = exported(setup)
    if setup.bundle.precision != "int8":
        return source / "model.onnx", "fp32", "fp32"
    path = setup.folder / "optimum-int8" / "model_quantized.onnx"
    if not path.is_file():
        preset = optimum.AutoQuantizationConfig.avx512_vnni(is_static=False, per_channel=False)
        with quiet():
            optimum.ORTQuantizer.from_pretrained(source).quantize(save_dir=path.parent, quantization_config=preset)
    return path, "int8 (avx512_vnni preset)", "int8"


def _load(model: str, device: str, threads: int) -> Any:
    torch_with(threads)
    from optimum.onnxruntime import ORTModelForQuestionAnswering

    with quiet():
        return ORTModelForQuestionAnswering.from_pretrained(
            Path(model).parent,
            file_name=Path(model).name,
            provider="CUDAExecutionProvider" if device == "cuda" else "CPUExecutionProvider",
            session_options=session_options(threads),
        )


def load(
    checkpoint: str, model: str, device: str, threads: int, options: dict[str, Any], trust_remote_code: bool = False
) -> Asker:
    """Optimum's model inside the pipeline."""
    return in_pipeline(_load(model, device, threads), checkpoint, device, options, trust_remote_code)


def load_direct(model: str, bundle: str, device: str, threads: int, allow_no_answer: bool) -> Asker:
    """Optimum's model called window by window."""
    return around(host(bundle, lambda encoder: _Direct(_load(model, device, threads))), allow_no_answer)


class _Direct(LogitsModel):
    def __init__(self, model: Any) -> None:
        self._model = model

    def run(self, windows: Sequence[Window]) -> list[Logits]:
        """Start and end logits of each window, one call per window."""
        outputs = (self._model(**pad_batch([window], 0)) for window in windows)
        return [(output.start_logits[0], output.end_logits[0]) for output in outputs]
