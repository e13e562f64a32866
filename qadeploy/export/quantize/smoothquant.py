"""SmoothQuant and outlying channels: prepares matmuls for int8.

Int8 rounds X of Y = X W with one scale for all its channels, so one channel of large values leaves few steps for the
others. Two methods help without changing Y:

- smoothing (Xiao et al. 2023, "SmoothQuant", equation 4): X's channel j is divided by s_j and W's row j multiplied
  by it, s_j = max|X_j|^a / max|W_j|^(1 - a); here a is chosen for each X by its simulated error;
- outlying channels (after Dettmers et al. 2022, "LLM.int8()"): the few channels with the largest values get a small
  matmul of their own in float, and are zero in the int8 matmul.

Both cost a multiplication of X by a vector, and the second also a small matmul. So the cheapest method is chosen whose error,
simulated on real activations, is as low as that of matmuls without outliers, or near the lowest of all methods.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from qadeploy.export.quantize.matmuls import Activations, MatMul, find_matmuls, share_weights
from qadeploy.integrations.onnx_standalone.nodes import Nodes
from qadeploy.records import FloatArray

ALPHAS = (0.6, 0.7, 0.8, 0.9)
CHANNELS = (1, 2, 4, 8)
BEARABLE = 0.013  # the error of most matmuls without outliers, which no method reduces much
NEAR = 1.25  # times the least error of all methods, if none is bearable
_NONE = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True, slots=True, eq=False)
class Smoothing:
    """What is done to one X and the matmuls that read it, with the error that is left."""

    source: str
    matmuls: tuple[str, ...]
    error: float
    scales: FloatArray | None
    channels: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class SmoothedModel:
    """The model, what was done, the names of the small matmuls that must stay in float, and who then shares weights."""

    model: bytes
    smoothings: tuple[Smoothing, ...]
    float_nodes: tuple[str, ...]
    sharing: Sequence[tuple[str, ...]]


def smoothquant(model: bytes, activations: Activations) -> SmoothedModel:
    """The model with its matmuls prepared for int8."""
    proto = onnx.load_model_from_string(model)
    del model  # as large as the weights; the caller has handed it over
    groups: dict[str, list[MatMul]] = defaultdict(list)
    for matmul in find_matmuls(proto):
        groups[matmul.source].append(matmul)
    chosen = [choose(matmuls, activations) for matmuls in groups.values()]
    float_nodes: list[str] = []
    for smoothing in chosen:
        float_nodes += _apply(proto, smoothing)
    return SmoothedModel(proto.SerializeToString(), tuple(chosen), tuple(float_nodes), share_weights(proto))


def choose(matmuls: Sequence[MatMul], activations: Activations) -> Smoothing:
    """The cheapest sufficient method for the matmuls that read one X.

    In order of cost: nothing, smoothing, a few channels apart, more channels apart, both.
    """
    source, names = matmuls[0].source, tuple(m.name for m in matmuls)
    weight = np.concatenate([m.weight for m in matmuls], axis=1)
    peaks = activations.peaks(source)
    order = np.argsort(-peaks, kind="stable")
    apart = [np.sort(order[:count]).astype(np.int64) for count in CHANNELS if count < len(peaks) // 4]

    def ways() -> Iterator[Smoothing]:
        yield Smoothing(source, names, activations.error(matmuls), None, _NONE)
        yield _smoothed(matmuls, activations, weight, _NONE)
        for channels in apart:
            yield Smoothing(source, names, activations.error(matmuls, None, channels), None, channels)
        for channels in apart:
            yield _smoothed(matmuls, activations, weight, channels)

    tried: list[Smoothing] = []
    for way in ways():
        if way.error <= BEARABLE:
            return way
        tried.append(way)
    least = min(p.error for p in tried)
    return next(p for p in tried if p.error <= NEAR * least)


def _smoothed(
    matmuls: Sequence[MatMul], activations: Activations, weight: FloatArray, channels: NDArray[np.int64]
) -> Smoothing:
    """Smooths the channels that are not kept apart, with the alpha of the least error."""
    source = matmuls[0].source
    rest = activations.peaks(source)
    rest[channels] = 0
    scales = {alpha: smoothing_scales(rest, weight, alpha) for alpha in ALPHAS}
    errors = {alpha: activations.error(matmuls, scales[alpha], channels) for alpha in ALPHAS}
    best = min(ALPHAS, key=lambda alpha: errors[alpha])
    names = tuple(m.name for m in matmuls)
    return Smoothing(source, names, errors[best], scales[best], channels)


def smoothing_scales(peaks: FloatArray, weight: FloatArray, alpha: float) -> FloatArray:
    """SmoothQuant's s ``[depth]`` for X's largest absolute values ``[depth]``, scaled to a geometric mean of 1."""
    rows = np.maximum(np.abs(weight).max(axis=1), 1e-5)
    scales = np.maximum(peaks, 1e-5) ** alpha / rows ** (1 - alpha)
    return np.asarray(scales / np.exp(np.log(scales).mean()), dtype=np.float32)


def _apply(proto: onnx.ModelProto, smoothing: Smoothing) -> list[str]:
    """Rewrites the matmuls that read one X; returns the names of the small float matmuls."""
    if smoothing.scales is None and not len(smoothing.channels):
        return []
    graph = proto.graph
    nodes = [node for node in graph.node if node.op_type == "MatMul" and node.name in smoothing.matmuls]
    constants = {tensor.name: tensor for tensor in graph.initializer}
    depth = numpy_helper.to_array(constants[nodes[0].input[1]]).shape[0]
    scales = np.ones(depth, dtype=np.float32) if smoothing.scales is None else smoothing.scales
    factors = 1 / scales
    factors[smoothing.channels] = 0
    n = Nodes(f"{nodes[0].name}/int8/")
    scaled = n("Mul", smoothing.source, n.constant(factors, np.float32))
    apart = n("Gather", smoothing.source, n.constant(smoothing.channels), axis=-1) if len(smoothing.channels) else ""
    n.put(graph, min(list(graph.node).index(node) for node in nodes))
    float_nodes = []
    for node in nodes:
        weight = numpy_helper.to_array(constants[node.input[1]])
        name = f"{node.name}/int8/weight"
        graph.initializer.append(numpy_helper.from_array(weight * scales[:, None] * (factors != 0)[:, None], name))
        node.input[:] = [scaled, name]
        if apart:
            float_nodes.append(_add_apart(graph, node, weight[smoothing.channels], apart))
    used = {name for node in graph.node for name in node.input}
    for tensor in [t for t in graph.initializer if t.name not in used]:
        graph.initializer.remove(tensor)
    return float_nodes


def _add_apart(graph: onnx.GraphProto, node: onnx.NodeProto, weight: FloatArray, apart: str) -> str:
    """Adds the matmul of the channels kept apart to the node's result, after its bias, which stays fused with it."""
    constants = {tensor.name for tensor in graph.initializer}
    readers = [n for n in graph.node if node.output[0] in n.input]
    last = node
    if len(readers) == 1 and readers[0].op_type == "Add" and any(name in constants for name in readers[0].input):
        last = readers[0]
    name = f"{node.name}/apart"
    n = Nodes(f"{name}/")
    product = n("MatMul", apart, n.constant(weight, np.float32))
    n.nodes[0].name = name  # manifests name it
    n("Add", f"{name}/rest", product, out=last.output[0])
    last.output[0] = f"{name}/rest"
    n.put(graph, list(graph.node).index(last) + 1)
    return name
