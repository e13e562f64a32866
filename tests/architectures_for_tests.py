"""The architecture matrix: tiny models of each kind of encoder, trained, exported, fused, quantized and asked.

    python -m tests.architectures_for_tests           writes the JSON of this environment's exporter and docs/architectures.md
    python -m tests.architectures_for_tests --table   writes the tables of docs/architectures.md again from the JSON

Run it from the root of the repository, in an environment with optimum and in one without. The tests compare each recorded row
with a fresh run. A step that fails is recorded
with its reason.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
import torch

from qadeploy import Answerer
from qadeploy.errors import QadeployError
from qadeploy.export.fused import ATTENTION, optimize
from qadeploy.export.onnx import export
from qadeploy.export.parity import parity_windows
from qadeploy.export.quantize.run import quantize
from qadeploy.export.quantize.search import SearchOptions
from qadeploy.export.reference import Reference, make_reference
from qadeploy.files import write_json
from qadeploy.inference.bundle import MODEL, Bundle
from qadeploy.inference.doctor import diagnose
from qadeploy.records import Annotation, Example, FloatArray
from qadeploy.training.checkpoint import Checkpoint
from qadeploy.training.exportable import exporters
from qadeploy.training.options import TrainOptions
from qadeploy.training.runs import HeldOut, dev_set, find_run
from qadeploy.training.train import train
from tests.conftest import triplets, write_jsonl
from tests.models_for_tests import ARCHITECTURES, Architecture

ROOT = Path(__file__).parents[1]
RESULTS = {  # by exporter
    "optimum": ROOT / "benchmarks" / "results" / "architectures.json",
    "torch": ROOT / "benchmarks" / "results" / "architectures-torch.json",
}
DOCS = ROOT / "docs" / "architectures.md"
BEGIN, END = "<!-- matrix: begin -->", "<!-- matrix: end -->"
INT8_MATMULS = ("MatMulInteger", "DynamicQuantizeMatMul", "QGemm", "QLinearMatMul", "MatMulNBits")
QUESTIONS = 24
ANY_LOSS = 100.0  # points of F1: meaningless for a model that has learned little, so logits are compared instead


def run_architecture(architecture: Architecture, folder: Path) -> dict[str, Any]:
    """The row of one architecture: what each step found, or ``why`` it was refused. Writes to ``folder``."""
    row: dict[str, Any] = {"name": architecture.name, "like": architecture.like}
    base = architecture.save(folder / "base")
    made: dict[str, Any] = {}

    def step(name: str, work: Callable[[], dict[str, Any]], *needs: str) -> None:
        missing = [need for need in needs if row[need]["status"] != "ok"]
        if missing:
            row[name] = {"status": "not tried", "why": f"{missing[0]} was refused"}
            return
        try:
            row[name] = {"status": "ok", **work()}
        except QadeployError as error:
            row[name] = {"status": "refused", "why": str(error).replace(f"{folder}/", "")}

    def train_it() -> dict[str, Any]:
        made["reference"], found = _train(base, folder, architecture.learning_rate)
        row["model"] = _describe(made["reference"].checkpoint)
        return found

    def export_it() -> dict[str, Any]:
        made["fp32"] = export(made["reference"], folder / "fp32")
        return _exported(made["reference"], made["fp32"])

    def fuse_it() -> dict[str, Any]:
        return _fused(optimize(made["reference"], made["fp32"], folder / "fused"))

    def quantize_it() -> dict[str, Any]:
        made["int8"] = quantize(
            made["reference"], made["fp32"], folder / "int8", SearchOptions(ANY_LOSS), recipe="int8"
        )
        return _quantized(made["reference"], made["fp32"], made["int8"])

    step("train", train_it)
    step("fp32", export_it, "train")
    step("fused", fuse_it, "fp32")
    step("int8", quantize_it, "fp32")
    return row


def _train(base: Path, folder: Path, learning_rate: float) -> tuple[Reference, dict[str, Any]]:
    """Trains four epochs on questions that a tiny model can learn; one held-out question has all the text as context."""
    data = write_jsonl(folder / "keepers.jsonl", triplets(QUESTIONS))
    options = TrainOptions(
        data=str(data),
        base=str(base),
        out=str(folder / "run"),
        dev_fraction=0.125,
        epochs=4,
        patience=4,
        batch_size=3,
        learning_rate=learning_rate,
        precision="fp32",
        cache=False,
        negatives=0,
        crops=0,
    )
    result = train(options, lambda line: None, progress=False)
    run = find_run(result.folder)
    dev = dev_set(run)
    before = "".join(f"{row['context']} " for row in triplets(QUESTIONS))
    answer = dev[0].answers[0]
    moved = Annotation(answer.text, answer.start + len(before))
    long = Example("long", dev[0].question, before + dev[0].context, (moved,))
    losses = [epoch["train_loss"] for epoch in result.metrics["epochs"] if epoch["train_loss"] is not None]
    # Second, because parity cuts the first, fourth, ... question into short windows.
    reference = make_reference(run, HeldOut("keepers", (dev[0], long, *dev[1:])))
    return replace(reference, timed=reference.timed[:1]), {"loss": losses}  # the speed of a tiny model means nothing


def _describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """What the encoder learned about model and tokenizer, and how the model computes attention."""
    encoder, config = checkpoint.encoder, checkpoint.model.config
    question, context = encoder.encode("Who?"), encoder.encode("Ada.")
    window = encoder.windows(question, context, max_seq_len=encoder.config.position_limit, doc_stride=0)[0]
    tokens = [encoder.token_text(int(i)) for i in window.input_ids]
    begin, end = window.context_begin, window.context_begin + window.context_length
    asked = tokens.index(encoder.token_text(int(question.ids[0])))
    frame = [*tokens[:asked], "question", *tokens[asked + len(question) : begin], "context", *tokens[end:]]
    return {
        "model_type": config.model_type,
        "layers": config.num_hidden_layers,
        "attention": config._attn_implementation,
        "pieces": json.loads(checkpoint.tokenizer.backend_tokenizer.to_str())["model"]["type"],
        "frame": " ".join(frame),
        "token_types": encoder.config.segments,
        "positions": config.max_position_embeddings,
        "longest_input": encoder.config.position_limit,
    }


def _exported(reference: Reference, bundle: Bundle) -> dict[str, Any]:
    """Parity of the logits, their spread (to compare the difference with), and answers equal to PyTorch's."""
    answerer = Answerer.load(bundle.folder, device="cpu")
    same = 0
    for example in reference.examples:
        theirs, ours = (a.answer(example.question, example.context)[0] for a in (reference.answerer, answerer))
        same += (theirs.text, theirs.start) == (ours.text, ours.start) and abs(theirs.score - ours.score) < 1e-3
    return {
        "inputs": bundle.manifest["inputs"],
        "parity": bundle.manifest["parity"],
        "logits_deviation": float(np.std(_logits(reference.answerer, reference))),
        "questions": len(reference.examples),
        "answered_as_pytorch": same,
    }


def _fused(bundle: Bundle) -> dict[str, Any]:
    made = bundle.manifest["made"]
    return {
        "attention": sum(made["fused_nodes"][name] for name in ATTENTION),
        "layers": made["layers"],
        "nodes": {name: count for name, count in made["fused_nodes"].items() if count},
        "max_abs_diff": bundle.manifest["parity"]["max_abs_diff"],
    }


def _quantized(reference: Reference, plain: Bundle, small: Bundle) -> dict[str, Any]:
    """How many matmuls and embedding tables became int8, and how close the logits stayed to PyTorch's."""
    answerer = Answerer.load(small.folder, device="cpu")
    answers = [answerer.answer(e.question, e.context)[0] for e in reference.examples]
    pairs = zip(reference.examples, answers, strict=True)
    graphs = [onnx.load_model_from_string(bundle.read(MODEL)).graph for bundle in (plain, small)]
    weights = {t.name for t in graphs[0].initializer if len(t.dims) == 2}
    matmuls = sum(n.op_type in {"MatMul", "Gemm"} and n.input[1] in weights for n in graphs[0].node)
    counts = Counter(node.op_type for node in graphs[1].node)
    tables = {t.name for t in graphs[1].initializer if t.data_type == onnx.TensorProto.INT8}
    logits = _logits(reference.answerer, reference), _logits(answerer, reference)
    return {
        "recipe": small.manifest["made"]["recipe"],
        "single_node_attention": small.manifest["made"]["attention_nodes"],
        "attentions": small.manifest["made"]["attentions"],
        "products": matmuls,
        "int8_products": sum(counts[name] for name in INT8_MATMULS),
        "int8_embeddings": sum(n.op_type == "Gather" and n.input[0] in tables for n in graphs[1].node),
        "correlation": float(np.corrcoef(*logits)[0, 1]),
        "answered": sum(bool(a.text) and e.context[a.start : a.end] == a.text for e, a in pairs),
        "questions": len(answers),
    }


def _logits(answerer: Answerer, reference: Reference) -> FloatArray:
    """Every start and end logit of the parity windows, each window alone, in one array."""
    found = answerer.model.run(parity_windows(reference.checkpoint, reference.examples))
    return np.concatenate([values for pair in found for values in pair])


# ---------------------------------------------------------------- the table


def recorded(exporter: str) -> dict[str, Any]:
    """The recorded results of an exporter."""
    found: dict[str, Any] = json.loads(RESULTS[exporter].read_text(encoding="utf-8"))
    return found


def matrix(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The table of the steps' results."""
    notes: list[str] = []
    lines = [
        "| architecture | export: largest difference to PyTorch | fused attention | other fused nodes | int8: single-node attention | int8 matmuls | int8 logits' correlation |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [
            row["name"],
            _cell(row, "fp32", lambda f: f"{f['parity']['max_abs_diff']:.0e}", notes),
            _cell(row, "fused", lambda f: f"{f['attention']} of {f['layers']} layers", notes),
            _cell(row, "fused", _other_nodes, []),
            _cell(row, "int8", lambda f: f"{f['single_node_attention']} of {f['attentions']}", []),
            _cell(row, "int8", lambda f: f"{f['int8_products']} of {f['products']}", notes),
            _cell(row, "int8", lambda f: f"{f['correlation']:.4f}", []),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines + (["", *(f"{i}. {note}" for i, note in enumerate(notes, 1)), ""] if notes else [""])


def description(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The table of the models' properties."""
    lines = [
        "| architecture | as | pieces | window | token types | longest input | attention |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        model = row.get("model")
        if model:
            lost = model["positions"] - model["longest_input"]
            cells = [
                *(row["name"], row["like"], model["pieces"], f"`{model['frame']}`"),
                str(model["token_types"]) if model["token_types"] else "not taken",
                f"positions less {lost}" if lost else "all positions",
                model["attention"],
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def environment(results: dict[str, Any]) -> str:
    """The models compared, and the package versions."""
    rows = results["rows"]
    exported = [row["fp32"] for row in rows if row["fp32"]["status"] == "ok"]
    lengths = [f["parity"][end] for f in exported for end in ("shortest", "longest")]
    packages = results["environment"]["packages"]
    exporter = f"optimum-onnx {packages['optimum-onnx']}, " if packages["optimum-onnx"] else ""
    return (
        f"{len(rows)} tiny models. The logits, of a standard deviation of {min(f['logits_deviation'] for f in exported):.1f} to "
        f"{max(f['logits_deviation'] for f in exported):.1f}, are compared on windows of {min(lengths)} to {max(lengths)} tokens, "
        f"alone and in padded batches. torch {packages['torch']}, transformers {packages['transformers']}, {exporter}"
        f"ONNX Runtime {packages['onnxruntime'] or packages['onnxruntime-gpu']}, commit "
        f"{results['environment']['commit']}."
    )


def _other_nodes(found: dict[str, Any]) -> str:
    return ", ".join(f"{count} {name}" for name, count in found["nodes"].items() if name not in ATTENTION)


def _cell(row: dict[str, Any], step: str, show: Callable[[dict[str, Any]], str], notes: list[str]) -> str:
    """A step's result, or "no" and the number of the note with the reason."""
    found = row[step]
    if found["status"] == "ok":
        return show(found)
    if found["status"] == "not tried":
        return "-"
    if found["why"] not in notes:
        notes.append(found["why"])
    return f"no ({notes.index(found['why']) + 1})"


def table(optimum: dict[str, Any], by_torch: dict[str, Any]) -> list[str]:
    """The lines of docs/architectures.md between its markers."""
    return [
        *("Through optimum:", "", *matrix(optimum["rows"]), environment(optimum), ""),
        *("Through PyTorch's own exporter:", "", *matrix(by_torch["rows"]), environment(by_torch), ""),
        *description(optimum["rows"]),
    ]


def written(docs: str) -> str:
    """The text of docs/architectures.md with the tables of the recorded results."""
    before, _, rest = docs.partition(BEGIN)
    _, _, after = rest.partition(END)
    return "\n".join([before + BEGIN, *table(recorded("optimum"), recorded("torch")), END + after])


def run_matrix(architectures: Sequence[Architecture]) -> dict[str, Any]:
    """The content of results/architectures.json."""
    torch.set_num_threads(1)  # threads only make tiny models wait
    rows = []
    for architecture in architectures:
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            rows.append(run_architecture(architecture, Path(folder)))
        steps = ", ".join(f"{name} {rows[-1][name]['status']}" for name in ("train", "fp32", "fused", "int8"))
        click.echo(f"{architecture.name:<12} {time.perf_counter() - started:5.1f} s  {steps}")
    return {"date": time.strftime("%Y-%m-%d", time.gmtime()), "environment": diagnose(), "rows": rows}


@click.command(help=__doc__)
@click.option("--table", "only_table", is_flag=True, help="Only write the table from the JSON.")
def main(only_table: bool) -> None:
    """Runs the matrix and writes its results."""
    if not only_table:
        write_json(RESULTS[exporters()[0]], run_matrix(ARCHITECTURES))
    DOCS.write_text(written(DOCS.read_text(encoding="utf-8")), encoding="utf-8")
    click.echo("\n".join(table(recorded("optimum"), recorded("torch"))))


if __name__ == "__main__":
    main()
