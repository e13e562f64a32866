"""The Trainer for span prediction: length-grouped batches, a loss over valid positions only, complete checkpoints."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader, Sampler
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from qadeploy.errors import FailureError
from qadeploy.training import distributed
from qadeploy.training.batches import LengthGroupedSampler, UnitBatches
from qadeploy.training.features import NO_LABEL
from qadeploy.training.saves import Save, mark_complete, prune, remove, writing
from qadeploy.training.training_set import TrainingSet
from qadeploy.training.transformers_versions import trainer_options

_INPUTS = ("input_ids", "attention_mask", "token_type_ids")  # all else in a batch is labels
_MASKED = -1e9  # a logit whose probability is 0
_MEAN_FILE = "mean_of_epochs.safetensors"


class SpanArguments(TrainingArguments):
    """TrainingArguments with one device per process. With several GPUs the original trains on all by threads."""

    gpu = 0  # for a single process; several have one each

    @property
    def device(self) -> torch.device:
        """Where this process computes. With several processes accelerate returns cpu:0, which torch.load refuses."""
        device: torch.device = super().device
        if device.type == "cuda" and self.world_size == 1:
            return torch.device("cuda", self.gpu)
        return torch.device("cpu") if device.type == "cpu" else device

    @property
    def n_gpu(self) -> int:
        """How many GPUs this process computes on: 0 or 1."""
        return min(int(super().n_gpu), 1)

    def get_warmup_steps(self, num_training_steps: int) -> int:
        """The number of warm-up steps. The learning rate is 0 in the first, so a single one would be a wasted step."""
        steps = int(super().get_warmup_steps(num_training_steps))
        return 0 if steps == 1 else steps


def training_arguments(device: torch.device, **options: Any) -> SpanArguments:
    """Arguments for ``device`` in the precision of ``options``, whatever was trained in this process before.

    ``options`` use the names of transformers 4.57, whatever release is installed.

    The Trainer obeys the environment variable ACCELERATE_MIXED_PRECISION. TrainingArguments sets it for bf16 and fp16 and
    otherwise keeps what it finds, so that a run in fp32 after one in bf16 would be in bf16 too.
    """
    os.environ["ACCELERATE_MIXED_PRECISION"] = "no"
    arguments = SpanArguments(use_cpu=device.type == "cpu", **trainer_options(options))
    if device.type == "cuda" and arguments.world_size == 1:
        arguments.gpu = device.index or 0
        torch.cuda.set_device(arguments.device)  # accelerate uses the current device
    return arguments


class SaveEverySteps(TrainerCallback):
    """Saves a checkpoint every ``steps`` steps inside an epoch; the Trainer itself saves one at the epoch's end."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Requests a checkpoint if it is due."""
        if state.global_step % self.steps == 0 and state.epoch != int(state.epoch):
            control.should_save = True


class MeanOfEpochs(TrainerCallback):
    """Keeps the mean of the weights at the ends of the epochs, in float32 on the CPU, if there is more than one epoch.

    It often answers better than any single epoch, above all after training on few examples (Izmailov et al., *Averaging
    Weights Leads to Wider Optima and Better Generalization*, UAI 2018).

    Attributes:
        epochs: How many epochs the mean is of.
    """

    def __init__(self) -> None:
        self.epochs = 0
        self._weights: list[torch.Tensor] = []

    def on_epoch_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Adds the weights to the mean."""
        if state.num_train_epochs < 2:
            return
        self.epochs += 1
        weights = _copies(model)
        for mean, weight in zip(self._weights, weights, strict=False):
            mean.lerp_(weight, 1 / self.epochs)
        self._weights = self._weights or weights

    def exchange(self, model: torch.nn.Module) -> None:
        """Puts the mean into the model and keeps the model's weights instead; a second call undoes it."""
        weights = _copies(model)
        with torch.no_grad():
            for parameter, mean in zip(model.parameters(), self._weights, strict=True):
                parameter.copy_(mean)
        self._weights = weights

    def save(self, folder: Path) -> None:
        """Writes the mean into a save of the run."""
        if self.epochs:
            save_file({str(i): weight for i, weight in enumerate(self._weights)}, folder / _MEAN_FILE)

    def load(self, folder: Path, epochs: int) -> None:
        """Continues with the mean of ``epochs`` epochs in a save of the run."""
        self.epochs = epochs
        found = load_file(folder / _MEAN_FILE) if epochs else {}
        self._weights = [found[str(i)] for i in range(len(found))]


def _copies(model: torch.nn.Module) -> list[torch.Tensor]:
    return [p.detach().to("cpu", torch.float32, copy=True) for p in model.parameters()]


class SpanTrainer(Trainer):
    """The Trainer with length-grouped batches and a loss over valid positions only.

    The loss is ``span_loss``, averaged over start and end; its softmax runs over the same positions as the decoder's. With a
    teacher, ``distill_weight`` of it is ``distillation_loss``. Questions with negatives add ``shared_loss``, so that logits are
    comparable between windows; these windows share a batch, as far as they fit in one. Windows that only a teacher labels take no
    part in it.

    The loss of a batch is the mean over its windows. Batches of units (with ``batch_tokens``, or negatives) have few windows or
    many, and a mean would give windows in small batches more weight: there the loss is the sum over the windows, divided by the
    mean number of windows in a batch, so that all windows of an epoch weigh the same.

    A checkpoint is marked complete once all of it is on the disk; only then are older ones removed.

    Args:
        run_state: Returns the state of the run, which is stored in the marker of a checkpoint.
        batch_tokens: The maximum tokens in a batch, padding included; None for batches of equal size.
        most_windows: The maximum windows in a batch of units.
        distill_weight: The teacher's share of the loss.
        temperature: The temperature of the teacher's distributions.

    Attributes:
        windows_seen: How many windows this process has trained on.
        batches: The batches of units; None if all batches are of equal size.
        mean: The mean of the weights over the epochs.
    """

    def __init__(
        self,
        *args: Any,
        run_state: Callable[[], dict[str, Any]] = dict,
        batch_tokens: int | None = None,
        most_windows: int | None = None,
        distill_weight: float = 0.0,
        temperature: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.windows_seen = 0
        self.mean = MeanOfEpochs()
        self.add_callback(self.mean)
        self.batches: UnitBatches | None = None
        training_set: TrainingSet | None = self.train_dataset
        self.grouped = bool(training_set and training_set.groups)
        if training_set and (batch_tokens or self.grouped):
            units = training_set.units if self.grouped else [[i] for i in range(len(training_set))]
            self.batches = UnitBatches(
                units,
                training_set.lengths,
                self.args.seed,
                tokens=batch_tokens,
                most=most_windows,
                answered=training_set.answered,
            )
        self.model_accepts_loss_kwargs = False
        self.run_state = run_state
        self._distill_weight, self._temperature = distill_weight, temperature
        self._loss_sum: Any = 0.0  # of the annotated labels alone, so that it is comparable with the eval loss
        self._loss_windows: Any = 0

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        # Batches of all processes together, which accelerate slices: they do not depend on how many processes share them.
        together = self.args.train_batch_size * self.args.world_size
        return LengthGroupedSampler(self.train_dataset.lengths, together, self.args.seed)

    def get_train_dataloader(self) -> Any:
        """The Trainer's own data loader, or one of batches of units."""
        if self.batches is None:
            return super().get_train_dataloader()
        return self.accelerator.prepare(
            DataLoader(
                self.train_dataset,
                batch_sampler=self.batches,
                collate_fn=self.data_collator,
                pin_memory=self.args.dataloader_pin_memory,
            )
        )

    def fit(self, saved: Save | None) -> None:
        """Trains from the beginning, or from ``saved`` on, and loads the best epoch's weights."""
        # accelerate does not prepare a model again after an evaluation, so it would lack DistributedDataParallel.
        model = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        model._is_accelerate_prepared = False
        if self.args.world_size > 1:
            self.args.ddp_find_unused_parameters = self._has_unused_parameters()
        if saved:
            self.mean.load(saved.folder, saved.run_state.get("mean_epochs", 0))
        if saved is None:
            self.train()
        elif saved.run_state["stopped"]:  # after its last epoch or by patience: only the evaluation is left
            self.state = TrainerState.load_from_json(str(saved.folder / TRAINER_STATE_NAME))
            self._load_best_model()
        else:
            if distributed.is_first():
                self._loss_sum, self._loss_windows = saved.run_state["loss"]
            self.train(resume_from_checkpoint=str(saved.folder))

    def _has_unused_parameters(self) -> bool:
        """Whether some parameters do not affect the logits (as in XLNet): DDP must look for these at every step."""
        batch = self._prepare_inputs(self.data_collator([self.train_dataset[0]]))
        self.compute_loss(self.model, batch).backward()
        unused = any(p.grad is None for p in self.model.parameters() if p.requires_grad)
        self.model.zero_grad()
        return unused

    def _load_best_model(self) -> None:
        # The recorded path is where the run began; the folder may have been moved since.
        self.state.best_model_checkpoint = str(self._checkpoint(self.state.best_global_step))
        super()._load_best_model()

    def _checkpoint(self, step: int) -> Path:
        return Path(self.args.output_dir) / f"checkpoint-{step}"

    def _losses(self) -> list[float]:
        """Sum of the losses on annotated labels since the last ``epoch_loss``, and their windows, of all processes."""
        own = torch.tensor(
            [float(self._loss_sum), float(self._loss_windows)], dtype=torch.float64, device=self.args.device
        )
        return [float(x) for x in self.accelerator.reduce(own, "sum")]

    def epoch_loss(self) -> float | None:
        """The mean loss on annotated labels since the last call; None if nothing was trained."""
        total, windows = self._losses()
        self._loss_sum, self._loss_windows = 0.0, 0
        return round(total / windows, 6) if windows else None  # rounded, so that a resumed run has the same

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        step, best = self.state.global_step, self.state.best_global_step
        folder = self._checkpoint(step)
        run_state = {
            **self.run_state(),
            "stopped": self.control.should_training_stop,
            "best_step": best,
            "loss": self._losses(),
            "mean_epochs": self.mean.epochs,
        }
        try:
            with writing(folder):
                super()._save_checkpoint(model, trial)
                distributed.wait()
                if distributed.is_first():
                    self.mean.save(folder)
                    mark_complete(folder, run_state)
        except FailureError:
            if distributed.is_first():
                remove(folder)  # an incomplete save only fills the disk
            raise
        if distributed.is_first():
            prune(folder.parent, step, best)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of a batch, and its logits with ``return_outputs``."""
        outputs = model(**{k: v for k, v in inputs.items() if k in _INPUTS})
        sides = (("start", outputs.start_logits), ("end", outputs.end_logits))
        if model.training:
            loss = sum(self._training_loss(side, logits, inputs) for side, logits in sides) / 2
            self.windows_seen += len(inputs["groups"])
            if self.batches is not None:
                loss = loss * (len(inputs["groups"]) * len(self.batches) / len(self.train_dataset))
        else:
            mask = inputs["answer_mask"]
            rows = slice(self._own_rows(len(mask)))
            loss = sum(
                span_loss(logits[rows], inputs[f"{side}_positions"][rows], mask[rows]).mean() for side, logits in sides
            ) / len(sides)
        logits = {"start_logits": outputs.start_logits, "end_logits": outputs.end_logits}
        return (loss, logits) if return_outputs else loss

    def _training_loss(self, side: str, logits: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
        """The mean loss of a batch's windows for their start or end positions."""
        positions, mask, labelled = inputs[f"{side}_positions"], inputs["answer_mask"], inputs["labelled"]
        hard = span_loss(logits, positions, mask) * labelled
        with torch.no_grad():
            self._loss_sum += hard.sum().double() / 2  # half of it for the starts, half for the ends
            self._loss_windows += labelled.sum() / 2
        soft = inputs.get(f"soft_{side}s")
        if soft is not None:
            taught = distillation_loss(logits, soft, mask, self._temperature)
            hard = (1 - self._distill_weight) * hard + self._distill_weight * taught
        total: torch.Tensor = hard.sum()
        if self.grouped:
            shared = (logits, positions, mask, inputs["groups"], inputs["null_positions"])
            total = total + shared_loss(*(values[labelled] for values in shared)).sum()
        return total / len(mask)

    def _own_rows(self, rows: int) -> int:
        """How many windows of an evaluation batch count: accelerate fills up the last, so that processes get equal shares.

        It cuts the extra windows from gathered outputs, but the loss is averaged before it is gathered.
        """
        state = self.accelerator.gradient_state
        if not state.end_of_dataloader or state.remainder <= 0:
            return rows
        own = state.remainder - self.args.process_index * rows
        return min(own, rows) if own > 0 else rows  # accelerate ignores a process without windows of its own


def span_loss(logits: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The cross entropy of each window, averaged over its annotations.

    Args:
        logits: ``[windows, tokens]``.
        positions: ``[windows, annotations]``, padded with -100.
        mask: ``[windows, tokens]``, true where a span may start or end.

    Returns:
        ``[windows]``.
    """
    log_probabilities = torch.log_softmax(logits.float().masked_fill(~mask, _MASKED), dim=-1)
    valid = positions != NO_LABEL
    picked = log_probabilities.gather(1, positions.clamp(min=0)) * valid
    return -picked.sum(1) / valid.sum(1)


def distillation_loss(
    logits: torch.Tensor, probabilities: torch.Tensor, mask: torch.Tensor, temperature: float
) -> torch.Tensor:
    """The cross entropy with a teacher's distribution at a temperature, times its square (Hinton et al. 2015, section 2).

    Args:
        logits: The student's, ``[windows, tokens]``.
        probabilities: The teacher's at this temperature, ``[windows, tokens]``.
        mask: ``[windows, tokens]``, true where a span may start or end.
        temperature: T.

    Returns:
        ``[windows]``.
    """
    log_probabilities = torch.log_softmax(logits.float().masked_fill(~mask, _MASKED) / temperature, dim=-1)
    return -(probabilities * log_probabilities.masked_fill(~mask, 0.0)).sum(1) * temperature**2


def shared_loss(
    logits: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor, groups: torch.Tensor, nulls: torch.Tensor
) -> torch.Tensor:
    """The loss of each question's annotated positions among all context positions of all its windows.

    Minus the logarithm of their summed probability under one softmax (Clark and Gardner 2018, section 3.2).

    Args:
        logits: ``[windows, tokens]``.
        positions: ``[windows, annotations]``, padded with -100; the null position in windows without an answer.
        mask: ``[windows, tokens]``, true on context tokens and the null position.
        groups: ``[windows]``, the question of each window.
        nulls: ``[windows]``, the null position of each window.

    Returns:
        ``[questions with an answer and more than one window]``.
    """
    scores = logits.float().masked_fill(~mask, _MASKED).scatter(1, nulls[:, None], _MASKED)
    right = (positions != NO_LABEL) & (positions != nulls[:, None])
    targets = torch.zeros_like(scores).scatter_add(1, positions.clamp(min=0), right.float()) > 0
    every = torch.logsumexp(scores, dim=1)
    wanted = torch.logsumexp(scores.masked_fill(~targets, _MASKED), dim=1)
    of, own = torch.unique(groups, return_inverse=True)
    member = own[None, :] == torch.arange(len(of), device=own.device)[:, None]  # [questions, windows]
    totals = [torch.logsumexp(x[None, :].masked_fill(~member, _MASKED), dim=1) for x in (every, wanted)]
    counts = (member & targets.any(1)[None, :]).any(1) & (member.sum(1) > 1)
    return (totals[0] - totals[1])[counts]
