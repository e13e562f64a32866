"""Writing ONNX nodes: each call makes a node and returns the name of its output."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from numpy.typing import ArrayLike, NDArray
from onnx import helper, numpy_helper


class Nodes:
    """Nodes and constants in the order in which they are added; all names begin with ``prefix``."""

    def __init__(self, prefix: str) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self._prefix = prefix
        self._count = 0
        self._known: dict[tuple[str, tuple[int, ...], bytes], str] = {}

    def __call__(self, op: str, *inputs: str, out: str = "", domain: str = "", **attributes: Any) -> str:
        """Adds a node with one output, named ``out`` if given; returns its name."""
        return self.many(op, *inputs, out=(out or self._name(op),), domain=domain, **attributes)[0]

    def many(
        self, op: str, *inputs: str, out: tuple[str, ...] = (), outputs: int = 1, domain: str = "", **attributes: Any
    ) -> tuple[str, ...]:
        """Adds a node with several outputs; returns their names."""
        names = out or tuple(self._name(op) for _ in range(outputs))
        node = helper.make_node(op, list(inputs), list(names), self._name(op), domain=domain, **attributes)
        self.nodes.append(node)
        return names

    def constant(self, value: ArrayLike, kind: type = np.int64) -> str:
        """Adds a constant of this kind (str for text) and returns its name; equal constants are stored once."""
        array: NDArray[Any] = np.asarray(value, dtype=object if kind is str else kind)
        key = (kind.__name__, array.shape, repr(array.tolist()).encode() if kind is str else array.tobytes())
        if key not in self._known:
            self._known[key] = self._name("constant")
            if kind is str:
                texts = [str(text).encode() for text in array.ravel()]
                tensor = helper.make_tensor(self._known[key], onnx.TensorProto.STRING, list(array.shape), texts)
            else:
                tensor = numpy_helper.from_array(array, self._known[key])
            self.constants.append(tensor)
        return self._known[key]

    def put(self, graph: onnx.GraphProto, place: int) -> None:
        """Moves the nodes to ``place`` in a graph, and the constants to its initializers."""
        for i, node in enumerate(self.nodes, place):
            graph.node.insert(i, node)
        graph.initializer.extend(self.constants)
        self.nodes, self.constants = [], []

    def _name(self, what: str) -> str:
        self._count += 1
        return f"{self._prefix}{what}_{self._count}"


def default_opset(proto: onnx.ModelProto) -> int:
    """The version of ONNX's own operators that a model requires."""
    return max((o.version for o in proto.opset_import if o.domain in {"", "ai.onnx"}), default=0)
