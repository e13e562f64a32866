"""Transformers' question-answering pipeline on the PyTorch checkpoint, float32: what most people run."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from qadeploy.bench.peers.setup import Setup, quiet, torch_with, weights_bytes
from qadeploy.bench.variant import Asker, Pairs, Variant
from qadeploy.errors import FailureError
from qadeploy.extras import import_extra
from qadeploy.records import NO_ANSWER, Answer


def prepare(setup: Setup) -> Variant:
    """The pipeline with the bundle's window and answer lengths. Raises FailureError, MissingExtraError."""
    require_pipeline()
    checkpoint = setup.found_checkpoint()
    torch_with(setup.threads)
    return Variant(
        "transformers pipeline, torch fp32",
        "fp32",
        weights_bytes(checkpoint, 4),
        "qadeploy.bench.peers.pipeline:load",
        {"checkpoint": checkpoint, "options": options(setup), **setup.given("device", "threads", "trust_remote_code")},
        "pipeline",
    )


def require_pipeline() -> None:
    """Raises FailureError if the installed transformers has no question-answering pipeline (5.0 and newer)."""
    if import_extra("qadeploy.training.transformers_versions", "the peer pipeline", "train", "transformers").IS_5:
        raise FailureError(
            f"transformers {version('transformers')} has no question-answering pipeline (4.57 was the last with one): to "
            "bench against it, pip install 'transformers<5' in another environment"
        )


def options(setup: Setup) -> dict[str, Any]:
    """The bundle's settings under the pipeline's names."""
    settings = setup.bundle.settings
    return {
        "max_seq_len": settings.max_seq_len,
        "doc_stride": settings.doc_stride,
        "max_answer_len": settings.max_answer_len,
        "handle_impossible_answer": setup.allow_no_answer,
    }


def load(checkpoint: str, device: str, threads: int, options: dict[str, Any], trust_remote_code: bool = False) -> Asker:
    """The pipeline around the PyTorch model."""
    torch = torch_with(threads)
    transformers = import_extra("transformers", "the peer pipeline", "train")
    from qadeploy.training.checkpoint import refuse_pickle

    refuse_pickle(checkpoint)
    model = transformers.AutoModelForQuestionAnswering.from_pretrained(
        checkpoint, dtype=torch.float32, trust_remote_code=trust_remote_code
    ).eval()
    return in_pipeline(model, checkpoint, device, options, trust_remote_code)


def in_pipeline(
    model: Any, checkpoint: str, device: str, options: dict[str, Any], trust_remote_code: bool = False
) -> Asker:
    """The pipeline around any model that it accepts."""
    from transformers import AutoTokenizer
    from transformers import pipeline as make

    with quiet():
        tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=trust_remote_code)
        pipe = make("question-answering", model=model, tokenizer=tokenizer, device=device)

    def run(inputs: Any) -> Any:
        with quiet():
            return pipe(inputs, **options)

    def answer(found: Any) -> Answer:
        if isinstance(found, list):  # the pipeline's result if it finds no span
            return answer(found[0]) if found else NO_ANSWER
        return Answer(found["answer"], found["start"], found["end"], float(found["score"]))

    def answer_all(pairs: Pairs) -> list[Answer]:
        found = run([{"question": q, "context": c} for q, c in pairs])
        return [answer(f) for f in (found if isinstance(found, list) and len(pairs) > 1 else [found])]

    return Asker(answer_all, lambda q, c: answer(run({"question": q, "context": c})))
