"""The engine on Ray: a pool of actors, on this machine or a cluster, each of which loads the bundle once.

Only the numbers of shards and their counts go through Ray Data: an actor itself reads the rows of its shard from the input and
writes their part to the folder. So memory does not grow with the input, a finished part is safe whatever happens to
the cluster, and the answers are those of the local engine, which uses the same worker.
Ray Data restarts an actor that died and gives its shard to another (its actor pools set no limit on ``max_restarts`` and
``max_task_retries``); the journal of the shard shows whether a row is the cause.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import secrets
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from qadeploy.batch.answering import BrokenModelError
from qadeploy.batch.output import Counts, explain
from qadeploy.batch.plan import Shard
from qadeploy.batch.ray_watch import watched
from qadeploy.batch.work import Load, OnShard, Worker
from qadeploy.errors import FailureError, InputError, MissingExtraError, QadeployError, one_line
from qadeploy.machine import usable_cpus
from qadeploy.options import option

_MOST_ACTORS = 8  # by default on one machine: each needs the memory of a bundle
_STORE = 100 * 2**20  # bytes of the object store of a local Ray, which only holds numbers
_SECONDS = 10  # seconds to reach the head of a cluster
# With at least this many shards per actor, each actor has a second shard queued, so that it does not wait for Ray between two.
# With fewer, the queued shard might wait while another actor is idle.
_MANY = 4
# The environment while a local Ray starts: it makes Ray require a token, and listen on 127.0.0.1 only, as Ray does by default
# on systems other than Linux.
_ALONE = {"RAY_AUTH_MODE": "token", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
_LOOPBACK = "127.0.0.1"
_BROKEN = 70  # exit code of an actor whose model stopped answering (EX_SOFTWARE of sysexits.h)


@dataclass(frozen=True, slots=True)
class Cluster:
    """Where actors run, and the resources of each. With None, the available CPUs are divided evenly.

    ``address`` joins a running cluster (``auto``, ``HOST:PORT``); without it, Ray is started on this machine and stopped
    at the end.
    """

    address: str | None = option(None, "Ray: the cluster to join, auto or HOST:PORT.", shown="started on this machine")
    actors: int | None = option(
        None, "Ray: actors, which are processes.", least=1, shown="one per core, at most 8; on a cluster as many as fit"
    )
    cpus_per_actor: int | None = option(
        None, "Ray: cores, and threads, per actor.", least=1, shown="an even share; on a cluster 1"
    )
    gpus_per_actor: float = option(
        0.0, "Ray: GPUs per actor; 0.5 puts two actors on each GPU, 0 uses CPUs only.", least=0
    )
    verbose: bool = option(False, "Show the messages of Ray.")


@dataclass(frozen=True, slots=True)
class Pool:
    """The actors: how many, the CPUs and GPUs that Ray reserves for each, and the threads of each."""

    actors: int
    cpus: float
    gpus: float
    threads: int


def share_out(cluster: Cluster, cpus: float, gpus: float) -> Pool:
    """The pool for a Ray with the given CPUs and GPUs. Raises InputError if they are too few for the request."""
    if cluster.gpus_per_actor * (cluster.actors or 1) > gpus:
        raise InputError(
            f"--gpus-per-actor {cluster.gpus_per_actor:g} with {cluster.actors or 1} actors: Ray has {gpus:g} GPUs"
        )
    each = cluster.cpus_per_actor or (1 if cluster.address else None)
    if cluster.gpus_per_actor:
        fit = int(gpus / cluster.gpus_per_actor)
    else:
        fit = int(cpus / each) if each else min(int(cpus), _MOST_ACTORS)
    actors = cluster.actors or max(1, fit)
    if each is None:
        each = int(cpus) // actors
    if cluster.cpus_per_actor and cluster.cpus_per_actor * actors > cpus:
        raise InputError(f"{actors} actors of {cluster.cpus_per_actor} CPUs each: Ray has {cpus:g} CPUs")
    # Ray reserves whole CPUs, or multiples of 1/10,000 of one.
    reserved = float(each) if each else int(10_000 * cpus / actors) / 10_000
    if reserved * actors > cpus:
        raise InputError(f"{actors} actors of {reserved:g} CPUs each: Ray has {cpus:g} CPUs: give fewer --actors")
    return Pool(actors, reserved, cluster.gpus_per_actor, max(1, each))


class _Actor:
    """The class that the actors of Ray Data run. A batch is the number of one shard, its result one row of counts."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        number = int(batch["shard"][0])
        counts, error, system = Counts(), "", False
        try:
            counts = self._worker.finish(number)
        except BrokenModelError:
            os._exit(_BROKEN)  # Ray then starts another process, which will find the faulty row
        except QadeployError as failure:
            error = str(failure)
        except OSError as failure:
            error, system = f"{failure.filename or ''}\n{failure.strerror or one_line(failure)}", True
        except Exception as failure:  # the driver reports it: Ray would retry, or wrap it in its own traces
            error = f"part {number}: {type(failure).__name__}: {one_line(failure)}"
        values = {"shard": number, "rows": counts.rows, "rejected": counts.rejected, "error": error, "system": system}
        return {name: [value] for name, value in values.items()}


@contextmanager
def running(cluster: Cluster) -> Iterator[Pool]:
    """Joins Ray at ``address``, or starts and stops it on this machine. Yields a pool that fits it.

    If this process uses Ray already, that Ray is used and left running.

    Raises:
        MissingExtraError: Ray is not installed.
        InputError: There is no cluster at the address, or it has too few CPUs or GPUs.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray reads it when it starts
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise MissingExtraError("--engine ray", error.name or "ray", "scale") from error
    mine = not ray.is_initialized()
    apart = _Apart(sys.stdout, cluster.verbose)
    with contextlib.redirect_stdout(apart):
        if mine:
            _start(ray, cluster)
        try:
            with _quiet(ray, cluster.verbose):
                found = ray.cluster_resources()
                yield share_out(cluster, found.get("CPU", 0.0), found.get("GPU", 0.0))
        finally:
            if mine:
                apart.ending = True
                ray.shutdown()


def _start(ray: Any, cluster: Cluster) -> None:
    level = logging.INFO if cluster.verbose else logging.ERROR
    common: dict[str, Any] = {"log_to_driver": cluster.verbose, "logging_level": level}
    if cluster.address:
        _check_address(cluster.address)
        common["address"] = cluster.address
    else:  # "local" starts a new Ray, wherever RAY_ADDRESS points
        common.update(address="local", num_cpus=usable_cpus(), include_dashboard=False, object_store_memory=_STORE)
    try:
        with (
            contextlib.nullcontext() if cluster.verbose else _silent_library(),
            contextlib.nullcontext() if cluster.address else _alone(ray),
            _same_handlers(),
        ):
            ray.init(**common)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError, OSError) as error:
        if not cluster.address:
            raise InputError(f"Ray does not start on this machine: {one_line(error)}") from error
        raise InputError(
            f"--address {cluster.address}: cannot be reached: {one_line(error)}. Does the same version of Ray run there? "
            "If the cluster requires a token, as Ray does by default, set RAY_AUTH_MODE=token and put the token in "
            "~/.ray/auth_token, or give --address auto on one of its machines"
        ) from error


@contextmanager
def _alone(ray: Any) -> Iterator[None]:
    """Makes a Ray that is started in the block listen on 127.0.0.1 only, and require a token that only its processes have.

    Raises RuntimeError if it listens elsewhere.
    """
    from ray._private import ray_constants

    clusters = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        with _environment({**_ALONE, "RAY_AUTH_TOKEN": secrets.token_hex(32)}):
            # Ray read the environment when it was imported, and perhaps a token when it was started before.
            ray._raylet.Config.initialize("")
            ray._raylet.AuthenticationTokenLoader.instance().reset_cache()
            yield
        if (address := ray.util.get_node_ip_address()) != _LOOPBACK:
            ray.shutdown()
            raise RuntimeError(f"it would listen on {address}, not only on {_LOOPBACK}")
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = clusters


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _same_handlers() -> Iterator[None]:
    """Restores the handler of SIGTERM, which Ray replaces by one that ends the process with a traceback."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)


def _check_address(address: str) -> None:
    """Raises InputError if nothing listens at HOST:PORT; Ray itself would wait for minutes."""
    host, _, port = address.rpartition(":")
    if address == "auto":
        return
    if "://" in address or not host or not port.isdecimal():
        raise InputError(
            f"--address {address}: give auto, or HOST:PORT of the cluster's head (ray start --head names it)"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise InputError(f"--address {address}: cannot be reached: {one_line(error)}") from error


class _Apart(io.TextIOBase):
    """Stdout for the thread that created it. Other threads write Ray's messages about dead workers: to stderr, or nowhere.

    The same holds for everything written after ``ending`` is set: Ray then prints the repeated messages that it held back.
    """

    def __init__(self, stdout: TextIO, verbose: bool) -> None:
        self._stdout = stdout
        self._verbose = verbose
        self._thread = threading.get_ident()
        self.ending = False

    def write(self, text: str) -> int:
        """Writes the text to stdout, to stderr, or nowhere."""
        if threading.get_ident() == self._thread and not self.ending:
            return self._stdout.write(text)
        return sys.stderr.write(text) if self._verbose else len(text)

    def flush(self) -> None:
        """Flushes stdout."""
        self._stdout.flush()


@contextmanager
def _silent_library() -> Iterator[None]:
    """Makes Ray's C++ library in this process log fatal errors only.

    The library reads the level once and reports it on file descriptor 2, which is redirected to /dev/null meanwhile.
    """
    level = os.environ.get("RAY_BACKEND_LOG_LEVEL", "fatal")
    sys.stderr.flush()
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    os.close(nothing)
    try:
        with _environment({"RAY_BACKEND_LOG_LEVEL": level}):
            yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


@contextmanager
def _quiet(ray: Any, verbose: bool) -> Iterator[None]:
    context = ray.data.DataContext.get_current()
    logger = logging.getLogger("ray.data")
    before = context.enable_progress_bars, context.print_on_execution_start, logger.level
    if not verbose:
        context.enable_progress_bars = context.print_on_execution_start = False
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        context.enable_progress_bars, context.print_on_execution_start = before[:2]
        logger.setLevel(before[2])


def into_folder(folder: Path, digest: str, load: Load, shards: Sequence[Shard], pool: Pool, on_shard: OnShard) -> None:
    """Answers shards into their folder and calls ``on_shard`` after each, in the order in which they finish.

    Args:
        folder: The output folder.
        digest: The digest of its plan.
        load: Makes the answerer in each actor; it is pickled.
        shards: The shards to answer.
        pool: The actors.
        on_shard: Called with each finished shard and its counts.

    Raises:
        FailureError: An actor could not finish a shard.
    """
    import ray
    import ray.data

    by_number = {shard.number: shard for shard in shards}
    numbers = [{"shard": number} for number in by_number]
    # One block per shard, so that each shard is one task. Blocks made here need no tasks to read them.
    data = ray.data.from_items(numbers, override_num_blocks=len(numbers)).map_batches(
        _Actor,
        fn_constructor_args=(Worker(folder, digest, load),),
        batch_size=1,
        num_cpus=pool.cpus,
        num_gpus=pool.gpus or None,
        compute=ray.data.ActorPoolStrategy(
            size=min(pool.actors, len(numbers)),
            max_tasks_in_flight_per_actor=2 if len(numbers) >= _MANY * pool.actors else 1,
        ),
    )
    try:
        with watched(ray):
            for done, row in enumerate(data.iter_rows()):
                if row["error"]:
                    raise _failure(row, folder, done, len(numbers))
                on_shard(by_number[row["shard"]], Counts(int(row["rows"]), int(row["rejected"])))
    except ray.exceptions.RayError as error:
        raise FailureError(
            f"Ray failed: {one_line(error, 600)}; the same command continues from what is done"
        ) from error


def _failure(row: dict[str, Any], folder: Path, done: int, of: int) -> FailureError:
    if not row["system"]:
        return FailureError(row["error"])
    filename, _, reason = row["error"].partition("\n")
    return explain(OSError(0, reason, filename or str(folder)), str(folder), done, of)
