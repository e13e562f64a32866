"""Export: from a checkpoint to an fp32 bundle through optimum, with logit parity checked."""

from __future__ import annotations

import contextlib
import logging
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path

import onnx

from qadeploy.errors import FailureError
from qadeploy.export.manifest import finish_bundle
from qadeploy.export.onnx_config import own_configs
from qadeploy.export.reference import Reference
from qadeploy.inference.bundle import MODEL, Bundle, open_bundle, writing_bundle
from qadeploy.training.checkpoint import Checkpoint
from qadeploy.training.exportable import TASK, exportable


def export(reference: Reference, out: Path) -> Bundle:
    """Writes the fp32 bundle ``out`` and returns it, verified.

    Raises FailureError if optimum cannot export the model, GateError if the logits miss parity, InputError if ``out``
    exists and is not a bundle.
    """
    with writing_bundle(out) as work:
        with tempfile.TemporaryDirectory() as folder:
            reference.count(0, 1, " exporting to ONNX")
            export_graph(reference.checkpoint, Path(folder))
            shutil.copyfile(Path(folder) / MODEL, work / MODEL)
        finish_bundle(reference, work, out.name, precision="fp32", made={"graph": "plain"})
    return open_bundle(out)


def export_graph(checkpoint: Checkpoint, folder: Path) -> None:
    """Writes the checkpoint as ``folder/model.onnx``, fp32, by optimum. Raises FailureError if that is not possible."""
    found = exportable(checkpoint.model.config)
    if found.possible is False:
        raise FailureError(found.why)
    from optimum.exporters.onnx import onnx_export_from_model

    logging.getLogger("optimum").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the tracer; parity decides
        try:
            with contextlib.redirect_stdout(None):
                onnx_export_from_model(
                    checkpoint.model,
                    folder,
                    task=TASK,
                    do_validation=False,
                    preprocessors=[],
                    custom_onnx_configs=own_configs(checkpoint),
                )
        except Exception as error:  # optimum raises ValueError, KeyError, RuntimeError, ... by model
            kind = getattr(checkpoint.model.config, "model_type", "unknown")
            raise FailureError(f"optimum cannot export a {kind} model: {' '.join(str(error).split())[:300]}") from error
    if not (folder / MODEL).is_file() or list(folder.glob("*.onnx_data")):
        raise FailureError("the exported model is larger than one ONNX file may be (2 GB), which a bundle must be")
    model = onnx.load(folder / MODEL)
    read_shared_weights(model.graph)
    onnx.save(model, folder / MODEL)


def read_shared_weights(graph: onnx.GraphProto) -> None:
    """Lets every node read the weights directly if the exporter passes shared ones through Identity nodes.

    Behind an Identity a weight is no constant to a quantizer: 66 of the 74 matmuls of a 12-layer ALBERT, whose
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
