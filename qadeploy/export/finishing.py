"""Finishing a bundle: parity, measurements, tokenizer, card, manifest, seal."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qadeploy.evaluation.scoring import Evaluation
from qadeploy.export.parity import TOLERANCES, measure_parity, require_parity
from qadeploy.export.reference import Reference, counted, make_answerer, measure
from qadeploy.inference.bundle import CARD, MODEL, TOKENIZER, seal
from qadeploy.inference.bundle_card import bundle_card
from qadeploy.inference.probe import make_probe
from qadeploy.inference.session import onnxruntime
from qadeploy.inference.tuning import Tuning, model_of, tune
from qadeploy.machine import machine, return_freed_memory
from qadeploy.records import LOGIT_NAMES
from qadeploy.training.provenance import versions_of, weights_hash

_VERSIONED = (
    "qadeploy", "torch", "transformers", "optimum", "optimum-onnx", "onnxscript", "onnx", "onnxruntime", "tokenizers",
)  # fmt: skip


def tune_model(
    reference: Reference,
    model: bytes | Path,
    stored: Mapping[str, Any] | None = None,
    *,
    target: str = "latency",
    tolerance: float | None = None,
) -> Tuning:
    """The best session settings for a model on this machine, measured on the choosing questions; see ``tune``.

    For the target size they are those for latency.
    """
    return tune(
        lambda session: make_answerer(reference, model, session),
        [(e.question, e.context) for e in reference.choosing],
        stored,
        target="throughput" if target == "throughput" else "latency",
        tolerance=tolerance,
        seconds=reference.measuring,
        say=lambda what: reference.count(0, 1, f" {what}"),
    )


def finish_bundle(
    reference: Reference,
    work: Path,
    name: str,
    *,
    precision: str,
    made: dict[str, Any],
    tuning: Tuning | None = None,
    device: str = "cpu",
    evaluation: Evaluation | None = None,
) -> None:
    """Measures the model in ``work`` on ``device`` and adds tokenizer, card and manifest.

    ``tuning`` holds its session settings, which are measured here if it is None. ``evaluation`` holds its answers to the
    held-out questions, if they are known. Raises GateError if its logits are further from PyTorch's than its precision allows.
    """
    return_freed_memory()  # from the copies of the graph
    tolerance = TOLERANCES[precision]
    checkpoint = reference.checkpoint
    model = work / MODEL
    if tuning is None:
        tuning = tune_model(reference, model, tolerance=tolerance)
    session = tuning.session
    answerer = make_answerer(reference, model, session, device=device)
    onnx = model_of(answerer)
    reference.count(0, 1, " comparing logits with PyTorch's")
    parity = measure_parity(checkpoint, onnx, reference.examples, tolerance)
    if tolerance is not None:
        require_parity(parity, name, tolerance)
    (work / TOKENIZER).write_text(checkpoint.tokenizer.backend_tokenizer.to_str(pretty=False), encoding="utf-8")
    evaluation = evaluation or counted(answerer, reference.examples, "the bundle answers", reference.count)
    config = checkpoint.model.config
    manifest: dict[str, Any] = {
        "name": name,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "precision": precision,
        "made": made,
        "architecture": {
            "model_type": config.model_type,
            "layers": getattr(config, "num_hidden_layers", None),
            "heads": getattr(config, "num_attention_heads", None),
            "hidden": getattr(config, "hidden_size", None),
            "parameters": sum(p.numel() for p in checkpoint.model.parameters()),
        },
        "encoder": checkpoint.encoder.config.to_dict(),
        "settings": checkpoint.settings.to_dict(),
        "session": session,
        "probe": make_probe(answerer.encoder, onnx),
        "machine": machine().to_dict(threads=tuning.threads, onnxruntime=onnxruntime().__version__),
        "tuning": tuning.to_dict(),
        "inputs": list(onnx.inputs),
        "outputs": list(LOGIT_NAMES),
        "parity": parity.to_dict(),
        "measured": {**measure(reference, answerer, evaluation), "device": onnx.device},
        "drift": {figure: found.to_dict() for figure, found in evaluation.drift.items()},
        "source": {
            "checkpoint": str(reference.run.checkpoint),
            "checkpoint_sha256": weights_hash(reference.run.checkpoint),
            "run": reference.run.record
            and {k: reference.run.record[k] for k in ("options", "seed", "data_sha256", "base")},
        },
        "versions": versions_of(_VERSIONED, missing="none"),
    }
    (work / CARD).write_text(bundle_card(name, manifest), encoding="utf-8")
    seal(work, manifest)
