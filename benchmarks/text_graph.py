"""The text model (``export --strings-in-graph``) against the Answerer: answers, places, scores, tokens, time; and from Node.js.

    python -m benchmarks.text_graph bundles/base-int8 --data squad.json --node

Every question is asked of the Answerer and of the text model in ONNX Runtime for Python, one thread each; with ``--node`` of
``docs/node/answer.mjs`` too, in one process for all. Time is text in to answer out, in turns, the Answerer's cache of contexts off.
``--node`` needs what ``make node-check`` installs.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from tokenizers import Tokenizer

from qadeploy import Answerer
from qadeploy.data.readers import read
from qadeploy.files import write_json
from qadeploy.inference.bundle import MODEL, TOKENIZER, Bundle, open_bundle
from qadeploy.inference.doctor import diagnose
from qadeploy.inference.graph_model import GraphModel
from qadeploy.integrations.onnx_standalone.in_graph import ask, compare_answers, strings_in_graph
from qadeploy.integrations.onnx_standalone.wordpiece import special_tokens
from qadeploy.records import Example
from qadeploy.timing import interleave, spread

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "text_graph.json"
NODE = HERE.parent / "docs" / "node"
TIMED, ROUNDS = 24, 9


def run_bundle(source: Bundle, data: dict[str, Sequence[Example]], with_node: bool) -> dict[str, Any]:
    """The row of one bundle."""
    answerer = Answerer.load(source.folder, device="cpu", threads=1, context_cache_bytes=0)
    examples = [e for each in data.values() for e in each]
    with tempfile.TemporaryDirectory() as folder:
        made = strings_in_graph(source, Path(folder) / "mine-text", examples)
        model = GraphModel(made.read(MODEL), made.manifest["session"])
        special = special_tokens(Tokenizer.from_str(source.read(TOKENIZER).decode("utf-8")))
        row: dict[str, Any] = {
            "name": source.name,
            "model_bytes": source.model_bytes,
            "text_model_bytes": made.model_bytes,
            "python": {name: asdict(compare_answers(model, answerer, each, special)) for name, each in data.items()},
            "time": _time(model, answerer, spread(examples, TIMED)),
        }
        if with_node:
            row["node"] = _ask_node(made.folder, answerer, data)
    return row


def _time(model: GraphModel, answerer: Answerer, examples: Sequence[Example]) -> dict[str, Any]:
    timings = interleave(
        {
            "answerer": lambda: [answerer.answer(e.question, e.context) for e in examples],
            "graph": lambda: [ask(model, e.question, e.context) for e in examples],
        },
        ROUNDS,
    )
    graph = timings["graph"]
    return {
        "questions": len(examples),
        "rounds": ROUNDS,
        "answerer_ms": 1000 * timings["answerer"].median / len(examples),
        "graph_ms": 1000 * graph.median / len(examples),
        "time_ratio": 1 / graph.speedup,
        "time_ratio_range": sorted(1 / each for each in graph.speedup_range),
    }


def _ask_node(folder: Path, answerer: Answerer, data: dict[str, Sequence[Example]]) -> dict[str, Any]:
    found: dict[str, Any] = {
        "node": subprocess.check_output(["node", "--version"], text=True).strip(),
        "packages": json.loads((NODE / "package.json").read_text(encoding="utf-8"))["dependencies"],
    }
    for name, examples in data.items():
        lines = "".join(json.dumps({"question": e.question, "context": e.context}) + "\n" for e in examples)
        command = ["node", str(NODE / "answer.mjs"), str(folder)]
        done = subprocess.run(command, input=lines, capture_output=True, text=True, check=True)
        answers = [json.loads(line) for line in done.stdout.splitlines()]
        equal, apart, different = 0, 0.0, []
        for example, ours in zip(examples, answers, strict=True):
            theirs = answerer.answer(example.question, example.context)[0]
            same = (ours["answer"], ours["start"], ours["end"]) == (theirs.text, theirs.start, theirs.end)
            equal += same
            apart = max(apart, abs(ours["score"] - theirs.score))
            if not same:
                shown = {"question": example.question, "node": ours, "answerer": theirs.to_dict()}
                different.append(shown)
        found[name] = {
            "questions": len(examples),
            "equal": equal,
            "score_difference": apart,
            "different": different,
            "first": {"question": examples[0].question, **answers[0]},
        }
    return found


@click.command(help=__doc__)
@click.argument("bundles", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--data", multiple=True, help="Further questions, SQuAD JSON or any other that qadeploy reads.")
@click.option("--questions", default=300, show_default=True, help="Of each --data; of the handbook the 200 held out.")
@click.option("--node", "with_node", is_flag=True, help="Ask Node.js too.")
@click.option("--out", default=RESULTS, type=click.Path(path_type=Path), show_default=True)
def main(bundles: tuple[Path, ...], data: tuple[str, ...], questions: int, with_node: bool, out: Path) -> None:
    """Asks, compares, prints the figures and writes the JSON."""
    asked: dict[str, Sequence[Example]] = {"handbook": read("handbook").part("validation")}
    asked.update({Path(each).name: spread(read(each).examples, questions) for each in data})
    rows = []
    for path in bundles:
        rows.append(run_bundle(open_bundle(path), asked, with_node))
        for runner in ("python", "node") if with_node else ("python",):
            for name in asked:
                found = rows[-1][runner][name]
                click.echo(
                    f"{path.name}, {runner}, {name}: {found['equal']} of {found['questions']} answers equal, scores within "
                    f"{found['score_difference']:.1e}"
                )
        times = rows[-1]["time"]
        click.echo(
            f"{path.name}: {times['graph_ms']:.1f} ms a question, the Answerer {times['answerer_ms']:.1f} ms; "
            f"ratio {times['time_ratio']:.2f} ({times['time_ratio_range'][0]:.2f} to {times['time_ratio_range'][1]:.2f})"
        )
        date = time.strftime("%Y-%m-%d", time.gmtime())
        write_json(out, {"date": date, "environment": diagnose(), "rows": rows})


if __name__ == "__main__":
    main()
