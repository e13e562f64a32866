"""The bundles with the whole answer in the graph, run from Node.js without Python.

Needs node and the packages of docs/node, which ``make node-check`` installs; without them these tests skip.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from qadeploy import Answerer
from qadeploy.core.decoding import WindowLogits, decode
from qadeploy.core.windows import context_mask, pad_batch
from qadeploy.data.loading import read
from qadeploy.inference.bundle import open_bundle
from qadeploy.integrations.onnx_standalone.in_graph import cut_windows, spans_in_graph, strings_in_graph
from qadeploy.records import Example
from tests.processes_for_tests import ended

FOLDER = Path(__file__).parent.parent / "docs" / "node"
NODE = shutil.which("node")

pytestmark = [
    pytest.mark.skipif(NODE is None, reason="node is not installed"),
    pytest.mark.skipif(
        not (FOLDER / "node_modules" / "onnxruntime-node").is_dir(),
        reason="the packages of docs/node are not installed: make node-check installs them",
    ),
]


def node(*args: object, lines: list[dict[str, object]] | None = None) -> subprocess.CompletedProcess[str]:
    command = [str(NODE), str(FOLDER / "answer.mjs"), *(str(a) for a in args)]
    given = None if lines is None else "".join(json.dumps(line) + "\n" for line in lines)
    return ended(command, input=given, timeout=120)


def answers(done: subprocess.CompletedProcess[str]) -> list[dict[str, object]]:
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def version() -> str:
    package = json.loads((FOLDER / "node_modules" / "onnxruntime-node" / "package.json").read_text())
    return f"node {subprocess.check_output([str(NODE), '--version'], text=True).strip()}, onnxruntime-node {package['version']}"


def test_text_in_answer_out(tiny, bundle, tmp_path):
    examples = list(read(str(tiny.data)).examples)
    made = strings_in_graph(open_bundle(bundle), tmp_path / "mine-text", examples[:4])
    long = " ".join(e.context for e in examples[:40])
    asked = [
        *examples[::4],
        Example("long", examples[3].question, long),
        Example("odd", "Wer?", "🚀 Ça, Ada\u0301; 北京."),
    ]
    found = answers(node(made.folder, lines=[{"question": e.question, "context": e.context} for e in asked]))
    answerer = Answerer.load(bundle, device="cpu")
    for example, ours in zip(asked, found, strict=True):
        theirs = answerer.answer(example.question, example.context)[0]
        assert (ours["answer"], ours["start"], ours["end"]) == (theirs.text, theirs.start, theirs.end)
        assert ours["score"] == pytest.approx(theirs.score, abs=1e-4)
    one = answers(node(made.folder, asked[0].question, asked[0].context))
    assert one[0]["answer"] == found[0]["answer"]
    print(f"{version()}: {len(found)} answers from text, all as the Answerer's; one of them: {json.dumps(one[0])}")


@pytest.mark.parametrize("kind", ["", "int8"])
def test_spans_of_windows(kind, tiny, tiny_export, tmp_path):
    source = open_bundle(tiny.bundle(kind))
    examples = list(read(str(tiny.data)).examples[:12])
    made = spans_in_graph(source, tmp_path / "mine-spans", examples, top_k=3)
    answerer = Answerer.load(source.folder, device="cpu", threads=1)
    cuts = list(cut_windows(answerer.encoder, source.settings, examples))
    lines = [
        {
            **{name: values[0].tolist() for name, values in pad_batch([cut.window], 0).items()},
            "context_mask": context_mask(cut.window, cut.context).tolist(),
        }
        for cut in cuts
    ]
    for cut, ours in zip(cuts, answers(node(made.folder, lines=lines)), strict=True):
        window = cut.window
        starts, ends = answerer.model.run([window])[0]
        limits = {"max_answer_len": source.settings.max_answer_len, "temperature": source.settings.temperature}
        decoded = decode(WindowLogits([window], [starts], [ends], cut.context), top_k=3, **limits)
        shift = window.context_begin - window.context_offset
        best = ours["spans"][0]
        span = decoded.spans[0]
        assert (best["start"], best["end"]) == (span.start_token + shift, span.end_token + shift)
        assert best["logit"] == pytest.approx(span.logit, abs=1e-3)
        assert best["score"] == pytest.approx(span.score, abs=1e-3)
        assert ours["null_score"] == pytest.approx(decoded.null_logit, abs=1e-3)
        assert len(ours["spans"]) == 3
    print(f"{version()}: the best spans of {len(cuts)} windows, all as the decoder's; the first: {json.dumps(best)}")


def test_what_cannot_be_used_is_named(bundle):
    plain = node(bundle)
    assert plain.returncode == 2
    assert f"{bundle}: has no answers in its graph: export it with qadeploy export" in plain.stderr
    assert "usage: node answer.mjs" in node().stderr
    assert "usage: node answer.mjs" in node(bundle, "a question alone").stderr
