"""How many windows run at a time: what was asked for, what was measured on this machine before, or a short measurement.

Each window runs on one thread, so the question is how many such runs side by side answer most: every CPU, or half of them
where two are one core's. It is a fact about the machine, which a bundle from elsewhere cannot know; so it is measured
once a bundle and machine, in about a second, and kept in ``$XDG_CACHE_HOME/qadeploy/threads.json``.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from qadeploy.files import write_json
from qadeploy.inference.session import onnxruntime, usable_cpus
from qadeploy.machine import machine

_ROUND_SECONDS = 0.25
_ROUNDS = 3
_QUOTA = Path("/sys/fs/cgroup/cpu.max")
_STEADY = 1.2  # rounds that differ by more were disturbed
CUDA_WORKERS = 2  # one prepares and decodes while the other's batch runs


@dataclass(frozen=True, slots=True)
class Choice:
    """``workers`` at a time, and where the number is from."""

    workers: int
    source: str


def choose(asked: int | None, device: str, key: str, run: Callable[[], object]) -> Choice:
    """The number of workers. ``run`` runs one window; ``key`` names the bundle."""
    if device == "cuda":
        return Choice(CUDA_WORKERS, "CUDA: one batch runs while another is prepared")
    if asked is not None:
        return Choice(asked, "--threads")
    cpus = available_cpus()
    if cpus == 1:
        return Choice(1, "one CPU is available")
    where = f"{key} {machine().cpu} {cpus} CPUs onnxruntime {onnxruntime().__version__}"
    known = _read()
    if isinstance(known.get(where), int) and 1 <= known[where] <= cpus:
        return Choice(known[where], f"measured before ({_place()})")
    best, steady = _measure(cpus, run)
    if not steady:
        return Choice(best, "measured now, among other work: not kept")
    with contextlib.suppress(OSError):  # a read-only home: it is measured again the next time
        _place().parent.mkdir(parents=True, exist_ok=True)
        write_json(_place(), {**known, where: best})
    return Choice(best, f"measured now, kept in {_place()}")


def available_cpus() -> int:
    """CPUs that this process may use, a container's quota included (cgroup v2's cpu.max), rounded up."""
    cpus = usable_cpus()
    with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
        quota, period = _QUOTA.read_text().split()
        if quota != "max":
            cpus = min(cpus, max(1, math.ceil(int(quota) / int(period))))
    return cpus


def _measure(cpus: int, run: Callable[[], object]) -> tuple[int, bool]:
    """All CPUs, or half of them where that many threads run at least as many windows a second.

    And whether the interleaved rounds agree, so that the result can be kept.
    """
    rates: dict[int, list[float]] = {cpus: [], max(1, cpus // 2): []}
    for _ in range(_ROUNDS):
        for count, found in rates.items():
            found.append(_rate(count, run))
    best = max(rates, key=lambda count: (sorted(rates[count])[_ROUNDS // 2], -count))
    return best, all(max(found) <= _STEADY * min(found) for found in rates.values())


def _rate(count: int, run: Callable[[], object]) -> float:
    """Windows a second of ``count`` threads."""
    done = [0] * count
    started = time.perf_counter()

    def work(number: int) -> None:
        while not done[number] or time.perf_counter() - started < _ROUND_SECONDS:
            run()
            done[number] += 1

    threads = [threading.Thread(target=work, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(done) / (time.perf_counter() - started)


def _place() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "qadeploy" / "threads.json"


def _read() -> dict[str, int]:
    try:
        found = json.loads(_place().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
