"""Export configurations where optimum's own lack something: ModernBERT's answer head, models with one token type."""

from __future__ import annotations

from typing import Any

from qadeploy.training.checkpoint import Checkpoint

TASK = "question-answering"


def own_configs(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """The ``custom_onnx_configs`` of optimum for the model, or None where its own configuration is right as it is.

    Also tells optimum that ModernBERT answers questions: version 0.1.0 of optimum-onnx knows the inputs of that
    encoder but not this head, whose outputs are those of every other one. Parity proves what comes of it.
    """
    from optimum.exporters.onnx.model_configs import ModernBertOnnxConfig
    from optimum.exporters.tasks import TasksManager
    from optimum.utils import DummyTextInputGenerator

    TasksManager.create_register("onnx")("modernbert", TASK)(ModernBertOnnxConfig)  # keeps what is there already
    if checkpoint.encoder.config.segments != 1:
        return None

    class OneType(DummyTextInputGenerator):  # type: ignore[misc]
        """Inputs to trace with; optimum's hold the token types 0 and 1 whatever the model has."""

        def generate(self, input_name: str, **options: Any) -> Any:
            values = super().generate(input_name, **options)
            return values * 0 if input_name == "token_type_ids" else values

    make = TasksManager.get_exporter_config_constructor(
        "onnx", checkpoint.model, task=TASK, library_name="transformers"
    )
    config = make(checkpoint.model.config)
    config.DUMMY_INPUT_GENERATOR_CLASSES = (OneType,)
    return {"model": config}
