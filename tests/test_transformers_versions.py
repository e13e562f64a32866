"""The releases of transformers that training and export support, and the differences between them."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from qadeploy.errors import FailureError
from qadeploy.training.transformers_versions import OLDEST, TOO_NEW, require_supported, trainer_options
from tests.conftest import triplets, write_jsonl
from tests.processes_for_tests import succeeded

ROOT = Path(__file__).resolve().parents[1]


def test_the_range_is_that_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    (wanted,) = (r for r in project["optional-dependencies"]["train"] if r.startswith("transformers"))
    low, high = (".".join(map(str, numbers)) for numbers in (OLDEST, TOO_NEW))
    assert Requirement(wanted).specifier == Requirement(f"x>={low},<{high}").specifier


@pytest.mark.parametrize("found", ["4.53.0", "4.57.6", "5.0.0rc1", "5.24.0"])
def test_a_release_inside_the_range_is_taken(found):
    require_supported(found)


@pytest.mark.parametrize("found", ["4.52.4", "6.0.0", "6.0.0.dev0"])
def test_a_release_outside_the_range_is_refused_with_the_fix(found):
    with pytest.raises(FailureError) as error:
        require_supported(found)
    assert str(error.value) == (
        f"transformers {found} is installed, but training and export need 4.53 or newer, below 6: "
        "pip install 'transformers>=4.53,<6'"
    )


OUTSIDE = """
import importlib.metadata as metadata
import sys

from click.testing import CliRunner

real = metadata.version
metadata.version = lambda name: "6.0.0" if name == "transformers" else real(name)

from qadeploy.cli import main

data, checkpoint = sys.argv[1:]
for command in (["train", "--data", data], ["export", checkpoint]):
    result = CliRunner().invoke(main, command)
    print(result.exit_code, repr(result.stdout), result.stderr)
"""


def test_training_and_export_say_so_before_they_read_anything(tiny_checkpoint, tmp_path):
    data = write_jsonl(tmp_path / "few.jsonl", triplets(8))
    done = succeeded([sys.executable, "-c", OUTSIDE, data, tiny_checkpoint], cwd=tmp_path)
    told = "1 '' Error: transformers 6.0.0 is installed, but training and export need 4.53 or newer, below 6: "
    train, export = done.stdout.removesuffix("\n\n").split("\n\n")
    for said in (train, export):
        assert said.startswith(told)
        assert "\n" not in said
    assert not list(tmp_path.glob("runs*"))


@pytest.mark.parametrize(("ratio", "steps"), [(0.0, 0), (0.06, 6), (0.5, 50), (1.0, 100)])
def test_the_warmup_covers_the_share_of_the_steps(ratio, steps, tmp_path):
    from qadeploy.training.torch_device import training_device
    from qadeploy.training.trainer import training_arguments

    arguments = training_arguments(
        training_device("cpu"), output_dir=str(tmp_path), report_to=[], warmup_ratio=ratio, gradient_checkpointing=True
    )
    assert arguments.get_warmup_steps(100) == steps
    assert arguments.gradient_checkpointing


def test_other_options_keep_their_names():
    assert trainer_options({"seed": 3, "bf16": False}) == {"seed": 3, "bf16": False}
