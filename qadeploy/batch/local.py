"""The local engine: one process answers one shard after the other, each on all threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from qadeploy.batch.answering import ShardAnswering
from qadeploy.batch.output import Counts, OneFile
from qadeploy.batch.plan import BatchPlan, Shard
from qadeploy.batch.ranges import Reader
from qadeploy.batch.work import Load, Worker

OnShard = Callable[[Shard, Counts], object]


def into_folder(worker: Worker, shards: Sequence[Shard], on_shard: OnShard) -> None:
    """Answers shards into the worker's folder and calls ``on_shard`` after each. Raises what ``Worker.finish`` raises."""
    for shard in shards:
        on_shard(shard, worker.finish(shard.number))


def into_file(load: Load, plan: BatchPlan, output: OneFile, on_shard: OnShard) -> None:
    """Answers all shards into one file. Raises OSError, InputError (reading), FailureError."""
    answerer, reader = load(), Reader(plan.settings.data_options)
    with output.writing(plan.settings.bundle) as add:
        for shard in plan.shards:
            on_shard(shard, add(ShardAnswering(answerer, plan, shard, reader).stream()))
