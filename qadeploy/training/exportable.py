"""Whether ``export`` can take a model: known from its kind, before it is trained for hours."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

from qadeploy.errors import MissingExtraError

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


def choose_exporter(wanted: str = "auto") -> str:
    """The exporter to take: optimum or torch.

    Args:
        wanted: Its name, or auto: optimum if optimum-onnx is installed, else PyTorch's own.

    Raises:
        MissingExtraError: It is not installed.
    """
    if wanted != "torch" and _has("optimum.exporters.onnx"):
        return "optimum"
    if wanted == "optimum":
        raise MissingExtraError("--exporter optimum", "optimum-onnx", "optimum")
    if not _has("onnxscript"):
        raise MissingExtraError("PyTorch's exporter", "onnxscript", "train")
    return "torch"


def _has(module: str) -> bool:
    try:
        import_module(module)
    except ImportError:  # also of another package in a release that it does not work with
        return False
    return True


def exportable(config: Any, exporter: str | None = None) -> Exportable:
    """Looks up whether ``export`` can take a kind of model.

    optimum is asked about kinds that are not tested. If it does not know a kind either, or PyTorch exports, the answer is open:
    ``export`` then tries, and parity decides.

    Args:
        config: The model's configuration, as transformers has it.
        exporter: optimum or torch; None for the one that ``export`` takes by default.
    """
    kind = config.model_type
    if kind in TESTED:
        return Exportable(True)
    try:
        exporter = exporter or choose_exporter()
    except MissingExtraError as error:
        return Exportable(None, str(error))
    if exporter == "torch":
        return Exportable(None, f"PyTorch's exporter is not tested on {kind} models")
    from optimum.exporters.onnx import model_configs  # noqa: F401 - makes them known
    from optimum.exporters.tasks import TasksManager

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
