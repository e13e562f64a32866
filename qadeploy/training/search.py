"""A search for settings: several trials with different settings, and then the run with the best of them.

Optuna draws the learning rate, the epochs, the batch size and the negatives, unless they are given. Each trial is a run
in a temporary folder, of which only a row is kept, in ``NAME.search.json`` beside the run folder, until the run is
complete. An interrupted search continues from these rows: each draw depends only on them and on the seed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from accelerate.utils.memory import clear_device_cache

from qadeploy.data.loading import DataSet, hash_examples
from qadeploy.errors import FailureError, InputError, MissingExtraError
from qadeploy.files import holding, temporary_folder, write_json
from qadeploy.options import flag_of
from qadeploy.records import Example
from qadeploy.training.distill import lesson_hashes
from qadeploy.training.folds import cross_validate
from qadeploy.training.inputs import load_data, resolve
from qadeploy.training.options import TrainOptions
from qadeploy.training.provenance import weights_hash
from qadeploy.training.resume import find_differences, find_unfinished
from qadeploy.training.run_data import RunData, unlabelled_questions
from qadeploy.training.run_log import RunLog, Say
from qadeploy.training.runs import read_status
from qadeploy.training.train import RunResult, check, train

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

_STATE = ".search.json"
_SETTINGS = ("learning_rate", "epochs", "batch_size", "negatives")


@dataclass(frozen=True, slots=True)
class RecordedSearch:
    """An unfinished search.

    Attributes:
        trials: How many trials were requested.
        record: The options, with ``folds``, the data and the base that it was started with, as in ``run.json``.
        rows: The trials that have ended.
    """

    trials: int
    record: dict[str, Any]
    rows: list[dict[str, Any]]


def recorded_search(out: Path) -> RecordedSearch | None:
    """The unfinished search for the run ``out``, or None. Raises InputError if its file is not that of a search."""
    path = _state(out)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        search = RecordedSearch(int(found["trials"]), dict(found["record"]), list(found["rows"]))
        search.record["options"]["folds"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: is not the record of a search: move it away, or give another --out") from error
    return search


def train_with_search(
    options: TrainOptions,
    trials: int,
    say: Say,
    *,
    folds: int | None = None,
    progress: bool = True,
    resume: bool = False,
) -> RunResult:
    """Searches for settings, then trains the run with the best.

    Args:
        options: The training options. Of learning rate, epochs, batch size and negatives, those left None are varied.
        trials: The number of trials.
        say: Called with one line of the report at a time.
        folds: Compare the trials by the mean F1 of this many folds instead of the F1 on the dev set.
        progress: Whether to show a progress bar.
        resume: Continue the unfinished search for ``options.out``.

    Returns:
        The run; ``metrics["search"]`` has its ``trials`` (``settings``, ``f1`` in percent, ``seconds``; ``f1`` is None and there is
        an ``error`` if it failed), the number of the ``best``, counted from 1, and ``folds``. With folds, ``metrics["folds"]`` is
        what ``cross_validate`` returned for the best trial.

    Raises:
        InputError: Fewer than 2 trials, nothing to search for, an unfinished search in the way, or one that was started with
            other options or data. Also what ``train`` raises.
        FailureError: Every trial failed; the message quotes the last error.
        MissingExtraError: Optuna is not installed. Nothing was read.
    """
    out, path = Path(options.out), _state(Path(options.out))
    if resume and not path.exists() and read_status(out) == "complete":
        return train(options, say, progress=progress, resume=True)  # reports that it is complete
    _check(options, trials, resume)
    data = load_data(options, RunLog(say))
    space = _space(options, data.train.examples)
    out.parent.mkdir(parents=True, exist_ok=True)
    with holding(path), _hint(path, out, say):
        record = _record(options, folds, data)
        rows = _earlier(out, record, say) if resume else []
        by = f"mean F1 of {folds} folds" if folds else "dev F1"
        names = ", ".join(name.replace("_", " ") for name in space)
        say(f"search: {trials} trials, {len(rows)} of them done, compared by {by}; varied: {names}")
        while len(rows) < trials:
            settings = _draw(space, rows, options.seed)
            rows.append({"settings": settings, **_trial(replace(options, **settings), folds, data, progress)})
            write_json(path, {"trials": trials, "record": record, "rows": rows})
            say(f"  trial {len(rows)}: {_line(rows[-1], by)}")
        number, best = _best(rows, path)
        say(f"the run itself, with the settings of trial {number}:")
        shown = [{k: v for k, v in row.items() if k != "folds"} for row in rows]
        found: dict[str, Any] = {"search": {"trials": shown, "best": number, "folds": folds}}
        result = train(
            replace(options, **best["settings"]),
            say,
            progress=progress,
            resume=find_unfinished(out) is not None,
            data=data,
            more_metrics=found | ({"folds": best["folds"]} if folds else {}),
        )
        path.unlink()
    return result


# ---------------------------------------------------------------- beginning


def _state(out: Path) -> Path:
    return out.with_name(out.name + _STATE)


def _check(options: TrainOptions, trials: int, resume: bool) -> None:
    """Raises the errors that can be found before the data are read."""
    try:
        import optuna
    except ImportError as error:
        raise MissingExtraError("--search", error.name or "optuna", "search") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if trials < 2:
        raise InputError(
            f"search is {trials}: at least 2 trials are needed, the first of them with the default settings"
        )
    if all(getattr(options, name) is not None for name in _SETTINGS):
        _refuse(_SETTINGS)
    check(options, resume)
    out = Path(options.out)
    begun, unfinished = recorded_search(out), find_unfinished(out)
    if begun and not resume:
        raise InputError(
            f"{_state(out)}: holds an unfinished search (interrupted, or still training): give --resume to continue it, "
            "another --out, or remove the file to start over"
        )
    if unfinished and not begun:
        raise InputError(f"{unfinished}: the unfinished run is not from a search: leave out --search to continue it")


def _refuse(given: Iterable[str]) -> NoReturn:
    raise InputError(f"--search: nothing is left to search for: leave out one of {', '.join(map(flag_of, given))}")


@contextmanager
def _hint(path: Path, out: Path, say: Say) -> Iterator[None]:
    """Says how to continue a search that ends early."""
    try:
        yield
    except BaseException:
        if path.exists():
            say(f"{path}: the trials are kept: qadeploy train --resume --out {out} continues the search")
        raise


def _record(options: TrainOptions, folds: int | None, data: RunData) -> dict[str, Any]:
    """What must be the same to resume a search, under the names of ``run.json``."""

    def sha256(name: str | None, found: DataSet | None) -> str | None:
        return hash_examples(found.examples) if name and found else None

    given = {k: v for k, v in asdict(options).items() if k not in {"token", "out"}}
    return {
        "options": {**given, "folds": folds},
        "precision": options.precision,
        "processes": 1,
        "data_sha256": hash_examples(data.found.examples),
        "dev_data_sha256": sha256(options.dev_data, data.dev),
        "eval_data_sha256": sha256(options.eval_data, data.held_out),
        "base": {"name": options.base, "sha256": weights_hash(Path(options.base)) if options.base else None},
        **lesson_hashes(options.teacher, unlabelled_questions(options)),
    }


def _earlier(out: Path, record: Mapping[str, Any], say: Say) -> list[dict[str, Any]]:
    """The rows of the search that is resumed. Raises InputError if it was started differently."""
    begun = recorded_search(out)
    if begun is None:
        say(f"{out}: holds no search to resume, so the search starts from the beginning")
        return []
    if differing := find_differences(begun.record, json.loads(json.dumps(record))):
        raise InputError(
            f"{_state(out)}: the search cannot be resumed, because it was started differently:\n  "
            + "\n  ".join(differing)
            + "\nGive the original values, or remove the file to start over"
        )
    return begun.rows


# ---------------------------------------------------------------- trials


def _space(options: TrainOptions, questions: Sequence[Example]) -> dict[str, tuple[float, BaseDistribution]]:
    """The settings that are searched for, not given and not 0 by default: their defaults, and what to draw from.

    If the default is no negatives, they are not varied: they change the dev set, so trials would not be comparable.
    """
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    around: dict[str, Callable[[Any], BaseDistribution]] = {
        "learning_rate": lambda rate: FloatDistribution(rate / 4, 4 * rate, log=True),
        "epochs": lambda epochs: IntDistribution(1, 2 * epochs),
        "batch_size": lambda windows: CategoricalDistribution([windows // 2, windows, 2 * windows]),
        "negatives": lambda _: IntDistribution(1, 3),
    }
    defaults = resolve(options, questions)
    free = {name: getattr(defaults, name) for name in _SETTINGS if getattr(options, name) is None}
    space = {name: (default, around[name](default)) for name, default in free.items() if default}
    return space or _refuse(name for name in _SETTINGS if name not in free)


def _draw(
    space: Mapping[str, tuple[float, BaseDistribution]], rows: Sequence[Mapping[str, Any]], seed: int
) -> dict[str, Any]:
    """The settings of the next trial: the defaults, then what optuna draws from the rows so far."""
    import optuna

    if not rows:
        return {name: default for name, (default, _) in space.items()}
    distributions = {name: distribution for name, (_, distribution) in space.items()}
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed + len(rows)))
    for row in rows:
        state = optuna.trial.TrialState.FAIL if row["f1"] is None else optuna.trial.TrialState.COMPLETE
        study.add_trial(
            optuna.create_trial(params=row["settings"], distributions=distributions, value=row["f1"], state=state)
        )
    drawn = study.ask(distributions).params
    return {name: float(f"{value:.3g}") if isinstance(value, float) else value for name, value in drawn.items()}


def _trial(options: TrainOptions, folds: int | None, data: RunData, progress: bool) -> dict[str, Any]:
    """Trains once with the settings of ``options``. A failed trial has an error instead of an F1."""
    started = time.monotonic()
    try:
        with temporary_folder(Path(options.out)) as work:
            options = replace(options, out=str(work / "trial"), report_to="none")
            if folds:
                found = cross_validate(options, folds, lambda line: None, progress=progress)
                outcome = {"f1": found["mean"]["f1"], "folds": found}
            else:
                result = train(options, lambda line: None, progress=progress, data=data)
                outcome = {"f1": result.metrics["eval_f1"]}
    except FailureError as error:
        if type(error) is not FailureError:  # no other settings help against a missing device or a damaged base
            raise
        outcome = {"f1": None, "error": str(error)}
    clear_device_cache(garbage_collection=True)
    return {**outcome, "seconds": round(time.monotonic() - started, 1)}


def _line(row: Mapping[str, Any], by: str) -> str:
    settings = ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in row["settings"].items())
    outcome = f"failed: {row['error']}" if row["f1"] is None else f"{by} {row['f1']:.1f}"
    return f"{settings}: {outcome} ({row['seconds']:.0f} s)"


def _best(rows: Sequence[dict[str, Any]], path: Path) -> tuple[int, dict[str, Any]]:
    """The number and the row of the best trial; on ties the earliest.

    If all failed, deletes the record of the search and raises FailureError.
    """
    scored = [(number, row) for number, row in enumerate(rows, 1) if row["f1"] is not None]
    if not scored:
        path.unlink()
        raise FailureError(f"all {len(rows)} trials failed, the last with this error: {rows[-1]['error']}")
    return max(scored, key=lambda found: found[1]["f1"])
