"""The machine that this process runs on: its CPU and the instruction sets that decide which settings are fast.

Linux alone tells (``/proc/cpuinfo``); elsewhere no instruction set is known.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

# As the kernel names them (arch/x86/include/asm/cpufeatures.h, Documentation/arch/arm64/elf_hwcaps.rst): those for
# which ONNX Runtime's matrix products (MLAS) have kernels of their own, and those that torch trains in bf16 with.
INSTRUCTION_SETS = (
    *("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_int8", "amx_bf16"),
    *("asimddp", "asimdhp", "i8mm", "bf16", "sve", "sve2", "sme"),
)
_VNNI = frozenset({"avx512_vnni", "avx_vnni", "asimddp"})
_CPUINFO = Path("/proc/cpuinfo")


@dataclass(frozen=True, slots=True)
class Machine:
    """A CPU's name, and those of ``INSTRUCTION_SETS`` that all its cores have."""

    cpu: str
    instruction_sets: tuple[str, ...]

    @property
    def has_vnni(self) -> bool:
        """True where the CPU adds int8 products in 32 bits; without it 8-bit weights can saturate."""
        return not _VNNI.isdisjoint(self.instruction_sets)

    @property
    def has_bf16(self) -> bool:
        """True where an x86 CPU multiplies bf16 natively."""
        return not {"avx512_bf16", "amx_bf16"}.isdisjoint(self.instruction_sets)

    def to_dict(self, *, threads: int, onnxruntime: str) -> dict[str, Any]:
        """A manifest's ``machine`` entry: this machine, and what session settings were measured with."""
        return {
            "cpu": self.cpu,
            "instruction_sets": list(self.instruction_sets),
            "threads": threads,
            "onnxruntime": onnxruntime,
        }

    def unlike(self, entry: object) -> str:
        """What instruction sets it lacks and has besides those of a ``machine`` entry, in words.

        "" where there is no difference, no entry that can be read, or where this system does not tell.
        """
        stored = entry.get("instruction_sets") if isinstance(entry, Mapping) else None
        if not isinstance(stored, list) or not stored or not self.instruction_sets:
            return ""
        # Names that this version does not know, a later one may have written: it cannot tell whether they are here.
        lacks = [name for name in INSTRUCTION_SETS if name in stored and name not in self.instruction_sets]
        more = [name for name in self.instruction_sets if name not in stored]
        parts = [f"lacks {', '.join(lacks)}"] if lacks else []
        parts += [f"has {', '.join(more)} besides"] if more else []
        return " and ".join(parts)


def entry_has_vnni(entry: object) -> bool:
    """Whether the machine of a manifest's ``machine`` entry had VNNI; true where it does not say."""
    stored = entry.get("instruction_sets") if isinstance(entry, Mapping) else None
    return not (isinstance(stored, list) and stored) or any(name in stored for name in _VNNI)


@cache
def machine() -> Machine:
    """The machine of this process, read once."""
    try:
        return parse(_CPUINFO.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return parse("")


def parse(cpuinfo: str) -> Machine:
    """The machine that the text of ``/proc/cpuinfo`` describes."""
    name = ""
    shared: set[str] | None = None
    for line in cpuinfo.splitlines():
        key, _, value = (part.strip() for part in line.partition(":"))
        if key == "model name" and not name:
            name = value
        elif key in {"flags", "Features"}:
            shared = set(value.split()) if shared is None else shared & set(value.split())
    names = tuple(feature for feature in INSTRUCTION_SETS if feature in (shared or ()))
    return Machine(name or platform.processor() or platform.machine(), names)


def peak_memory() -> int | None:
    """The largest resident set of this process so far in bytes, None where the system does not say.

    VmHWM (proc_pid_status(5)) and not getrusage's ru_maxrss: that one survives execve, so a child of a large process
    would be given the parent's size.
    """
    try:
        with open("/proc/self/status", encoding="ascii") as stream:
            found = [line.split()[1] for line in stream if line.startswith("VmHWM:")]
    except OSError:
        return None
    return 1024 * int(found[0]) if found else None
