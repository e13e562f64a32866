"""The recipes that ``export --quantize`` chooses from: each makes a smaller or faster model from the exported one."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import onnx

from qadeploy.export.attention import Rewritten, fuse_attention
from qadeploy.export.quantize.matmuls import Activations, measure_activations, rounding_errors, share_weights, worst
from qadeploy.export.quantize.quantizers import (
    quantize_dynamic_int8,
    quantize_embeddings,
    quantize_static_int8,
    quantize_weights_int8,
)
from qadeploy.export.quantize.smoothquant import SmoothedModel, smoothquant
from qadeploy.inference.session import OnnxModel, differences
from qadeploy.machine import machine, return_freed_memory
from qadeploy.records import Logits, Window

REWRITING_TOLERANCE = 1e-4
_Model = TypeVar("_Model", Rewritten, SmoothedModel)


@dataclass
class Material:
    """What recipes work on: the exported model, its number of heads, and windows of dev text.

    Everything costly is made once, when it is first needed. Models are kept in files, because each has all the weights.
    """

    source: Path
    heads: int | None
    pad_token_id: int
    windows: Sequence[Window] = field(repr=False)
    reduce_range: bool = field(default_factory=lambda: not machine().has_vnni)  # weights of 7 bits
    _folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="qadeploy-")), init=False, repr=False)
    _made: dict[str, Any] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)

    @property
    def model(self) -> bytes:
        """The exported model."""
        return self.source.read_bytes()

    @property
    def rewritten(self) -> Rewritten:
        """The model with single-node attention if that keeps its logits on the windows; otherwise the exported model."""
        return self._kept("rewritten", self._rewrite)

    def _rewrite(self) -> Rewritten:
        found = fuse_attention(self.source, self.heads or 0)  # 0 (unknown) fuses nothing
        if found.fused and not self._logits_apart(found.model) <= REWRITING_TOLERANCE:
            return Rewritten(self.model, 0, found.attentions)
        return found

    def _kept(self, name: str, make: Callable[[], _Model]) -> _Model:
        """What ``make`` returned at the first call, with its model read from a file."""
        file = self._folder / f"{name}.onnx"
        if name not in self._made:
            made = make()
            file.write_bytes(made.model)
            self._made[name] = replace(made, model=b"")
            del made
            return_freed_memory()
        facts: _Model = self._made[name]
        return replace(facts, model=file.read_bytes())

    @cached_property
    def activations(self) -> Activations:
        """The inputs of the fused model's matmuls on the windows."""
        return measure_activations(self.rewritten.model, self.windows)

    @property
    def smoothed(self) -> SmoothedModel:
        """The fused model with its matmuls prepared for int8."""
        return self._kept("smoothed", lambda: smoothquant(self.rewritten.model, self.activations))

    @cached_property
    def errors(self) -> dict[str, float]:
        """The errors of the fused model's matmuls under int8, by name."""
        return rounding_errors(self.rewritten.model, self.activations)

    @cached_property
    def sharing(self) -> list[tuple[str, ...]]:
        """The names of the fused model's matmuls that share a weight."""
        return share_weights(onnx.load_model_from_string(self.rewritten.model))

    def _logits_apart(self, other: bytes) -> float:
        file = self._folder / "other.onnx"  # takes less memory than bytes
        file.write_bytes(other)
        try:
            runs = [self._run(each) for each in (self.source, file)]
        except Exception:  # if the runtime refuses the rewritten graph in any way, it is not used
            return np.inf
        return float(differences(*runs).max())

    def _run(self, file: Path) -> list[Logits]:
        model = OnnxModel(lambda: str(file), device="cpu", pad_token_id=self.pad_token_id)
        # One by one: windows side by side would take a second session, with all weights once more.
        return [model.run([window])[0] for window in self.windows]


@dataclass(frozen=True, slots=True)
class QuantizedModel:
    """A recipe's model, and the matmuls that it left in float."""

    model: bytes
    float_nodes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Recipe:
    """A way to make an int8 model."""

    name: str
    what: str
    make: Callable[[Material], QuantizedModel]
    ranged: bool = True  # whether ``reduce_range`` can give its weights 7 bits


# A model is passed on without a name: a variable here would keep one while the next step makes its copies.


def _dynamic(material: Material, stage: Literal["rewritten", "smoothed"], float_nodes: Sequence[str]) -> QuantizedModel:
    reduce_range = material.reduce_range
    return QuantizedModel(
        quantize_dynamic_int8(
            quantize_embeddings(getattr(material, stage).model), float_nodes, reduce_range=reduce_range
        ),
        tuple(float_nodes),
    )


def _smoothquant_mixed(material: Material) -> QuantizedModel:
    """Also keeps in float the eighth of the matmuls whose error is still the largest."""
    smoothed = material.smoothed
    left = {name: each.error for each in smoothed.smoothings for name in each.matmuls}
    return _dynamic(material, "smoothed", (*worst(left, 1 / 8, smoothed.sharing), *smoothed.float_nodes))


def _mixed(share: float) -> Callable[[Material], QuantizedModel]:
    return lambda material: _dynamic(material, "rewritten", worst(material.errors, share, material.sharing))


def _static(material: Material) -> QuantizedModel:
    kept, windows = material.smoothed.float_nodes, material.windows
    reduce_range = material.reduce_range
    return QuantizedModel(
        quantize_static_int8(quantize_embeddings(material.smoothed.model), windows, kept, reduce_range=reduce_range),
        kept,
    )


# In the order in which a search tries them: the smallest and fastest first, because a budget may end it.
_RECIPES = (
    Recipe(
        "int8",
        "dynamic int8: weights with one scale per column, activations rounded as they come",
        lambda material: _dynamic(material, "rewritten", ()),
    ),
    Recipe("int8-static", "int8 with SmoothQuant, the ranges of activations fixed in advance on dev windows", _static),
    Recipe(
        "int8-protected",
        "dynamic int8 after SmoothQuant, with the few outlying channels of sensitive matmuls in float",
        lambda material: _dynamic(material, "smoothed", material.smoothed.float_nodes),
    ),
    Recipe(
        "int8-protected-mixed",
        "the same, with the eighth of the matmuls whose error is still the largest in float",
        _smoothquant_mixed,
    ),
    Recipe("int8-mixed", "dynamic int8, with the most sensitive quarter of the matmuls in float", _mixed(0.25)),
    Recipe("int8-half", "dynamic int8, with the most sensitive half of the matmuls in float", _mixed(0.5)),
    Recipe(
        "int8-weights",
        "8-bit weights in blocks of 128 with scales of their own (MatMulNBits)",
        lambda material: QuantizedModel(quantize_weights_int8(quantize_embeddings(material.rewritten.model))),
        ranged=False,
    ),
)
RECIPES = {recipe.name: recipe for recipe in _RECIPES}
