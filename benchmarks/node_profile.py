"""Where a model's time goes: milliseconds of each kind of node in ONNX Runtime's own profile, on one thread.

    python benchmarks/node_profile.py bundles/handbook-int8 benchmarks/results/node_profile.json

For windows of several lengths, real text of the handbook, each alone and unpadded; every length in as many turns. Products
are told apart by the depth of their input, and stand with their operations a second against the machine's measured peak.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx

from qadeploy import Answerer
from qadeploy.bench.peak import measure_peak
from qadeploy.core.windows import pad_batch
from qadeploy.data.readers import read
from qadeploy.files import write_json
from qadeploy.inference.bundle import MODEL
from qadeploy.inference.doctor import diagnose
from qadeploy.inference.layout import SessionSettings
from qadeploy.inference.session import onnxruntime
from qadeploy.records import Window

RUNS = 40
INT8 = {"DynamicQuantizeMatMul", "MatMulIntegerToFloat", "MatMulInteger", "MatMulNBits", "QLinearMatMul"}
PRODUCTS = INT8 | {"MatMul", "FusedMatMul", "Gemm", "FusedGemm"}


@click.command(help=__doc__)
@click.argument("bundle")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--tokens", multiple=True, type=int, default=(128, 176, 256, 384), show_default=True)
def main(bundle: str, out: Path, tokens: tuple[int, ...]) -> None:
    """Profiles, prints the table and writes the JSON."""
    answerer = Answerer.load(bundle, device="cpu", threads=1)
    windows = [_window(answerer, count) for count in tokens]
    with tempfile.TemporaryDirectory() as folder:
        rows = [profile(answerer, window, Path(folder)) for window in windows]
    peak = measure_peak(1)
    for row in rows:
        _print(row, peak.int8)
    opened = answerer.bundle
    assert opened is not None
    made = opened.manifest["made"]
    write_json(
        out,
        {
            "bundle": {"name": opened.name, "precision": opened.precision, "recipe": made.get("recipe")},
            "session": opened.manifest.get("session"),
            "runs": RUNS,
            "peak_int8_a_second": peak.int8,
            "peak_fp32_a_second": peak.fp32,
            "lengths": rows,
            "environment": diagnose(),
        },
    )
    print(f"written to {out}")


def _window(answerer: Answerer, tokens: int) -> Window:
    """A window of exactly so many tokens: the handbook's contexts in a row, cut."""
    examples = read("handbook").examples
    question = answerer.encoder.encode(examples[0].question)
    context = answerer.encoder.encode(" ".join(dict.fromkeys(e.context for e in examples[:100])))
    return answerer.encoder.windows(question, context, max_seq_len=tokens, doc_stride=1)[0]


def profile(answerer: Answerer, window: Window, folder: Path) -> dict[str, Any]:
    """Medians over runs of the milliseconds of each kind of node, with their count and products' operations."""
    opened = answerer.bundle
    assert opened is not None
    ort = onnxruntime()
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / "profile")
    settings = SessionSettings.from_manifest(opened.manifest.get("session"))
    session = ort.InferenceSession(
        opened.read(MODEL),
        options,
        providers=["CPUExecutionProvider"],
        disabled_optimizers=list(settings.disabled_optimizers) or None,
    )
    batch = pad_batch([window], 0)
    feeds = {i.name: batch[i.name] for i in session.get_inputs()}
    for _ in range(RUNS):
        session.run(None, feeds)
    events = json.loads(Path(session.end_profiling()).read_text())
    runs: list[dict[str, float]] = []
    counts: dict[str, int] = defaultdict(int)
    seen: set[str] = set()  # nodes of the run under way: one that comes again begins the next
    for event in events:
        if event.get("cat") != "Node" or not event["name"].endswith("_kernel_time"):
            continue
        kind, node = _kind(event["args"]), event["args"]["node_index"]
        if not runs or node in seen:
            runs.append(defaultdict(float))
            seen.clear()
        seen.add(node)
        runs[-1][kind] += event["dur"] / 1000
        counts[kind] += 1
    kept = runs[len(runs) // 4 :]  # the first are warming up
    kinds = sorted({kind for run in kept for kind in run})
    medians = {kind: statistics.median(run.get(kind, 0.0) for run in kept) for kind in kinds}
    total = sum(medians.values())
    parts: list[dict[str, Any]] = [
        {"kind": kind, "nodes": round(counts[kind] / len(runs)), "ms": ms, "share": ms / total}
        for kind, ms in sorted(medians.items(), key=lambda item: -item[1])
    ]
    operations = _int8_operations(opened.read(MODEL)) * len(window)
    integer = sum(p["ms"] for p in parts if p["kind"].split()[0] in INT8)
    return {
        "tokens": len(window),
        "ms": total,
        "parts": parts,
        "int8_products": {"ms": integer, "operations_a_second": operations / (integer / 1000) if integer else None},
    }


def _kind(arguments: dict[str, Any]) -> str:
    name = str(arguments["op_name"])
    shapes: Sequence[dict[str, list[int]]] = arguments.get("input_type_shape") or []
    if name in PRODUCTS and shapes:
        shape = next(iter(shapes[0].values()))
        return f"{name} of depth {shape[-1]}" if shape else name
    return name


def _int8_operations(model: bytes) -> float:
    """Operations a token of the products with int8 weights."""
    proto = onnx.load_model_from_string(model)
    integers = {t.name: t.dims for t in proto.graph.initializer if t.data_type in {2, 3} and len(t.dims) == 2}
    products = [n for n in proto.graph.node if n.op_type in INT8]
    return float(sum(2 * np.prod(integers[name]) for n in products for name in n.input if name in integers))


def _print(row: dict[str, Any], peak: float) -> None:
    print(f"{row['tokens']} tokens: {row['ms']:.2f} ms")
    for part in row["parts"]:
        if part["share"] >= 0.005:
            print(f"  {part['kind']:<40} x{part['nodes']:<3} {part['ms']:>7.2f} ms  {part['share']:.1%}")
    rate = row["int8_products"]["operations_a_second"]
    if rate:
        print(f"  int8 products: {rate / 1e9:.0f} G operations/s, {rate / peak:.2f} of the measured peak")


if __name__ == "__main__":
    main()
