"""The mean of the weights at the ends of the epochs.

It often answers better than any single epoch, above all after training on few examples (Izmailov et al., *Averaging Weights
Leads to Wider Optima and Better Generalization*, UAI 2018).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

_FILE = "mean_of_epochs.safetensors"


class MeanOfEpochs(TrainerCallback):
    """Keeps the mean, in float32 on the CPU, if there is more than one epoch.

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
            save_file({str(i): weight for i, weight in enumerate(self._weights)}, folder / _FILE)

    def load(self, folder: Path, epochs: int) -> None:
        """Continues with the mean of ``epochs`` epochs in a save of the run."""
        self.epochs = epochs
        found = load_file(folder / _FILE) if epochs else {}
        self._weights = [found[str(i)] for i in range(len(found))]


def _copies(model: torch.nn.Module) -> list[torch.Tensor]:
    return [p.detach().to("cpu", torch.float32, copy=True) for p in model.parameters()]
