"""Relative, rotary and local attention as single nodes: as many as there are layers, with PyTorch's logits."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from qadeploy.export import attention
from qadeploy.export.attention import fuse_attention
from qadeploy.export.fusion import fuse
from qadeploy.export.graph import Graph
from qadeploy.export.onnx import export_graph
from qadeploy.inference.session import OnnxModel
from qadeploy.records import FloatArray, Window
from qadeploy.training.checkpoint import Checkpoint, TorchModel, load_checkpoint
from tests.models_for_tests import BY_NAME, LONGEST

HEADS, RADIUS = 2, 8


class Exported(NamedTuple):
    """A tiny model, its plain graph, and windows from shorter than the local window to the longest."""

    checkpoint: Checkpoint
    model: bytes
    windows: list[Window]

    @property
    def exact(self) -> FloatArray:
        """PyTorch's logits, each window alone, computed in float64: in float32 they depend on the number of threads."""
        torch = TorchModel(self.checkpoint.model.double(), self.checkpoint.encoder.config.pad_token_id)
        try:
            return joined([torch.run_batch([window])[0] for window in self.windows])
        finally:
            self.checkpoint.model.float()

    def onnx(self, model: bytes) -> OnnxModel:
        return OnnxModel(
            lambda: model, device="cpu", threads=1, pad_token_id=self.checkpoint.encoder.config.pad_token_id
        )


def joined(logits) -> FloatArray:
    return np.concatenate([values for pair in logits for values in pair])


@pytest.fixture(scope="module", params=["MPNet", "ModernBERT"])
def exported(request, tmp_path_factory) -> Exported:
    return export(request.param, tmp_path_factory.mktemp("model"))


def export(name: str, folder: Path) -> Exported:
    checkpoint = load_checkpoint(BY_NAME[name].save(folder / "checkpoint"))
    export_graph(checkpoint, folder)
    encoder = checkpoint.encoder
    question = encoder.encode("Who?")
    windows: list[Window] = []
    for count in (0, 1, 2, 60):
        context = encoder.encode("Ada keeps the lamp, and Bela the boat. " * count or "Ada.")
        limit = encoder.config.position_limit
        windows += encoder.windows(question, context, max_seq_len=limit, doc_stride=20)
    return Exported(checkpoint, (folder / "model.onnx").read_bytes(), windows)


def kinds(model: bytes) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load_model_from_string(model).graph.node)


def rotations(exported: Exported) -> int:
    return 4 if exported.checkpoint.model.config.model_type == "modernbert" else 0


def test_windows_are_shorter_and_longer_than_what_a_local_layer_sees(exported):
    lengths = [len(window) for window in exported.windows]
    assert min(lengths) < 3 * RADIUS < LONGEST - 2 <= max(lengths)
    assert len({length % RADIUS for length in lengths}) > 1  # so that the last block is full and not full
    assert len(exported.windows) > 4  # the last context has several windows


def test_each_attention_is_one_node_and_padding_moves_nothing(exported):
    found = fuse_attention(exported.model, HEADS, keep_mask=True, plain=False)
    assert (found.fused, found.attentions) == (2, 2)
    count = kinds(found.model)
    assert (count["MultiHeadAttention"], count["RotaryEmbedding"], count["Softmax"]) == (2, rotations(exported), 0)
    model = exported.onnx(found.model)
    assert "attention_mask" in model.inputs
    for logits in (model.run(exported.windows), model.run_batch(exported.windows)):
        np.testing.assert_allclose(joined(logits), exported.exact, atol=2e-5)
    assert exported.exact.std() > 0.3


def test_without_a_mask_windows_alone_have_the_same_logits(exported):
    found = fuse_attention(exported.model, HEADS)
    assert found.fused == 2
    model = exported.onnx(found.model)
    assert "attention_mask" not in model.inputs
    for logits in (model.run(exported.windows), model.run_batch(exported.windows)):
        np.testing.assert_allclose(joined(logits), exported.exact, atol=2e-5)


def test_the_fused_graph_has_single_nodes_beside_onnx_runtimes_fusions(exported):
    hidden = exported.checkpoint.model.config.hidden_size
    fused = fuse(exported.model, {"heads": HEADS, "hidden": hidden}).model.SerializeToString()
    count = kinds(fused)
    assert (count["MultiHeadAttention"], count["RotaryEmbedding"]) == (2, rotations(exported))
    assert count["SkipLayerNormalization"] >= 4
    logits = exported.onnx(fused).run_batch(exported.windows)
    np.testing.assert_allclose(joined(logits), exported.exact, atol=2e-5)


# ---------------------------------------------------------------- what else a graph may hold


@pytest.fixture(scope="module")
def modernbert(tmp_path_factory) -> Exported:
    return export("ModernBERT", tmp_path_factory.mktemp("modernbert"))


@pytest.fixture(scope="module")
def mpnet(tmp_path_factory) -> Exported:
    return export("MPNet", tmp_path_factory.mktemp("mpnet"))


def test_a_local_layers_window_is_read_off_its_mask(modernbert):
    graph = Graph(onnx.load_model_from_string(modernbert.model))
    softmaxes = [node for node in graph.graph.node if node.op_type == "Softmax"]
    found = [attention._attention(graph, node) for node in softmaxes]
    assert [each.radius for each in found] == [None, RADIUS]


@pytest.mark.parametrize("other", [RADIUS - 5, RADIUS + 5])
def test_of_two_local_windows_the_narrower_counts(other, modernbert):
    proto = onnx.load_model_from_string(modernbert.model)
    graph = Graph(proto)
    local = [node for node in proto.graph.node if node.op_type == "Softmax"][1]
    (mask,) = attention._scores(graph, local.input[0])[2]
    second = [copy.deepcopy(node) for node in proto.graph.node if node in graph.ancestors(mask)]
    renamed = {name: f"{name}/second" for node in second for name in node.output}
    for node in second:
        node.name += "/second"
        radius = next((n for n in node.input if np.array_equal(graph.constant(n), RADIUS)), None)
        inputs = ["other" if name == radius else renamed.get(name, name) for name in node.input]
        node.input[:], node.output[:] = inputs, [renamed[name] for name in node.output]
    assert any("other" in node.input for node in second)
    proto.graph.initializer.append(numpy_helper.from_array(np.array(other), "other"))
    place = list(proto.graph.node).index(local)
    both = helper.make_node("Add", [local.input[0], renamed[mask]], ["both"], "both")
    local.input[0] = "both"
    for node in reversed([*second, both]):
        proto.graph.node.insert(place, node)
    found = fuse_attention(proto.SerializeToString(), HEADS)
    assert found.fused == 2
    exact = joined(modernbert.onnx(proto.SerializeToString()).run(modernbert.windows))
    np.testing.assert_allclose(joined(modernbert.onnx(found.model).run(modernbert.windows)), exact, atol=2e-5)
    assert (np.abs(exact - modernbert.exact).max() > 0.01) == (other < RADIUS)


def test_a_window_that_may_be_wider_than_the_probe_stays_a_bias_of_the_whole(modernbert, monkeypatch):
    monkeypatch.setattr(attention, "_PROBED", RADIUS)
    found = fuse_attention(modernbert.model, HEADS)
    assert found.fused == 2
    assert not kinds(found.model)["Pad"]
    model = modernbert.onnx(found.model)
    assert "attention_mask" in model.inputs
    np.testing.assert_allclose(joined(model.run_batch(modernbert.windows)), modernbert.exact, atol=2e-5)


def test_another_scale_of_the_scores_is_kept(mpnet):
    """8 instead of sqrt(16); PyTorch says the same once the queries are halved."""
    proto = onnx.load_model_from_string(mpnet.model)
    graph = Graph(proto)
    for softmax in [n for n in proto.graph.node if n.op_type == "Softmax"]:
        scores = graph.makers[softmax.input[0]]
        while scores.op_type == "Add":  # of the mask and the bias
            scores = graph.makers[scores.input[0]]
        assert scores.op_type == "Div"
        scores.input[1] = "other"
    proto.graph.initializer.append(numpy_helper.from_array(np.float32(8), "other"))
    found = fuse_attention(proto.SerializeToString(), HEADS)
    assert found.fused == 2
    scaled = copy.deepcopy(mpnet.checkpoint)
    for layer in scaled.model.mpnet.encoder.layer:
        for values in layer.attention.attn.q.parameters():
            values.data.div_(2)
    exact = mpnet._replace(checkpoint=scaled).exact
    np.testing.assert_allclose(joined(mpnet.onnx(found.model).run(mpnet.windows)), exact, atol=2e-5)
    assert np.abs(exact - mpnet.exact).max() > 0.01


def test_a_bias_that_depends_on_the_text_is_left_alone(tmp_path):
    deberta = export("DeBERTa-v3", tmp_path)
    assert fuse_attention(deberta.model, HEADS, keep_mask=True) == attention.Rewritten(deberta.model, 0, 2)


def test_berts_form_is_left_to_onnx_runtime_if_asked(tmp_path):
    bert = export("BERT", tmp_path)
    assert fuse_attention(bert.model, HEADS, keep_mask=True, plain=False).fused == 0
    assert fuse_attention(bert.model, HEADS, keep_mask=True).fused == 2
