"""Two exporters, one graph: the same inputs, outputs, opset, logits and fusions from optimum and from PyTorch itself."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from transformers import T5Config, T5ForQuestionAnswering

from qadeploy.errors import FailureError, InputError, MissingExtraError
from qadeploy.export.attention import fuse_attention
from qadeploy.export.fusion import fuse
from qadeploy.export.masks import simplify_masks
from qadeploy.export.onnx import export_graph
from qadeploy.export.options import ExportOptions
from qadeploy.export.run import export_run
from qadeploy.inference.bundle import MODEL, open_bundle
from qadeploy.inference.session import OnnxModel
from qadeploy.inference.tuning import FP32_TOLERANCE
from qadeploy.training.checkpoint import Checkpoint, TorchModel, load_checkpoint
from qadeploy.training.exportable import exporters
from tests.models_for_tests import ARCHITECTURES, optimized

FEEDS = {"attention_mask": np.array([[1, 1, 1, 0], [1, 0, 1, 1]]), "input_ids": np.array([[1, 5, 2, 9], [4, 3, 8, 6]])}
QUICK = ("RoBERTa", "ALBERT", "ModernBERT")  # one for each form of attention; the others together take a minute
EACH = [pytest.param(a, id=a.name, marks=[] if a.name in QUICK else [pytest.mark.slow]) for a in ARCHITECTURES]


def graph_of(checkpoint: Checkpoint, exporter: str, folder: Path) -> bytes:
    export_graph(checkpoint, folder, exporter)
    return (folder / MODEL).read_bytes()


def shapes(model: bytes) -> dict[str, list[str]]:
    """The axes of inputs and outputs, by name, in order."""
    graph = onnx.load_model_from_string(model).graph
    return {v.name: [d.dim_param for d in v.type.tensor_type.shape.dim] for v in (*graph.input, *graph.output)}


@pytest.mark.parametrize("architecture", EACH)
def test_both_exporters_give_the_same_model(architecture, tmp_path):
    pytest.importorskip("optimum.exporters.onnx", reason="the extra optimum is not installed")
    checkpoint = load_checkpoint(architecture.save(tmp_path / "checkpoint"))
    theirs, ours = (graph_of(checkpoint, name, tmp_path / name) for name in ("optimum", "torch"))
    assert shapes(ours) == shapes(theirs)
    first, second = (onnx.load_model_from_string(model) for model in (theirs, ours))
    opsets = [[(each.domain, each.version) for each in model.opset_import] for model in (first, second)]
    assert opsets[0] == opsets[1]
    assert second.ir_version == first.ir_version
    assert len(second.graph.node) < len(first.graph.node)
    counts = [Counter(node.op_type for node in model.graph.node) for model in (first, second)]
    for kind in ("MatMul", "Softmax", "LayerNormalization"):
        assert counts[1][kind] == counts[0][kind], kind
    assert not any(node.metadata_props or node.doc_string for node in second.graph.node)  # they hold paths

    config = checkpoint.model.config
    sizes = {"heads": config.num_attention_heads, "hidden": config.hidden_size}
    nodes = [Counter(n.op_type for n in fuse(model, sizes).model.graph.node) for model in (theirs, ours)]
    for count in nodes:  # the embeddings' normalisation is either kind of node, depending on the exporter
        count["SkipLayerNormalization"] += count.pop("EmbedLayerNormalization", 0)
    for kind in ("Attention", "BiasGelu", "FastGelu", "SkipLayerNormalization"):
        assert nodes[1][kind] == nodes[0][kind], kind
    alone = [Counter(node.op_type for node in optimized(model).node) for model in (theirs, ours)]
    assert alone[1].total() <= alone[0].total()
    for kind in ("BiasGelu", "Gelu", "FastGelu", "LayerNormalization"):
        assert alone[1][kind] >= alone[0][kind], kind
    single = [fuse_attention(model, config.num_attention_heads) for model in (theirs, ours)]
    assert single[1].fused == single[0].fused
    inputs = [{i.name for i in onnx.load_model_from_string(each.model).graph.input} for each in single]
    assert inputs[1] == inputs[0]

    pad, encoder = checkpoint.encoder.config.pad_token_id, checkpoint.encoder
    question, limit = encoder.encode("Who keeps the lamp?"), encoder.config.position_limit
    contexts = [encoder.encode("Ada keeps the lamp, and Bela the boat. " * n) for n in (1, 3, 60)]
    windows = [encoder.windows(question, c, max_seq_len=limit, doc_stride=20)[0] for c in contexts]
    expected = TorchModel(checkpoint.model, pad).run_batch(windows)
    for model in (theirs, ours):
        found = OnnxModel(lambda m=model: m, device="cpu", pad_token_id=pad).run_batch(windows)
        for wanted, given in zip(expected, found, strict=True):
            np.testing.assert_allclose(given, wanted, atol=FP32_TOLERANCE)


# ---------------------------------------------------------------- which one


@pytest.mark.parametrize(
    ("wanted", "missing", "chosen"),
    [
        ("auto", (), ("optimum", "torch")),
        ("optimum", (), ("optimum",)),
        ("torch", (), ("torch",)),
        ("auto", ("optimum.exporters.onnx",), ("torch",)),
        ("torch", ("optimum.exporters.onnx",), ("torch",)),
        ("auto", ("onnxscript",), ("optimum",)),
    ],
)
def test_the_exporter_is_the_one_asked_for_else_optimum_is_tried_first(wanted, missing, chosen, monkeypatch):
    if "optimum" in chosen:
        pytest.importorskip("optimum.exporters.onnx", reason="the extra optimum is not installed")
    for name in missing:
        monkeypatch.setitem(sys.modules, name, None)
    assert exporters(wanted) == chosen


@pytest.mark.parametrize(
    ("wanted", "missing", "message"),
    [
        (
            "optimum",
            ("optimum.exporters.onnx",),
            r"^--exporter optimum needs the package optimum-onnx, .* pip install 'qadeploy\[optimum\]'$",
        ),
        (
            "torch",
            ("onnxscript",),
            r"^PyTorch's exporter needs the package onnxscript, .* pip install 'qadeploy\[train\]'$",
        ),
        ("auto", ("optimum.exporters.onnx", "onnxscript"), r"needs the package onnxscript"),
    ],
)
def test_an_exporter_that_is_not_installed_is_missed_before_anything_is_scored(
    wanted, missing, message, tiny, tmp_path, monkeypatch
):
    for name in missing:
        monkeypatch.setitem(sys.modules, name, None)
    said: list[str] = []

    class Quiet:
        say = staticmethod(said.append)
        count = step = staticmethod(lambda *_: None)

    with pytest.raises(MissingExtraError, match=message):
        export_run(str(tiny.run), ExportOptions(out=str(tmp_path / "out"), exporter=wanted), Quiet())
    assert said == []
    with pytest.raises(InputError, match="exporter is 'tf2onnx': choose auto, optimum, torch"):
        export_run(str(tiny.run), ExportOptions(exporter="tf2onnx"), Quiet())


def test_the_manifest_says_which_exporter(tiny, tiny_export):
    made = open_bundle(tiny.bundle()).manifest["made"]
    assert made == {"graph": "plain", "exporter": exporters()[0]}


def test_a_model_that_pytorch_cannot_export_is_named(tiny, tmp_path):
    from dataclasses import replace

    class Undecided(T5ForQuestionAnswering):
        def forward(self, input_ids, attention_mask):
            return (input_ids.float(),) if input_ids.sum() > 3 else ()

    checkpoint = load_checkpoint(tiny.run / "checkpoint")
    config = T5Config(vocab_size=30, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    with pytest.raises(FailureError, match=r"^PyTorch cannot export a t5 model: "):
        export_graph(replace(checkpoint, model=Undecided(config).eval()), tmp_path, "torch")
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- the padding mask


def masked(*, near: int | None = None) -> onnx.ModelProto:
    """Softmax of scores and an indirect mask of padding, and of tokens further away than ``near`` if it is given."""
    make, number, info = helper.make_node, numpy_helper.from_array, helper.make_tensor_value_info
    constants = {"axes": np.array([1, 2]), "zero": np.float32(0), "low": np.float32(-1e9), "scale": np.float32(0.25)}
    nodes = [
        make("Cast", ["attention_mask"], ["kept"], to=TensorProto.BOOL),
        make("Unsqueeze", ["kept", "axes"], ["seen"]),
    ]
    if near is not None:
        constants |= {"first": np.int64(0), "step": np.int64(1), "column": np.array([1]), "near": np.int64(near)}
        constants |= {"square": np.array([], np.int64)}
        nodes += [
            make("Shape", ["attention_mask"], ["side"], start=1, end=2),
            make("Reshape", ["side", "square"], ["tokens"]),
            make("Range", ["first", "tokens", "step"], ["row"]),
            make("Unsqueeze", ["row", "column"], ["rows"]),
            make("Sub", ["row", "rows"], ["offset"]),
            make("Abs", ["offset"], ["distance"]),
            make("LessOrEqual", ["distance", "near"], ["local"]),
            make("And", ["seen", "local"], ["seen_here"]),
        ]
    nodes += [
        make("Where", ["seen" if near is None else "seen_here", "zero", "low"], ["mask"]),
        make("Cast", ["input_ids"], ["values"], to=TensorProto.FLOAT),
        make("Unsqueeze", ["values", "axes"], ["products"]),
        make("Mul", ["products", "scale"], ["scores"]),
        make("Add", ["scores", "mask"], ["sum"]),
        make("Softmax", ["sum"], ["weights"], axis=-1),
    ]
    inputs = [info(name, TensorProto.INT64, ["b", "s"]) for name in ("input_ids", "attention_mask")]
    outputs = [info("weights", TensorProto.FLOAT, ["b", 1, "q", "s"])]
    tensors = [number(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "masked", inputs, outputs, tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def test_a_padding_mask_becomes_the_form_that_fusions_know_with_the_same_result():
    from onnx.reference import ReferenceEvaluator

    model = masked()
    before = ReferenceEvaluator(model).run(None, FEEDS)[0]
    assert simplify_masks(model, 64) == 1
    onnx.checker.check_model(model)
    kinds = [node.op_type for node in model.graph.node]
    assert kinds == [*("Unsqueeze", "Unsqueeze", "Cast", "Sub", "Mul"), *("Cast", "Unsqueeze", "Div", "Add", "Softmax")]
    np.testing.assert_allclose(ReferenceEvaluator(model).run(None, FEEDS)[0], before, atol=1e-6)


def test_a_mask_that_also_hides_what_is_far_stays():
    model = masked(near=20)
    before = model.SerializeToString()
    assert simplify_masks(model, 64) == 0
    assert model.SerializeToString() == before


def test_a_condition_that_hides_padding_before_the_product_is_scaled_becomes_that_form_too():
    from onnx.reference import ReferenceEvaluator

    make, number, info = helper.make_node, numpy_helper.from_array, helper.make_tensor_value_info
    constants = {"axes": np.array([1, 2]), "none": np.int64(0), "low": np.float32(-1e9), "root": np.float32(4)}
    constants |= {"heads": np.array([1, 2, 1, 1])}
    nodes = [
        make("Equal", ["attention_mask", "none"], ["padding"]),
        make("Unsqueeze", ["padding", "axes"], ["keys"]),
        make("Expand", ["keys", "heads"], ["hidden"]),  # as DistilBERT's, for each head
        make("Cast", ["input_ids"], ["values"], to=TensorProto.FLOAT),
        make("Unsqueeze", ["values", "axes"], ["key"]),
        make("Transpose", ["key"], ["query"], perm=[0, 1, 3, 2]),
        make("Div", ["query", "root"], ["scaled"]),
        make("MatMul", ["scaled", "key"], ["scores"]),
        make("Where", ["hidden", "low", "scores"], ["masked"]),
        make("Softmax", ["masked"], ["weights"], axis=-1),
    ]
    inputs = [info(name, TensorProto.INT64, ["b", "s"]) for name in ("input_ids", "attention_mask")]
    outputs = [info("weights", TensorProto.FLOAT, ["b", "h", "q", "s"])]
    tensors = [number(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "chosen", inputs, outputs, tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    before = ReferenceEvaluator(model).run(None, FEEDS)[0]
    assert simplify_masks(model, 64) == 1
    kinds = [node.op_type for node in model.graph.node]
    assert kinds[-5:] == ["Transpose", "MatMul", "Div", "Add", "Softmax"]
    after = ReferenceEvaluator(model).run(None, FEEDS)[0]
    np.testing.assert_allclose(np.broadcast_to(after, before.shape), before, atol=1e-6)


@pytest.mark.parametrize(("low", "when"), [(-5.0, 0), (-1e9, 1)], ids=["still seen", "hides tokens"])
def test_a_condition_that_does_not_hide_padding_stays(low, when):
    make, number, info = helper.make_node, numpy_helper.from_array, helper.make_tensor_value_info
    constants = {"axes": np.array([1, 2]), "when": np.int64(when), "low": np.float32(low)}
    nodes = [
        make("Equal", ["attention_mask", "when"], ["hidden"]),
        make("Unsqueeze", ["hidden", "axes"], ["keys"]),
        make("Cast", ["input_ids"], ["values"], to=TensorProto.FLOAT),
        make("Unsqueeze", ["values", "axes"], ["scores"]),
        make("Where", ["keys", "low", "scores"], ["masked"]),
        make("Softmax", ["masked"], ["weights"], axis=-1),
    ]
    inputs = [info(name, TensorProto.INT64, ["b", "s"]) for name in ("input_ids", "attention_mask")]
    outputs = [info("weights", TensorProto.FLOAT, ["b", 1, 1, "s"])]
    tensors = [number(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "chosen", inputs, outputs, tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    before = model.SerializeToString()
    assert simplify_masks(model, 64) == 0
    assert model.SerializeToString() == before
