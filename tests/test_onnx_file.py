"""Weights that an ONNX model keeps in other files, found from its bytes as onnx finds them."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, external_data_helper, helper, numpy_helper

from qadeploy.errors import BundleError
from qadeploy.inference.bundle import open_bundle, seal, writing_bundle
from qadeploy.inference.onnx_file import _read
from tests.test_bundle import MANIFEST, fill, tiny_model, write


def tensor(name: str, *, external: bool) -> TensorProto:
    found = numpy_helper.from_array(np.ones(4, np.float32), name)
    if external:
        external_data_helper.set_external_data(found, location="weights.bin", offset=0, length=16)
        found.ClearField("raw_data")
    return found


def constant(*, external: bool) -> onnx.NodeProto:
    return helper.make_node("Constant", [], ["c"], value=tensor("c", external=external))


def subgraph(node: onnx.NodeProto | None = None, weights: list[TensorProto] | None = None) -> onnx.GraphProto:
    output = helper.make_tensor_value_info("c", TensorProto.FLOAT, [4])
    return helper.make_graph([node] if node else [], "branch", [], [output], weights or [])


def conditional(branch: onnx.GraphProto) -> onnx.NodeProto:
    return helper.make_node("If", ["yes"], ["d"], then_branch=subgraph(constant(external=False)), else_branch=branch)


def with_initializer(*, external: bool) -> onnx.ModelProto:
    model = tiny_model()
    model.graph.initializer.append(tensor("w", external=external))
    return model


def with_tensors_attribute(*, external: bool) -> onnx.ModelProto:
    node = helper.make_node("Many", [], ["c"], domain="own")
    node.attribute.append(
        helper.make_attribute("values", [tensor("a", external=False), tensor("b", external=external)])
    )
    return tiny_model(2.0, node)


def with_graphs_attribute(*, external: bool) -> onnx.ModelProto:
    node = helper.make_node("Many", [], ["c"], domain="own")
    node.attribute.append(helper.make_attribute("graphs", [subgraph(), subgraph(constant(external=external))]))
    return tiny_model(2.0, node)


def with_function(*, external: bool) -> onnx.ModelProto:
    model = tiny_model()
    opset = [helper.make_opsetid("", 17)]
    model.functions.append(helper.make_function("own", "Make", [], ["c"], [constant(external=external)], opset))
    return model


MODELS = {
    "initializer": with_initializer,
    "constant": lambda *, external: tiny_model(2.0, constant(external=external)),
    "if": lambda *, external: tiny_model(2.0, conditional(subgraph(constant(external=external)))),
    "if-initializer": lambda *, external: tiny_model(
        2.0, conditional(subgraph(weights=[tensor("c", external=external)]))
    ),
    "if-in-if": lambda *, external: tiny_model(
        2.0, conditional(subgraph(conditional(subgraph(constant(external=external)))))
    ),
    "tensors": with_tensors_attribute,
    "graphs": with_graphs_attribute,
    "function": with_function,
}


def has_external_data(model: bytes) -> bool:
    return _read(model, "the model").external


def by_onnx(model: onnx.ModelProto) -> bool:
    tensors = external_data_helper._get_all_tensors(model)
    return any(external_data_helper.uses_external_data(t) for t in tensors)


@pytest.mark.parametrize("external", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_external_data_is_found_where_onnx_finds_it(kind, external):
    model = MODELS[kind](external=external)
    assert has_external_data(model.SerializeToString()) == by_onnx(model) == external


@pytest.mark.parametrize("external", [False, True])
def test_external_data_in_places_that_the_helper_of_onnx_leaves_out(external):
    sparse = helper.make_sparse_tensor(
        tensor("v", external=external), helper.make_tensor("i", TensorProto.INT64, [4], [0, 2, 4, 6]), [8]
    )
    in_graph = tiny_model()
    in_graph.graph.sparse_initializer.append(sparse)
    in_node = tiny_model(2.0, helper.make_node("Constant", [], ["c"], sparse_value=sparse))
    in_default = with_function(external=False)
    in_default.functions[0].attribute_proto.append(helper.make_attribute("value", tensor("d", external=external)))
    for model in (in_graph, in_node, in_default):
        assert has_external_data(model.SerializeToString()) is external


def test_a_bundle_with_external_data_is_refused_even_where_all_is_listed(tmp_path):
    with writing_bundle(tmp_path / "out") as work:
        fill(work)
        onnx.save_model(
            tiny_model(), work / "model.onnx", save_as_external_data=True, location="model.data", size_threshold=0
        )
        assert (work / "model.data").stat().st_size == 4
        seal(work, MANIFEST)
    with pytest.raises(BundleError) as caught:
        open_bundle(tmp_path / "out")
    assert (
        str(caught.value)
        == f"{tmp_path / 'out' / 'model.onnx'}: keeps weights in another file, which a bundle may not do"
    )


@pytest.mark.parametrize("model", [b"\xff", b"not a model", b"\x80" * 20, tiny_model().SerializeToString()[:-40]])
def test_bytes_that_are_no_model_are_refused_even_where_sealed(tmp_path, model):
    write(tmp_path / "out", model)
    with pytest.raises(BundleError, match=r"model\.onnx: is not an ONNX model"):
        open_bundle(tmp_path / "out")


def test_a_model_nested_without_end_is_refused():
    def field(number: int, inner: bytes) -> bytes:
        size, encoded = len(inner), b""
        while size > 127:
            size, encoded = size >> 7, encoded + bytes([size & 127 | 128])
        return bytes([number << 3 | 2]) + encoded + bytes([size]) + inner

    graph = b""
    for _ in range(2000):
        graph = field(1, field(5, field(6, graph)))  # graph.node.attribute.g
    with pytest.raises(BundleError, match="is not an ONNX model"):
        has_external_data(field(7, graph))


def read_by_onnx(model: bytes) -> bool | None:
    """Whether onnx finds external data, or None if it cannot read the bytes."""
    try:
        return by_onnx(onnx.load_model_from_string(model))
    except Exception:  # protobuf's own DecodeError, which onnx does not name
        return None


def read_by_us(model: bytes) -> bool | None:
    try:
        return has_external_data(model)
    except BundleError:
        return None


WHOLE = st.builds(
    lambda kind, external: MODELS[kind](external=external).SerializeToString(),
    st.sampled_from(sorted(MODELS)),
    st.booleans(),
)


@settings(max_examples=30, deadline=None)
@given(model=WHOLE, part=st.floats(0, 1))
def test_cut_bytes_are_refused_where_onnx_refuses_them(model, part):
    cut = model[: int(len(model) * part)]
    found, wanted = read_by_us(cut), read_by_onnx(cut)
    # External data found before the cut is reached is a refusal, too.
    assert found == wanted or (found, wanted) == (True, None)


@settings(max_examples=30, deadline=None)
@given(model=WHOLE, place=st.floats(0, 0.999), flip=st.integers(1, 255))
def test_no_changed_byte_hides_external_data_that_onnx_sees(model, place, flip):
    changed = bytearray(model)
    changed[int(len(model) * place)] ^= flip
    if read_by_onnx(bytes(changed)):
        assert read_by_us(bytes(changed)) in (True, None)
