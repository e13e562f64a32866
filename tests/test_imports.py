"""A service that embeds the answerer must start fast and without the training packages."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest

import qadeploy
from tests.processes_for_tests import ended, succeeded

HEAVY = ("torch", "transformers", "optimum", "datasets", "accelerate", "onnx", "pyarrow", "ray")
LIGHT_SECONDS = 1.5

ANSWER = """
import sys
from qadeploy import Answerer

found = Answerer.load(sys.argv[1]).answer("Who keeps the lamp?", "Ada keeps the lamp in room 0.")
assert found[0].text == "Ada", found
"""

COMMANDS = """
import sys
from qadeploy.cli import main

for args in (["--help"], ["train", "--help"], ["doctor"], ["ask", sys.argv[1], "--question", "Who keeps the lamp?",
             "--context", "Ada keeps the lamp.", "--trace"], ["answer", sys.argv[1], "--input", sys.argv[2],
             "--output", sys.argv[3]], ["evaluate", sys.argv[1], "--data", sys.argv[2]],
             ["tune", sys.argv[1], "--data", sys.argv[2], "--threads", "1", "--dry-run"]):
    try:
        main(args)
    except SystemExit as end:
        assert not end.code, (args, end.code)
"""

LOADED = f"""
import sys
found = [name for name in {HEAVY!r} if name in sys.modules]
assert not found, found
"""

BLOCK = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "optimum", "datasets", "accelerate", "onnx"):
            raise ImportError(f"{name} is blocked", name=name)

sys.meta_path.insert(0, Blocker())
try:
    import torch
except ImportError:
    pass
else:
    raise AssertionError("the blocker does not block")
"""


def run(script: str, *args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", script, *(str(a) for a in args)]
    return succeeded(command, timeout=120)


def test_importing_and_answering_load_no_training_package(bundle):
    run(ANSWER + LOADED, bundle)


def test_help_doctor_and_the_commands_on_a_bundle_load_no_training_package(bundle, tiny, tmp_path):
    output = tmp_path / "answers.jsonl"
    done = run(COMMANDS + LOADED, bundle, tiny.data, output)
    assert "Usage:" in done.stdout
    assert len(output.read_text().splitlines()) == 96


def test_answers_where_no_training_package_can_be_imported(bundle):
    run(BLOCK + ANSWER, bundle)


def test_training_without_its_packages_names_the_pip_line():
    script = BLOCK + "from qadeploy.cli import main\nmain(['train'])"
    done = ended([sys.executable, "-c", script], timeout=120)
    assert done.returncode == 1
    assert "pip install 'qadeploy[train]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_cold_process_answers_soon(bundle: Path):
    idle = os.getloadavg()[0] < 0.5 * (os.cpu_count() or 1)
    seconds = []
    for _ in range(3 if idle else 1):
        started = time.perf_counter()
        run(ANSWER, bundle)
        seconds.append(time.perf_counter() - started)
    print(f"import, load and one answer in a new process: {min(seconds):.2f} s")
    if idle and os.environ.get("QADEPLOY_SLOW") != "1":
        assert min(seconds) < LIGHT_SECONDS


def test_public_names():
    assert qadeploy.__all__ == ["Answer", "Answerer", "Corpus", "Example", "__version__"]
    assert all(hasattr(qadeploy, name) for name in qadeploy.__all__)
    assert qadeploy.__version__ == version("qadeploy")


@pytest.mark.parametrize("module", ["qadeploy", "qadeploy.cli"])
def test_importing_prints_nothing(module):
    done = run(f"import {module}")
    assert done.stdout + done.stderr == ""
