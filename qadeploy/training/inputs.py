"""What training starts from: the options with their defaults, the questions, the models, and the windows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from transformers import set_seed

from qadeploy.core.metrics import Metric
from qadeploy.core.settings import QaSettings, any_unanswerable
from qadeploy.data.check import CheckedData, check_rows
from qadeploy.data.check_text import check_summary
from qadeploy.data.formats import load_rows
from qadeploy.data.loading import joined, read, source_name, sources
from qadeploy.errors import InputError, MissingExtraError
from qadeploy.files import cache_folder
from qadeploy.records import Example
from qadeploy.shipped import base_model_path
from qadeploy.training import distributed
from qadeploy.training.batches import check_tokens
from qadeploy.training.checkpoint import Checkpoint, Hub, load_checkpoint
from qadeploy.training.distill import Teacher, keep_layers, load_teacher, soft_labels
from qadeploy.training.exportable import TESTED, exportable
from qadeploy.training.feature_cache import cached_features
from qadeploy.training.features import FeatureSet, unknown_tokens
from qadeploy.training.negatives import crops_of, with_negatives
from qadeploy.training.options import FEW_EXAMPLES, TrainOptions
from qadeploy.training.run_data import RunData, split_data, unlabelled_questions
from qadeploy.training.run_log import RunLog
from qadeploy.training.torch_device import resolve_precision
from qadeploy.training.training_set import TrainingSet, masked_windows
from qadeploy.training.workers import make_features_in


def load_data(options: TrainOptions, log: RunLog) -> RunData:
    """Reads, checks and splits the questions.

    Args:
        options: The training options.
        log: Gets the result of the row check.

    Raises:
        InputError: The data cannot be read or split; a DataError names unusable rows.
    """
    rows = {source: list(load_rows(source, options.token)) for source in sources(options.data)}
    checked = [check_rows(source, rows[source], options) for source in rows]
    check = CheckedData(source_name(options.data), tuple(row for each in checked for row in each.rows))
    log.step("data check", check_summary(check))
    found = joined([read(source, options, rows=rows[source]) for source in rows])
    return split_data(options, found, check)


def resolve(options: TrainOptions, questions: Sequence[Example]) -> TrainOptions:
    """Fills in the options whose defaults depend on the training questions.

    Args:
        options: The training options.
        questions: The training questions.

    Raises:
        InputError: The processes cannot share a batch evenly.
    """
    few = len(questions) < FEW_EXAMPLES
    answered = few and not any_unanswerable(questions)
    negatives = int(answered and distributed.count() == 1)
    crops = int(answered) if options.crops is None else options.crops
    batch_size = None if options.batch_tokens else 16 if few else 24  # with batch_tokens, the tokens alone decide
    resolved = replace(
        options,
        base=str(options.base or base_model_path()),
        epochs=(2 if crops else 3) if options.epochs is None else options.epochs,
        learning_rate=(1e-4 if few else 1.8e-4) if options.learning_rate is None else options.learning_rate,
        batch_size=batch_size if options.batch_size is None else options.batch_size,
        negatives=negatives if options.negatives is None else options.negatives,
        crops=crops,
    )
    distributed.windows_per_process(resolved.batch_size or 1)  # raises before a model is loaded
    return resolved


@dataclass(frozen=True, slots=True)
class Models:
    """The model to be trained, the settings it came with, what it learns from, and where it computes."""

    checkpoint: Checkpoint
    settings: QaSettings
    teacher: Teacher | None
    device: torch.device
    precision: str


def load_models(options: TrainOptions, device: torch.device, metric: Metric) -> Models:
    """Loads the base model and the teacher.

    Args:
        options: The training options, resolved.
        device: Where the models compute.
        metric: Replaces the metric of the base's settings.

    Raises:
        InputError: The base does not support an option.
        CheckpointError: A model does not load.
    """
    precision = resolve_precision(options.precision, device.type)
    set_seed(options.seed)  # determines the weights of a new answer head
    hub = Hub(options.model_revision, options.token, options.trust_remote_code, options.allow_pickle)
    names = ("attention_probs_dropout_prob", "attention_dropout")  # as BERT and DistilBERT call it
    dropout = dict.fromkeys(names, options.attention_dropout)
    checkpoint = load_checkpoint(str(options.base), hub, **dropout)
    if options.gradient_checkpointing and not checkpoint.model.supports_gradient_checkpointing:
        raise InputError(f"{options.base}: this kind of model does not support gradient checkpointing: leave it out")
    settings = checkpoint.settings.changed(max_seq_len=options.max_seq_len, doc_stride=options.doc_stride)
    weight = settings.bm25_weight if options.bm25_weight is None else options.bm25_weight
    longest = settings.long_seq_len if options.long_seq_len is None else options.long_seq_len
    settings = replace(settings, metric=metric, bm25_weight=weight, long_seq_len=longest)
    if options.layers is not None:
        checkpoint = replace(checkpoint, model=keep_layers(checkpoint.model, options.layers))
    own = replace(hub, revision=None)  # the revision is that of the base
    teacher = load_teacher(options.teacher, device, own, options.load_timeout) if options.teacher else None
    return Models(checkpoint, settings, teacher, device, precision)


def check_export(checkpoint: Checkpoint, log: RunLog) -> None:
    """Checks that ``export`` can export the model.

    Args:
        checkpoint: The base.
        log: Gets a warning if that is not certain.

    Raises:
        InputError: It cannot.
    """
    try:
        found = exportable(checkpoint.model.config)
    except MissingExtraError as error:
        log.warning(f"qadeploy export cannot export the trained model before an exporter is installed: {error}")
        return
    if found.possible is False:
        raise InputError(
            f"{checkpoint.name}: {found.why}, so qadeploy export could not export the trained model: give a --base of "
            f"another kind: {', '.join(TESTED)}"
        )
    if found.possible is None:
        log.warning(
            f"{checkpoint.name}: whether qadeploy export can export it is not known, because {found.why}: train one epoch and "
            "export that first"
        )


@dataclass(frozen=True, slots=True)
class Windows:
    """The windows of the train, dev and held-out sets, and the share of unknown tokens in all of them."""

    train: TrainingSet
    dev: FeatureSet
    held_out: FeatureSet | None
    unknown_tokens: float


def make_windows(options: TrainOptions, data: RunData, models: Models, log: RunLog) -> Windows:
    """Adds crops, negatives and a teacher's questions, cuts the windows, and asks the teacher for its labels.

    Args:
        options: The training options, resolved.
        data: The questions.
        models: The models.
        log: Gets what was made.

    Raises:
        InputError: No window holds an answer, one does not fit in ``batch_tokens``, or ``unlabelled`` needs a teacher.
    """
    unlabelled = unlabelled_questions(options)
    questions, asked = data.train.examples, options.negatives or 0
    crops = crops_of(questions, options.crops or 0, options.seed)
    # Negatives for the crops too, but on whole contexts: short ones would teach that short texts hold no answer.
    count = round(asked * (1 + len(crops) / max(1, len(questions))))
    train = with_negatives(questions, count, [e.context for e in unlabelled])
    dev = with_negatives(data.dev.examples, min(asked, 1))
    log.crops(len(crops))
    log.negatives("train", train)
    log.negatives("dev", dev)
    log.leaks(data, unlabelled)

    learned = (*train.examples, *crops, *unlabelled)
    wanted = [replace(data.train, examples=learned), replace(data.dev, examples=dev.examples)]
    wanted += [data.held_out] if data.held_out else []
    encoder, settings = models.checkpoint.encoder, models.settings
    cache = cache_folder() if options.cache else None
    make = partial(make_features_in, options.preprocessing_num_workers)
    made = cached_features(wanted, encoder, settings, cache, log.detail, make=make)
    train_set, dev_set, *held_out = made.sets
    log.features(train_set, dev_set, settings, made.found)
    masked = masked_windows(train_set)
    log.masked_windows(len(masked), taught=models.teacher is not None)
    log.labelled_window(train_set, encoder.token_text)
    unknown = unknown_tokens(made.sets, encoder)
    log.unknown_tokens(unknown)
    if not train_set.with_answer:
        raise InputError(f"{data.train.source}: no training window holds an answer, so there is nothing to learn from")
    if options.batch_tokens:
        check_tokens(options.batch_tokens, [len(f.window) for f in train_set.features])
    soft = soft_labels(models.teacher, train_set, options.distill_temperature, cache, log) if models.teacher else []
    alone = len(set(train.groups)) == len(train.groups)  # no question has negatives
    groups = () if alone else (*train.groups, *range(len(train.groups), len(train_set.examples)))
    train_windows = TrainingSet(train_set, groups, len(unlabelled), soft, masked)
    return Windows(train_windows, dev_set, held_out[0] if held_out else None, unknown)
