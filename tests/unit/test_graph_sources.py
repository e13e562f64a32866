"""Which inputs and constants a value of a graph is computed from."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from qadeploy.export.graph import Graph


@pytest.mark.parametrize("as_node", [False, True], ids=["initializer", "Constant node"])
@pytest.mark.parametrize(
    ("value", "counts"),
    [(np.ones((2, 8), np.float32), True), (np.float32([0.5]), False), (np.int64([0, 2, 1, 3]), False)],
    ids=["weights", "scale", "axes"],
)
def test_a_large_constant_counts_however_it_is_stored(value, counts, as_node):
    tensor = numpy_helper.from_array(value, "constant")
    nodes = [helper.make_node("Constant", [], ["constant"], value=tensor)] if as_node else []
    nodes += [helper.make_node("Shape", ["ids"], ["shape"]), helper.make_node("Add", ["ids", "constant"], ["sum"])]
    nodes.append(helper.make_node("Reshape", ["sum", "shape"], ["result"]))
    ids = helper.make_tensor_value_info("ids", TensorProto.FLOAT, ["n"])
    result = helper.make_tensor_value_info("result", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "graph", [ids], [result], [] if as_node else [tensor])
    found = Graph(helper.make_model(graph)).sources("result")
    assert found == ({"ids", "constant"} if counts else {"ids"})
