"""``qadeploy answer`` as a function: files of questions in, a folder or file of answers out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from qadeploy.batch import local, ray_engine
from qadeploy.batch.output import REJECTED, Counts, Folder, OneFile, explain
from qadeploy.batch.plan import Job, Plan, Shard, make_plan
from qadeploy.batch.ranges import import_parquet
from qadeploy.batch.ray_engine import Cluster
from qadeploy.batch.sources import LINES, expand, local_folder
from qadeploy.batch.work import BundleLoad, Load, Worker
from qadeploy.data.fields import Reading
from qadeploy.errors import FailureError, InputError
from qadeploy.inference.bundle import open_bundle


@dataclass(frozen=True, slots=True)
class Request:
    """What to answer, with what, and where to. ``inputs`` are patterns as ``sources.expand`` takes them.

    ``output`` is a folder of parquet, or one file where it ends in .jsonl, which the local engine alone writes.
    ``cluster`` is None for the local engine. ``threads`` are those of the local engine; ``shard_rows`` those of a part.
    ``prefilter`` is that of ``Answerer.answer``.
    """

    bundle: str
    inputs: tuple[str, ...]
    output: str
    reading: Reading = field(default_factory=Reading)
    allow_no_answer: bool = False
    device: str = "auto"
    threads: int | None = None
    shard_rows: int | None = None
    cluster: Cluster | None = None
    prefilter: int | None = None


@dataclass(frozen=True, slots=True)
class Summary:
    """``counts`` of the whole output, ``rows`` of the input, ``before`` of them done by earlier runs; where rejected rows stand."""

    counts: Counts
    rows: int
    before: int
    rejected_in: Path


@dataclass(frozen=True, slots=True)
class Progress:
    """What a caller may want to show: the plan's rows and those done before, then the rows of each shard done."""

    begin: Callable[[int, int], object] = lambda rows, done: None
    advance: Callable[[int], object] = lambda rows: None


def answer_files(request: Request, progress: Progress | None = None, load: Load | None = None) -> Summary:
    """Answers every row of the inputs, or goes on with what an earlier run into the same folder began.

    ``load`` makes the answerer instead of the bundle's own; with Ray it is pickled. Raises InputError (inputs, output,
    another job's folder), FailureError, MissingExtraError, BundleError, DeviceError; KeyboardInterrupt leaves the parts
    that stand.
    """
    shown = progress or Progress()
    _check(request)
    bundle = open_bundle(request.bundle)
    job = Job(bundle.hash, dict(request.reading.columns), request.allow_no_answer, request.prefilter)
    load = load or BundleLoad(str(bundle.folder.absolute()), request.device, request.threads)
    output = local_folder(request.output)
    if output.suffix.lower() in LINES:
        return _to_file(request, job, output, load, shown)
    return _to_folder(request, job, Folder(output.absolute()), load, shown)


def _check(request: Request) -> None:
    if request.cluster is None:
        return
    if Path(request.output).suffix.lower() in LINES:
        raise InputError(
            f"--output {request.output}: --engine ray writes a folder of parquet: give a name without .jsonl"
        )
    if request.threads is not None:
        raise InputError("--threads is the local engine's: with --engine ray give --actors and --cpus-per-actor")
    if request.device not in {"auto", "cpu"} and not request.cluster.gpus:
        raise InputError(f"--device {request.device}: with --engine ray give --gpus-per-actor, which shares GPUs out")


def _to_file(request: Request, job: Job, path: Path, load: Load, progress: Progress) -> Summary:
    output = OneFile(path)
    plan = make_plan(job, request.inputs, request.shard_rows)
    tally = _Tally(plan, {}, progress)
    local.into_file(load, plan, output, tally)
    return tally.summary(output.rejected)


def _to_folder(request: Request, job: Job, folder: Folder, load: Load, progress: Progress) -> Summary:
    import_parquet("writing parquet (or name the output .jsonl)")
    begun = folder.begun
    if begun:
        plan = folder.plan_for(job, expand(request.inputs), request.shard_rows)
    else:
        plan = make_plan(job, request.inputs, request.shard_rows)
    with folder.held():
        if not begun:
            folder.make(plan)
        done = folder.done(plan)
        tally = _Tally(plan, done, progress)
        left = [shard for shard in plan.shards if shard.number not in done]
        try:
            if left:
                _answer(request, plan, folder, load, left, tally)
        except OSError as error:
            raise explain(error, str(folder.path), len(plan.shards) - tally.left, len(plan.shards)) from error
    return tally.summary(Path(request.output) / REJECTED)


def _answer(
    request: Request, plan: Plan, folder: Folder, load: Load, shards: Sequence[Shard], tally: local.OnShard
) -> None:
    if request.cluster is None:
        local.into_folder(Worker(folder.path, plan.digest(), load), shards, tally)
        return
    with ray_engine.running(request.cluster) as pool:
        if isinstance(load, BundleLoad):
            device = request.device if request.cluster.gpus == 0 else "cuda"
            load = replace(load, device="cpu" if device == "auto" else device, threads=pool.threads)
        ray_engine.into_folder(folder.path, plan.digest(), load, shards, pool, tally)


class _Tally:
    """Counts the shards that are done, and shows them."""

    def __init__(self, plan: Plan, done: dict[int, Counts], progress: Progress) -> None:
        self._plan = plan
        self._progress = progress
        self._counts = sum(done.values(), Counts())
        self._before = self._counts.rows + self._counts.rejected
        self.left = len(plan.shards) - len(done)
        progress.begin(plan.rows, self._before)

    def __call__(self, shard: Shard, counts: Counts) -> None:
        self._counts += counts
        self.left -= 1
        self._progress.advance(shard.part.rows)

    def summary(self, rejected_in: Path) -> Summary:
        """The whole output. Raises FailureError where no row has an answer."""
        if not self._counts.rows:
            raise FailureError(
                f"no row could be answered: {rejected_in} tells why, for each of {self._counts.rejected}"
            )
        return Summary(self._counts, self._plan.rows, self._before, rejected_in)
