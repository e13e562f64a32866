"""Quantization: an fp32 bundle to a new dynamic int8 one, behind a gate of EM and F1.

Weights become int8 once, one scale a column, activations int8 as they come (ONNX Runtime's dynamic
quantization); embedding tables become int8 with one scale a row. Only products with constant weights
are touched: attention's own products stay in float.
"""

from __future__ import annotations

import logging
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from qadeploy.build.manifest import finish_bundle
from qadeploy.build.parity import parity_windows
from qadeploy.build.report import Reference, make_answerer
from qadeploy.build.sensitivity import Product, outliers, rank_products
from qadeploy.bundle import MODEL, Bundle, open_bundle, writing_bundle
from qadeploy.errors import GateError
from qadeploy.evaluate import evaluate

SENSITIVITY_WINDOWS = 12
LARGE_TABLE = 1000  # rows


def quantize(reference: Reference, source: Bundle, out: Path, max_f1_drop: float) -> Bundle:
    """Writes the int8 bundle ``out`` from the fp32 bundle ``source`` and returns it, verified.

    The recipes form a ladder, see ``recipes``: each leaves more of the products in float that a
    simulation on real activations finds most harmed, so each is slower and closer to PyTorch than
    the one before. The dev part names the first rung that loses at most ``max_f1_drop`` points of F1
    there; the held-out questions judge it, and where they refuse it, the next rung is tried. The
    manifest says what was tried. Raises GateError where every rung loses more than ``max_f1_drop``
    against PyTorch on the held-out questions, and then ``out`` is left as it was.
    """
    model = source.read(MODEL)
    windows = parity_windows(reference.checkpoint, reference.dev or reference.examples)[:SENSITIVITY_WINDOWS]
    embedded = quantize_embeddings(model)
    dev = reference.dev or reference.examples
    before = evaluate(reference.answerer, dev).scores.f1
    tried: list[dict[str, Any]] = []
    for recipe, kept in recipes(rank_products(model, windows)):
        quantized = quantize_dynamic_int8(embedded, kept)
        answerer = make_answerer(reference, quantized, {})
        rung: dict[str, Any] = {"recipe": recipe, "dev_f1_lost": before - evaluate(answerer, dev).scores.f1}
        tried.append(rung)
        if not rung["dev_f1_lost"] <= max_f1_drop:
            continue
        rung["f1_lost"] = reference.scores.f1 - evaluate(answerer, reference.examples).scores.f1
        if not rung["f1_lost"] <= max_f1_drop:
            continue
        with writing_bundle(out) as work:
            (work / MODEL).write_bytes(quantized)
            made = {
                "graph": "plain",
                "from": source.name,
                "recipe": recipe,
                "float_nodes": kept,
                "max_f1_drop": max_f1_drop,
                "tried": tried,
            }
            finish_bundle(reference, work, out.name, precision="int8", made=made, exact=False)
        return open_bundle(out)
    losses = "; ".join(
        f"{rung['recipe']}: {rung['dev_f1_lost']:.2f} on the dev part"
        + (f", {rung['f1_lost']:.2f} held out" if "f1_lost" in rung else "")
        for rung in tried
    )
    raise GateError(
        f"{out}: every int8 recipe loses more than {max_f1_drop} points of F1, judged on {reference.questions}, so none was "
        f"written ({losses}). Allow more with --max-f1-drop, or judge on more questions with --eval-data"
    )


def recipes(products: Sequence[Product]) -> list[tuple[str, list[str]]]:
    """The ladder: names of recipes and the products that each leaves in float, the most harmed first.

    Outliers only, then the worst quarter, then the worst half of ``products`` (ranked, worst first).
    """
    names = [p.name for p in products]
    few = outliers(products)
    ladder = [("int8" if not few else f"int8, {len(few)} outlying products in float", few)]
    for share, what in ((4, "quarter"), (2, "half")):
        kept = names[: len(names) // share]
        if len(kept) > len(few):
            ladder.append((f"int8, the worst {what} of the products in float ({len(kept)} of {len(names)})", kept))
    return ladder


def quantize_embeddings(model: bytes) -> bytes:
    """The model with large embedding tables in int8, one scale a row: Gather(rows) * Gather(scales).

    ONNX Runtime's own quantizer gives a whole table one scale, which costs more than all of a row's.
    """
    proto = onnx.load_model_from_string(model)
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
        nodes += [
            onnx.helper.make_node("Gather", [f"{name}_int8", ids], [f"{out}_int8"], f"{node.name}_int8"),
            onnx.helper.make_node("Gather", [f"{name}_scale", ids], [f"{out}_scale"], f"{node.name}_scale"),
            onnx.helper.make_node(
                "Cast", [f"{out}_int8"], [f"{out}_cast"], f"{node.name}_cast", to=onnx.TensorProto.FLOAT
            ),
            onnx.helper.make_node("Mul", [f"{out}_cast", f"{out}_scale"], [out], f"{node.name}_mul"),
        ]
    del graph.node[:]
    graph.node.extend(nodes)
    return bytes(proto.SerializeToString())


def quantize_dynamic_int8(model: bytes, float_nodes: Iterable[str] = ()) -> bytes:
    """The model with int8 weights, one scale a column; ``float_nodes`` (names) stay as they are."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    logging.getLogger("onnxruntime.quantization").setLevel(logging.ERROR)
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)  # the quantizer warns through the root logger that it would like other shapes
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / MODEL
            quantize_dynamic(
                onnx.load_model_from_string(model),
                path,
                op_types_to_quantize=["MatMul", "Gemm"],
                per_channel=True,
                reduce_range=not has_vnni(),
                weight_type=QuantType.QInt8,
                nodes_to_exclude=list(float_nodes),
                extra_options={"MatMulConstBOnly": True, "DefaultTensorType": onnx.TensorProto.FLOAT},
            )
            return path.read_bytes()
    finally:
        root.setLevel(level)


def _is_large(table: onnx.TensorProto) -> bool:
    """True for a float table of many rows, each long enough that a scale of its own costs little."""
    rows, columns = table.dims if len(table.dims) == 2 else (0, 0)
    return bool(table.data_type == onnx.TensorProto.FLOAT and rows >= LARGE_TABLE and columns >= 8)


def has_vnni() -> bool:
    """True where the CPU adds int8 products in 32 bits (VNNI); without it 8-bit weights can saturate."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return any(flag in flags for flag in ("avx512_vnni", "avx_vnni", "asimddp"))
