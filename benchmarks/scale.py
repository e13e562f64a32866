"""Batch answering, local and on Ray: whether answers are equal, throughput, memory, and the cost of a killed actor.

    python -m benchmarks.scale BUNDLE --work /tmp/scale --out benchmarks/results/scale.json --plot docs/scale.svg

The questions come from ``../shared/data``, repeated as needed. The first time, each comes with its own paragraph; after
that, a sentence of another paragraph of its article, a new one each time, is added before or after it, so that no text
is repeated and lengths stay about the same. Ids end in the number of the copy.

First come the sizes of ``--sizes``: both engines in turns, ``--rounds`` times, each a whole command from start to end.
Then both answer ``--whole`` questions, and one of Ray's actors is killed (SIGKILL) half-way. Memory is the sum of the
resident sets of the command and all its descendants, once per second, so shared pages count more than once. The exit
code is 1 if the answers differ, are incomplete or repeated, or if throughput or memory miss their targets.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import numpy as np
import psutil
import pyarrow
import pyarrow.parquet as parquet

from benchmarks.harness import Json, bundle_facts, report, run, spread, write_report
from qadeploy.files import writing
from qadeploy.timing import turns

FILES = 4  # the files that the questions are written to
ENGINES = ("local", "ray")
TARGET = 0.85  # of the local engine's throughput
GROWTH = 1.1  # of memory, from the largest of the sizes to the whole
_SENTENCE = re.compile(r"(?<=[.!?])\s+")


@dataclass(frozen=True, slots=True)
class Comparison:
    """The values of the command line."""

    bundle: str
    work: Path
    data: Path
    sizes: str
    rounds: int
    whole: int
    actors: int

    def questions(self, count: int) -> Path:
        """A folder with ``count`` questions."""
        folder = self.work / f"questions-{count}"
        write_questions(self.data, folder, count)
        return folder

    def answer(
        self, engine: str, source: Path, output: Path, kill: Callable[[psutil.Process], Json | None] | None = None
    ) -> Json:
        """Runs ``qadeploy answer`` into a new output: seconds, rate, peak memory, counts, and what ``kill`` returned."""
        shutil.rmtree(output, ignore_errors=True)
        command = [sys.executable, "-m", "qadeploy", "answer", self.bundle, "--json", "--device", "cpu"]
        command += ["--engine", engine, "--input", str(source), "--output", str(output)]
        command += ["--actors", str(self.actors)] if engine == "ray" else []
        started = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            seen = psutil.Process(process.pid)
            memory = Memory(seen)
            killed = {"killed": kill(seen)} if kill else {}
            out, _ = process.communicate()
        seconds = time.perf_counter() - started
        peak = memory.stop()
        if process.returncode:
            raise click.ClickException(f"{' '.join(command)} ended with {process.returncode}")
        found = json.loads(out)
        rate = (found["rows"] + found["rejected"]) / seconds
        measured = {"seconds": round(seconds, 2), "per_second": round(rate, 1), "peak_mib": peak}
        return {**measured, "rows": found["rows"], "rejected": found["rejected"], **killed}


@dataclass(frozen=True, slots=True)
class ParagraphQuestion:
    """A real question: all paragraphs of its article, and which of them is its own."""

    id: str
    question: str
    paragraphs: Sequence[str]
    own: int

    def context(self, copy: int) -> str:
        """The paragraph; from the second copy on with the first sentence of another before or after it."""
        context = self.paragraphs[self.own]
        if not copy:
            return context
        ahead, before = divmod(
            copy + 1, 2
        )  # copies 1 and 2 borrow from the next paragraph, copies 3 and 4 from the one after that
        if ahead >= len(self.paragraphs):
            raise click.ClickException(f"{self.id}: its article is too short for copy {copy}: ask fewer questions")
        other = self.paragraphs[(self.own + ahead) % len(self.paragraphs)]
        sentence = _SENTENCE.split(other.strip())[0]
        return f"{context} {sentence}" if before else f"{sentence} {context}"


def real_questions(data: Path) -> list[ParagraphQuestion]:
    """The real questions, in the order of their files."""
    found = []
    for path in sorted(data.glob("*.json")):
        for article in json.loads(path.read_text(encoding="utf-8"))["data"]:
            texts = [paragraph["context"] for paragraph in article["paragraphs"]]
            for own, paragraph in enumerate(article["paragraphs"]):
                found += [ParagraphQuestion(qa["id"], qa["question"], texts, own) for qa in paragraph["qas"]]
    if not found:
        raise click.ClickException(f"{data}: no SQuAD files there")
    return found


def questions(data: Path, count: int) -> Iterator[dict[str, str]]:
    """Yields ``count`` rows of questions with distinct ids."""
    real = real_questions(data)
    for number in range(count):
        one, copy = real[number % len(real)], number // len(real)
        yield {"id": f"{one.id}-{copy}", "question": one.question, "context": one.context(copy)}


def write_questions(data: Path, folder: Path, count: int) -> None:
    """Writes ``FILES`` parquet files, unless they exist."""
    if folder.is_dir():
        return
    making = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir(parents=True)
    rows = list(questions(data, count))
    each = -(-count // FILES)
    for number in range(0, count, each):
        table = pyarrow.Table.from_pylist(rows[number : number + each])
        parquet.write_table(table, making / f"{number // each}.parquet", row_group_size=1000)
    making.rename(folder)


class Memory:
    """Samples the memory of a process and its descendants until ``stop``; ``peak`` is their largest sum in bytes."""

    def __init__(self, process: psutil.Process) -> None:
        self.peak = 0
        self._process = process
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def _sample(self) -> None:
        while not self._done.wait(1):
            total = 0
            with contextlib.suppress(psutil.Error):
                for one in (self._process, *self._process.children(recursive=True)):
                    with contextlib.suppress(psutil.Error):
                        total += one.memory_info().rss
            self.peak = max(self.peak, total)

    def stop(self) -> int:
        """The peak in MiB."""
        self._done.set()
        self._thread.join()
        return round(self.peak / 2**20)


def kill_one(output: Path, parts: int) -> Callable[[psutil.Process], Json | None]:
    """Returns a function that waits for ``parts`` parts, then kills one actor and says which."""

    def kill(process: psutil.Process) -> Json | None:
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            if len(list(output.glob("part-*.parquet"))) >= parts:
                workers = [p for p in process.children(recursive=True) if is_actor(p)]
                if workers:
                    pid = workers[0].pid
                    os.kill(pid, signal.SIGKILL)
                    return {"pid": pid, "of": len(workers), "after_parts": parts}
            time.sleep(0.2)
        return None

    return kill


def is_actor(process: psutil.Process) -> bool:
    """Whether a process is an actor of the pool, by Ray's title."""
    with contextlib.suppress(psutil.Error):
        return "".join(process.cmdline()).startswith("ray::MapWorker")
    return False


def compare(source: Path, one: Path, other: Path) -> Json:
    """Whether two folders of answers are identical and contain every question once."""
    first, second = parquet.read_table(one), parquet.read_table(other)
    wanted = parquet.read_table(source, columns=["id"])["id"].to_pylist()
    ids = second["id"].to_pylist()
    return {
        "identical": first.equals(second),
        "complete": ids == wanted,
        "duplicates": len(ids) - len(set(ids)),
    }


def line(points: Sequence[tuple[int, float]]) -> dict[str, float]:
    """Fits seconds = start + each * questions by least squares of the relative error."""
    sizes, seconds = np.asarray(points, dtype=np.float64).T
    design = np.stack([np.ones_like(sizes), sizes], axis=1) / seconds[:, None]
    start, each = np.linalg.lstsq(design, np.ones_like(seconds), rcond=None)[0]
    return {"start_seconds": round(float(start), 2), "ms_each": round(1000 * float(each), 3)}


def points(found: Json, engine: str) -> list[tuple[int, float]]:
    """Questions and median seconds of each size, and of ``--whole`` if nothing was killed."""
    sizes = [
        (int(size), statistics.median(r["seconds"] for r in runs[engine])) for size, runs in found["sizes"].items()
    ]
    whole = found.get("whole", {}).get(engine)
    if whole and not whole.get("killed"):
        sizes.append((found["whole"]["questions"], whole["seconds"]))
    return sorted(dict(sizes).items())


def write_svg(found: Json, path: Path) -> None:
    """Draws time against questions, both axes logarithmic, as SVG; equal figures give equal files."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = "scale"
    figure = Figure(figsize=(7, 4.4), layout="constrained")
    axes = figure.subplots()
    for engine, colour, marker in (("local", "#1a5ca6", "o"), ("ray", "#b0420c", "s")):
        runs = [(int(size), r["seconds"]) for size, both in found["sizes"].items() for r in both[engine]]
        whole = found.get("whole", {}).get(engine)
        runs += [(found["whole"]["questions"], whole["seconds"])] if whole else []
        axes.scatter(
            [size for size, _ in runs], [taken for _, taken in runs], color=colour, marker=marker, s=26, zorder=3
        )
        fit = found["fit"].get(engine)
        if fit:
            sizes = np.geomspace(min(runs)[0], max(runs)[0], 60)
            label = f"{engine}: {fit['start_seconds']:g} s + {fit['ms_each']:g} ms per question"
            axes.plot(sizes, fit["start_seconds"] + sizes * fit["ms_each"] / 1000, color=colour, label=label)
    axes.set(xscale="log", yscale="log", xlabel="questions", ylabel="seconds, from the command's start to its end")
    cpu = found["environment"]["cpu"]["model"]
    axes.set_title(
        f"{found['bundle']['name']}, {found['actors']} actors; {cpu}, {found['threads']} threads", fontsize=10
    )
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    with writing(path) as stream:
        figure.savefig(stream, format="svg", metadata={"Date": None})


@click.command()
@click.argument("bundle", type=click.Path(exists=True, file_okay=False))
@click.option(
    "--work", required=True, type=click.Path(file_okay=False, path_type=Path), help="Folder for questions and answers."
)
@click.option(
    "--data", default="../shared/data", show_default=True, type=click.Path(path_type=Path), help="SQuAD files."
)
@click.option("--out", type=click.Path(path_type=Path), default="benchmarks/results/scale.json", show_default=True)
@click.option("--plot", "picture", type=click.Path(path_type=Path), help="SVG of time against questions.")
@click.option("--sizes", default="1000,10000", show_default=True, help="Numbers of questions, separated by commas.")
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(min=1))
@click.option("--whole", default=100_000, show_default=True, help="Questions of the run with a killed actor; 0: none.")
@click.option("--actors", default=2, show_default=True, type=click.IntRange(min=1))
def main(bundle: str, work: Path, out: Path, picture: Path | None, **options: Any) -> None:
    """Measure ``qadeploy answer`` with both engines."""
    plan = Comparison(bundle, work.absolute(), **options)
    found = report(
        environment={"ray": version("ray"), "pyarrow": version("pyarrow")},
        bundle=bundle_facts(bundle),
        threads=len(os.sched_getaffinity(0)),
        actors=plan.actors,
        rounds=plan.rounds,
        sizes={},
        fit={},
    )

    def keep() -> None:
        for engine in ENGINES:
            known = points(found, engine) if all(runs[engine] for runs in found["sizes"].values()) else []
            if len(known) > 1:
                found["fit"][engine] = line(known)
        write_report(out, found)
        if picture and found["fit"].keys() == set(ENGINES):
            write_svg(found, picture)

    missed = []
    for size in (int(text) for text in plan.sizes.split(",") if text):
        source = plan.questions(size)
        outputs = {engine: plan.work / f"out-{size}-{engine}" for engine in ENGINES}
        runs: dict[str, list[Json]] = {engine: [] for engine in ENGINES}
        for order in turns(ENGINES, plan.rounds):
            for engine in order:
                runs[engine].append(plan.answer(engine, source, outputs[engine]))
                click.echo(f"{size} questions, {engine}: {runs[engine][-1]}")
        ratios = [one["seconds"] / other["seconds"] for one, other in zip(runs["local"], runs["ray"], strict=True)]
        same = compare(source, *outputs.values())
        found["sizes"][str(size)] = {**runs, "ratio": spread(ratios, 3), **same}
        click.echo(f"{size} questions: ray is {found['sizes'][str(size)]['ratio']} of local; {same}")
        missed += _missed(str(size), same)
        keep()
    if plan.whole:
        missed += _whole(found, plan, keep)
    for text in missed:
        click.echo(f"missed: {text}")
    sys.exit(bool(missed))


def _whole(found: Json, plan: Comparison, keep: Callable[[], None]) -> list[str]:
    count = plan.whole
    source = plan.questions(count)
    outputs = {engine: plan.work / f"out-{count}-{engine}-whole" for engine in ENGINES}
    entry = found["whole"] = {"questions": count}
    entry["local"] = plan.answer("local", source, outputs["local"])
    click.echo(f"{count} questions, local: {entry['local']}")
    keep()
    kill = kill_one(outputs["ray"], len(list(outputs["local"].glob("part-*.parquet"))) // 2)
    entry["ray"] = plan.answer("ray", source, outputs["ray"], kill)
    entry["ratio"] = round(entry["local"]["seconds"] / entry["ray"]["seconds"], 3)
    same = compare(source, outputs["local"], outputs["ray"])
    entry.update(same)
    click.echo(f"{count} questions, ray: {entry['ray']}; {entry['ratio']} of local; {same}")
    missed = _missed(str(count), same)
    if not entry["ray"]["killed"]:
        missed.append("no actor was killed")
    if entry["ratio"] < TARGET:
        missed.append(f"throughput on Ray is {entry['ratio']:.3f} of local; the target is at least {TARGET}")
    if found["sizes"]:
        largest = max(found["sizes"], key=int)
        for engine in ENGINES:
            before = max(run["peak_mib"] for run in found["sizes"][largest][engine])
            growth = round(entry[engine]["peak_mib"] / before, 3)
            entry[engine] |= {"memory_growth": growth, "memory_growth_since": int(largest)}
            if growth > GROWTH:
                missed.append(f"{engine}: peak memory is {growth} times that of {largest} questions")
    keep()
    return missed


def _missed(what: str, same: Json) -> list[str]:
    wrong = [name for name in ("identical", "complete") if not same[name]]
    wrong += ["without duplicates"] if same["duplicates"] else []
    return [f"{what} questions: the answers are not {name}" for name in wrong]


if __name__ == "__main__":
    run(main)
