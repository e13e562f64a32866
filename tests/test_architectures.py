"""Families of encoders: each goes from training to int8 answers with its logits kept, as docs/architectures.md says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import XLNetConfig, XLNetForQuestionAnsweringSimple

from qadeploy.core.windows import pad_batch
from qadeploy.data.loading import read
from qadeploy.export.onnx import export_graph
from qadeploy.export.parity import measure_parity, require_parity
from qadeploy.inference.session import OnnxModel
from qadeploy.inference.tuning import FP32_TOLERANCE
from qadeploy.records import Window
from qadeploy.training.checkpoint import Checkpoint, TorchModel, encoder_config, load_checkpoint
from qadeploy.training.exportable import exporters
from tests.architectures_for_tests import DOCS, matrix, recorded, run_architecture, written
from tests.conftest import triplets, write_jsonl
from tests.models_for_tests import ARCHITECTURES, BY_NAME, LONGEST, Architecture
from tests.tokenizers_for_tests import family


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    return recorded(exporters()[0])


def windows_of(checkpoint: Checkpoint, *repeats: int) -> list[Window]:
    """One window per number: the question with that many sentences, cut at the model's limit."""
    encoder = checkpoint.encoder
    question, limit = encoder.encode("Who keeps the lamp?"), encoder.config.position_limit
    contexts = [encoder.encode("Ada keeps the lamp, and Bela the boat. " * n) for n in repeats]
    return [encoder.windows(question, c, max_seq_len=limit, doc_stride=20)[0] for c in contexts]


def settled(row: dict[str, Any]) -> dict[str, Any]:
    """The parts of a row that do not depend on the machine, on rounding or on the int8 recipe that was chosen."""
    kept = {
        "fp32": ("inputs", "questions"),
        "fused": ("attention", "layers", "nodes"),
        "int8": ("products", "single_node_attention"),
    }
    facts: dict[str, Any] = {key: row[key] for key in ("name", "like", "model")}
    for step, names in {"train": (), **kept}.items():
        facts[step] = {name: row[step].get(name) for name in ("status", "why", *names)}
    return facts


# ---------------------------------------------------------------- the matrix


# Token types and absolute positions; positions from 2 on; relative attention; local attention with rotary positions.
QUICK = ("BERT", "DeBERTa-v3", "ModernBERT")
EACH = [pytest.param(a, id=a.name, marks=[] if a.name in QUICK else [pytest.mark.slow]) for a in ARCHITECTURES]


@pytest.mark.parametrize("architecture", EACH)
def test_an_architecture_is_trained_exported_fused_quantized_and_asked_as_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, results: dict[str, Any], architecture: Architecture, brief: None
) -> None:
    monkeypatch.setattr("qadeploy.inference.session.usable_cpus", lambda: 1)  # threads only make tiny models wait
    row = run_architecture(architecture, tmp_path)
    assert settled(row) in [settled(each) for each in results["rows"]]

    assert (row["model"]["token_types"], row["model"]["longest_input"]) == (architecture.segments, architecture.limit)
    first, *_, last = row["train"]["loss"]
    assert last < first - 0.1
    fp32 = row["fp32"]
    assert ("token_type_ids" in fp32["inputs"]) == bool(architecture.segments)
    assert fp32["parity"]["max_abs_diff"] <= FP32_TOLERANCE < fp32["logits_deviation"] / 100
    assert fp32["parity"]["shortest"] < 80 < fp32["parity"]["longest"] == architecture.limit
    assert fp32["answered_as_pytorch"] == fp32["questions"] == 4
    if row["fused"]["status"] == "ok":
        assert row["fused"]["max_abs_diff"] <= FP32_TOLERANCE
    int8 = row["int8"]
    assert int8["products"] / 2 <= int8["int8_products"] <= int8["products"]  # as many as the recipe uses
    assert int8["int8_embeddings"] >= 1
    assert int8["correlation"] > 0.95
    assert int8["answered"] == int8["questions"] == 4


def test_the_documented_table_is_the_recorded_one(results: dict[str, Any]) -> None:
    docs = DOCS.read_text(encoding="utf-8")
    assert written(docs) == docs
    assert [row["name"] for row in results["rows"]] == [architecture.name for architecture in ARCHITECTURES]


def test_the_table_says_why_a_step_was_refused(results: dict[str, Any]) -> None:
    good, bad = results["rows"][0], {"name": "Odd", "like": "an/odd", "model": results["rows"][0]["model"]}
    refused = {"status": "refused", "why": "optimum cannot export an odd model"}
    rest = {step: {"status": "not tried", "why": "fp32 was refused"} for step in ("fused", "int8")}
    lines = matrix([good, {**bad, "train": {"status": "ok"}, "fp32": refused, **rest}])
    assert "| Odd | no (1) | - | - | - | - | - |" in lines
    assert "1. optimum cannot export an odd model" in lines


# ---------------------------------------------------------------- what checkpoints of a kind may differ in


@pytest.mark.parametrize(
    ("name", "values", "attention", "segments", "limit"),
    [
        ("BERT", {"type_vocab_size": 1}, "sdpa", 1, LONGEST),
        ("BERT", {}, "eager", 2, LONGEST),
        ("RoBERTa", {"pad_token_id": 0}, "sdpa", 0, LONGEST - 1),
        ("DeBERTa-v3", {"position_biased_input": True, "type_vocab_size": 2}, "eager", 2, LONGEST),
        ("ModernBERT", {}, "eager", 0, LONGEST),
    ],
)
def test_a_variant_exports_with_parity_up_to_its_longest_window(
    tmp_path: Path, name: str, values: dict[str, Any], attention: str, segments: int, limit: int
) -> None:
    kind = BY_NAME[name]
    folder = replace(kind, values={**kind.values, **values}).save(tmp_path / "checkpoint")
    checkpoint = load_checkpoint(folder, _attn_implementation=attention)
    assert checkpoint.model.config._attn_implementation == attention
    found = checkpoint.encoder.config
    assert (found.segments, found.position_limit) == (segments, limit)
    export_graph(checkpoint, tmp_path)
    model = (tmp_path / "model.onnx").read_bytes()
    onnx = OnnxModel(lambda: model, device="cpu", pad_token_id=found.pad_token_id)
    assert ("token_type_ids" in onnx.inputs) == bool(segments)
    examples = read(str(write_jsonl(tmp_path / "t.jsonl", triplets(6)))).examples
    require_parity(measure_parity(checkpoint, onnx, examples), "exported")
    (longest,) = windows_of(checkpoint, 60)
    assert len(longest) == limit
    theirs, ours = (m.run([longest])[0] for m in (TorchModel(checkpoint.model, found.pad_token_id), onnx))
    np.testing.assert_allclose(ours, theirs, atol=FP32_TOLERANCE)


def test_padding_does_not_reach_mobileberts_last_token(tmp_path: Path) -> None:
    folder = BY_NAME["MobileBERT"].save(tmp_path / "checkpoint")
    checkpoint = load_checkpoint(folder)
    short, long = windows_of(checkpoint, 1, 3)
    pad = checkpoint.encoder.config.pad_token_id

    def moved(model: Any) -> float:
        """How far padding moves the logits of the short window."""
        model = TorchModel(model, pad)
        alone, padded = model.run_batch([short])[0], model.run_batch([short, long])[0]
        return float(np.abs(np.subtract(alone, padded)).max())

    assert moved(checkpoint.model) < FP32_TOLERANCE
    published = type(checkpoint.model).from_pretrained(folder).eval()
    assert moved(published) > 0.01
    batch = {name: torch.from_numpy(values) for name, values in pad_batch([short], pad).items()}
    with torch.inference_mode():  # the unpadded window has the published model's logits
        torch.testing.assert_close(checkpoint.model(**batch).start_logits, published(**batch).start_logits)


def test_xlnet_takes_the_context_first_and_gives_cls_a_type_of_its_own() -> None:
    kind = family("xlnet")
    size = kind.tokenizer.get_vocab_size()
    config = XLNetConfig(vocab_size=size, d_model=32, n_layer=1, n_head=2, d_inner=64)
    found = encoder_config(XLNetForQuestionAnsweringSimple(config), kind.reference)
    assert (found.segments, found.context_first, found.null_token_id) == (3, True, kind.config.null_token_id)
