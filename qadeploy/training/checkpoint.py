"""Hugging Face checkpoint folders: loading and saving a model with its encoder and its stored settings.

A checkpoint folder is what ``save_pretrained`` writes, with ``qadeploy.json`` (settings) if qadeploy trained it. Any other
question-answering checkpoint loads with default settings.
"""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForQuestionAnswering, AutoTokenizer
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME, has_file

from qadeploy.core.settings import QaSettings
from qadeploy.core.windows import DEFAULT_MAX_SEQ_LEN, Encoder, EncoderConfig, is_rust_error, pad_batch
from qadeploy.errors import CheckpointError, InputError, one_line
from qadeploy.inference.answerer import Answerer, LogitsModel
from qadeploy.inference.cuda import in_batches, unpadded
from qadeploy.machine import usable_cpus
from qadeploy.records import Logits, Window
from qadeploy.training.torch_device import torch_device
from qadeploy.training.transformers_versions import silence

SETTINGS_FILE = "qadeploy.json"
_UNLIMITED = 100_000
# A file of weights or, for weights in several files, their index.
_SAFE = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)
_PICKLES = (WEIGHTS_NAME, WEIGHTS_INDEX_NAME)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A loaded model (float32, eval mode), its tokenizer (for saving), encoder and settings.

    ``new_head`` is true if the checkpoint is a bare encoder, so that its answer head is random.
    """

    name: str
    model: Any
    tokenizer: Any
    encoder: Encoder
    settings: QaSettings
    new_head: bool


@dataclass(frozen=True, slots=True)
class Hub:
    """How a model is fetched from the hub.

    Attributes:
        revision: The model's branch, tag or commit.
        token: An access token. If None, the library uses the environment variable HF_TOKEN, then a stored login.
        trust_remote_code: Whether Python code that comes with a model may run on this machine.
        allow_pickle: Whether weights may be read from a pickle; torch then loads nothing but tensors from it.
    """

    revision: str | None = None
    token: str | None = field(default=None, repr=False)
    trust_remote_code: bool = False
    allow_pickle: bool = False


def load_checkpoint(name: str | Path, hub: Hub | None = None, **overrides: Any) -> Checkpoint:
    """Loads a checkpoint.

    Args:
        name: A folder, or a name on the hub.
        hub: How a model is fetched from the hub.
        overrides: Values to change in the model's configuration; names that it lacks are ignored.

    Raises:
        CheckpointError: There is no such model, it has no fast tokenizer or accepts no attention_mask, a file is damaged,
            or the weights are a pickle, which ``hub`` does not allow.
        InputError: The stored settings make no sense, a revision of a folder was requested, or the tokenizer leaves
            characters without a token.
    """
    name = str(name)
    folder = Path(name)
    hub = hub or Hub()
    if folder.is_dir() and hub.revision is not None:
        raise InputError(f"{name}: is a folder, which has no revisions: --model-revision is for a model on the hub")
    if folder.is_dir() and not (folder / "config.json").is_file():
        inside = folder / "checkpoint"
        hint = f": give {inside}" if (inside / "config.json").is_file() else ""
        raise CheckpointError(f"{name}: no config.json in it: this is not a checkpoint folder{hint}")
    silence()
    torch.set_num_threads(min(torch.get_num_threads(), usable_cpus()))  # torch ignores CPU quotas
    # trust_remote_code must not be None: transformers would then ask on the terminal.
    access = {"revision": hub.revision or "main", "token": hub.token, "trust_remote_code": hub.trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(name, **access)
        for key, value in overrides.items():
            if hasattr(config, key):
                setattr(config, key, value)
        tokenizer = AutoTokenizer.from_pretrained(name, use_fast=True, **access)
        if not hub.allow_pickle:
            refuse_pickle(name, hub)
        model, loading = AutoModelForQuestionAnswering.from_pretrained(
            name,
            config=config,
            dtype=torch.float32,
            output_loading_info=True,
            use_safetensors=None if hub.allow_pickle else True,
            weights_only=True,
            **access,
        )
    except CheckpointError:
        raise
    except BaseException as error:  # transformers raises OSError, ValueError, KeyError, SafetensorError, ...
        if not is_rust_error(error):
            raise
        raise CheckpointError(_explain(name, folder, error)) from error
    if not getattr(tokenizer, "is_fast", False):
        raise CheckpointError(f"{name}: has no fast tokenizer (tokenizer.json), which offsets need")
    if "attention_mask" not in inspect.signature(model.forward).parameters:
        raise CheckpointError(
            f"{name}: {config.model_type} models accept no attention_mask, so they would read padding as text: choose another kind"
        )
    missing, kinds = list(loading["missing_keys"]), config.architectures or []
    if missing and folder.is_dir() and any("QuestionAnswering" in kind for kind in kinds):
        raise CheckpointError(f"{name}: the weights lack {', '.join(missing[:3])}: the file does not fit config.json")
    model.eval()
    encoder = Encoder(tokenizer.backend_tokenizer, encoder_config(model, tokenizer))
    encoder.check_coverage(name)
    _zero_padding_embedding(model, encoder.config.pad_token_id)
    settings = _settings(folder, encoder.config.position_limit)
    return Checkpoint(name, model, tokenizer, encoder, settings, new_head=bool(missing))


def weight_files(folder: Path) -> list[Path]:
    """The files in a folder that transformers loads weights from; none if it is no checkpoint folder."""
    for name in filter(lambda name: (folder / name).is_file(), (*_SAFE, *_PICKLES)):
        if name.endswith(".json"):
            index = json.loads((folder / name).read_text(encoding="utf-8"))
            return [folder / shard for shard in sorted(set(index["weight_map"].values()))]
        return [folder / name]
    return []


def refuse_pickle(name: str, hub: Hub | None = None) -> None:
    """Refuses a checkpoint whose weights exist only as a pickle, since reading a pickle can run code.

    Args:
        name: A folder, or a name on the hub.
        hub: How a model is fetched from the hub.

    Raises:
        CheckpointError: The checkpoint has a pickle but no safetensors file.
        OSError: The hub has no such model, or the token gives no access to it.
    """
    hub = hub or Hub()
    # Otherwise transformers asks a service of the hub to convert the model and propose the result to its author.
    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "true")
    has = partial(has_file, name, revision=hub.revision or "main", token=hub.token)
    pickle = "" if any(map(has, _SAFE)) else next(filter(has, _PICKLES), "")
    if pickle:
        raise CheckpointError(
            f"{name}: its weights exist only as a pickle ({pickle}), which can run code when it is read. Use a revision or a "
            "copy with model.safetensors: https://huggingface.co/spaces/safetensors/convert converts a model on the hub, and "
            "save_pretrained a folder. Or give --allow-pickle to train, evaluate, ask or export: torch then reads nothing "
            "but tensors from it, and train writes model.safetensors"
        )


def _explain(name: str, folder: Path, error: BaseException) -> str:
    reason = one_line(error, 300)
    if "trust_remote_code" in str(error):  # transformers raises no specific type, only this text
        return (
            f"{name}: comes with its own Python code, which does not run unless you allow it: read it, and if you trust it give "
            f"--trust-remote-code ({reason})"
        )
    if folder.is_dir():
        return f"{name}: the checkpoint cannot be loaded: {reason}"
    return (
        f"{name}: no such folder, and no model of that name could be loaded from the hub "
        f"(offline? misspelt?). Give a checkpoint folder, or download the model with a network connection. ({reason})"
    )


def encoder_config(model: Any, tokenizer: Any) -> EncoderConfig:
    """Derives the encoder's configuration from the model's forward, its configuration and its tokenizer."""
    takes = "token_type_ids" in inspect.signature(model.forward).parameters
    default = 3 if model.config.model_type == "xlnet" else 2  # XLNet gives CLS a type of its own
    kinds = int(getattr(model.config, "type_vocab_size", default) or 0)
    # The weights, not the tokenizer's model_max_length, limit the length of an input.
    limit = int(tokenizer.model_max_length) if tokenizer.model_max_length < _UNLIMITED else _UNLIMITED
    positions = getattr(model.config, "max_position_embeddings", None)
    if isinstance(positions, int) and positions > 0:
        # RoBERTa and similar models count positions from pad_token_id + 1, so that many positions are unusable.
        limit = positions - ((model.config.pad_token_id or 0) + 1 if _offset_positions(model) else 0)
    return EncoderConfig(
        segments=kinds if takes and (kinds > 1 or not _offset_positions(model)) else 0,
        context_first=tokenizer.padding_side == "left",
        null_token_id=tokenizer.cls_token_id,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0,
        position_limit=limit,
    )


def _zero_padding_embedding(model: Any, pad_token_id: int) -> None:
    """Makes the logits of a padded window equal those of the window alone if the model mixes neighbouring embeddings.

    MobileBERT's three-token input lets the last token see the embedding after it, past the attention mask: zeros at the end of
    an input, the padding's embedding within a batch. A text holds no padding, so zeroing that embedding changes nothing else.
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
    # Other programs load tokenizer.json, so it must not contain the base model's truncation or padding.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.model_max_length = checkpoint.encoder.config.position_limit
    checkpoint.model.save_pretrained(folder, safe_serialization=True)
    tokenizer.save_pretrained(folder)
    (folder / SETTINGS_FILE).write_text(json.dumps(settings.to_dict(), indent=2) + "\n", encoding="utf-8")


class TorchModel(LogitsModel):
    """A PyTorch model as a function from windows to logits, in padded batches of similar length.

    It runs on the model's device. In float32 (without ``bf16``) it is the reference that exports are compared with.
    """

    BATCH = 16

    def __init__(self, model: Any, pad_token_id: int, *, bf16: bool = False) -> None:
        self.model = model
        self.pad_token_id = pad_token_id
        self._bf16 = bf16

    def run(self, windows: Sequence[Window]) -> list[Logits]:
        """Start and end logits of each window, float32 ``[tokens]`` each, in order."""
        order = sorted(range(len(windows)), key=lambda i: -len(windows[i]))
        rows = [order[begin : begin + self.BATCH] for begin in range(0, len(order), self.BATCH)]
        return in_batches(windows, rows, self.run_batch)

    def run_batch(self, windows: Sequence[Window]) -> list[Logits]:
        """Like ``run``, as one padded batch; the padding's logits are cut off."""
        batch = {
            name: torch.from_numpy(values).to(self.model.device)
            for name, values in pad_batch(windows, self.pad_token_id).items()
        }
        with torch.inference_mode(), torch.autocast(self.model.device.type, torch.bfloat16, enabled=self._bf16):
            output = self.model(**batch)
        return unpadded([x.float().cpu().numpy() for x in (output.start_logits, output.end_logits)], windows)


def torch_answerer(checkpoint: Checkpoint, device: str = "cpu") -> Answerer:
    """Makes an answerer that computes logits with PyTorch; encoder and decoder are the same as for a bundle.

    Args:
        checkpoint: The checkpoint.
        device: auto, cpu, cuda or cuda:N.

    Raises:
        InputError: Any other device.
        DeviceError: CUDA was requested but is not available.
        CheckpointError: The model has no trained answer head.
    """
    if checkpoint.new_head:
        raise CheckpointError(f"{checkpoint.name}: has no question-answering head, only an encoder: train it first")
    checkpoint.model.to(torch_device(device))
    model = TorchModel(checkpoint.model, checkpoint.encoder.config.pad_token_id)
    return Answerer(checkpoint.encoder, checkpoint.settings, model)
