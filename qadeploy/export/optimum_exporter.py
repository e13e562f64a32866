"""Export through optimum, with what it lacks: ModernBERT's answer head, a single token type, custom models."""

from __future__ import annotations

import contextlib
import logging
import tempfile
import warnings
from pathlib import Path
from typing import Any

import onnx

from qadeploy.errors import FailureError, one_line
from qadeploy.inference.bundle import MODEL
from qadeploy.training.checkpoint import Checkpoint
from qadeploy.training.exportable import TASK


def export_by_optimum(checkpoint: Checkpoint) -> onnx.ModelProto:
    """The checkpoint's graph. Raises FailureError if optimum cannot export the model."""
    from optimum.exporters.onnx import onnx_export_from_model

    logging.getLogger("optimum").setLevel(logging.ERROR)
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")  # the tracer's warnings; parity decides
        try:
            with contextlib.redirect_stdout(None):
                onnx_export_from_model(
                    checkpoint.model,
                    Path(folder),
                    task=TASK,
                    do_validation=False,
                    preprocessors=[],
                    custom_onnx_configs=own_configs(checkpoint),
                )
        except Exception as error:  # optimum raises ValueError, KeyError, RuntimeError, ... by model
            kind = getattr(checkpoint.model.config, "model_type", "unknown")
            raise FailureError(f"optimum cannot export a {kind} model: {one_line(error, 300)}") from error
        return onnx.load(Path(folder) / MODEL)


def own_configs(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """The ``custom_onnx_configs`` of optimum for the model, or None if optimum's own configuration fits.

    Also tells optimum that ModernBERT answers questions: optimum-onnx 0.1.0 knows that encoder's inputs but not its
    question-answering head, whose outputs are those of every such head. Parity checks the result.
    """
    from optimum.exporters.onnx.model_configs import BertOnnxConfig, DistilBertOnnxConfig, ModernBertOnnxConfig
    from optimum.exporters.tasks import TasksManager
    from optimum.utils import DummyTextInputGenerator

    TasksManager.create_register("onnx")("modernbert", TASK)(ModernBertOnnxConfig)  # keeps an existing entry
    segments, config = checkpoint.encoder.config.segments, checkpoint.model.config
    try:
        TasksManager.get_supported_tasks_for_model_type(config.model_type, "onnx")
    except KeyError:  # a model with code of its own: it has an encoder's usual inputs
        return {"model": (BertOnnxConfig if segments else DistilBertOnnxConfig)(config, task=TASK)}
    if segments != 1:
        return None

    class OneType(DummyTextInputGenerator):  # type: ignore[misc]
        """Inputs to trace with; optimum's own contain the token types 0 and 1 for every model."""

        def generate(self, input_name: str, **options: Any) -> Any:
            values = super().generate(input_name, **options)
            return values * 0 if input_name == "token_type_ids" else values

    make = TasksManager.get_exporter_config_constructor(
        "onnx", checkpoint.model, task=TASK, library_name="transformers"
    )
    made = make(config)
    made.DUMMY_INPUT_GENERATOR_CLASSES = (OneType,)
    return {"model": made}
