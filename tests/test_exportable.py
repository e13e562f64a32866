"""A model that cannot be exported is refused before it is trained."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
from transformers import (
    AutoTokenizer,
    BertConfig,
    DebertaConfig,
    DebertaForQuestionAnswering,
    LayoutLMv3Config,
    LlamaConfig,
    LlamaForQuestionAnswering,
    LongformerConfig,
    LongformerForQuestionAnswering,
    T5Config,
    XLNetConfig,
)

from qadeploy.data.loading import read
from qadeploy.errors import FailureError, InputError, MissingExtraError
from qadeploy.export.onnx import export_graph
from qadeploy.export.parity import measure_parity, require_parity
from qadeploy.inference.session import OnnxModel
from qadeploy.training.checkpoint import load_checkpoint
from qadeploy.training.exportable import TESTED, Exportable, exportable, exportable_by, exporters
from qadeploy.training.train import train
from tests.architectures_for_tests import RESULTS, recorded
from tests.conftest import tiny_options, triplets, write_jsonl


def test_the_kinds_called_tested_are_those_of_the_recorded_matrix():
    rows = [row for exporter in RESULTS for row in recorded(exporter)["rows"]]
    assert sorted({row["model"]["model_type"] for row in rows if row["fp32"]["status"] == "ok"}) == list(TESTED)


@pytest.mark.parametrize(
    ("config", "possible", "why"),
    [
        (BertConfig(), True, ""),
        (DebertaConfig(), True, ""),
        (LlamaConfig(), False, "optimum exports llama models, but not for question-answering"),
        (T5Config(), False, "optimum exports t5 models, but not for question-answering"),
        (
            LongformerConfig(),
            False,
            "a longformer model exported by optimum needs global_attention_mask, which a bundle does not provide",
        ),
        (
            LayoutLMv3Config(),
            False,
            "a layoutlmv3 model exported by optimum needs bbox, pixel_values, which a bundle does not provide",
        ),
        (XLNetConfig(), None, "optimum has no configuration for xlnet models"),
        (SimpleNamespace(model_type="own-code"), None, "optimum has no configuration for own-code models"),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_what_optimum_says_about_a_kind_of_model(config, possible, why):
    pytest.importorskip("optimum.exporters.onnx", reason="the extra optimum is not installed")
    assert exportable_by("optimum", config) == Exportable(possible, why)


def test_with_pytorchs_exporter_no_kind_is_ruled_out(monkeypatch):
    open_kind = Exportable(None, "PyTorch's exporter is not tested on longformer models")
    assert exportable_by("torch", LongformerConfig()) == open_kind
    monkeypatch.setitem(sys.modules, "optimum.exporters.onnx", None)
    assert exportable(BertConfig()) == Exportable(True)
    assert exportable(LongformerConfig()) == open_kind


def test_all_exporters_that_are_installed_are_asked(monkeypatch):
    pytest.importorskip("optimum.exporters.onnx", reason="the extra optimum is not installed")
    assert exportable(DebertaConfig()) == Exportable(True)
    optimum, torch = (exportable_by(name, LongformerConfig()) for name in ("optimum", "torch"))
    assert exportable(LongformerConfig()) == Exportable(None, f"{optimum.why}, and {torch.why}")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert exportable(LongformerConfig()) == optimum


SIZES = {
    "vocab_size": 300,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 162,
}


@pytest.fixture
def longformer(tiny_checkpoint, tmp_path):
    """A checkpoint that neither exporter supports."""
    base = tmp_path / "base"
    LongformerForQuestionAnswering(LongformerConfig(**SIZES, attention_window=[8])).save_pretrained(base)
    AutoTokenizer.from_pretrained(tiny_checkpoint).save_pretrained(base)
    return base


def test_export_says_why_each_exporter_refused(longformer, tmp_path):
    checkpoint = load_checkpoint(longformer)
    refused = (
        "" if "optimum" not in exporters() else "a longformer model exported by optimum needs global_attention_mask.*; "
    )
    with pytest.raises(
        FailureError, match=f"^{refused}PyTorch cannot export a longformer model: Could not guard"
    ) as caught:
        export_graph(checkpoint, tmp_path / "out")
    assert "\x1b" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_what_optimum_does_not_take_is_exported_by_pytorch(tiny_checkpoint, tmp_path):
    pytest.importorskip("optimum.exporters.onnx", reason="the extra optimum is not installed")
    base = tmp_path / "base"
    sizes = {**SIZES, "num_key_value_heads": 2}
    LlamaForQuestionAnswering(LlamaConfig(**sizes)).save_pretrained(base)
    AutoTokenizer.from_pretrained(tiny_checkpoint).save_pretrained(base)
    checkpoint = load_checkpoint(base)
    with pytest.raises(FailureError, match=r"^optimum exports llama models, but not for question-answering$"):
        export_graph(checkpoint, tmp_path / "none", "optimum")
    assert export_graph(checkpoint, tmp_path) == "torch"
    model = (tmp_path / "model.onnx").read_bytes()
    found = OnnxModel(lambda: model, device="cpu", pad_token_id=checkpoint.encoder.config.pad_token_id)
    examples = read(str(write_jsonl(tmp_path / "t.jsonl", triplets(6)))).examples
    require_parity(measure_parity(checkpoint, found, examples), "exported")


def test_train_refuses_a_model_that_cannot_be_exported_and_names_kinds_that_can(longformer, tmp_path, monkeypatch):
    pytest.importorskip("optimum.exporters.onnx", reason="the extra optimum is not installed")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    base = longformer
    data = write_jsonl(tmp_path / "few.jsonl", triplets(16))
    said: list[str] = []
    message = "base: a longformer model exported by optimum needs global_attention_mask.*give a --base of another kind: albert, bert,"
    with pytest.raises(InputError, match=message):
        train(tiny_options(data, base, tmp_path / "run"), said.append, progress=False)
    assert not any(line.startswith(("3 features", "4 training")) for line in said)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("config", [BertConfig(), LongformerConfig()], ids=lambda config: config.model_type)
def test_no_kind_can_be_exported_without_an_exporter(config, monkeypatch):
    for name in ("optimum.exporters.onnx", "onnxscript"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtraError, match=r"needs the package onnxscript, .*: pip install 'qadeploy\[train\]'$"):
        exportable(config)


def test_train_without_an_exporter_names_it_and_how_to_install_it(tiny_checkpoint, tmp_path, monkeypatch):
    for name in ("optimum.exporters.onnx", "onnxscript"):
        monkeypatch.setitem(sys.modules, name, None)
    data = write_jsonl(tmp_path / "few.jsonl", triplets(16))
    warned: list[str] = []
    train(tiny_options(data, tiny_checkpoint, tmp_path / "run", epochs=1), print, warn=warned.append, progress=False)
    assert warned == [
        "qadeploy export cannot export the trained model before an exporter is installed: PyTorch's exporter needs the package "
        "onnxscript, which is not installed: pip install 'qadeploy[train]'"
    ]


def test_if_optimum_cannot_tell_train_warns_and_goes_on(tiny_checkpoint, tmp_path, monkeypatch):
    base = tmp_path / "base"
    DebertaForQuestionAnswering(DebertaConfig(**SIZES)).save_pretrained(base)
    AutoTokenizer.from_pretrained(tiny_checkpoint).save_pretrained(base)
    monkeypatch.setitem(sys.modules, "optimum.exporters.onnx", None)
    data = write_jsonl(tmp_path / "few.jsonl", triplets(16))
    warned: list[str] = []
    train(tiny_options(data, base, tmp_path / "run", epochs=1), print, warn=warned.append, progress=False)
    assert warned == [
        f"{base}: whether qadeploy export can export it is not known, because PyTorch's exporter is not tested on deberta models: "
        "train one epoch and export that first"
    ]
