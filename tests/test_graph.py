"""A graph run directly: its inputs and outputs, and graphs that a bundle cannot have."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, helper

from qadeploy.errors import BundleError
from qadeploy.inference.graph_model import GraphModel


def double(kind: int) -> bytes:
    """``doubled`` is ``given`` + ``given``."""
    given, doubled = (helper.make_tensor_value_info(name, kind, ["n"]) for name in ("given", "doubled"))
    graph = helper.make_graph([helper.make_node("Add", ["given", "given"], ["doubled"])], "double", [given], [doubled])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return bytes(made.SerializeToString())


@pytest.mark.parametrize(
    ("kind", "numbers"), [(TensorProto.INT64, np.int64), (TensorProto.INT32, np.int32), (TensorProto.FLOAT, np.float32)]
)
def test_feeds_are_cast_and_what_it_does_not_take_is_left_out(kind, numbers):
    model = GraphModel(double(kind))
    assert (model.inputs, model.outputs) == (("given",), ("doubled",))
    found = model.run({"given": [1, 2], "other": "nothing"})
    assert list(found) == ["doubled"]
    assert (found["doubled"].dtype, found["doubled"].tolist()) == (numbers, [2, 4])


def test_an_input_that_no_bundle_has_is_named():
    with pytest.raises(BundleError, match=r"model\.onnx: takes given as tensor\(double\): export it with"):
        GraphModel(double(TensorProto.DOUBLE))


def test_what_is_no_model_is_said():
    with pytest.raises(BundleError, match=r"model\.onnx: ONNX Runtime cannot load it: "):
        GraphModel(b"no model")
