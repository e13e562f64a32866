"""Families of encoders: what the encoder learns about each, and that each exports with parity."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import (
    AlbertConfig,
    AlbertForQuestionAnswering,
    BertConfig,
    BertForQuestionAnswering,
    DistilBertConfig,
    DistilBertForQuestionAnswering,
    PretrainedConfig,
    PreTrainedModel,
    RobertaConfig,
    RobertaForQuestionAnswering,
    XLNetConfig,
    XLNetForQuestionAnsweringSimple,
)

from qadeploy.build.checkpoint import TorchModel, encoder_config, load_checkpoint
from qadeploy.build.export import _export_graph
from qadeploy.build.parity import measure_parity, require_parity
from qadeploy.data.readers import read
from qadeploy.errors import FailureError
from qadeploy.runtime.session import OnnxModel
from tests.conftest import triplets, write_jsonl
from tests.tokenizers_for_tests import family

SMALL = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 64}


def bert(vocabulary: int, types: int = 2) -> PreTrainedModel:
    config = BertConfig(vocab_size=vocabulary, max_position_embeddings=160, type_vocab_size=types, **SMALL)
    return BertForQuestionAnswering(config)


def roberta(vocabulary: int, pad: int = 1) -> PreTrainedModel:
    config = RobertaConfig(
        vocab_size=vocabulary, max_position_embeddings=160, type_vocab_size=1, pad_token_id=pad, **SMALL
    )
    return RobertaForQuestionAnswering(config)


def distilbert(vocabulary: int) -> PreTrainedModel:
    config = DistilBertConfig(
        vocab_size=vocabulary, max_position_embeddings=160, n_layers=2, n_heads=2, dim=32, hidden_dim=64
    )
    return DistilBertForQuestionAnswering(config)


def albert(vocabulary: int) -> PreTrainedModel:
    config = AlbertConfig(vocab_size=vocabulary, max_position_embeddings=160, embedding_size=16, **SMALL)
    return AlbertForQuestionAnswering(config)


def one_type_bert(vocabulary: int) -> PreTrainedModel:
    return bert(vocabulary, types=1)


def roberta_padding_with_0(vocabulary: int) -> PreTrainedModel:
    return roberta(vocabulary, pad=0)


@pytest.mark.parametrize(
    ("tokenizer", "build", "segments", "limit"),
    [
        ("bert", bert, 2, 160),
        ("bert", one_type_bert, 1, 160),
        ("bert", distilbert, 0, 160),
        ("albert", albert, 2, 160),
        ("roberta", roberta, 0, 158),
        ("roberta", roberta_padding_with_0, 0, 159),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_an_architecture_exports_with_parity_up_to_its_longest_window(
    tmp_path: Path, tokenizer: str, build: Callable[[int], PreTrainedModel], segments: int, limit: int
) -> None:
    torch.manual_seed(3)
    kind = family(tokenizer)
    build(kind.tokenizer.get_vocab_size()).save_pretrained(tmp_path / "checkpoint")
    kind.reference.save_pretrained(tmp_path / "checkpoint")
    checkpoint = load_checkpoint(tmp_path / "checkpoint")
    assert (checkpoint.encoder.config.segments, checkpoint.encoder.config.position_limit) == (segments, limit)

    encoder = checkpoint.encoder
    question, context = encoder.encode("Who?"), encoder.encode("Ada keeps the lamp. " * 60)
    longest = encoder.windows(question, context, max_seq_len=limit, doc_stride=20)
    assert len(longest[0]) == limit
    assert (longest[0].token_type_ids is not None) == bool(segments)
    TorchModel(checkpoint.model, encoder.config.pad_token_id).run(longest)  # an index out of range would raise

    if build is one_type_bert:  # optimum traces BERT with token types 0 and 1 whatever the model has
        with pytest.raises(FailureError, match="optimum cannot export a bert model"):
            _export_graph(checkpoint, tmp_path)
        return
    _export_graph(checkpoint, tmp_path)
    model = (tmp_path / "model.onnx").read_bytes()
    onnx = OnnxModel(lambda: model, device="cpu", pad_token_id=encoder.config.pad_token_id)
    assert ("token_type_ids" in onnx.inputs) == bool(segments)
    examples = read(str(write_jsonl(tmp_path / "t.jsonl", triplets(24)))).examples
    require_parity(measure_parity(checkpoint, onnx, examples), "exported")


def test_xlnet_takes_the_context_first_and_gives_cls_a_type_of_its_own() -> None:
    kind = family("xlnet")
    size = kind.tokenizer.get_vocab_size()
    config: PretrainedConfig = XLNetConfig(vocab_size=size, d_model=32, n_layer=1, n_head=2, d_inner=64)
    found = encoder_config(XLNetForQuestionAnsweringSimple(config), kind.reference)
    assert (found.segments, found.context_first, found.null_token_id) == (3, True, kind.config.null_token_id)
