r"""Answers from a corpus: which library ranks the passages, how long a question takes, and how often the answer is right.

    python models/prepare_data.py ../shared/data DATA
    python -m benchmarks.corpus libraries ../shared/data --passages 100000 --passages 1000000
    python -m benchmarks.corpus questions ../shared/data DATA --bundle models/minilm-l6-qa-int8
    python -m benchmarks.corpus      # only rewrites the tables in docs/corpus.md from the JSON

``libraries`` makes passages of some 600 characters from the sentences of the data, drawn at random, so that the words
and their frequencies are real. Each library indexes them in its own process, as its documentation shows (bm25s:
``tokenize`` and ``index``, numpy; Tantivy: as in qadeploy). Then one process sends each of 200 questions of the data to
both in turns. CPU seconds count all threads of the process; unlike wall-clock time, they hold on a shared machine.

``questions`` answers held-out questions from all paragraphs of the data, a row each, through ``Corpus``. It measures
whether the question's own paragraph is among the first passages by BM25, and EM and F1 (SQuAD's, with a 95 % bootstrap
interval) of the best answer from the five passages that are read, and from the question's own paragraph alone. Then it
times questions among 100,000 passages: the search, and the search with the reading.

Writes ``results/corpus.json`` and the tables between the markers in docs/corpus.md.
"""

from __future__ import annotations

import json
import os
import random
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import bm25s
import click
import numpy as np
import tantivy

from benchmarks.harness import RESULTS, Json, read_report, report, run, where_measured, write_report, write_table
from benchmarks.passages import held_out
from qadeploy import Answerer, Corpus
from qadeploy.core.metrics import bootstrap_interval, score
from qadeploy.corpus.building import build
from qadeploy.corpus.folder import schema
from qadeploy.corpus.options import READ
from qadeploy.corpus.terms import ANALYZER, analyzer, prepared, terms_of
from qadeploy.data.loading import hash_examples
from qadeploy.machine import peak_memory
from qadeploy.records import NO_ANSWER, Answer

REPORT = "corpus.json"
LIBRARIES = ("tantivy", "bm25s")
LENGTH = 600  # characters of a made passage, to the end of its last sentence
ASKED = 200
RANKS = (1, 5, 20)
SEED = 7


def _paragraphs(data: Path) -> Iterator[Json]:
    for path in sorted(data.glob("*.json")):
        for article in json.loads(path.read_text(encoding="utf-8"))["data"]:
            yield from article["paragraphs"]


def paragraphs(data: Path) -> list[str]:
    """The distinct paragraphs of the data."""
    return list(dict.fromkeys(p["context"] for p in _paragraphs(data)))


def asked(data: Path, count: int) -> list[str]:
    """Questions of the data, drawn at random."""
    return random.Random(SEED).sample([qa["question"] for p in _paragraphs(data) for qa in p["qas"]], count)


def passages(data: Path, count: int) -> Iterator[str]:
    """Made passages: sentences of the data in random order."""
    sentences = [s for text in paragraphs(data) for s in re.split(r"(?<=[.!?])\s+", text) if len(s) > 20]
    generator = random.Random(SEED)
    for _ in range(count):
        parts: list[str] = []
        while sum(map(len, parts)) < LENGTH:
            parts.append(generator.choice(sentences))
        yield " ".join(parts)


# ---------------------------------------------------------------- libraries


def index_tantivy(texts: Iterable[str], folder: Path) -> None:
    """Indexes the terms of each passage as ``corpus.building`` does."""
    folder.mkdir()
    index = tantivy.Index(schema(), path=str(folder))
    index.config_reader(reload_policy="manual")
    index.register_tokenizer(ANALYZER, analyzer())
    writer = index.writer(heap_size=2**27, num_threads=2)
    for number, text in enumerate(texts):
        entry = tantivy.Document()
        entry.add_text("terms", prepared(text))
        entry.add_unsigned("file", number)
        writer.add_document(entry)
    writer.commit()
    writer.wait_merging_threads()


def index_bm25s(texts: Iterable[str], folder: Path) -> None:
    """Indexes as the documentation of bm25s shows."""
    index = bm25s.BM25()
    index.index(bm25s.tokenize(list(texts), stopwords=None, show_progress=False), show_progress=False)
    index.save(folder)


def open_tantivy(folder: Path) -> Callable[[str], object]:
    """A search for 20 passages."""
    index = tantivy.Index.open(str(folder))
    index.register_tokenizer(ANALYZER, analyzer())
    index.reload()
    searcher, query = index.searcher(), tantivy.Query

    def search(question: str) -> object:
        terms = [query.term_query(index.schema, "terms", term, index_option="freq") for term in terms_of(question)]
        return searcher.search(query.boolean_query([(tantivy.Occur.Should, t) for t in terms]), 20, count=False).hits

    return search


def open_bm25s(folder: Path) -> Callable[[str], object]:
    """A search for 20 passages, with the index mapped."""
    index = bm25s.BM25.load(folder, mmap=True)

    def search(question: str) -> object:
        terms = bm25s.tokenize([question], stopwords=None, show_progress=False, return_ids=False)
        return index.retrieve(terms, k=20, show_progress=False)

    return search


def cpu_seconds() -> float:
    """CPU seconds of this process."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def index_alone(library: str, texts: Path, folder: Path) -> Json:
    """Indexes the lines of a file."""
    started, wall = cpu_seconds(), time.perf_counter()
    with texts.open(encoding="utf-8") as lines:
        {"tantivy": index_tantivy, "bm25s": index_bm25s}[library](lines, folder)
    return {
        "cpu_seconds": cpu_seconds() - started,
        "seconds": time.perf_counter() - wall,
        "peak_bytes": peak_memory(),
        "bytes": sum(path.stat().st_size for path in folder.iterdir()),
    }


def search_in_turns(data: Path, folders: dict[str, Path]) -> Json:
    """Searches for each question in every library, and returns CPU milliseconds per library."""
    search = {"tantivy": open_tantivy, "bm25s": open_bm25s}
    opened = {name: search[name](folder) for name, folder in folders.items()}
    questions = asked(data, ASKED)
    rounds: dict[str, list[list[float]]] = {name: [] for name in opened}
    for _ in range(3):
        times: dict[str, list[float]] = {name: [] for name in opened}
        for question in questions:
            for name, ask in opened.items():
                started = time.process_time()
                ask(question)
                times[name].append(1e3 * (time.process_time() - started))
        for name, each in times.items():
            rounds[name].append(each)
    last = {name: each[1:] for name, each in rounds.items()}  # the first one warms up
    return {
        name: {
            "cpu_ms_p50": statistics.median(x for each in rows for x in each),
            "cpu_ms_p95": float(np.percentile([x for each in rows for x in each], 95)),
        }
        for name, rows in last.items()
    }


def child(*args: object) -> Json:
    """Runs a step of this module in a separate process."""
    command = [sys.executable, "-m", "benchmarks.corpus", "step", *map(str, args)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    found: Json = json.loads(done.stdout)
    return found


# ---------------------------------------------------------------- questions


def measure_questions(data: Path, held: Path, bundle: Path, questions: int, count: int) -> Json:
    """Recall, EM and F1 among all paragraphs, and the time of a question among ``count`` passages."""
    everything = held_out(held)
    examples = random.Random(SEED).sample(everything, min(questions, len(everything)))
    answerer = Answerer.load(bundle, device="cpu")
    texts = paragraphs(data)
    with TemporaryDirectory() as folder:
        source = Path(folder) / "paragraphs.jsonl"
        source.write_text(
            "".join(json.dumps({"id": n, "text": t}) + "\n" for n, t in enumerate(texts)), encoding="utf-8"
        )
        corpus = Corpus.build(source, Path(folder) / "index")
        own = {text: f"{source.name}#{number}" for number, text in enumerate(texts)}
        found: Json = {"paragraphs": len(texts), "passages": corpus.passages, "questions": len(examples)}
        ranks, answers, alone, right = [], [], [], []
        with click.progressbar(examples, label="questions", file=sys.stderr) as bar:
            for example in bar:
                place = own[example.context]
                hits = corpus.search(example.question, max(RANKS))
                holds = [
                    hit.document == place and any(hit.start <= a.start and a.end <= hit.end for a in example.answers)
                    for hit in hits
                ]
                ranks.append(holds.index(True) + 1 if any(holds) else 0)
                best = corpus.answer(answerer, example.question, passages=READ, allow_no_answer=False)
                answers.append(Answer(best[0].text, best[0].start, best[0].end, best[0].score) if best else NO_ANSWER)
                right.append(bool(best) and best[0].document == place)
                alone.append(answerer.answer(example.question, example.context, allow_no_answer=False)[0])
        for rank in RANKS:
            within = np.asarray([0 < each <= rank for each in ranks], dtype=np.float64)
            found[f"recall_{rank}"] = [100 * float(within.mean()), *bootstrap_interval(within)]
        for name, given in (("read", answers), ("own_paragraph", alone)):
            scores = score(examples, given)
            found[name] = {
                "exact_match": scores.exact_match,
                "f1": scores.f1,
                "f1_interval": list(bootstrap_interval(scores.rows_f1)),
            }
        found["read"]["right_document"] = 100 * statistics.mean(right)
    found["data_sha256"] = hash_examples(examples)
    if count:
        return {**found, "time": time_of_questions(data, answerer, count)}
    return {**found, "time": read_report(REPORT)["questions"]["time"]}


def time_of_questions(data: Path, answerer: Answerer, count: int) -> Json:
    """Milliseconds of the search and of the whole answer, among ``count`` made passages."""
    with TemporaryDirectory() as folder:
        source, place = Path(folder) / "passages.jsonl", Path(folder) / "index"
        with source.open("w", encoding="utf-8") as stream:
            stream.writelines(json.dumps({"text": text}) + "\n" for text in passages(data, count))
        used, wall = cpu_seconds(), time.perf_counter()
        built = build(source, place)
        found: Json = {"passages": built.passages, "index_cpu_seconds": cpu_seconds() - used}
        found["index_seconds"] = time.perf_counter() - wall
        wall = time.perf_counter()
        corpus = Corpus.load(place)
        found["load_seconds"] = time.perf_counter() - wall
        times: dict[str, list[float]] = {name: [] for name in ("search", "whole", "search_cpu", "whole_cpu")}
        questions = asked(data, ASKED)
        for question in questions[:20]:
            corpus.answer(answerer, question)
        for question in questions:
            wall, used = time.perf_counter(), time.process_time()
            corpus.search(question, READ)
            times["search"].append(time.perf_counter() - wall)
            times["search_cpu"].append(time.process_time() - used)
            wall, used = time.perf_counter(), time.process_time()
            corpus.answer(answerer, question)
            times["whole"].append(time.perf_counter() - wall)
            times["whole_cpu"].append(time.process_time() - used)
        for name, each in times.items():
            found[f"{name}_ms"] = {"p50": 1e3 * statistics.median(each), "p95": 1e3 * float(np.percentile(each, 95))}
    return {**found, "load_average": os.getloadavg()[0]}


# ---------------------------------------------------------------- the tables


def library_table(found: Json) -> list[str]:
    """The libraries side by side, in Markdown."""
    lines = [
        "| passages | library | index, CPU seconds | peak memory | on disk | a query, CPU ms: p50, p95 |",
        "|---|---|---|---|---|---|",
    ]
    for row in found["sizes"]:
        for name in LIBRARIES:
            made, query = row["index"].get(name), row["query"].get(name)
            if made:
                cells = [
                    f"{made['cpu_seconds']:.0f}",
                    f"{made['peak_bytes'] / 2**20:,.0f} MiB",
                    f"{made['bytes'] / 2**20:,.0f} MiB",
                ]
                cells.append(f"{query['cpu_ms_p50']:.1f}, {query['cpu_ms_p95']:.1f}" if query else "not measured")
                lines.append(f"| {row['passages']:,} | {name} | {' | '.join(cells)} |")
    environment, loads = found["environment"], [f"{row['load_average']:.0f}" for row in found["sizes"]]
    return [
        *lines,
        "",
        f"tantivy {found['tantivy']}, bm25s {found['bm25s']}; {where_measured(environment, 'numpy')}; load average "
        f"{' and '.join(loads)}.",
    ]


def question_table(found: Json) -> list[str]:
    """Recall, EM, F1 and times, in Markdown."""
    recalls = [found[f"recall_{rank}"] for rank in RANKS]
    shown = ["{:.1f} % ({:.1f} to {:.1f})".format(*each) for each in recalls]
    lines = [
        f"| {' | '.join(f'recall at {rank}' for rank in RANKS)} |",
        "|---" * len(RANKS) + "|",
        f"| {' | '.join(shown)} |",
        "",
    ]
    lines += ["| read | EM | F1 | right paragraph |", "|---|---|---|---|"]
    for name, label in (("read", f"the best {READ} passages"), ("own_paragraph", "the question's own paragraph")):
        f = found[name]
        low, high = f["f1_interval"]
        right = f"{f['right_document']:.1f} %" if "right_document" in f else "100.0 %"
        lines.append(f"| {label} | {f['exact_match']:.1f} | {f['f1']:.1f} ({low:.1f} to {high:.1f}) | {right} |")
    t, environment = found["time"], found["environment"]
    quiet = t["load_average"] <= 2 * environment["threads"]
    lines += [
        "",
        f"{found['questions']} held-out questions, {found['paragraphs']:,} paragraphs in {found['passages']:,} passages, {found['model']}.",
        "",
        f"| among {t['passages']:,} passages | p50 | p95 | CPU time, p50 |",
        "|---|---|---|---|",
    ]
    for label, name in ((f"finding {READ} passages", "search"), ("finding and reading them", "whole")):
        shown = [f"{t[f'{name}_ms'][share]:.0f} ms" if quiet else "not measured" for share in ("p50", "p95")]
        lines.append(f"| {label} | {' | '.join(shown)} | {t[f'{name}_cpu_ms']['p50']:.0f} ms |")
    lines += [
        "",
        f"The index took {t['index_cpu_seconds']:.0f} CPU seconds. {where_measured(environment)}; load average {t['load_average']:.0f}"
        + ("." if quiet else ", too high for the time that passes to mean anything."),
    ]
    return lines


def save(**parts: Json) -> None:
    """Writes parts of the report, and leaves the other parts unchanged."""
    before = read_report(REPORT) if (RESULTS / REPORT).exists() else {}
    write_report(RESULTS / REPORT, {**before, **parts})


def tables(*, check: bool) -> None:
    """Writes the tables in docs/corpus.md."""
    found = read_report(REPORT)
    for name, table in (("libraries", library_table), ("questions", question_table)):
        if name in found:
            write_table("docs/corpus.md", f"corpus {name}", table(found[name]), check=check)


@click.group(help=__doc__, invoke_without_command=True)
@click.option("--check", is_flag=True, help="Do not write the tables; fail if they do not match the results.")
@click.pass_context
def main(ctx: click.Context, check: bool) -> None:
    """Writes the tables if no command is given."""
    if ctx.invoked_subcommand is None:
        tables(check=check)


@main.command()
@click.argument("data", type=click.Path(path_type=Path, exists=True))
@click.option(
    "--passages", "sizes", multiple=True, type=click.IntRange(min=100), default=(100_000, 1_000_000), show_default=True
)
def libraries(data: Path, sizes: Sequence[int]) -> None:
    """Compares the libraries; sizes that are not given keep the figures of an earlier run."""
    before = read_report(REPORT)["libraries"]["sizes"] if (RESULTS / REPORT).exists() else []
    rows: list[Json] = [row for row in before if row["passages"] not in sizes]
    for count in sizes:
        with TemporaryDirectory() as folder:
            folders = {name: Path(folder) / name for name in LIBRARIES}
            texts = Path(folder) / "passages.txt"
            with texts.open("w", encoding="utf-8") as stream:
                stream.writelines(text.replace("\n", " ") + "\n" for text in passages(data, count))
            index = {name: child("index", texts, "--library", name, "--folder", folders[name]) for name in LIBRARIES}
            query = child("search", data, "--folder", folder)
        rows.append({"passages": count, "index": index, "query": query, "load_average": os.getloadavg()[0]})
        facts = {name: version(name) for name in LIBRARIES}
        save(libraries=report(**facts, sizes=rows))
    tables(check=False)


@main.command()
@click.argument("data", type=click.Path(path_type=Path, exists=True))
@click.argument("held", type=click.Path(path_type=Path, exists=True))
@click.option("--bundle", required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--questions", "number", default=300, show_default=True, type=click.IntRange(min=10))
@click.option("--passages", "count", default=100_000, show_default=True, help="0 keeps the times of an earlier run.")
def questions(data: Path, held: Path, bundle: Path, number: int, count: int) -> None:
    """Measures recall, EM, F1 and the time of a question."""
    found = measure_questions(data, held, bundle, number, count)
    save(questions=report(model=bundle.name, **found))
    tables(check=False)


@main.command(hidden=True)
@click.argument("what", type=click.Choice(["index", "search"]))
@click.argument("source", type=click.Path(path_type=Path))
@click.option("--library", type=click.Choice(LIBRARIES))
@click.option("--folder", type=click.Path(path_type=Path), required=True)
def step(what: str, source: Path, library: str | None, folder: Path) -> None:
    """Runs a step in a separate process."""
    found: Any = (
        index_alone(library or "", source, folder)
        if what == "index"
        else search_in_turns(source, {name: folder / name for name in LIBRARIES})
    )
    click.echo(json.dumps(found))


if __name__ == "__main__":
    run(main)
