"""The machine that this process runs on: its CPU and the instruction sets that decide which settings are fast.

They are read from ``/proc/cpuinfo`` on Linux, from ``sysctl`` on macOS, and from ``IsProcessorFeaturePresent`` on Windows. The
latter does not report VNNI, so on Windows the instruction sets of x86 CPUs are unknown.
"""

from __future__ import annotations

import ctypes
import gc
import math
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

# As the kernel names them (arch/x86/include/asm/cpufeatures.h, Documentation/arch/arm64/elf_hwcaps.rst): those that have
# their own matmul kernels in ONNX Runtime (MLAS), and those that torch needs for training in bf16.
INSTRUCTION_SETS = (
    *("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_int8", "amx_bf16"),
    *("asimddp", "asimdhp", "i8mm", "bf16", "sve", "sve2", "sme"),
)
_VNNI = frozenset({"avx512_vnni", "avx_vnni", "asimddp"})
_CPUINFO = Path("/proc/cpuinfo")
# How macOS reports them: as the value hw.optional.arm.NAME (Arm), or as a word in machdep.cpu.leaf7_features (Intel).
_SYSCTL = {
    "asimddp": "FEAT_DotProd",
    "asimdhp": "FEAT_FP16",
    "i8mm": "FEAT_I8MM",
    "bf16": "FEAT_BF16",
    "sme": "FEAT_SME",
}
_LEAF7 = {"avx2": "AVX2", "avx512f": "AVX512F", "avx512_vnni": "AVX512VNNI"}
# PF_ARM_V82_DP_INSTRUCTIONS_AVAILABLE and the like (winnt.h).
_WINDOWS = {"asimddp": 43, "asimdhp": 67, "i8mm": 66, "bf16": 68, "sve": 46, "sve2": 47, "sme": 70}


@dataclass(frozen=True, slots=True)
class Machine:
    """A CPU's name, and the ``INSTRUCTION_SETS`` that all its cores have."""

    cpu: str
    instruction_sets: tuple[str, ...]

    @property
    def has_vnni(self) -> bool:
        """Whether the CPU accumulates int8 matmuls in 32 bits; without VNNI, 8-bit weights can saturate."""
        return not _VNNI.isdisjoint(self.instruction_sets)

    @property
    def has_bf16(self) -> bool:
        """Whether an x86 CPU multiplies bf16 natively."""
        return not {"avx512_bf16", "amx_bf16"}.isdisjoint(self.instruction_sets)

    def to_dict(self, *, threads: int, onnxruntime: str) -> dict[str, Any]:
        """Returns the ``machine`` entry of a manifest: this machine, and the thread count and ONNX Runtime version used."""
        return {
            "cpu": self.cpu,
            "instruction_sets": list(self.instruction_sets),
            "threads": threads,
            "onnxruntime": onnxruntime,
        }

    def unlike(self, entry: object) -> str:
        """Describes which instruction sets this machine lacks or has in addition, compared with a ``machine`` entry.

        Returns "" if there is no difference, the entry is unreadable, or this system does not report instruction sets.
        """
        stored = entry.get("instruction_sets") if isinstance(entry, Mapping) else None
        if not isinstance(stored, list) or not stored or not self.instruction_sets:
            return ""
        # A later version may have written names that this one does not know, and so cannot look for on this machine.
        lacks = [name for name in INSTRUCTION_SETS if name in stored and name not in self.instruction_sets]
        more = [name for name in self.instruction_sets if name not in stored]
        parts = [f"lacks {', '.join(lacks)}"] if lacks else []
        parts += [f"has {', '.join(more)} besides"] if more else []
        return " and ".join(parts)


def entry_has_vnni(entry: object) -> bool:
    """Returns whether the machine of a manifest's ``machine`` entry had VNNI; True if it does not say."""
    stored = entry.get("instruction_sets") if isinstance(entry, Mapping) else None
    return not (isinstance(stored, list) and stored) or any(name in stored for name in _VNNI)


def saturation_warning(manifest: Mapping[str, Any]) -> str:
    """Says what to do if int8 matmuls of a bundle may saturate on this machine; "" if they cannot, or do no harm.

    Weights of 7 bits, which an export on a machine without VNNI or with ``--reduce-range`` makes, cannot saturate.

    Args:
        manifest: The manifest of the bundle. Its ``precision``, ``made`` and exporting machine are read, and
            ``measured_without_vnni``, which it has if its accuracy without VNNI was measured and is the same. The entry is
            for people: its ``cpu`` is a sentence on how such a CPU was simulated, not a name as in ``machine``.
    """
    here = machine()
    if manifest.get("precision") != "int8" or here.has_vnni or not here.instruction_sets:
        return ""
    exported_on = manifest.get("exported_on") or manifest.get("machine")
    reduced = (manifest.get("made") or {}).get("reduce_range") is True or not entry_has_vnni(exported_on)
    if reduced or manifest.get("measured_without_vnni"):
        return ""
    return (
        "this machine has no VNNI, so 8-bit matmuls may saturate, which costs accuracy and no setting repairs: "
        "export the run again with 7-bit weights (qadeploy export RUN --quantize --reduce-range)"
    )


@cache
def machine() -> Machine:
    """Returns the machine of this process; the result is cached."""
    if sys.platform == "win32":
        return on_windows(ctypes.windll.kernel32.IsProcessorFeaturePresent)
    try:
        if sys.platform == "darwin":
            command = ["/usr/sbin/sysctl", "machdep.cpu", "hw.optional"]
            return parse_sysctl(subprocess.run(command, capture_output=True, text=True, check=False).stdout)
        return parse_cpuinfo(_CPUINFO.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return _machine("", ())


def _machine(name: str, found: Iterable[str]) -> Machine:
    known = set(found)
    return Machine(name or platform.processor() or platform.machine(), tuple(n for n in INSTRUCTION_SETS if n in known))


def parse_cpuinfo(cpuinfo: str) -> Machine:
    """Parses the text of ``/proc/cpuinfo``."""
    name = ""
    shared: set[str] | None = None
    for line in cpuinfo.splitlines():
        key, _, value = (part.strip() for part in line.partition(":"))
        if key == "model name" and not name:
            name = value
        elif key in {"flags", "Features"}:
            shared = set(value.split()) if shared is None else shared & set(value.split())
    return _machine(name, shared or ())


def parse_sysctl(text: str) -> Machine:
    """Parses what ``sysctl machdep.cpu hw.optional`` prints on macOS."""
    values = dict(line.split(": ", 1) for line in text.splitlines() if ": " in line)
    leaf7 = values.get("machdep.cpu.leaf7_features", "").split()
    found = [name for name, key in _SYSCTL.items() if values.get(f"hw.optional.arm.{key}") == "1"]
    return _machine(
        values.get("machdep.cpu.brand_string", ""), [*found, *(n for n, word in _LEAF7.items() if word in leaf7)]
    )


def on_windows(present: Callable[[int], int]) -> Machine:
    """Queries Windows for the instruction sets of an Arm CPU; ``present`` is ``IsProcessorFeaturePresent``."""
    return _machine("", [name for name, feature in _WINDOWS.items() if present(feature)])


def memory_bytes() -> int:
    """Returns the size of this machine's memory in bytes."""
    if sys.platform == "win32":
        status = (ctypes.c_uint64 * 8)(64)  # MEMORYSTATUSEX: its own size, then the memory
        ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status))
        return int(status[1])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def peak_memory() -> int | None:
    """Returns the peak resident set size of this process in bytes, or None if the system does not report it.

    It is VmHWM (proc_pid_status(5)). getrusage's ru_maxrss survives execve, so the child of a large process would
    report its parent's size.
    """
    try:
        with open("/proc/self/status", encoding="ascii") as stream:
            found = [line.split()[1] for line in stream if line.startswith("VmHWM:")]
    except OSError:
        return None
    return 1024 * int(found[0]) if found else None


@contextmanager
def quick_collections() -> Iterator[None]:
    """Leaves all objects that exist out of the garbage collections of a block: going through PyTorch's takes 0.2 s each time."""
    if gc.get_freeze_count():  # the caller does so already
        yield
        return
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def return_freed_memory() -> None:
    """Returns freed memory to the system if the C library is glibc, which would otherwise keep gigabytes of it."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


_CGROUPS = Path("/sys/fs/cgroup")  # of version 1 or 2
_OWN_GROUPS = Path("/proc/self/cgroup")  # names the groups of this process (cgroups(7))


def usable_cpus() -> int:
    """Returns how many CPUs this process may use: its affinity, limited by the quotas of its control groups, rounded up.

    A group cannot use more than its parent groups, so the smallest quota of them all counts.
    """
    cpus: int = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = [quota for folder in _groups() if (quota := _quota(folder))]
    return min([cpus, *(max(1, math.ceil(quota)) for quota in quotas)])


def _groups() -> Iterator[Path]:
    """Yields the folders of the groups that may limit the CPUs, each followed by its parents.

    In a container the path may be the host's, while the mount shows only the container's part of it: then some of the folders
    do not exist, but the root of the mount is the container's own group.
    """
    try:
        lines = [
            line.split(":", 2)
            for line in _OWN_GROUPS.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
        ]
    except OSError:
        lines = []
    paths = {names: path for _, names, path in (line for line in lines if len(line) == 3)}
    cpu = next((names for names in paths if "cpu" in names.split(",")), "")
    for mount, names in (("", ""), ("unified", ""), ("cpu", cpu), ("cpu,cpuacct", cpu), ("cpuacct,cpu", cpu)):
        group = PurePosixPath(paths.get(names, "/").lstrip("/"))
        for part in (group, *group.parents):
            if ".." not in part.parts:  # ".." is a group outside of this namespace
                yield _CGROUPS / mount / part


def _quota(folder: Path) -> float | None:
    """Returns the CPUs that a control group allows, or None if it sets no limit or cannot be read."""
    for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        try:
            quota, period = (int(text) for text in " ".join((folder / name).read_text() for name in names).split())
        except (OSError, ValueError):  # "max" means no limit
            continue
        if quota > 0 and period > 0:
            return quota / period
    return None
