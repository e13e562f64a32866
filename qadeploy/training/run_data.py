"""The questions of a run: what it trains on, what chooses the epoch, and what it only reports on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from qadeploy.data.check import CheckedData
from qadeploy.data.loading import DataSet, read, source_name
from qadeploy.data.splits import carve_by_passage
from qadeploy.errors import InputError
from qadeploy.records import Example
from qadeploy.training.options import TrainOptions


@dataclass(frozen=True, slots=True)
class RunData:
    """The questions of a run: all of ``--data``, with the result of their row check (None without one), and its three sets."""

    found: DataSet
    check: CheckedData | None
    train: DataSet
    dev: DataSet
    held_out: DataSet | None


def split_data(
    options: TrainOptions, found: DataSet, check: CheckedData | None = None, held_out: Sequence[Example] | None = None
) -> RunData:
    """Splits the questions of ``--data``, and reads the data sets that other options name.

    Args:
        options: The training options.
        found: The questions of ``--data``.
        check: The result of the row check.
        held_out: The held-out set; replaces the one given by the data and the options.

    Raises:
        InputError: Nothing is left to train on, or all questions are on one passage.
    """
    source = name = source_name(options.data)
    rest = tuple(e for e in found.examples if e.split != "validation")
    if not rest:
        raise InputError(f"{source}: every row is marked as validation, so none is left to train on")
    if held_out is None:
        held_out = found.part("validation")
        if options.eval_data is not None:
            given = read(options.eval_data, options, token=options.token)
            source, held_out = given.source, given.part("validation") or given.examples
    if options.dev_data is not None:
        train, dev = rest, read(options.dev_data, options, token=options.token).examples
    else:
        train, dev = carve_by_passage(rest, options.dev_fraction, options.seed)
    most = options.max_eval_samples  # training/runs.py cuts the same way when it carves again
    return RunData(
        found,
        check,
        DataSet(name, train[: options.max_train_samples]),
        DataSet(options.dev_data or name, dev[:most]),
        DataSet(source, tuple(held_out[:most])) if held_out else None,
    )


def unlabelled_questions(options: TrainOptions) -> tuple[Example, ...]:
    """The questions of ``--unlabelled``, which only a teacher labels. Raises InputError without a teacher."""
    if options.unlabelled is None:
        return ()
    if options.teacher is None:
        raise InputError("--unlabelled: only a teacher can label these questions: give --teacher, or leave it out")
    found = read(options.unlabelled, options, token=options.token, annotated=False).examples
    return tuple(replace(e, answers=()) for e in found)
