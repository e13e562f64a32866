"""The span head against the Python decoder: windows, spans, scores, and what the head costs.

    python -m benchmarks.span_head --bundle bundles/base --bundle bundles/base-int8 --data squad.json

Four families of encoders, tiny and with random weights (those of ``tests/models_for_tests.py``), and the bundles given read
questions of the handbook and of ``--data``; a tiny model's windows are of at most 160 tokens. Each window runs alone and, where the
model takes a mask, once more in a padded batch. The cost of the head is measured with the bundles: the same windows through
the model with and without it, in turns, on one thread. Run it from the root of the repository.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from onnx import TensorProto, helper
from tokenizers import Tokenizer

from qadeploy.core.settings import QaSettings
from qadeploy.core.windows import CONTEXT_MASK, Encoder, context_mask, pad_batch
from qadeploy.data.readers import read
from qadeploy.export.onnx import export_graph
from qadeploy.files import write_json
from qadeploy.inference.bundle import MODEL, TOKENIZER, open_bundle
from qadeploy.inference.doctor import diagnose
from qadeploy.inference.graph_model import GraphModel
from qadeploy.integrations.onnx_standalone.in_graph import Placed, compare_spans, cut_windows
from qadeploy.integrations.onnx_standalone.span_head import SpanHead, add_span_head
from qadeploy.records import Example
from qadeploy.timing import interleave, spread
from qadeploy.training.checkpoint import load_checkpoint
from tests.models_for_tests import BY_NAME, Architecture

RESULTS = Path(__file__).parent / "results" / "span_head.json"
FAMILIES = ("BERT", "RoBERTa", "DistilBERT", "ALBERT")
TIMED, ROUNDS = 24, 15


@dataclass(frozen=True)
class Made:
    """A model without a head, and what reads texts for it."""

    model: bytes
    encoder: Encoder
    settings: QaSettings


def family_model(architecture: Architecture) -> Made:
    """A tiny model of a family, exported by optimum as any other."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = load_checkpoint(architecture.save(Path(folder) / "checkpoint"))
        export_graph(checkpoint, Path(folder) / "graph")
        model = (Path(folder) / "graph" / MODEL).read_bytes()
    return Made(model, checkpoint.encoder, checkpoint.settings.changed(max_seq_len=architecture.limit))


def bare_model(
    *,
    mask: bool = False,
    opset: int = 18,
    kind: int = TensorProto.FLOAT,
    outputs: tuple[str, str] = ("start_logits", "end_logits"),
) -> bytes:
    """A model whose logits are an input ``[batch, tokens, 2]``, to try a head on."""
    info, shape = helper.make_tensor_value_info, ["batch", "tokens"]
    names = ["input_ids", "attention_mask"] if mask else ["input_ids"]
    inputs = [info(name, TensorProto.INT64, shape) for name in names] + [info("logits", kind, [*shape, 2])]
    nodes = [
        helper.make_node(
            "Split", ["logits"], ["first", "second"], axis=2, **({"num_outputs": 2} if opset > 17 else {})
        ),
        helper.make_node("Squeeze", ["first", "last"], [outputs[0]]),
        helper.make_node("Squeeze", ["second", "last"], [outputs[1]]),
    ]
    last = helper.make_tensor("last", TensorProto.INT64, [1], [2])
    graph = helper.make_graph(nodes, "bare", inputs, [info(name, kind, shape) for name in outputs], [last])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    return bytes(made.SerializeToString())


def compare(made: Made, examples: Sequence[Example]) -> dict[str, Any]:
    """The row of one model: what was compared and what was different."""
    head = SpanHead.of(made.encoder, made.settings)
    cuts = list(cut_windows(made.encoder, made.settings, examples))
    model = GraphModel(add_span_head(made.model, head))
    proof = compare_spans(model, head, cuts, made.encoder.config.pad_token_id)
    lengths = [len(cut.window) for cut in cuts]
    return {
        "questions": len(examples),
        "windows": len(cuts),
        "shortest": min(lengths),
        "longest": max(lengths),
        "k": head.top_k,
        "max_answer_len": head.max_answer_len,
        "in_padded_batches_too": "attention_mask" in model.inputs,
        "compared": asdict(proof),
    }


def cost(made: Made, cuts: Sequence[Placed]) -> dict[str, Any]:
    """Milliseconds a window without and with the head, medians of interleaved rounds, one window a run."""
    plain, headed = (
        GraphModel(made.model),
        GraphModel(add_span_head(made.model, SpanHead.of(made.encoder, made.settings))),
    )
    feeds = [
        {**pad_batch([c.window], 0), CONTEXT_MASK: np.asarray(context_mask(c.window, c.context))[None]} for c in cuts
    ]
    timings = interleave(
        {"plain": lambda: [plain.run(f) for f in feeds], "head": lambda: [headed.run(f) for f in feeds]}, ROUNDS
    )
    head = timings["head"]
    return {
        "windows": len(cuts),
        "rounds": ROUNDS,
        "plain_ms": 1000 * timings["plain"].median / len(cuts),
        "head_ms": 1000 * head.median / len(cuts),
        "time_ratio": 1 / head.speedup,
        "time_ratio_range": sorted(1 / each for each in head.speedup_range),
    }


@click.command(help=__doc__)
@click.option(
    "--bundle", "bundles", multiple=True, type=click.Path(path_type=Path), help="A bundle to compare and time."
)
@click.option("--data", multiple=True, help="Further questions, SQuAD JSON or any other that qadeploy reads.")
@click.option("--questions", default=400, show_default=True, help="Of the handbook, and of each --data.")
@click.option("--out", default=RESULTS, type=click.Path(path_type=Path), show_default=True)
def main(bundles: tuple[Path, ...], data: tuple[str, ...], questions: int, out: Path) -> None:
    """Compares, measures, prints the figures and writes the JSON."""
    examples = [e for source in ("handbook", *data) for e in spread(read(source).examples, questions)]
    models: dict[str, Made] = {name: family_model(BY_NAME[name]) for name in FAMILIES}
    rows = []
    for path in bundles:
        bundle = open_bundle(path)
        encoder = Encoder(Tokenizer.from_str(bundle.read(TOKENIZER).decode("utf-8")), bundle.encoder)
        models[bundle.name] = Made(bundle.read(MODEL), encoder, bundle.settings)
    for name, made in models.items():
        row = {"name": name, **compare(made, examples)}
        if name not in FAMILIES:
            row["cost"] = cost(made, spread(list(cut_windows(made.encoder, made.settings, examples)), TIMED))
        rows.append(row)
        found = row["compared"]
        click.echo(
            f"{name:<12} {row['windows']} windows of {row['shortest']} to {row['longest']} tokens, {found['windows']} runs, "
            f"{found['spans']} spans: {found['different']} different, scores within {found['score_difference']:.1e}"
            + (f"; the head takes {100 * row['cost']['time_ratio'] - 100:+.1f} % of time" if "cost" in row else "")
        )
        sources = ["handbook", *(Path(each).name for each in data)]
        date = time.strftime("%Y-%m-%d", time.gmtime())
        write_json(out, {"date": date, "environment": diagnose(), "data": sources, "rows": rows})


if __name__ == "__main__":
    main()
