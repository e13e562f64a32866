"""Start-up time and peak memory: each variant alone in fresh processes, as a service would start it."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from statistics import median
from threading import Timer
from typing import Any

from qadeploy.bench.variant import Pairs, Variant

TIMEOUT = 300.0  # seconds


def cold(variant: Variant, pairs: Pairs, processes: int) -> dict[str, Any]:
    """Starts the variant in ``processes`` fresh processes, one after the other; the first also answers all ``pairs``.

    Returns:
        The seconds from starting Python to the first answer, their median and for each process; the largest resident set
        of the first process, None if it could not be measured; and why figures are missing.
    """
    seconds: list[float] = []
    memory: int | None = None
    note = ""
    for number in range(processes):
        given = pairs if number == 0 else pairs[:1]
        order = {"loader": variant.loader, "arguments": variant.arguments, "pairs": given}
        lines, first, problem = _run(json.dumps(order))
        if problem:
            note = problem
            break
        seconds.append(first)
        if number == 0:
            memory = json.loads(lines[1])["peak_memory_bytes"]
            note = "" if memory is not None else "the system does not report the memory of a process"
    return {
        "startup_seconds": median(seconds) if seconds else None,
        "startup_seconds_by_process": seconds,
        "peak_memory_bytes": memory,
        "peak_memory_questions": len(pairs),
        "cold_note": note,
    }


def _run(order: str) -> tuple[Sequence[str], float, str]:
    """The lines that the child reported, seconds to the first of them, and the problem ("" for none)."""
    with tempfile.TemporaryFile("w+") as said:
        started = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-m", "qadeploy.bench.child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
        )
        assert process.stdin is not None  # noqa: S101 - a pipe was requested
        assert process.stdout is not None  # noqa: S101
        timer = Timer(TIMEOUT, process.kill)
        timer.start()
        try:
            try:
                with process.stdin as stream:
                    stream.write(order)
            except BrokenPipeError:
                pass  # the child ended before it read the order; its last line on stderr is reported below
            first = process.stdout.readline()
            seconds = time.perf_counter() - started
            lines = [first, *process.stdout.readlines()]
            code = process.wait()
        finally:
            timer.cancel()
            process.kill()
            process.stdout.close()
            process.wait()
        if code == 0 and len(lines) == 2:
            return lines, seconds, ""
        said.seek(0)
        last = next((line.strip() for line in reversed(said.readlines()) if line.strip()), "it printed nothing")
    late = time.perf_counter() - started >= TIMEOUT
    ended = f"took more than {TIMEOUT:.0f} s" if late else f"ended with {code}"
    return lines, seconds, f"its own process {ended}: {last[:200]}"
