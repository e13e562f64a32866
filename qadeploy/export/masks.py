"""Attention's padding mask in one short form, whatever nodes an exporter computes it with.

How a mask is computed differs by release of transformers and by kind of model: ranges, gathers, comparisons, expansions. So
it is known by what it does: it is computed from ``attention_mask`` alone, and on examples adds 0 to the scores of tokens and
a very negative number to those of padding. Such a mask is replaced by the four nodes that ONNX Runtime's attention fusion
knows. Any other, such as a local layer's window, is left as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from qadeploy.export.graph import Graph

_INPUT = "attention_mask"
_PADDING = float(np.finfo(np.float32).min)
_HIDDEN = -1e4  # a score that is this much lower has no weight
_LONGEST = 2_048  # tokens of an example at most, more than the local windows that models have


def simplify_masks(model: onnx.ModelProto, longest: int) -> int:
    """Replaces every mask that hides padding and nothing else.

    Args:
        model: Changed in place.
        longest: The model's longest input in tokens.

    Returns:
        How many attentions read the new mask.
    """
    graph = Graph(model)
    inputs = {each.name for each in model.graph.input}
    shapes = ((3, 7), (1, min(longest, _LONGEST)))
    found: dict[str, bool] = {}
    readers = []
    for softmax in [node for node in model.graph.node if node.op_type == "Softmax"]:
        add = graph.maker(softmax.input[0], "Add")
        for i, name in enumerate(add.input if add is not None else ()):
            if name not in found:
                found[name] = graph.sources(name) & inputs == {_INPUT} and _hides_padding_only(graph, name, shapes)
            if add is not None and found[name]:
                readers.append((add, i))
    if not readers:
        return 0
    for node, i in readers:
        node.input[i] = f"{_INPUT}/added"
        _divide(graph, node.input[1 - i])
    _add_mask(model)
    Graph(model).prune()
    return len(readers)


def _hides_padding_only(graph: Graph, name: str, shapes: Sequence[tuple[int, int]]) -> bool:
    """Whether a value is 0 for tokens and very negative for padding, for every query, on random masks of these shapes."""
    evaluator = ReferenceEvaluator(graph.part(name))
    random = np.random.default_rng(0)
    for shape in shapes:
        mask = random.integers(0, 2, shape)
        mask[:, 0] = 1  # no row is padding alone
        value = evaluator.run(
            None, {each: mask if each == _INPUT else np.zeros_like(mask) for each in evaluator.input_names}
        )[0]
        if not _is_added(value, mask):
            return False
    return True


def _is_added(value: NDArray[np.float32], mask: NDArray[np.int64]) -> bool:
    batch, tokens = mask.shape
    try:
        each = np.broadcast_to(value, (batch, 1, tokens, tokens))
    except ValueError:
        return False
    kept = np.broadcast_to(mask[:, None, None, :] == 1, each.shape)
    return bool((each[kept] == 0).all() and (each[~kept] < _HIDDEN).all())


def _divide(graph: Graph, scores: str) -> None:
    """Scales scores by a division if a multiplication does: of a Mul beside the mask the fusion thinks that it is the mask."""
    node = graph.maker(scores, "Mul")
    if node is None:
        return
    for i, name in enumerate(node.input):
        factor = graph.constant(name)
        if factor is not None and factor.size == 1:
            divisor = numpy_helper.from_array(np.asarray(1 / float(factor.item()), factor.dtype), f"{name}/inverse")
            if divisor.name not in graph.constants:
                graph.constants[divisor.name] = divisor
                graph.graph.initializer.append(divisor)
            node.input[:] = [node.input[1 - i], divisor.name]
            node.op_type = "Div"
            return


def _add_mask(model: onnx.ModelProto) -> None:
    """Adds (1 - mask) times the lowest number, ``[batch, 1, 1, tokens]``, before all other nodes."""
    constants: dict[str, Any] = {
        "first": np.array([1]), "second": np.array([2]), "one": np.float32(1), "padding": np.float32(_PADDING),
    }  # fmt: skip
    for name, value in constants.items():
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), f"{_INPUT}/{name}"))
    steps: tuple[tuple[str, tuple[str, ...], str, dict[str, int]], ...] = (
        ("Unsqueeze", ("", "first"), "rows", {}),
        ("Unsqueeze", ("rows", "second"), "keys", {}),
        ("Cast", ("keys",), "float", {"to": TensorProto.FLOAT}),
        ("Sub", ("one", "float"), "hidden", {}),
        ("Mul", ("hidden", "padding"), "added", {}),
    )
    for place, (kind, inputs, output, attributes) in enumerate(steps):
        names = [f"{_INPUT}/{each}" if each else _INPUT for each in inputs]
        node = helper.make_node(kind, names, [f"{_INPUT}/{output}"], f"{_INPUT}/{output}", **attributes)
        model.graph.node.insert(place, node)
