"""The matmuls of a graph with constant weights, Y = X W, and real values of X from windows of text.

They show how large the rounding error of a matmul would be in int8, and what reduces it: ranking all matmuls takes seconds,
where one quantized model for each would take minutes. A matmul whose result is added to the residual stream is judged by its
effect on the sum: the same error matters less if the sum is large.
"""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from qadeploy.core.windows import pad_batch
from qadeploy.export.graph import Graph
from qadeploy.inference.session import onnxruntime, session_options
from qadeploy.records import FloatArray, Window

TOKENS = 8  # of each window


@dataclass(frozen=True, slots=True, eq=False)
class MatMul:
    """A MatMul node: its name, the value that is X, and W's tensor.

    ``joins`` is the sum of its result (with bias) and another computed value; None if there is no such sum.
    """

    name: str
    source: str
    tensor: onnx.TensorProto
    joins: str | None = None

    @property
    def weight(self) -> FloatArray:
        """W, ``[depth, columns]``: a new copy each time, so keep it only while it is needed."""
        return np.asarray(numpy_helper.to_array(self.tensor))


@dataclass(frozen=True, slots=True, eq=False)
class Activations:
    """The inputs of matmuls on windows of text, from the float model: the ranges of every X, and some of its rows.

    ``rows`` maps each X to the same sample of tokens, ``[rows, depth]``; ``windows`` ``[rows]`` is the window of each row;
    ``lows`` and ``highs`` are the least and largest values over all tokens of a window, and zero, ``[windows, depth]``;
    ``norms`` maps the sums that matmuls join to the norms of their rows, ``[rows]``.
    """

    rows: Mapping[str, FloatArray]
    windows: NDArray[np.int64]
    lows: Mapping[str, FloatArray]
    highs: Mapping[str, FloatArray]
    norms: Mapping[str, FloatArray]

    def peaks(self, source: str) -> FloatArray:
        """The largest absolute value of each channel of an X, ``[depth]``."""
        return np.asarray(np.maximum(-self.lows[source], self.highs[source]).max(axis=0), dtype=np.float32)

    def error(
        self, matmuls: Sequence[MatMul], scales: FloatArray | None = None, float_rows: NDArray[np.int64] | None = None
    ) -> float:
        """The joint ``rounding_error`` of matmuls that read one X; each window has its own ranges."""
        source = matmuls[0].source
        weight = np.concatenate([p.weight for p in matmuls], axis=1)
        joins = matmuls[0].joins if len(matmuls) == 1 else None
        lows, highs = self.lows[source], self.highs[source]
        if scales is not None:
            lows, highs = lows / scales, highs / scales
        if float_rows is not None:
            lows, highs = np.delete(lows, float_rows, axis=1), np.delete(highs, float_rows, axis=1)
        ranges = (lows.min(axis=1)[self.windows], highs.max(axis=1)[self.windows])
        return rounding_error(self.rows[source], weight, scales, float_rows, self.norms.get(joins or ""), ranges)


def find_matmuls(proto: onnx.ModelProto) -> list[MatMul]:
    """Every MatMul node with constant weights of two dimensions, in the order of the graph."""
    graph = Graph(proto)
    constants = graph.constants

    def joins(value: str) -> str | None:
        while len(graph.readers[value]) == 1 and graph.readers[value][0].op_type == "Add":
            add = graph.readers[value][0]
            value = add.output[0]
            if not any(name in constants for name in add.input):
                return value
        return None

    return [
        MatMul(node.name, node.input[0], constants[node.input[1]], joins(node.output[0]))
        for node in proto.graph.node
        if node.op_type == "MatMul" and node.input[1] in constants and len(constants[node.input[1]].dims) == 2
    ]


def rounding_errors(model: bytes, activations: Activations) -> dict[str, float]:
    """The relative error that int8 would cause in every matmul with constant weights, by name."""
    return {m.name: activations.error([m]) for m in find_matmuls(onnx.load_model_from_string(model))}


def share_weights(proto: onnx.ModelProto) -> list[tuple[str, ...]]:
    """The names of the matmuls that read each weight: several in ALBERT, whose layers share them, and in DeBERTa."""
    readers: dict[str, list[str]] = defaultdict(list)
    for matmul in find_matmuls(proto):
        readers[matmul.tensor.name].append(matmul.name)
    return [tuple(names) for names in readers.values()]


def worst(errors: Mapping[str, float], share: float, sharing: Iterable[Sequence[str]]) -> list[str]:
    """The names of at most the ``share`` (0 to 1) of matmuls with the largest errors, the worst first.

    Those that share a weight (``share_weights``) stay together, judged by the largest error: where some readers of a weight
    are in int8 and others in float, the latter would read rounded values, converted anew at each run.
    """
    known = [[name for name in names if name in errors] for names in sharing]
    kept: list[str] = []
    for names in sorted(filter(None, known), key=lambda names: -max(errors[name] for name in names)):
        if len(kept) + len(names) <= int(len(errors) * share):
            kept += names
    return kept


def measure_activations(model: bytes, windows: Sequence[Window]) -> Activations:
    """Runs the float model on the windows and keeps the rows of ``TOKENS`` tokens of each, evenly spread."""
    proto = onnx.load_model_from_string(model)
    del model  # as large as the weights; the caller has handed it over
    matmuls = find_matmuls(proto)
    sources = list(dict.fromkeys(p.source for p in matmuls))
    names = list(dict.fromkeys([*sources, *(p.joins for p in matmuls if p.joins)]))
    outputs = {output.name for output in proto.graph.output}
    joined = {p.joins for p in matmuls if p.joins}
    del matmuls  # and with them the weights
    proto.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in names if name not in outputs)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        onnx.save(proto, file)
        del proto
        session = onnxruntime().InferenceSession(str(file), session_options(), providers=["CPUExecutionProvider"])
    inputs = [i.name for i in session.get_inputs()]
    kept: dict[str, list[FloatArray]] = defaultdict(list)
    lows: dict[str, list[FloatArray]] = defaultdict(list)
    highs: dict[str, list[FloatArray]] = defaultdict(list)
    numbers: list[int] = []
    for number, window in enumerate(windows):
        batch = pad_batch([window], 0)
        count = min(TOKENS, len(window))
        places = (np.arange(count) + 0.5) / count
        numbers += [number] * count
        values = session.run(names, {name: batch[name] for name in inputs})
        for name, value in zip(names, values, strict=True):
            rows = value.reshape(-1, value.shape[-1])
            kept[name].append(rows[(places * len(rows)).astype(np.int64)])  # tokens or, in DeBERTa, distances
            lows[name].append(np.minimum(rows.min(axis=0), 0))
            highs[name].append(np.maximum(rows.max(axis=0), 0))
    whole = {name: np.concatenate(parts) for name, parts in kept.items()}
    return Activations(
        {name: whole[name] for name in sources},
        np.asarray(numbers, dtype=np.int64),
        {name: np.stack(lows[name]) for name in sources},
        {name: np.stack(highs[name]) for name in sources},
        {name: np.linalg.norm(whole[name], axis=1) for name in joined},
    )


def rounding_error(
    inputs: FloatArray,
    weight: FloatArray,
    scales: FloatArray | None = None,
    float_rows: NDArray[np.int64] | None = None,
    norms: FloatArray | None = None,
    ranges: tuple[FloatArray, FloatArray] | None = None,
) -> float:
    """Relative error of X W under dynamic int8; ``[rows, depth]``, ``[depth, columns]``.

    It is the root mean square over rows of ||y - y8|| / ||y||: every token counts the same, because the few with huge values
    (mostly separators) would hide what happens to the others. ``norms`` ``[rows]``, if given, replace ||y||.

    Int8 rounds X with one scale per tensor and W with one per column. Before that, ``scales`` ``[depth]`` divide X's columns
    and multiply W's rows; ``float_rows`` of W, and the same columns of X, are not rounded but added in float.
    ``ranges`` are the least and largest value of the tensor that each row belongs to, after scales and float rows, ``[rows]``
    each; without them the rows together are one tensor.
    """
    exact = inputs @ weight
    rest_inputs, rest_weight, rounded = inputs, weight, np.zeros_like(exact)
    if scales is not None:
        rest_inputs, rest_weight = rest_inputs / scales, rest_weight * scales[:, None]
    if float_rows is not None and len(float_rows):
        rounded = inputs[:, float_rows] @ weight[float_rows]
        rest_inputs, rest_weight = rest_inputs.copy(), rest_weight.copy()
        rest_inputs[:, float_rows] = 0
        rest_weight[float_rows] = 0
    rounded = rounded + _round_inputs(rest_inputs, ranges) @ _round_columns(rest_weight)
    lengths = np.maximum(np.linalg.norm(exact, axis=1) if norms is None else norms, 1e-12)
    return float(np.sqrt(np.mean((np.linalg.norm(exact - rounded, axis=1) / lengths) ** 2)))


def _round_inputs(values: FloatArray, ranges: tuple[FloatArray, FloatArray] | None) -> FloatArray:
    low, high = ranges or (values.min(initial=0, keepdims=True)[0], values.max(initial=0, keepdims=True)[0])
    scale = np.asarray((high - low) / 255, dtype=np.float32)
    scale[scale == 0] = 1.0
    zero, scale = np.rint(-low / scale)[:, None], scale[:, None]
    return np.asarray((np.clip(np.rint(values / scale) + zero, 0, 255) - zero) * scale, dtype=np.float32)


def _round_columns(weight: FloatArray) -> FloatArray:
    scale = np.abs(weight).max(axis=0, keepdims=True) / 127
    scale[scale == 0] = 1.0
    return np.asarray(np.clip(np.rint(weight / scale), -127, 127) * scale, dtype=np.float32)
