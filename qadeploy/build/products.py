"""The products of a graph with constant weights, Y = X W, and X as it really comes on windows of text.

Everything that decides on int8 looks at these: how much rounding would harm a product, and what protects it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from qadeploy.qa.windows import pad_batch
from qadeploy.records import FloatArray, Window
from qadeploy.runtime.session import onnxruntime


@dataclass(frozen=True, slots=True, eq=False)
class Product:
    """A MatMul node: its name, the value that is X, and W ``[depth, columns]``."""

    name: str
    source: str
    weight: FloatArray


def find_products(proto: onnx.ModelProto) -> list[Product]:
    """Every MatMul of two dimensions with constant weights, in the order of the graph."""
    constants = {tensor.name: tensor for tensor in proto.graph.initializer}
    return [
        Product(node.name, node.input[0], numpy_helper.to_array(constants[node.input[1]]))
        for node in proto.graph.node
        if node.op_type == "MatMul" and node.input[1] in constants and len(constants[node.input[1]].dims) == 2
    ]


def collect_inputs(model: bytes, windows: Sequence[Window]) -> dict[str, list[FloatArray]]:
    """For each product's X, by name, its values on every window, ``[tokens, depth]``, from the float model."""
    proto = onnx.load_model_from_string(model)
    names = list(dict.fromkeys(product.source for product in find_products(proto)))
    known = {output.name for output in proto.graph.output}
    proto.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in names if name not in known)
    ort = onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    taken = [i.name for i in session.get_inputs()]
    found: dict[str, list[FloatArray]] = {name: [] for name in names}
    for window in windows:
        batch = pad_batch([window], 0)
        values = session.run(names, {name: batch[name] for name in taken})
        for name, value in zip(names, values, strict=True):
            found[name].append(value.reshape(-1, value.shape[-1]))
    return found


def rounding_error(
    inputs: FloatArray,
    weight: FloatArray,
    scales: FloatArray | None = None,
    float_rows: NDArray[np.int64] | None = None,
) -> float:
    """Relative error of X W under dynamic int8; ``[rows, depth]``, ``[depth, columns]``.

    It is the root mean square over rows of ||y - y8|| / ||y||: every token counts the same, or the few with huge values
    (separators, mostly) would hide what happens to the others.

    Int8 rounds X with one scale a tensor and W with one a column. ``scales`` ``[depth]`` divide X's columns and
    multiply W's rows before; ``float_rows`` of W, with X's columns, are left out of the rounding and added in float.
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
    rounded = rounded + _round_inputs(rest_inputs) @ _round_columns(rest_weight)
    norms = np.maximum(np.linalg.norm(exact, axis=1), 1e-12)
    return float(np.sqrt(np.mean((np.linalg.norm(exact - rounded, axis=1) / norms) ** 2)))


def _round_inputs(values: FloatArray) -> FloatArray:
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    scale = (high - low) / 255 or 1.0
    zero = round(-low / scale)
    return np.asarray((np.clip(np.rint(values / scale) + zero, 0, 255) - zero) * scale, dtype=np.float32)


def _round_columns(weight: FloatArray) -> FloatArray:
    scale = np.abs(weight).max(axis=0, keepdims=True) / 127
    scale[scale == 0] = 1.0
    return np.asarray(np.clip(np.rint(weight / scale), -127, 127) * scale, dtype=np.float32)
