"""The variants of a bench: the bundle, and the tools that people would use in its place.

Each peer imports what it needs inside its own function, and runs as its documentation says.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qadeploy.errors import FailureError, InputError, MissingExtraError
from qadeploy.qa.settings import QaSettings
from qadeploy.records import Answer
from qadeploy.runtime.answerer import Answerer

Pairs = Sequence[tuple[str, str]]
AnswerAll = Callable[[Pairs], list[Answer]]


@dataclass(frozen=True, slots=True)
class Variant:
    """Something that answers: many pairs at once, or one; ``size`` is its model file in bytes."""

    name: str
    answer_all: AnswerAll
    answer_one: Callable[[str, str], Answer]
    size: int


def own(answerer: Answerer) -> Variant:
    """The bundle through ``Answerer``: answer_batch, and answer for one question.

    Every variant may say "no answer" where the bundle has a null threshold.
    """
    if answerer.bundle is None:
        raise FailureError("only a bundle can be benched")
    null = answerer.settings.null_threshold is not None

    def first(found: list[Answer]) -> Answer:
        return found[0] if found else Answer("", 0, 0, 0.0)

    return Variant(
        f"qadeploy {answerer.bundle.precision} ({answerer.bundle.name})",
        lambda pairs: [first(found) for found in answerer.answer_batch(pairs, allow_no_answer=null)],
        lambda question, context: first(answerer.answer(question, context, allow_no_answer=null)),
        answerer.bundle.model_bytes,
    )


def pipeline(checkpoint: Path, settings: QaSettings, precision: str, device: str, stack: ExitStack) -> Variant:
    """Transformers' question-answering pipeline on the PyTorch checkpoint, float32."""
    torch_model, tokenizer = _torch(checkpoint)
    size = sum(p.numel() * p.element_size() for p in torch_model.parameters())
    return _pipeline_variant("transformers pipeline, torch fp32", torch_model, tokenizer, settings, size, device)


def optimum(checkpoint: Path, settings: QaSettings, precision: str, device: str, stack: ExitStack) -> Variant:
    """Optimum's ONNX model in the pipeline: its export, and for an int8 bundle its own int8 preset."""
    try:
        from optimum.exporters.onnx import main_export
        from optimum.onnxruntime import AutoQuantizationConfig, ORTModelForQuestionAnswering, ORTQuantizer
    except ImportError as error:
        raise MissingExtraError("the peer optimum", "optimum-onnx", "train") from error
    _, tokenizer = _torch(checkpoint)
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracer and deprecation remarks inside the library
        main_export(str(checkpoint), folder / "fp32", task="question-answering", do_validation=False)
    provider = "CUDAExecutionProvider" if device == "cuda" else "CPUExecutionProvider"
    model = ORTModelForQuestionAnswering.from_pretrained(folder / "fp32", provider=provider)
    name, file = "optimum ONNX fp32 in the pipeline", folder / "fp32" / "model.onnx"
    if precision == "int8":
        preset = AutoQuantizationConfig.avx512_vnni(is_static=False, per_channel=False)
        ORTQuantizer.from_pretrained(folder / "fp32").quantize(save_dir=folder / "int8", quantization_config=preset)
        model = ORTModelForQuestionAnswering.from_pretrained(
            folder / "int8", file_name="model_quantized.onnx", provider=provider
        )
        name, file = "optimum ONNX int8 (avx512_vnni preset) in the pipeline", folder / "int8" / "model_quantized.onnx"
    return _pipeline_variant(name, model, tokenizer, settings, file.stat().st_size, device)


PEERS: dict[str, Callable[[Path, QaSettings, str, str, ExitStack], Variant]] = {
    "pipeline": pipeline,
    "optimum": optimum,
}


def parse_peers(names: str) -> list[str]:
    """The peers of a comma-separated list. Raises InputError on an unknown one."""
    found = [name.strip() for name in names.split(",") if name.strip()]
    unknown = [name for name in found if name not in PEERS]
    if unknown:
        raise InputError(f"unknown peer {', '.join(unknown)}: choose from {', '.join(PEERS)}")
    return found


def _torch(checkpoint: Path) -> tuple[Any, Any]:
    try:
        import torch
        from transformers import AutoModelForQuestionAnswering, AutoTokenizer
    except ImportError as error:
        raise MissingExtraError("a transformers peer", "transformers", "train") from error
    for name in ("transformers", "optimum", "onnxruntime"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if not (checkpoint / "config.json").is_file():
        raise FailureError(f"{checkpoint}: the bundle's source checkpoint is not there any more")
    model = AutoModelForQuestionAnswering.from_pretrained(checkpoint, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(checkpoint)


def _pipeline_variant(name: str, model: Any, tokenizer: Any, settings: QaSettings, size: int, device: str) -> Variant:
    try:
        from transformers import pipeline as make
    except ImportError as error:
        raise MissingExtraError("a transformers peer", "transformers", "train") from error
    pipe = make("question-answering", model=model, tokenizer=tokenizer, device=device)
    options = {
        "max_seq_len": settings.max_seq_len,
        "doc_stride": settings.doc_stride,
        "max_answer_len": settings.max_answer_len,
        "handle_impossible_answer": settings.null_threshold is not None,
    }

    def run(inputs: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecation remarks inside the library
            return pipe(inputs, **options)

    def answer(found: Any) -> Answer:
        if isinstance(found, list):  # what the pipeline gives where it finds no span
            return answer(found[0]) if found else Answer("", 0, 0, 0.0)
        return Answer(found["answer"], found["start"], found["end"], float(found["score"]))

    def answer_all(pairs: Pairs) -> list[Answer]:
        found = run([{"question": q, "context": c} for q, c in pairs])
        return [answer(f) for f in (found if isinstance(found, list) else [found])]

    return Variant(name, answer_all, lambda q, c: answer(run({"question": q, "context": c})), size)
