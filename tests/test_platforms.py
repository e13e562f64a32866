"""Other systems, simulated in a separate process: features that Windows and macOS lack are removed before the import.

Not simulated: file names, line ends of the console, and the libraries' wheels for those systems.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest

from qadeploy import Answerer, Corpus
from qadeploy.machine import Machine, on_windows, parse_cpuinfo, parse_sysctl
from qadeploy.shipped import base_bundle_path
from tests.conftest import triplets, write_jsonl
from tests.container_steps import ROOT
from tests.processes_for_tests import succeeded

PAIRS = [(str(row["question"]), str(row["context"])) for row in triplets(3)]

SIMULATION = """
import asyncio, ctypes, email, fcntl, http.server, importlib.metadata, json, multiprocessing, os, shutil, signal, subprocess
import sys, tempfile, threading, uuid
import click._termui_impl, click.testing, fastapi, numpy, onnxruntime, prometheus_client, prometheus_client.process_collector, tokenizers, uvicorn
import uvicorn.protocols.http.httptools_impl

folder, platform, pairs = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
missing = {
    "win32": {
        os: ["fork", "fwalk", "register_at_fork", "sched_getaffinity", "pread", "pwrite", "sysconf", "getuid", "geteuid", "statvfs",
             "O_NOFOLLOW", "O_NONBLOCK", "O_DIRECTORY", "mkfifo", "getloadavg", "uname"],
        signal: ["SIGHUP", "SIGKILL", "SIGUSR1", "SIGALRM", "setitimer"],
    },
    "darwin": {os: ["sched_getaffinity"]},
}
absent = {"win32": {"fcntl", "resource", "pwd", "grp", "termios"}, "darwin": set()}[platform]
access, mode = os.O_ACCMODE, fcntl.F_GETFL


def opened(path):
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{name}") == os.path.abspath(path):
                return True
        except OSError:
            pass
    return False


def refuse(event, args):
    if event == "open" and isinstance(args[0], (str, bytes, os.PathLike)):
        path = os.fsdecode(args[0])
        if path.startswith(("/proc/", "/sys/fs/cgroup")):
            raise FileNotFoundError(2, "No such file or directory", path)
        if platform == "win32" and os.path.isdir(path):
            raise PermissionError(13, "Permission denied", path)
    if event == "os.symlink" and (platform == "win32" or str(args[0]).startswith("/proc/")):
        raise OSError(1314, "A required privilege is not held by the client", args[1])
    if event == "os.rename" and platform == "win32" and opened(args[0]):
        raise PermissionError(13, "in use", args[0])
    if event == "import" and args[0] in absent:
        raise ModuleNotFoundError(f"No module named {args[0]!r}", name=args[0])
    if event == "ctypes.dlsym" and args[1] == "renameat2":
        raise AttributeError(args[1])


def fsync(descriptor, real=os.fsync, flags=fcntl.fcntl):
    if platform == "win32" and flags(descriptor, mode) & access == os.O_RDONLY:
        raise OSError(9, "Bad file descriptor")
    real(descriptor)


def open_as_windows(path, flags, *args, real=os.open, **kwargs):
    ours = sys._getframe(1).f_globals["__name__"].startswith("qadeploy")
    data = flags & os.O_CREAT or flags & access == os.O_RDONLY and os.path.isfile(path)
    if ours and data and not flags & os.O_BINARY:
        raise OSError(22, "opened as text, so line ends would change", path)
    return real(path, flags & ~os.O_BINARY, *args, **kwargs)


class Kernel32:
    def IsProcessorFeaturePresent(self, feature):
        return 0
    def GlobalMemoryStatusEx(self, status):
        status._obj[1] = 2**34
        return 1


shutil._use_fd_functions = False
os.fsync = fsync
if platform == "win32":
    ctypes.windll = type("Windll", (), {"kernel32": Kernel32()})()
    os.O_BINARY, os.open = 0x40000000, open_as_windows
for module, names in missing[platform].items():
    for name in names:
        vars(module).pop(name, None)
for name in absent:
    sys.modules.pop(name, None)
sys.platform = platform
sys.addaudithook(refuse)

from pathlib import Path
from qadeploy import Answerer
from qadeploy.cli import main
from qadeploy.files import replace_folder, temporary_folder, write_bytes
from qadeploy.inference.bundle import open_bundle, rewrite_manifest
from qadeploy.inference.doctor import diagnose
from qadeploy.machine import machine, usable_cpus
from qadeploy.shipped import base_bundle_path

folder = Path(folder)
answerer = Answerer.load(base_bundle_path(), load_timeout=60)
found = {"answers": [each[0].text for each in answerer.answer_batch(pairs)], "cpus": usable_cpus(), "cpu": machine().cpu}
found["sets"] = machine().instruction_sets
write_bytes(folder / "a.bin", b"first\\n")
write_bytes(folder / "a.bin", b"second\\r\\n")
found["bytes"] = (folder / "a.bin").read_bytes().decode()
shutil.copytree(base_bundle_path(), folder / "copy")
if platform == "darwin":  # Windows replaces no folder whose files are open
    found["name"] = rewrite_manifest(open_bundle(folder / "copy"), {"name": "changed"}).manifest["name"]
for text in ("one", "two"):
    with temporary_folder(folder / "place") as work:
        (work / "x").write_text(text)
        replace_folder(work, folder / "place")
found["folder"] = (folder / "place" / "x").read_text()
report = diagnose()
found["memory"] = report["memory_gib"]
found["problems"] = report["problems"]


def run(*arguments):
    done = click.testing.CliRunner().invoke(main, list(map(str, arguments)))
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done


question, context = pairs[0]
ask = run("ask", base_bundle_path(), "--question", question, "--context", context, "--json")
found["ask"] = json.loads(ask.stdout)["answers"][0]["text"]
found["doctor"] = run("doctor").stdout
run("answer", base_bundle_path(), "--input", folder / "rows.jsonl", "--output", folder / "answers.jsonl", "--json")
found["batch"] = len((folder / "answers.jsonl").read_text().splitlines())
(folder / "texts").mkdir()
for number, (_, text) in enumerate(pairs):
    (folder / "texts" / f"{number}.md").write_text(f"# Room {number}\\n\\n{text}\\n")
run("index", folder / "texts", "--out", folder / "index")
ask = run("ask", base_bundle_path(), "--corpus", folder / "index", "--question", question, "--json")
found["corpus"] = json.loads(ask.stdout)["answers"][0]
from qadeploy.serve.run import _room
found["connections"] = _room(None)
found["left"] = sorted(path.name for path in folder.iterdir())
print(json.dumps(found))
"""


@pytest.fixture(scope="module", params=["win32", "darwin"])
def found(request, tmp_path_factory) -> dict[str, Any]:
    """The results of qadeploy on the simulated system."""
    folder = tmp_path_factory.mktemp(request.param)
    write_jsonl(folder / "rows.jsonl", triplets(3))
    command = [sys.executable, "-c", SIMULATION, str(folder), request.param, json.dumps(PAIRS)]
    done = succeeded(command, timeout=300, cwd=ROOT)
    return {**json.loads(done.stdout.splitlines()[-1]), "platform": request.param}


def test_the_runtime_answers_there_as_here(found, tmp_path):
    answerer = Answerer.load(base_bundle_path())
    here = [each[0].text for each in answerer.answer_batch(PAIRS)]
    assert found["answers"] == here
    assert found["ask"] == here[0]
    assert found["batch"] == len(PAIRS)
    (tmp_path / "texts").mkdir()
    for number, (_, text) in enumerate(PAIRS):
        (tmp_path / "texts" / f"{number}.md").write_text(f"# Room {number}\n\n{text}\n")
    best = Corpus.build(tmp_path / "texts", tmp_path / "index").answer(answerer, PAIRS[0][0])[0]
    assert found["corpus"] == {**best.to_dict(), "score": pytest.approx(best.score)}


def test_files_are_written_whole_and_nothing_is_left(found):
    assert found["bytes"] == "second\r\n"
    assert found["folder"] == "two"
    assert found.get("name") == ("changed" if found["platform"] == "darwin" else None)
    assert found["left"] == ["a.bin", "answers.jsonl", "copy", "index", "place", "rows.jsonl", "texts"]


def test_the_machine_is_told_as_far_as_it_is_known(found):
    assert found["cpus"] >= 1
    assert found["cpu"]
    assert found["sets"] == []  # there is no sysctl here, and this Windows knows no feature
    assert found["memory"] > 0
    assert not [problem for problem in found["problems"] if "Error" in problem]
    assert "no known vector features" in found["doctor"]
    assert found["connections"] >= 1


# ---------------------------------------------------------------- CPUs, as their systems tell them

EPYC = """processor\t: 0
vendor_id\t: AuthenticAMD
model name\t: AMD EPYC 7B13
flags\t\t: fpu sse4_2 fma avx f16c avx2 bmi2 erms sha_ni vaes vpclmulqdq
"""
NEOVERSE_V1 = """processor\t: 0
BogoMIPS\t: 2100.00
Features\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm jscvt fcma lrcpc dcpop sha3 sm3 sm4 asimddp sha512 sve asimdfhm dit uscat ilrcpc flagm ssbs paca pacg dcpodp svei8mm svebf16 i8mm bf16 dgh rng
CPU implementer\t: 0x41
"""
CORTEX_A72 = "processor\t: 0\nFeatures\t: fp asimd evtstrm crc32 cpuid\nCPU part\t: 0xd08\n"
APPLE_M2 = """machdep.cpu.brand_string: Apple M2
hw.optional.arm.FEAT_DotProd: 1
hw.optional.arm.FEAT_FP16: 1
hw.optional.arm.FEAT_BF16: 1
hw.optional.arm.FEAT_I8MM: 1
hw.optional.arm.FEAT_SME: 0
"""
MAC_PRO = """machdep.cpu.brand_string: Intel(R) Xeon(R) W-3245 CPU @ 3.20GHz
machdep.cpu.features: FPU SSE4.2 AVX1.0 RDRAND F16C
machdep.cpu.leaf7_features: BMI1 AVX2 BMI2 AVX512F AVX512DQ AVX512CD AVX512BW AVX512VL AVX512VNNI
hw.optional.avx512f: 1
"""
MAC_MINI = """machdep.cpu.brand_string: Intel(R) Core(TM) i7-8750H CPU @ 2.20GHz
machdep.cpu.leaf7_features: RDWRFSGS TSC_THREAD_OFFSET SGX BMI1 AVX2 SMEP BMI2 ERMS INVPCID FPU_CSDS MPX RDSEED ADX SMAP CLFSOPT
"""


@pytest.mark.parametrize(
    ("found", "sets", "vnni"),
    [
        (parse_cpuinfo(EPYC), ("avx2",), False),
        (parse_cpuinfo(NEOVERSE_V1), ("asimddp", "asimdhp", "i8mm", "bf16", "sve"), True),
        (parse_cpuinfo(CORTEX_A72), (), False),
        (parse_sysctl(APPLE_M2), ("asimddp", "asimdhp", "i8mm", "bf16"), True),
        (parse_sysctl(MAC_PRO), ("avx2", "avx512f", "avx512_vnni"), True),
        (parse_sysctl(MAC_MINI), ("avx2",), False),
        (parse_sysctl(""), (), False),
        (on_windows({43, 66, 67}.__contains__), ("asimddp", "asimdhp", "i8mm"), True),
    ],
)
def test_instruction_sets_have_the_same_names_everywhere(found, sets, vnni):
    assert (found.instruction_sets, found.has_vnni) == (sets, vnni)
    assert found.cpu


def test_macos_names_the_cpu():
    assert parse_sysctl(APPLE_M2) == Machine("Apple M2", ("asimddp", "asimdhp", "i8mm", "bf16"))
