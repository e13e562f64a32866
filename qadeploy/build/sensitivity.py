"""Which products of a graph int8 would hurt most: its rounding simulated on real activations.

For a product Y = X W with constant W, dynamic int8 rounds X with one scale a tensor and W with one
scale a column. The relative error ||Y - Y8|| / ||Y|| (Frobenius norms) is computed in numpy for X
as it really comes, from one run of the float graph, so ranking all products costs seconds, not one
quantized model a product. Few products stand out: those whose inputs or weights have outliers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from qadeploy.qa.windows import pad_batch
from qadeploy.records import FloatArray, Window
from qadeploy.runtime.session import onnxruntime

OUTLIER = 2.5  # times the median error
MOST = 6  # at most one product in this many stays in float


@dataclass(frozen=True, slots=True)
class Product:
    """A MatMul node with constant weights and the relative error that int8 would bring to it."""

    name: str
    error: float


def rank_products(model: bytes, windows: Sequence[Window]) -> list[Product]:
    """Every product with constant weights, the most harmed by int8 first, measured on ``windows``."""
    proto = onnx.load_model_from_string(model)
    weights = {t.name: t for t in proto.graph.initializer}
    nodes = [n for n in proto.graph.node if n.op_type == "MatMul" and n.input[1] in weights]
    nodes = [n for n in nodes if len(weights[n.input[1]].dims) == 2]
    known = {o.name for o in proto.graph.output}
    wanted = list(dict.fromkeys(n.input[0] for n in nodes))
    proto.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in wanted if name not in known)
    ort = onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    inputs = [i.name for i in session.get_inputs()]
    errors: dict[str, list[float]] = {n.name: [] for n in nodes}
    for window in windows:
        batch = pad_batch([window], 0)
        found = dict(zip(wanted, session.run(wanted, {name: batch[name] for name in inputs}), strict=True))
        for node in nodes:
            weight = onnx.numpy_helper.to_array(weights[node.input[1]])
            errors[node.name].append(rounding_error(found[node.input[0]].reshape(-1, weight.shape[0]), weight))
    ranked = [Product(name, float(np.mean(values))) for name, values in errors.items()]
    return sorted(ranked, key=lambda p: -p.error)


def rounding_error(inputs: FloatArray, weight: FloatArray) -> float:
    """Relative error of ``inputs @ weight`` under dynamic int8; ``[rows, depth]`` and ``[depth, columns]``."""
    exact = inputs @ weight
    rounded = _round_inputs(inputs) @ _round_columns(weight)
    return float(np.linalg.norm(exact - rounded) / max(float(np.linalg.norm(exact)), 1e-12))


def outliers(products: Sequence[Product]) -> list[str]:
    """Names of the products whose error stands out (see ``OUTLIER``), at most one in ``MOST`` of all."""
    if not products:
        return []
    limit = OUTLIER * float(np.median([p.error for p in products]))
    return [p.name for p in products[: len(products) // MOST] if p.error > limit]


def _round_inputs(values: FloatArray) -> NDArray[Any]:
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    scale = (high - low) / 255 or 1.0
    zero = round(-low / scale)
    return np.asarray((np.clip(np.rint(values / scale) + zero, 0, 255) - zero) * scale)


def _round_columns(weight: FloatArray) -> NDArray[Any]:
    scale = np.abs(weight).max(axis=0, keepdims=True) / 127
    scale[scale == 0] = 1.0
    return np.asarray(np.clip(np.rint(weight / scale), -127, 127) * scale)
