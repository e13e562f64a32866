"""``qadeploy answer`` as a function: from files of questions to a folder or file of answers."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from qadeploy import options
from qadeploy.batch import ray_engine
from qadeploy.batch.answering import ShardAnswering
from qadeploy.batch.output import REJECTED, Counts, Folder, OneFile, explain
from qadeploy.batch.plan import CALL_OPTIONS, BatchPlan, BatchSettings, Shard, make_plan
from qadeploy.batch.ranges import Reader, import_parquet
from qadeploy.batch.ray_engine import Cluster
from qadeploy.batch.sources import LINES, expand, local_folder
from qadeploy.batch.work import Load, OnShard, Worker
from qadeploy.core.settings import Offsets, Options, SnippetSize
from qadeploy.data.fields import DataOptions
from qadeploy.errors import FailureError, InputError
from qadeploy.inference.answerer import Answerer
from qadeploy.inference.bundle import open_bundle
from qadeploy.inference.presenting import check_snippet
from qadeploy.options import check, option

# Bytes of tokenised contexts per worker: rows on the same context are usually neighbours, so a few contexts are enough.
_CONTEXTS = 8 * 2**20
# Endings of files that a user may expect; a folder with such a name would look like one.
_NOT_WRITTEN = frozenset({".csv", ".json", ".tsv", ".xlsx"})


@dataclass(frozen=True, slots=True)
class BatchRequest:
    """What to answer, with which bundle, and where to write. The fields that are options describe themselves.

    Attributes:
        bundle: The bundle folder.
        inputs: Patterns, see ``sources.expand``.
        output: A folder of parquet files, or with the local engine one file that ends in .jsonl.
        data_options: The options for reading rows.
        cluster: The settings of Ray; None for the local engine.
    """

    bundle: str
    inputs: tuple[str, ...]
    output: str
    data_options: DataOptions = field(default_factory=DataOptions)
    allow_no_answer: bool | None = option(
        None,
        "Whether 'no answer' competes, by the bundle's null threshold.",
        off="--always-answer",
        shown="if the model was trained to say so",
    )
    prefilter: int | None = options.prefilter()
    min_score: float = options.min_score()
    snippet: SnippetSize = options.snippet()
    offsets: Offsets = options.offsets()
    bundle_sha256: str | None = options.bundle_sha256()
    load_timeout: float = options.load_timeout()
    device: str = options.device()
    threads: int | None = option(None, "CPU threads of the local engine.", least=1, shown="all")
    shard_rows: int | None = option(None, "Rows per part.", least=1, shown="250, up to 8000 if there are many")
    cluster: Cluster | None = None


@dataclass(frozen=True, slots=True)
class Summary:
    """The result of a batch.

    Attributes:
        counts: The rows of the whole output.
        rows: The number of rows of the input.
        before: The number of rows that earlier runs had done.
        rejected_in: The file or folder with the rejected rows.
    """

    counts: Counts
    rows: int
    before: int
    rejected_in: Path


@dataclass(frozen=True, slots=True)
class BatchProgress:
    """Callbacks for a progress display: ``begin(rows, done)`` with the rows of the plan, ``advance(rows)`` after each shard."""

    begin: Callable[[int, int], object] = lambda rows, done: None
    advance: Callable[[int], object] = lambda rows: None


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP, which end a batch as Ctrl-C does. ``number`` is the number of the signal."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


@contextmanager
def _in_order() -> Iterator[None]:
    """Makes SIGTERM and SIGHUP raise Terminated, so that workers can note that they were interrupted and did not crash.

    This applies only in the main thread, and if the program has no handler of its own. Further signals are ignored.
    """
    main = threading.current_thread() is threading.main_thread()
    known = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]  # Windows has no SIGHUP
    ours = [n for n in known if main and signal.getsignal(n) == signal.SIG_DFL]

    def stop(number: int, frame: object) -> None:
        for each in ours:
            signal.signal(each, signal.SIG_IGN)
        raise Terminated(number)

    try:
        for number in ours:
            signal.signal(number, stop)
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


@_in_order()
def answer_files(request: BatchRequest, progress: BatchProgress | None = None, load: Load | None = None) -> Summary:
    """Answers every row of the inputs, or continues an earlier run with the same output folder.

    After a KeyboardInterrupt the finished parts are kept. In the main thread, SIGTERM and SIGHUP raise its subclass Terminated.

    Args:
        request: What to answer.
        progress: Callbacks for a progress display.
        load: Makes the answerer; by default it loads the bundle. With Ray it is pickled.

    Raises:
        InputError: The inputs or the output cannot be used, or the folder holds answers of another job.
        FailureError: The work did not succeed; the message says what to do.
    """
    shown = progress or BatchProgress()
    _check(request)
    bundle = open_bundle(request.bundle, sha256=request.bundle_sha256)
    check(request)
    allow = Options(allow_no_answer=request.allow_no_answer).null_competes(bundle.settings)
    chosen = {name: getattr(request, name) for name in CALL_OPTIONS} | {"allow_no_answer": allow}
    settings = BatchSettings(bundle.hash, dict(request.data_options.mapping), **chosen)
    check_snippet(request.snippet)
    load = load or partial(
        Answerer.load,
        str(bundle.folder.absolute()),
        device=request.device,
        threads=request.threads,
        context_cache_bytes=_CONTEXTS,
        sha256=bundle.hash,
        load_timeout=request.load_timeout,
    )
    output = local_folder(request.output)
    if output.suffix.lower() in LINES:
        return _to_file(request, settings, output, load, shown)
    return _to_folder(request, settings, Folder(output.absolute()), load, shown)


def _check(request: BatchRequest) -> None:
    output = Path(request.output)
    if output.suffix.lower() in _NOT_WRITTEN and not output.is_dir():
        raise InputError(
            f"--output {request.output}: {output.suffix} is not written: give a name that ends in .jsonl, or that of a folder "
            "for parquet files"
        )
    if request.cluster is None:
        return
    if Path(request.output).suffix.lower() in LINES:
        raise InputError(
            f"--output {request.output}: --engine ray writes a folder of parquet files: give a name without .jsonl"
        )
    if request.threads is not None:
        raise InputError("--threads is for the local engine: with --engine ray give --actors and --cpus-per-actor")
    if request.device not in {"auto", "cpu"} and not request.cluster.gpus_per_actor:
        raise InputError(f"--device {request.device}: with --engine ray give --gpus-per-actor, which assigns GPUs")


def _to_file(
    request: BatchRequest, settings: BatchSettings, path: Path, load: Load, progress: BatchProgress
) -> Summary:
    output = OneFile(path)
    with output.held():
        plan = make_plan(settings, request.inputs, request.shard_rows)
        tally = _Tally(plan, {}, progress)
        answerer, reader = load(), Reader(settings.data_options)
        with output.writing(settings.bundle) as add:
            for shard in plan.shards:
                tally(shard, add(ShardAnswering(answerer, plan, shard, reader).stream()))
    return tally.summary(output.rejected)


def _to_folder(
    request: BatchRequest, settings: BatchSettings, folder: Folder, load: Load, progress: BatchProgress
) -> Summary:
    import_parquet("writing parquet (or name the output .jsonl)")
    begun = folder.begun
    if begun:
        plan = folder.plan_for(settings, expand(request.inputs), request.shard_rows)
    else:
        plan = make_plan(settings, request.inputs, request.shard_rows)
    with folder.held():
        if not begun and folder.begun:  # another run has made the folder and ended meanwhile
            plan = folder.plan_for(settings, plan.sources, request.shard_rows)
        elif not begun:
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
    request: BatchRequest, plan: BatchPlan, folder: Folder, load: Load, shards: Sequence[Shard], tally: OnShard
) -> None:
    if request.cluster is None:
        worker = Worker(folder.path, plan.digest(), load)
        for shard in shards:
            tally(shard, worker.finish(shard.number))
        return
    try:
        with ray_engine.running(request.cluster) as pool:
            if isinstance(load, partial):  # of Answerer.load
                device = request.device if request.cluster.gpus_per_actor == 0 else "cuda"
                load = partial(load, device="cpu" if device == "auto" else device, threads=pool.threads)
            ray_engine.into_folder(folder.path, plan.digest(), load, shards, pool, tally)
    except BaseException:
        folder.leave()
        raise


class _Tally:
    """Counts the finished shards and reports progress."""

    def __init__(self, plan: BatchPlan, done: dict[int, Counts], progress: BatchProgress) -> None:
        self._plan = plan
        self._progress = progress
        self._counts = sum(done.values(), Counts())
        self._before = self._counts.rows + self._counts.rejected
        self.left = len(plan.shards) - len(done)
        progress.begin(plan.rows, self._before)

    def __call__(self, shard: Shard, counts: Counts) -> None:
        self._counts += counts
        self.left -= 1
        self._progress.advance(shard.range.rows)

    def summary(self, rejected_in: Path) -> Summary:
        """The summary of the whole output. Raises FailureError if no row has an answer."""
        if not self._counts.rows:
            raise FailureError(
                f"no row could be answered: {rejected_in} holds the reason for each of {self._counts.rejected}"
            )
        return Summary(self._counts, self._plan.rows, self._before, rejected_in)
