"""The engine on Ray: a pool of actors, on this machine or a cluster, each with the bundle loaded once.

What goes through Ray Data are the numbers of shards and, back, their counts: an actor reads its shard's rows from the
input, and writes their part into the folder, by itself. So memory does not grow with the input, a part that
stands is safe from whatever happens to the cluster, and the answers are those of the local engine, whose worker this is.
Ray Data restarts an actor that died and gives its shard to another (``max_restarts`` and ``max_task_retries`` are
without bound in its actor pools); the shard's journal says when a row is to blame.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from qadeploy.batch.answering import BrokenModelError
from qadeploy.batch.local import OnShard
from qadeploy.batch.output import Counts, explain
from qadeploy.batch.plan import Shard
from qadeploy.batch.work import Load, Worker
from qadeploy.data.wording import one_line
from qadeploy.errors import FailureError, InputError, MissingExtraError, QadeployError
from qadeploy.inference.session import usable_cpus

_MOST_ACTORS = 8  # by default on one machine: each takes the memory of a bundle
_STORE = 100 * 2**20  # bytes of a local Ray's object store, through which only numbers go
_SECONDS = 10  # to reach a cluster's head
# From so many shards an actor on, a second one is queued at each actor, so that it need not wait for Ray between two. With
# few of them it would wait there while another actor is idle.
_MANY = 4
_BROKEN = 70  # exit code of an actor whose model broke (EX_SOFTWARE of sysexits.h)


@dataclass(frozen=True, slots=True)
class Cluster:
    """Where actors run, and what each may use. None means: what is there, shared out evenly.

    ``address`` joins a cluster that runs already (``auto``, ``HOST:PORT``); else a Ray of this machine alone is
    started and ended. ``cpus`` and ``gpus`` are an actor's; ``gpus`` may be a part of one.
    """

    address: str | None = None
    actors: int | None = None
    cpus: int | None = None
    gpus: float = 0.0
    verbose: bool = False


@dataclass(frozen=True, slots=True)
class Pool:
    """The actors as they will run: how many, CPUs and GPUs that Ray sets aside for each, and an actor's threads."""

    actors: int
    cpus: float
    gpus: float
    threads: int


def share_out(cluster: Cluster, cpus: float, gpus: float) -> Pool:
    """The pool for a Ray that has so many CPUs and GPUs. Raises InputError where it cannot have what was asked."""
    if cluster.gpus > gpus or (cluster.gpus and cluster.gpus * (cluster.actors or 1) > gpus):
        raise InputError(f"--gpus-per-actor {cluster.gpus:g} with {cluster.actors or 1} actors: Ray has {gpus:g} GPUs")
    each = cluster.cpus
    if each is None and cluster.address:
        each = 1
    fit = int(gpus / cluster.gpus) if cluster.gpus else int(cpus / each) if each else min(int(cpus), _MOST_ACTORS)
    actors = cluster.actors or max(1, fit)
    if each is None:
        each = int(cpus) // actors
    if cluster.cpus and cluster.cpus * actors > cpus:
        raise InputError(f"{actors} actors of {cluster.cpus} CPUs each: Ray has {cpus:g} CPUs")
    # Ray sets aside whole CPUs, or ten-thousandths of one.
    reserved = float(each) if each else int(10_000 * cpus / actors) / 10_000
    if reserved * actors > cpus:
        raise InputError(f"{actors} actors of {reserved:g} CPUs each: Ray has {cpus:g} CPUs: give fewer --actors")
    return Pool(actors, reserved, cluster.gpus, max(1, each))


class _Actor:
    """The class that Ray Data's actors run. A batch is the number of one shard; its result a line of counts."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        number = int(batch["shard"][0])
        counts, error, system = Counts(), "", False
        try:
            counts = self._worker.finish(number)
        except BrokenModelError:
            os._exit(_BROKEN)  # so that Ray starts another process, which may find the row
        except QadeployError as failure:
            error = str(failure)
        except OSError as failure:
            error, system = f"{failure.filename or ''}\n{failure.strerror or one_line(failure)}", True
        except Exception as failure:  # told by the driver; raised here, Ray would retry or wrap it in its own traces
            error = f"part {number}: {type(failure).__name__}: {one_line(failure)}"
        values = {"shard": number, "rows": counts.rows, "rejected": counts.rejected, "error": error, "system": system}
        return {name: [value] for name, value in values.items()}


@contextmanager
def running(cluster: Cluster) -> Iterator[Pool]:
    """Ray, within it: joined at ``address``, or started here and ended. Gives the pool that fits it.

    Within a process that uses Ray already, that Ray is taken and left running. Raises MissingExtraError, InputError (no
    cluster at the address, not enough CPUs or GPUs).
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read while Ray starts
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
    else:  # "local": one of its own, wherever RAY_ADDRESS points
        common.update(address="local", num_cpus=usable_cpus(), include_dashboard=False, object_store_memory=_STORE)
    try:
        with contextlib.nullcontext() if cluster.verbose else _silent_library():
            ray.init(**common)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError, OSError) as error:
        if not cluster.address:
            raise InputError(f"Ray on this machine: does not start: {one_line(error)}") from error
        raise InputError(
            f"--address {cluster.address}: cannot be reached: {one_line(error)}. Does the same version of Ray run there? "
            "Where it asks for a token, as Ray does by default, set RAY_AUTH_MODE=token and have ~/.ray/auth_token, or "
            "give --address auto on one of its machines"
        ) from error


def _check_address(address: str) -> None:
    """Raises InputError where nobody listens at HOST:PORT, for which Ray itself would wait for minutes."""
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
    """Stdout for the thread that made this. What others write is Ray's remarks on dead workers: for stderr, or nobody.

    So is all that is written once it is ``ending``: Ray says then what it kept back because it had said it before.
    """

    def __init__(self, stdout: TextIO, verbose: bool) -> None:
        self._stdout = stdout
        self._verbose = verbose
        self._thread = threading.get_ident()
        self.ending = False

    def write(self, text: str) -> int:
        """Writes the text where it belongs."""
        if threading.get_ident() == self._thread and not self.ending:
            return self._stdout.write(text)
        return sys.stderr.write(text) if self._verbose else len(text)

    def flush(self) -> None:
        """Flushes stdout."""
        self._stdout.flush()


@contextmanager
def _silent_library() -> Iterator[None]:
    """Within it Ray's C++ library, in this process, is told to log fatal errors only.

    It reads the level once, and says on stderr that it did, past Python: so that is closed for the moment.
    """
    given = os.environ.get("RAY_BACKEND_LOG_LEVEL")
    sys.stderr.flush()
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    os.close(nothing)
    try:
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        if given is None:
            del os.environ["RAY_BACKEND_LOG_LEVEL"]


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
    """Answers the shards into their folder, calling ``on_shard`` after each, in the order in which they are done.

    ``load`` makes the answerer in each actor; it is pickled. Raises FailureError for whatever stopped an actor.
    """
    import ray.data

    by_number = {shard.number: shard for shard in shards}
    numbers = [{"shard": number} for number in by_number]
    # One block a shard, so that one shard is one task; already made blocks need no task of theirs to be read.
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
        for done, row in enumerate(data.iter_rows()):
            if row["error"]:
                raise _failure(row, folder, done, len(numbers))
            on_shard(by_number[row["shard"]], Counts(int(row["rows"]), int(row["rejected"])))
    except ray.exceptions.RayError as error:
        raise FailureError(
            f"Ray failed: {one_line(error)[:600]}; the same command goes on from what is done"
        ) from error


def _failure(row: dict[str, Any], folder: Path, done: int, of: int) -> FailureError:
    if not row["system"]:
        return FailureError(row["error"])
    filename, _, reason = row["error"].partition("\n")
    return explain(OSError(0, reason, filename or str(folder)), str(folder), done, of)
