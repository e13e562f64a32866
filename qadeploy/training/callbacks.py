"""The display of training progress: a progress bar or log lines, and a table with one row and a remark per epoch."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback

from qadeploy.errors import FailureError
from qadeploy.reports.facts import overfits
from qadeploy.training.run_log import RunLog


class QuietProgress(ProgressCallback):
    """The progress bar, without the Trainer's dictionaries between the rows of our table."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Prints nothing: the table has its own rows."""


class StepLines(TrainerCallback):
    """Prints the current step at intervals, for logs without a progress bar."""

    def __init__(self, log: RunLog, seconds: float = 60.0) -> None:
        self._log, self._seconds = log, seconds
        self._last = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Prints a line if the last one is old enough."""
        if time.monotonic() - self._last >= self._seconds and state.is_world_process_zero:
            self._last = time.monotonic()
            self._log.detail(f"step {state.global_step:,} of {state.max_steps:,}")


class EpochTable(TrainerCallback):
    """Prints one row per epoch, and keeps the rows. Warns once, when the gap between train and eval loss opens.

    Args:
        log: Where rows are printed.
        rows: The rows of the epochs before the run was resumed.
        speed_of: Returns the row of ``Speed`` for an epoch; printed but not kept, because equal runs differ in it.
        loss_of: Returns the mean training loss of the epoch.

    Attributes:
        mean: The row of the mean of the epochs' weights, if that is kept instead of the best epoch.
    """

    def __init__(
        self,
        log: RunLog,
        rows: Sequence[dict[str, Any]] = (),
        speed_of: Callable[[int], dict[str, Any] | None] = lambda epoch: None,
        loss_of: Callable[[], float | None] = lambda: None,
    ) -> None:
        self.log = log
        self.speed_of = speed_of
        self.loss_of = loss_of
        self.rows: list[dict[str, Any]] = []
        self.mean: dict[str, Any] | None = None
        self.gap_opened: int | None = None  # the first epoch of overfitting
        for row in rows:
            self._keep(row)

    @property
    def best(self) -> dict[str, Any]:
        """The row of the epoch with the best F1; on ties the earliest, as in the Trainer."""
        trained = [r for r in self.rows if r["epoch"]] or self.rows
        return max(trained, key=lambda r: (r["eval_f1"], -r["epoch"]))

    def header(self) -> None:
        """Prints the table's header and the rows of a resumed run."""
        self.log.detail("epoch  train loss  eval loss  accuracy     EM     F1  windows/s  memory  observation")
        for row in self.rows:
            self._print(row)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        """Adds the row of the epoch that was just evaluated on the dev set."""
        if "eval_f1" not in metrics:
            return
        row = {
            "epoch": round(state.epoch or 0),
            "train_loss": self.loss_of(),
            **{k: float(metrics[k]) for k in ("eval_loss", "eval_accuracy", "eval_exact_match", "eval_f1")},
        }
        if not math.isfinite(row["eval_loss"] or 0.0) or not math.isfinite(row["train_loss"] or 0.0):
            raise FailureError("training diverged: the loss is not finite. Lower --learning-rate")
        row["observation"] = observe(self.rows, row)
        self._keep(row)
        self._print(row)

    def _keep(self, row: dict[str, Any]) -> None:
        if self.gap_opened is None and self.rows and overfits(self.rows[-1], row):
            self.gap_opened = row["epoch"]
        self.rows.append(row)

    def _print(self, row: dict[str, Any]) -> None:
        loss = "         -" if row["train_loss"] is None else f"{row['train_loss']:10.4f}"
        speed, pace, memory = self.speed_of(row["epoch"]), "-", "-"
        if speed:
            pace, peak = f"{speed['windows_per_second']:.1f}", speed["peak_memory_bytes"]
            memory = "-" if peak is None else f"{peak / 2**30:.2f}G"
        self.log.detail(
            f"{row['epoch']:5d}  {loss}  {row['eval_loss']:9.4f}  {row['eval_accuracy']:8.4f}  "
            f"{row['eval_exact_match']:5.1f}  {row['eval_f1']:5.1f}  {pace:>9}  {memory:>6}  {row['observation']}"
        )
        if self.gap_opened == row["epoch"]:
            self.log.warning(
                f"overfitting from epoch {row['epoch']} on: eval loss {row['eval_loss']:.3f} rises while train loss "
                f"{row['train_loss']:.3f} falls. The best epoch or the mean of the epochs is kept anyway. More questions help most; "
                "otherwise try fewer --epochs, a lower --learning-rate, or a higher --weight-decay"
            )


def observe(before: Sequence[dict[str, Any]], row: dict[str, Any]) -> str:
    """One plain remark on an epoch, from its row and the rows before it."""
    if not before:
        return "the base model, before training"
    last = before[-1]
    moves = _moves(row["eval_accuracy"] - last["eval_accuracy"])
    if overfits(last, row):
        return f"overfitting: eval loss rises while train loss falls; accuracy {moves}"
    return f"loss {_moves(row['eval_loss'] - last['eval_loss'])}, accuracy {moves}"


def _moves(change: float) -> str:
    return "rises" if change > 0 else "falls" if change < 0 else "stays"
