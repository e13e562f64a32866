"""K-fold cross-validation: what training reaches on tiny data, and how much of that is chance.

Whole passages go into folds. K models are trained in turn with the same options, each on K - 1 folds, and each
scored on the fold that it has not seen; a dev part that chooses the epoch is carved from its K - 1 folds as
in any run. The model that is kept is then trained on everything, a run like any other, with the folds in
its ``metrics.json``.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from qadeploy.data.fields import Reading
from qadeploy.data.readers import read
from qadeploy.data.splits import folds_by_passage
from qadeploy.errors import InputError
from qadeploy.files import write_json
from qadeploy.records import Example
from qadeploy.training.callbacks import Say
from qadeploy.training.train import RunResult, TrainOptions, check, train

_SCORES = ("exact_match", "f1", "accuracy")


def train_with_folds(options: TrainOptions, folds: int, say: Say, *, progress: bool = True) -> RunResult:
    """Cross-validates ``options`` over ``folds`` folds, then trains the run on everything.

    ``metrics["folds"]`` is what ``cross_validate`` returns. Raises what it and ``train`` raise.
    """
    found = cross_validate(options, folds, say, progress=progress)
    say("the run itself, trained on every fold:")
    return train(options, say, progress=progress, more_metrics={"folds": found})


def cross_validate(options: TrainOptions, folds: int, say: Say, *, progress: bool = True) -> dict[str, Any]:
    """Trains and scores one model a fold; nothing of them is kept on disk.

    Returns ``rows``, one a fold (``exact_match``, ``f1`` and ``accuracy`` on the fold left out in percent,
    ``questions``, ``passages``, ``best_epoch``, ``settings``), and of the three scores ``mean`` and ``std``, the
    sample standard deviation over folds. Rows that the data mark as validation are in no fold. Raises
    InputError where ``folds`` is below 2 or the passages are too few, and what ``train`` raises.
    """
    check(options)
    data = read(options.data, Reading.of(asdict(options)), token=options.token)
    examples = tuple(e for e in data.examples if e.split != "validation")
    parts = _parts(examples, options, folds)
    work = Path(options.out).with_name(f".{Path(options.out).name}.{os.getpid()}.folds.tmp")
    say(f"{folds} folds by passage: each model is scored on the fold that it was not trained on")
    say(f"  {'fold':>4} {'questions':>9} {'passages':>8} {'epoch':>5} {'accuracy':>8} {'EM':>6} {'F1':>6}")
    rows = []
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        for number, left_out in enumerate(parts, 1):
            passages = {e.context for e in left_out}
            rest = [e for e in examples if e.context not in passages]
            rows.append(_fold(options, number, rest, left_out, work, say, progress))
            say(_line(str(number), rows[-1]))
    finally:
        shutil.rmtree(work, ignore_errors=True)
    scores = {name: np.asarray([row[name] for row in rows]) for name in _SCORES}
    mean = {name: float(values.mean()) for name, values in scores.items()}
    std = {name: float(values.std(ddof=1)) for name, values in scores.items()}
    say("  mean over folds, standard deviation: " + summary(mean, std))
    return {"rows": rows, "mean": mean, "std": std}


def summary(mean: dict[str, float], std: dict[str, float]) -> str:
    """Mean and standard deviation of the three scores, percent, in one line."""
    names = {"accuracy": "accuracy", "exact_match": "EM", "f1": "F1"}
    return ", ".join(f"{name} {mean[key]:.1f} ± {std[key]:.1f}" for key, name in names.items())


def _parts(examples: Sequence[Example], options: TrainOptions, folds: int) -> tuple[tuple[Example, ...], ...]:
    parts = folds_by_passage(examples, folds, options.seed)
    passages = [len({e.context for e in part}) for part in parts]
    needed = 1 if options.dev_data else 2  # to train on, and to carve the dev part from
    if sum(passages) - max(passages) < needed:
        raise InputError(
            f"{options.data}: {sum(passages)} passages in {folds} folds leave {sum(passages) - max(passages)} to train on, "
            f"{needed} are needed: add questions on other passages"
        )
    return parts


def _fold(
    options: TrainOptions,
    number: int,
    rest: Sequence[Example],
    left_out: Sequence[Example],
    work: Path,
    say: Say,
    progress: bool,
) -> dict[str, Any]:
    files = {"train": rest, "left_out": left_out}
    for name, examples in files.items():
        write_json(work / f"{name}.json", _squad(examples))
    chosen = replace(
        options, data=str(work / "train.json"), eval_data=str(work / "left_out.json"), out=str(work / "run")
    )

    def quiet(line: str) -> None:
        if "WARNING" in line:
            say(f"       fold {number}: {line.strip()}")

    try:
        metrics = train(chosen, quiet, progress=progress).metrics
    except InputError as error:
        raise InputError(f"fold {number}: {str(error).replace(chosen.data, options.data)}") from error
    finally:
        shutil.rmtree(work / "run", ignore_errors=True)
    return {
        **{name: metrics["held_out"][name] for name in _SCORES},
        "questions": metrics["held_out"]["total"],
        "passages": len({e.context for e in left_out}),
        "best_epoch": metrics["best_epoch"],
        "settings": metrics["settings"],
    }


def _line(name: str, row: dict[str, Any]) -> str:
    return (
        f"  {name:>4} {row['questions']:>9} {row['passages']:>8} {row['best_epoch']:>5} {row['accuracy']:>8.1f} "
        f"{row['exact_match']:>6.1f} {row['f1']:>6.1f}"
    )


def _squad(examples: Sequence[Example]) -> dict[str, Any]:
    """The examples in SQuAD's nesting, whose reader keeps every question apart; fixed splits are dropped."""
    paragraphs = [
        {
            "context": e.context,
            "qas": [
                {
                    "id": e.id,
                    "question": e.question,
                    "answers": [{"text": a.text, "answer_start": a.start} for a in e.answers],
                    "is_impossible": not e.answers,
                }
            ],
        }
        for e in examples
    ]
    return {"version": "v2.0", "data": [{"title": "fold", "paragraphs": paragraphs}]}
