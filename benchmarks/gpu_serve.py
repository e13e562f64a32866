"""The server on a GPU under load, on loopback, beside ``answer_batch`` on the same GPU and the same questions.

    python -m benchmarks.gpu_serve BUNDLE OUT.json --device cuda

In this order: offline throughput; solo latency; 64 connections in a closed loop; arrivals at twice the closed loop's rate
with a queue of 64 questions, which must end in 200 or 429; then a GPU whose memory is all but full.
"""

from __future__ import annotations

import asyncio
import json
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlparse

import click

from benchmarks.gpu_plan import Gpu
from benchmarks.serve_load import Client, Outcome, closed_loop, open_loop, spread, statuses
from qadeploy import Answerer
from qadeploy.data.readers import read
from qadeploy.errors import QadeployError
from qadeploy.files import write_json
from qadeploy.inference.doctor import diagnose

T = TypeVar("T")
CONNECTIONS, QUEUE = 64, 64
LEFT_MIB = 700  # of the GPU's memory, for the last part


def offline(bundle: str, device: str, pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Questions per second of ``answer_batch``, the median of five rounds, and milliseconds of one question alone."""
    answerer = Answerer.load(bundle, device=device)
    answerer.answer_batch(pairs)
    for question, context in pairs:
        answerer.answer(question, context)  # captures what the timed round will replay
    rates, alone = [], []
    for _ in range(5):
        started = time.perf_counter()
        answerer.answer_batch(pairs)
        rates.append(len(pairs) / (time.perf_counter() - started))
    for question, context in pairs:
        started = time.perf_counter()
        answerer.answer(question, context)
        alone.append(time.perf_counter() - started)
    return {"per_second": statistics.median(rates), "one_question_ms": spread(alone)}


def start(bundle: str, device: str, *more: str) -> tuple[subprocess.Popen[str], Client, float]:
    """A server that is ready, a client of it, and the seconds that it took."""
    command = [sys.executable, "-m", "qadeploy", "serve", bundle, "--json", "--device", device, "--port", "0"]
    started = time.perf_counter()
    command += ["--drain-delay", "0", "--log-level", "warning", *more]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    line = process.stdout.readline() if process.stdout else ""
    if not line:
        raise click.ClickException("the server did not start")
    client = Client("127.0.0.1", int(urlparse(json.loads(line)["url"]).port or 0))
    while asyncio.run(client.get("/health/ready")) != 200:
        time.sleep(0.05)
    return process, client, time.perf_counter() - started


def run(client: Client, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """What a coroutine returns; the client's connections belong to its loop."""

    async def inside() -> T:
        try:
            return await work()
        finally:
            client.close()

    return asyncio.run(inside())


def figures(outcomes: Sequence[Outcome], seconds: float) -> dict[str, Any]:
    """Rate, statuses and latencies of a load."""
    good = [o.seconds for o in outcomes if o.status == 200]
    return {"per_second": len(good) / seconds, "statuses": statuses(outcomes), "ms": spread(good)}


def full_memory(bundle: str, device: str, pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """What ``answer_batch`` says where other programs hold all but ``LEFT_MIB`` of the GPU's memory."""
    import torch

    free, _ = torch.cuda.mem_get_info()
    held = torch.empty(max(0, free - LEFT_MIB * 2**20), dtype=torch.uint8, device=device)
    try:
        answerer = Answerer.load(bundle, device=device)
        answers = answerer.answer_batch(pairs)
        notes = answerer.model.notes()  # type: ignore[attr-defined]
        return {"left_mib": LEFT_MIB, "answered": len(answers), "notes": notes}
    except QadeployError as error:
        return {"left_mib": LEFT_MIB, "error": type(error).__name__, "message": str(error)}
    finally:
        del held
        torch.cuda.empty_cache()


@click.command(help=__doc__)
@click.argument("bundle")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--device", default="cuda", show_default=True)
@click.option("--seconds", default=6.0, show_default=True, help="Of each load.")
def main(bundle: str, out: Path, device: str, seconds: float) -> None:
    """Measures and writes the JSON."""
    pairs = [(e.question, e.context) for e in read("handbook").part("validation")]
    bodies = [json.dumps({"question": q, "context": c}).encode() for q, c in pairs]
    gpu = Gpu(device)
    found: dict[str, Any] = {"what": " ".join((__doc__ or "").split()), "device": device, "environment": diagnose()}
    found["offline"] = offline(bundle, device, pairs)
    process, client, found["start_seconds"] = start(bundle, device, "--max-queue", str(QUEUE))
    try:
        found["solo"] = figures(run(client, lambda: _solo(client, bodies)), 1.0)["ms"]
        began = time.monotonic()
        turn = [("/v1/answer", body) for body in bodies]
        outcomes, took = run(client, lambda: closed_loop(client, lambda i: turn[i % len(turn)], CONNECTIONS, seconds))
        found["closed"] = figures(outcomes, took) | {"connections": CONNECTIONS, "gpu_percent": gpu.since(began)}
        rate = 2 * found["closed"]["per_second"]
        arrivals = run(client, lambda: open_loop(client, bodies, rate, seconds))
        found["overload"] = figures(arrivals, seconds) | {"arrivals_per_second": rate, "max_queue": QUEUE}
    finally:
        process.send_signal(signal.SIGTERM)
        found["exit_code"] = process.wait(timeout=30)
    gpu.close()
    if device.startswith("cuda"):
        found["full_memory"] = full_memory(bundle, device, pairs * 4)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, found)
    click.echo(json.dumps({k: v for k, v in found.items() if k not in {"what", "environment"}}, indent=1))


async def _solo(client: Client, bodies: Sequence[bytes]) -> list[Outcome]:
    await client.ask(bodies[0])
    return [await client.ask(body) for body in bodies]


if __name__ == "__main__":
    main()
