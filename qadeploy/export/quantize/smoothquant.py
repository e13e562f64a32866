"""Making products ready for int8: what would be harmed by rounding is rescaled, or kept apart in float.

Int8 rounds X of Y = X W with one scale for all its channels, so one channel of large values leaves the others few
steps. Two things help, and keep Y what it was:

- smoothing (Xiao et al. 2023, "SmoothQuant", equation 4): X's channel j is divided by s_j, and W's row j multiplied
  with it, s_j = max|X_j|^a / max|W_j|^(1 - a); here a is chosen for each X by its simulated error;
- outlying channels (after Dettmers et al. 2022, "LLM.int8()"): the few with the largest values get a small
  product of their own, in float, and are zero in the other.

Both cost a multiplication of X with a vector; the second a small product besides. So the cheapest is taken that brings
the error, simulated on real activations, down to what rounding costs anywhere, or near the best that can be had.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from qadeploy.export.quantize.matmuls import Activations, Product, find_products
from qadeploy.records import FloatArray

ALPHAS = (0.6, 0.7, 0.8, 0.9)
CHANNELS = (1, 2, 4, 8)
BEARABLE = 0.013  # what int8 leaves in most products without outliers, and no protection betters much
NEAR = 1.25  # times the least error of all ways, where none is bearable
_NONE = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True, slots=True, eq=False)
class Protection:
    """What is done to one X and the products that read it: their error without, and with it."""

    source: str
    products: tuple[str, ...]
    error_before: float
    error: float
    alpha: float | None
    scales: FloatArray | None
    channels: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Protected:
    """The model, what was done, and the names of the small products that must stay in float."""

    model: bytes
    protections: tuple[Protection, ...]
    float_nodes: tuple[str, ...]


def protect(model: bytes, activations: Activations) -> Protected:
    """The model with its products made ready for int8."""
    proto = onnx.load_model_from_string(model)
    groups: dict[str, list[Product]] = defaultdict(list)
    for product in find_products(proto):
        groups[product.source].append(product)
    chosen = [choose(products, activations) for products in groups.values()]
    float_nodes: list[str] = []
    for protection in chosen:
        float_nodes += _apply(proto, protection)
    return Protected(proto.SerializeToString(), tuple(chosen), tuple(float_nodes))


def choose(products: Sequence[Product], activations: Activations) -> Protection:
    """The cheapest sufficient protection of the products that read one X.

    In the order of cost: none, smoothing, a few channels apart, more of them, both.
    """
    source, names = products[0].source, tuple(p.name for p in products)
    weight = np.concatenate([product.weight for product in products], axis=1)
    peaks = activations.peaks(source)
    order = np.argsort(-peaks, kind="stable")
    apart = [np.sort(order[:count]).astype(np.int64) for count in CHANNELS if count < len(peaks) // 4]
    before = activations.error(products)

    def ways() -> Iterator[Protection]:
        yield Protection(source, names, before, before, None, None, _NONE)
        yield _smoothed(products, activations, weight, _NONE, before)
        for channels in apart:
            yield Protection(source, names, before, activations.error(products, None, channels), None, None, channels)
        for channels in apart:
            yield _smoothed(products, activations, weight, channels, before)

    tried: list[Protection] = []
    for way in ways():
        if way.error <= BEARABLE:
            return way
        tried.append(way)
    least = min(p.error for p in tried)
    return next(p for p in tried if p.error <= NEAR * least)


def _smoothed(
    products: Sequence[Product],
    activations: Activations,
    weight: FloatArray,
    channels: NDArray[np.int64],
    before: float,
) -> Protection:
    """Smoothing by the alpha of least error, of what the channels kept apart leave."""
    source = products[0].source
    rest = activations.peaks(source)
    rest[channels] = 0
    scales = {alpha: smoothing_scales(rest, weight, alpha) for alpha in ALPHAS}
    errors = {alpha: activations.error(products, scales[alpha], channels) for alpha in ALPHAS}
    best = min(ALPHAS, key=lambda alpha: errors[alpha])
    names = tuple(p.name for p in products)
    return Protection(source, names, before, errors[best], best, scales[best], channels)


def smoothing_scales(peaks: FloatArray, weight: FloatArray, alpha: float) -> FloatArray:
    """SmoothQuant's s ``[depth]`` for X's largest absolute values ``[depth]``, with a geometric mean of 1."""
    rows = np.maximum(np.abs(weight).max(axis=1), 1e-5)
    scales = np.maximum(peaks, 1e-5) ** alpha / rows ** (1 - alpha)
    return np.asarray(scales / np.exp(np.log(scales).mean()), dtype=np.float32)


def _apply(proto: onnx.ModelProto, protection: Protection) -> list[str]:
    """Rewrites the products that read one X; returns the names of the small float products."""
    if protection.scales is None and not len(protection.channels):
        return []
    graph = proto.graph
    nodes = [node for node in graph.node if node.op_type == "MatMul" and node.name in protection.products]
    constants = {tensor.name: tensor for tensor in graph.initializer}
    depth = numpy_helper.to_array(constants[nodes[0].input[1]]).shape[0]
    scales = np.ones(depth, dtype=np.float32) if protection.scales is None else protection.scales
    factors = 1 / scales
    factors[protection.channels] = 0
    stem = f"{nodes[0].name}/int8"
    graph.initializer.append(numpy_helper.from_array(factors, f"{stem}/factors"))
    place = min(list(graph.node).index(node) for node in nodes)
    graph.node.insert(
        place, helper.make_node("Mul", [protection.source, f"{stem}/factors"], [f"{stem}/input"], f"{stem}/Mul")
    )
    if len(protection.channels):
        graph.initializer.append(numpy_helper.from_array(protection.channels, f"{stem}/channels"))
        gather = helper.make_node(
            "Gather", [protection.source, f"{stem}/channels"], [f"{stem}/apart"], f"{stem}/Gather", axis=-1
        )
        graph.node.insert(place + 1, gather)
    float_nodes = []
    for node in nodes:
        weight = numpy_helper.to_array(constants[node.input[1]])
        name = f"{node.name}/int8/weight"
        graph.initializer.append(numpy_helper.from_array(weight * scales[:, None] * (factors != 0)[:, None], name))
        node.input[0], node.input[1] = f"{stem}/input", name
        if len(protection.channels):
            float_nodes.append(_add_apart(graph, node, weight[protection.channels], f"{stem}/apart"))
    _drop_unused(graph)
    return float_nodes


def _add_apart(graph: onnx.GraphProto, node: onnx.NodeProto, weight: FloatArray, apart: str) -> str:
    """Adds the product of the channels kept apart to the node's result: behind its bias, which stays fused with it."""
    constants = {tensor.name for tensor in graph.initializer}
    readers = [n for n in graph.node if node.output[0] in n.input]
    last = node
    if len(readers) == 1 and readers[0].op_type == "Add" and any(name in constants for name in readers[0].input):
        last = readers[0]
    stem = f"{node.name}/apart"
    result = last.output[0]
    last.output[0] = f"{stem}/rest"
    graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(weight), f"{stem}/weight"))
    place = list(graph.node).index(last) + 1
    graph.node.insert(place, helper.make_node("MatMul", [apart, f"{stem}/weight"], [f"{stem}/sum"], stem))
    graph.node.insert(place + 1, helper.make_node("Add", [f"{stem}/rest", f"{stem}/sum"], [result], f"{stem}/Add"))
    return stem


def _drop_unused(graph: onnx.GraphProto) -> None:
    used = {name for node in graph.node for name in node.input}
    for tensor in [t for t in graph.initializer if t.name not in used]:
        graph.initializer.remove(tensor)
