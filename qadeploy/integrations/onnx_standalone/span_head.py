"""The span head: the decoder's rules for one window as nodes behind the logits, for callers without a Python decoder.

The model takes one more input, ``context_mask`` ``[batch, tokens]`` of the type of ``input_ids``: 1 where a span may start
or end, which is at each context token that is not blank (``core.windows.context_mask`` makes it). Its other outputs:

    span_scores  float32 [batch, k]  start + end logit of the best spans, best first; -inf if there are fewer
    span_starts  int64   [batch, k]  the span's first token, as a position in the window; -1 if there are fewer
    span_ends    int64   [batch, k]  its last token, inclusive; -1 if there are fewer
    log_sum      float32 [batch, 1]  log of the sum of exp(logit / temperature) over all valid spans, -inf if there are none
    null_scores  float32 [batch, 1]  start + end logit of the null position

If the settings have ``relative_to_null``, the null token's logit is subtracted from every logit: ``null_scores`` are 0.

Spans are ranked as ``core/decoding.py`` ranks them: by logit, ties by start, then by length (TopK takes the lower index first:
https://onnx.ai/onnx/operators/onnx__TopK.html). exp(span_score / temperature - log_sum) is the decoder's score of a context
of one window. If the model returns NaN or infinity at a position of the mask, ``log_sum`` is NaN.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from qadeploy.core.settings import QaSettings
from qadeploy.core.windows import CONTEXT_MASK, Encoder
from qadeploy.errors import FailureError, InputError
from qadeploy.integrations.onnx_standalone.nodes import Nodes, default_opset
from qadeploy.records import LOGIT_NAMES

OUTPUTS = ("span_scores", "span_starts", "span_ends", "log_sum", "null_scores")
DEFAULT_TOP_K = 20
_OPSET = 15  # Shape takes a range, and ReduceSum and Unsqueeze (13) take their axes as inputs


@dataclass(frozen=True, slots=True)
class SpanHead:
    """``top_k`` spans per window, each of at most ``max_answer_len`` tokens; ``temperature`` is that of ``log_sum``.

    ``null_index`` is the position of the null token, counted from the window's end if negative. With ``relative_to_null`` the
    null token's logit is subtracted from all others, as in ``QaSettings``.
    """

    top_k: int
    max_answer_len: int
    temperature: float
    null_index: int
    relative_to_null: bool = False

    @classmethod
    def of(cls, encoder: Encoder, settings: QaSettings, top_k: int = DEFAULT_TOP_K) -> SpanHead:
        """The head of a model with these settings. Raises InputError on ``top_k`` below 1."""
        if top_k < 1:
            raise InputError(f"span-top-k {top_k} is below 1: it is the number of spans that a window returns")
        limit = encoder.config.position_limit
        question = encoder.encode("what")
        short, longer = (encoder.windows(question, encoder.encode(t), max_seq_len=limit)[0] for t in ("a", "a a a"))
        from_start = short.null_index == longer.null_index
        null = short.null_index if from_start else short.null_index - len(short)
        return cls(top_k, settings.max_answer_len, settings.temperature, null, settings.relative_to_null)

    def to_dict(self) -> dict[str, Any]:
        """The head as a manifest stores it."""
        return {
            "k": self.top_k,
            "max_answer_len": self.max_answer_len,
            "temperature": self.temperature,
            "relative_to_null": self.relative_to_null,
        }


def add_span_head(model: bytes, head: SpanHead) -> bytes:
    """The model with the head after its logits, which stay its first two outputs.

    Raises FailureError on a model whose opset is older than the head's, or that already has a head.
    """
    proto = onnx.load_model_from_string(model)
    opset = default_opset(proto)
    if opset < _OPSET:
        raise FailureError(f"the model's operators are of opset {opset}, the span head needs {_OPSET}: export it again")
    graph = proto.graph
    inputs = {i.name: i.type.tensor_type for i in graph.input}
    outputs = {o.name: o.type.tensor_type for o in graph.output}
    if CONTEXT_MASK in inputs or not set(LOGIT_NAMES) <= set(outputs) or "input_ids" not in inputs:
        raise FailureError(
            f"the model has inputs {', '.join(inputs)} and outputs {', '.join(outputs)}: a span head goes behind the "
            "start_logits and end_logits of a model that has none yet"
        )
    if any(outputs[name].elem_type != TensorProto.FLOAT for name in LOGIT_NAMES):
        raise FailureError("the model's logits are not float32, which the span head needs: export it again")
    nodes = Nodes("span_head/")
    _write(nodes, head, "attention_mask" if "attention_mask" in inputs else None)
    batch, tokens = (d.dim_param or d.dim_value for d in inputs["input_ids"].shape.dim)
    graph.input.append(helper.make_tensor_value_info(CONTEXT_MASK, inputs["input_ids"].elem_type, [batch, tokens]))
    kinds = (TensorProto.FLOAT, TensorProto.INT64, TensorProto.INT64, TensorProto.FLOAT, TensorProto.FLOAT)
    for name, kind in zip(OUTPUTS, kinds, strict=True):
        count = head.top_k if name.startswith("span") else 1
        graph.output.append(helper.make_tensor_value_info(name, kind, [batch, count]))
    nodes.put(graph, len(graph.node))
    return bytes(proto.SerializeToString())


def _write(n: Nodes, head: SpanHead, attention_mask: str | None) -> None:
    kind = TensorProto
    one, length, k = n.constant([1]), head.max_answer_len, n.constant([head.top_k])
    nothing = n.constant(-np.inf, np.float32)
    allowed = n("Cast", CONTEXT_MASK, to=kind.BOOL)
    tokens = n("Gather", n("Shape", CONTEXT_MASK), one)  # [1]
    null = n.constant([head.null_index])
    if head.null_index < 0:  # after the context and before the padding
        size = n("ReduceSum", n("Cast", attention_mask, to=kind.INT64), one, keepdims=1) if attention_mask else tokens
        null = n("Add", size, null)
    index = n("Expand", null, n("Concat", n("Shape", CONTEXT_MASK, start=0, end=1), one, axis=0))
    logits = list(LOGIT_NAMES)
    if head.relative_to_null:
        logits = [n("Sub", name, n("GatherElements", name, index, axis=1)) for name in logits]
    n("Add", *(n("GatherElements", name, index, axis=1) for name in logits), out=OUTPUTS[4])
    starts, ends = (n("Where", allowed, name, nothing) for name in logits)
    # A band of the square of all spans: ends i to i + length - 1 for start i; no span ends after the last token.
    positions = n("Range", n.constant(0), n("Squeeze", tokens), n.constant(1))
    band = n("Add", n("Unsqueeze", positions, one), n.constant([np.arange(length)]))
    beyond = n("Pad", ends, n.constant([0, 0, 0, length - 1]), nothing)
    reach = n("Gather", beyond, band, axis=1)  # [batch, tokens, length]
    table = n("Reshape", n("Add", n("Unsqueeze", starts, n.constant([2])), reach), n.constant([0, -1]))
    found = n("Min", k, n("Mul", tokens, n.constant([length])))
    scores, cells = n.many("TopK", table, found, outputs=2, axis=1, largest=1, sorted=1)
    valid = n("Greater", scores, nothing)
    first = n("Div", cells, n.constant(length))
    last = n("Add", first, n("Mod", cells, n.constant(length)))
    missing = n("Concat", n.constant([0, 0, 0]), n("Sub", k, found), axis=0)
    n("Pad", scores, missing, nothing, out=OUTPUTS[0])
    for name, place in zip(OUTPUTS[1:3], (first, last), strict=True):
        n("Pad", n("Where", valid, place, n.constant(-1)), missing, n.constant(-1), out=name)

    # log(sum(exp(x))) as max + log(sum(exp(x - max))), so that nothing overflows.
    best = n("Slice", scores, n.constant([0]), one, one)
    peak = n("Where", n("Greater", best, nothing), best, n.constant(0, np.float32))
    temperature = n.constant(head.temperature, np.float32)
    weights = n("Exp", n("Div", n("Sub", table, peak), temperature))
    total = n("Log", n("ReduceSum", weights, one, keepdims=1))
    n("Add", total, n("Div", peak, temperature), out=OUTPUTS[3])
