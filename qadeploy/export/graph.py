"""Rewriting an exported graph so that it runs faster with the same logits.

The only rewriting that paid on a CPU: each attention (two matmuls, softmax, scaling, mask and four transposes) becomes one
``MultiHeadAttention`` kernel without a mask. On a CPU the runtime runs every window alone and unpadded, so there is
nothing to mask; a rewritten model takes no ``attention_mask`` and must not get padded batches. The caller must check on
real windows that the logits stay the same.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

_SPLIT_HEADS = [0, 2, 1, 3]  # [batch, tokens, heads, size] to [batch, heads, tokens, size], and back
_KEYS = [0, 2, 3, 1]  # the same, transposed for the matmul with the queries
_MASK = "attention_mask"


@dataclass(frozen=True, slots=True)
class Rewritten:
    """A model, and how many of its attentions are single nodes now."""

    model: bytes
    fused: int
    attentions: int
    takes_mask: bool


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
        """The node of this kind that alone reads a value, or None; nodes that only ask for its shape do not count."""
        readers = [node for node in self.readers[name] if node.op_type != "Shape"]
        return readers[0] if len(readers) == 1 and readers[0].op_type == kind else None

    def constant(self, name: str) -> NDArray[np.generic] | None:
        """The value of an initializer or a Constant node, or None."""
        if name in self.constants:
            return np.asarray(numpy_helper.to_array(self.constants[name]))
        node = self.maker(name, "Constant")
        if node is None:
            return None
        value = next((a.t for a in node.attribute if a.name == "value"), None)
        return None if value is None else np.asarray(numpy_helper.to_array(value))

    def sources(self, name: str) -> set[str]:
        """The graph inputs and larger constants that a value is computed from; shapes do not count."""
        found: set[str] = set()
        stack, seen = [name], set()
        while stack:
            value = stack.pop()
            if value in seen:
                continue
            seen.add(value)
            node = self.makers.get(value)
            if node is None:
                tensor = self.constants.get(value)
                if tensor is None or int(np.prod(tensor.dims)) > 1:
                    found.add(value)
            elif node.op_type != "Shape":
                stack += [i for i in node.input if i]
        return found

    def prune(self) -> None:
        """Removes what no output needs: nodes, constants, inputs."""
        needed, kept = {o.name for o in self.graph.output}, []
        for node in reversed(self.graph.node):
            if any(name in needed for name in node.output):
                kept.append(node)
                needed.update(node.input)
        del self.graph.node[:]
        self.graph.node.extend(reversed(kept))
        for field in (self.graph.initializer, self.graph.input):
            for item in [i for i in field if i.name not in needed]:
                field.remove(item)


def fuse_attention(model: bytes, heads: int) -> Rewritten:
    """The model with its attentions as single nodes if all of them have the plain shape; else as it was.

    ``heads`` is the number of attention heads. An attention is not rewritten if its scores get more than a mask (relative
    positions) or its parts are used elsewhere. If one cannot be rewritten, none is: the mask stays, and a mixed graph
    gains little.
    """
    proto = onnx.load_model_from_string(model)
    graph = Graph(proto)
    softmaxes = [node for node in proto.graph.node if node.op_type == "Softmax"]
    found = [_attention(graph, node) for node in softmaxes]
    if not found or None in found:
        return Rewritten(model, 0, len(softmaxes), takes_mask=True)
    for attention in found:
        assert attention is not None  # noqa: S101 - checked above
        place = list(proto.graph.node).index(attention.last)
        proto.graph.node.remove(attention.last)
        name = f"{attention.last.name}/MultiHeadAttention"
        inputs, output = [attention.query, attention.key, attention.value], list(attention.last.output)
        node = helper.make_node("MultiHeadAttention", inputs, output, name, domain="com.microsoft", num_heads=heads)
        proto.graph.node.insert(place, node)
    if "com.microsoft" not in {opset.domain for opset in proto.opset_import}:
        proto.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    graph.prune()
    takes_mask = _MASK in {i.name for i in proto.graph.input}
    return Rewritten(proto.SerializeToString(), len(found), len(softmaxes), takes_mask)


@dataclass(frozen=True, slots=True)
class _Attention:
    """The three inputs, ``[batch, tokens, hidden]``, and the node that made the result of that shape."""

    query: str
    key: str
    value: str
    last: onnx.NodeProto


def _attention(graph: Graph, softmax: onnx.NodeProto) -> _Attention | None:
    """The attention around a softmax, or None if it has not the plain shape."""
    scores = _scores(graph, softmax.input[0])
    weighted = _weighted(graph, softmax.output[0])
    if scores is None or weighted is None or weighted.input[0] not in _same(graph, softmax.output[0]):
        return None
    query = _heads(graph, scores.input[0], (_SPLIT_HEADS,))
    key = _heads(graph, scores.input[1], (_KEYS,)) or _transposed_key(graph, scores.input[1])
    value = _heads(graph, weighted.input[1], (_SPLIT_HEADS,))
    back = graph.only_reader(weighted.output[0], "Transpose")
    last = graph.only_reader(back.output[0], "Reshape") if back is not None and _perm(back) == _SPLIT_HEADS else None
    if query is None or key is None or value is None or last is None:
        return None
    return _Attention(query, key, value, last)


def _scores(graph: Graph, name: str) -> onnx.NodeProto | None:
    """The matmul of queries and keys behind a softmax: past an added mask and a scaling."""
    add = graph.maker(name, "Add")
    if add is not None:
        scores, mask = add.input
        if _matmul(graph, scores) is None:
            scores, mask = mask, scores
        if not graph.sources(mask) <= {_MASK}:
            return None
        name = scores
    return _matmul(graph, name)


def _matmul(graph: Graph, name: str) -> onnx.NodeProto | None:
    return graph.maker(_unscaled(graph, name), "MatMul")


def _same(graph: Graph, name: str) -> set[str]:
    """The names of a value, also behind nodes that guard against NaN in fully masked rows."""
    names = {name}
    for node in graph.readers[name]:
        if node.op_type == "Where" and graph.maker(node.input[0], "IsNaN") is not None:
            names.add(node.output[0])
    return names


def _weighted(graph: Graph, name: str) -> onnx.NodeProto | None:
    for value in _same(graph, name):
        node = next((n for n in graph.readers[value] if n.op_type == "MatMul"), None)
        if node is not None:
            return node
    return None


def _unscaled(graph: Graph, name: str) -> str:
    """The value before multiplications or divisions by a number."""
    while True:
        node = graph.maker(name, "Mul") or graph.maker(name, "Div")
        if node is None:
            return name
        others = [i for i in node.input if not _is_number(graph, i)]
        if len(others) != 1 or (node.op_type == "Div" and others[0] != node.input[0]):
            return name
        name = others[0]


def _is_number(graph: Graph, name: str) -> bool:
    """Whether a value is a single number made from constants and shapes alone, as far as can be told."""
    value = graph.constant(name)
    if value is not None:
        return value.size == 1
    node = graph.makers.get(name)
    return node is not None and node.op_type in {"Sqrt", "Div", "Cast"} and not graph.sources(name)


def _heads(graph: Graph, name: str, perms: tuple[list[int], ...]) -> str | None:
    """The value ``[batch, tokens, hidden]`` that was split into heads to make this one."""
    transpose = graph.maker(_unscaled(graph, name), "Transpose")
    if transpose is None or _perm(transpose) not in perms:
        return None
    reshape = graph.maker(_unscaled(graph, transpose.input[0]), "Reshape")
    return _unscaled(graph, reshape.input[0]) if reshape is not None else None


def _transposed_key(graph: Graph, name: str) -> str | None:
    """The same for keys that are split like queries and then have their last two axes swapped."""
    transpose = graph.maker(_unscaled(graph, name), "Transpose")
    if transpose is None or _perm(transpose) != [0, 1, 3, 2]:
        return None
    return _heads(graph, transpose.input[0], (_SPLIT_HEADS,))


def _perm(node: onnx.NodeProto) -> list[int]:
    return next((list(a.ints) for a in node.attribute if a.name == "perm"), [])
