"""Interrupted runs: killed, resumed, refused; and a disk that is full."""

from __future__ import annotations

import contextlib
import gc
import importlib
import itertools
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qadeploy.errors import CheckpointError, FailureError, InputError, QadeployError
from qadeploy.shipped import base_model_path
from qadeploy.training.options import TrainOptions
from qadeploy.training.resume import find_differences, open_run, recorded_options
from qadeploy.training.run_log import RunLog
from qadeploy.training.runs import check_replaceable, find_run, read_status
from qadeploy.training.saves import (
    MARKER,
    files_in,
    find_flaw,
    foreign_beside,
    mark_complete,
    newest_complete,
    prune,
    remove_all,
    writing,
)
from qadeploy.training.train import train
from tests.conftest import make_tiny_checkpoint, tiny_options, triplets, write_jsonl

FORKS = multiprocessing.get_context("forkserver")  # torch is imported once, then each process starts at once
FORKS.set_forkserver_preload(["tests.test_resume", "matplotlib.figure", "matplotlib.backends.backend_agg"])

STEPS = 10  # 2 epochs of 5


def quiet(line: str) -> None:
    """Nobody listens."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint; its dropout of 0.1 makes the random state matter."""
    return make_tiny_checkpoint(tmp_path_factory.mktemp("base") / "checkpoint")


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Callable[..., TrainOptions]:
    """Options of a run that is over in a second, with a save every other step."""
    data = write_jsonl(tmp_path_factory.mktemp("data") / "keepers.jsonl", triplets(24))

    def make(out: Path, **changes: Any) -> TrainOptions:
        chosen: TrainOptions = replace(
            tiny_options(data, base, out, batch_size=4, epochs=2, save_steps=2, learning_rate=1e-3), **changes
        )
        return chosen

    return make


def weights(run: Path) -> dict[str, torch.Tensor]:
    return dict(load_file(find_run(run).checkpoint / "model.safetensors"))


def without_time(metrics: dict[str, Any]) -> dict[str, Any]:
    return {**metrics, "seconds": None, "speed": None}


def assert_same(run: Path, whole: Path) -> None:
    """The same metrics and bitwise the same weights."""
    ours, theirs = (json.loads((r / "metrics.json").read_text()) for r in (run, whole))
    assert ours["steps"] == theirs["steps"]
    assert without_time(ours) == without_time(theirs)
    mine, his = weights(run), weights(whole)
    assert mine.keys() == his.keys()
    assert [name for name in mine if not torch.equal(mine[name], his[name])] == []
    assert sorted(p.name for p in run.iterdir()) == sorted(p.name for p in whole.iterdir())


def run_child(options: TrainOptions, resume: bool, before: Callable[[], None] | None) -> None:
    """What the processes to be killed do."""
    gc.freeze()  # the Trainer collects garbage, which is slow where so much was imported
    if before:
        before()
    train(options, quiet, progress=False, resume=resume)


def run(
    options: TrainOptions, resume: bool = False, delay: float | None = None, before: Callable[[], None] | None = None
) -> int | None:
    """Trains in a process of its own, which calls ``before`` first and is killed after ``delay`` seconds; its exit code."""
    child = FORKS.Process(target=run_child, args=(options, resume, before))
    child.start()
    child.join(delay)
    if delay is not None:
        child.kill()
        child.join()
    return child.exitcode


@pytest.fixture
def fast() -> Iterator[Path]:
    """A folder in memory, if possible: what a kill leaves does not depend on the disk, but the time does."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def whole(options: Callable[..., TrainOptions], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert run(options(out)) == 0
    assert json.loads((out / "metrics.json").read_text())["steps"] == STEPS
    return out


# ---------------------------------------------------------------- killed


@pytest.mark.parametrize(("kills", "parts"), [(3, 2), pytest.param(10, 3, marks=pytest.mark.slow)])
def test_a_run_killed_at_random_moments_and_resumed_is_the_run_without_a_break(kills, parts, whole, options, fast):
    begun = time.perf_counter()
    assert run(options(fast / "again")) == 0
    seconds = time.perf_counter() - begun
    assert_same(fast / "again", whole)  # otherwise a resumed run could not be the same either

    draw = random.Random(7)
    reached = set()
    for number in range(3 * kills):
        if number >= kills and len(reached) >= parts:
            break
        out = fast / f"run{number}"
        delay = (number % kills + draw.random()) / kills * seconds
        while run(options(out), delay=delay) != -signal.SIGKILL:  # already finished: the machine is faster now
            shutil.rmtree(out)
            delay *= 0.7
        if read_status(out) != "complete":  # otherwise it was killed after its last line
            with pytest.raises((CheckpointError, InputError), match=r"is not finished|no such folder"):
                find_run(out)
        saved = newest_complete(out / "checkpoints")
        reached.add(saved.step if saved else 0)
        if number in {kills // 3, 2 * kills // 3}:
            run(options(out), resume=True, delay=draw.random() * seconds)
        assert run(options(out), resume=True) == 0
        assert_same(out, whole)
        shutil.rmtree(out)
    assert len(reached) >= parts  # the kills hit different parts of the run


@dataclass(frozen=True)
class KillAt:
    """Kills the process when it calls ``name`` of ``module`` for the ``call``-th time."""

    module: str
    name: str
    call: int

    def __call__(self) -> None:
        module = importlib.import_module(self.module)
        real, calls = getattr(module, self.name), itertools.count(1)

        def wrapped(*args: Any) -> Any:
            if next(calls) == self.call:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args)

        setattr(module, self.name, wrapped)


SAVES_OF_STEPS = [2, 4, 5, 6, 8, 10]


@pytest.mark.parametrize(("name", "step", "resumes"), [("mark_complete", 8, 6), ("prune", 5, 5)])
def test_a_run_killed_while_or_after_it_saves(name, step, resumes, whole, options, fast):
    out = fast / "run"
    killer = KillAt("qadeploy.training.trainer", name, SAVES_OF_STEPS.index(step) + 1)
    assert run(options(out), before=killer) == -signal.SIGKILL
    said: list[str] = []
    train(options(out), said.append, progress=False, resume=True)
    skipped = [line for line in said if "is skipped" in line]
    assert len(skipped) == (name == "mark_complete")
    if skipped:
        assert f"checkpoint-{step} is skipped: it has no {MARKER}" in skipped[0]
    assert f"{out}: resumes after step {resumes}, from checkpoint-{resumes}" in said
    assert json.loads((out / "run.json").read_text())["resumed_at_steps"] == [resumes]
    assert_same(out, whole)


def test_a_run_by_tokens_goes_on_inside_an_epoch_to_the_same_weights(options, fast):
    def make(name: str) -> TrainOptions:
        return options(fast / name, batch_size=None, batch_tokens=120)

    assert run(make("whole")) == 0
    steps = json.loads((fast / "whole" / "metrics.json").read_text())["steps"]
    assert steps >= 8  # otherwise no save falls into the second epoch
    saves = sorted({*range(2, steps + 1, 2), steps // 2, steps})
    step = next(s for s in saves if s > steps // 2 and s % 2 == 0 and s != steps)  # in the second epoch, not at its end
    out = fast / "killed"
    killer = KillAt("qadeploy.training.trainer", "prune", saves.index(step) + 1)
    assert run(make("killed"), before=killer) == -signal.SIGKILL
    assert run(make("killed"), resume=True) == 0
    assert json.loads((out / "run.json").read_text())["resumed_at_steps"] == [step]
    assert_same(out, fast / "whole")
    speed = json.loads((out / "metrics.json").read_text())["speed"]
    assert [row["epoch"] for row in speed["epochs"]] == [1, 2]
    whole_speed = json.loads((fast / "whole" / "metrics.json").read_text())["speed"]
    assert speed["epochs"][1]["windows"] < whole_speed["epochs"][1]["windows"]  # the rest of the epoch


def test_patience_goes_on_counting(options, fast):
    def make(name: str) -> TrainOptions:
        return options(fast / name, epochs=9, patience=2, learning_rate=1e-12, save_steps=None)

    assert run(make("whole")) == 0
    metrics = json.loads((fast / "whole" / "metrics.json").read_text())
    assert [row["epoch"] for row in metrics["epochs"]] == [0, 1, 2, 3]  # the second and the third are no better
    for begun in (2, 3):  # epochs when it is killed: one without a gain, and one when all that is left is to choose
        out = fast / f"killed{begun}"
        assert run(make(out.name), before=KillAt("qadeploy.training.trainer", "prune", begun)) == -signal.SIGKILL
        assert run(make(out.name), resume=True) == 0
        assert json.loads((out / "run.json").read_text())["resumed_at_steps"] == [5 * begun]
        assert_same(out, fast / "whole")


@pytest.mark.parametrize("name", ["_publish", "replace_folder"])
def test_a_finished_run_stands_until_a_new_one_is_whole(name, whole, options, fast):
    out = fast / "run"
    shutil.copytree(whole, out)
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    old = weights(out)
    assert run(options(out, seed=14), before=KillAt("qadeploy.training.resume", name, 1)) == -signal.SIGKILL
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
    assert sorted(p.name for p in fast.iterdir()) == ["run", "run.unfinished"]
    with pytest.raises(InputError, match=r"run\.unfinished: holds an unfinished run .*give --resume"):
        train(options(out, seed=14), quiet, progress=False)

    said: list[str] = []
    metrics = train(options(out, seed=14), said.append, progress=False, resume=True).metrics
    assert said[-1] == f"run folder: {out} was complete already"
    assert metrics == json.loads((out / "metrics.json").read_text())
    assert json.loads((out / "run.json").read_text())["seed"] == 14
    assert any(not torch.equal(old[n], w) for n, w in weights(out).items())
    assert [p.name for p in fast.iterdir()] == ["run"]
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in whole.iterdir())


# ---------------------------------------------------------------- a full disk


@dataclass(frozen=True)
class Limit:
    """After the line of report that ``pattern`` matches, no file of the process may grow beyond ``size`` bytes."""

    pattern: str
    size: int

    def __call__(self, line: str) -> None:
        if re.match(self.pattern, line):
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, resource.RLIM_INFINITY))


def limited_child(options: TrainOptions, limit: Limit, sender: Connection) -> None:
    try:
        train(options, lambda line: (sender.send(line), limit(line))[0], progress=False)
    except QadeployError as error:
        sender.send(error)


def run_limited(options: TrainOptions, limit: Limit) -> tuple[list[str], QadeployError]:
    receiver, sender = FORKS.Pipe(duplex=False)
    child = FORKS.Process(target=limited_child, args=(options, limit, sender))
    child.start()
    sender.close()
    said: list[Any] = []
    with receiver, contextlib.suppress(EOFError):
        while True:
            said.append(receiver.recv())
    child.join()
    assert child.exitcode == 0
    return said[:-1], said[-1]


EPOCH_2 = r" {17,}2  "


@pytest.mark.parametrize(
    ("pattern", "size", "place", "left"),
    [
        (EPOCH_2, 20_000, "checkpoints/checkpoint-10", 5),  # enough for all but the weights
        (EPOCH_2, 300_000, "checkpoints/checkpoint-10", 5),  # enough for all but the optimizer's state
        ("5 evaluation", 20_000, "", 10),
    ],
)
def test_a_full_disk_is_named_and_the_last_complete_save_is_left(pattern, size, place, left, whole, options, fast):
    out = fast / "run"
    said, error = run_limited(options(out, save_steps=None), Limit(pattern, size))
    assert isinstance(error, FailureError)
    assert re.match(rf"{out / place}: cannot be written, the disk (is|may be) full", str(error))
    assert said[-1].startswith(f"{out}: the unfinished run is kept; its last complete checkpoint is checkpoint-{left}")
    assert newest_complete(out / "checkpoints").step == left
    assert not (out / "checkpoints" / "checkpoint-10").exists() or left == 10
    with pytest.raises(CheckpointError, match=f"qadeploy train --resume --out {out} continues it"):
        find_run(out)
    train(options(out, save_steps=None), quiet, progress=False, resume=True)
    assert_same(out, whole)


@pytest.mark.parametrize("error", [RuntimeError("CUDA error"), ValueError("no"), FailureError("diverged")])
def test_what_is_no_failure_to_write_is_not_called_one(error, tmp_path):
    with pytest.raises(type(error), match=str(error)), writing(tmp_path):
        raise error


# ---------------------------------------------------------------- refused


def interrupt(options: TrainOptions, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Presses Ctrl-C after the first save; returns the output."""
    said: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr("qadeploy.training.trainer.prune", lambda *_: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            train(options, said.append, progress=False)
    return said


def test_what_was_started_otherwise_is_not_resumed(options, base, fast, monkeypatch):
    out = fast / "run"
    said = interrupt(options(out), monkeypatch)
    assert said[-1].endswith(f"checkpoint-2: qadeploy train --resume --out {out} continues from there")
    with pytest.raises(InputError, match=r"run: holds an unfinished run .*give --resume"):
        train(options(out), quiet, progress=False)

    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    other_data = write_jsonl(fast / "other.jsonl", triplets(25))
    other_base = fast / "base"
    shutil.copytree(base, other_base)
    state = load_file(other_base / "model.safetensors")
    save_file({**state, "qa_outputs.bias": state["qa_outputs.bias"] + 1}, other_base / "model.safetensors")
    for changes, message in (
        ({"epochs": 3, "learning_rate": 2e-3}, r"--epochs was 2, now 3\n  --learning-rate was 0.001, now 0.002\n"),
        ({"precision": "bf16"}, "--precision was fp32, now bf16"),
        ({"data": str(other_data)}, rf"the data changed: \S+keepers.jsonl then, {other_data} now"),
        ({"eval_data": str(other_data)}, f"the held-out data changed: none then, {other_data} now"),
        ({"base": str(other_base)}, f"the base was {base}, now {other_base}"),
    ):
        with pytest.raises(InputError, match=message):
            train(options(out, **changes), quiet, progress=False, resume=True)
    record = json.loads((out / "run.json").read_text())
    with (
        open_run(out, record, True, RunLog(quiet)),
        pytest.raises(InputError, match="run: another command is training in it"),
    ):
        train(options(out), quiet, progress=False, resume=True)
    after = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    assert {p for p in before | after if before.get(p) != after.get(p)} == {out / "run.json"}  # open_run's line in it


def test_data_and_base_that_only_moved_are_resumed_and_saves_may_change(whole, options, base, fast, monkeypatch):
    interrupt(options(fast / "begun"), monkeypatch)
    (fast / "begun").rename(fast / "run")
    shutil.copytree(base, fast / "base")
    data = write_jsonl(fast / "moved.jsonl", triplets(24))
    moved = options(fast / "run", base=str(fast / "base"), data=str(data), save_steps=3)
    train(moved, quiet, progress=False, resume=True)
    assert_same(fast / "run", whole)


def test_there_may_be_nothing_to_resume(whole, options, fast):
    said: list[str] = []
    train(options(fast / "run"), said.append, progress=False, resume=True)
    assert f"{fast / 'run'}: holds no run to resume, so training starts from the beginning" in said
    assert_same(fast / "run", whole)
    train(options(fast / "run"), said.append, progress=False, resume=True)
    assert said[-1] == f"run folder: {fast / 'run'} was complete already"
    with pytest.raises(InputError, match="--epochs was 2, now 3"):
        train(options(fast / "run", epochs=3), quiet, progress=False, resume=True)
    assert_same(fast / "run", whole)


# ---------------------------------------------------------------- records and saves


def test_recorded_options_are_those_of_the_unfinished_run(whole, tmp_path):
    record = json.loads((whole / "run.json").read_text())
    assert recorded_options(whole) == {k: v for k, v in record["options"].items() if k != "out"}
    assert recorded_options(tmp_path / "none") == {}
    beside = tmp_path / "run.unfinished"
    beside.mkdir()
    for text in ("{", "[]", '{"options": 3}'):
        (beside / "run.json").write_text(text)
        assert recorded_options(tmp_path / "run") == {}
    (beside / "run.json").write_text('{"status": "running", "options": {"out": "a", "seed": 3}}')
    assert recorded_options(tmp_path / "run") == {"seed": 3}


def test_the_model_that_ships_is_recorded_by_its_name_and_found_again(tmp_path):
    shipped = base_model_path().name
    (tmp_path / "run.json").write_text(json.dumps({"status": "running", "options": {"base": shipped, "epochs": 2}}))
    assert recorded_options(tmp_path) == {"epochs": 2}


@pytest.mark.parametrize(
    ("record", "other", "message"),
    [
        ({"status": "complete"}, "metrics.json", "exists and is not a run folder"),  # a run.json of another tool
        ({"status": "complete", "options": "x"}, "metrics.json", "exists and is not a run folder"),
        ({"status": "complete", "options": {}}, ".env", r"holds \.env beside a run"),
        ({"status": "complete", "options": {}}, ".git", r"holds \.git beside a run"),
    ],
)
def test_what_is_no_run_or_lies_beside_one_is_not_replaced(record, other, message, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "run.json").write_text(json.dumps(record))
    (out / other).write_text("ten years of work")
    with pytest.raises(InputError, match=message):
        check_replaceable(out)


def test_what_is_put_beside_a_run_while_another_is_trained_is_not_deleted(whole, options, fast):
    out = fast / "run"
    shutil.copytree(whole, out)

    def say(line: str) -> None:
        (out / "notes.txt").write_text("keep me")

    with pytest.raises(InputError, match=r"run: holds notes\.txt beside a run"):
        train(options(out, seed=14), say, progress=False)
    assert (out / "notes.txt").read_text() == "keep me"
    (out / "notes.txt").unlink()
    train(options(out, seed=14), quiet, progress=False, resume=True)  # it was finished, and now takes its place
    assert json.loads((out / "run.json").read_text())["seed"] == 14
    assert [p.name for p in fast.iterdir()] == ["run"]


def test_a_damaged_record_is_named(options, fast):
    (fast / "run.unfinished").mkdir()
    (fast / "run.unfinished" / "run.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"run\.unfinished/run\.json: not valid JSON"):
        train(options(fast / "run"), quiet, progress=False, resume=True)


def test_options_of_later_versions_are_no_difference(whole):
    record = json.loads((whole / "run.json").read_text())
    assert find_differences(record, record) == []
    later = {**record, "options": {**record["options"], "later": 1}}
    assert find_differences(record, later) == []
    assert find_differences(later, {**later, "options": {**later["options"], "later": 2}}) == ["--later was 1, now 2"]
    assert find_differences(record, {**record, "processes": 2}) == ["the number of processes was 1, now 2"]
    auto = {**record, "options": {**record["options"], "precision": "auto"}}
    assert find_differences(auto, {**auto, "precision": "bf16"}) == ["--precision auto meant fp32, now bf16"]


def test_a_teacher_and_its_questions_are_compared_by_content(whole):
    record = json.loads((whole / "run.json").read_text())
    record["options"] |= {"teacher": "big", "unlabelled": "more.jsonl"}
    for name in ("teacher", "unlabelled"):
        was, now = ({**record, f"{name}_sha256": digest} for digest in "12")
        assert find_differences(was, now) == [f"--{name} {record['options'][name]} has another content now"]
        assert find_differences({k: v for k, v in was.items() if k != f"{name}_sha256"}, now) == []  # an older record


def make_save(saves: Path, step: int, best: int | None) -> Path:
    folder = saves / f"checkpoint-{step}"
    (folder / "inner").mkdir(parents=True)
    (folder / "weights").write_bytes(b"12345")
    (folder / "inner" / "state").write_bytes(b"123")
    mark_complete(folder, {"best_step": best, "step": step})
    return folder


@pytest.mark.parametrize(
    ("fault", "flaw"),
    [
        (lambda f: (f / MARKER).unlink(), f"it has no {MARKER}"),
        (lambda f: (f / MARKER).write_text('{"files'), f"its {MARKER} is damaged"),
        (lambda f: (f / MARKER).write_text("[]"), f"its {MARKER} is damaged"),
        (lambda f: (f / "inner" / "state").unlink(), "inner/state is missing"),
        (lambda f: (f / "weights").write_bytes(b"1234"), "weights has 4 bytes, not 5"),
    ],
)
def test_a_save_that_is_not_whole_is_skipped_and_named(fault, flaw, tmp_path):
    make_save(tmp_path, 9, best=9)
    bad = make_save(tmp_path, 10, best=9)
    (tmp_path / "checkpoint-new").mkdir()
    assert find_flaw(bad) is None
    assert newest_complete(tmp_path, quiet).step == 10
    fault(bad)
    said: list[str] = []
    found = newest_complete(tmp_path, said.append)
    assert (found.folder, found.step, found.run_state) == (tmp_path / "checkpoint-9", 9, {"best_step": 9, "step": 9})
    assert len(said) == 1
    assert f"{bad} is skipped: {flaw}" in said[0]


def test_a_save_needs_that_of_the_best_epoch_before_it(tmp_path):
    for step, best in ((2, None), (5, 5), (8, 5)):
        make_save(tmp_path, step, best)
    (tmp_path / "checkpoint-5" / "weights").unlink()
    said: list[str] = []
    assert newest_complete(tmp_path, said.append).step == 2
    assert ["checkpoint-5, is not complete" in said[0], "weights is missing" in said[1]] == [True, True]
    assert newest_complete(tmp_path / "nowhere") is None


@pytest.mark.parametrize(("newest", "best", "kept"), [(12, 5, [5, 12]), (12, 12, [9, 12]), (12, None, [9, 12])])
def test_pruning_keeps_the_newest_the_best_and_always_two(newest, best, kept, tmp_path):
    for step in (2, 5, 9, 12):
        make_save(tmp_path, step, best)
    (tmp_path / "other").mkdir()
    prune(tmp_path, newest, best)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["other", *(f"checkpoint-{n}" for n in kept)])


def test_a_save_is_removed_without_the_foreign_files_in_it(tmp_path):
    for step in (2, 5, 9, 12):
        folder = make_save(tmp_path, step, best=12)
        (folder / "notes.txt").write_text("keep me")
    (tmp_path / "checkpoint-5" / MARKER).unlink()  # as a kill leaves it: usual names are its own
    (tmp_path / "checkpoint-5" / "inner" / "model.safetensors").write_text("mine, in a folder of mine")
    (tmp_path / "checkpoint-5" / "model.safetensors").write_text("weights")
    (tmp_path / "checkpoint-5" / "rng_state_0.pth").write_text("state")
    # Of safetensors, of ours, killed halfway.
    for name in (".tmpP6OiH9", ".qadeploy.json.qadeploy-0123456789abcdef.tmp"):
        (tmp_path / "checkpoint-5" / name).write_text("half")
    prune(tmp_path, 12, 12)
    assert [find_flaw(tmp_path / f"checkpoint-{n}") is None for n in (2, 5, 9, 12)] == [False, False, True, True]
    assert files_in(tmp_path / "checkpoint-2") == ["notes.txt"]
    kept = ["inner/model.safetensors", "inner/state", "notes.txt", "weights"]
    assert files_in(tmp_path / "checkpoint-5") == kept
    remove_all(tmp_path)
    beside = [f"checkpoint-5/{name}" for name in kept] + [f"checkpoint-{n}/notes.txt" for n in (12, 2, 9)]
    assert foreign_beside(tmp_path) == sorted(beside)


def test_foreign_files_in_an_unfinished_run_are_named_and_kept(whole, options, fast):
    out = fast / "run"
    shutil.copytree(whole, out)
    killer = KillAt("qadeploy.training.trainer", "prune", SAVES_OF_STEPS.index(5) + 1)
    assert run(options(out, seed=14), before=killer) == -signal.SIGKILL
    unfinished = fast / "run.unfinished"
    foreign = ["checkpoint/notes.txt", "checkpoints/checkpoint-5/notes.txt", "checkpoints/mine/data.csv"]
    for name in foreign:
        (unfinished / name).parent.mkdir(exist_ok=True)
        (unfinished / name).write_text("keep me")
    with pytest.raises(
        InputError, match=f"unfinished: holds {', '.join(foreign)} beside a run, which would be deleted"
    ):
        train(options(out, seed=14), quiet, progress=False, resume=True)
    for name in foreign:
        assert (unfinished / name).read_text() == "keep me"
        (unfinished / name).unlink()
    (unfinished / "checkpoints" / "mine").rmdir()

    def say(line: str) -> None:
        if "resumes after step" in line:  # so it has checked
            for name in foreign[:2]:
                (unfinished / name).parent.mkdir(exist_ok=True)
                (unfinished / name).write_text("keep me")

    train(options(out, seed=14), say, progress=False, resume=True)
    assert [(out / name).read_text() for name in foreign[:2]] == ["keep me"] * 2
    assert files_in(out / "checkpoints") == ["checkpoint-5/notes.txt"]
    with pytest.raises(InputError, match=f"run: holds {', '.join(foreign[:2])} beside a run, which would be deleted"):
        check_replaceable(out)


def test_a_run_that_fails_before_its_first_save_takes_only_its_own_files_along(options, fast):
    out = fast / "run"

    def say(line: str) -> None:
        if out.is_dir():
            (out / "checkpoints").mkdir(exist_ok=True)
            (out / "checkpoints" / "notes.txt").write_text("keep me")
            raise InputError("stopped")

    with pytest.raises(InputError, match="stopped"):
        train(options(out), say, progress=False)
    assert files_in(out) == ["checkpoints/notes.txt"]
