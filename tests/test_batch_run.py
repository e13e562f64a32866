"""``answer_files`` on the local engine: complete, restartable, and refused where it should be."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet as parquet
import pytest

from qadeploy import Answerer
from qadeploy.batch.output import Counts
from qadeploy.batch.ray_engine import Cluster
from qadeploy.batch.run import BatchProgress, BatchRequest, Terminated, answer_files
from qadeploy.data.fields import DataOptions
from qadeploy.errors import BundleError, FailureError, InputError
from qadeploy.inference.bundle import open_bundle
from tests.answerers_for_tests import BREAK, EXIT, PoisonedLoad
from tests.conftest import NAMES, THINGS, sealed_copy, triplets, write_jsonl
from tests.processes_for_tests import ended

ROWS = [{"context": row["context"], "question": row["question"]} for row in triplets(60)]
SLOW = """
import sys
from tests.answerers_for_tests import PoisonedLoad
from qadeploy.batch.run import BatchRequest, answer_files

bundle, source, output, seconds = sys.argv[1:]
answer_files(BatchRequest(bundle, (source,), output, shard_rows=10), load=PoisonedLoad(bundle, seconds=float(seconds)))
"""

WAITS = """
import pathlib, sys, time
from qadeploy.batch.run import BatchRequest, Terminated, answer_files

def load():
    pathlib.Path("loading").touch()
    for _ in range(600):  # a signal that comes just before a sleep is handled only after it
        time.sleep(0.1)

try:
    answer_files(BatchRequest(sys.argv[1], (sys.argv[2],), sys.argv[3], shard_rows=10), load=load)
except Terminated as stop:
    sys.exit(128 + stop.number)
"""


@contextlib.contextmanager
def waiting(bundle: Path, source: Path, output: str) -> Iterator[subprocess.Popen[bytes]]:
    """A run in another process that has begun to load its bundle and does not end by itself."""
    Path("loading").unlink(missing_ok=True)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen([sys.executable, "-c", WAITS, str(bundle), str(source), output], env=environment)
    try:
        until = time.monotonic() + 60
        while not Path("loading").exists() and process.poll() is None and time.monotonic() < until:
            time.sleep(0.01)
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of two files of questions."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "asked"
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", ROWS[:25])
    parquet.write_table(pyarrow.Table.from_pylist(ROWS[25:]), folder / "b.parquet")
    return folder


def request(bundle: Path, *inputs: Path | str, output: str = "out", **changes: object) -> BatchRequest:
    values = {"device": "cpu", "threads": 1, "shard_rows": 10, **changes}
    return BatchRequest(str(bundle), tuple(map(str, inputs)), output, **values)  # type: ignore[arg-type]


def answers(folder: str = "out") -> list[dict[str, object]]:
    return parquet.read_table(folder).to_pylist()


def mtimes(folder: str = "out") -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in Path(folder).glob("part-*")}


def test_every_row_is_answered_in_order(bundle, asked):
    shown: list[tuple[int, ...]] = []
    progress = BatchProgress(lambda rows, done: shown.append((rows, done)), lambda rows: shown.append((rows,)))
    found = answer_files(request(bundle, asked), progress)
    assert (found.counts, found.rows, found.before) == (Counts(60, 0), 60, 0)
    assert shown == [(60, 0), (10,), (10,), (5,), (10,), (10,), (10,), (5,)]
    pairs = [(row["question"], row["context"]) for row in ROWS]
    best = [answers[0] for answers in Answerer.load(bundle, device="cpu", threads=1).answer_batch(pairs)]
    names = [f"a.jsonl:row-{n}" for n in range(1, 26)] + [f"b.parquet:row-{n}" for n in range(1, 36)]
    keys = ("id", "answer", "score", "start", "end", "bundle")
    wanted = [
        (name, a.text, round(a.score, 7), a.start, a.end, open_bundle(bundle).hash)
        for name, a in zip(names, best, strict=True)
    ]
    assert answers() == [dict(zip(keys, values, strict=True)) for values in wanted]
    assert sorted(os.listdir("out")) == ["_plan.json", *(f"part-0000{n}.parquet" for n in range(7))]


def test_threads_and_parts_change_no_answer(bundle, asked):
    answer_files(request(bundle, asked))
    answer_files(request(bundle, asked, output="wide", threads=2, shard_rows=1))
    assert answers("wide") == answers()


def test_a_finished_folder_is_left_as_it_is(bundle, asked):
    answer_files(request(bundle, asked))
    before = mtimes()
    found = answer_files(request(bundle, asked), load=lambda: pytest.fail("nothing is left to answer"))
    assert (found.counts, found.before) == (Counts(60, 0), 60)
    assert mtimes() == before


def test_an_interruption_keeps_what_is_done_and_the_same_command_goes_on(bundle, asked):
    def stop(rows: int) -> None:
        if len(mtimes()) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        answer_files(request(bundle, asked), BatchProgress(advance=stop))
    done = mtimes()
    assert len(done) == 3
    Path("out/.part-00003.parquet.qadeploy-0123456789abcdef.tmp").write_bytes(b"half")
    found = answer_files(request(bundle, asked))
    assert (found.counts, found.before) == (Counts(60, 0), 25)
    assert {name: mtimes()[name] for name in done} == done
    answer_files(request(bundle, asked, output="whole"))
    assert answers() == answers("whole")
    assert not [name for name in os.listdir("out") if name.startswith(".")]


def test_a_killed_process_leaves_whole_parts_and_the_rest_is_made_once(bundle, asked):
    command = [sys.executable, "-c", SLOW, str(bundle), str(asked), "out", "0.02"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(command, env=environment)
    until = time.monotonic() + 60
    while len(mtimes()) < 2 and time.monotonic() < until:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = mtimes()
    assert 2 <= len(done) < 7
    answer_files(request(bundle, asked))
    assert {name: mtimes()[name] for name in done} == done
    answer_files(request(bundle, asked, output="whole"))
    assert answers() == answers("whole")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_runs_that_are_stopped_while_loading_are_no_crashes_of_rows(number, bundle, asked):
    for _ in range(6):
        with waiting(bundle, asked, "out") as process:
            process.send_signal(number)
            assert process.wait(timeout=30) == (143 if number == signal.SIGTERM else -number)
    journal = Path("out/.shard-00000.journal").read_text()
    assert journal.count('"begin"') == 6
    assert journal.count('"left"') == (6 if number == signal.SIGTERM else 0)
    assert answer_files(request(bundle, asked)).counts == Counts(60, 0)
    assert not Path("out/rejected").exists()
    assert not [name for name in os.listdir("out") if name.startswith(".")]


def test_sigterm_keeps_what_is_done_and_a_second_one_does_not_cut_the_end_short(bundle, asked):
    def stop(rows: int) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Terminated) as caught:
        answer_files(request(bundle, asked), BatchProgress(advance=stop))
    assert caught.value.number == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert answer_files(request(bundle, asked)).before == 10


@pytest.mark.parametrize("output", ["out", "out.jsonl"])
def test_a_second_run_on_one_output_is_refused_and_the_first_one_kept(output, bundle, asked):
    with waiting(bundle, asked, output) as process:
        with pytest.raises(InputError, match=rf"{output}: another command is writing it \(process {process.pid} on "):
            answer_files(request(bundle, asked, output=output))
        assert process.poll() is None
    assert answer_files(request(bundle, asked, output=output)).counts == Counts(60, 0)


def test_a_row_that_kills_is_found_by_running_again(bundle, asked):
    rows = [dict(row) for row in ROWS[:30]]
    rows[14]["question"] = EXIT
    source = write_jsonl(asked.parent / "poison.jsonl", rows)
    command = [sys.executable, "-c", SLOW, str(bundle), str(source), "out", "0"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    codes = [subprocess.run(command, env=environment, check=False, timeout=60).returncode for _ in range(5)]
    assert codes == [3, 3, 3, 3, 0]
    answer_files(request(bundle, write_jsonl(asked.parent / "good.jsonl", ROWS[:30]), output="good"))
    assert answers() == [row for n, row in enumerate(answers("good")) if n != 14]
    (line,) = Path("out/rejected/_part-00001.jsonl").read_text().splitlines()
    assert '"row": 15' in line
    assert "its worker process ended 2 times" in line


def test_a_model_that_breaks_stops_the_run(bundle, asked):
    source = write_jsonl(asked.parent / "x.jsonl", [*ROWS[:15], {**ROWS[0], "question": BREAK}])
    with pytest.raises(FailureError, match=r"since then the model answers nothing"):
        answer_files(request(bundle, source), load=PoisonedLoad(str(bundle)))
    assert list(mtimes()) == ["part-00000.parquet"]


def test_what_the_folder_was_begun_with_is_kept(bundle, asked):
    answer_files(request(bundle, asked))
    before = answers()
    other = sealed_copy(bundle, asked.parent / "other", precision="fp32", note="another")
    for changed, message in (
        (request(other, asked), "the bundle was"),
        (request(bundle, asked / "a.jsonl"), "b.parquet was an input"),
        (request(bundle, asked, allow_no_answer=True), "--allow-no-answer was not given"),
        (request(bundle, asked, prefilter=3), "--prefilter was not given, now it is 3"),
        (request(bundle, asked, data_options=DataOptions(columns="context=context")), "--columns was not given"),
        (request(bundle, asked, shard_rows=11), "--shard-rows was 10"),
    ):
        with pytest.raises(InputError, match=message):
            answer_files(changed)
    assert answer_files(request(bundle, asked, shard_rows=None, threads=2)).before == 60
    write_jsonl(asked / "a.jsonl", ROWS[:26])
    with pytest.raises(InputError, match=r"a.jsonl was changed \(\d+ bytes, now \d+\)"):
        answer_files(request(bundle, asked))
    assert answers() == before


def test_a_prefilter_leaves_windows_out_as_it_does_for_one_question(bundle, asked):
    fill = " The hall is quiet." * 30
    context = fill.join(f"{name} keeps the {thing} in room 7." for name, thing in zip(NAMES, THINGS, strict=False))
    rows = [{"context": context, "question": f"Who keeps the {thing}?"} for thing in THINGS[:6]]
    source = write_jsonl(asked.parent / "long.jsonl", rows)
    answer_files(request(bundle, source, prefilter=1))
    answerer = Answerer.load(bundle, device="cpu", threads=1)
    pairs = [(row["question"], row["context"]) for row in rows]
    best = [found[0] for found in answerer.answer_batch(pairs, prefilter=1)]
    assert [(row["answer"], row["start"], row["score"]) for row in answers()] == [
        (a.text, a.start, round(a.score, 7)) for a in best
    ]
    assert [a.score for a in best] != [found[0].score for found in answerer.answer_batch(pairs)]


def test_a_file_that_changes_meanwhile_stops_the_run(bundle, asked):
    def change(rows: int) -> None:
        os.utime(asked / "a.jsonl", ns=(1, 1))

    with pytest.raises(FailureError, match=r"a.jsonl: was changed while it was being answered"):
        answer_files(request(bundle, asked), BatchProgress(advance=change))
    (asked / "b.parquet").unlink()
    assert list(mtimes()) == ["part-00000.parquet"]


@pytest.mark.parametrize("output", ["out", "out.jsonl"])
def test_names_that_are_not_utf_8_become_escapes_in_ids(output, bundle, asked):
    try:
        (asked / "a.jsonl").rename(asked / os.fsdecode(b"caf\xe9.jsonl"))
    except OSError:
        pytest.skip("the file system allows only UTF-8")
    assert answer_files(request(bundle, asked, output=output)).counts == Counts(60, 0)
    rows = answers() if output == "out" else [json.loads(line) for line in Path(output).read_text("utf-8").splitlines()]
    assert [rows[35]["id"], rows[0]["id"]] == ["caf\\udce9.jsonl:row-1", "b.parquet:row-1"]
    if output == "out":
        assert answer_files(request(bundle, asked)).before == 60


def test_a_question_mark_in_the_name_of_a_local_file_is_a_character(bundle, asked):
    (asked / "a.jsonl").rename(asked / "what?1.jsonl")
    write_jsonl(asked / "what?2.jsonl", ROWS[:2])
    answer_files(request(bundle, asked / "what?1.jsonl", asked / "what?2.jsonl"))
    assert [row["id"] for row in answers()][24:] == [f"what?{n}.jsonl:row-{r}" for n, r in ((1, 25), (2, 1), (2, 2))]
    write_jsonl(asked / "what?2.jsonl", ROWS[:3])
    with pytest.raises(InputError, match=r"what\?2.jsonl was changed"):
        answer_files(request(bundle, asked / "what?1.jsonl", asked / "what?2.jsonl"))


def test_one_file_never_mixes_what_its_input_was_with_what_it_is(bundle, asked):
    def change(rows: int) -> None:
        write_jsonl(asked / "a.jsonl", [{**row, "question": f"{row['question']}?"} for row in ROWS[:25]])

    with pytest.raises(FailureError, match=r"a.jsonl: was changed while it was being answered: start again"):
        answer_files(request(bundle, asked / "a.jsonl", output="out.jsonl"), BatchProgress(advance=change))
    assert not list(asked.parent.glob("out*"))


def test_a_file_that_goes_meanwhile_says_where_it_must_lie(bundle, asked):
    with pytest.raises(FailureError, match=r"b.parquet: rows 1 to 10 cannot be read on .*each must see the bundle"):
        answer_files(
            request(bundle, asked), BatchProgress(advance=lambda rows: (asked / "b.parquet").unlink(missing_ok=True))
        )
    assert sorted(mtimes()) == [f"part-0000{n}.parquet" for n in range(3)]


def test_a_full_disk_is_named_and_leaves_what_stands(bundle, asked, monkeypatch):
    """The system enforces a limit on the size of files like that of a full disk."""
    answer_files(request(bundle, asked, output="whole"))

    def limit(rows: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    was = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with pytest.raises(
            FailureError, match=r"(part|shard)-00001.*: File too large. 1 of 7 parts are finished and kept"
        ):
            answer_files(request(bundle, asked), BatchProgress(advance=limit))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, was)
    assert [name for name in os.listdir("out") if name.endswith(".tmp")] == []
    answer_files(request(bundle, asked))
    assert answers() == answers("whole")


def test_rows_that_are_all_unusable_end_in_an_error(bundle, asked, monkeypatch):
    source = write_jsonl(asked.parent / "x.jsonl", [{**ROWS[0], "question": "Who " * 300}] * 3)
    for output in ("out", "out.jsonl"):
        with pytest.raises(
            FailureError, match=r"no row could be answered: .*rejected.* holds the reason for each of 3"
        ):
            answer_files(request(bundle, source, output=output))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output": "out.jsonl", "threads": None}, "--engine ray writes a folder of parquet"),
        ({}, "--threads is for the local engine"),
        ({"threads": None, "device": "cuda"}, "--device cuda: with --engine ray give --gpus-per-actor"),
    ],
)
def test_options_that_do_not_go_with_ray_are_named(changes, message, bundle, asked):
    with pytest.raises(InputError, match=message):
        answer_files(request(bundle, asked, cluster=Cluster(), **changes))
    assert os.listdir() == ["asked"]


def test_a_bundle_that_is_damaged_leaves_no_folder(bundle, asked):
    sealed_copy(bundle, asked.parent / "copy")
    (asked.parent / "copy" / "README.md").write_text("changed")
    with pytest.raises(BundleError):
        answer_files(request(asked.parent / "copy", asked))
    assert not Path("out").exists()


@pytest.mark.parametrize("output", ["out", "out.jsonl"])
def test_a_bundle_that_does_not_load_in_time_ends_the_run(output, bundle, asked):
    command = [sys.executable, "-m", "qadeploy", "answer", str(bundle), "--input", str(asked), "--output", output]
    done = ended([*command, "--shard-rows", "10", "--load-timeout", "0.001"], timeout=60)
    assert done.returncode == 1
    assert (
        done.stderr.splitlines()[-1]
        == f"Error: {bundle}: was not loaded within 0.001 s: raise load_timeout (--load-timeout)"
    )
    assert not list(Path().glob("out*/*.parquet"))
    assert not Path("out.jsonl").exists()
    assert answer_files(request(bundle, asked, output=output)).counts == Counts(60, 0)


def test_the_next_shard_begins_only_after_the_one_before_stands(bundle, asked, monkeypatch):
    """The progress and the restart rely on this order of the local engine."""
    seen: list[int] = []

    class Fake:
        def __init__(self, *_: object) -> None: ...

        def finish(self, number: int) -> Counts:
            assert len(seen) == number
            return Counts(1, 0)

    monkeypatch.setattr("qadeploy.batch.run.Worker", Fake)
    answer_files(request(bundle, asked, shard_rows=10), BatchProgress(advance=seen.append))
    assert len(seen) == 7
