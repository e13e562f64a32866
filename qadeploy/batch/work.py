"""The worker of both engines: answers one shard after the other, from rows of the input to a complete part."""

from __future__ import annotations

import secrets
import socket
from collections.abc import Callable, Sequence
from pathlib import Path

from qadeploy.batch.answering import BrokenModelError, Rejected, Result, ShardAnswering
from qadeploy.batch.journal import Journal
from qadeploy.batch.output import Counts, Folder
from qadeploy.batch.plan import BatchPlan, Shard
from qadeploy.batch.ranges import Reader
from qadeploy.errors import FailureError, InputError, one_line
from qadeploy.inference.answerer import Answerer

Load = Callable[[], Answerer]
OnShard = Callable[[Shard, Counts], object]
_SHARED = "with several machines, each must see the bundle, the input and --output at the same path (the input may be on s3://)"


class Worker:
    """Answers shards of a plan into its folder. The bundle is loaded once, for the first shard.

    Args:
        folder: The output folder.
        digest: The digest of the plan that the folder must hold.
        load: Makes the answerer.
    """

    def __init__(self, folder: Path, digest: str, load: Load) -> None:
        self._folder = Folder(folder)
        self._digest = digest
        self._load = load
        self._run = secrets.token_hex(4)  # the same for all actors, which get copies of this worker
        self._open: tuple[BatchPlan, Answerer, Reader] | None = None

    def finish(self, number: int) -> Counts:
        """Answers a shard, writes its part and removes its journal. If two workers have died on it, it goes row by row.

        Raises:
            FailureError: The message says where the problem is and what to do.
            BrokenModelError: The model no longer answers.
            OSError: The part cannot be written.
        """
        plan = self._plan()
        shard = plan.shards[number]
        journal = self._folder.journal(number, self._run)
        journal.begin()
        try:
            answerer, reader = self._ready(plan)
            journal.loaded()
            results = self._results(ShardAnswering(answerer, plan, shard, reader), shard, journal)
            counts = self._folder.write(
                number,
                results,
                plan.settings.bundle,
                passages=plan.passages,
                snippets=plan.settings.snippet is not None,
            )
        except BrokenModelError:
            raise  # counts as a death: another process will find the faulty row
        except BaseException:
            journal.left()
            raise
        journal.remove()
        return counts

    def _results(self, answering: ShardAnswering, shard: Shard, journal: Journal) -> Sequence[Result]:
        try:
            if not journal.careful:
                return answering.stream()
            killed: dict[int, Rejected] = {r: answering.killer(r, n) for r, n in journal.killers.items()}
            return answering.alone({**journal.known, **killed}, journal.trying)
        except (InputError, OSError) as error:
            at = f"{shard.source.path}: rows {shard.range.first + 1} to {shard.range.first + shard.range.rows}"
            raise FailureError(
                f"{at} cannot be read on {socket.gethostname()}: {one_line(error)}; {_SHARED}"
            ) from error

    def _plan(self) -> BatchPlan:
        if self._open:
            return self._open[0]
        try:
            plan = self._folder.plan()
        except InputError as error:
            raise FailureError(f"on {socket.gethostname()}: {error}; {_SHARED}") from error
        if plan.digest() != self._digest:
            raise FailureError(f"{self._folder.path} on {socket.gethostname()} holds another plan; {_SHARED}")
        return plan

    def _ready(self, plan: BatchPlan) -> tuple[Answerer, Reader]:
        if self._open is None:
            try:
                answerer = self._load()
            except InputError as error:
                raise FailureError(f"on {socket.gethostname()}: {error}; {_SHARED}") from error
            if answerer.bundle and answerer.bundle.hash != plan.settings.bundle:
                raise FailureError(
                    f"{answerer.bundle.folder} on {socket.gethostname()} is not the bundle of the plan; {_SHARED}"
                )
            self._open = plan, answerer, Reader(plan.settings.data_options)
        return self._open[1], self._open[2]
