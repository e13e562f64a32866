"""What a worker does, in whichever engine: one shard after the other, from the input's rows to a part that stands."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from qadeploy.batch.answering import BrokenModelError, Rejected, Result, ShardAnswering
from qadeploy.batch.journal import Journal
from qadeploy.batch.output import Counts, Folder
from qadeploy.batch.plan import Plan, Shard
from qadeploy.batch.ranges import Reader
from qadeploy.data.wording import one_line
from qadeploy.errors import FailureError, InputError
from qadeploy.inference.answerer import Answerer

Load = Callable[[], Answerer]
# Of tokenised contexts that a worker keeps: rows on one context stand together as a rule, so few are asked for again later.
_CONTEXTS = 8 * 2**20
_SHARED = "with several machines the bundle, the input and --output must lie where each of them sees them (input also on s3://)"


@dataclass(frozen=True, slots=True)
class BundleLoad:
    """Loads a bundle, wherever it is called: what workers are given, for an answerer cannot be pickled."""

    path: str
    device: str = "auto"
    threads: int | None = None

    def __call__(self) -> Answerer:
        """The answerer. Raises what ``Answerer.load`` raises."""
        return Answerer.load(self.path, device=self.device, threads=self.threads, context_cache_bytes=_CONTEXTS)


class Worker:
    """Answers shards of one plan into its folder; the bundle is loaded once, for the first.

    ``load`` makes the answerer (``BundleLoad``, or a test's own); ``digest`` is the plan's, which the folder must hold.
    """

    def __init__(self, folder: Path, digest: str, load: Load) -> None:
        self._folder = Folder(folder)
        self._digest = digest
        self._load = load
        self._open: tuple[Plan, Answerer, Reader] | None = None

    def finish(self, number: int) -> Counts:
        """Answers a shard; its part stands when this returns, and its journal is gone.

        A shard over which workers died twice goes row by row, as ``journal`` tells. Raises FailureError, which says
        where and what to do, BrokenModelError, OSError (writing).
        """
        plan = self._plan()
        shard = plan.shards[number]
        journal = self._folder.journal(number)
        journal.begin()
        try:
            answerer, reader = self._ready(plan)
            results = self._results(ShardAnswering(answerer, plan, shard, reader), shard, journal)
            counts = self._folder.write(number, results, plan.job.bundle)
        except BrokenModelError:
            raise  # counts as a death: another process may find the row
        except BaseException:
            journal.left()
            raise
        journal.remove()
        return counts

    def _results(self, answering: ShardAnswering, shard: Shard, journal: Journal) -> Sequence[Result]:
        try:
            if shard.source.stat() != shard.source:
                raise FailureError(f"{shard.source.path}: was changed while it was being answered: begin anew")
            if not journal.careful:
                return answering.stream()
            killed: dict[int, Rejected] = {r: answering.killer(r, n) for r, n in journal.killers.items()}
            return answering.alone({**journal.known, **killed}, journal.trying)
        except (InputError, OSError) as error:
            at = f"{shard.source.path}: rows {shard.part.first + 1} to {shard.part.first + shard.part.rows}"
            raise FailureError(
                f"{at} cannot be read on {socket.gethostname()}: {one_line(error)}; {_SHARED}"
            ) from error

    def _plan(self) -> Plan:
        if self._open:
            return self._open[0]
        try:
            plan = self._folder.plan()
        except InputError as error:
            raise FailureError(f"on {socket.gethostname()}: {error}; {_SHARED}") from error
        if plan.digest() != self._digest:
            raise FailureError(f"{self._folder.path} on {socket.gethostname()} holds another plan; {_SHARED}")
        return plan

    def _ready(self, plan: Plan) -> tuple[Answerer, Reader]:
        if self._open is None:
            try:
                answerer = self._load()
            except InputError as error:
                raise FailureError(f"on {socket.gethostname()}: {error}; {_SHARED}") from error
            if answerer.bundle and answerer.bundle.hash != plan.job.bundle:
                raise FailureError(
                    f"{answerer.bundle.folder} on {socket.gethostname()} is another bundle than the one of the plan; {_SHARED}"
                )
            self._open = plan, answerer, Reader(plan.job.reading)
        return self._open[1], self._open[2]
