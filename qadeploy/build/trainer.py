"""The Trainer that training uses: length-grouped batches, a loss over valid positions only, complete checkpoints."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from qadeploy.build import processes
from qadeploy.build.batches import LengthGroupedSampler, TokenBatches
from qadeploy.build.features import NO_LABEL, Feature, FeatureSet, collate_labels
from qadeploy.build.saves import Save, mark_complete, prune, remove, writing
from qadeploy.errors import FailureError
from qadeploy.qa.windows import pad_batch


class SpanArguments(TrainingArguments):
    """TrainingArguments of one device a process: with several GPUs at hand, the Trainer's would train on all by threads."""

    gpu = 0  # of a single process; of several each has its own

    @property
    def device(self) -> torch.device:
        """Where this process computes. With several processes accelerate says cpu:0, which torch.load refuses."""
        device: torch.device = super().device
        if device.type == "cuda" and self.world_size == 1:
            return torch.device("cuda", self.gpu)
        return torch.device("cpu") if device.type == "cpu" else device

    @property
    def n_gpu(self) -> int:
        """How many GPUs this process computes on: 0 or 1."""
        return min(int(super().n_gpu), 1)


def training_arguments(device: torch.device, **options: Any) -> SpanArguments:
    """Arguments for ``device``, whose precision is what ``options`` say, whatever was trained in this process before.

    The Trainer obeys the environment variable ACCELERATE_MIXED_PRECISION. TrainingArguments sets it where bf16 or
    fp16 is asked for and else keeps what it finds, so that a run in fp32 after one in bf16 would be bf16 too.
    """
    os.environ["ACCELERATE_MIXED_PRECISION"] = "no"
    arguments = SpanArguments(use_cpu=device.type == "cpu", **options)
    if device.type == "cuda" and arguments.world_size == 1:
        arguments.gpu = device.index or 0
        torch.cuda.set_device(arguments.device)  # what accelerate goes by
    return arguments


class SaveInside(TrainerCallback):
    """Saves a checkpoint every ``steps`` steps inside an epoch; at its end the Trainer saves one anyway."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Asks for a checkpoint."""
        if state.global_step % self.steps == 0 and state.epoch != int(state.epoch):
            control.should_save = True


class SpanTrainer(Trainer):
    """The Trainer with length-grouped batches and a loss over valid positions only.

    The loss is the cross entropy of start and end positions, averaged over the annotators of a
    question (their spans are equally good targets) and over start and end. Its softmax runs over
    the context and the null position, as the decoder's does.

    A batch's loss is the mean of its windows'. With ``batch_tokens`` batches have few long windows or many short ones,
    and a mean would give long ones the greater weight: there it is the sum of its windows' losses, over the mean number of
    windows in a batch, so that all windows of an epoch weigh the same. ``most_windows`` bounds such a batch.

    ``windows_seen`` counts the windows that this process has trained on.

    A checkpoint is marked complete once all of it is on the disk, with ``progress()`` of the run in its
    marker; only then are older ones removed.
    """

    def __init__(
        self,
        *args: Any,
        progress: Callable[[], dict[str, Any]] = dict,
        batch_tokens: int | None = None,
        most_windows: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.windows_seen = 0
        self.token_batches: TokenBatches | None = None
        if batch_tokens:
            lengths = [len(f.window) for f in self.train_dataset.features]
            self.token_batches = TokenBatches(lengths, batch_tokens, self.args.seed, most_windows)
        self.model_accepts_loss_kwargs = False
        self.progress = progress
        self._running_loss: Any = None
        self._carried: tuple[float, int] | None = None

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        features: FeatureSet = train_dataset if train_dataset is not None else self.train_dataset
        lengths = [len(f.window) for f in features.features]
        # The batch of all processes, which accelerate deals out in slices: the same batches, however many share them.
        return LengthGroupedSampler(lengths, self.args.train_batch_size * self.args.world_size, self.args.seed)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The Trainer's, or one of batches by tokens."""
        loader: DataLoader[Any]
        if self.token_batches is None:
            loader = super().get_train_dataloader()
        else:
            loader = DataLoader(
                self.train_dataset,
                batch_sampler=self.token_batches,
                collate_fn=self.data_collator,
                pin_memory=self.args.dataloader_pin_memory,
            )
            loader = self.accelerator.prepare(loader)
        return loader

    def go_on(self, saved: Save | None) -> None:
        """Trains, after ``saved`` where there is one, and loads the best epoch's weights."""
        # A model that accelerate has prepared for an evaluation it would leave as it is: without DistributedDataParallel.
        model = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        model._is_accelerate_prepared = False
        if self.args.world_size > 1:
            self.args.ddp_find_unused_parameters = self._has_unused_parameters()
        if saved is None:
            self.train()
        elif saved.progress["stopped"]:  # by its last epoch or by patience: nothing is left but to choose
            self.state = TrainerState.load_from_json(str(saved.folder / TRAINER_STATE_NAME))
            self._load_best_model()
        else:
            self._carried = (saved.progress["loss"], saved.progress["loss_since"])
            self.train(resume_from_checkpoint=str(saved.folder))

    def _has_unused_parameters(self) -> bool:
        """True where the logits do not depend on all parameters (XLNet's): these must be looked for at every step."""
        batch = self._prepare_inputs(self.data_collator([self.train_dataset[0]]))
        self.compute_loss(self.model, batch).backward()
        unused = any(p.grad is None for p in self.model.parameters() if p.requires_grad)
        self.model.zero_grad()
        return unused

    def _load_best_model(self) -> None:
        # The recorded path is from where the run began; the folder may have been moved since.
        self.state.best_model_checkpoint = str(self._checkpoint(self.state.best_global_step))
        super()._load_best_model()

    def _checkpoint(self, step: int) -> Path:
        return Path(self.args.output_dir) / f"checkpoint-{step}"

    def _maybe_log_save_evaluate(self, tr_loss: Any, *args: Any, **kwargs: Any) -> None:
        if self._carried:  # the part of the epoch before the interruption counts in its mean loss
            loss, self._globalstep_last_logged = self._carried
            tr_loss += loss
            self._carried = None
        self._running_loss = tr_loss
        super()._maybe_log_save_evaluate(tr_loss, *args, **kwargs)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        step, best = self.state.global_step, self.state.best_global_step
        folder = self._checkpoint(step)
        progress = {
            **self.progress(),
            "stopped": self.control.should_training_stop,
            "best_step": best,
            "loss": self._nested_gather(self._running_loss).mean().item(),
            "loss_since": self._globalstep_last_logged,
        }
        try:
            with writing(folder):
                super()._save_checkpoint(model, trial)
                processes.wait()
                if processes.is_first():
                    mark_complete(folder, progress)
        except FailureError:
            if processes.is_first():
                remove(folder)  # what there is of it only fills the disk
            raise
        if processes.is_first():
            prune(folder.parent, step, best)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of a batch, and with ``return_outputs`` its logits."""
        labels = ("start_positions", "end_positions", "answer_mask")
        outputs = model(**{k: v for k, v in inputs.items() if k not in labels})
        mask = inputs["answer_mask"]
        rows = slice(None if model.training else self._own_rows(len(mask)))
        losses = [
            span_loss(outputs.start_logits[rows], inputs["start_positions"][rows], mask[rows]),
            span_loss(outputs.end_logits[rows], inputs["end_positions"][rows], mask[rows]),
        ]
        loss = (losses[0] + losses[1]) / 2
        if model.training:
            self.windows_seen += len(mask)
            if self.token_batches is not None:
                loss = loss * (len(mask) * len(self.token_batches) / len(self.train_dataset))
        logits = {"start_logits": outputs.start_logits, "end_logits": outputs.end_logits}
        return (loss, logits) if return_outputs else loss

    def _own_rows(self, rows: int) -> int:
        """How many windows of an evaluation batch count: the last one is filled up, so that all processes have as many.

        What is gathered is cut by accelerate, but the loss is a mean before it is gathered.
        """
        state = self.accelerator.gradient_state
        if not state.end_of_dataloader or state.remainder <= 0:
            return rows
        own = state.remainder - self.args.process_index * rows
        return min(own, rows) if own > 0 else rows  # a process with none of its own is cut off altogether


def span_loss(logits: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy. ``logits`` [windows, tokens], ``positions`` [windows, annotations] (-100 fills), ``mask`` [windows, tokens]."""
    log_probabilities = torch.log_softmax(logits.float().masked_fill(~mask, -1e9), dim=-1)
    valid = positions != NO_LABEL
    picked = log_probabilities.gather(1, positions.clamp(min=0)) * valid
    return -(picked.sum(1) / valid.sum(1)).mean()


def collate(features: Sequence[Feature], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Model inputs and labels of a batch, padded to its longest window."""
    batch: dict[str, Any] = dict(pad_batch([f.window for f in features], pad_token_id))
    batch.update(collate_labels(features, batch["input_ids"].shape[1]))
    return {name: torch.from_numpy(values) for name, values in batch.items()}
