"""The machine: the content of /proc/cpuinfo, the differences from a manifest's machine, and the warning at load."""

from __future__ import annotations

import gc
import os
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from qadeploy import Answerer
from qadeploy.data.arrow import read_table
from qadeploy.errors import InputError, MachineWarning
from qadeploy.inference.doctor import diagnose
from qadeploy.inference.session import OnnxModel, session_options
from qadeploy.machine import (
    INSTRUCTION_SETS,
    Machine,
    entry_has_vnni,
    machine,
    parse_cpuinfo,
    quick_collections,
    usable_cpus,
)
from qadeploy.shipped import base_bundle_path
from tests.conftest import sealed_copy
from tests.processes_for_tests import succeeded

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
    found = parse_cpuinfo(XEON)
    assert found == Machine(
        "Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz", ("avx2", "avx512f", "avx512_vnni", "amx_int8")
    )
    assert (found.has_vnni, found.has_bf16) == (True, False)
    arm = parse_cpuinfo(GRAVITON)
    assert arm.instruction_sets == ("asimddp", "asimdhp", "i8mm", "bf16", "sve")
    assert arm.has_vnni
    assert arm.cpu  # such a kernel gives no name, so the platform's is used
    assert not parse_cpuinfo("flags : avx2 avx512f").has_vnni
    assert parse_cpuinfo("").instruction_sets == ()


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
        ({"instruction_sets": []}, ""),  # a system that does not report them
        ({"instruction_sets": "avx2"}, ""),
        ({}, ""),
        (None, ""),
    ],
)
def test_what_differs_is_named(entry, words):
    assert parse_cpuinfo(XEON).unlike(entry) == words
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
        model.run_batch = model._run_padded
        return model

    monkeypatch.setattr("qadeploy.inference.answerer.OnnxModel", on_cuda)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Answerer.load(foreign, device="cuda")


def test_the_command_line_says_it_in_one_line_on_stderr(foreign):
    command = [sys.executable, "-W", "error", "-m", "qadeploy", "ask", str(foreign), "--json"]
    command += ["--question", "Who keeps the lamp?", "--context", "Ada keeps the lamp.", "--device", "cpu"]
    done = succeeded(command, timeout=60, env={**os.environ, "PYTHONPATH": os.getcwd()})
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"Warning: {foreign}: this machine lacks ")
    assert done.stdout.startswith("{")


@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        ({"cpu.max": "max 100000"}, 8),
        ({"cpu.max": "150000 100000"}, 2),
        ({"cpu.max": "50000 100000"}, 1),
        ({"cpu.max": "odd"}, 8),
        ({"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, 3),
        ({"cpu,cpuacct/cpu.cfs_quota_us": "-1", "cpu,cpuacct/cpu.cfs_period_us": "100000"}, 8),
        ({"cpu/cpu.cfs_quota_us": "300000"}, 8),
        ({}, 8),
    ],
)
def test_a_containers_quota_bounds_the_cpus(monkeypatch, tmp_path, files, cpus):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    put(tmp_path, files)
    assert cpus_within(monkeypatch, tmp_path, tmp_path / "none") == cpus


def cpus_within(monkeypatch: pytest.MonkeyPatch, cgroups: Path, own: Path) -> int:
    monkeypatch.setattr("qadeploy.machine._CGROUPS", cgroups)
    monkeypatch.setattr("qadeploy.machine._OWN_GROUPS", own)
    return usable_cpus()


def put(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text + "\n")


V1 = "5:memory:/other\n4:cpu,cpuacct:/docker/ab12/inner\n1:name=systemd:/\n0::/ignored\n"


@pytest.mark.parametrize(
    ("own", "files", "cpus"),
    [
        # The limit of the group itself, of a parent group, and the smallest of several.
        ("0::/a/b\n", {"a/b/cpu.max": "300000 100000", "a/cpu.max": "max 100000"}, 3),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000", "a/cpu.max": "300000 100000"}, 3),
        ("0::/a/b\n", {"a/b/cpu.max": "700000 100000", "a/cpu.max": "250000 100000", "cpu.max": "400000 100000"}, 3),
        ("0::/a/b\n", {"a/b/cpu.max": "150000 100000", "a/cpu.max": "250000 100000"}, 2),
        ("0::/a/b\n", {"a/c/cpu.max": "100000 100000", "b/cpu.max": "100000 100000"}, 8),  # the groups of others
        ("0::/a b:c\n", {"a b:c/cpu.max": "100000 100000"}, 1),  # a name may hold anything
        ("0::/../x\n", {"cpu.max": "200000 100000"}, 2),  # outside of this namespace
        ("0::/../../x\n", {"../x/cpu.max": "100000 100000"}, 8),
        # Version 1, by the controller's name, in either order; the host's path is not there in a container.
        (V1, {"cpu,cpuacct/docker/ab12/inner/cpu.cfs_quota_us": "200000", "cpu,cpuacct/docker/ab12/inner/cpu.cfs_period_us": "100000"}, 2),
        (V1, {"cpu,cpuacct/docker/cpu.cfs_quota_us": "50000", "cpu,cpuacct/docker/cpu.cfs_period_us": "25000"}, 2),
        (V1, {"cpu/cpu.cfs_quota_us": "400000", "cpu/cpu.cfs_period_us": "100000"}, 4),
        (V1, {"cpu,cpuacct/other/cpu.cfs_quota_us": "100000", "cpu,cpuacct/other/cpu.cfs_period_us": "100000"}, 8),
        ("3:cpuacct,cpu:/x\n", {"cpuacct,cpu/x/cpu.cfs_quota_us": "100000", "cpuacct,cpu/x/cpu.cfs_period_us": "100000"}, 1),
        # Both versions side by side.
        ("2:cpu:/x\n0::/y\n", {"cpu/x/cpu.cfs_quota_us": "500000", "cpu/x/cpu.cfs_period_us": "100000", "unified/y/cpu.max": "300000 100000"}, 3),
        # An unreadable limit is ignored.
        ("nonsense\n\n0:\n", {"cpu.max": "600000 100000"}, 6),
        ("0::/a\n", {"a/cpu.max": "0 100000", "cpu.max": "-5 100000"}, 8),
        ("0::/a\n", {"a/cpu.max": "100000"}, 8),
    ],
)  # fmt: skip
def test_the_smallest_quota_on_the_way_up_counts(monkeypatch, tmp_path, own, files, cpus):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    put(tmp_path / "sys" / "cgroup", files)
    put(tmp_path, {"own": own})
    assert cpus_within(monkeypatch, tmp_path / "sys" / "cgroup", tmp_path / "own") == cpus


def test_affinity_counts_if_it_is_smaller(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5})
    put(tmp_path, {"own": "0::/\n", "cpu.max": "600000 100000"})
    assert cpus_within(monkeypatch, tmp_path, tmp_path / "own") == 2


def test_no_library_is_left_to_count_cpus_by_itself(monkeypatch):
    arrow = pytest.importorskip("pyarrow")
    before = arrow.cpu_count()
    try:
        arrow.set_cpu_count(4)
        monkeypatch.setattr("qadeploy.data.arrow.usable_cpus", lambda: 3)
        with pytest.raises(InputError):
            read_table(b"PAR1", "x", "parquet")
        assert arrow.cpu_count() == 3
    finally:
        arrow.set_cpu_count(before)
    monkeypatch.setattr("qadeploy.inference.session.usable_cpus", lambda: 3)
    assert (session_options().intra_op_num_threads, session_options(2).intra_op_num_threads) == (3, 2)


def test_only_one_function_counts_cpus():
    root = Path(__file__).resolve().parents[1]
    counts = re.compile(r"\b(cpu_count\(|sched_getaffinity|process_cpu_count)")
    found = [path.name for path in sorted((root / "qadeploy").rglob("*.py")) if counts.search(path.read_text("utf-8"))]
    assert found == ["arrow.py", "machine.py", "train.py"]  # pyarrow's own, which is lowered; a figure of the record


def test_an_answerer_obeys_the_quota(tiny, monkeypatch):
    monkeypatch.setattr("qadeploy.inference.session.usable_cpus", lambda: 1)
    assert Answerer.load(tiny.bundle()).model.threads == 1


@pytest.mark.parametrize(
    ("sets", "measured", "warned"),
    [(("avx2",), None, True), (("avx2",), {"f1": 80}, False), (("avx2", "avx_vnni"), None, False), ((), None, False)],
)
def test_a_bundle_for_any_machine_warns_only_where_int8_may_saturate(sets, measured, warned, tmp_path, monkeypatch):
    monkeypatch.setattr("qadeploy.machine.machine", lambda: Machine("another", sets))
    path = sealed_copy(base_bundle_path(), tmp_path / "base", measured_without_vnni=measured)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Answerer.load(path, threads=1)
    assert [w.category for w in caught] == [MachineWarning] * warned
    assert all("no VNNI, so 8-bit matmuls may saturate" in str(w.message) for w in caught)


@pytest.mark.parametrize(
    ("made", "exported_on", "said"),
    [
        ({}, None, True),
        ({"reduce_range": False}, None, True),
        ({"reduce_range": True}, None, False),
        ({}, {"instruction_sets": ["avx2"]}, False),  # before it was tuned elsewhere
    ],
)
def test_saturation_is_named_besides_the_session_settings(made, exported_on, said, plain_int8, tmp_path, monkeypatch):
    monkeypatch.setattr("qadeploy.machine.machine", lambda: Machine("another", ("avx2",)))
    monkeypatch.setattr("qadeploy.inference.answerer.machine", lambda: Machine("another", ("avx2",)))
    entry = {"instruction_sets": ["avx2", "avx512_vnni"]}
    path = sealed_copy(plain_int8, tmp_path / "int8", machine=entry, made=made, exported_on=exported_on)
    with pytest.warns(MachineWarning) as caught:
        Answerer.load(path, device="cpu", threads=1)
    (warning,) = caught
    assert ("(qadeploy export RUN --quantize --reduce-range)" in str(warning.message)) is said
    assert "this machine lacks avx512_vnni, unlike" in str(warning.message)


def test_the_doctor_names_the_commit_of_a_checkout():
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        pytest.skip("not a checkout")
    head = succeeded(["git", "-C", root, "rev-parse", "HEAD"]).stdout.strip()
    assert head.startswith(diagnose()["commit"].removesuffix("+"))


def test_what_exists_is_left_out_of_collections_within_a_block_alone():
    gc.unfreeze()
    with quick_collections():
        frozen = gc.get_freeze_count()
        assert frozen > 10_000
        with quick_collections():
            pass
        assert gc.get_freeze_count() == frozen
    assert gc.get_freeze_count() == 0
