"""An exported graph with the maps that rewriting needs."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

CONTRIB = "com.microsoft"  # the domain of ONNX Runtime's own operators
_FLOATS = frozenset({onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE})
_AXES = 8  # constants of at most this many integers are axes or shapes


def add_contrib_domain(proto: onnx.ModelProto) -> None:
    """Lets a model use ONNX Runtime's own operators."""
    if CONTRIB not in {opset.domain for opset in proto.opset_import}:
        proto.opset_import.append(helper.make_opsetid(CONTRIB, 1))


class Graph:
    """A graph with the maps that rewriting needs: which node makes a value, which nodes read it."""

    def __init__(self, proto: onnx.ModelProto) -> None:
        self.proto = proto
        self.graph = proto.graph
        self.makers = {name: node for node in self.graph.node for name in node.output}
        self.readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in self.graph.node:
            for name in node.input:
                self.readers[name].append(node)
        self.constants = {tensor.name: tensor for tensor in self.graph.initializer}

    def maker(self, name: str, kind: str) -> onnx.NodeProto | None:
        """The node of this kind that makes a value, or None."""
        node = self.makers.get(name)
        return node if node is not None and node.op_type == kind else None

    def only_reader(self, name: str, kind: str) -> onnx.NodeProto | None:
        """The node of this kind if no other reads the value, or None; nodes that only read its shape do not count."""
        readers = [node for node in self.readers[name] if node.op_type != "Shape"]
        return readers[0] if len(readers) == 1 and readers[0].op_type == kind else None

    def constant(self, name: str) -> NDArray[np.generic] | None:
        """The value of an initializer or a Constant node, or None."""
        tensor = self._tensor(name)
        return None if tensor is None else np.asarray(numpy_helper.to_array(tensor))

    def _tensor(self, name: str) -> onnx.TensorProto | None:
        node = self.maker(name, "Constant")
        if node is None:
            return self.constants.get(name)
        return next((a.t for a in node.attribute if a.name == "value"), None)

    def sources(self, name: str) -> set[str]:
        """The graph inputs and larger constants that a value is computed from; shapes and axes do not count."""
        found: set[str] = set()
        stack, seen = [name], set()
        while stack:
            value = stack.pop()
            if value in seen:
                continue
            seen.add(value)
            node, tensor = self.makers.get(value), self._tensor(value)
            if tensor is not None:
                if int(np.prod(tensor.dims)) > (1 if tensor.data_type in _FLOATS else _AXES):
                    found.add(value)
            elif node is None:
                found.add(value)
            elif node.op_type != "Shape":
                stack += [i for i in node.input if i]
        return found

    def ancestors(self, name: str) -> list[onnx.NodeProto]:
        """The nodes that a value is computed by; nodes that only contribute to a shape do not count."""
        found: dict[str, onnx.NodeProto] = {}
        stack = [name]
        while stack:
            value = stack.pop()
            node = self.makers.get(value)
            if node is not None and value not in found and node.op_type != "Shape":
                found[value] = node
                stack += node.input
        return list(found.values())

    def _needed(self, needed: set[str]) -> tuple[set[str], list[onnx.NodeProto]]:
        """The names of all values that ``needed`` ones depend on, and the nodes that make them, in order."""
        nodes = []
        for node in reversed(self.graph.node):
            if any(output in needed for output in node.output):
                nodes.append(node)
                needed.update(node.input)
        return needed, nodes[::-1]

    def part(self, name: str) -> onnx.ModelProto:
        """The part of the graph that computes a value, as a model of its own with that value as its output."""
        needed, nodes = self._needed({name})
        inputs = [given for given in self.graph.input if given.name in needed]
        constants = [tensor for tensor in self.graph.initializer if tensor.name in needed]
        output = helper.make_empty_tensor_value_info(name)
        part = helper.make_graph(nodes, "part", inputs, [output], constants)
        return helper.make_model(part, opset_imports=self.proto.opset_import, ir_version=self.proto.ir_version)

    def prune(self) -> None:
        """Removes what no output needs: nodes, constants, inputs."""
        needed, kept = self._needed({o.name for o in self.graph.output})
        del self.graph.node[:]
        self.graph.node.extend(kept)
        for field in (self.graph.initializer, self.graph.input):
            for item in [i for i in field if i.name not in needed]:
                field.remove(item)
