"""The recipes that ``export --quantize`` chooses from: each makes a smaller or faster model of the exported one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from qadeploy.export.graph import Rewritten, fuse_attention
from qadeploy.export.quantize.matmuls import Activations, measure_activations
from qadeploy.export.quantize.quantizers import (
    quantize_dynamic_int8,
    quantize_embeddings,
    quantize_static_int8,
    quantize_weights_int8,
)
from qadeploy.export.quantize.sensitivity import Harm, rank_products, worst
from qadeploy.export.quantize.smoothquant import Protected, protect
from qadeploy.inference.session import OnnxModel
from qadeploy.records import Window

REWRITING_TOLERANCE = 1e-4


@dataclass
class Material:
    """What recipes are made from: the exported model, its heads, and windows of training or dev text.

    Everything costly is made when first asked for, and once.
    """

    model: bytes
    heads: int | None
    pad_token_id: int
    windows: Sequence[Window] = field(repr=False)

    @cached_property
    def fused(self) -> Rewritten:
        """The model with single-node attention, where that keeps its logits on the windows; else as it was."""
        found = fuse_attention(self.model, self.heads or 0)  # 0, where the model does not tell, is refused below
        if found.fused and self._logits_apart(found.model) > REWRITING_TOLERANCE:
            return Rewritten(self.model, 0, found.attentions, takes_mask=True)
        return found

    @cached_property
    def activations(self) -> Activations:
        """What the fused model's products meet on the windows."""
        return measure_activations(self.fused.model, self.windows)

    @cached_property
    def protected(self) -> Protected:
        """The fused model, its products made ready for int8."""
        return protect(self.fused.model, self.activations)

    @cached_property
    def harms(self) -> list[Harm]:
        """The fused model's products, the most harmed by int8 first."""
        return rank_products(self.fused.model, self.activations)

    def _logits_apart(self, other: bytes) -> float:
        try:
            runs = [
                OnnxModel(lambda m=m: m, device="cpu", pad_token_id=self.pad_token_id).run(self.windows)  # type: ignore[misc]
                for m in (self.model, other)
            ]
        except Exception:  # whatever the runtime says of the rewritten graph: then it stays as it was
            return np.inf
        return max(float(np.abs(a[i] - b[i]).max()) for a, b in zip(*runs, strict=True) for i in (0, 1))


@dataclass(frozen=True, slots=True)
class Made:
    """A recipe's model, and the products that it left in float."""

    model: bytes
    float_nodes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Recipe:
    """A way to make a model: ``precision`` is what its bundle says."""

    name: str
    what: str
    precision: str
    make: Callable[[Material], Made]


def _int8(material: Material) -> Made:
    return Made(quantize_dynamic_int8(quantize_embeddings(material.fused.model)))


def _protected(material: Material) -> Made:
    kept = material.protected.float_nodes
    return Made(quantize_dynamic_int8(quantize_embeddings(material.protected.model), kept), kept)


def _protected_mixed(material: Material) -> Made:
    """The products with the largest error left, an eighth of them, stay in float beside their protection."""
    left = [Harm(name, p.error) for p in material.protected.protections for name in p.products]
    kept = (*worst(sorted(left, key=lambda h: -h.error), 1 / 8), *material.protected.float_nodes)
    return Made(quantize_dynamic_int8(quantize_embeddings(material.protected.model), kept), kept)


def _mixed(share: float) -> Callable[[Material], Made]:
    def make(material: Material) -> Made:
        kept = tuple(worst(material.harms, share))
        return Made(quantize_dynamic_int8(quantize_embeddings(material.fused.model), kept), kept)

    return make


def _static(material: Material) -> Made:
    kept = material.protected.float_nodes
    model = quantize_embeddings(material.protected.model)
    return Made(quantize_static_int8(model, material.windows, kept), kept)


def _weights(material: Material) -> Made:
    return Made(quantize_weights_int8(quantize_embeddings(material.fused.model)))


_RECIPES = (
    Recipe("int8", "dynamic int8: weights with one scale a column, activations rounded as they come", "int8", _int8),
    Recipe(
        "int8-protected",
        "dynamic int8 after smoothing, the few outlying channels of harmed products in float",
        "int8",
        _protected,
    ),
    Recipe(
        "int8-protected-mixed",
        "the same, with the eighth of the products that rounding still harms most in float",
        "int8",
        _protected_mixed,
    ),
    Recipe(
        "int8-mixed",
        "dynamic int8, the quarter of the products that rounding harms most in float",
        "int8",
        _mixed(0.25),
    ),
    Recipe(
        "int8-half", "dynamic int8, the half of the products that rounding harms most in float", "int8", _mixed(0.5)
    ),
    Recipe(
        "int8-static",
        "int8 with the ranges of activations fixed beforehand on training windows, protected as int8-protected",
        "int8",
        _static,
    ),
    Recipe("int8-weights", "8-bit weights in blocks of 128 with scales of their own (MatMulNBits)", "int8", _weights),
)
RECIPES = {recipe.name: recipe for recipe in _RECIPES}
