"""Attention as single nodes: ``MultiHeadAttention`` in place of matmuls, softmax, scaling, mask and transposes.

ONNX Runtime's own fusions know BERT's form of attention. This module also knows others: a bias that depends only on
positions (MPNet), rotated queries and keys (ModernBERT), and local layers, which see a window around each token. Attention
is recognised backwards from each softmax by what the nodes compute, so in the graphs of both exporters. The
``ort_fusions`` of onnxscript 0.7 found no attention in optimum's graphs, and none of MPNet's in either exporter's.

A local layer is computed in blocks of as many queries as the window's radius. They attend to their own block of keys and to
its two neighbours, so time and memory grow with the length, not with its square.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from qadeploy.export.graph import CONTRIB, Graph, add_contrib_domain
from qadeploy.inference.session import cpu_session
from qadeploy.integrations.onnx_standalone.nodes import Nodes, default_opset

_SPLIT_HEADS = [0, 2, 1, 3]  # [batch, tokens, heads, size] to [batch, heads, tokens, size], and back
_KEYS = [0, 2, 3, 1]  # the same, transposed for the matmul with the queries
_IDS, _MASK = "input_ids", "attention_mask"
_PROBED = 1024  # tokens of the run that measures a mask's window
_BLOCKED = -1e4  # a mask adds less than this to what must not be seen
_Made = TypeVar("_Made")


@dataclass(frozen=True, slots=True)
class Rewritten:
    """A model, and how many of its attentions are now single nodes."""

    model: bytes
    fused: int
    attentions: int


def fuse_attention(model: bytes | Path, heads: int, *, keep_mask: bool = False, plain: bool = True) -> Rewritten:
    """The model with its attentions as single nodes if all of them have a known form; otherwise the model unchanged.

    If one cannot be rewritten, none is: a mixed graph gains little. The caller must check that the logits stay the same.

    Args:
        model: The model as exported, or its file, which takes less memory.
        heads: The number of attention heads.
        keep_mask: Whether to keep the padding mask. Without it a model is faster, but must not get padded batches.
        plain: Whether to rewrite a model with BERT's form of attention, which ONNX Runtime's fusions know too.
    """
    proto = onnx.load(model) if isinstance(model, Path) else onnx.load_model_from_string(model)
    graph = Graph(proto)
    softmaxes = [node for node in proto.graph.node if node.op_type == "Softmax"]
    matched = [_attention(graph, node) for node in softmaxes]
    found = [each for each in matched if each is not None]
    special = any(each.rotations or each.bias or each.radius for each in found)  # beyond BERT's form
    if not heads or not found or len(found) < len(matched) or not (plain or special):
        return Rewritten(model.read_bytes() if isinstance(model, Path) else model, 0, len(softmaxes))
    writer = _Writer(graph, heads, keep_mask)
    for attention in found:
        writer.replace(attention)
    add_contrib_domain(proto)
    if not keep_mask:
        for node in proto.graph.node:
            if node.op_type == "Shape" and node.input[0] == _MASK:  # the ids have the same shape
                node.input[0] = _IDS
    graph.prune()
    inputs = {each.name for each in proto.graph.input}
    if not keep_mask and _MASK in inputs:  # something still reads the mask, so batches would be padded
        return fuse_attention(model, heads, keep_mask=True, plain=plain)
    return Rewritten(proto.SerializeToString(), len(found), len(softmaxes))


# ---------------------------------------------------------------- finding


class _Scaled(NamedTuple):
    """A value before multiplications or divisions by numbers: ``factor`` is their product, NaN if it is not known."""

    name: str
    factor: float = 1.0


class _Rotated(NamedTuple):
    """A value ``[batch, heads, tokens, size]`` and the cosines and sines that rotate it."""

    name: str
    cos: str
    sin: str


@dataclass(frozen=True, slots=True)
class _Attention:
    """An attention.

    ``query``, ``key`` and ``value`` are ``[batch, heads, tokens, size]``, but ``key`` is ``[batch, tokens, heads, size]`` if
    ``key_swapped``. ``bias`` ``[any batch, heads, tokens, tokens]`` is added to the scores. ``radius`` is how many tokens to
    either side are seen, None for all. ``scale`` is None for 1 / sqrt(size). ``last`` makes the result,
    ``[batch, tokens, hidden]``.
    """

    query: str
    key: str
    value: str
    key_swapped: bool
    rotations: tuple[_Rotated, _Rotated] | None
    bias: str | None
    radius: int | None
    scale: float | None
    last: onnx.NodeProto


def _attention(graph: Graph, softmax: onnx.NodeProto) -> _Attention | None:
    """The attention around a softmax, or None if it has no known form."""
    found = _scores(graph, softmax.input[0])
    weights = _with_nan_guards(graph, softmax.output[0])
    weighted = next((node for name in weights for node in graph.readers[name] if node.op_type == "MatMul"), None)
    if found is None or weighted is None or weighted.input[0] not in weights:
        return None
    matmul, factor, added = found
    query, keys = _unscaled(graph, matmul.input[0]), _unscaled(graph, matmul.input[1])
    key, swapped = _untransposed(graph, keys.name)
    if key is None:
        return None
    key_inside = _unscaled(graph, key)
    value = weighted.input[1]
    back = graph.only_reader(weighted.output[0], "Transpose")
    last = graph.only_reader(back.output[0], "Reshape") if back is not None and _perm(back) == _SPLIT_HEADS else None
    terms = _terms(graph, added)
    if last is None or terms is None:
        return None
    rotated = _rotated(graph, query.name), _rotated(graph, key_inside.name)
    rotations = (rotated[0], rotated[1]) if rotated[0] is not None and rotated[1] is not None else None
    if rotations is None and any(rotated):
        return None
    names = (rotations[0].name, rotations[1].name) if rotations else (query.name, key_inside.name)
    scale = factor * query.factor * keys.factor * key_inside.factor
    return _Attention(*names, value, swapped, rotations, *terms, None if math.isnan(scale) else scale, last)


def _terms(graph: Graph, added: Sequence[str]) -> tuple[str | None, int | None] | None:
    """The bias and the radius of what is added to the scores; None if its form is unknown or it depends on the text."""
    biases: list[str] = []
    radius = None
    for name in added:
        sources = graph.sources(name)
        if _IDS in sources:
            return None
        if not any(node.op_type == "Range" for node in graph.ancestors(name)):  # it depends on no positions
            if not sources <= {_MASK}:
                return None
            continue
        window = _radius(graph, name) if sources <= {_MASK} else None
        if window is None:
            biases.append(name)
        else:
            radius = window if radius is None else min(radius, window)
    if len(biases) > 1 or (biases and radius is not None):
        return None
    return (biases[0] if biases else None), radius


def _scores(graph: Graph, name: str) -> tuple[onnx.NodeProto, float, list[str]] | None:
    """The matmul of queries and keys that feeds a softmax, its scaling, and what is added to it."""
    added: list[str] = []
    while True:
        scaled = _unscaled(graph, name)
        matmul = graph.maker(scaled.name, "MatMul")
        if matmul is not None:
            return matmul, scaled.factor, added
        add = graph.maker(name, "Add")
        if add is None:
            return None
        first = _reaches_matmul(graph, add.input[0])
        if first == _reaches_matmul(graph, add.input[1]):
            return None
        name, other = add.input if first else reversed(add.input)
        added.append(other)


def _reaches_matmul(graph: Graph, name: str) -> bool:
    """Whether a value is a matmul of two computed values, scaled or with something added."""
    node = graph.makers.get(_unscaled(graph, name).name)
    if node is None or node.op_type not in {"MatMul", "Add"}:
        return False
    if node.op_type == "Add":
        return any(_reaches_matmul(graph, i) for i in node.input)
    return _IDS in graph.sources(node.output[0])


def _with_nan_guards(graph: Graph, name: str) -> set[str]:
    """The names of a value: its own, and those it has behind nodes that guard against NaN in fully masked rows."""
    names = {name}
    for node in graph.readers[name]:
        if node.op_type == "Where" and graph.maker(node.input[0], "IsNaN") is not None:
            names.add(node.output[0])
    return names


def _unscaled(graph: Graph, name: str) -> _Scaled:
    """The value before multiplications or divisions by a number."""
    found = _Scaled(name)
    while True:
        node = graph.maker(found.name, "Mul") or graph.maker(found.name, "Div")
        if node is None:
            return found
        others = [i for i in node.input if not _is_number(graph, i)]
        if len(others) != 1 or (node.op_type == "Div" and others[0] != node.input[0]):
            return found
        number = next(i for i in node.input if i != others[0])
        value = graph.constant(number)
        known = math.nan if value is None else float(value.reshape(-1)[0])
        factor = 1 / known if known and node.op_type == "Div" else known
        found = _Scaled(others[0], found.factor * factor)


def _is_number(graph: Graph, name: str) -> bool:
    """Whether a value is, as far as can be told, a single number made only from constants and shapes."""
    value = graph.constant(name)
    if value is not None:
        return value.size == 1
    node = graph.makers.get(name)
    return node is not None and node.op_type in {"Sqrt", "Div", "Cast"} and not graph.sources(name)


def _untransposed(graph: Graph, name: str) -> tuple[str | None, bool]:
    """The keys before their transposition for the matmul, and whether heads and tokens are swapped in them."""
    transpose = graph.maker(name, "Transpose")
    if transpose is not None and _perm(transpose) in ([0, 1, 3, 2], _KEYS):
        return transpose.input[0], _perm(transpose) == _KEYS
    # PyTorch's exporter merges batch and heads around the transposition.
    outer = graph.maker(name, "Reshape")
    transpose = graph.maker(outer.input[0], "Transpose") if outer is not None else None
    inner = (
        graph.maker(transpose.input[0], "Reshape") if transpose is not None and _perm(transpose) == [0, 2, 1] else None
    )
    return (inner.input[0] if inner is not None else None), False


def _rotated(graph: Graph, name: str) -> _Rotated | None:
    """Matches x cos + (-x2, x1) sin, where x1 and x2 are the halves of x."""
    add = graph.maker(name, "Add")
    products = [graph.maker(i, "Mul") for i in add.input] if add is not None else []
    for plain, turned in (products, products[::-1]) if len(products) == 2 else ():
        if plain is None or turned is None:
            continue
        for halves, sin in (turned.input, reversed(turned.input)):
            concat = graph.maker(halves, "Concat")
            negative = graph.maker(concat.input[0], "Neg") if concat is not None else None
            if concat is None or negative is None:
                continue
            source = _whole(graph, negative.input[0])
            others = [i for i in plain.input if i != source]
            if source is not None and source == _whole(graph, concat.input[1]) and len(others) == 1:
                return _Rotated(source, others[0], sin)
    return None


def _whole(graph: Graph, name: str) -> str | None:
    """The value that a Slice or Split takes this one from, or None."""
    node = graph.maker(name, "Slice") or graph.maker(name, "Split")
    return node.input[0] if node is not None else None


def _perm(node: onnx.NodeProto) -> list[int]:
    return next((list(a.ints) for a in node.attribute if a.name == "perm"), [])


def _packed(graph: Graph, name: str) -> tuple[str, int] | None:
    """The value ``[batch, tokens, 3 * hidden]`` that this one, split into heads, is a third of, and which third.

    It is reshaped to ``[batch, tokens, 3, heads, size]``. The transposition that puts heads before tokens comes either before
    or after the thirds are taken apart.
    """
    outer = graph.maker(name, "Transpose")
    if outer is not None and _perm(outer) == _SPLIT_HEADS:
        name = outer.input[0]
    index = None
    squeeze = graph.maker(name, "Squeeze")
    if squeeze is not None:
        part = graph.maker(squeeze.input[0], "Split") or graph.maker(squeeze.input[0], "Slice")
        if part is not None and part.op_type == "Split":
            index = list(part.output).index(squeeze.input[0])
        elif part is not None:
            index = _integer(graph, part.input[1])
    else:
        part = graph.maker(name, "Gather")
        index = _integer(graph, part.input[1]) if part is not None else None
    if part is None or index is None:
        return None
    inner = graph.maker(part.input[0], "Transpose")
    if (inner is not None and _perm(inner) == [0, 3, 2, 1, 4]) == (outer is not None):
        return None
    reshape = graph.maker(inner.input[0] if inner is not None else part.input[0], "Reshape")
    return (reshape.input[0], index) if reshape is not None and index in range(3) else None


def _integer(graph: Graph, name: str) -> int | None:
    value = graph.constant(name)
    return int(value.reshape(-1)[0]) if value is not None and value.size == 1 else None


# ---------------------------------------------------------------- masks


def _radius(graph: Graph, name: str) -> int | None:
    """How far a mask lets a token see to either side, found by running that part of the graph; None if it is no window."""
    mask = np.ones((2, _PROBED), dtype=np.int64)
    mask[1, _PROBED // 3 :] = 0
    part = graph.part(name).SerializeToString()
    try:
        session = cpu_session(part)
        value = session.run([name], {each.name: mask for each in session.get_inputs()})[0]
    except Exception:  # the runtime raises one bare class per status code
        return None
    if value.shape != (2, 1, _PROBED, _PROBED):
        return None
    radius = int((value[0, 0, 0] > _BLOCKED).sum()) - 1
    places = np.arange(_PROBED)
    near = np.abs(places[:, None] - places) <= radius
    seen = near[None] & (mask[:, None] != 0)
    fits = 0 < radius < _PROBED - 1 and np.array_equal(value[:, 0] > _BLOCKED, seen) and not value[:, 0][seen].any()
    return radius if fits else None


# ---------------------------------------------------------------- writing


class _Writer:
    """Puts single nodes into a graph. Values that layers share, such as a bias, are made once."""

    def __init__(self, graph: Graph, heads: int, keep_mask: bool) -> None:
        self._graph, self._heads, self._keep_mask = graph, heads, keep_mask
        self._nodes = Nodes("attention/")
        self._made: dict[str, Any] = {}

    def replace(self, attention: _Attention) -> None:
        """Writes the node in place of the last one of an attention."""
        query, value = self._tokens(attention.query), self._tokens(attention.value)
        key = self._merged(attention.key) if attention.key_swapped else self._tokens(attention.key)
        if attention.rotations is not None:
            query, key = map(self._rotate, (query, key), attention.rotations)
        output = attention.last.output[0]
        if attention.radius is not None:
            self._local(query, key, value, attention.radius, attention.scale, output)
        else:
            mask = self._once("mask", self._mask) if self._keep_mask else ""
            expand = self._graph.maker(attention.bias, "Expand") if attention.bias else None
            # The node broadcasts the bias to the batch.
            bias = expand.input[0] if expand is not None else attention.bias or ""
            self._attend([query, key, value, "", mask, bias], attention.scale, output)
        nodes = self._graph.graph.node
        place = list(nodes).index(attention.last)
        nodes.remove(attention.last)
        self._nodes.put(self._graph.graph, place)

    def _once(self, name: str, make: Callable[[], _Made]) -> _Made:
        """What ``make`` returned at the first call with this name."""
        if name not in self._made:
            self._made[name] = make()
        made: _Made = self._made[name]
        return made

    def _mask(self) -> str:
        return self._nodes("Cast", _MASK, to=TensorProto.INT32)

    def _attend(self, inputs: list[str], scale: float | None, out: str = "") -> str:
        while not inputs[-1]:
            inputs = inputs[:-1]
        scales = {} if scale is None else {"scale": scale}
        return self._nodes("MultiHeadAttention", *inputs, out=out, domain=CONTRIB, num_heads=self._heads, **scales)

    # ------------------------------------------------------------ [batch, tokens, hidden]

    def _tokens(self, name: str) -> str:
        """The value ``[batch, tokens, hidden]`` of a value with heads: from before it was split, or merged again."""
        packed = _packed(self._graph, name)
        if packed is not None:
            source, index = packed
            return self._once(f"thirds of {source}", lambda: self._split(source, 3))[index]
        transpose = self._graph.maker(name, "Transpose")
        if transpose is not None and _perm(transpose) == _SPLIT_HEADS:
            return self._merged(transpose.input[0])
        return self._merge(self._nodes("Transpose", name, perm=_SPLIT_HEADS))

    def _merged(self, name: str) -> str:
        reshape = self._graph.maker(name, "Reshape")
        return reshape.input[0] if reshape is not None else self._merge(name)

    def _merge(self, name: str) -> str:
        return self._nodes("Reshape", name, self._nodes.constant([0, 0, -1]))

    def _split(self, source: str, count: int) -> tuple[str, ...]:
        """Splits a value into equal parts along its last axis."""
        sizes: dict[str, Any] = {"num_outputs": count} if default_opset(self._graph.proto) >= 18 else {}
        return self._nodes.many("Split", source, outputs=count, axis=-1, **sizes)

    def _rotate(self, name: str, rotation: _Rotated) -> str:
        """``RotaryEmbedding`` of a value; positions count from 0, so the cosines and sines are those of this run's tokens."""
        caches = [self._once(f"half of {each}", partial(self._half, each)) for each in (rotation.cos, rotation.sin)]
        return self._nodes("RotaryEmbedding", name, self._nodes.constant([0]), *caches, domain=CONTRIB)

    def _half(self, name: str) -> str:
        """The first half of cosines or sines, ``[tokens, size / 2]``; the second half is the same."""
        return self._nodes("Squeeze", self._split(name, 2)[0])

    # ------------------------------------------------------------ local attention

    def _local(self, query: str, key: str, value: str, radius: int, scale: float | None, output: str) -> None:
        """Attention to the tokens within ``radius``, in blocks of ``radius`` queries."""
        n = self._nodes
        sizes = self._once(f"block sizes {radius}", lambda: self._block_sizes(radius))
        blocks = n("Reshape", n("Pad", query, sizes["own"]), sizes["blocks"])
        keys, values = (self._neighbours(each, radius, sizes) for each in (key, value))
        bias = self._once(f"local bias {radius}", lambda: self._local_bias(radius, sizes))
        seen = self._attend([blocks, keys, values, "", "", bias], scale)
        joined = n("Reshape", seen, sizes["joined"])
        n("Slice", joined, n.constant([0]), sizes["tokens"], n.constant([1]), out=output)

    def _block_sizes(self, radius: int) -> dict[str, str]:
        """The paddings and shapes that every local layer needs, from the window's length."""
        n = self._nodes
        zero, one, width = n.constant([0]), n.constant([1]), n.constant([radius])
        shape = n("Shape", _IDS)
        batch, tokens = n("Slice", shape, zero, one), n("Slice", shape, one, n.constant([2]))
        rest = n("Mod", n("Neg", tokens), width)  # the padding that fills the last block
        return {
            "own": n("Concat", n.constant([0, 0, 0, 0]), rest, zero, axis=0),
            "near": n("Concat", n.constant([0, radius, 0, 0]), n("Add", rest, width), zero, axis=0),
            "joined": n("Concat", batch, n.constant([-1]), zero, axis=0),
            "blocks": n.constant([-1, radius, 0]),
            "tokens": tokens,
        }

    def _neighbours(self, name: str, radius: int, sizes: dict[str, str]) -> str:
        """Each block with the blocks before and after it, ``[batch * blocks, 3 * radius, any]``."""
        n = self._nodes
        padded = n("Pad", name, sizes["near"])
        parts = []
        for i, end in enumerate((-2 * radius, -radius, np.iinfo(np.int64).max)):
            part = n("Slice", padded, n.constant([i * radius]), n.constant([end]), n.constant([1]))
            parts.append(n("Reshape", part, sizes["blocks"]))
        return n("Concat", *parts, axis=1)

    def _local_bias(self, radius: int, sizes: dict[str, str]) -> str:
        """0 for the tokens that a query sees, far below 0 for others, ``[batch * blocks, 1, radius, 3 * radius]``."""
        n = self._nodes
        if self._keep_mask:
            real = n("Cast", _MASK, to=TensorProto.FLOAT)
        else:
            ones = numpy_helper.from_array(np.ones(1, dtype=np.float32))
            real = n("ConstantOfShape", n("Shape", _IDS), value=ones)
        near = self._neighbours(n("Unsqueeze", real, n.constant([2])), radius, sizes)
        rows = n("Unsqueeze", n("Transpose", near, perm=[0, 2, 1]), n.constant([1]))
        places = np.arange(3 * radius) - radius
        inside = np.abs(places - np.arange(radius)[:, None]) <= radius
        seen = n("Mul", rows, n.constant(inside[None, None], np.float32))
        unseen = n("Sub", seen, n.constant(1, np.float32))
        return n("Mul", unseen, n.constant(-100 * _BLOCKED, np.float32))
