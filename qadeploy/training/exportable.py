"""Whether ``export`` can take a model: known from its kind, before it is trained for hours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

TASK = "question-answering"  # as optimum calls it
# The kinds that the tests train, export and quantize (docs/architectures.md).
TESTED = (
    "albert",
    "bert",
    "camembert",
    "deberta-v2",
    "distilbert",
    "electra",
    "mobilebert",
    "modernbert",
    "mpnet",
    "roberta",
    "xlm-roberta",
)
_INPUTS = {"input_ids", "attention_mask", "token_type_ids"}  # what a bundle gives to its model


@dataclass(frozen=True, slots=True)
class Exportable:
    """Whether ``export`` can take a kind of model.

    Attributes:
        possible: None if only ``export`` itself can find out.
        why: Why not, or why that is not known.
    """

    possible: bool | None
    why: str = ""


def exportable(config: Any) -> Exportable:
    """Looks up whether ``export`` can take a kind of model.

    optimum is asked about kinds that are not tested. Without it, or if it does not know a kind either, the answer is open:
    ``export`` then tries the configuration of BERT, and parity decides.

    Args:
        config: The model's configuration, as transformers has it.
    """
    kind = config.model_type
    if kind in TESTED:
        return Exportable(True)
    try:
        from optimum.exporters.onnx import model_configs  # noqa: F401 - makes them known
        from optimum.exporters.tasks import TasksManager
    except ImportError:
        return Exportable(None, "optimum-onnx is not installed")
    try:
        tasks = TasksManager.get_supported_tasks_for_model_type(kind, "onnx", library_name="transformers")
    except KeyError:
        return Exportable(None, f"optimum has no configuration for {kind} models")
    if TASK not in tasks:
        return Exportable(False, f"optimum exports {kind} models, but not for {TASK}")
    more = sorted(set(tasks[TASK](config).inputs) - _INPUTS)
    if more:
        return Exportable(False, f"an exported {kind} model takes {', '.join(more)}, which a bundle does not provide")
    return Exportable(True)
