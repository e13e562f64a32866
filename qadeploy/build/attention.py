"""The same attention by other operators, since which one is fastest depends on the GPU.

``fusing`` leaves one ``com.microsoft.Attention`` per layer, with the length of each row as its mask. On a Hopper GPU that
operator has no flash kernel for such a mask (``attention_impl.cu`` of ONNX Runtime 1.31). Two others have one:

- ``ai.onnx.Attention`` from opset 24 on, whose ``nonpad_kv_seqlen`` is the length of each row;
- ``com.microsoft.PackedMultiHeadAttention``, for graphs without padding.

Both compute what the original does; the padding's own rows differ, and nobody reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import onnx
from onnx import TensorProto, helper

OPSET = 24  # the first whose Attention takes nonpad_kv_seqlen
_LENGTHS = "row_lengths_int64"


def standard_attention(model: bytes) -> bytes:
    """The model with ``ai.onnx.Attention`` in place of ``com.microsoft.Attention``.

    Args:
        model: A graph in which every ``Attention`` node has row lengths as its mask (int32, ``[rows]``).

    Returns:
        The rewritten model, at opset 24.

    Raises:
        ValueError: The graph has no such attention, or attentions with different masks.
    """
    proto = onnx.load_model_from_string(model)
    found = [n for n in proto.graph.node if n.op_type == "Attention" and n.domain == "com.microsoft"]
    masks = {node.input[3] for node in found if len(node.input) > 3 and node.input[3]}
    if len(masks) != 1 or any(len(node.input) != 4 for node in found):
        raise ValueError(f"{len(found)} attentions with {len(masks)} masks: one mask for all of them is needed")

    def rewritten(node: onnx.NodeProto) -> Iterable[onnx.NodeProto]:
        heads = _heads(node)
        query, key, value = (f"{node.name}_{part}" for part in "qkv")
        yield from _projected(node, [query, key, value], bias=node.input[2])
        inputs = [query, key, value, "", "", "", _LENGTHS]
        yield helper.make_node(
            "Attention", inputs, [node.output[0]], f"{node.name}_standard", q_num_heads=heads, kv_num_heads=heads
        )

    _replace(proto, found, rewritten)
    (mask,) = masks
    behind = next(i for i, node in enumerate(proto.graph.node) if mask in node.output) + 1
    proto.graph.node.insert(behind, helper.make_node("Cast", [mask], [_LENGTHS], _LENGTHS, to=TensorProto.INT64))
    for opset in proto.opset_import:
        if opset.domain in {"", "ai.onnx"}:
            opset.version = max(opset.version, OPSET)
    proto.ir_version = max(proto.ir_version, 10)
    return bytes(proto.SerializeToString())


def packed_multi_head_attention(packed: bytes) -> bytes:
    """A graph without padding with ``PackedMultiHeadAttention`` in place of ``PackedAttention``.

    Args:
        packed: The graph as ``convert_to_packing_mode`` left it.

    Returns:
        The rewritten model.

    Raises:
        ValueError: It has no ``PackedAttention``.
    """
    proto = onnx.load_model_from_string(packed)
    found = [node for node in proto.graph.node if node.op_type == "PackedAttention"]
    if not found:
        raise ValueError("the graph has no PackedAttention")

    def rewritten(node: onnx.NodeProto) -> Iterable[onnx.NodeProto]:
        query, key, value = (f"{node.name}_{part}" for part in "qkv")
        yield from _projected(node, [query, key, value], bias=None)
        inputs = [query, key, value, node.input[2], node.input[3], node.input[4]]
        yield helper.make_node(
            "PackedMultiHeadAttention",
            inputs,
            [node.output[0]],
            f"{node.name}_multi_head",
            domain="com.microsoft",
            num_heads=_heads(node),
        )

    _replace(proto, found, rewritten)
    return bytes(proto.SerializeToString())


def _projected(node: onnx.NodeProto, outputs: list[str], bias: str | None) -> Iterable[onnx.NodeProto]:
    """Queries, keys and values of an attention that holds their weights side by side (``[hidden, 3 x hidden]``)."""
    product = f"{node.name}_product"
    yield helper.make_node("MatMul", [node.input[0], node.input[1]], [product], f"{node.name}_MatMul")
    if bias is not None:
        yield helper.make_node("Add", [product, bias], [f"{product}_biased"], f"{node.name}_Add")
        product = f"{product}_biased"
    yield helper.make_node("Split", [product], outputs, f"{node.name}_Split", axis=-1, num_outputs=3)


def _heads(node: onnx.NodeProto) -> int:
    return int(next(a.i for a in node.attribute if a.name == "num_heads"))


def _replace(
    proto: onnx.ModelProto,
    old: list[onnx.NodeProto],
    make: Callable[[onnx.NodeProto], Iterable[onnx.NodeProto]],
) -> None:
    """Puts the nodes that ``make`` makes of an old one in its place."""
    names = {node.name for node in old}
    nodes = [new for node in proto.graph.node for new in (make(node) if node.name in names else (node,))]
    kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del proto.graph.node[:]
    proto.graph.node.extend(kept)
