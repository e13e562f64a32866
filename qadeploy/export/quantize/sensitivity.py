"""Which matmuls of a graph int8 would change most, found by simulating its rounding on real activations.

The relative error of a matmul (see ``rounding_error``) is computed in numpy on real inputs from one run of the float
graph, so ranking all matmuls takes seconds instead of one quantized model per matmul.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx

from qadeploy.export.quantize.matmuls import Activations, find_matmuls


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """The name of a matmul and the relative error that int8 would cause in it."""

    name: str
    error: float


def rank_matmuls(model: bytes, activations: Activations) -> list[Sensitivity]:
    """Every matmul with constant weights, the one with the largest error first."""
    found = [Sensitivity(m.name, activations.error([m])) for m in find_matmuls(onnx.load_model_from_string(model))]
    return sorted(found, key=lambda s: -s.error)


def worst(ranked: Sequence[Sensitivity], share: float) -> list[str]:
    """Names of the first ``share`` (0 to 1) of the ranked matmuls, rounded down."""
    return [s.name for s in ranked[: int(len(ranked) * share)]]
