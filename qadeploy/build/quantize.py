"""Quantization: an fp32 bundle to a new dynamic int8 one, behind a gate of EM and F1.

Weights become int8 once, activations int8 as they come (ONNX Runtime's dynamic quantization), and
only products with constant weights are touched: attention's own products stay in float.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import onnx

from qadeploy.build.manifest import finish_bundle
from qadeploy.build.parity import parity_windows
from qadeploy.build.report import Reference, make_answerer
from qadeploy.build.sensitivity import outliers, rank_products
from qadeploy.bundle import MODEL, Bundle, open_bundle, writing_bundle
from qadeploy.errors import GateError
from qadeploy.evaluate import evaluate

SENSITIVITY_WINDOWS = 12


def quantize(reference: Reference, source: Bundle, out: Path, max_f1_drop: float) -> Bundle:
    """Writes the int8 bundle ``out`` from the fp32 bundle ``source`` and returns it, verified.

    The plainest recipe rounds every product with constant weights, less the few that a simulation
    on real activations finds harmed far beyond the others (see ``sensitivity``). Where that still
    loses more than ``max_f1_drop`` points of F1 on the dev part, the last product of each
    feed-forward block stays in float too, if that loses less. The held-out questions judge the one
    chosen: raises GateError where it loses more than ``max_f1_drop`` against PyTorch, and then
    ``out`` is left as it was.
    """
    model = source.read(MODEL)
    recipe, kept, quantized = _choose(reference, model, max_f1_drop)
    with writing_bundle(out) as work:
        (work / MODEL).write_bytes(quantized)
        made = {
            "graph": "plain",
            "from": source.name,
            "recipe": recipe,
            "float_nodes": kept,
            "max_f1_drop": max_f1_drop,
        }
        measured = finish_bundle(reference, work, out.name, precision="int8", made=made, exact=False)["measured"]
        if -measured["f1_change"] > max_f1_drop:
            low, high = measured["f1_change_interval"]
            raise GateError(
                f"{out}: int8 loses {-measured['f1_change']:.2f} points of F1 (95 % interval {-high:.2f} to {-low:.2f}) on "
                f"{reference.questions}, more than {max_f1_drop}: it was not written. Allow more with --max-f1-drop, or "
                "judge on more questions with --eval-data"
            )
    return open_bundle(out)


def _choose(reference: Reference, model: bytes, max_f1_drop: float) -> tuple[str, list[str], bytes]:
    examples = reference.dev or reference.examples
    before = evaluate(reference.answerer, examples).scores.f1
    best: tuple[float, str, list[str], bytes] | None = None
    windows = parity_windows(reference.checkpoint, examples)[:SENSITIVITY_WINDOWS]
    few = outliers(rank_products(model, windows))
    plain = f"int8, {len(few)} outlying products in float" if few else "int8"
    more = list(dict.fromkeys([*few, *feed_forward_outputs(model)]))
    for recipe, kept in ((plain, few), ("int8, feed-forward outputs in float", more)):
        quantized = quantize_dynamic_int8(model, kept)
        lost = before - evaluate(make_answerer(reference, quantized, {}), examples).scores.f1
        if best is None or lost < best[0]:
            best = (lost, recipe, kept, quantized)
        if best[0] <= max_f1_drop:
            break
    assert best is not None  # noqa: S101 - the loop runs
    return best[1:]


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
                op_types_to_quantize=["MatMul", "Gemm", "Gather"],
                per_channel=True,
                reduce_range=not has_vnni(),
                weight_type=QuantType.QInt8,
                nodes_to_exclude=list(float_nodes),
                extra_options={"MatMulConstBOnly": True, "DefaultTensorType": onnx.TensorProto.FLOAT},
            )
            return path.read_bytes()
    finally:
        root.setLevel(level)


def feed_forward_outputs(model: bytes) -> list[str]:
    """Names of the products that shrink a feed-forward block back: constant weights with more rows than columns."""
    graph = onnx.load_model_from_string(model).graph
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    found = []
    for node in graph.node:
        shape: tuple[Any, ...] = shapes.get(node.input[1], ()) if node.op_type == "MatMul" else ()
        if len(shape) == 2 and shape[0] > shape[1] > 2:
            found.append(node.name)
    return found


def has_vnni() -> bool:
    """True where the CPU adds int8 products in 32 bits (VNNI); without it 8-bit weights can saturate."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return any(flag in flags for flag in ("avx512_vnni", "avx_vnni", "asimddp"))
