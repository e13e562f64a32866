"""Distillation: a teacher's start and end logits for the windows that a student is trained on.

The teacher reads the text of each of the student's windows with its own tokenizer. Its logits are stored by character,
so that the two tokenizers may differ, and only the highest ``KEPT`` of each window: the rest have hardly any
probability. On disk they are keyed by teacher, question and text and written in chunks, so that an interrupted pass
continues where it stopped, and a second run computes only new windows.

The student's loss is the cross entropy with the teacher's distribution at temperature T (Hinton, Vinyals and Dean, "Distilling
the Knowledge in a Neural Network", 2015, section 2), over the context and the null position.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qadeploy.core.encoded_text import EncodedText, visible_flags
from qadeploy.core.windows import Encoder
from qadeploy.data.loading import hash_examples
from qadeploy.errors import CheckpointError, InputError, one_line
from qadeploy.files import sweep, writing
from qadeploy.inference.answerer import Answerer
from qadeploy.inference.bundle import is_bundle, open_bundle
from qadeploy.inference.cuda import batches, in_batches
from qadeploy.records import Example, FloatArray, IntArray, Logits, Window
from qadeploy.training.checkpoint import Hub, TorchModel, load_checkpoint
from qadeploy.training.features import Arrays, Feature, FeatureSet
from qadeploy.training.provenance import commit_of, weights_hash
from qadeploy.training.run_log import RunLog
from qadeploy.training.runs import find_run
from qadeploy.training.torch_device import resolve_precision
from qadeploy.training.training_set import SoftLabels

KEPT = 16
_CHUNK = 4_096  # windows per file, and per line of progress
_BATCH_TOKENS = 32_768
_NULL, _NONE = -1, -2  # instead of a character's index: the null position, and no position
_LEAST_PROBABILITY = 1e-3
_LEAST_AGREEMENT, _LOW_AGREEMENT = 0.05, 0.3  # of the teacher with the annotators
_MANY_REFUSED = 0.5
_LEAST_JUDGED, _MOST_JUDGED = 50, 1_000  # annotated answers that show how far they agree
_FIELDS = ("start_places", "start_logits", "end_places", "end_logits")


@dataclass(frozen=True, slots=True)
class Teacher:
    """A trained model to learn from.

    Attributes:
        name: Its name as the user gave it.
        digest: SHA-256 of its weights and of its encoder.
        encoder: The teacher's own encoder.
        longest: The maximum tokens in one of its windows.
        logits: Computes the start and end logits of windows, float32 ``[tokens]`` each.
    """

    name: str
    digest: str
    encoder: Encoder
    longest: int
    logits: Callable[[Sequence[Window]], list[Logits]]


def load_teacher(name: str, device: torch.device, hub: Hub | None = None, load_timeout: float | None = None) -> Teacher:
    """Loads a teacher.

    Args:
        name: A bundle, a run, a checkpoint folder or a hub name.
        device: Where the teacher computes. A bundle on a CPU runs through ONNX Runtime.
        hub: How a model is fetched from the hub.
        load_timeout: Seconds that a bundle may take to load; None sets no limit.

    Raises:
        LoadTimeoutError: The bundle took longer.
        CheckpointError: The checkpoint does not load, or has no fast tokenizer or no trained answer head.
        BundleError: The bundle is damaged.
    """
    if is_bundle(name):
        bundle, answerer = open_bundle(name), Answerer.load(name, device=str(device), load_timeout=load_timeout)
        model = answerer.model
        digest = _digest(bundle.hash, answerer.encoder)
        return Teacher(name, digest, answerer.encoder, answerer.settings.max_seq_len, lambda w: model.start(w).result())
    checkpoint = load_checkpoint(_checkpoint_folder(name), hub)
    if checkpoint.new_head:
        raise CheckpointError(
            f"{name}: has no question-answering head, only an encoder: train it before it is used as a teacher"
        )
    known = _weights(name) or f"{name}@{commit_of(checkpoint)}"
    bf16 = resolve_precision("auto", device.type) == "bf16"
    torch_model = TorchModel(checkpoint.model.to(device), checkpoint.encoder.config.pad_token_id, bf16=bf16)

    def logits(windows: Sequence[Window]) -> list[Logits]:
        rows = batches([len(w) for w in windows], tokens=_BATCH_TOKENS)
        return in_batches(windows, rows, torch_model.run_batch)

    digest, longest = _digest(known, checkpoint.encoder), checkpoint.settings.max_seq_len
    return Teacher(name, digest, checkpoint.encoder, longest, logits)


def lesson_hashes(teacher: str | None, unlabelled: Sequence[Example]) -> dict[str, str | None]:
    """What the record of a run tells a changed teacher, or changed questions for it, by.

    Args:
        teacher: The teacher's name, or None without one.
        unlabelled: The questions that it alone labels.

    Returns:
        ``teacher_sha256``, of its weights or its bundle, None if it is a checkpoint on the hub, and ``unlabelled_sha256``.
    """
    return {
        "teacher_sha256": _weights(teacher) if teacher else None,
        "unlabelled_sha256": hash_examples(unlabelled) if unlabelled else None,
    }


def _checkpoint_folder(name: str) -> Path | str:
    """The folder of a teacher's checkpoint, or its name on the hub."""
    return find_run(name).checkpoint if (Path(name) / "run.json").is_file() else name


def _weights(name: str) -> str | None:
    return open_bundle(name).hash if is_bundle(name) else weights_hash(Path(_checkpoint_folder(name)))


def _digest(weights: str, encoder: Encoder) -> str:
    return hashlib.sha256(f"{weights} {encoder.digest}".encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class _Excerpt:
    """The question and text that the teacher reads for one of the student's windows."""

    question: str
    text: str
    start: int  # of the text in the context
    feature: Feature
    context: EncodedText
    key: bytes  # of the teacher's logits in the store

    @classmethod
    def of(cls, question: str, context: EncodedText, feature: Feature) -> _Excerpt:
        window, start, end = feature.window, 0, len(context.text)
        if window.context_length < len(context):
            last = window.context_offset + window.context_length - 1
            start, end = int(context.offsets[window.context_offset, 0]), int(context.offsets[last, 1])
        text = context.text[start:end]
        key = hashlib.sha256(json.dumps((question, text)).encode()).digest()[:16]
        return cls(question, text, start, feature, context, key)


def soft_labels(
    teacher: Teacher, features: FeatureSet, temperature: float, folder: Path | None, log: RunLog
) -> list[SoftLabels]:
    """A teacher's distributions for every window of a training set.

    Args:
        teacher: The teacher.
        features: The student's windows.
        temperature: T; above 1 it flattens the distributions.
        folder: Where the teacher's logits are stored; None stores nothing.
        log: Gets a line per chunk, and the teacher's agreement with the annotators.

    Returns:
        ``[windows]``, in the order of ``features``.

    Raises:
        InputError: The teacher finds hardly any of the annotated answers.
    """
    excerpts = [
        _Excerpt.of(example.question, context, feature)
        for number, (example, context) in enumerate(zip(features.examples, features.contexts, strict=True))
        for feature in features.features[features.first[number] : features.first[number + 1]]
    ]
    store = _LogitStore(folder and folder / f"teacher-{teacher.digest[:16]}", log)
    missing = [e for key, e in {e.key: e for e in excerpts}.items() if key not in store]
    for begin in range(0, len(missing), _CHUNK) or [0]:
        chunk = missing[begin : begin + _CHUNK]
        if chunk:
            store.add([e.key for e in chunk], _query(teacher, [(e.question, e.text) for e in chunk]))
            log.step("teacher", f"{begin + len(chunk)} of {len(missing)} windows")
        if begin == 0:
            _check_agreement(teacher, excerpts, store, log)
    return [_soft(store[e.key], e, temperature) for e in excerpts]


def _query(teacher: Teacher, pairs: Sequence[tuple[str, str]]) -> Arrays:
    """The teacher's highest logits for each (question, text) pair, by character."""
    encoder, longest = teacher.encoder, teacher.longest
    encoded = encoder.encode_pairs(pairs)
    cuts = []
    for question, text in encoded:
        stride = min(64, max(0, encoder.room(question, longest) // 2))
        cuts.append(encoder.windows(question, text, max_seq_len=longest, doc_stride=stride))
    rows: Arrays = {}
    for name in ("start", "end"):
        rows[f"{name}_places"] = np.full((len(pairs), KEPT), _NONE, dtype=np.int32)
        rows[f"{name}_logits"] = np.zeros((len(pairs), KEPT), dtype=np.float16)
    logits = iter(teacher.logits([window for cut in cuts for window in cut]))
    for number, ((_, text), cut) in enumerate(zip(encoded, cuts, strict=True)):
        own, places = list(islice(logits, len(cut))), _places(text)
        for side, name in enumerate(("start", "end")):
            where, values = _highest(cut, [pair[side] for pair in own], places[:, side])
            rows[f"{name}_places"][number, : len(where)] = where
            rows[f"{name}_logits"][number, : len(where)] = values
    return rows


def _places(text: EncodedText) -> IntArray:
    """``[tokens, 2]``: the first and the last visible character of each token; ``_NONE`` for a blank one."""
    visible = visible_flags(text.text)
    size = len(visible)
    after = np.append(np.where(visible, np.arange(size), size), size)
    after = np.minimum.accumulate(after[::-1])[::-1]
    before = np.maximum.accumulate(np.append(-1, np.where(visible, np.arange(size), -1)))
    places = np.stack((after[text.offsets[:, 0]], before[text.offsets[:, 1]]), axis=1)
    places[text.blank] = _NONE
    return np.asarray(places, dtype=np.int64)


def _highest(windows: Sequence[Window], logits: Sequence[FloatArray], places: IntArray) -> tuple[IntArray, FloatArray]:
    """The ``KEPT`` highest logits, and the character of each.

    A token in several windows counts with its highest logit, the null position with its lowest.
    """
    best = np.full(len(places), -np.inf, dtype=np.float32)
    null = np.inf
    for window, values in zip(windows, logits, strict=True):
        held = slice(window.context_offset, window.context_offset + window.context_length)
        own = values[window.context_begin : window.context_begin + window.context_length]
        best[held] = np.maximum(best[held], own)
        null = min(null, float(values[window.null_index]))
    best[places == _NONE] = -np.inf
    order = np.argsort(-best, kind="stable")[: KEPT - 1]
    order = order[np.isfinite(best[order])]
    return np.append(_NULL, places[order]), np.append(np.float32(null), best[order])


def _soft(row: Arrays, excerpt: _Excerpt, temperature: float) -> SoftLabels:
    """The teacher's distributions on the student's tokens."""
    window = excerpt.feature.window
    held = slice(window.context_offset, window.context_offset + window.context_length)
    offsets = excerpt.context.offsets[held] - excerpt.start
    found: list[Any] = []
    for name in ("start", "end"):
        places, logits = row[f"{name}_places"], row[f"{name}_logits"].astype(np.float32)
        used = places != _NONE
        places, logits = places[used], logits[used] / temperature
        probabilities = np.exp(logits - logits.max())
        probabilities /= probabilities.sum()
        # The last token that begins at or before the character; it also gets the characters that no token covers.
        tokens = np.searchsorted(offsets[:, 0], places, side="right") - 1
        positions = np.where(places == _NULL, window.null_index, window.context_begin + np.maximum(tokens, 0))
        own, inverse = np.unique(positions, return_inverse=True)
        summed = np.bincount(inverse, weights=probabilities)
        kept = summed >= _LEAST_PROBABILITY
        found += [own[kept], (summed[kept] / summed[kept].sum()).astype(np.float32)]
    return SoftLabels(*found)


def _check_agreement(teacher: Teacher, excerpts: Sequence[_Excerpt], store: _LogitStore, log: RunLog) -> None:
    """Reports how often the teacher's best span is an annotated one, and how often it prefers "no answer".

    Raises InputError if its best span hardly ever is.
    """
    hits: list[bool] = []
    refusals: list[bool] = []
    for excerpt in excerpts:
        window, annotated = excerpt.feature.window, excerpt.feature.positions.tolist()
        if excerpt.key in store and annotated[0][0] != window.null_index:
            row = store[excerpt.key]
            refusals.append(_best(row, excerpt) == [window.null_index] * 2)
            spans = {name: np.where(each == _NULL, _NONE, each) for name, each in row.items() if "places" in name}
            hits.append(_best({**row, **spans}, excerpt) in annotated)
        if len(hits) >= _MOST_JUDGED:
            break
    if len(hits) < _LEAST_JUDGED:
        return
    agreement, refused = float(np.mean(hits)), float(np.mean(refusals))
    line = f"the teacher {teacher.name} finds {100 * agreement:.1f} % of {len(hits)} annotated answers exactly"
    if agreement < _LEAST_AGREEMENT:
        raise InputError(f"{line}: it was trained for another task or language: give another --teacher")
    if agreement < _LOW_AGREEMENT:
        log.warning(line)
    else:
        log.step("teacher", line)
    if refused > _MANY_REFUSED:
        log.warning(
            f"the teacher prefers 'no answer' to {100 * refused:.0f} % of these answers, and teaches that: fine-tune it on "
            "such data first, or lower --distill-weight"
        )


def _best(row: Arrays, excerpt: _Excerpt) -> list[int]:
    """The student's tokens of the highest start and end in a teacher's row; none if the row has no place."""
    if (row["start_places"] == _NONE).all() or (row["end_places"] == _NONE).all():
        return []
    soft = _soft(row, excerpt, 1.0)
    return [int(soft.starts[soft.start_probabilities.argmax()]), int(soft.ends[soft.end_probabilities.argmax()])]


class _LogitStore:
    """A teacher's logits by key, in memory and, with a folder, in files of ``_CHUNK`` rows, each written atomically.

    If the folder cannot be written, the log gets a note, and nothing more is stored.
    """

    def __init__(self, folder: Path | None, log: RunLog) -> None:
        self._folder, self._log = folder, log
        self._rows: dict[bytes, tuple[Arrays, int]] = {}
        if folder:
            sweep(folder)
        for path in sorted(folder.glob("*.npz")) if folder and folder.is_dir() else []:
            try:
                with path.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
                    rows = {name: archive[name] for name in _FIELDS}
                    self._keep([key.tobytes() for key in archive["keys"]], rows)
            except Exception:  # noqa: S112 - a damaged file can raise any error; its rows are computed again
                continue

    def __contains__(self, key: bytes) -> bool:
        return key in self._rows

    def __getitem__(self, key: bytes) -> Arrays:
        rows, number = self._rows[key]
        return {name: values[number] for name, values in rows.items()}

    def add(self, keys: Sequence[bytes], rows: Arrays) -> None:
        self._keep(keys, rows)
        if self._folder is None:
            return
        name = hashlib.sha256(b"".join(keys)).hexdigest()[:16]
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with writing(self._folder / f"{name}.npz") as stream:
                np.savez_compressed(
                    stream, allow_pickle=False, keys=np.frombuffer(b"".join(keys), np.uint8).reshape(-1, 16), **rows
                )
        except OSError as error:
            self._log.detail(
                f"teacher cache: {self._folder}: {error.strerror or one_line(error)}: its logits are not stored (--no-cache, "
                "or set QADEPLOY_CACHE)"
            )
            self._folder = None

    def _keep(self, keys: Sequence[bytes], rows: Arrays) -> None:
        self._rows.update({key: (rows, number) for number, key in enumerate(keys)})


def keep_layers(model: Any, count: int) -> Any:
    """A model with ``count`` evenly spaced layers of another, including the first and the last.

    Args:
        model: A transformers model whose layers are in one list, as in BERT. It cannot be used afterwards.
        count: How many layers to keep.

    Returns:
        The model that its configuration describes, as it will be loaded: if the index of a layer decides how far it
        sees (``global_attn_every_n_layers``), it is the new index.

    Raises:
        InputError: The model has fewer layers, or they are not in one list.
    """
    names = ("num_hidden_layers", "n_layers", "num_layers")
    name = next((n for n in names if isinstance(getattr(model.config, n, None), int)), None)
    total = getattr(model.config, name) if name else 0
    lists = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == total]
    if name is None or len(lists) != 1:
        raise InputError(
            f"--layers: the layers of a {model.config.model_type} model are not one list, so none can be removed"
        )
    if not 1 <= count <= total:
        raise InputError(f"--layers {count}: the base has {total} layers")
    chosen = np.round(np.linspace(0, total - 1, count)).astype(int).tolist()
    for index in reversed(range(total)):
        if index not in chosen:
            del lists[0][index]
    if types := getattr(model.config, "layer_types", None):
        model.config.layer_types = [types[index] for index in chosen]
    setattr(model.config, name, count)
    built = type(model)(model.config)
    built.load_state_dict(model.state_dict())
    return built.eval()
