"""How many windows run at the same time: as requested, as measured on this machine before, or by a short measurement.

Each window runs on one thread, so the question is how many windows in parallel give the most throughput: one per CPU, or half as
many if two CPUs share a core. It is measured once per bundle and machine, and kept in ``threads.json`` in the cache folder.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path

from qadeploy.files import cache_folder, write_json
from qadeploy.inference.session import onnxruntime
from qadeploy.machine import machine, usable_cpus

_ROUND_SECONDS = 0.25
_ROUNDS = 3
_STEADY = 1.2  # rounds that differ by a larger ratio were disturbed by other work
CUDA_WORKERS = 2  # one worker pads and decodes while the batch of the other runs


def choose_workers(asked: int | None, device: str, key: str, run: Callable[[], object]) -> tuple[int, str]:
    """The number of workers, and where it comes from.

    Args:
        asked: The requested number, or None.
        device: cpu or cuda.
        key: Identifies the bundle.
        run: Runs one window.
    """
    if device == "cuda":
        return CUDA_WORKERS, "CUDA: one batch runs while another is prepared"
    if asked is not None:
        return asked, "--threads"
    cpus = usable_cpus()
    if cpus == 1:
        return 1, "one CPU is available"
    where = f"{key} {machine().cpu} {cpus} CPUs onnxruntime {onnxruntime().__version__}"
    folder = cache_folder()
    place = folder and folder / "threads.json"
    known = _read(place)
    if isinstance(known.get(where), int) and 1 <= known[where] <= cpus:
        return known[where], f"measured before ({place})"
    best, steady = _measure(cpus, run)
    if not steady:
        return best, "measured now, but disturbed by other work: not kept"
    if place is None:
        return best, "measured now; there is no cache folder to keep it in: set QADEPLOY_CACHE"
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        write_json(place, {**known, where: best})
    except OSError as error:
        return best, f"measured now; it could not be kept in {place}: {error.strerror or error}"
    return best, f"measured now, kept in {place}"


def _measure(cpus: int, run: Callable[[], object]) -> tuple[int, bool]:
    """Returns all CPUs, or half of them if that is at least as fast, and whether the interleaved rounds agree."""
    rates: dict[int, list[float]] = {cpus: [], max(1, cpus // 2): []}
    for _ in range(_ROUNDS):
        for count, found in rates.items():
            found.append(_rate(count, run))
    best = max(rates, key=lambda count: (sorted(rates[count])[_ROUNDS // 2], -count))
    return best, all(max(found) <= _STEADY * min(found) for found in rates.values())


def _rate(count: int, run: Callable[[], object]) -> float:
    """Windows per second of ``count`` threads."""
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


def _read(place: Path | None) -> dict[str, int]:
    try:
        found = json.loads(place.read_text(encoding="utf-8")) if place else {}
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
