r"""ModernBERT's attention as single nodes: time and memory against the graph as exported, by the length of the window.

    python -m benchmarks.modernbert_attention WORK
    python -m benchmarks.modernbert_attention          # only rewrites the table in docs/architectures.md from the JSON

The model has ModernBERT-base's size (22 layers of 768, two of three local with a window of 128 tokens) and random
weights, which do not affect speed. Three graphs: as exported; ``NAME-fused``, which accepts a mask; and single nodes
without a mask, from which int8 recipes start. One window at a time runs on all threads; each run is a separate process,
in interleaved rounds, and ratios are within a round. Peak memory is that of the process, including 0.6 GB of weights.

Writes ``results/modernbert_attention.json`` and the table between the markers in docs/architectures.md.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import click

from benchmarks.harness import (
    RESULTS,
    Json,
    ranged,
    read_report,
    report,
    run,
    spread,
    where_measured,
    write_report,
    write_table,
)
from qadeploy.timing import turns

REPORT = "modernbert_attention.json"
ROUNDS = {512: 3, 2048: 3, 8192: 1}
GRAPHS = ("as exported", "fused", "fused, no mask")
CHILD = """
import json, sys, time
import numpy as np, onnxruntime as ort

path, tokens = sys.argv[1], int(sys.argv[2])
options = ort.SessionOptions()
options.intra_op_num_threads = int(sys.argv[3])
session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
ids = np.random.default_rng(7).integers(5, 1000, (1, tokens))
feeds = {i.name: ids if i.name == "input_ids" else np.ones_like(ids) for i in session.get_inputs()}
session.run(None, {name: values[:, :64] for name, values in feeds.items()})
started, cpu = time.perf_counter(), time.process_time()
logits = session.run(["start_logits", "end_logits"], feeds)
found = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - cpu}
peak = next(1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
np.save(sys.argv[4], np.concatenate(logits))
print(json.dumps({**found, "peak_bytes": peak}))
"""


def make_graphs(work: Path) -> Json:
    """Writes the three graphs; returns how many of their attentions are single nodes."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import ModernBertConfig, ModernBertForQuestionAnswering, PreTrainedTokenizerFast

    from qadeploy.export.attention import fuse_attention
    from qadeploy.export.fusion import fuse
    from qadeploy.export.onnx import export_graph
    from qadeploy.training.checkpoint import load_checkpoint

    config = ModernBertConfig()
    torch.manual_seed(7)
    ModernBertForQuestionAnswering(config).save_pretrained(work / "checkpoint")
    special = {"[CLS]": config.cls_token_id, "[SEP]": config.sep_token_id, "[PAD]": config.pad_token_id, "[UNK]": 1}
    words = Tokenizer(models.WordLevel({**special, "who": 2, "ada": 3}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [(token, special[token]) for token in ("[CLS]", "[SEP]")]
    words.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", ends)
    names = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "unk_token": "[UNK]"}
    limit = config.max_position_embeddings
    PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=limit, **names).save_pretrained(
        work / "checkpoint"
    )
    export_graph(load_checkpoint(work / "checkpoint"), work)
    plain = (work / "model.onnx").read_bytes()
    size = {"heads": config.num_attention_heads, "hidden": config.hidden_size}
    fused = fuse(plain, size)
    path(work, GRAPHS[0]).write_bytes(plain)
    path(work, GRAPHS[1]).write_bytes(fused.model.SerializeToString())
    path(work, GRAPHS[2]).write_bytes(fuse_attention(plain, config.num_attention_heads).model)
    counts = Counter(node.op_type for node in fused.model.graph.node)
    return {
        "layers": config.num_hidden_layers,
        "local_window": config.local_attention,
        "nodes": {name: counts[name] for name in ("MultiHeadAttention", "RotaryEmbedding")},
    }


def path(work: Path, graph: str) -> Path:
    """The file of a graph."""
    return work / f"{graph.replace(', ', '-').replace(' ', '-')}.onnx"


def measure(work: Path) -> Json:
    """The content of the report."""
    import numpy as np

    work.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:  # frees its memory before the measurements
        model = pool.submit(make_graphs, work).result()
    threads = len(os.sched_getaffinity(0))
    lengths: Json = {}
    for tokens, rounds in ROUNDS.items():
        runs: dict[str, list[Json]] = {graph: [] for graph in GRAPHS}
        loads: list[float] = []
        for order in turns(GRAPHS, rounds):
            for graph in order:
                loads.append(os.getloadavg()[0])
                arguments = [str(path(work, graph)), str(tokens), str(threads), str(work / f"{graph}.npy")]
                done = subprocess.run([sys.executable, "-c", CHILD, *arguments], capture_output=True, text=True)
                if done.returncode:
                    raise SystemExit(
                        f"Error: {graph}, {tokens} tokens: ended with {done.returncode}:\n{done.stderr[-500:]}"
                    )
                runs[graph].append(json.loads(done.stdout))
                click.echo(f"{tokens} tokens, {graph}: {done.stdout.strip()}, load {loads[-1]:.1f}", err=True)
        logits = {graph: np.load(work / f"{graph}.npy") for graph in GRAPHS}
        first = runs[GRAPHS[0]]
        lengths[str(tokens)] = {
            "rounds": rounds,
            "load_average": spread(loads, 1),
            "logits_deviation": float(logits[GRAPHS[0]].std()),
            "graphs": {
                graph: {
                    "seconds": spread([r["seconds"] for r in runs[graph]]),
                    "cpu_seconds": spread([r["cpu_seconds"] for r in runs[graph]]),
                    "speedup": spread([a["seconds"] / b["seconds"] for a, b in zip(first, runs[graph], strict=True)]),
                    "speedup_by_cpu_time": spread(
                        [a["cpu_seconds"] / b["cpu_seconds"] for a, b in zip(first, runs[graph], strict=True)]
                    ),
                    "peak_bytes": max(r["peak_bytes"] for r in runs[graph]),
                    "logits_apart": float(np.abs(logits[graph] - logits[GRAPHS[0]]).max()),
                }
                for graph in GRAPHS
            },
        }
    return report(environment={"threads": threads}, model=model, weights="random", lengths=lengths)


def table(found: Json) -> list[str]:
    """The figures as a table in Markdown."""
    lines = [
        "| tokens | graph | seconds | x as exported | by CPU time | peak memory | logits moved by |",
        "|---|---|---|---|---|---|---|",
    ]
    for tokens, measured in found["lengths"].items():
        for graph, m in measured["graphs"].items():
            lines.append(
                f"| {int(tokens):,} | {graph} | {m['seconds']['median']:.2f} | {ranged(m['speedup'])} "
                f"| {ranged(m['speedup_by_cpu_time'])} | {m['peak_bytes'] / 1e9:.1f} GB | {m['logits_apart']:.0e} |"
            )
    loads = [m["load_average"]["median"] for m in found["lengths"].values()]
    rounds = ", ".join(f"{m['rounds']} at {int(tokens):,}" for tokens, m in found["lengths"].items())
    deviation = min(m["logits_deviation"] for m in found["lengths"].values())
    lines += [
        "",
        f"ModernBERT-base's size with random weights, one window, medians of interleaved rounds ({rounds}; least to most); the logits' "
        f"standard deviation is {deviation:.2f}. {where_measured(found['environment'], 'torch', 'transformers')}; the machine was shared, "
        f"load average {min(loads):.1f} to {max(loads):.1f}.",
    ]
    return lines


@click.command(help=__doc__)
@click.argument("work", type=click.Path(path_type=Path), required=False)
@click.option("--check", is_flag=True, help="Do not write the table; fail if it does not match the results.")
def main(work: Path | None, check: bool) -> None:
    """Measures, writes the JSON and the docs, and prints the table."""
    if work is not None:
        write_report(RESULTS / REPORT, measure(work))
    write_table("docs/architectures.md", "rotary attention", table(read_report(REPORT)), check=check)


if __name__ == "__main__":
    run(main)
