"""Several processes: the same run as with one, one report, one message per error, no process left over."""

from __future__ import annotations

import gc
import json
import os
import resource
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file
from torch.distributed import TCPStore

from qadeploy.cli import main
from qadeploy.training.options import TrainOptions
from qadeploy.training.train import train
from tests.conftest import make_tiny_checkpoint, tiny_options, triplets, write_jsonl
from tests.processes_for_tests import succeeded
from tests.test_resume import FORKS, KillAt, assert_same


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TrainOptions]:
    """Options without dropout, whose training windows are whole batches and whose dev windows are an odd number."""
    root = tmp_path_factory.mktemp("processes")
    base = make_tiny_checkpoint(root / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "hidden_dropout_prob": 0.0}))
    data = write_jsonl(root / "keepers.jsonl", triplets(65))

    def make(out: Path, **changes: Any) -> TrainOptions:
        chosen: TrainOptions = tiny_options(data, base, out, epochs=1, batch_size=4, learning_rate=3e-3)
        return replace(chosen, **changes)

    return make


@pytest.fixture(scope="module")
def alone(options: Callable[..., TrainOptions], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    out = tmp_path_factory.mktemp("alone") / "run"
    train(options(out), lambda line: None, progress=False)
    return out


def arguments(options: TrainOptions) -> list[str]:
    """The command line of options."""
    given = {
        name: value for name, value in asdict(options).items() if value is not None and not isinstance(value, bool)
    }
    return ["train", "--no-progress", *(f"--{name.replace('_', '-')}={value}" for name, value in given.items())]


def assert_near(run: Path, alone: Path) -> None:
    """The scores of every epoch are the same, the losses and weights within the noise of another order of summation."""
    ours, theirs = (json.loads((r / "metrics.json").read_text()) for r in (run, alone))
    assert ours["steps"] == theirs["steps"]
    assert ours["dev"] == theirs["dev"]
    for mine, his in zip(ours["epochs"], theirs["epochs"], strict=True):
        for key in ("epoch", "eval_f1", "eval_exact_match", "eval_accuracy"):
            assert mine[key] == his[key]
        assert mine["eval_loss"] == pytest.approx(his["eval_loss"], rel=1e-4)
        assert mine["train_loss"] == (his["train_loss"] and pytest.approx(his["train_loss"], rel=1e-4))
    state, other = (load_file(r / "checkpoint" / "model.safetensors") for r in (run, alone))
    for name, value in state.items():
        # A constant added to all inputs of a softmax has no effect: its gradient is only noise, which Adam enlarges.
        if not name.endswith(("key.bias", "qa_outputs.bias")):
            np.testing.assert_allclose(value, other[name], atol=1e-3, err_msg=name)


TORCHRUN = ["torch.distributed.run", "--nproc-per-node", "2"]
# The flags of docs/scale.md, also on CPUs: with --cpu accelerate starts one process, whatever the number given.
ACCELERATE = ["accelerate.commands.launch", "--multi_gpu", "--num_machines", "1", "--num_processes", "2"]
ACCELERATE += ["--mixed_precision", "no", "--dynamo_backend", "no"]


@pytest.mark.parametrize(
    "launcher",
    [pytest.param(TORCHRUN, id="torchrun"), pytest.param(ACCELERATE, id="accelerate", marks=pytest.mark.slow)],
)
def test_launchers_train_the_run_of_one_process(launcher, options, alone, tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, "-m", *launcher, "-m", "qadeploy", *arguments(options(out)), "--json"]
    result = succeeded(command)
    assert len(result.stdout.splitlines()) == 1
    assert json.loads(result.stdout)["run"] == str(out)
    assert sum("1 raw data" in line for line in result.stderr.splitlines()) == 1
    assert sum("5 evaluation" in line for line in result.stderr.splitlines()) == 1
    assert "13 steps of 4 windows, learning rate 0.003, 2 processes" in result.stderr
    assert result.stderr.count("no negatives, which train in one process") == 1
    assert_near(out, alone)
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in alone.iterdir())
    assert json.loads((out / "run.json").read_text())["processes"] == 2


# ---------------------------------------------------------------- without torchrun's start-up


def rank_child(rank: int, port: int, arguments: Sequence[str], log: Path, before: Callable[[], None] | None) -> None:
    """One process as torchrun starts it, with the store in torchrun (here: in the test)."""
    gc.freeze()
    with log.open("a") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    if before:
        before()
    main(arguments)


def run_two(
    arguments: Sequence[str], log: Path, before: dict[int, Callable[[], None]] | None = None
) -> tuple[list[int | None], str]:
    """Exit codes of both processes of a command, and what they printed. ``before`` is called first, by rank."""
    log.unlink(missing_ok=True)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    children = [
        FORKS.Process(target=rank_child, args=(n, store.port, arguments, log, (before or {}).get(n))) for n in range(2)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    codes = [child.exitcode for child in children]  # None: it still runs, which fails the test
    for child in children:
        child.kill()
        child.join()
    return codes, log.read_text()


@pytest.fixture
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("log") / "log.txt"


def test_an_interrupted_run_of_two_is_resumed_by_two(options, log, tmp_path):
    def command(name: str) -> list[str]:
        return arguments(replace(options(tmp_path / name), save_steps=4, attention_dropout=0.1))

    assert run_two(command("whole"), log)[0] == [0, 0]
    codes, printed = run_two(command("run"), log, {0: KillAt("qadeploy.training.trainer", "prune", 2)})
    assert codes == [-signal.SIGKILL, 1]
    assert printed.count("Error: another of the 2 processes ended without an error message") == 1
    assert "Traceback" not in printed
    codes, printed = run_two([*command("run"), "--resume"], log)
    assert codes == [0, 0], printed
    assert printed.count("resumes after step 8, from checkpoint-8") == 1
    assert_same(tmp_path / "run", tmp_path / "whole")


def limit_files() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))


@pytest.mark.parametrize(
    ("changes", "before", "codes", "message"),
    [
        ({"data": "nowhere.jsonl"}, {}, [2, 2], "Error: nowhere.jsonl: no such file"),
        ({"epochs": "many"}, {}, [2, 2], "Error: Invalid value for '--epochs'"),
        (
            {"batch_size": 5},
            {},
            [2, 2],
            "Error: batch-size 5 cannot be shared by 2 processes: give --batch-size 4 or 6\n",
        ),
        ({}, {1: limit_files}, [1, 1], "checkpoint-13: cannot be written, the disk "),
        (
            {},
            {1: KillAt("qadeploy.training.distributed", "wait", 1)},
            [1, -9],
            "Error: another of the 2 processes ended",
        ),
    ],
)
def test_an_error_ends_all_processes_with_one_message(changes, before, codes, message, options, log, tmp_path):
    found, printed = run_two(arguments(replace(options(tmp_path / "run"), **changes)), log, before)
    assert found == codes, printed
    assert "Traceback" not in printed
    assert printed.count("Error") == 1
    assert message in printed
    assert [p.name for p in tmp_path.iterdir()] == []
