"""Export: from a checkpoint to an fp32 bundle through one of two exporters, with logit parity checked."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnx

from qadeploy.errors import FailureError
from qadeploy.export.finishing import finish_bundle
from qadeploy.export.optimum_exporter import export_by_optimum
from qadeploy.export.reference import Reference
from qadeploy.export.torch_exporter import export_by_torch
from qadeploy.inference.bundle import MODEL, Bundle, open_bundle, writing_bundle
from qadeploy.training.checkpoint import Checkpoint
from qadeploy.training.exportable import exportable_by, exporters

_EXPORTERS = {"optimum": export_by_optimum, "torch": export_by_torch}
_LARGEST = 2 * 2**30  # bytes that one protobuf file can have


def export(reference: Reference, out: Path, exporter: str = "auto") -> Bundle:
    """Writes the fp32 bundle ``out`` and returns it, verified.

    Args:
        reference: The model, and the questions that judge the bundle.
        out: The bundle folder.
        exporter: auto, optimum or torch; see ``exporters``.

    Raises:
        FailureError: As ``export_graph`` does.
        GateError: The logits are too far from PyTorch's.
        InputError: ``out`` exists and is not a bundle.
    """
    with writing_bundle(out) as work:
        reference.count(0, 1, " exporting to ONNX")
        used = export_graph(reference.checkpoint, work, exporter)
        finish_bundle(reference, work, out.name, precision="fp32", made={"graph": "plain", "exporter": used})
    return open_bundle(out)


def export_graph(checkpoint: Checkpoint, folder: Path, exporter: str = "auto") -> str:
    """Writes the checkpoint as ``folder/model.onnx``, fp32; either exporter gives the same inputs, outputs and opset.

    Returns:
        The exporter that was used, optimum or torch.

    Raises:
        FailureError: The model is too large, or no exporter can export it.
        MissingExtraError: The requested exporter is not installed.
    """
    if 4 * checkpoint.model.num_parameters() >= _LARGEST:
        raise FailureError("the exported model would be larger than 2 GB, too large for the one ONNX file of a bundle")
    reasons = []
    for used in exporters(exporter):
        found = exportable_by(used, checkpoint.model.config)
        try:
            if found.possible is False:
                raise FailureError(found.why)
            model = _EXPORTERS[used](checkpoint)
        except FailureError as error:
            reasons.append(str(error))
            continue
        read_shared_weights(model.graph)
        folder.mkdir(parents=True, exist_ok=True)
        onnx.save(model, folder / MODEL)
        return used
    raise FailureError("; ".join(reasons))


def read_shared_weights(graph: onnx.GraphProto) -> None:
    """Lets every node read the weights directly where the exporter passes shared weights through Identity nodes.

    A quantizer does not see the output of an Identity as a constant: 66 of the 74 matmuls of a 12-layer ALBERT, whose
    layers share all weights, would stay in float.
    """
    weights = {tensor.name for tensor in graph.initializer}
    outputs = {output.name for output in graph.output}
    names: dict[str, str] = {}
    kept = []
    for node in graph.node:
        source = names.get(node.input[0], node.input[0]) if node.op_type == "Identity" else ""
        if source in weights and node.output[0] not in outputs:
            names[node.output[0]] = source
        else:
            kept.append(node)
    del graph.node[:]
    graph.node.extend(kept)
    _rename_inputs(graph, names)


def _rename_inputs(graph: onnx.GraphProto, names: Mapping[str, str]) -> None:
    for node in graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = names.get(name, name)
        for attribute in node.attribute:  # the branches of an If read the names around them
            if attribute.type == onnx.AttributeProto.GRAPH:
                _rename_inputs(attribute.g, names)
