"""Attention's padding mask in one short form, whatever nodes an exporter computes it with.

How a mask is computed differs by release of transformers and by kind of model: ranges, gathers, comparisons, expansions. So
it is recognised by what it does: it depends only on ``attention_mask``, and on examples it adds 0 to the scores of tokens
and a very negative number to those of padding, or replaces the latter by that number. Such a mask is replaced by the nodes
that ONNX Runtime's attention fusion knows. Any other mask, such as a local layer's window, is left unchanged.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from qadeploy.export.graph import Graph
from qadeploy.integrations.onnx_standalone.nodes import Nodes

_INPUT = "attention_mask"
_PADDING = float(np.finfo(np.float32).min)
_HIDDEN = -1e4  # a score that is this much lower has no weight
_LONGEST = 2_048  # most tokens of an example: more than the local windows of models


def simplify_masks(model: onnx.ModelProto, longest: int) -> int:
    """Replaces every mask that hides padding and nothing else.

    Args:
        model: Changed in place.
        longest: The model's longest input in tokens.

    Returns:
        How many attentions read the new mask.
    """
    graph = Graph(model)
    shapes = ((3, 7), (1, min(longest, _LONGEST)))
    found: dict[tuple[str, float | None], bool] = {}
    masked: list[tuple[onnx.NodeProto, str]] = []  # the node that masks, and the scores
    for softmax in [node for node in model.graph.node if node.op_type == "Softmax"]:
        node = graph.makers.get(softmax.input[0])
        for name, scores, chosen in _readings(graph, node) if node is not None else ():
            if (name, chosen) not in found:
                found[name, chosen] = _hides_padding_only(graph, name, shapes, chosen)
            if found[name, chosen]:
                masked.append((node, scores))
                break
    if not masked:
        return 0
    for node, scores in masked:
        node.op_type = "Add"
        node.input[:] = [_divide(graph, scores), f"{_INPUT}/added"]
    _add_mask(model)
    Graph(model).prune()
    return len(masked)


def _readings(graph: Graph, node: onnx.NodeProto) -> Iterator[tuple[str, str, float | None]]:
    """How a node may mask scores: the mask, the scores and, if the mask is a condition, the value that replaces scores."""
    if node.op_type == "Add":
        yield node.input[0], node.input[1], None
        yield node.input[1], node.input[0], None
    elif node.op_type == "Where":
        low = graph.constant(node.input[1])
        if low is not None and low.size == 1:
            yield node.input[0], node.input[2], float(low.item())


def _hides_padding_only(graph: Graph, name: str, shapes: Sequence[tuple[int, int]], chosen: float | None) -> bool:
    """Whether a mask leaves tokens alone and hides padding, for every query, on random masks of these shapes.

    ``chosen`` replaces the scores where the mask, a condition, is true; None if the mask is added to the scores.
    """
    if graph.sources(name) & {each.name for each in graph.graph.input} != {_INPUT}:
        return False
    evaluator = ReferenceEvaluator(graph.part(name))
    random = np.random.default_rng(0)
    for shape in shapes:
        mask = random.integers(0, 2, shape)
        mask[:, 0] = 1  # no row is only padding
        value = evaluator.run(
            None, {each: mask if each == _INPUT else np.zeros_like(mask) for each in evaluator.input_names}
        )[0]
        if not _is_added(value if chosen is None else np.where(value, np.float32(chosen), np.float32(0)), mask):
            return False
    return True


def _is_added(value: NDArray[np.float32], mask: NDArray[np.int64]) -> bool:
    batch, tokens = mask.shape
    heads = value.shape[-3] if value.ndim > 2 else 1
    try:
        each = np.broadcast_to(value, (batch, heads, tokens, tokens))
    except ValueError:
        return False
    kept = np.broadcast_to(mask[:, None, None, :] == 1, each.shape)
    return bool((each[kept] == 0).all() and (each[~kept] < _HIDDEN).all())


def _divide(graph: Graph, scores: str) -> str:
    """The scores, scaled by a division after the product, which is the form that the fusion knows.

    The fusion takes a Mul next to the mask for the mask itself. Scaling the query before the product scales the scores
    equally. Returns the name of the scaled scores.
    """
    product = graph.maker(scores, "MatMul")
    node = graph.maker(product.input[0], "Div") if product is not None else graph.maker(scores, "Mul")
    found = _factor(graph, node) if node is not None else None
    if node is None or found is None:
        return scores
    name, factor = found
    if product is None:
        divisor = numpy_helper.from_array(np.asarray(1 / float(factor.item()), factor.dtype), f"{name}/inverse")
        if divisor.name not in graph.constants:
            graph.constants[divisor.name] = divisor
            graph.graph.initializer.append(divisor)
        node.input[:] = [node.input[1 - list(node.input).index(name)], divisor.name]
        node.op_type = "Div"
        return scores
    product.input[0] = node.input[0]
    scaled = helper.make_node("Div", [scores, name], [f"{scores}/scaled"], f"{scores}/scaled")
    graph.graph.node.insert(list(graph.graph.node).index(product) + 1, scaled)
    return str(scaled.output[0])


def _factor(graph: Graph, node: onnx.NodeProto) -> tuple[str, NDArray[Any]] | None:
    """The name and value of the constant that a node multiplies or divides by, or None if it is not a single number."""
    for name in node.input if node.op_type == "Mul" else node.input[1:]:
        value = graph.constant(name)
        if value is not None and value.size == 1:
            return name, value
    return None


def _add_mask(model: onnx.ModelProto) -> None:
    """Adds (1 - mask) times the lowest number, ``[batch, 1, 1, tokens]``, before all other nodes."""
    n = Nodes(f"{_INPUT}/")
    keys = n("Unsqueeze", n("Unsqueeze", _INPUT, n.constant([1])), n.constant([2]))
    hidden = n("Sub", n.constant(1, np.float32), n("Cast", keys, to=TensorProto.FLOAT))
    n("Mul", hidden, n.constant(_PADDING, np.float32), out=f"{_INPUT}/added")
    n.put(model.graph, 0)
