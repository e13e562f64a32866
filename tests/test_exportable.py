"""A model that export cannot take is refused before it is trained."""

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
    LongformerConfig,
    LongformerForQuestionAnswering,
    T5Config,
    XLNetConfig,
)

from qadeploy.errors import FailureError, InputError
from qadeploy.export.onnx import export_graph
from qadeploy.training.exportable import TESTED, Exportable, exportable
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
            "an exported longformer model takes global_attention_mask, which a bundle does not provide",
        ),
        (
            LayoutLMv3Config(),
            False,
            "an exported layoutlmv3 model takes bbox, pixel_values, which a bundle does not provide",
        ),
        (XLNetConfig(), None, "optimum has no configuration for xlnet models"),
        (SimpleNamespace(model_type="own-code"), None, "optimum has no configuration for own-code models"),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_what_optimum_says_about_a_kind_of_model(config, possible, why):
    pytest.importorskip("optimum.exporters.onnx", reason="the extra optimum is not installed")
    assert exportable(config) == Exportable(possible, why)


def test_without_optimum_only_tested_kinds_are_known(monkeypatch):
    monkeypatch.setitem(sys.modules, "optimum.exporters.onnx", None)
    assert exportable(BertConfig()) == Exportable(True)
    assert exportable(LongformerConfig()) == Exportable(None, "PyTorch's exporter is not tested on longformer models")
    assert exportable(LongformerConfig(), "torch") == exportable(LongformerConfig())


def test_export_gives_the_same_reason(tmp_path):
    pytest.importorskip("optimum.exporters.onnx", reason="the extra optimum is not installed")
    checkpoint = SimpleNamespace(model=SimpleNamespace(config=LongformerConfig()))
    with pytest.raises(FailureError, match=r"^an exported longformer model takes global_attention_mask"):
        export_graph(checkpoint, tmp_path)


SIZES = {
    "vocab_size": 300,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 162,
}


def test_train_refuses_a_model_that_cannot_be_exported_and_names_kinds_that_can(tiny_checkpoint, tmp_path):
    pytest.importorskip("optimum.exporters.onnx", reason="the extra optimum is not installed")
    base = tmp_path / "base"
    LongformerForQuestionAnswering(LongformerConfig(**SIZES, attention_window=[8])).save_pretrained(base)
    AutoTokenizer.from_pretrained(tiny_checkpoint).save_pretrained(base)
    data = write_jsonl(tmp_path / "few.jsonl", triplets(16))
    said: list[str] = []
    message = (
        "base: an exported longformer model takes global_attention_mask.*give a --base of another kind: albert, bert,"
    )
    with pytest.raises(InputError, match=message):
        train(tiny_options(data, base, tmp_path / "run"), said.append, progress=False)
    assert not any(line.startswith(("3 features", "4 training")) for line in said)
    assert not (tmp_path / "run").exists()


def test_if_optimum_cannot_tell_train_warns_and_goes_on(tiny_checkpoint, tmp_path, monkeypatch):
    base = tmp_path / "base"
    DebertaForQuestionAnswering(DebertaConfig(**SIZES)).save_pretrained(base)
    AutoTokenizer.from_pretrained(tiny_checkpoint).save_pretrained(base)
    monkeypatch.setitem(sys.modules, "optimum.exporters.onnx", None)
    data = write_jsonl(tmp_path / "few.jsonl", triplets(16))
    warned: list[str] = []
    train(tiny_options(data, base, tmp_path / "run", epochs=1), print, warn=warned.append, progress=False)
    assert warned == [
        f"{base}: whether qadeploy export can take it is not known, because PyTorch's exporter is not tested on deberta models: "
        "train one epoch and export that first"
    ]
