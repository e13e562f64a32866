"""The arithmetic operations of a model's matmuls on a window, counted by PyTorch.

They depend on the architecture, not on a file or a runtime: however a graph is rewritten or quantized, the useful work
is what the original model does on the window's own tokens, without padding.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from qadeploy.errors import FailureError, one_line

_LENGTHS, _CHECKED = (16, 32, 64), 96  # tokens: the polynomial goes through the first three and must fit the last


@dataclass(frozen=True, slots=True)
class Operations:
    """Operations of one window of n tokens: ``fixed`` + ``per_token`` n + ``per_square`` n².

    A matmul of [m, k] by [k, n] is 2 m k n: a multiplication and an addition each.
    """

    fixed: float
    per_token: float
    per_square: float

    def of(self, lengths: Iterable[int]) -> float:
        """The operations of windows of these lengths in tokens."""
        n = np.asarray(list(lengths), dtype=np.float64)
        return float((self.fixed + self.per_token * n + self.per_square * n**2).sum())


def count_operations(checkpoint: Path, *, trust_remote_code: bool = False) -> Operations:
    """Counts the operations of a checkpoint's architecture on PyTorch's meta device: no weights are loaded.

    ``trust_remote_code`` allows the checkpoint's own code. Raises FailureError if the operations cannot be counted, or are
    not a quadratic polynomial of the length, as for some local attention.
    """
    from transformers import AutoConfig, AutoModelForQuestionAnswering

    try:
        config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            make = partial(AutoModelForQuestionAnswering.from_config, trust_remote_code=trust_remote_code)
            model = make(config, attn_implementation="eager").eval()
        counts = [_count(model, n) for n in (*_LENGTHS, _CHECKED)]
    except Exception as error:  # an architecture may refuse the meta device in any way
        raise FailureError(f"{checkpoint}: its operations cannot be counted: {one_line(error, 200)}") from error
    fixed, linear, square = np.linalg.solve(np.vander(np.asarray(_LENGTHS, float), increasing=True), counts[:3])
    found = Operations(float(round(fixed)), float(round(linear)), float(round(square)))
    if abs(found.of([_CHECKED]) - counts[3]) > 1e-6 * counts[3]:
        raise FailureError(f"{checkpoint}: its operations are not a quadratic polynomial of the window's length")
    return found


def _count(model: Any, tokens: int) -> int:
    counter = FlopCounterMode(display=False)
    ids = torch.zeros((1, tokens), dtype=torch.long, device="meta")
    with torch.inference_mode(), counter:
        model(input_ids=ids, attention_mask=torch.ones_like(ids))
    return int(counter.get_total_flops())
