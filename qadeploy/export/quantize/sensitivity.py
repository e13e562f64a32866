"""Which products of a graph int8 would hurt most: its rounding simulated on real activations.

The relative error of a product (see ``rounding_error``) is computed in numpy for inputs as they really come, from
one run of the float graph, so ranking all products costs seconds, not one quantized model a product.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx

from qadeploy.export.quantize.matmuls import Activations, find_products


@dataclass(frozen=True, slots=True)
class Harm:
    """A product by name and the relative error that int8 would bring to it."""

    name: str
    error: float


def rank_products(model: bytes, activations: Activations) -> list[Harm]:
    """Every product with constant weights, the most harmed by int8 first."""
    harms = [Harm(p.name, activations.error([p])) for p in find_products(onnx.load_model_from_string(model))]
    return sorted(harms, key=lambda h: -h.error)


def worst(harms: Sequence[Harm], share: float) -> list[str]:
    """Names of the most harmed ``share`` (0 to 1) of the products, rounded down."""
    return [h.name for h in harms[: int(len(harms) * share)]]
