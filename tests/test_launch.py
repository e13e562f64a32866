"""The launch lines of docs/scale.md: every flag in them exists, in the launcher and in ``qadeploy train``."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest
from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser

from qadeploy.cli import main

DOCS = (Path(__file__).parent.parent / "docs" / "scale.md").read_text()
SECTION = DOCS.partition("## Training on many GPUs")[2].partition("\n## ")[0]
LINES = [
    line
    for block in re.findall(r"```sh\n(.*?)```", SECTION, re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
    if "qadeploy train" in line
]


def parts(line: str) -> tuple[str, list[str], list[str]]:
    """The launcher of a line, its arguments, and those of ``train``, with a number or word for each shell variable."""
    words = shlex.split(re.sub(r"\$head", "node", re.sub(r"\$SLURM_\w+", "2", line)))
    launcher = next(i for i, word in enumerate(words) if word in ("torchrun", "accelerate"))
    module = words.index("-m")
    assert words[module : module + 3] == ["-m", "qadeploy", "train"]
    return words[launcher], words[launcher + 1 :], words[module + 3 :]


def test_the_lines_are_those_of_both_launchers():
    assert [parts(line)[0] for line in LINES] == ["torchrun", "accelerate", "torchrun", "torchrun", "torchrun"]


@pytest.mark.parametrize("line", LINES)
def test_every_flag_exists(line):
    launcher, given, of_train = parts(line)
    if launcher == "accelerate":
        assert given.pop(0) == "launch"
    parser = get_args_parser() if launcher == "torchrun" else launch_command_parser()
    found = parser.parse_args(given)  # exits where a flag is unknown
    assert (found.module, found.training_script) == (True, "qadeploy")
    assert found.training_script_args == ["train", *of_train]
    processes = (
        found.num_processes
        if launcher == "accelerate"
        else int(found.nproc_per_node) * int(found.nnodes.rpartition(":")[2])
    )
    context = main.commands["train"].make_context("train", list(of_train))  # raises on what does not exist
    assert context.params["batch_size"] % processes == 0


def test_a_flag_that_does_not_exist_would_be_found():
    with pytest.raises(click.NoSuchOption):
        main.commands["train"].make_context("train", ["--nproc-per-node", "2"])
    with pytest.raises(SystemExit):
        get_args_parser().parse_args(["--gpus", "2", "-m", "qadeploy"])
