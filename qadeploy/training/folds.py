"""K-fold cross-validation: the scores that training reaches on little data, and how much they vary by chance.

Whole passages go into folds. K models are trained in turn with the same options, each on K - 1 folds and scored on the fold that
it has not seen; the dev set that chooses the epoch is carved from the K - 1 folds, as in any run. The model that is kept is then
trained on everything, a run like any other, with the folds in its ``metrics.json``.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from qadeploy.core.metrics import choose_metric
from qadeploy.data.loading import DataSet, read, source_name
from qadeploy.data.splits import folds_by_passage
from qadeploy.errors import InputError
from qadeploy.files import temporary_folder
from qadeploy.records import Example
from qadeploy.training.options import TrainOptions
from qadeploy.training.run_data import split_data
from qadeploy.training.run_log import Say
from qadeploy.training.train import check, train

_SCORES = ("exact_match", "f1", "accuracy")


def cross_validate(options: TrainOptions, folds: int, say: Say, *, progress: bool = True) -> dict[str, Any]:
    """Trains and scores one model per fold; none of them is kept. Rows that the data mark as validation are in no fold.

    Args:
        options: The training options.
        folds: The number of folds.
        say: Called with the lines of a table, one per fold, and with the warnings of their training.
        progress: Whether to show a progress bar.

    Returns:
        ``rows``, one per fold (``exact_match``, ``f1`` and ``accuracy`` on the fold left out, in percent, ``questions``,
        ``passages``, ``best_epoch``, ``settings``), and the ``mean`` and ``std`` of the three scores, the latter the sample
        standard deviation over folds.

    Raises:
        InputError: ``folds`` is below 2, or there are too few passages. Also what ``train`` raises.
    """
    check(options)
    data = read(options.data, options, token=options.token)
    examples = tuple(e for e in data.examples if e.split != "validation")
    parts = _split(examples, options, folds)
    options = replace(options, metric=choose_metric(options.metric, examples))  # one metric for all folds
    say(f"{folds} folds by passage: each model is scored on the fold that it was not trained on")
    say(f"  {'fold':>4} {'questions':>9} {'passages':>8} {'epoch':>5} {'accuracy':>8} {'EM':>6} {'F1':>6}")
    rows = []
    with temporary_folder(Path(options.out)) as work:
        for number, left_out in enumerate(parts, 1):
            passages = {e.context for e in left_out}
            rest = tuple(e for e in examples if e.context not in passages)
            row = _fold(
                replace(options, out=str(work / "fold"), report_to="none"), number, rest, left_out, say, progress
            )
            rows.append(row)
            shutil.rmtree(work / "fold", ignore_errors=True)
            say(
                f"  {number:>4} {row['questions']:>9} {row['passages']:>8} {row['best_epoch']:>5} {row['accuracy']:>8.1f} "
                f"{row['exact_match']:>6.1f} {row['f1']:>6.1f}"
            )
    scores = {name: np.asarray([row[name] for row in rows]) for name in _SCORES}
    mean = {name: float(values.mean()) for name, values in scores.items()}
    std = {name: float(values.std(ddof=1)) for name, values in scores.items()}
    say("  mean over folds, standard deviation: " + summary(mean, std))
    return {"rows": rows, "mean": mean, "std": std}


def summary(mean: dict[str, float], std: dict[str, float]) -> str:
    """Mean and standard deviation of the three scores in percent, on one line."""
    names = {"accuracy": "accuracy", "exact_match": "EM", "f1": "F1"}
    return ", ".join(f"{name} {mean[key]:.1f} ± {std[key]:.1f}" for key, name in names.items())


def _split(examples: Sequence[Example], options: TrainOptions, folds: int) -> tuple[tuple[Example, ...], ...]:
    parts = folds_by_passage(examples, folds, options.seed)
    passages = [len({e.context for e in part}) for part in parts]
    needed = 1 if options.dev_data else 2  # to train on, and to carve the dev set from
    if sum(passages) - max(passages) < needed:
        raise InputError(
            f"{source_name(options.data)}: {sum(passages)} passages in {folds} folds leave {sum(passages) - max(passages)} to train on, "
            f"{needed} are needed: add questions on other passages"
        )
    return parts


def _fold(
    options: TrainOptions,
    number: int,
    rest: tuple[Example, ...],
    left_out: tuple[Example, ...],
    say: Say,
    progress: bool,
) -> dict[str, Any]:
    """Trains on ``rest``, scores on ``left_out``, and returns the row of the fold."""
    try:
        result = train(
            options,
            lambda line: None,
            warn=lambda text: say(f"       fold {number}: WARNING: {text}"),
            progress=progress,
            data=split_data(options, DataSet(source_name(options.data), rest), held_out=left_out),
        )
    except InputError as error:
        raise InputError(f"fold {number}: {error}") from error
    metrics = result.metrics
    return {
        **{name: metrics["held_out"][name] for name in _SCORES},
        "questions": metrics["held_out"]["total"],
        "passages": len({e.context for e in left_out[: options.max_eval_samples]}),  # as split_data cuts them
        "best_epoch": metrics["best_epoch"],
        "settings": metrics["settings"],
    }
