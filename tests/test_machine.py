"""The machine: what /proc/cpuinfo tells, what differs from a manifest's, and the warning at load."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from qadeploy import Answerer
from qadeploy.errors import MachineWarning
from qadeploy.inference.session import OnnxModel
from qadeploy.machine import INSTRUCTION_SETS, Machine, entry_has_vnni, machine, parse
from tests.conftest import sealed_copy

XEON = """processor\t: 0
vendor_id\t: GenuineIntel
model name\t: Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz
flags\t\t: fpu sse2 avx2 avx512f avx512bw amx_bf16 avx512_vnni amx_tile amx_int8
bugs\t\t: spectre_v1 avx_vnni
processor\t: 1
model name\t: another
flags\t\t: fpu sse2 avx2 avx512f avx512bw avx512_vnni amx_int8
"""
GRAVITON = """processor\t: 0
BogoMIPS\t: 2100.00
Features\t: fp asimd evtstrm aes asimdhp cpuid asimddp sve i8mm bf16
CPU implementer\t: 0x41
"""


def test_what_all_cores_have_is_read_by_the_kernel_s_names():
    found = parse(XEON)
    assert found == Machine(
        "Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz", ("avx2", "avx512f", "avx512_vnni", "amx_int8")
    )
    assert (found.has_vnni, found.has_bf16) == (True, False)
    arm = parse(GRAVITON)
    assert arm.instruction_sets == ("asimddp", "asimdhp", "i8mm", "bf16", "sve")
    assert arm.has_vnni
    assert arm.cpu  # such a kernel gives no name: the platform's
    assert not parse("flags : avx2 avx512f").has_vnni
    assert parse("").instruction_sets == ()


def test_this_machine_is_that_of_the_kernel_s_list():
    words = set(Path("/proc/cpuinfo").read_text().split())
    assert machine().instruction_sets == tuple(name for name in INSTRUCTION_SETS if name in words)
    assert machine() is machine()


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"instruction_sets": ["avx2", "avx512f", "avx512_vnni", "amx_int8"]}, ""),
        ({"instruction_sets": ["avx2", "avx512f"]}, "has avx512_vnni, amx_int8 besides"),
        ({"instruction_sets": ["avx2", "avx512f", "avx512_vnni", "amx_int8", "avx_vnni"]}, "lacks avx_vnni"),
        ({"instruction_sets": ["asimddp"]}, "lacks asimddp and has avx2, avx512f, avx512_vnni, amx_int8 besides"),
        ({"instruction_sets": ["avx2", "avx512f", "avx512_vnni", "amx_int8", "of a later version", 7]}, ""),
        ({"instruction_sets": []}, ""),  # a system that does not tell
        ({"instruction_sets": "avx2"}, ""),
        ({}, ""),
        (None, ""),
    ],
)
def test_what_differs_is_named(entry, words):
    assert parse(XEON).unlike(entry) == words
    assert Machine("unknown", ()).unlike(entry) == ""


def test_whether_an_entry_had_vnni():
    assert not entry_has_vnni({"instruction_sets": ["avx2"]})
    assert all(map(entry_has_vnni, ({"instruction_sets": ["avx2", "avx_vnni"]}, {"instruction_sets": []}, None, {})))


# ---------------------------------------------------------------- at load


@pytest.fixture(scope="module")
def foreign(bundle, tmp_path_factory) -> Path:
    """A bundle whose settings were measured on a machine that has every instruction set."""
    entry = {"cpu": "x", "instruction_sets": list(INSTRUCTION_SETS), "threads": 2, "onnxruntime": "1.32.0"}
    return sealed_copy(bundle, tmp_path_factory.mktemp("foreign") / "foreign", machine=entry)


def test_a_bundle_measured_on_another_kind_of_machine_warns_once_and_answers(foreign):
    with pytest.warns(MachineWarning) as caught:
        answerer = Answerer.load(foreign, device="cpu")
    (warning,) = caught
    assert issubclass(MachineWarning, UserWarning)
    assert f"{foreign}: this machine lacks " in str(warning.message)
    assert f"qadeploy tune {foreign} measures them again" in str(warning.message)
    assert warning.filename == __file__  # points to who loaded
    assert answerer.answer("Who keeps the lamp?", "Ada keeps the lamp.")


@pytest.mark.parametrize("kind", ["its own", "without the entry"])
def test_a_bundle_of_this_machine_and_one_that_does_not_say_load_in_silence(kind, bundle, tmp_path):
    changes = {} if kind == "its own" else {"machine": None}
    path = sealed_copy(bundle, tmp_path / "same", **changes)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Answerer.load(path, device="cpu")


def test_on_cuda_nothing_is_said(foreign, monkeypatch):
    def on_cuda(*arguments: Any, **options: Any) -> OnnxModel:
        model = OnnxModel(*arguments, **{**options, "device": "cpu"})
        model.device = "cuda"  # as where there is one
        model.warm_up = lambda window: None  # which needs it
        return model

    monkeypatch.setattr("qadeploy.inference.answerer.OnnxModel", on_cuda)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Answerer.load(foreign, device="cuda")


def test_the_command_line_says_it_in_one_line_on_stderr(foreign):
    command = [sys.executable, "-W", "error", "-m", "qadeploy", "ask", str(foreign), "--json"]
    command += ["--question", "Who keeps the lamp?", "--context", "Ada keeps the lamp.", "--device", "cpu"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=False, env={**os.environ, "PYTHONPATH": os.getcwd()}
    )
    assert done.returncode == 0, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"Warning: {foreign}: this machine lacks ")
    assert done.stdout.startswith("{")
