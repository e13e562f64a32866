"""A Triton model repository of bundles.

    REPOSITORY/NAME/config.pbtxt    how Triton runs the model, checked against it
    REPOSITORY/NAME/1               the whole bundle: Triton uses its model.onnx, a client its tokenizer and manifest
    REPOSITORY/NAME/2               a bundle added later under the same name, which Triton then serves

The layout and other files that it may contain: https://github.com/triton-inference-server/server/blob/main/docs/user_guide/model_repository.md.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qadeploy import __version__
from qadeploy.core.encoded_text import EncodedText
from qadeploy.core.windows import CONTEXT_MASK, pad_batch, pad_context_masks
from qadeploy.errors import BundleError, InputError
from qadeploy.files import hash_file, holding, sync_folder, temporary_folder, write_text
from qadeploy.inference.bundle import CARD, MANIFEST, MODEL, Bundle, open_bundle
from qadeploy.inference.cuda import batches, in_batches, unpadded
from qadeploy.inference.graph_model import GraphModel
from qadeploy.inference.manifest import SessionSettings
from qadeploy.inference.session import differences
from qadeploy.integrations.triton.model_config import (
    BUNDLE_PARAMETER,
    CONFIG,
    Running,
    bundle_parameter,
    check_config,
    require_schema,
    tensors_of,
    write_config,
)
from qadeploy.machine import usable_cpus
from qadeploy.records import LOGIT_NAMES, Logits, Window

# How far logits may move when windows run together. Adding in another order moves fp32 by 1e-5; int8 with scales for the
# whole batch moves by tenths and more. fp16 rounds at every step (export.parity.TOLERANCES).
_APART = {"fp16": 0.1}
_APART_OTHERWISE = 1e-3
# On a CPU batches are slower than single windows (docs/triton.md).
_GPU_BATCH, _CPU_BATCH = 32, 1
_GPU_DELAY = 500  # microseconds: a fraction of what a batch takes
_SAMPLE_TOKENS = 128  # the longest window that is run alone and together with others
_INPUTS = frozenset({"input_ids", "attention_mask", "token_type_ids", CONTEXT_MASK})


@dataclass(frozen=True, slots=True)
class Added:
    """The result of ``add_bundle``: ``folder`` is the version's, a bundle; ``new`` is False if it was already there."""

    name: str
    version: int
    folder: Path
    new: bool
    remarks: tuple[str, ...] = ()


def check_repository(repository: Path) -> None:
    """Raises InputError if no model can be added to ``repository``: it is a file, a bundle, or a single model's folder.

    Raises MissingExtraError without the extra ``triton``.
    """
    require_schema()
    if repository.exists() and not repository.is_dir():
        raise InputError(f"{repository}: is a file: a model repository is a folder")
    for name, what in ((MANIFEST, "a bundle"), (CONFIG, "one model's folder in a repository")):
        if (repository / name).exists():
            raise InputError(f"{repository}: is {what}, not a model repository: give the folder that holds the models")


def takes(bundle: Bundle) -> bool:
    """Whether a repository can hold the bundle: it cannot if the graph takes text."""
    return bundle.in_graph in {"", "spans"}


def add_bundle(bundle: Bundle, repository: Path, *, max_batch: int | None = None) -> Added:
    """Adds a verified bundle to a model repository, which is created if needed; other models are not touched.

    ``max_batch`` is the most windows per run, of one request or of several (default: 32 for fp16, otherwise 1).

    An existing model of the bundle's name gets a new version, which Triton serves by default; its config.pbtxt, edited by
    hand or not, only gets one more parameter. The newest version is not added again. A version is written whole or not at all.

    Raises InputError if ``repository`` cannot hold models, its config.pbtxt does not fit the model, the bundle's graph takes
    text, its windows may not run together as ``max_batch`` requires, or another command is adding the same model;
    BundleError; MissingExtraError (``triton``).
    """
    check_repository(repository)
    if not takes(bundle):
        raise InputError(
            f"{bundle.folder}: has its {bundle.in_graph} in the graph, one question per run, but Triton needs a leading batch: "
            f"give the bundle that it was made from, {bundle.manifest['made']['from']}, or its NAME-spans"
        )
    name = bundle.folder.resolve().name
    model = repository / name
    if max_batch is not None and max_batch < 1:
        raise InputError(f"max_batch {max_batch} is below 1")
    if not model.exists():
        return _add_model(bundle, model, max_batch)
    with holding(model):
        return _add_version(bundle, model, max_batch)


def _add_version(bundle: Bundle, model: Path, max_batch: int | None) -> Added:
    place = model / CONFIG
    if not place.is_file():
        raise InputError(
            f"{model}: exists without a {CONFIG}, so it is not a model: remove it or give another repository"
        )
    latest = max(_versions(model), default=0)
    newest = model / str(latest) / MANIFEST
    if newest.is_file() and hash_file(newest) == bundle.hash:
        return Added(model.name, latest, model / str(latest), False)
    tensors = tensors_of(bundle.read(MODEL))
    try:
        text = place.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{place}: is not UTF-8 text (byte {error.start})") from error
    before = check_config(text, place, tensors)
    if not any(parameter.startswith(BUNDLE_PARAMETER) for parameter in before.parameters):
        raise InputError(
            f"{place}: names no bundle in its parameters, so the model is not one that qadeploy added, and Triton would serve "
            "the bundle in its place: give another repository"
        )
    if max_batch is not None and max_batch != before.max_batch_size:
        raise InputError(
            f"{place}: max_batch_size is {before.max_batch_size}, and the file is not overwritten: change it there"
        )
    effects = measure_effects(bundle)
    _require_sound(effects, before.max_batch_size, f"{place}: max_batch_size")
    version = latest + 1
    stale = f"{BUNDLE_PARAMETER}{version}"  # left by a run that was interrupted before its version was complete
    if stale in before.parameters:
        text = text.replace(bundle_parameter(version, before.parameters[stale].string_value), "")
    text = text.rstrip("\n") + "\n" + bundle_parameter(version, bundle.hash)
    check_config(text, place, tensors)
    with temporary_folder(model / str(version)) as work:
        _copy(bundle, work)
        write_text(place, text)
        os.rename(work, model / str(version))
    return Added(model.name, version, model / str(version), True, effects.remarks())


def _add_model(bundle: Bundle, model: Path, max_batch: int | None) -> Added:
    tensors = tensors_of(bundle.read(MODEL))
    effects = measure_effects(bundle)
    running, remarks = _running(bundle, effects, max_batch)
    remarks += effects.remarks()
    text = write_config(model.name, tensors, running, (f"Written by qadeploy {__version__}.", *remarks))
    text += bundle_parameter(1, bundle.hash)
    check_config(text, model / CONFIG, tensors)
    model.parent.mkdir(parents=True, exist_ok=True)
    # Triton takes every folder in the repository for a model, even a hidden one, and does not start if one is not. So a
    # partial model is written beside the repository, unless that is a mount (then only it is on the same file system), or
    # this user may not write there.
    above = model.parent.resolve().parent
    outside = above.stat().st_dev == model.parent.stat().st_dev and os.access(above, os.R_OK | os.W_OK | os.X_OK)
    beside = above if outside else model.parent
    with holding(model), temporary_folder(beside / model.name) as work:
        if model.exists():  # another command has just added it
            return _add_version(bundle, model, max_batch)
        _copy(bundle, work / "1")
        write_text(work / CONFIG, text)
        sync_folder(work)
        os.rename(work, model)
    return Added(model.name, 1, model / "1", True, remarks)


def _copy(bundle: Bundle, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for name in bundle.manifest["files"]:
        (folder / name).write_bytes(bundle.read(name))
    shutil.copyfile(bundle.folder / MANIFEST, folder / MANIFEST)
    open_bundle(folder)
    sync_folder(folder)


def _versions(model: Path) -> list[int]:
    """The numbers of a model's versions. Triton ignores other names and those that begin with 0."""
    names = [path.name for path in model.iterdir() if path.is_dir()]
    return [int(name) for name in names if name.isascii() and name.isdigit() and not name.startswith("0")]


def _require_sound(effects: Effects, max_batch: int, what: str) -> None:
    if max_batch > 1 and not effects.sound:
        raise InputError(
            f"{what} is {max_batch}, but windows of this bundle that run together move each other's logits by up to "
            f"{effects.together:.2g}, because their activations share scales: give 1"
        )


def _running(bundle: Bundle, effects: Effects, max_batch: int | None) -> tuple[Running, tuple[str, ...]]:
    """How Triton runs a bundle's model, and why."""
    gpu = bundle.precision == "fp16"
    size = max_batch or (_GPU_BATCH if gpu and effects.sound else _CPU_BATCH)
    _require_sound(effects, size, f"{bundle.folder}: max_batch")
    if gpu:
        where = "One instance per GPU, where fp16 pays."
    else:
        where = "One single-threaded instance per CPU of the machine that wrote this: set count to the server's CPUs."
    if effects.sound:
        batches = "Up to max_batch_size requests of equal length run together, which pays on GPUs and costs on CPUs; "
        batches += f"logits move by up to {effects.together:.1g}."
    else:
        batches = f"No batches: windows that run together move each other's logits by up to {effects.together:.2g}, "
        batches += "because their activations share scales."
    running = Running(
        max_batch=size, delay=(_GPU_DELAY if gpu else 0) if effects.sound else None, gpu=gpu, instances=usable_cpus()
    )
    return running, (where, batches)


@dataclass(frozen=True, slots=True)
class Effects:
    """How far logits move at most on a Triton server, compared with the bundle's own session, measured on a CPU.

    ``together``: if windows run as one batch instead of alone. ``settings``: without the session settings in ``unset``, for
    which Triton's backend has no parameter.
    """

    together: float
    settings: float
    unset: tuple[str, ...]
    sound: bool

    def remarks(self) -> tuple[str, ...]:
        """A line about settings that cannot be set, if any."""
        if not self.unset:
            return ()
        what = "; ".join(self.unset)
        return (
            f"Without {what}, which Triton's ONNX Runtime backend cannot set: "
            f"it may be slower, and logits move by up to {self.settings:.1g}.",
        )


def measure_effects(bundle: Bundle) -> Effects:
    """Runs windows of the bundle's own card alone and together, with and without its session settings.

    Two windows have the same length; a shorter one is padded if the model takes an ``attention_mask``.
    """
    stored = bundle.checked.session
    unset = [f"disabled_optimizers {', '.join(stored.disabled_optimizers)}"] if stored.disabled_optimizers else []
    unset += [f"{key} {value}" for key, value in stored.config.items()]
    if bundle.precision == "fp16":
        unset = []  # session settings only apply to a CPU
    windows, card = _sample(bundle)
    served = _model(bundle, None)
    single = [[i] for i in range(len(windows))]
    alone = _run(served, windows, card, single, bundle.encoder.pad_token_id)
    # All windows as one batch; without a mask, one batch per length.
    joined = batches([len(w) for w in windows], tokens=sys.maxsize, masked="attention_mask" in served.inputs)
    together = float(differences(alone, _run(served, windows, card, joined, bundle.encoder.pad_token_id)).max())
    settings = 0.0
    if unset:
        own = _model(bundle, stored)
        settings = float(differences(alone, _run(own, windows, card, single, bundle.encoder.pad_token_id)).max())
    return Effects(together, settings, tuple(unset), together <= _APART.get(bundle.precision, _APART_OTHERWISE))


def _model(bundle: Bundle, settings: SessionSettings | None) -> GraphModel:
    model = GraphModel(bundle.read(MODEL), settings)
    if not set(model.inputs) <= _INPUTS or not set(LOGIT_NAMES) <= set(model.outputs):
        raise BundleError(
            f"{bundle.folder / MODEL}: inputs {', '.join(model.inputs)} and outputs {', '.join(model.outputs)} are not those of "
            "a question-answering model: export it with qadeploy export"
        )
    return model


def _run(
    model: GraphModel, windows: Sequence[Window], context: EncodedText, groups: Sequence[Sequence[int]], pad: int
) -> list[Logits]:
    """Start and end logits of windows of one context, in order; each group is one run."""

    def run(held: Sequence[Window]) -> list[Logits]:
        masks = pad_context_masks(held, [context] * len(held))
        out = model.run({**pad_batch(held, pad), CONTEXT_MASK: masks})
        return unpadded([out[name] for name in LOGIT_NAMES], held)

    return in_batches(windows, groups, run)


def _sample(bundle: Bundle) -> tuple[list[Window], EncodedText]:
    """Windows of the card, and the card."""
    encoder = bundle.load_encoder()
    card = encoder.encode(bundle.read(CARD).decode("utf-8"))
    longest = min(_SAMPLE_TOKENS, bundle.settings.max_seq_len)

    def first(question: str, tokens: int, count: int) -> list[Window]:
        return encoder.windows(encoder.encode(question), card, max_seq_len=tokens, doc_stride=0)[:count]

    windows = [*first("What is it?", longest, 2), *first("Who made this model?", longest // 2, 1)]
    if len(windows) < 3:
        raise BundleError(
            f"{bundle.folder / CARD}: is too short to tell whether windows may run together: export it again"
        )
    return windows, card
