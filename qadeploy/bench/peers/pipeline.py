"""Transformers' question-answering pipeline on the PyTorch checkpoint, float32: what most people run."""

from __future__ import annotations

from typing import Any

from qadeploy.bench.peers.setup import Setup, quiet, torch_with, weights_bytes
from qadeploy.bench.variant import NO_ANSWER, Asker, Pairs, Variant
from qadeploy.errors import MissingExtraError
from qadeploy.records import Answer


def prepare(setup: Setup) -> Variant:
    """The pipeline with the bundle's window and answer lengths. Raises FailureError, MissingExtraError."""
    checkpoint = setup.found_checkpoint()
    torch_with(setup.threads)
    return Variant(
        "transformers pipeline, torch fp32",
        "fp32",
        weights_bytes(checkpoint, 4),
        "qadeploy.bench.peers.pipeline:load",
        {
            "checkpoint": checkpoint,
            "device": setup.device,
            "threads": setup.threads,
            "options": options(setup),
        },
        "pipeline",
    )


def options(setup: Setup) -> dict[str, Any]:
    """The bundle's settings as the pipeline names them."""
    settings = setup.bundle.settings
    return {
        "max_seq_len": settings.max_seq_len,
        "doc_stride": settings.doc_stride,
        "max_answer_len": settings.max_answer_len,
        "handle_impossible_answer": setup.allow_no_answer,
    }


def load(checkpoint: str, device: str, threads: int, options: dict[str, Any]) -> Asker:
    """The pipeline around the PyTorch model."""
    torch = torch_with(threads)
    try:
        from transformers import AutoModelForQuestionAnswering
    except ImportError as error:
        raise MissingExtraError("the peer pipeline", "transformers", "train") from error
    model = AutoModelForQuestionAnswering.from_pretrained(checkpoint, dtype=torch.float32).eval()
    return in_pipeline(model, checkpoint, device, options)


def in_pipeline(model: Any, checkpoint: str, device: str, options: dict[str, Any]) -> Asker:
    """Any model that the pipeline takes, inside it."""
    from transformers import AutoTokenizer
    from transformers import pipeline as make

    with quiet():
        pipe = make(
            "question-answering", model=model, tokenizer=AutoTokenizer.from_pretrained(checkpoint), device=device
        )

    def run(inputs: Any) -> Any:
        with quiet():
            return pipe(inputs, **options)

    def answer(found: Any) -> Answer:
        if isinstance(found, list):  # what the pipeline gives where it finds no span
            return answer(found[0]) if found else NO_ANSWER
        return Answer(found["answer"], found["start"], found["end"], float(found["score"]))

    def answer_all(pairs: Pairs) -> list[Answer]:
        found = run([{"question": q, "context": c} for q, c in pairs])
        return [answer(f) for f in (found if isinstance(found, list) and len(pairs) > 1 else [found])]

    return Asker(answer_all, lambda q, c: answer(run({"question": q, "context": c})))
