"""Checkpoints whose weights are a pickle: refused unless allowed explicitly, and then no code in them runs."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from qadeploy.bench.peers import pipeline
from qadeploy.cli import main
from qadeploy.errors import CheckpointError
from qadeploy.training.checkpoint import Hub, load_checkpoint
from qadeploy.training.train import train
from tests.cli_for_tests import run
from tests.conftest import tiny_options, triplets, write_jsonl

REFUSED = r"its weights exist only as a pickle \(pytorch_model\.bin.*\), which can run code when it is read\. .*--allow-pickle"


@pytest.fixture
def pickled(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """The tiny checkpoint with its weights as torch.save writes them."""
    folder = tmp_path / "pickled"
    shutil.copytree(tiny_checkpoint, folder)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    return folder


class Touch:
    """Creates a file when it is unpickled; an untrusted pickle may do anything."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.place,)


def test_a_pickle_is_refused_with_the_way_out(pickled):
    with pytest.raises(CheckpointError, match=f"^{re.escape(str(pickled))}: {REFUSED}"):
        load_checkpoint(pickled)
    with pytest.raises(CheckpointError, match=REFUSED):
        pipeline.load(str(pickled), "cpu", 1, {})


def test_shards_of_pickles_are_refused_too(pickled):
    (pickled / "pytorch_model.bin").rename(pickled / "pytorch_model-00001-of-00001.bin")
    names = torch.load(pickled / "pytorch_model-00001-of-00001.bin", weights_only=True)
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "pytorch_model-00001-of-00001.bin")}
    (pickled / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=REFUSED):
        load_checkpoint(pickled)
    assert load_checkpoint(pickled, Hub(allow_pickle=True))


def test_asked_for_by_name_it_is_the_same_model(pickled, tiny_checkpoint):
    found = load_checkpoint(pickled, Hub(allow_pickle=True)).model.state_dict()
    wanted = load_checkpoint(tiny_checkpoint).model.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_nothing_in_it_runs_even_then(pickled, tmp_path):
    torch.save(Touch(tmp_path / "touched"), pickled / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"the checkpoint cannot be loaded: "):
        load_checkpoint(pickled, Hub(allow_pickle=True))
    (pickled / "pytorch_model.bin").write_bytes(pickle.dumps(Touch(tmp_path / "touched")))
    with pytest.raises(CheckpointError, match=r"the checkpoint cannot be loaded: "):
        load_checkpoint(pickled, Hub(allow_pickle=True))
    assert not (tmp_path / "touched").exists()


def test_beside_safetensors_a_pickle_is_left_alone(tiny_checkpoint, tmp_path):
    folder = tmp_path / "both"
    shutil.copytree(tiny_checkpoint, folder)
    torch.save(Touch(tmp_path / "touched"), folder / "pytorch_model.bin")
    assert load_checkpoint(folder)
    assert load_checkpoint(folder, Hub(allow_pickle=True))
    assert not (tmp_path / "touched").exists()


def test_the_commands_take_the_flag(pickled, tmp_path):
    data = write_jsonl(tmp_path / "keepers.jsonl", triplets(8))
    evaluate = ["evaluate", str(pickled), "--data", str(data), "--device", "cpu"]
    ask = ["ask", str(pickled), "--question", "Who keeps the lamp?", "--context", "Ada keeps the lamp."]
    for command in (
        evaluate,
        [*ask, "--device", "cpu"],
        ["export", str(pickled), "--eval-data", str(data), "--out", str(tmp_path / "b")],
    ):
        ended = CliRunner().invoke(main, command)
        assert (ended.exit_code, bool(re.search(REFUSED, ended.output))) == (1, True), ended.output
        if command[0] != "export":
            assert run(*command, "--allow-pickle").exit_code == 0


def test_a_run_on_a_pickle_is_safetensors(pickled, tmp_path):
    data = write_jsonl(tmp_path / "keepers.jsonl", triplets(24))
    options = tiny_options(data, pickled, tmp_path / "run", epochs=1)
    with pytest.raises(CheckpointError, match=REFUSED):
        train(options, lambda line: None, progress=False)
    allowed = tiny_options(data, pickled, tmp_path / "run", epochs=1, allow_pickle=True)
    folder = train(allowed, lambda line: None, progress=False).folder
    assert (folder / "checkpoint" / "model.safetensors").is_file()
    assert not list(folder.rglob("*.bin"))


def test_torch_obeys_the_quota(tiny_checkpoint, monkeypatch):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        monkeypatch.setattr("qadeploy.training.checkpoint.usable_cpus", lambda: 3)
        load_checkpoint(tiny_checkpoint)
        assert torch.get_num_threads() == 3
        torch.set_num_threads(2)  # as OMP_NUM_THREADS or torchrun chose
        load_checkpoint(tiny_checkpoint)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
