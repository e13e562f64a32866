r"""The same bundle in Chromium, Node.js and Python: time to the first answer, and questions per second.

    (cd docs/node && npm ci --ignore-scripts)
    qadeploy export models/minilm-l6-qa-int8 --web SITE
    python -m benchmarks.browser models/minilm-l6-qa-int8 SITE
    python -m benchmarks.browser      # only rewrites the table in docs/browser.md from the JSON

Each of them answers the handbook's held-out questions one by one, without "no answer", in interleaved rounds. The start
time is from a new process, or a new page with an empty cache in a running Chromium, to its first answer; the site comes
from a local server. Chromium runs the model on one thread. As root it also raises its own priority: on a shared
machine, run this under ``setpriv --bounding-set -sys_nice``. Writes ``results/browser.json`` and its table in the docs.
"""

from __future__ import annotations

import functools
import http.server
import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import click
from playwright.sync_api import Browser, sync_playwright

from benchmarks import harness
from benchmarks.harness import RESULTS, ROOT, Json, bundle_facts, read_report, report, run, where_measured, write_report
from qadeploy import Answerer
from qadeploy.core.metrics import score
from qadeploy.data.loading import read
from qadeploy.errors import InputError
from qadeploy.inference.bundle import open_bundle
from qadeploy.records import Answer
from qadeploy.timing import spread

REPORT = "browser.json"
NAMES = {"chromium": "Chromium, onnxruntime-web", "node": "Node.js, onnxruntime-node", "python": "Python, `Answerer`"}
PYTHON = """
import json, sys
from qadeploy import Answerer
answerer = Answerer.load(sys.argv[1], device="cpu", threads=int(sys.argv[2]) or None)
for line in sys.stdin:
    found = answerer.answer(**json.loads(line), allow_no_answer=False)[0]
    print(json.dumps({"answer": found.text, "start": found.start, "end": found.end}), flush=True)
"""
PAGE = """async (items) => {
    window.answerer ??= await (await import("./answerer.js")).Answerer.load();
    const answers = [];
    for (const { question, context } of items) {
        const { text, start, end } = await window.answerer.answer(question, context, { allowNoAnswer: false });
        answers.push({ answer: text, start, end });
    }
    return answers; }"""

Ask = Callable[[Sequence[Json]], list[Json]]


@contextmanager
def child(*command: object) -> Iterator[Ask]:
    """A process that answers line by line."""
    with subprocess.Popen(
        [str(part) for part in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        send, receive = process.stdin, process.stdout

        def ask(items: Sequence[Json]) -> list[Json]:
            found = []
            for each in items:
                send.write(json.dumps(each) + "\n")
                send.flush()
                found.append({name: value for name, value in json.loads(receive.readline()).items() if name != "score"})
            return found

        yield ask
        send.close()


@contextmanager
def page(browser: Browser, url: str) -> Iterator[Ask]:
    """A page of the site, with an empty cache."""
    context = browser.new_context()
    opened = context.new_page()
    opened.goto(url)
    yield lambda items: opened.evaluate(PAGE, list(items))
    context.close()


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """Serves the site and yields its address."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def places(answer: Answer) -> tuple[str, int, int]:
    """The fields by which answers are compared."""
    return answer.text, answer.start, answer.end


def measure(bundle: Path, site: Path, questions: int, rounds: int) -> Json:
    """The content of results/browser.json."""
    made = open_bundle(site).manifest
    if made["made"].get("from_sha256") != open_bundle(bundle).hash or "web" not in made:
        raise InputError(f"{site}: is not the site of {bundle}: qadeploy export {bundle} --web {site}")
    node, chromium = shutil.which("node"), shutil.which("chromium")
    if node is None or chromium is None:
        raise InputError("node and chromium are needed on the PATH")
    held_out = spread(read("handbook").part("validation"), questions)
    items = [{"question": e.question, "context": e.context} for e in held_out]
    answerer = Answerer.load(bundle, device="cpu")
    right = [answerer.answer(e.question, e.context, allow_no_answer=False)[0] for e in held_out]
    with ExitStack() as stack:
        browser = stack.enter_context(sync_playwright()).chromium.launch(
            executable_path=chromium, args=["--no-sandbox"]
        )
        url = stack.enter_context(serving(site))
        makers: dict[str, Callable[[], AbstractContextManager[Ask]]] = {
            "chromium": lambda: page(browser, url),
            "node": lambda: child(node, ROOT / "docs" / "node" / "answer.mjs", site),
            "python": lambda: child(sys.executable, "-c", PYTHON, bundle, 0),
            "python-1": lambda: child(sys.executable, "-c", PYTHON, bundle, 1),
        }
        starts: dict[str, list[float]] = {name: [] for name in makers}
        seconds: dict[str, list[float]] = {name: [] for name in makers}
        answers: dict[str, list[Answer]] = {}
        for _ in range(rounds):
            for name, make in makers.items():
                began = time.perf_counter()
                with make() as ask:
                    ask(items[:1])
                    starts[name].append(time.perf_counter() - began)
                    ask(items[1:4])  # warms up
                    began = time.perf_counter()
                    found = ask(items)
                    seconds[name].append(time.perf_counter() - began)
                answers[name] = [Answer(f["answer"], f["start"], f["end"], 0.0) for f in found]
        versions = {
            "chromium": browser.version,
            "onnxruntime-web": made["web"]["onnxruntime-web"],
            "node": subprocess.check_output([node, "--version"], text=True).strip(),
            "onnxruntime-node": json.loads((ROOT / "docs/node/package.json").read_text())["dependencies"][
                "onnxruntime-node"
            ],
        }
        browser.close()
    rows = [
        {
            "name": name,
            "start_seconds": harness.spread(starts[name], 2),
            "questions_per_second": harness.spread([len(items) / s for s in seconds[name]], 1),
            "ratio": harness.spread([p / s for p, s in zip(seconds["python"], seconds[name], strict=True)], 2),
            "equal": sum(places(a) == places(b) for a, b in zip(answers[name], right, strict=True)),
            "f1": round(score(held_out, answers[name]).f1, 2),
        }
        for name in makers
    ]
    facts = bundle_facts(bundle)
    return report(environment={"versions": versions}, bundle=facts, questions=len(items), rounds=rounds, rows=rows)


def table(found: Json) -> list[str]:
    """The table of docs/browser.md."""
    environment, versions = found["environment"], found["environment"]["versions"]
    threads = {"chromium": "1 thread", "python-1": "1 thread"}
    lines = ["| | x Python (range) | questions/s | start, s | same answers | F1 |", "|---|---|---|---|---|---|"]
    lines += [
        f"| {NAMES[row['name'].removesuffix('-1')]}, {threads.get(row['name'], 'default threads')} | {harness.ranged(row['ratio'])} "
        f"| {harness.ranged(row['questions_per_second'], 1)} | {harness.ranged(row['start_seconds'], 1)} | {row['equal']} of {found['questions']} | {row['f1']:.1f} |"
        for row in found["rows"]
    ]
    shared = f"a machine shared with other work (load average {environment['load_average']:.1f} at the end)"
    shown = ", ".join(f"{name} {version}" for name, version in versions.items())
    return [
        *lines,
        "",
        f"{found['questions']} held-out questions of the handbook, {found['bundle']['name']}, median of {found['rounds']} interleaved rounds on {shared}; "
        f"{where_measured({**environment, 'threads': environment['cpu']['usable']})}, {shown}.",
    ]


@click.command(help=__doc__)
@click.argument("bundle", type=click.Path(path_type=Path, exists=True), required=False)
@click.argument("site", type=click.Path(path_type=Path, exists=True), required=False)
@click.option("--questions", default=200, show_default=True, type=click.IntRange(min=5))
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(min=1))
@click.option("--check", is_flag=True, help="Do not write the table; fail if it does not match the results.")
def main(bundle: Path | None, site: Path | None, questions: int, rounds: int, check: bool) -> None:
    """Measures if a bundle and its site are given, and writes the table."""
    if bundle:
        if site is None:
            raise click.UsageError("also give SITE")
        write_report(RESULTS / REPORT, measure(bundle, site, questions, rounds))
    harness.write_table("docs/browser.md", "measured", table(read_report(REPORT)), check=check)


if __name__ == "__main__":
    run(main)
