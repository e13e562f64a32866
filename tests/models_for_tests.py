"""Tiny question-answering models with random weights, one per architecture, each with the right kind of tokenizer.

They keep the peculiarities of the published checkpoints: whether token types are used, where positions start, which
attention is relative, local, bottlenecked or shared between layers, a vocabulary larger than the tokenizer's,
a padding token whose embedding is not zero. The weights are so large that attention is sharp: with
transformers' own 0.02 it is nearly even, and a lost mask would hide within the tolerance of parity.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
import torch
import transformers
from onnx import TensorProto, helper

from qadeploy.core.settings import QaSettings
from qadeploy.core.windows import Encoder
from qadeploy.export.onnx import export_graph
from qadeploy.inference.bundle import MODEL
from qadeploy.training.checkpoint import load_checkpoint
from tests.tokenizers_for_tests import family

VOCABULARY = 1024  # rows, so that the embedding counts as a large table when it is quantized
LONGEST = 160  # positions


@dataclass(frozen=True)
class Architecture:
    """One kind of model: transformers' ``{prefix}Config`` and ``{prefix}ForQuestionAnswering``, scaled down.

    ``like`` is a published checkpoint of the kind; ``tokenizer`` a family of ``tokenizers_for_tests``, wrapped in
    transformers' class ``wrapper`` or ``{prefix}TokenizerFast``; ``values`` is the configuration. ``segments`` and
    ``limit`` are what the encoder must find: the number of token types that the model accepts (0 if none) and
    its longest input in tokens.
    """

    name: str
    like: str
    prefix: str
    tokenizer: str
    values: dict[str, Any]
    segments: int
    limit: int = LONGEST
    wrapper: str = ""
    learning_rate: float = 1e-2  # at which it learns something from 21 questions

    def model(self, seed: int = 3) -> Any:
        """The model; the same random weights for the same seed."""
        pad = family(self.tokenizer).config.pad_token_id
        values = {"vocab_size": VOCABULARY, "pad_token_id": pad, **self.values}
        config = getattr(transformers, f"{self.prefix}Config")(**values)
        torch.manual_seed(seed)
        model = getattr(transformers, f"{self.prefix}ForQuestionAnswering")(config)
        with torch.no_grad():
            model.get_input_embeddings().weight[pad].normal_(std=config.initializer_range)
        return model

    def save(self, folder: Path) -> Path:
        """Writes model and tokenizer as ``save_pretrained`` does; returns the folder."""
        self.model().save_pretrained(folder)
        wrapper = getattr(transformers, self.wrapper or f"{self.prefix}TokenizerFast")
        kind = family(self.tokenizer)
        special = {"pad_token": kind.reference.pad_token, "cls_token": kind.reference.cls_token}
        wrapper(tokenizer_object=kind.reference.backend_tokenizer, model_max_length=LONGEST, **special).save_pretrained(
            folder
        )
        return folder


_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": LONGEST,
    "initializer_range": 0.3,
}
_DISTILBERT: dict[str, Any] = {
    "dim": 32,
    "n_layers": 2,
    "n_heads": 2,
    "hidden_dim": 64,
    "max_position_embeddings": LONGEST,
    "initializer_range": 0.3,
}
_ONE_TYPE = {**_SIZES, "type_vocab_size": 1}  # which RoBERTa and its relatives have, but nobody passes
_SMALL_EMBEDDING = {**_SIZES, "embedding_size": 16}
# The first differs in form, the others share its weights.
_ALBERT = {**_SMALL_EMBEDDING, "num_hidden_layers": 4, "initializer_range": 0.2}
_DEBERTA_V3 = {
    **_SIZES,
    "type_vocab_size": 0,
    "relative_attention": True,
    "position_buckets": 16,  # far fewer than positions, so that near and far are told apart differently
    "pos_att_type": ["p2c", "c2p"],
    "position_biased_input": False,
    "share_att_key": True,
    "norm_rel_ebd": "layer_norm",
}
_DEBERTA_V2 = {**_DEBERTA_V3, "conv_kernel_size": 3, "conv_act": "gelu"}
_MOBILEBERT = {
    **_SMALL_EMBEDDING,
    "intra_bottleneck_size": 16,
    "num_feedforward_networks": 2,
    "initializer_range": 0.15,  # nothing in it normalises, so larger weights would grow without bound
}
# The second layer sees 8 tokens to either side.
_MODERNBERT = {**_SIZES, "global_attn_every_n_layers": 2, "local_attention": 16}

ARCHITECTURES = (
    Architecture("BERT", "google-bert/bert-base-uncased", "Bert", "bert", _SIZES, 2),
    Architecture("DistilBERT", "distilbert/distilbert-base-uncased", "DistilBert", "bert", _DISTILBERT, 0),
    Architecture("RoBERTa", "FacebookAI/roberta-base", "Roberta", "roberta", _ONE_TYPE, 0, LONGEST - 2),
    Architecture("XLM-R", "FacebookAI/xlm-roberta-base", "XLMRoberta", "xlm-r", _ONE_TYPE, 0, LONGEST - 2),
    Architecture("CamemBERT", "almanach/camembert-base", "Camembert", "camembert", _ONE_TYPE, 0, LONGEST - 2),
    Architecture("ALBERT", "albert/albert-base-v2", "Albert", "albert", _ALBERT, 2),
    Architecture("ELECTRA", "google/electra-small-discriminator", "Electra", "bert", _SMALL_EMBEDDING, 2),
    Architecture("MPNet", "microsoft/mpnet-base", "MPNet", "mpnet", _SIZES, 0, LONGEST - 2),
    Architecture("DeBERTa-v2", "microsoft/deberta-v2-xlarge", "DebertaV2", "deberta-v2", _DEBERTA_V2, 0),
    Architecture("DeBERTa-v3", "microsoft/deberta-v3-base", "DebertaV2", "deberta-v2", _DEBERTA_V3, 0),
    Architecture("MobileBERT", "google/mobilebert-uncased", "MobileBert", "bert", _MOBILEBERT, 2, learning_rate=2e-3),
    Architecture(
        "ModernBERT",
        "answerdotai/ModernBERT-base",
        "ModernBert",
        "modernbert",
        _MODERNBERT,
        0,
        wrapper="PreTrainedTokenizerFast",
    ),
)
BY_NAME = {architecture.name: architecture for architecture in ARCHITECTURES}


@dataclass(frozen=True)
class ExportedModel:
    """An ONNX model without a bundle, and its encoder."""

    model: bytes
    encoder: Encoder
    settings: QaSettings


def exported_model(architecture: Architecture) -> ExportedModel:
    """A tiny model, exported by optimum like any other."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = load_checkpoint(architecture.save(Path(folder) / "checkpoint"))
        export_graph(checkpoint, Path(folder) / "graph")
        model = (Path(folder) / "graph" / MODEL).read_bytes()
    return ExportedModel(model, checkpoint.encoder, checkpoint.settings.changed(max_seq_len=architecture.limit))


def bare_model(
    *,
    mask: bool = False,
    opset: int = 18,
    kind: int = TensorProto.FLOAT,
    outputs: tuple[str, str] = ("start_logits", "end_logits"),
) -> bytes:
    """A model whose logits are an input ``[batch, tokens, 2]``, to try a head on."""
    info, shape = helper.make_tensor_value_info, ["batch", "tokens"]
    names = ["input_ids", "attention_mask"] if mask else ["input_ids"]
    inputs = [info(name, TensorProto.INT64, shape) for name in names] + [info("logits", kind, [*shape, 2])]
    nodes = [
        helper.make_node(
            "Split", ["logits"], ["first", "second"], axis=2, **({"num_outputs": 2} if opset > 17 else {})
        ),
        helper.make_node("Squeeze", ["first", "last"], [outputs[0]]),
        helper.make_node("Squeeze", ["second", "last"], [outputs[1]]),
    ]
    last = helper.make_tensor("last", TensorProto.INT64, [1], [2])
    graph = helper.make_graph(nodes, "bare", inputs, [info(name, kind, shape) for name in outputs], [last])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    return bytes(made.SerializeToString())


def optimized(model: bytes) -> onnx.GraphProto:
    """The graph that ONNX Runtime runs on a CPU, after its own fusions."""
    with tempfile.TemporaryDirectory() as folder:
        options = ort.SessionOptions()
        options.optimized_model_filepath, options.log_severity_level = f"{folder}/model.onnx", 3
        ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        return onnx.load(options.optimized_model_filepath).graph
