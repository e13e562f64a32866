"""The parts of a recipe: single-node attention, rounding errors, SmoothQuant, and the quantizers."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from qadeploy.errors import InputError
from qadeploy.export.attention import fuse_attention
from qadeploy.export.onnx import export_graph
from qadeploy.export.parity import parity_windows
from qadeploy.export.quantize.matmuls import (
    TOKENS,
    Activations,
    find_matmuls,
    measure_activations,
    rounding_error,
    rounding_errors,
    worst,
)
from qadeploy.export.quantize.quantizers import quantize_dynamic_int8, quantize_embeddings
from qadeploy.export.quantize.recipes import RECIPES, Material
from qadeploy.export.quantize.run import find_recipes
from qadeploy.export.quantize.smoothquant import choose, smoothing_scales, smoothquant
from qadeploy.export.reference import make_reference
from qadeploy.inference.bundle import MODEL, open_bundle
from qadeploy.inference.session import OnnxModel
from qadeploy.training.checkpoint import load_checkpoint
from qadeploy.training.runs import HeldOut, dev_set, find_run
from tests.cli_for_tests import fails, well
from tests.models_for_tests import ARCHITECTURES, optimized


@pytest.fixture(scope="module")
def material(tiny, bundle) -> Material:
    run = find_run(tiny.run)
    reference = make_reference(run, HeldOut("keepers", dev_set(run)[:6]))
    windows = parity_windows(reference.checkpoint, reference.examples)
    return Material(bundle / MODEL, 4, 0, windows)


QUICK = ("ALBERT", "DeBERTa-v3", "ModernBERT")  # shared weights, inputs that are not tokens, matmuls without weights
EACH = [pytest.param(a, id=a.name, marks=[] if a.name in QUICK else [pytest.mark.slow]) for a in ARCHITECTURES]


def logits(model: bytes, material: Material) -> np.ndarray:
    runs = OnnxModel(lambda: model, device="cpu", pad_token_id=material.pad_token_id).run(material.windows)
    return np.concatenate([value for pair in runs for value in pair])


def run(model: bytes, **inputs: np.ndarray) -> np.ndarray:
    return ort.InferenceSession(model, providers=["CPUExecutionProvider"]).run(None, inputs)[0]


def kinds(model: bytes) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load_model_from_string(model).graph.node)


def matmul_model(weight: np.ndarray, bias: np.ndarray | None = None) -> bytes:
    """Y = X W (+ b), X of shape [1, tokens, depth]."""
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y" if bias is None else "p"], "matmul")]
    constants = [numpy_helper.from_array(weight, "w")]
    if bias is not None:
        nodes.append(helper.make_node("Add", ["b", "p"], ["y"], "bias"))
        constants.append(numpy_helper.from_array(bias, "b"))
    shapes = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, None, k])
        for n, k in zip("xy", weight.shape, strict=True)
    ]
    graph = helper.make_graph(nodes, "matmul", shapes[:1], shapes[1:], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()


def activations(inputs: np.ndarray) -> Activations:
    """Activations as if all of X had been seen in one window."""
    low, high = np.minimum(inputs.min(axis=0), 0)[None], np.maximum(inputs.max(axis=0), 0)[None]
    return Activations({"x": inputs}, np.zeros(len(inputs), dtype=np.int64), {"x": low}, {"x": high}, {})


# ---------------------------------------------------------------- single-node attention


def test_attention_becomes_one_node_and_the_mask_goes(material):
    found = fuse_attention(material.model, 4)
    assert (found.fused, found.attentions) == (2, 2)
    assert kinds(found.model)["MultiHeadAttention"] == 2
    assert not {"Softmax", "Transpose"} & set(kinds(found.model))
    assert {i.name for i in onnx.load_model_from_string(found.model).graph.input} == {"input_ids", "token_type_ids"}
    assert np.abs(logits(found.model, material) - logits(material.model, material)).max() < 1e-5
    onnx.checker.check_model(onnx.load_model_from_string(found.model))


@pytest.mark.parametrize("fault", ["relative positions", "another reader", "one of two"])
def test_attention_of_another_shape_is_left_alone(fault, material):
    proto = onnx.load_model_from_string(material.model)
    softmax = next(n for n in proto.graph.node if n.op_type == "Softmax")
    add = next(n for n in proto.graph.node if softmax.input[0] in n.output)
    if fault == "another reader":  # the weights are also an output
        proto.graph.output.append(helper.make_tensor_value_info(softmax.output[0], TensorProto.FLOAT, None))
        proto.graph.node.append(helper.make_node("Identity", [softmax.output[0]], ["weights"]))
        values = next(n for n in proto.graph.node if n.op_type == "MatMul" and softmax.output[0] in n.input)
        back = next(n for n in proto.graph.node if n.op_type == "Transpose" and values.output[0] in n.input)
        proto.graph.node.append(helper.make_node("Identity", [back.output[0]], ["heads"]))
    else:
        table = np.ones((1, 2, 1, 1), dtype=np.float32)
        proto.graph.initializer.append(numpy_helper.from_array(table, "table"))
        mask = next(i for i, name in enumerate(add.input) if "Where" in name or "Mul" in name or "mask" in name.lower())
        place = list(proto.graph.node).index(add)
        proto.graph.node.insert(place, helper.make_node("Add", [add.input[mask], "table"], ["biased"]))
        add.input[mask] = "biased"
    model = proto.SerializeToString()
    found = fuse_attention(model, 4)
    assert (found.fused, found.model) == (0, model)


@pytest.mark.parametrize("heads", [2, 5, None])
def test_a_wrong_number_of_heads_is_noticed(heads, material):
    wrong = Material(material.source, heads, 0, material.windows)
    assert (wrong.rewritten.fused, wrong.rewritten.model) == (0, material.model)
    assert material.rewritten.fused == 2


# ---------------------------------------------------------------- rounding errors


def test_the_rounding_error_of_int8_by_hand():
    exact = np.array([[1.0, 2.0]], dtype=np.float32)
    assert rounding_error(exact, np.eye(2, dtype=np.float32)) < 0.01
    spread = np.array([[1000.0, 1.0]], dtype=np.float32)  # 1 falls between two steps of 1000 / 255
    one = np.array([[0.0], [1.0]], dtype=np.float32)
    assert rounding_error(spread, one) == pytest.approx(1.0)
    assert rounding_error(spread, one, scales=np.array([1000.0, 1.0], dtype=np.float32)) < 0.01
    assert rounding_error(spread, one, float_rows=np.array([0])) < 0.01


def test_every_token_counts_the_same():
    inputs = np.array([[1000.0, 1000.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0]], dtype=np.float32)
    error = rounding_error(inputs, np.eye(2, dtype=np.float32))
    assert error == pytest.approx(np.sqrt(3 / 4), rel=0.01)  # three of four are rounded away


def test_rounding_goes_by_the_range_of_the_tensor_that_a_row_is_from():
    rows = np.array([[1.0], [1.0]], dtype=np.float32)
    one = np.eye(1, dtype=np.float32)
    ranges = (np.array([0.0, 0.0], dtype=np.float32), np.array([1.0, 1000.0], dtype=np.float32))
    assert rounding_error(rows, one) < 0.01
    assert rounding_error(rows, one, ranges=ranges) == pytest.approx(np.sqrt(1 / 2), rel=0.01)
    assert rounding_error(rows, one, ranges=ranges, norms=np.array([1.0, 10.0])) == pytest.approx(
        np.sqrt(1 / 200), rel=0.01
    )


def test_the_inputs_of_matmuls(material):
    windows = material.windows[:3]
    measured = measure_activations(material.model, windows)
    matmuls = find_matmuls(onnx.load_model_from_string(material.model))
    assert sorted(measured.rows) == sorted({p.source for p in matmuls})
    assert list(measured.windows) == [i for i, w in enumerate(windows) for _ in range(min(TOKENS, len(w)))]
    for matmul in matmuls:
        rows, own = measured.rows[matmul.source], measured.windows
        assert rows.shape == (len(own), len(matmul.weight))
        assert (rows >= measured.lows[matmul.source][own]).all()
        assert (rows <= measured.highs[matmul.source][own]).all()
        assert (np.abs(rows).max(axis=0) <= measured.peaks(matmul.source)).all()
    # The tiny BERT's two layers have two residual sums each, of attention and of the feed-forward part.
    joined = [p for p in matmuls if p.joins]
    hidden = len(matmuls[0].weight)
    assert [p.weight.shape[1] for p in joined] == [hidden] * 4
    assert [p.weight.shape[0] > hidden for p in joined] == [False, True, False, True]
    assert all((measured.norms[p.joins] > 0).all() for p in joined)


def test_an_error_weighs_less_where_the_stream_that_it_joins_is_large():
    generator = np.random.default_rng(3)
    inputs = generator.normal(size=(30, 16)).astype(np.float32)
    weight = generator.normal(size=(16, 8)).astype(np.float32)
    (alone,) = find_matmuls(onnx.load_model_from_string(matmul_model(weight)))
    joining = replace(alone, joins="sum")
    measured = activations(inputs)
    measured = replace(measured, norms={"sum": 10 * np.linalg.norm(inputs @ weight, axis=1)})
    assert measured.error([joining]) == pytest.approx(measured.error([alone]) / 10)


def test_a_matmul_with_an_outlying_weight_is_ranked_first(material):
    measured = measure_activations(material.model, material.windows[:4])
    errors = rounding_errors(material.model, measured)
    proto = onnx.load_model_from_string(material.model)
    calm = worst(errors, 1, [(name,) for name in errors])[-1]
    assert errors[calm] == min(errors.values())
    node = next(n for n in proto.graph.node if n.name == calm)
    weight = next(t for t in proto.graph.initializer if t.name == node.input[1])
    values = numpy_helper.to_array(weight).copy()
    values[0] *= 1e4  # one row takes the scale of every column, and the rest is rounded away
    weight.CopyFrom(numpy_helper.from_array(values, weight.name))
    changed = rounding_errors(proto.SerializeToString(), measured)
    assert changed[calm] > errors[calm]


def test_the_worst_share():
    errors = {f"p{i}": (3 * i % 10) / 10 for i in range(10)}
    alone = [(name,) for name in errors]
    assert worst(errors, 0.25, alone) == ["p3", "p6"]
    assert worst(errors, 0.05, alone) == []


def test_matmuls_that_share_a_weight_are_among_the_worst_together_or_not_at_all():
    errors = {"a": 0.1, "b": 0.9, "c": 0.5, "d": 0.4, "e": 0.3, "f": 0.2}
    sharing = [("a", "b"), ("c",), ("d", "e", "not measured"), ("f",)]
    assert worst(errors, 0.5, sharing) == ["a", "b", "c"]
    assert worst(errors, 0.2, sharing) == ["c"]  # a and b are two
    assert worst(errors, 0.7, sharing) == ["a", "b", "c", "f"]


@pytest.mark.parametrize("architecture", EACH)
def test_every_recipe_rounds_all_matmuls_of_weights_but_those_it_names(architecture, tmp_path):
    checkpoint = load_checkpoint(architecture.save(tmp_path / "checkpoint"))
    export_graph(checkpoint, tmp_path)
    encoder, heads = checkpoint.encoder, checkpoint.model.config.num_attention_heads
    question, limit = encoder.encode("Who keeps the lamp?"), encoder.config.position_limit
    contexts = [encoder.encode("Ada keeps the lamp, and Bela the boat. " * n) for n in (1, 3, 60)]
    windows = [encoder.windows(question, c, max_seq_len=limit, doc_stride=20)[0] for c in contexts]
    material = Material(tmp_path / MODEL, heads, encoder.config.pad_token_id, windows)
    exact = logits(material.model, material)
    matmuls = {matmul.name for matmul in find_matmuls(onnx.load_model_from_string(material.rewritten.model))}
    for name, recipe in RECIPES.items():
        made = recipe.make(material)
        assert np.corrcoef(exact, logits(made.model, material))[0, 1] > 0.99, name
        nodes = onnx.load_model_from_string(made.model).graph.node
        dequantized = {node.output[0] for node in nodes if node.op_type == "DequantizeLinear"}
        small = [node for node in nodes if node.op_type in {"MatMulInteger", "MatMulNBits"}]
        if name == "int8-static":
            small = [node for node in nodes if node.op_type == "MatMul" and node.input[1] in dequantized]
            assert all(node.input[0] in dequantized for node in small), name
        others = [node for node in nodes if node.op_type == "MatMul" and node not in small]
        assert not dequantized & {read for node in others for read in node.input}, name
        assert len(small) == len(matmuls - set(made.float_nodes)), name


# ---------------------------------------------------------------- SmoothQuant


@given(st.integers(0, 2**16), st.booleans(), st.sampled_from([0, 3]))
def test_smoothquant_keeps_the_result(seed, biased, outlying):
    generator = np.random.default_rng(seed)
    inputs = generator.normal(size=(20, 32)).astype(np.float32)
    inputs[:, :outlying] *= 200
    weight = generator.normal(size=(32, 8)).astype(np.float32)
    model = matmul_model(weight, np.arange(8, dtype=np.float32) if biased else None)
    found = smoothquant(model, activations(inputs))
    (smoothing,) = found.smoothings
    assert smoothing.error <= activations(inputs).error(find_matmuls(onnx.load_model_from_string(model)))
    assert bool(found.float_nodes) == bool(len(smoothing.channels))
    before, after = run(model, x=inputs[None]), run(found.model, x=inputs[None])
    assert np.abs(before - after).max() <= 1e-4 * np.abs(before).max()


def test_outlying_channels_are_kept_apart_where_that_pays():
    generator = np.random.default_rng(1)
    inputs = generator.normal(size=(60, 64)).astype(np.float32)
    weight = generator.normal(size=(64, 16)).astype(np.float32)
    weight[5] *= 50
    inputs[::7, 5] *= 300
    model = matmul_model(weight, np.zeros(16, dtype=np.float32))
    (matmul,) = find_matmuls(onnx.load_model_from_string(model))
    smoothing = choose([matmul], activations(inputs))
    assert 5 in smoothing.channels
    assert smoothing.error < 0.2 * activations(inputs).error([matmul])
    found = smoothquant(model, activations(inputs))
    assert found.float_nodes == ("matmul/apart",)
    exact = run(model, x=inputs[None])[0]

    def error(small: bytes) -> float:
        rest = run(small, x=inputs[None])[0] - exact
        return float(np.mean(np.linalg.norm(rest, axis=1) / np.linalg.norm(exact, axis=1)))

    assert error(quantize_dynamic_int8(found.model, found.float_nodes)) < 0.3 * error(quantize_dynamic_int8(model))


def largest_weight(model: bytes) -> int:
    """The largest size of an int8 weight of a matmul."""
    graph = onnx.load_model_from_string(model).graph
    constants = {c.name: numpy_helper.to_array(c) for c in graph.initializer if c.data_type == TensorProto.INT8}
    taken = {n for node in graph.node if node.op_type in {"MatMulInteger", "DequantizeLinear"} for n in node.input}
    return max(int(np.abs(constants[name].astype(int)).max()) for name in taken & set(constants))


@pytest.mark.parametrize("name", ["int8", "int8-static"])
def test_reduce_range_gives_weights_seven_bits(name, material):
    full, reduced = (
        RECIPES[name].make(Material(material.source, 4, 0, material.windows, reduce_range=each)).model
        for each in (False, True)
    )
    assert largest_weight(reduced) <= 64 < largest_weight(full) <= 128


@pytest.mark.usefixtures("elsewhere")
def test_the_option_reaches_the_bundle(tiny, tmp_path):
    options = ("--quantize", "--recipe", "int8", "--reduce-range", "--no-optimize", "--max-f1-drop", 100)
    well("export", tiny.run, *options, "--out", tmp_path / "keepers")
    made = open_bundle(tmp_path / "keepers-int8")
    assert largest_weight((made.folder / MODEL).read_bytes()) <= 64
    assert made.manifest["made"]["reduce_range"] is True
    fails(
        2, ["leave out --reduce-range"], "export", tiny.run, "--quantize", "--recipe", "int8-weights", "--reduce-range"
    )


def test_a_recipe_that_has_eight_bits_is_left_out_of_a_reduced_range():
    left = {each.name for each in find_recipes(None, False)} - {each.name for each in find_recipes(None, True)}
    assert left == {"int8-weights"}
    with pytest.raises(InputError, match="recipe int8-weights always has 8-bit weights: leave out --reduce-range"):
        find_recipes("int8-weights", True)
    assert [each.name for each in find_recipes("int8", True)] == ["int8"]


def test_nothing_is_added_where_nothing_is_gained():
    generator = np.random.default_rng(2)
    inputs = np.sign(generator.normal(size=(40, 32))).astype(np.float32)
    model = matmul_model(np.sign(generator.normal(size=(32, 8))).astype(np.float32))
    found = smoothquant(model, activations(inputs))
    assert found.model == onnx.load_model_from_string(model).SerializeToString()
    assert found.smoothings[0].scales is None


def test_smoothing_by_the_formula_of_smoothquant():
    peaks = np.array([4.0, 1.0], dtype=np.float32)
    weight = np.array([[1.0, -1.0], [0.5, 2.0]], dtype=np.float32)
    plain = np.array([4.0**0.5 / 1.0**0.5, 1.0**0.5 / 2.0**0.5])
    assert smoothing_scales(peaks, weight, 0.5) == pytest.approx(plain / np.sqrt(plain.prod()))


# ---------------------------------------------------------------- recipes and quantizers


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_makes_a_smaller_model_that_answers_alike(name, material):
    made = RECIPES[name].make(material)
    assert len(made.model) < 0.9 * len(material.model)
    exact, found = logits(material.model, material), logits(made.model, material)
    assert np.corrcoef(exact, found)[0, 1] > 0.98
    names = {node.name: node.op_type for node in onnx.load_model_from_string(made.model).graph.node}
    assert all(names[node] == "MatMul" for node in made.float_nodes)
    assert RECIPES[name].what
    assert made == RECIPES[name].make(material)  # the search keeps figures, not models


def test_the_static_recipe_rounds_what_each_matmul_reads_and_the_runtime_multiplies_in_int8(material):
    made = RECIPES["int8-static"].make(material)
    nodes = onnx.load_model_from_string(made.model).graph.node
    makers = {name: node for node in nodes for name in node.output}
    small = [node for node in nodes if node.op_type == "MatMul" and makers[node.input[1]].op_type == "DequantizeLinear"]
    assert len(small) == 13  # also behind the fused attentions, where ONNX finds no types
    for node in small:
        assert makers[makers[node.input[0]].input[0]].op_type == "QuantizeLinear", node.name
    run = Counter(node.op_type for node in optimized(made.model).node)
    assert run["MatMulIntegerToFloat"] == len(small)
    assert run["DequantizeLinear"] == 0


def test_embeddings_in_int8_have_one_scale_a_row():
    rows = np.random.default_rng(3).normal(size=(1500, 8)).astype(np.float32)
    rows[7] *= 1000  # would set the scale of the whole table
    rows[9] = 0.0
    gather = helper.make_node("Gather", ["table", "ids"], ["y"], "gather")
    graph = helper.make_graph(
        [gather],
        "embeddings",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, [None])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, 8])],
        [numpy_helper.from_array(rows, "table")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    small = quantize_embeddings(model.SerializeToString())
    assert len(small) < 0.5 * len(model.SerializeToString())
    ids = np.arange(1500)
    found = ort.InferenceSession(small, providers=["CPUExecutionProvider"]).run(None, {"ids": ids})[0]
    bound = np.abs(rows).max(axis=1, keepdims=True) / 127 / 2 * 1.001
    assert (np.abs(found - rows) <= bound).all()
    assert quantize_embeddings(small) == small  # what is in int8 already stays
