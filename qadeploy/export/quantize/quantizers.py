"""Ways to quantize a graph: embedding tables, dynamic and static int8, only weights. Model bytes to model bytes."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from qadeploy.core.windows import pad_batch
from qadeploy.export.fusion import only_errors
from qadeploy.inference.bundle import MODEL
from qadeploy.integrations.onnx_standalone.nodes import Nodes
from qadeploy.records import Window

LARGE_TABLE = 1000  # rows
_KINDS = ["MatMul", "Gemm"]
_MATMULS: dict[str, Any] = {
    "op_types_to_quantize": _KINDS,
    "per_channel": True,
    "extra_options": {
        "MatMulConstBOnly": True,
        "DefaultTensorType": onnx.TensorProto.FLOAT,
        "OpTypesToExcludeOutputQuantization": _KINDS,  # a bias follows: rounding before it costs time and accuracy
    },
}
BLOCK = 128  # weights that share a scale if only weights are quantized


def quantize_embeddings(model: bytes) -> bytes:
    """The model with large embedding tables in int8, one scale per row: Gather(rows) * Gather(scales).

    ONNX Runtime's own quantizer gives a whole table one scale, which costs more accuracy.
    """
    proto = onnx.load_model_from_string(model)
    del model  # as large as the weights; the caller has handed it over
    graph = proto.graph
    tables = {t.name: t for t in graph.initializer}
    users = Counter(name for node in graph.node for name in node.input)
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        table = tables.get(node.input[0]) if node.op_type == "Gather" else None
        if table is None or not _is_large(table) or users[table.name] > 1:
            nodes.append(node)
            continue
        rows = onnx.numpy_helper.to_array(table)
        scales = np.abs(rows).max(axis=1, keepdims=True) / 127
        scales[scales == 0] = 1.0
        name, ids, out = table.name, node.input[1], node.output[0]
        graph.initializer.remove(table)
        rounded = np.rint(rows / scales).astype(np.int8)
        graph.initializer.append(onnx.numpy_helper.from_array(rounded, f"{name}_int8"))
        graph.initializer.append(onnx.numpy_helper.from_array(scales.astype(np.float32), f"{name}_scale"))
        n = Nodes(f"{name}_rows/")
        values = n("Cast", n("Gather", f"{name}_int8", ids), to=onnx.TensorProto.FLOAT)
        n("Mul", values, n("Gather", f"{name}_scale", ids), out=out)
        nodes += n.nodes
    del graph.node[:]
    graph.node.extend(nodes)
    return bytes(proto.SerializeToString())


def quantize_dynamic_int8(model: bytes, float_nodes: Iterable[str] = (), *, reduce_range: bool = False) -> bytes:
    """The model with int8 weights, one scale per column, and activations rounded by their ranges at run time.

    Only matmuls with constant weights change: attention's own matmuls stay in float, and so do ``float_nodes`` (names). With
    ``reduce_range`` weights have 7 bits, so that no matmul saturates on a CPU without VNNI.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with only_errors(), tempfile.TemporaryDirectory() as folder:
        source, path = Path(folder) / "source.onnx", Path(folder) / MODEL
        source.write_bytes(model)
        del model  # as large as the weights; the quantizer makes fewer copies of a file
        quantize_dynamic(
            source,
            path,
            reduce_range=reduce_range,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=list(float_nodes),
            **_MATMULS,
        )
        return path.read_bytes()


def quantize_static_int8(
    model: bytes, windows: Sequence[Window], float_nodes: Iterable[str] = (), *, reduce_range: bool = False
) -> bytes:
    """The model with int8 weights, one scale per column, and activations rounded by their ranges on ``windows``.

    As in ``quantize_dynamic_int8``, only matmuls with constant weights change; the others, such as the rotary angles of
    positions, are named to the static quantizer, which would round them too.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    proto = onnx.load_model_from_string(model)
    del model
    inputs = [i.name for i in proto.graph.input]
    weights = {tensor.name for tensor in proto.graph.initializer}
    computed = [n.name for n in proto.graph.node if n.op_type in _KINDS and n.input[1] not in weights]
    _add_activation_types(proto, weights)

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches = iter([{name: pad_batch([w], 0)[name] for name in inputs} for w in windows])

        def get_next(self) -> dict[str, Any] | None:
            return next(self.batches, None)

    with only_errors(), tempfile.TemporaryDirectory() as folder:
        source, path = Path(folder) / "source.onnx", Path(folder) / MODEL
        onnx.save(proto, source)
        del proto
        quantize_static(
            source,
            path,
            Reader(),
            quant_format=QuantFormat.QDQ,
            reduce_range=reduce_range,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=[*float_nodes, *computed],
            **_MATMULS,
        )
        return _round_only_for_matmuls(onnx.load(path))


def quantize_weights_int8(model: bytes) -> bytes:
    """The model with 8-bit weights, one scale per ``BLOCK`` of each column; activations are rounded block by block."""
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

    with only_errors():
        config = DefaultWeightOnlyQuantConfig(block_size=BLOCK, is_symmetric=True, accuracy_level=4, bits=8)
        proto = onnx.load_model_from_string(model)
        del model
        quantizer = MatMulNBitsQuantizer(proto, algo_config=config)
        quantizer.process()
        return bytes(quantizer.model.model.SerializeToString())


def _add_activation_types(proto: onnx.ModelProto, weights: Set[str]) -> None:
    """Notes the type of what each matmul reads; the static quantizer leaves activations of unknown type in float.

    ONNX finds no types behind ONNX Runtime's own operators, such as a fused attention.
    """
    graph = proto.graph
    read = {node.input[0] for node in graph.node if node.op_type in _KINDS and node.input[1] in weights}
    for name in sorted(read - {value.name for value in graph.value_info}):
        graph.value_info.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))


def _round_only_for_matmuls(proto: onnx.ModelProto) -> bytes:
    """Lets all but the int8 matmuls read the exact activations; the static quantizer rounds them for every reader."""
    makers = {name: node for node in proto.graph.node for name in node.output}

    def is_dequantized(name: str) -> bool:
        return name in makers and makers[name].op_type == "DequantizeLinear"

    for node in proto.graph.node:
        if node.op_type in _KINDS and is_dequantized(node.input[1]):
            continue
        for i, name in enumerate(node.input):
            rounded = makers.get(makers[name].input[0]) if is_dequantized(name) else None
            if rounded is not None:
                node.input[i] = rounded.input[0]
    return bytes(proto.SerializeToString())


def _is_large(table: onnx.TensorProto) -> bool:
    """Whether this is a float table of many rows, each long enough that a scale of its own costs little."""
    rows, columns = table.dims if len(table.dims) == 2 else (0, 0)
    return bool(table.data_type == onnx.TensorProto.FLOAT and rows >= LARGE_TABLE and columns >= 8)
