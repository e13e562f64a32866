"""A Hugging Face checkpoint folder as a model: loading, the encoder it needs, its stored settings.

A checkpoint folder is what ``save_pretrained`` writes, with ``qadeploy.json`` (settings) beside it
where qadeploy trained it. Any other question-answering checkpoint loads with default settings.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForQuestionAnswering, AutoTokenizer
from transformers.utils import logging as transformers_logging

from qadeploy.core.settings import QaSettings
from qadeploy.core.windows import DEFAULT_MAX_SEQ_LEN, Encoder, EncoderConfig, pad_batch
from qadeploy.errors import CheckpointError, InputError
from qadeploy.inference.answerer import Answerer
from qadeploy.inference.session import Pending
from qadeploy.records import FloatArray, Window
from qadeploy.training.torch_device import torch_device

SETTINGS_FILE = "qadeploy.json"
_UNLIMITED = 100_000


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A loaded model (float32, eval mode), its tokenizer (for saving), encoder and settings.

    ``new_head`` is true where the checkpoint is a bare encoder whose answer head is still random.
    """

    name: str
    model: Any
    tokenizer: Any
    encoder: Encoder
    settings: QaSettings
    new_head: bool


@dataclass(frozen=True, slots=True)
class Hub:
    """How a model is fetched from the hub: its branch, tag or commit, the token to ask with, and whether its code may run.

    Without a token the library's own sources count: the environment variable HF_TOKEN, then a login. Code that a model
    brings along is foreign code on this machine, so it stays unread unless ``trust_remote_code``.
    """

    revision: str | None = None
    token: str | None = field(default=None, repr=False)
    trust_remote_code: bool = False


def load_checkpoint(name: str | Path, hub: Hub | None = None, **overrides: Any) -> Checkpoint:
    """Loads a checkpoint folder or a hub name. ``overrides`` change the model's configuration.

    Raises CheckpointError: no such model (offline or not), no fast tokenizer, a damaged file;
    InputError: stored settings that make no sense, a revision of a folder.
    """
    name = str(name)
    folder = Path(name)
    hub = hub or Hub()
    if folder.is_dir() and hub.revision is not None:
        raise InputError(f"{name}: is a folder, which has no revisions: model_revision is for a model of the hub")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise CheckpointError(f"{name}: no config.json in it: this is not a checkpoint folder")
    transformers_logging.set_verbosity_error()
    # False, not None, which would ask on the terminal.
    access = {"revision": hub.revision or "main", "token": hub.token, "trust_remote_code": hub.trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(name, **access)
        for key, value in overrides.items():
            if hasattr(config, key):
                setattr(config, key, value)
        tokenizer = AutoTokenizer.from_pretrained(name, use_fast=True, **access)
        model, loading = AutoModelForQuestionAnswering.from_pretrained(
            name, config=config, dtype=torch.float32, output_loading_info=True, **access
        )
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, SafetensorError, ...
        raise CheckpointError(_explain(name, folder, error)) from error
    if not getattr(tokenizer, "is_fast", False):
        raise CheckpointError(f"{name}: has no fast tokenizer (tokenizer.json), which offsets need")
    broken = list(loading["missing_keys"])
    if broken and folder.is_dir() and not _is_bare(folder):
        raise CheckpointError(f"{name}: the weights lack {', '.join(broken[:3])}: the file does not fit config.json")
    model.eval()
    encoder = Encoder(tokenizer.backend_tokenizer, encoder_config(model, tokenizer))
    _silence_padding(model, encoder.config.pad_token_id)
    return Checkpoint(
        name, model, tokenizer, encoder, _settings(folder, encoder.config.position_limit), bool(loading["missing_keys"])
    )


def _is_bare(folder: Path) -> bool:
    architectures = json.loads((folder / "config.json").read_text()).get("architectures") or []
    return not any("QuestionAnswering" in a for a in architectures)


def _explain(name: str, folder: Path, error: Exception) -> str:
    reason = " ".join(str(error).split())[:300]
    if "trust_remote_code" in str(error):
        return (
            f"{name}: brings Python code of its own, which is not run unless you say so: read it, and if you trust it give "
            f"--trust-remote-code ({reason})"
        )
    if folder.is_dir():
        return f"{name}: the checkpoint cannot be loaded: {reason}"
    return (
        f"{name}: no such folder, and no model of that name could be loaded from the hub "
        f"(offline? misspelt?). Give a checkpoint folder, or download it where there is a network. ({reason})"
    )


def encoder_config(model: Any, tokenizer: Any) -> EncoderConfig:
    """What the encoder must know, read off the model's forward, its configuration and its tokenizer."""
    takes = "token_type_ids" in inspect.signature(model.forward).parameters
    default = 3 if model.config.model_type == "xlnet" else 2  # XLNet gives CLS a type of its own
    kinds = int(getattr(model.config, "type_vocab_size", default) or 0)
    # The weights, not the tokenizer's advice, say how long an input may be.
    limit = int(tokenizer.model_max_length) if tokenizer.model_max_length < _UNLIMITED else _UNLIMITED
    positions = getattr(model.config, "max_position_embeddings", None)
    if isinstance(positions, int) and positions > 0:
        # RoBERTa's kind counts positions from pad_token_id + 1, so that many are not usable.
        limit = positions - ((model.config.pad_token_id or 0) + 1 if _offset_positions(model) else 0)
    return EncoderConfig(
        segments=kinds if takes and (kinds > 1 or not _offset_positions(model)) else 0,
        context_first=tokenizer.padding_side == "left",
        null_token_id=tokenizer.cls_token_id,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0,
        position_limit=limit,
    )


def _silence_padding(model: Any, pad_token_id: int) -> None:
    """Makes a padded window's logits those of the window alone where neighbouring embeddings are mixed.

    MobileBERT's three-token input lets the last token see the embedding after it, past the attention mask: zeros
    at the end of an input, the padding's row within a batch. A text holds no padding, so zeros there change nothing else.
    """
    if getattr(model.config, "trigram_input", False):
        with torch.no_grad():
            model.get_input_embeddings().weight[pad_token_id] = 0.0


def _offset_positions(model: Any) -> bool:
    embeddings = getattr(model.base_model, "embeddings", None)
    return getattr(embeddings, "padding_idx", None) is not None and hasattr(embeddings, "position_embeddings")


def _settings(folder: Path, limit: int) -> QaSettings:
    path = folder / SETTINGS_FILE
    if path.is_file():
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"{path}: not valid JSON: {error}") from error
        return QaSettings.from_dict(values, str(path))
    seq = min(DEFAULT_MAX_SEQ_LEN, limit)
    return QaSettings(max_seq_len=seq, doc_stride=min(QaSettings().doc_stride, seq // 3))


def save_checkpoint(checkpoint: Checkpoint, settings: QaSettings, folder: Path) -> None:
    """Writes weights (safetensors), config, tokenizer and settings into ``folder``."""
    tokenizer = checkpoint.tokenizer
    # What lies in the file is what others load: no truncation or padding left over from the base model.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.model_max_length = checkpoint.encoder.config.position_limit
    checkpoint.model.save_pretrained(folder, safe_serialization=True)
    tokenizer.save_pretrained(folder)
    (folder / SETTINGS_FILE).write_text(json.dumps(settings.to_dict(), indent=2) + "\n", encoding="utf-8")


class TorchModel:
    """A PyTorch model as a function from windows to logits, in padded batches of like length.

    Runs on the device that the model is on, in float32: the reference that exports are held against.
    """

    BATCH = 16

    def __init__(self, model: Any, pad_token_id: int) -> None:
        self.model = model
        self.pad_token_id = pad_token_id

    def run(self, windows: Sequence[Window]) -> list[tuple[FloatArray, FloatArray]]:
        """Start and end logits of each window, float32 ``[tokens]`` each, in order."""
        order = sorted(range(len(windows)), key=lambda i: -len(windows[i]))
        logits: dict[int, tuple[FloatArray, FloatArray]] = {}
        for begin in range(0, len(order), self.BATCH):
            rows = order[begin : begin + self.BATCH]
            logits.update(zip(rows, self.run_batch([windows[i] for i in rows]), strict=True))
        return [logits[i] for i in range(len(windows))]

    def start(self, windows: Sequence[Window]) -> Pending:
        """``run``, when the result is asked for."""
        return Pending(partial(self.run, windows))

    def run_batch(self, windows: Sequence[Window]) -> list[tuple[FloatArray, FloatArray]]:
        """Like ``run``, as one padded batch; the padding's logits are cut off."""
        batch = {
            name: torch.from_numpy(values).to(self.model.device)
            for name, values in pad_batch(windows, self.pad_token_id).items()
        }
        with torch.inference_mode():
            output = self.model(**batch)
        starts, ends = (x.float().cpu().numpy() for x in (output.start_logits, output.end_logits))
        return [(starts[i, : len(w)], ends[i, : len(w)]) for i, w in enumerate(windows)]


def torch_answerer(checkpoint: Checkpoint, device: str = "cpu") -> Answerer:
    """The checkpoint as an answerer: the same encoder and decoder, PyTorch in between.

    ``device`` is auto, cpu, cuda or cuda:N. Raises InputError on another name, DeviceError where CUDA
    is asked for and not to be had, CheckpointError where the model has no trained answer head.
    """
    if checkpoint.new_head:
        raise CheckpointError(f"{checkpoint.name}: has no question-answering head, only an encoder: train it first")
    checkpoint.model.to(torch_device(device))
    model = TorchModel(checkpoint.model, checkpoint.encoder.config.pad_token_id)
    return Answerer(checkpoint.encoder, checkpoint.settings, model)
