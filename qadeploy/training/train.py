"""Fine-tuning: examples to a run folder, with the Hugging Face Trainer.

Reads top to bottom: data, models, windows, training, evaluation, the run folder. ``run_log`` words the printed lines.

A run folder holds ``run.json`` (resolved options, seed, versions, data hash; its ``"status": "complete"`` is written last and
marks a finished run), ``metrics.json``, ``checkpoint/`` (the best epoch by dev F1, or the mean of the epochs), the predictions (see
``qadeploy/evaluation/predictions.py``) on the held-out set, or on the dev set if nothing was held out, and the files for people
to read (``report_files``): ``curves.png``, ``report.html`` and ``README.md``. ``resume`` describes unfinished runs.
"""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils.memory import clear_device_cache
from transformers import EarlyStoppingCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from qadeploy.core.metrics import Scores, bootstrap_interval, choose_metric, score
from qadeploy.core.settings import QaSettings, any_unanswerable
from qadeploy.data.loading import hash_examples
from qadeploy.errors import FailureError, InputError
from qadeploy.evaluation.predictions import write_predictions
from qadeploy.files import write_json
from qadeploy.inference.devices import parse_device
from qadeploy.options import check as check_declared
from qadeploy.records import Answer, FloatArray, Logits
from qadeploy.reports.charts import terminal_chart
from qadeploy.reports.facts import RunRecord
from qadeploy.training import distributed
from qadeploy.training.callbacks import EpochTable, QuietProgress, StepLines
from qadeploy.training.checkpoint import save_checkpoint
from qadeploy.training.distill import lesson_hashes
from qadeploy.training.features import FeatureSet
from qadeploy.training.inputs import Models, Windows, check_export, load_data, load_models, make_windows, resolve
from qadeploy.training.options import TrainOptions
from qadeploy.training.provenance import base_name, base_of, versions_of
from qadeploy.training.report_files import write_report_files
from qadeploy.training.resume import OpenRun, check_unfinished, finish, open_run
from qadeploy.training.run_data import RunData
from qadeploy.training.run_log import RunLog, Say
from qadeploy.training.runs import TENSORBOARD, check_replaceable
from qadeploy.training.saves import SAVES, files_in, remove, writing
from qadeploy.training.selection import (
    answers_of,
    can_tune_threshold,
    choose_settings,
    initial_settings,
    predictions_of,
    report_choice,
    score_logits,
)
from qadeploy.training.speed import Speed, compiled, float32_attention, has_tf32, tf32_matmuls
from qadeploy.training.torch_device import device_name, memory_errors, training_device
from qadeploy.training.tracking import check_tracker, tracker, tracker_errors
from qadeploy.training.trainer import SaveEverySteps, SpanArguments, SpanTrainer, training_arguments
from qadeploy.training.training_set import TrainingSet, collate

_VERSIONED = ("qadeploy", "torch", "transformers", "tokenizers", "accelerate", "numpy")


@dataclass(frozen=True, slots=True)
class RunResult:
    """Where the run is and what it reached; ``metrics`` is the content of ``metrics.json``."""

    folder: Path
    metrics: dict[str, Any]


def train(
    options: TrainOptions,
    say: Say,
    *,
    warn: Say | None = None,
    progress: bool = True,
    resume: bool = False,
    data: RunData | None = None,
    more_metrics: Mapping[str, Any] | None = None,
) -> RunResult:
    """Fine-tunes ``options.base`` on ``options.data`` and writes the run folder.

    A finished run in ``options.out`` is replaced only when the new one is complete.

    Args:
        options: What the run depends on.
        say: Called with one line of the report at a time.
        warn: Called with the text of each warning. By default it goes to ``say``, after "WARNING: ".
        progress: Whether to show a progress bar.
        resume: Continues the unfinished run in ``options.out`` after its newest complete checkpoint.
        data: The questions, if they have already been read and split.
        more_metrics: Added to ``metrics.json``.

    Returns:
        The run folder and its metrics.

    Raises:
        InputError: Unusable input, a base that cannot be exported, an unfinished run in the way, or one that was started with
            other options, data or base. Nothing was written.
        DataError: Unusable rows. Nothing was written.
        CheckpointError: The base does not load.
        DeviceError: CUDA was requested but is not available.
        FailureError: The loss is not finite, the disk is full, the model cannot be compiled, or a tracker fails.
        MissingExtraError: The tracker of ``options.report_to`` is not installed. Nothing was written.
    """
    started = time.time()
    with distributed.together(on_cpu=options.device == "cpu"):
        log = RunLog(say, warn) if distributed.is_first() else RunLog(lambda line: None)
        distributed.from_first(lambda: check(options, resume))
        device = training_device(options.device)
        data = data or load_data(options, log)
        options = resolve(options, data.train.examples)
        models = load_models(options, device, choose_metric(options.metric, data.train.examples))
        check_export(models.checkpoint, log)
        log.raw_data(data)
        log.splits(data, options)
        log.detail(f"metric of EM and F1: {models.settings.metric}")
        windows = make_windows(options, data, models, log)
        if models.teacher:
            models = replace(models, teacher=None)  # which would fill the memory while the student trains
            clear_device_cache(garbage_collection=True)
        record = _record(options, data, models, windows.train)
        with (
            open_run(Path(options.out), record, resume, log) as opened,
            tf32_matmuls(device),
            float32_attention(device),
        ):
            if opened.finished:
                log.say(f"run folder: {options.out} was complete already")
                return RunResult(
                    opened.folder, json.loads((opened.folder / "metrics.json").read_text(encoding="utf-8"))
                )
            started -= opened.saved.run_state["seconds"] if opened.saved else 0
            settings = _epoch_settings(options, models, windows.train)
            run = _TrainingRun(options, data, models, windows, settings, opened, log, progress, started)
            loop = _make_loop(run)
            with tracker_errors(options.report_to), memory_errors():
                base = _fit(run, loop)
            reached = _evaluate(run, loop, base)
            metrics = _metrics(run, loop, reached) | dict(more_metrics or {})
            if distributed.is_first():
                finish(opened, Path(options.out), _write(run, reached, metrics))
            distributed.wait()
    log.say(f"run folder: {options.out} ({metrics['seconds']:.0f} s)")
    return RunResult(Path(options.out), metrics)


def check(options: TrainOptions, resume: bool = False) -> None:
    """Raises InputError if an option is out of range or the folder is taken, MissingExtraError without the tracker."""
    check_declared(options)
    parse_device(options.device)
    check_tracker(options.report_to)
    if options.batch_tokens and distributed.count() > 1:
        raise InputError("--batch-tokens trains in one process: leave it out, or run it without torchrun")
    if options.negatives and distributed.count() > 1:
        raise InputError("--negatives trains in one process: leave it out, or run it without torchrun")
    out = Path(options.out)
    check_replaceable(out)
    check_unfinished(out, resume)


def _record(options: TrainOptions, data: RunData, models: Models, train_set: TrainingSet) -> dict[str, Any]:
    """The content of ``run.json``."""
    labelled = len(train_set.features.examples) - train_set.unlabelled
    return {
        "status": "running",
        "options": {
            **{k: v for k, v in asdict(options).items() if k != "token"},
            "base": base_name(models.checkpoint.name),
        },
        "precision": models.precision,
        "seed": options.seed,
        "processes": distributed.count(),
        "data_sha256": hash_examples(data.found.examples),
        "dev_data_sha256": hash_examples(data.dev.examples) if options.dev_data else None,
        "eval_data_sha256": hash_examples(data.held_out.examples) if options.eval_data and data.held_out else None,
        "base": base_of(models.checkpoint),
        **lesson_hashes(options.teacher, train_set.features.examples[labelled:]),
        "versions": versions_of(_VERSIONED, missing="source"),
        "machine": {"cpu_count": os.cpu_count(), "device": device_name(models.device), "tf32": has_tf32(models.device)},
    }


# ---------------------------------------------------------------- training


@dataclass(frozen=True, slots=True)
class _TrainingRun:
    """Everything that the steps from here on share; ``settings`` are those that epochs are scored with."""

    options: TrainOptions
    data: RunData
    models: Models
    windows: Windows
    settings: QaSettings
    opened: OpenRun
    log: RunLog
    progress: bool
    started: float

    @property
    def balanced(self) -> bool:
        """Whether every dev question without an answer was made (--negatives)."""
        return not any_unanswerable(self.data.dev.examples)

    def chosen(self, logits: Logits) -> QaSettings:
        """The settings for a model with these logits on the dev set."""
        given, dev = self.options.null_score_diff_threshold is not None, self.windows.dev
        return choose_settings(dev, logits, self.settings, keep_threshold=given, balanced=self.balanced)


@dataclass(frozen=True, slots=True)
class _Loop:
    """The Trainer, the table of its epochs, and its speed."""

    trainer: SpanTrainer
    table: EpochTable
    speed: Speed


def _make_loop(run: _TrainingRun) -> _Loop:
    options, models, windows = run.options, run.models, run.windows
    done: dict[str, Any] = run.opened.saved.run_state if run.opened.saved else {"rows": []}
    speed = Speed(models.device, lambda: trainer.windows_seen, distributed.count(), done.get("speed", []))
    table = EpochTable(run.log, done["rows"], speed.row)
    pad = models.checkpoint.encoder.config.pad_token_id
    trainer = SpanTrainer(
        model=models.checkpoint.model,
        args=_arguments(run),
        train_dataset=windows.train,
        eval_dataset=windows.dev,
        data_collator=lambda items: collate(items, pad),
        compute_metrics=lambda found: _dev_metrics(_dev_scores(windows.dev, found.predictions, run.settings)),
        callbacks=[
            EarlyStoppingCallback(options.patience),
            speed,
            table,
            *tracker(options.report_to, run.opened.folder / TENSORBOARD),
        ],
        run_state=lambda: {"rows": table.rows, "speed": speed.rows, "seconds": round(time.time() - run.started, 1)},
        batch_tokens=options.batch_tokens,
        most_windows=options.batch_size,
        distill_weight=options.distill_weight if options.teacher else 0.0,
        temperature=options.distill_temperature,
    )
    table.loss_of = trainer.epoch_loss
    if options.save_steps:
        trainer.add_callback(SaveEverySteps(options.save_steps))
    trainer.remove_callback(PrinterCallback)
    if run.progress:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(QuietProgress)
    else:
        trainer.add_callback(StepLines(run.log))
    run.log.training(trainer, options, models.device, models.precision)
    return _Loop(trainer, table, speed)


def _arguments(run: _TrainingRun) -> SpanArguments:
    """Our options in the Trainer's names."""
    options, device, precision = run.options, run.models.device, run.models.precision
    # With batch_tokens, an evaluation batch has as many windows of the maximum length as fit.
    batch_size = options.batch_size or max(1, (options.batch_tokens or 1) // run.models.settings.max_seq_len)
    per_process = distributed.windows_per_process(batch_size)
    return training_arguments(
        device,
        output_dir=str(run.opened.folder / SAVES),
        run_name=Path(options.out).name,
        num_train_epochs=float(options.epochs or 1),
        learning_rate=options.learning_rate or 0.0,
        per_device_train_batch_size=per_process,
        per_device_eval_batch_size=2 * per_process,
        weight_decay=options.weight_decay,
        warmup_ratio=options.warmup_ratio,
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        gradient_checkpointing=options.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        optim="adamw_torch_fused",
        eval_strategy="epoch",
        save_strategy="epoch",
        logging_strategy="epoch",
        restore_callback_states_from_checkpoint=True,  # a resumed run keeps its count of epochs without a gain
        load_best_model_at_end=True,
        metric_for_best_model="eval_f1",
        greater_is_better=True,
        remove_unused_columns=False,
        label_names=["start_positions", "end_positions"],
        report_to=[],
        seed=options.seed,
        disable_tqdm=not run.progress,
        dataloader_pin_memory=device.type == "cuda",
        logging_nan_inf_filter=False,
    )


def _epoch_settings(options: TrainOptions, models: Models, train_set: TrainingSet) -> QaSettings:
    settings = initial_settings(models.settings, train_set.features, train_set.unlabelled)
    if options.max_answer_len:
        settings = replace(settings, max_answer_len=options.max_answer_len)
    if options.null_score_diff_threshold is not None:
        settings = replace(settings, null_threshold=options.null_score_diff_threshold)
    return settings


def _dev_scores(dev: FeatureSet, predictions: Sequence[FloatArray], settings: QaSettings) -> Scores:
    starts, ends = predictions[:2]
    if not np.isfinite(starts[:, 0]).all():
        raise FailureError("training diverged: the logits are not finite. Lower --learning-rate")
    return score_logits(dev, (starts, ends), settings)


def _dev_metrics(scores: Scores) -> dict[str, float]:
    return {"eval_accuracy": scores.accuracy / 100, "eval_exact_match": scores.exact_match, "eval_f1": scores.f1}


def _fit(run: _TrainingRun, loop: _Loop) -> Scores:
    """Trains, and loads the best epoch's weights.

    Returns the base model's scores on the held-out set, with its own settings. Without one, on the dev set, with settings
    that are chosen there as they will be for the trained model: else a threshold alone would look like a gain.
    """
    held_out = run.windows.held_out
    if held_out:
        base = score_logits(held_out, _predict(loop.trainer, held_out)[0], run.models.settings)
    loop.table.header()
    if not loop.table.rows:
        loop.trainer.evaluate()  # row 0: the base model
    if not held_out:
        with torch.random.fork_rng(devices=()):  # the loader draws a seed, which must not change what training draws
            logits, _ = _predict(loop.trainer, run.windows.dev)
        base = score_logits(run.windows.dev, logits, run.chosen(logits))
    with warnings.catch_warnings(), compiled(run.models.checkpoint.model, run.options.torch_compile):
        # After epochs of less than a second the Trainer distrusts file times and sorts saves by step number.
        warnings.filterwarnings("ignore", message="mtime may not be reliable")
        loop.trainer.fit(run.opened.saved)
    return base


def _choose_weights(run: _TrainingRun, loop: _Loop) -> Logits:
    """Puts the mean of the epochs into the model, unless the best epoch is better on the dev set beyond chance.

    The best of several epochs owes some of its dev F1 to chance, which is why it must be clearly better. Returns the dev
    set's logits by the weights that are kept.
    """
    trainer, dev, settings = loop.trainer, run.windows.dev, run.settings
    logits, _ = _predict(trainer, dev)
    if trainer.mean.epochs < 2:
        return logits
    best = _dev_scores(dev, logits, settings)
    trainer.mean.exchange(trainer.model)
    mean_logits, loss = _predict(trainer, dev)
    mean = _dev_scores(dev, mean_logits, settings)
    row = {"epochs": trainer.mean.epochs, "eval_loss": loss, **_dev_metrics(mean)}
    kept = bootstrap_interval(best.rows_f1 - mean.rows_f1)[0] <= 0
    run.log.mean_of_epochs(row, loop.table.best, kept)
    if not kept:
        trainer.mean.exchange(trainer.model)
        return logits
    loop.table.mean = row
    return mean_logits


def _predict(trainer: SpanTrainer, features: FeatureSet) -> tuple[Logits, float]:
    """Start and end logits ``[windows, longest]`` in the order of the windows, and the loss."""
    loader = trainer.get_eval_dataloader(features)
    compute_metrics, trainer.compute_metrics = trainer.compute_metrics, None  # it scores only the dev set
    try:
        output = trainer.evaluation_loop(loader, "prediction", prediction_loss_only=False)
    finally:
        trainer.compute_metrics = compute_metrics
    starts, ends = output.predictions[:2]
    return (starts, ends), float(output.metrics["eval_loss"])


# ---------------------------------------------------------------- evaluation


@dataclass(frozen=True, slots=True)
class _SetResult:
    """The trained model's answers to a set of questions, and their scores."""

    features: FeatureSet
    logits: Logits
    answers: list[Answer]
    scores: Scores
    calibration: dict[str, Any]
    no_answer: dict[str, float] | None

    @classmethod
    def of(cls, features: FeatureSet, logits: Logits, settings: QaSettings) -> _SetResult:
        answers = answers_of(features, logits, settings)
        scores = score(features.examples, answers, settings.metric)
        return cls(features, logits, answers, scores, *report_choice(features, logits, settings))


@dataclass(frozen=True, slots=True)
class _Evaluation:
    """The chosen settings, the results by set, and the base model's scores on the last set."""

    settings: QaSettings
    results: dict[str, _SetResult]
    base: Scores


def _evaluate(run: _TrainingRun, loop: _Loop, base: Scores) -> _Evaluation:
    """Chooses the settings on the dev set, and scores the dev and the held-out set."""
    options, log, dev, held_out = run.options, run.log, run.windows.dev, run.windows.held_out
    logits = _choose_weights(run, loop)
    settings = run.chosen(logits)
    found = _SetResult.of(dev, logits, settings)
    results = {"dev": found}
    log.chosen(loop.table.best["epoch"], loop.table.mean["epochs"] if loop.table.mean else None, settings, options)
    given, tuned = options.null_score_diff_threshold is not None, can_tune_threshold(dev, run.balanced)
    log.choice("dev", found.calibration, found.no_answer, settings, threshold_given=given, tuned=tuned)
    log.answer(dev.examples[0], found.answers[0])
    if not held_out:
        log.scores("dev, base model", base)
    log.scores("dev", found.scores)
    if held_out:
        found = results["held_out"] = _SetResult.of(held_out, _predict(loop.trainer, held_out)[0], settings)
        log.scores("held out, base model", base)
        log.scores("held out", found.scores)
        log.choice("held out", found.calibration, found.no_answer, settings)
    if chart := terminal_chart(loop.table.rows):
        log.say(chart)
    return _Evaluation(settings, results, base)


def _metrics(run: _TrainingRun, loop: _Loop, reached: _Evaluation) -> dict[str, Any]:
    """The content of ``metrics.json``."""
    settings, results, best = reached.settings, reached.results, loop.table.best
    dev = results["dev"].scores
    metrics: dict[str, Any] = {
        "eval_loss": (loop.table.mean or best)["eval_loss"],
        "eval_accuracy": dev.accuracy / 100,
        "eval_exact_match": dev.exact_match,
        "eval_f1": dev.f1,
        "best_epoch": best["epoch"],
        "mean_of_epochs": loop.table.mean,
        "steps": loop.trainer.state.global_step,
        "overfitting_from_epoch": loop.table.gap_opened,
        "settings": settings.to_dict(),
        "masked_windows": len(run.windows.train.masked),
        "unknown_tokens": round(run.windows.unknown_tokens, 4),
        **{name: result.scores.to_dict() for name, result in results.items()},
        "epochs": loop.table.rows,
        "speed": loop.speed.summary(),
        "calibration": {
            "temperature": settings.temperature,
            **{name: result.calibration for name, result in results.items()},
        },
        "predictions": [*results][-1],
        f"{[*results][-1]}_base": reached.base.to_dict(),
        "seconds": round(time.time() - run.started, 1),
    }
    if settings.null_threshold is not None:
        metrics["no_answer"] = {
            "null_threshold": settings.null_threshold,
            **{name: result.no_answer for name, result in results.items()},
        }
    if run.data.check:
        metrics["data_check"] = run.data.check.to_dict()
    return metrics


# ---------------------------------------------------------------- the run folder


def _write(run: _TrainingRun, reached: _Evaluation, metrics: dict[str, Any]) -> list[str]:
    """Writes everything in the run folder but its status. Returns the files of its checkpoint."""
    folder, settings, last = run.opened.folder, reached.settings, [*reached.results.values()][-1]
    with writing(folder):
        write_predictions(folder, predictions_of(last.features, last.logits, settings, run.options.n_best_size))
        remove(folder / "checkpoint")  # left by a process that was interrupted
        foreign = files_in(folder / "checkpoint")
        save_checkpoint(run.models.checkpoint, settings, folder / "checkpoint")
        own = sorted({*files_in(folder / "checkpoint")} - {*foreign})
        write_json(folder / "metrics.json", metrics)
        described = RunRecord(Path(run.options.out).name, run.opened.record, metrics)
        train_set, others = run.windows.train, [result.features for result in reached.results.values()]
        sets = [train_set.features, *others]
        write_report_files(folder, described, sets, last.answers, run.data.found, run.log, train_set.unlabelled)
    return own
