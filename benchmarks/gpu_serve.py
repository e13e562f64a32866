"""The server on a GPU under load, on loopback, compared with ``answer_batch`` on the same GPU and the same questions.

    python -m benchmarks.gpu_serve BUNDLE OUT.json --device cuda

In this order: offline throughput; solo latency; 64 connections in a closed loop; arrivals at twice the closed loop's rate
with a queue of 64 questions, each of which must get status 200 or 429; then a GPU whose memory is almost full.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import click

from benchmarks.gpu_plan import GpuWatch
from benchmarks.harness import Json, report, run, spread, write_report
from benchmarks.serve_load import Outcome, Server, ask_alone, closed_loop, in_turn, open_loop, percentiles, statuses
from qadeploy import Answerer
from qadeploy.data.loading import read
from qadeploy.errors import QadeployError

CONNECTIONS, QUEUE = 64, 64
LEFT_MIB = 700  # the GPU memory that is left free for the last part


def offline(bundle: str, device: str, pairs: Sequence[tuple[str, str]]) -> Json:
    """Questions per second of ``answer_batch``, the median of five rounds, and milliseconds of one question alone."""
    answerer = Answerer.load(bundle, device=device)
    answerer.answer_batch(pairs)
    for question, context in pairs:
        answerer.answer(question, context)  # captures the CUDA graphs that the timed round replays
    rates, alone = [], []
    for _ in range(5):
        started = time.perf_counter()
        answerer.answer_batch(pairs)
        rates.append(len(pairs) / (time.perf_counter() - started))
    for question, context in pairs:
        started = time.perf_counter()
        answerer.answer(question, context)
        alone.append(time.perf_counter() - started)
    return {"per_second": spread(rates)["median"], "one_question_ms": percentiles(alone)}


def figures(outcomes: Sequence[Outcome], seconds: float) -> Json:
    """Rate, statuses and latencies of a load."""
    good = [o.seconds for o in outcomes if o.status == 200]
    return {"per_second": len(good) / seconds, "statuses": statuses(outcomes), "ms": percentiles(good)}


def full_memory(bundle: str, device: str, pairs: Sequence[tuple[str, str]]) -> Json:
    """The result of ``answer_batch`` if other programs hold all but ``LEFT_MIB`` of the GPU's memory."""
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
@click.option("--seconds", default=6.0, show_default=True, help="Duration of each load.")
def main(bundle: str, out: Path, device: str, seconds: float) -> None:
    """Measures and writes the JSON."""
    pairs = [(e.question, e.context) for e in read("handbook").part("validation")]
    bodies = [json.dumps({"question": q, "context": c}).encode() for q, c in pairs]
    gpu = GpuWatch(device)
    found: Json = {"offline": offline(bundle, device, pairs)}
    server = Server(bundle, ["--device", device, "--drain-delay", "0", "--max-queue", str(QUEUE)])
    found["start_seconds"] = server.start()
    try:
        found["solo"] = figures(server.run(lambda client: ask_alone(client, bodies)), 1.0)["ms"]
        began = time.monotonic()
        outcomes, took = server.run(lambda client: closed_loop(client, in_turn(bodies), CONNECTIONS, seconds))
        found["closed"] = figures(outcomes, took) | {"connections": CONNECTIONS, "gpu_percent": gpu.since(began)}
        rate = 2 * found["closed"]["per_second"]
        arrivals = server.run(lambda client: open_loop(client, bodies, rate, seconds))
        found["overload"] = figures(arrivals, seconds) | {"arrivals_per_second": rate, "max_queue": QUEUE}
    finally:
        found["exit_code"] = server.stop(signal.SIGTERM)
    gpu.close()
    if device.startswith("cuda"):
        found["full_memory"] = full_memory(bundle, device, pairs * 4)
    write_report(out, report(what=" ".join((__doc__ or "").split()), device=device, **found))
    click.echo(json.dumps(found, indent=1))


if __name__ == "__main__":
    run(main)
