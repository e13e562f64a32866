"""Fine-tuning: examples to a run folder, with the Hugging Face Trainer.

Reads top to bottom: options, data, features, the trainer, the table of epochs, the run folder.

A run folder holds ``run.json`` (resolved options, seed, versions, data hash; its ``"status": "complete"``
is written last and marks a finished run), ``metrics.json``, ``checkpoint/`` (the best epoch by dev F1), the
predictions (see ``qadeploy/evaluation/predictions.py``) on the held-out part, or the dev part where nothing was held out, and
what ``training/drawings.py`` draws: ``curves.png``, ``report.html`` and ``README.md``. ``training/resume.py`` says what an
unfinished one holds.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    EarlyStoppingCallback,
    EvalPrediction,
    Trainer,
    set_seed,
)
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from qadeploy.core.metrics import Scores, bootstrap_interval, score
from qadeploy.core.settings import QaSettings
from qadeploy.core.windows import Encoder
from qadeploy.data.carriers import load_rows
from qadeploy.data.check import check_rows
from qadeploy.data.fields import OnAmbiguous, Reading
from qadeploy.data.readers import DataSet, hash_examples, read
from qadeploy.data.splits import carve_by_passage
from qadeploy.data.table import one_line
from qadeploy.errors import FailureError, InputError
from qadeploy.evaluation.predictions import DEFAULT_N_BEST, write_predictions
from qadeploy.files import write_json
from qadeploy.inference.devices import parse_device
from qadeploy.records import Answer, Example, FloatArray
from qadeploy.reports.curves import terminal_chart
from qadeploy.shipped import base_model_path
from qadeploy.training import distributed
from qadeploy.training.batches import check_tokens
from qadeploy.training.callbacks import EpochTable, QuietProgress, Say
from qadeploy.training.checkpoint import Checkpoint, Hub, load_checkpoint, save_checkpoint
from qadeploy.training.distill import keep_layers, load_teacher, teach
from qadeploy.training.drawings import draw_run
from qadeploy.training.feature_cache import Part, cache_folder, cached_features
from qadeploy.training.features import FeatureSet
from qadeploy.training.negatives import Paired, with_negatives
from qadeploy.training.provenance import base_name, base_of, versions_of
from qadeploy.training.resume import SAVES, Plan, check_unfinished, finish, open_run
from qadeploy.training.saves import writing
from qadeploy.training.selection import (
    answers_of,
    choose_settings,
    predictions_of,
    report_choice,
    score_logits,
    unchosen_settings,
)
from qadeploy.training.speed import Speed, compiled, has_tf32, tf32_products
from qadeploy.training.torch_device import device_name, resolve_precision, training_device
from qadeploy.training.trainer import SaveInside, SpanTrainer, collate, training_arguments
from qadeploy.training.training_set import TrainingSet
from qadeploy.training.workers import make_features_in

FEW_EXAMPLES = 5_000
_COUNTS = (
    "epochs",
    "batch_size",
    "batch_tokens",
    "patience",
    "max_train_samples",
    "max_eval_samples",
    "max_answer_len",
    "n_best_size",
    "gradient_accumulation_steps",
    "preprocessing_num_workers",
    "layers",
)
_INDENT = " " * 17
_VERSIONED = ("qadeploy", "torch", "transformers", "tokenizers", "accelerate", "numpy")


@dataclass(frozen=True, slots=True)
class TrainOptions:
    """Everything a run depends on. None means: chosen from the data, and recorded in ``run.json``.

    ``learning_rate``, ``epochs`` and ``batch_size`` default by the number of training questions (few:
    below ``FEW_EXAMPLES``). ``dev_data`` chooses the epoch and the settings instead of ``dev_fraction`` of
    the training questions. ``patience`` is in epochs without a better dev F1. ``attention_dropout``
    0 lets PyTorch use its fused attention, which is faster.

    ``max_train_samples`` and ``max_eval_samples`` keep the first so many questions, in file order, of the training
    part (after the dev part was carved) and of the dev and held-out parts. ``batch_size`` is windows a forward
    pass, of all processes, and a step is ``gradient_accumulation_steps`` of those. ``max_answer_len`` and
    ``null_score_diff_threshold`` are taken instead of being chosen on the dev part. ``n_best_size`` is how many
    candidates the predictions files list, nothing else. ``model_revision``, ``token`` and ``trust_remote_code``
    are ``Hub``'s, for the base; ``token`` opens hub data too, and is recorded nowhere. ``save_steps`` adds
    checkpoints inside epochs, every so many steps. ``cache`` keeps the windows for the next run.

    ``negatives`` are made per training question, see ``training/negatives.py``; the dev part gets one each. ``teacher`` is
    a model to learn from, see ``training/distill.py``: ``distill_weight`` of the loss of each window, at
    ``distill_temperature``. The questions in ``unlabelled`` have no answers and are taught by it alone. ``layers``
    keeps so many of the base's.

    ``device`` is auto, cpu, cuda or cuda:N. With ``batch_tokens`` a batch holds so many tokens at most, padding included,
    and ``batch_size`` windows where that is given. ``torch_compile`` runs the model compiled.
    """

    data: str = "handbook"
    base: str | None = None
    out: str = "runs/handbook"
    eval_data: str | None = None
    dev_data: str | None = None
    dev_fraction: float = 0.1
    epochs: int | None = None
    learning_rate: float | None = None
    batch_size: int | None = None
    batch_tokens: int | None = None
    weight_decay: float = 0.01
    warmup_ratio: float = 0.06
    patience: int = 2
    seed: int = 13
    max_seq_len: int | None = None
    doc_stride: int | None = None
    attention_dropout: float = 0.0
    negatives: int = 0
    teacher: str | None = None
    distill_weight: float = 0.7
    distill_temperature: float = 2.0
    unlabelled: str | None = None
    layers: int | None = None
    precision: str = "auto"
    device: str = "auto"
    torch_compile: bool = False
    on_ambiguous: OnAmbiguous = "error"
    columns: str | None = None
    no_answer_token: str | None = None
    max_train_samples: int | None = None
    max_eval_samples: int | None = None
    max_answer_len: int | None = None
    null_score_diff_threshold: float | None = None
    n_best_size: int = DEFAULT_N_BEST
    gradient_accumulation_steps: int = 1
    gradient_checkpointing: bool = False
    preprocessing_num_workers: int = 1
    save_steps: int | None = None
    cache: bool = True
    model_revision: str | None = None
    trust_remote_code: bool = False
    token: str | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class RunResult:
    """Where the run is and what it reached; ``metrics`` is the content of ``metrics.json``."""

    folder: Path
    metrics: dict[str, Any]


def train(
    options: TrainOptions,
    say: Say,
    *,
    progress: bool = True,
    resume: bool = False,
    more_metrics: Mapping[str, Any] | None = None,
) -> RunResult:
    """Fine-tunes ``options.base`` on ``options.data`` and writes the run folder.

    ``say`` gets one line of report at a time; ``more_metrics`` go into ``metrics.json`` as they are. ``resume``
    goes on with an unfinished run in ``options.out`` after its newest complete checkpoint. A finished run there
    is replaced only when the new one is complete.

    Raises InputError and DataError on unusable input before anything is written, and on an unfinished
    run in the way or one that was started with other options, data or base; CheckpointError where the
    base does not load; DeviceError where CUDA is asked for and not to be had; FailureError on a loss that is not
    finite, on a full disk and where the model cannot be compiled.
    """
    with distributed.together(on_cpu=options.device == "cpu"):
        return _train(options, say if distributed.is_first() else _silent, progress, resume, more_metrics or {})


def _silent(line: str) -> None:
    """The report of every process but the first."""


def _train(options: TrainOptions, say: Say, progress: bool, resume: bool, more_metrics: Mapping[str, Any]) -> RunResult:
    started = time.time()
    distributed.from_first(lambda: check(options, resume))
    device = training_device(options.device)
    out = Path(options.out)
    reading = Reading.of(asdict(options))
    rows = list(load_rows(options.data, options.token))
    checked = check_rows(options.data, rows, reading)
    say(f"data check       {one_line(checked)}")
    data = read(options.data, reading, rows=rows)
    train_part, dev_part, eval_part = _parts(data, options)
    options = _resolve(options, len(train_part))
    distributed.share(options.batch_size or 1)
    precision = resolve_precision(options.precision, device.type)
    set_seed(options.seed)
    hub = Hub(options.model_revision, options.token, options.trust_remote_code)
    checkpoint = load_checkpoint(str(options.base), hub, **_dropout(options.attention_dropout))
    if options.gradient_checkpointing and not checkpoint.model.supports_gradient_checkpointing:
        raise InputError(f"{options.base}: this kind of model has no gradient checkpointing: leave it out")
    settings = checkpoint.settings.changed(max_seq_len=options.max_seq_len, doc_stride=options.doc_stride)

    if options.layers is not None:
        keep_layers(checkpoint.model, options.layers)
    teacher = load_teacher(options.teacher, device, hub) if options.teacher else None
    example = train_part[0]
    say(f"1 raw data       {len(data.examples)} questions on {_passages(data.examples)} passages from {data.source}")
    for count, what in (
        (data.skipped, "ambiguous rows skipped"),
        (data.first_taken, "answers taken at their first place"),
    ):
        if count:
            say(f"                 {count} {what}")
    say(f"                 e.g. {_clip(example.question)} -> {_clip(_gold(example))}")
    say(
        f"2 preprocessing  train {len(train_part)}, dev {len(dev_part)} "
        f"({'of ' + options.dev_data if options.dev_data else 'carved by passage'}, chooses the epoch)"
        + (f", held out {len(eval_part)} (only reported)" if eval_part else "")
    )
    where = (
        f"answer at code points {example.answers[0].start}-{example.answers[0].end}" if example.answers else "no answer"
    )
    say(f"                 e.g. {where} of {len(example.context)}")
    unlabelled = _unlabelled(options)
    paired = with_negatives(train_part, options.negatives, [e.context for e in unlabelled])
    dev_paired = with_negatives(dev_part, min(options.negatives, 1))
    for name, made in (("train", paired), ("dev", dev_paired)):
        if made.elsewhere or made.removed:
            say(
                f"{_INDENT}{name} negatives: {made.elsewhere} on other passages, {made.removed} on their own without the answer"
            )
    for name, part, seen in (("dev", dev_part, train_part), ("held-out", eval_part, (*train_part, *dev_part))):
        leaked = {e.context for e in part} & {e.context for e in seen}
        if leaked:
            say(
                f"                 WARNING: {len(leaked)} {name} passages are also in the training data: their scores flatter"
            )

    def make(part: Sequence[Example], encoder: Encoder, settings: QaSettings, source: str) -> FeatureSet:
        return make_features_in(options.preprocessing_num_workers, part, encoder, settings, source)

    parts = [
        Part((*paired.examples, *unlabelled), options.data),
        Part(dev_paired.examples, options.dev_data or options.data),
    ]
    parts += [Part(eval_part, options.eval_data or options.data)] if eval_part else []
    folder = cache_folder() if options.cache else None
    kept = cached_features(parts, checkpoint.encoder, settings, folder, lambda line: say(_INDENT + line), make=make)
    train_set, dev_set = kept.sets[:2]
    eval_set = kept.sets[2] if eval_part else None
    say(
        f"3 features       train {len(train_set)} windows ({train_set.with_answer} with an answer), dev {len(dev_set)}; "
        f"at most {settings.max_seq_len} tokens, overlap {settings.doc_stride}"
        + (" (from the cache)" if kept.found else "")
    )
    say(f"                 e.g. {_feature_example(train_set, checkpoint)}")

    if not train_set.with_answer:
        raise InputError(f"{options.data}: no training window holds an answer, so there is nothing to learn from")

    if options.batch_tokens:
        check_tokens(options.batch_tokens, [len(f.window) for f in train_set.features])
    soft = []
    if teacher:
        soft = teach(
            teacher,
            train_set,
            questions=[e.question for e in train_set.examples],
            temperature=options.distill_temperature,
            folder=folder,
            say=say,
        )
    training_set = TrainingSet(train_set, _groups(paired, len(unlabelled)), len(unlabelled), soft)
    record = _record(options, precision, device, checkpoint, data, dev_part, eval_part)
    with open_run(out, record, resume, say) as plan, tf32_products(device):
        if plan.finished:
            say(f"run folder: {out} was complete already")
            return RunResult(out, json.loads((out / "metrics.json").read_text(encoding="utf-8")))
        if plan.saved:
            started -= plan.saved.progress["seconds"]
        result, answers = _run(
            options,
            precision,
            device,
            checkpoint,
            settings,
            training_set,
            dev_set,
            eval_set,
            plan,
            say,
            progress,
            started,
        )
        result |= {"data_check": checked.to_dict(), **more_metrics}
        if distributed.is_first():
            with writing(plan.folder):
                write_json(plan.folder / "metrics.json", result)
                draw_run(plan.folder, out.name, plan.record, result, kept.sets, answers, data, say)
            finish(plan, out)
        distributed.wait()
    say(f"run folder: {out} ({result['seconds']:.0f} s)")
    return RunResult(out, result)


# ---------------------------------------------------------------- data and options


def check(options: TrainOptions, resume: bool = False) -> None:
    """Raises InputError on numbers that the libraries below would answer with a traceback, and on a place that is taken."""
    ranges = {
        "learning_rate": (0.0, math.inf),
        "weight_decay": (0.0, math.inf),
        "warmup_ratio": (0.0, 1.0),
        "attention_dropout": (0.0, 1.0),
        "null_score_diff_threshold": (-math.inf, math.inf),
        "seed": (0, 2**32 - 1),
        "distill_weight": (0.0, 1.0),
        "distill_temperature": (0.1, 100.0),
        "negatives": (0, 100),
    }
    for name, (low, high) in ranges.items():
        value = getattr(options, name)
        if value is not None and not (low <= value <= high and math.isfinite(value)):
            raise InputError(f"{name} is {value}: it must lie between {low} and {high}")
    for name in _COUNTS:
        value = getattr(options, name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise InputError(f"{name} is {value!r}: a whole number from 1 is needed")
    parse_device(options.device)
    if options.batch_tokens and distributed.count() > 1:
        raise InputError("--batch-tokens trains in one process: leave it out, or torchrun")
    _check_out(Path(options.out), resume)


def _check_out(out: Path, resume: bool) -> None:
    if not out.name or out.is_symlink():
        raise InputError(f"{out}: a run needs a folder of its own, not a link: give --out a name")
    if out.exists() and not (out / "run.json").is_file() and any(out.iterdir() if out.is_dir() else [out]):
        raise InputError(f"{out}: exists and is not a run folder, so it is not overwritten: give another --out")
    check_unfinished(out, resume)


def _parts(
    data: DataSet, options: TrainOptions
) -> tuple[tuple[Example, ...], tuple[Example, ...], tuple[Example, ...]]:
    """Train, dev (``dev_data``, or carved from train by passage) and held-out examples, cut to the most asked for."""
    held_out = data.part("validation")
    rest = tuple(e for e in data.examples if e.split != "validation")
    if options.eval_data is not None:
        given = read(options.eval_data, Reading.of(asdict(options)), token=options.token)
        held_out = given.part("validation") or given.examples
    if not rest:
        raise InputError(f"{options.data}: every row is marked as validation, none is left to train on")
    if options.dev_data is not None:
        train_part = rest
        dev_part = read(options.dev_data, Reading.of(asdict(options)), token=options.token).examples
    else:
        train_part, dev_part = carve_by_passage(rest, options.dev_fraction, options.seed)
    most = options.max_eval_samples  # training/runs.py cuts the same way when it carves again
    return train_part[: options.max_train_samples], dev_part[:most], held_out[:most]


def _resolve(options: TrainOptions, questions: int) -> TrainOptions:
    few = questions < FEW_EXAMPLES
    batch_size = None if options.batch_tokens else 16 if few else 24  # the tokens alone say how many
    return replace(
        options,
        base=str(options.base or base_model_path()),
        epochs=3 if options.epochs is None else options.epochs,
        learning_rate=(1e-4 if few else 1.8e-4) if options.learning_rate is None else options.learning_rate,
        batch_size=batch_size if options.batch_size is None else options.batch_size,
    )


def _unlabelled(options: TrainOptions) -> tuple[Example, ...]:
    """The questions that a teacher alone labels."""
    if options.unlabelled is None:
        return ()
    if options.teacher is None:
        raise InputError("--unlabelled: only a teacher can label these questions: give --teacher, or leave it out")
    found = read(options.unlabelled, Reading.of(asdict(options)), token=options.token, annotated=False).examples
    return tuple(replace(e, answers=()) for e in found)


def _groups(paired: Paired, unlabelled: int) -> tuple[int, ...]:
    """The question of each training example, () if each is its own."""
    if len(set(paired.groups)) == len(paired.groups):
        return ()
    return (*paired.groups, *range(len(paired.groups), len(paired.groups) + unlabelled))


def _dropout(attention: float) -> dict[str, float]:
    names = ("attention_probs_dropout_prob", "attention_dropout")  # BERT's kind, DistilBERT's kind
    return dict.fromkeys(names, attention)


# ---------------------------------------------------------------- training


def _run(
    options: TrainOptions,
    precision: str,
    device: torch.device,
    checkpoint: Checkpoint,
    settings: QaSettings,
    training_set: TrainingSet,
    dev_set: FeatureSet,
    eval_set: FeatureSet | None,
    plan: Plan,
    say: Say,
    progress: bool,
    started: float,
) -> tuple[dict[str, Any], list[Answer]]:
    """Trains, and returns the content of ``metrics.json`` and the answers to the held-out (else the dev) questions."""
    epochs, learning_rate = options.epochs or 1, options.learning_rate or 0.0
    # For the evaluation, where the tokens of a batch are given: as many of the longest windows as they hold.
    batch_size = options.batch_size or max(1, (options.batch_tokens or 1) // settings.max_seq_len)
    share = distributed.share(batch_size)
    passes = options.gradient_accumulation_steps
    arguments = training_arguments(
        device,
        output_dir=str(plan.folder / SAVES),
        num_train_epochs=float(epochs),
        learning_rate=learning_rate,
        per_device_train_batch_size=share,
        per_device_eval_batch_size=2 * share,
        weight_decay=options.weight_decay,
        warmup_ratio=options.warmup_ratio,
        gradient_accumulation_steps=passes,
        gradient_checkpointing=options.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        optim="adamw_torch_fused",
        eval_strategy="epoch",
        save_strategy="epoch",
        logging_strategy="epoch",
        restore_callback_states_from_checkpoint=True,  # patience goes on counting
        load_best_model_at_end=True,
        metric_for_best_model="eval_f1",
        greater_is_better=True,
        remove_unused_columns=False,
        label_names=["start_positions", "end_positions"],
        report_to=[],
        seed=options.seed,
        disable_tqdm=not progress,
        dataloader_pin_memory=device.type == "cuda",
        logging_nan_inf_filter=False,
    )
    done: dict[str, Any] = plan.saved.progress if plan.saved else {"rows": []}
    speed = Speed(device, lambda: trainer.windows_seen, distributed.count(), done.get("speed", []))
    table = EpochTable(say, done["rows"], speed.of)
    pad = checkpoint.encoder.config.pad_token_id
    trainer = SpanTrainer(
        model=checkpoint.model,
        args=arguments,
        train_dataset=training_set,
        eval_dataset=dev_set,
        data_collator=lambda features: collate(features, pad),
        compute_metrics=lambda prediction: _metrics(dev_set, prediction, settings),
        callbacks=[EarlyStoppingCallback(options.patience), speed, table],
        progress=lambda: {"rows": table.rows, "speed": speed.rows, "seconds": round(time.time() - started, 1)},
        batch_tokens=options.batch_tokens,
        most_windows=options.batch_size,
        distill_weight=options.distill_weight if options.teacher else 0.0,
        temperature=options.distill_temperature,
    )
    table.loss_of = trainer.epoch_loss
    _say_training(say, options, trainer, precision, device, len(training_set))
    if options.save_steps:
        trainer.add_callback(SaveInside(options.save_steps))
    trainer.remove_callback(PrinterCallback)
    if progress:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(QuietProgress)

    held_out_base = _held_out(trainer, eval_set, settings) if eval_set else None
    settings = unchosen_settings(settings, training_set.features.examples)
    threshold = options.null_score_diff_threshold
    given = threshold is not None
    settings = replace(settings, null_threshold=threshold) if given else settings
    table.header()
    if not table.rows:
        trainer.evaluate()  # the row "0": the base model before any step
    with warnings.catch_warnings(), _memory_errors(), compiled(checkpoint.model, options.torch_compile):
        # Epochs of less than a second look to the Trainer like a broken clock; it then goes by the step numbers.
        warnings.filterwarnings("ignore", message="mtime may not be reliable")
        trainer.go_on(plan.saved)

    dev_logits = _predict(trainer, dev_set)
    settings = choose_settings(
        dev_set, dev_logits, settings, max_answer_len=options.max_answer_len, keep_threshold=given
    )
    dev_scores = score_logits(dev_set, dev_logits, settings)
    best = table.best
    metrics: dict[str, Any] = {
        "eval_loss": best["eval_loss"],
        "eval_accuracy": dev_scores.accuracy / 100,
        "eval_exact_match": dev_scores.exact_match,
        "eval_f1": dev_scores.f1,
        "best_epoch": best["epoch"],
        "steps": trainer.state.global_step,
        "overfitting_from_epoch": table.gap_opened,
        "settings": settings.to_dict(),
        "dev": dev_scores.to_dict(),
        "epochs": table.rows,
        "speed": speed.summary(),
    }
    whose = "as given" if options.max_answer_len else "chosen on the dev part"
    say(f"5 evaluation     best epoch {best['epoch']}; max_answer_len {settings.max_answer_len} {whose}")
    line = report_choice("dev", dev_set, dev_logits, settings, metrics, threshold_given=given)
    say(f"                 dev: {line}")
    answers = answers_of(dev_set, dev_logits, settings)
    asked = dev_set.examples[0]
    say(f"                 e.g. {_clip(asked.question)} -> {_clip(answers[0].text)}, annotated {_clip(_gold(asked))}")
    _say_scores(say, "dev", dev_scores)
    reported, logits, metrics["predictions"] = dev_set, dev_logits, "dev"
    if eval_set:
        eval_logits = _predict(trainer, eval_set)
        answers = answers_of(eval_set, eval_logits, settings)
        after = score(eval_set.examples, answers)
        metrics["held_out"] = after.to_dict()
        if held_out_base:
            metrics["held_out_base"] = held_out_base.to_dict()
            _say_scores(say, "held out, base model", held_out_base)
        _say_scores(say, "held out", after)
        say(f"                 held out: {report_choice('held_out', eval_set, eval_logits, settings, metrics)}")
        reported, logits, metrics["predictions"] = eval_set, eval_logits, "held_out"
    chart = terminal_chart(table.rows)
    if chart:
        say(chart)
    if distributed.is_first():
        with writing(plan.folder):
            write_predictions(plan.folder, predictions_of(reported, logits, settings, options.n_best_size))
            shutil.rmtree(plan.folder / "checkpoint", ignore_errors=True)  # begun by a process that was interrupted
            save_checkpoint(checkpoint, settings, plan.folder / "checkpoint")
    metrics["seconds"] = round(time.time() - started, 1)
    return metrics, answers


@contextmanager
def _memory_errors() -> Iterator[None]:
    """Turns PyTorch's ways of running out of memory into a FailureError that says what to lower."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            raise FailureError(
                "training ran out of memory: lower --batch-size, --batch-tokens or --max-seq-len"
            ) from error
        raise


def _predict(trainer: Trainer, features: FeatureSet) -> tuple[FloatArray, FloatArray]:
    """Start and end logits ``[windows, longest]`` in window order."""
    loader = trainer.get_eval_dataloader(features)
    compute_metrics, trainer.compute_metrics = trainer.compute_metrics, None  # they belong to the dev part
    try:
        predictions = trainer.evaluation_loop(loader, "prediction", prediction_loss_only=False).predictions
    finally:
        trainer.compute_metrics = compute_metrics
    return predictions[0], predictions[1]


def _held_out(trainer: Trainer, features: FeatureSet, settings: QaSettings) -> Scores:
    return score_logits(features, _predict(trainer, features), settings)


def _metrics(features: FeatureSet, prediction: EvalPrediction, settings: QaSettings) -> dict[str, float]:
    logits = prediction.predictions
    if not np.isfinite(logits[0][:, 0]).all():
        raise FailureError("training diverged: the logits are not finite. Lower --learning-rate")
    scores = score_logits(features, (logits[0], logits[1]), settings)
    return {"eval_accuracy": scores.accuracy / 100, "eval_exact_match": scores.exact_match, "eval_f1": scores.f1}


# ---------------------------------------------------------------- reports


def _say_training(
    say: Say, options: TrainOptions, trainer: SpanTrainer, precision: str, device: torch.device, windows: int
) -> None:
    """What is trained, where, and in which steps."""
    passes = options.gradient_accumulation_steps
    batch, batches = f"{options.batch_size} windows", math.ceil(windows / (options.batch_size or 1))
    if trainer.batches is not None:
        batches = len(trainer.batches)
        bounds = [f"{options.batch_tokens} tokens"] if options.batch_tokens else []
        bounds += [f"{options.batch_size} windows"] if options.batch_size else []
        batch = f"at most {' and '.join(bounds)} ({windows / batches:.1f} windows)"
    say(
        f"4 training       {sum(p.numel() for p in trainer.model.parameters()) / 1e6:.1f} M parameters on "
        f"{device_name(device)} in {precision}{', products in TF32' if has_tf32(device) else ''}"
        f"{', compiled' if options.torch_compile else ''}, {options.epochs} epochs of {math.ceil(batches / passes)} steps "
        f"of {f'{passes} x ' if passes > 1 else ''}{batch}, learning rate {options.learning_rate:g}"
        + (f", {distributed.count()} processes" if distributed.count() > 1 else "")
    )
    if len(trainer.train_dataset.features.examples) < FEW_EXAMPLES:
        say(
            f"                 few examples ({len(trainer.train_dataset.features.examples)}): a low learning rate unless you give one, and "
            f"training stops after {options.patience} epochs without a better dev F1"
        )
    first = trainer.train_dataset[0].feature.window
    say(f"                 e.g. a window of {len(first)} tokens -> start and end logits [1, {len(first)}] each")


def _say_scores(say: Say, name: str, scores: Scores) -> None:
    low, high = bootstrap_interval(scores.rows_f1)
    say(
        f"                 {name}: accuracy {scores.accuracy / 100:.3f}, EM {scores.exact_match:.1f}, F1 {scores.f1:.1f} "
        f"(95 % interval {low:.1f} to {high:.1f}) on {scores.total} questions"
    )


def _clip(text: str, width: int = 70) -> str:
    text = " ".join(text.split())
    return f'"{text}"' if len(text) <= width else f'"{text[: width - 3]}..."'


def _gold(example: Example) -> str:
    return example.answers[0].text if example.answers else "(no answer)"


def _passages(examples: Sequence[Example]) -> int:
    return len({e.context for e in examples})


def _feature_example(features: FeatureSet, checkpoint: Checkpoint) -> str:
    feature = next((f for f in features.features if f.positions[0, 0] != f.window.null_index), features.features[0])
    first, last = feature.positions[0]
    pieces = [checkpoint.encoder.token_text(int(i)) for i in feature.window.input_ids[first : last + 1]]
    return f"tokens {first}-{last} of {len(feature.window)} are the answer: {' '.join(pieces)}"


def _record(
    options: TrainOptions,
    precision: str,
    device: torch.device,
    checkpoint: Checkpoint,
    data: DataSet,
    dev_part: Sequence[Example],
    eval_part: Sequence[Example],
) -> dict[str, Any]:
    return {
        "status": "running",
        "options": {**{k: v for k, v in asdict(options).items() if k != "token"}, "base": base_name(checkpoint.name)},
        "precision": precision,
        "seed": options.seed,
        "processes": distributed.count(),
        "data_sha256": hash_examples(data.examples),
        "dev_data_sha256": hash_examples(dev_part) if options.dev_data else None,
        "eval_data_sha256": hash_examples(eval_part) if options.eval_data else None,
        "base": base_of(checkpoint),
        "versions": versions_of(_VERSIONED, missing="source"),
        "machine": {"cpu_count": os.cpu_count(), "device": device_name(device), "tf32": has_tf32(device)},
    }
