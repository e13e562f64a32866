"""Export by PyTorch itself (``torch.export`` and onnxscript), with the graph as ONNX Runtime's fusions expect it."""

from __future__ import annotations

import inspect
import logging
import warnings
from typing import Any

import numpy as np
import onnx
import onnx_ir
import torch
from onnx import numpy_helper
from onnx_ir.passes.common import ClearMetadataAndDocStringPass

from qadeploy.errors import FailureError
from qadeploy.export.graph import Graph
from qadeploy.export.masks import simplify_masks
from qadeploy.integrations.onnx_standalone.nodes import Nodes
from qadeploy.records import LOGIT_NAMES
from qadeploy.training.checkpoint import Checkpoint
from qadeploy.training.transformers_versions import eager_attention

_OPSET, _IR = 18, 8  # what optimum writes
_BATCH, _TOKENS = 2, 16  # of the traced input; any sizes but 0 and 1 work
_SILENCED = ("torch.onnx", "onnxscript", "onnx_ir")


def export_by_torch(checkpoint: Checkpoint) -> onnx.ModelProto:
    """The checkpoint's graph. Raises FailureError if PyTorch cannot export the model."""
    inputs = _inputs(checkpoint)
    axes = {0: "batch_size", 1: "sequence_length"}
    for name in _SILENCED:
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings(), eager_attention(checkpoint.model) as model:
        warnings.simplefilter("ignore")  # parity decides
        try:
            program = torch.onnx.export(
                model,
                (),
                kwargs=inputs,
                dynamo=True,
                verbose=False,
                opset_version=_OPSET,
                external_data=False,
                input_names=list(inputs),
                output_names=list(LOGIT_NAMES),
                dynamic_shapes=dict.fromkeys(inputs, axes),
            )
        except Exception as error:  # torch.export, its decompositions and onnxscript may raise anything
            kind = getattr(checkpoint.model.config, "model_type", "unknown")
            # The exporter's reason, without the advice for model authors around it.
            reason = (str(error.__cause__ or error).strip().splitlines() or [type(error).__name__])[0].strip()[:300]
            raise FailureError(f"PyTorch cannot export a {kind} model: {reason}") from error
    assert program is not None  # noqa: S101 - dynamo=True returns a program
    ClearMetadataAndDocStringPass()(program.model)  # drops stack traces, which contain paths of this machine
    proto = onnx_ir.to_proto(program.model)
    outputs = [output.name for output in proto.graph.output]
    if outputs != list(LOGIT_NAMES):
        raise FailureError(f"the exported model returns {', '.join(outputs)}, not only the two logits")
    proto.ir_version = _IR
    del proto.graph.value_info[:]
    _fill_biases(proto)
    _spell_out_lengths(proto)
    _reorder_gelu(proto)
    simplify_masks(proto, checkpoint.encoder.config.position_limit)
    return proto


def _inputs(checkpoint: Checkpoint) -> dict[str, Any]:
    """Tokens to trace with; one row is padded, so that the trace does not take a branch for full rows."""
    mask = torch.ones((_BATCH, _TOKENS), dtype=torch.int64)
    mask[0, _TOKENS // 2 :] = 0
    inputs = {"input_ids": mask + checkpoint.encoder.config.pad_token_id * (1 - mask)}
    if "attention_mask" in inspect.signature(checkpoint.model.forward).parameters:
        inputs["attention_mask"] = mask
    if checkpoint.encoder.config.segments:
        inputs["token_type_ids"] = torch.zeros_like(mask)
    return inputs


def _fill_biases(model: onnx.ModelProto) -> None:
    """Gives each LayerNormalization its optional bias, which ONNX Runtime's fusions read without checking that it exists."""
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type != "LayerNormalization" or len(node.input) > 2 or node.input[1] not in weights:
            continue
        name = f"{node.input[1]}/zero_bias"
        if name not in weights:
            weights[name] = numpy_helper.from_array(np.zeros(weights[node.input[1]].dims, np.float32), name)
            model.graph.initializer.append(weights[name])
        node.input.append(name)


def _spell_out_lengths(model: onnx.ModelProto) -> None:
    """Cuts positions at the length of input_ids, read from its shape: the form in which ONNX Runtime fuses embeddings."""
    graph, inputs = Graph(model), {each.name for each in model.graph.input}
    for cut in [node for node in model.graph.node if node.op_type == "Slice"]:
        positions, shape = graph.constant(cut.input[0]), graph.maker(cut.input[2], "Shape")
        if positions is None or positions.ndim != 2 or shape is None or shape.input[0] not in inputs:
            continue
        if {each.name: each.i for each in shape.attribute} != {"start": 1, "end": 2}:
            continue  # not the length of an input [batch, tokens]
        n = Nodes(f"{cut.output[0]}/length/")
        cut.input[2] = n("Unsqueeze", n("Gather", n("Shape", "input_ids"), n.constant(1)), n.constant([0]))
        n.put(model.graph, 0)
    Graph(model).prune()


def _reorder_gelu(model: onnx.ModelProto) -> None:
    """Turns ``x * (0.5 * (1 + erf))`` into ``(x * (1 + erf)) * 0.5``, the same bits, which ONNX Runtime fuses to one GELU."""
    graph = Graph(model)
    for halved in [node for node in model.graph.node if node.op_type == "Mul"]:
        half, added = sorted(halved.input, key=lambda name: graph.constant(name) is None)
        product, plus = graph.only_reader(halved.output[0], "Mul"), graph.maker(added, "Add")
        erf = next((node for name in plus.input if (node := graph.maker(name, "Erf"))), None) if plus else None
        scaled = graph.makers.get(erf.input[0]) if erf else None
        value = graph.constant(half)
        if value is None or value.size != 1 or value.item() != 0.5 or product is None or scaled is None:
            continue
        for x in set(product.input) & set(scaled.input):
            halved.input[:] = [x, added]
            product.input[:] = [halved.output[0], half]
