"""The server under load, on loopback: the server on one core, this client on another.

    python -m benchmarks.serve_load bundles/handbook-int8 --out benchmarks/results/serve.json

In this order: start; offline throughput of ``answer_batch`` on the server's core, before and after the closed loop;
solo latency; open-loop Poisson arrivals at half the offline throughput; 64 connections in a closed loop; arrivals at
three times the offline throughput and the recovery after them; a soak with contexts of 200 to 50,000 characters;
SIGKILL and a restart; SIGTERM. The questions are the handbook's held-out questions, drawn at random in the open loops.
Latencies of the open loops count from the time at which a request was due. The exit code is 1 if a target was missed.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlparse

import click
import numpy as np

from benchmarks.harness import bundle_facts, report, run, write_report
from qadeploy.data.loading import read

OFFLINE = """
import json, os, sys, time
os.sched_setaffinity(0, {int(sys.argv[2])})
from qadeploy import Answerer
pairs = json.load(sys.stdin)
answerer = Answerer.load(sys.argv[1], device="cpu", threads=1)
answerer.answer_batch(pairs[:10])
seconds = []
busy = time.process_time()
for _ in range(int(sys.argv[3])):
    started = time.perf_counter()
    answerer.answer_batch(pairs)
    seconds.append(time.perf_counter() - started)
busy = (time.process_time() - busy) / len(pairs) / len(seconds)
print(json.dumps([len(pairs) / sorted(seconds)[len(seconds) // 2], busy]))
"""
CONNECTIONS = 64
LONGEST, SHORTEST = 50_000, 200
SOAK_CONNECTIONS = 4
RETRY_SECONDS = 1.0  # the minimum of Retry-After
WARM_UP = 0.1  # a warm-up before the soak, as a share of its time: it fills the 64 MiB of the context cache
SEED = 6
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Load:
    """The options of the command line: the duration of each part, and the others."""

    poisson_seconds: float
    closed_seconds: float
    overload_seconds: float
    soak_minutes: float
    offline_rounds: int
    request_timeout: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """One request: ``status`` is 0 if the connection failed; ``at`` and ``seconds`` are by this process's clock."""

    status: int
    at: float
    seconds: float


@dataclass
class Client:
    """Sends requests over connections that are kept open, as many as needed at a time."""

    host: str
    port: int
    idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = field(default_factory=list)

    async def ask(self, body: bytes, path: str = "/v1/answer", due: float | None = None) -> Outcome:
        """POSTs a body and reads the whole response."""
        started = time.perf_counter() if due is None else due
        try:
            pair = self._kept() or await asyncio.open_connection(self.host, self.port)
            head = f"POST {path} HTTP/1.1\r\nHost: {self.host}\r\nContent-Type: application/json\r\n"
            status, keep = await self._exchange(pair, f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        except (OSError, asyncio.IncompleteReadError):
            return Outcome(0, started, time.perf_counter() - started)
        if keep:
            self.idle.append(pair)
        else:
            pair[1].close()
        return Outcome(status, started, time.perf_counter() - started)

    def _kept(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter] | None:
        """A kept connection that the server has not closed (it closes those idle for longer than its --keep-alive)."""
        while self.idle:
            reader, writer = self.idle.pop()
            if not reader.at_eof():
                return reader, writer
            writer.close()
        return None

    async def get(self, path: str) -> int:
        """The status of a GET, or 0 if nobody listens."""
        try:
            pair = await asyncio.open_connection(self.host, self.port)
            status, _ = await self._exchange(pair, f"GET {path} HTTP/1.1\r\nHost: {self.host}\r\n\r\n".encode())
        except (OSError, asyncio.IncompleteReadError):
            return 0
        pair[1].close()
        return status

    @staticmethod
    async def _exchange(pair: tuple[asyncio.StreamReader, asyncio.StreamWriter], data: bytes) -> tuple[int, bool]:
        reader, writer = pair
        writer.write(data)
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        size = int(head.partition(b"content-length:")[2].partition(b"\r\n")[0])
        await reader.readexactly(size)
        return int(head.split(b" ", 2)[1]), b"connection: close" not in head

    def close(self) -> None:
        """Closes the connections that are kept."""
        for _, writer in self.idle:
            writer.close()
        self.idle.clear()


@dataclass
class Server:
    """The process under test."""

    bundle: str
    flags: Sequence[str]
    core: int | None = None
    port: int = 0
    process: subprocess.Popen[str] | None = None

    def start(self) -> float:
        """Starts the server and waits until it is ready; returns the seconds from the start of the process."""
        started = time.perf_counter()
        command = [sys.executable, "-m", "qadeploy", "serve", self.bundle, "--json", "--port", str(self.port)]
        command += ["--log-level", "warning", *self.flags]
        pin = [] if self.core is None else ["taskset", "-c", str(self.core)]
        self.process = subprocess.Popen([*pin, *command], stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise click.ClickException("the server did not start")
        self.port = int(urlparse(json.loads(line)["url"]).port or 0)
        while asyncio.run(self.client().get("/health/ready")) != 200:
            time.sleep(0.01)
        return time.perf_counter() - started

    def client(self) -> Client:
        """A client of this server."""
        return Client("127.0.0.1", self.port)

    def run(self, work: Callable[[Client], Coroutine[Any, Any, T]]) -> T:
        """Runs a coroutine with a client whose connections belong to its event loop, and returns its result."""
        client = self.client()

        async def inside() -> T:
            try:
                return await work(client)
            finally:
                client.close()

        return asyncio.run(inside())

    def stop(self, number: signal.Signals) -> int:
        """Sends a signal and waits for the exit code."""
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(timeout=60)

    def cpu(self) -> float:
        """CPU seconds so far."""
        assert self.process is not None
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def sample(self) -> tuple[float, int]:
        """Resident memory in MiB, and open file descriptors."""
        assert self.process is not None
        folder = Path(f"/proc/{self.process.pid}")
        resident = next(line for line in (folder / "status").read_text().splitlines() if line.startswith("VmRSS"))
        return int(resident.split()[1]) / 1024, len(list((folder / "fd").iterdir()))


@contextlib.contextmanager
def sampling(server: Server, every: float = 1.0) -> Iterator[list[tuple[float, int]]]:
    """Samples memory and descriptors while the body runs, which must be in a coroutine."""
    samples: list[tuple[float, int]] = []

    async def sample() -> None:
        while True:
            samples.append(server.sample())
            await asyncio.sleep(every)

    task = asyncio.ensure_future(sample())
    try:
        yield samples
    finally:
        task.cancel()


async def open_loop(client: Client, bodies: Sequence[bytes], rate: float, seconds: float) -> list[Outcome]:
    """Sends Poisson arrivals at ``rate`` per second, each with a body drawn at random, and waits for all responses.

    In the file's order the ten questions on one long paper would follow each other, unlike in a Poisson process.
    """
    chance = random.Random(SEED)
    tasks: list[asyncio.Task[Outcome]] = []
    due = started = time.perf_counter()
    while due - started < seconds:
        due += chance.expovariate(rate)
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        tasks.append(asyncio.ensure_future(client.ask(chance.choice(bodies), due=due)))
    return list(await asyncio.gather(*tasks))


async def closed_loop(
    client: Client, body: Callable[[int], tuple[str, bytes]], connections: int, seconds: float
) -> tuple[list[Outcome], float]:
    """Runs ``connections`` callers that each send the next request at once; returns the outcomes and the seconds."""
    count, outcomes, started = 0, [], time.perf_counter()

    async def caller() -> None:
        nonlocal count
        while time.perf_counter() - started < seconds:
            path, data = body(count)
            count += 1
            outcome = await client.ask(data, path)
            outcomes.append(outcome)
            if outcome.status != 200:
                await asyncio.sleep(RETRY_SECONDS)

    await asyncio.gather(*(caller() for _ in range(connections)))
    return outcomes, time.perf_counter() - started


async def ask_alone(client: Client, bodies: Sequence[bytes]) -> list[Outcome]:
    """Sends one request after another, after one to warm up."""
    await client.ask(bodies[0])
    return [await client.ask(body) for body in bodies]


def in_turn(bodies: Sequence[bytes]) -> Callable[[int], tuple[str, bytes]]:
    """The path and the body of each request of a closed loop."""
    return lambda number: ("/v1/answer", bodies[number % len(bodies)])


async def recovery(client: Client, body: bytes, normal: float) -> float:
    """Seconds until an answer takes at most twice its normal time again."""
    started = time.perf_counter()
    while time.perf_counter() - started < 60:
        begun = time.perf_counter()
        outcome = await client.ask(body)
        if outcome.status == 200 and outcome.seconds <= 2 * normal:
            return begun - started
        await asyncio.sleep(0.1)
    return float("inf")


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """Milliseconds: median, p95, p99 and the maximum."""
    found = np.percentile(np.asarray(seconds or [float("nan")]) * 1000, [50, 95, 99, 100])
    return {name: round(float(x), 2) for name, x in zip(("p50", "p95", "p99", "most"), found, strict=True)}


def statuses(outcomes: Sequence[Outcome]) -> dict[str, int]:
    """How many requests ended with each status; 0 is a failed connection."""
    return {str(status): count for status, count in sorted(Counter(o.status for o in outcomes).items())}


def quarters(values: Sequence[float]) -> tuple[float, float]:
    """The means of the first and the last quarter."""
    part = max(1, len(values) // 4)
    return statistics.fmean(values[:part]), statistics.fmean(values[-part:])


def soak_bodies(pairs: Sequence[tuple[str, str]]) -> Callable[[int], tuple[str, bytes]]:
    """Requests of every form on contexts of 200 to 50,000 characters, with log-uniform lengths."""
    everything = "\n".join(dict.fromkeys(context for _, context in pairs))
    everything *= 1 + 2 * LONGEST // len(everything)
    chance = random.Random(SEED)

    def body(number: int) -> tuple[str, bytes]:
        size = int(SHORTEST * (LONGEST / SHORTEST) ** chance.random())
        start = chance.randrange(len(everything) - size)
        context, question = everything[start : start + size], pairs[number % len(pairs)][0]
        form = number % 10
        if form == 0:
            return "/", _dump({"inputs": {"question": question, "context": context}})
        if form == 1 and size < 5_000:
            return "/v1/answer", _dump({"questions": [question, pairs[0][0]], "context": context})
        if form == 2 and size < 5_000:
            return "/v1/answer", _dump({"question": question, "context": context, "trace": True})
        return "/v1/answer", _dump({"question": question, "context": context, "top_k": 1 + number % 3})

    return body


def _dump(value: Any) -> bytes:
    return json.dumps(value).encode()


@dataclass
class Targets:
    """The figures, and the targets with whether each is met."""

    figures: dict[str, Any] = field(default_factory=dict)
    lines: list[tuple[str, str, str, bool]] = field(default_factory=list)

    def check(self, what: str, value: str, target: str, met: bool) -> None:
        """Adds a line to the table and prints it."""
        self.lines.append((what, value, target, met))
        click.echo(f"{'ok  ' if met else 'MISS'}  {what:<46} {value:<44} {target}")


@click.command(help=__doc__)
@click.argument("bundle")
@click.option("--out", type=click.Path(path_type=Path), help="The JSON to write.")
@click.option(
    "--poisson-seconds",
    default=300.0,
    show_default=True,
    help="The p99 of a queue converges slowly: after a minute it is off by up to a fifth.",
)
@click.option("--closed-seconds", default=60.0, show_default=True)
@click.option("--overload-seconds", default=60.0, show_default=True)
@click.option("--soak-minutes", default=20.0, show_default=True, help="0 skips the soak.")
@click.option("--offline-rounds", default=3, show_default=True)
@click.option("--request-timeout", default=30.0, show_default=True, help="The server's --request-timeout.")
def main(bundle: str, out: Path | None, **options: Any) -> None:
    """Runs all parts."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise click.ClickException("two CPUs are needed: one for the server, one for the client")
    os.sched_setaffinity(0, {cores[1]})
    pairs = [(e.question, e.context) for e in read("handbook").part("validation")]
    load, targets = Load(**options), Targets()
    flags = ["--device", "cpu", "--threads", "1", "--drain-delay", "1", "--request-timeout", str(load.request_timeout)]
    server = Server(bundle, flags, cores[0])
    try:
        _measure(targets, server, pairs, load)
    finally:
        if server.process is not None and server.process.poll() is None:
            server.process.kill()
    if out:
        lines = [dict(zip(("what", "value", "target", "met"), line, strict=True)) for line in targets.lines]
        facts = {"questions": len(pairs), "server_core": cores[0], "client_core": cores[1], "server_threads": 1}
        what = " ".join((__doc__ or "").split())
        write_report(out, report(**targets.figures, what=what, bundle=bundle_facts(bundle), **facts, targets=lines))
    sys.exit(not all(met for *_, met in targets.lines))


def _measure(report: Targets, server: Server, pairs: Sequence[tuple[str, str]], load: Load) -> None:
    bodies = [_dump({"question": q, "context": c}) for q, c in pairs]
    figures, rounds = report.figures, load.offline_rounds
    first, first_cpu = _offline(server, pairs, rounds)
    figures["start_seconds"] = round(server.start(), 2)

    solo = server.run(lambda client: ask_alone(client, bodies))
    normal = statistics.fmean(o.seconds for o in solo)
    figures["solo_ms"] = {"mean": round(1000 * normal, 2), **percentiles([o.seconds for o in solo])}

    arrivals = server.run(lambda client: open_loop(client, bodies, 0.5 * first, load.poisson_seconds))
    latency = percentiles([o.seconds for o in arrivals if o.status == 200])
    figures["poisson"] = {"rate": 0.5 * first, "statuses": statuses(arrivals), "ms": latency}
    dropped = sum(o.status != 200 for o in arrivals)
    report.check("Poisson at 0.5 of offline: requests dropped", f"{dropped} of {len(arrivals)}", "none", not dropped)
    ratio = latency["p99"] / (1000 * normal)
    value = f"{ratio:.2f} ({latency['p99']:.0f} ms, solo {1000 * normal:.0f} ms)"
    report.check("  p99 over the mean solo latency", value, "at most 7", ratio <= 7)

    busy = server.cpu()
    closed, seconds = server.run(lambda client: closed_loop(client, in_turn(bodies), CONNECTIONS, load.closed_seconds))
    server_cpu = (server.cpu() - busy) / max(1, sum(o.status == 200 for o in closed))
    server_rate = sum(o.status == 200 for o in closed) / seconds
    second, second_cpu = _offline(server, pairs, rounds)
    offline = (first + second) / 2
    figures["offline_per_second"] = {"before": first, "after": second, "mean": offline}
    figures["closed"] = {
        "per_second": server_rate,
        "cpu_ms_a_question": {"server": 1000 * server_cpu, "offline": [1000 * first_cpu, 1000 * second_cpu]},
        "statuses": statuses(closed),
        "ms": percentiles([o.seconds for o in closed if o.status == 200]),
    }
    share = server_rate / offline
    report.check(
        f"closed loop, {CONNECTIONS} connections: share of offline",
        f"{share:.3f} ({server_rate:.1f} of {offline:.1f} per second)",
        "at least 0.85",
        share >= 0.85,
    )

    _overload(report, server, bodies, 3 * offline, normal, load)
    if load.soak_minutes:
        _soak(report, server, pairs, 60 * load.soak_minutes)

    code = server.stop(signal.SIGKILL)
    seconds = server.start()
    figures["restart_seconds"] = round(seconds, 2)
    report.check("ready again after SIGKILL", f"{seconds:.2f} s (ended with {code})", "within 3 s", seconds <= 3)
    code = server.stop(signal.SIGTERM)
    report.check("exit code after SIGTERM", str(code), "0", code == 0)


def _overload(report: Targets, server: Server, bodies: Sequence[bytes], rate: float, normal: float, load: Load) -> None:
    async def run(client: Client) -> tuple[list[Outcome], float, list[tuple[float, int]]]:
        with sampling(server) as samples:
            arriving = asyncio.ensure_future(open_loop(client, bodies, rate, load.overload_seconds))
            await asyncio.sleep(load.overload_seconds)
            took = await recovery(client, bodies[0], normal)
            return await arriving, took, samples

    outcomes, took, samples = server.run(run)
    found = statuses(outcomes)
    answered = [o.seconds for o in outcomes if o.status == 200]
    early, late = quarters([memory for memory, _ in samples])
    report.figures["overload"] = {
        "rate": rate,
        "statuses": found,
        "answered_ms": percentiles(answered),
        "refused_ms": percentiles([o.seconds for o in outcomes if o.status == 429]),
        "rss_mib": [round(memory, 1) for memory, _ in samples],
        "recovery_seconds": took,
    }
    report.check(
        "overload at 3 times offline: statuses", str(found), "200, 429, 504", set(found) <= {"200", "429", "504"}
    )
    slowest = max(answered, default=float("inf"))
    in_time = slowest <= load.request_timeout and "504" not in found
    report.check("  slowest accepted request", f"{slowest:.2f} s", f"within its {load.request_timeout:g} s", in_time)
    report.check("  memory, first and last quarter", f"{early:.1f}, {late:.1f} MiB", "within 5 %", late <= 1.05 * early)
    report.check("  recovery", f"{took:.2f} s", "within 5 s", took <= 5)


def _soak(report: Targets, server: Server, pairs: Sequence[tuple[str, str]], seconds: float) -> None:
    async def run(client: Client) -> tuple[list[Outcome], list[tuple[float, int]], list[tuple[float, int]]]:
        bodies = soak_bodies(pairs)
        with sampling(server) as before:
            await closed_loop(client, bodies, SOAK_CONNECTIONS, WARM_UP * seconds)
        with sampling(server) as samples:
            outcomes, _ = await closed_loop(client, bodies, SOAK_CONNECTIONS, seconds)
        return outcomes, samples, before

    outcomes, samples, before = server.run(run)
    memory, descriptors = [m for m, _ in samples], [d for _, d in samples[1:]]
    early, late = quarters(memory)
    report.figures["soak"] = {
        "seconds": seconds,
        "statuses": statuses(outcomes),
        "ms": percentiles([o.seconds for o in outcomes if o.status == 200]),
        "warm_up_seconds": WARM_UP * seconds,
        "warm_up_rss_mib": [round(m, 1) for m, _ in before],
        "rss_mib": [round(m, 1) for m in memory],
        "descriptors": sorted(set(descriptors)),
    }
    found = statuses(outcomes)
    report.check(f"soak of {seconds / 60:.0f} min: statuses", str(found), "200", set(found) == {"200"})
    report.check(
        "  memory, first and last quarter",
        f"{early:.1f}, {late:.1f} MiB",
        "within 5 %",
        abs(late - early) <= 0.05 * early,
    )
    constant = max(descriptors) == min(descriptors)
    report.check("  file descriptors", f"{min(descriptors)} to {max(descriptors)}", "constant", constant)


def _offline(server: Server, pairs: Sequence[tuple[str, str]], rounds: int) -> tuple[float, float]:
    """Questions per second and CPU seconds per question of ``answer_batch`` on the server's core, which is idle."""
    command = [sys.executable, "-c", OFFLINE, server.bundle, str(server.core), str(rounds)]
    done = subprocess.run(command, input=json.dumps(pairs), capture_output=True, text=True, check=True)
    rate, busy = json.loads(done.stdout)
    return float(rate), float(busy)


if __name__ == "__main__":
    run(main)
