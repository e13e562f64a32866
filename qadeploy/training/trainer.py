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

from qadeploy.errors import FailureError
from qadeploy.training import distributed
from qadeploy.training.batches import LengthGroupedSampler, UnitBatches
from qadeploy.training.features import NO_LABEL
from qadeploy.training.saves import Save, mark_complete, prune, remove, writing
from qadeploy.training.training_set import TrainingSet
from qadeploy.training.training_set import collate as collate_arrays

_LABELS = frozenset(
    {
        "start_positions",
        "end_positions",
        "answer_mask",
        "null_positions",
        "groups",
        "labelled",
        "soft_starts",
        "soft_ends",
    }
)
_NEVER = -1e9  # a logit without probability


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

    Two parts may join it. With a teacher, ``distill_weight`` of it is the cross entropy with the teacher's distribution at
    ``temperature``, times its square. And questions that have negatives add the loss of their start and end positions among
    all context positions of all windows of theirs (Clark and Gardner 2018, section 3.2: the summed objective), so that
    logits compare between windows; they share a batch for it.

    A batch's loss is the mean of its windows'. Batches of units (with ``batch_tokens``, or negatives) have few windows or many,
    and a mean would give those of few the greater weight: there it is the sum of its windows' losses, over the mean number
    of windows in a batch, so that all windows of an epoch weigh the same. ``most_windows`` bounds such a batch.

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
        distill_weight: float = 0.0,
        temperature: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.windows_seen = 0
        self.batches: UnitBatches | None = None
        training_set: TrainingSet | None = self.train_dataset
        self.grouped = bool(training_set and training_set.groups) and self.args.world_size == 1
        if training_set and (batch_tokens or self.grouped):
            units = training_set.units if self.grouped else [[i] for i in range(len(training_set))]
            self.batches = UnitBatches(
                units, training_set.lengths, self.args.seed, tokens=batch_tokens, most=most_windows
            )
        self.model_accepts_loss_kwargs = False
        self.progress = progress
        self._distill_weight, self._temperature = distill_weight, temperature
        self._loss_sum: Any = 0.0  # of the annotated labels alone, so that it compares with the eval loss
        self._loss_windows: Any = 0

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        # The batch of all processes, which accelerate deals out in slices: the same batches, however many share them.
        together = self.args.train_batch_size * self.args.world_size
        return LengthGroupedSampler(self.train_dataset.lengths, together, self.args.seed)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The Trainer's, or one of batches of units."""
        loader: DataLoader[Any]
        if self.batches is None:
            loader = super().get_train_dataloader()
        else:
            loader = DataLoader(
                self.train_dataset,
                batch_sampler=self.batches,
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
            if distributed.is_first():
                self._loss_sum, self._loss_windows = saved.progress["loss"]
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

    def _losses(self) -> list[float]:
        """The sum of the losses with the annotated labels since the last ``epoch_loss``, and their windows, of all processes."""
        own = torch.tensor(
            [float(self._loss_sum), float(self._loss_windows)], dtype=torch.float64, device=self.args.device
        )
        return [float(x) for x in self.accelerator.reduce(own, "sum")]

    def epoch_loss(self) -> float | None:
        """The mean loss with the annotated labels of the windows trained on since it was last asked for."""
        total, windows = self._losses()
        self._loss_sum, self._loss_windows = 0.0, 0
        return round(total / windows, 6) if windows else None  # so that a run in two parts has the same

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        step, best = self.state.global_step, self.state.best_global_step
        folder = self._checkpoint(step)
        progress = {
            **self.progress(),
            "stopped": self.control.should_training_stop,
            "best_step": best,
            "loss": self._losses(),
        }
        try:
            with writing(folder):
                super()._save_checkpoint(model, trial)
                distributed.wait()
                if distributed.is_first():
                    mark_complete(folder, progress)
        except FailureError:
            if distributed.is_first():
                remove(folder)  # what there is of it only fills the disk
            raise
        if distributed.is_first():
            prune(folder.parent, step, best)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of a batch, and with ``return_outputs`` its logits."""
        outputs = model(**{k: v for k, v in inputs.items() if k not in _LABELS})
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
            self._loss_sum += hard.sum().double() / 2  # half of it is the starts', half the ends'
            self._loss_windows += labelled.sum() / 2
        soft = inputs.get(f"soft_{side}s")
        if soft is not None:
            taught = distillation_loss(logits, soft, mask, self._temperature)
            hard = (1 - self._distill_weight) * hard + self._distill_weight * taught
        total: torch.Tensor = hard.sum()
        if self.grouped:
            total = total + shared_loss(logits, positions, mask, inputs["groups"], inputs["null_positions"]).sum()
        return total / len(mask)

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
    """The cross entropy of each window, averaged over its annotations.

    Args:
        logits: ``[windows, tokens]``.
        positions: ``[windows, annotations]``, -100 fills.
        mask: ``[windows, tokens]``, true where a position is possible.

    Returns:
        ``[windows]``.
    """
    log_probabilities = torch.log_softmax(logits.float().masked_fill(~mask, _NEVER), dim=-1)
    valid = positions != NO_LABEL
    picked = log_probabilities.gather(1, positions.clamp(min=0)) * valid
    return -picked.sum(1) / valid.sum(1)


def distillation_loss(
    logits: torch.Tensor, shares: torch.Tensor, mask: torch.Tensor, temperature: float
) -> torch.Tensor:
    """The cross entropy with a teacher's distribution at a temperature, times its square (Hinton et al. 2015, section 2).

    Args:
        logits: The student's, ``[windows, tokens]``.
        shares: The teacher's probabilities at this temperature, ``[windows, tokens]``.
        mask: ``[windows, tokens]``, true where a position is possible.
        temperature: T.

    Returns:
        ``[windows]``.
    """
    log_probabilities = torch.log_softmax(logits.float().masked_fill(~mask, _NEVER) / temperature, dim=-1)
    return -(shares * log_probabilities.masked_fill(~mask, 0.0)).sum(1) * temperature**2


def shared_loss(
    logits: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor, groups: torch.Tensor, nulls: torch.Tensor
) -> torch.Tensor:
    """The loss of each question's annotated positions among all context positions of all its windows.

    Minus the logarithm of their summed probability under one softmax (Clark and Gardner 2018, section 3.2).

    Args:
        logits: ``[windows, tokens]``.
        positions: ``[windows, annotations]``, -100 fills, the null position in windows without an answer.
        mask: ``[windows, tokens]``, true on context tokens and the null position.
        groups: ``[windows]``, the question of each.
        nulls: ``[windows]``, the null position of each.

    Returns:
        ``[questions with an answer and more than one window]``.
    """
    scores = logits.float().masked_fill(~mask, _NEVER).scatter(1, nulls[:, None], _NEVER)
    right = (positions != NO_LABEL) & (positions != nulls[:, None])
    targets = torch.zeros_like(scores).scatter_add(1, positions.clamp(min=0), right.float()) > 0
    every = torch.logsumexp(scores, dim=1)
    wanted = torch.logsumexp(scores.masked_fill(~targets, _NEVER), dim=1)
    of, own = torch.unique(groups, return_inverse=True)
    member = own[None, :] == torch.arange(len(of), device=own.device)[:, None]  # [questions, windows]
    totals = [torch.logsumexp(x[None, :].masked_fill(~member, _NEVER), dim=1) for x in (every, wanted)]
    counts = (member & targets.any(1)[None, :]).any(1) & (member.sum(1) > 1)
    return (totals[0] - totals[1])[counts]


def collate(items: Sequence[Any], pad_token_id: int) -> dict[str, torch.Tensor]:
    """``training_set.collate`` as tensors."""
    return {name: torch.from_numpy(values) for name, values in collate_arrays(items, pad_token_id).items()}
