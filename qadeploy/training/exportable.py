"""Whether ``export`` can export a model, known from its kind before hours of training."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

from qadeploy.errors import MissingExtraError

TASK = "question-answering"  # as optimum calls it
# The kinds that the tests train, export and quantize (docs/architectures.md).
TESTED = (
    *("albert", "bert", "camembert", "deberta-v2", "distilbert", "electra", "mobilebert", "modernbert", "mpnet"),
    *("roberta", "xlm-roberta"),
)
_MODULES = {"optimum": "optimum.exporters.onnx", "torch": "onnxscript"}  # by exporter, in the order of preference
_INPUTS = {"input_ids", "attention_mask", "token_type_ids"}  # what a bundle gives to its model


@dataclass(frozen=True, slots=True)
class Exportable:
    """Whether ``export`` can export a kind of model.

    Attributes:
        possible: None if only ``export`` itself can find out.
        why: Why it is not possible, or why that is not known.
    """

    possible: bool | None
    why: str = ""


def exporters(wanted: str = "auto") -> tuple[str, ...]:
    """The exporters to try, in order: optimum, torch, or both.

    Args:
        wanted: An exporter's name, or auto: optimum if optimum-onnx is installed, then PyTorch's own if optimum fails.

    Raises:
        MissingExtraError: None of them is installed.
    """
    installed = tuple(name for name, module in _MODULES.items() if wanted in ("auto", name) and _has(module))
    if not installed and wanted == "optimum":
        raise MissingExtraError("--exporter optimum", "optimum-onnx", "optimum")
    if not installed:
        raise MissingExtraError("PyTorch's exporter", "onnxscript", "train")
    return installed


def _has(module: str) -> bool:
    try:
        import_module(module)
    except ImportError:  # also raised by a release that does not work with another package
        return False
    return True


def exportable(config: Any) -> Exportable:
    """Looks up whether the installed exporters can export a kind of model.

    Args:
        config: The model's transformers configuration.

    Raises:
        MissingExtraError: No exporter is installed.
    """
    if config.model_type in TESTED and any(map(_has, _MODULES.values())):
        return Exportable(True)
    found = [exportable_by(name, config) for name in exporters()]
    if any(each.possible for each in found):
        return Exportable(True)
    return Exportable(
        None if any(each.possible is None for each in found) else False, ", and ".join(each.why for each in found)
    )


def exportable_by(exporter: str, config: Any) -> Exportable:
    """Looks up whether an exporter, optimum or torch, can export a kind of model.

    Kinds that are not tested are looked up in optimum. If optimum does not know the kind, or the exporter is torch, the
    answer is open: ``export`` then tries, and the parity check decides.
    """
    kind = config.model_type
    if kind in TESTED:
        return Exportable(True)
    if exporter == "torch":
        return Exportable(None, f"PyTorch's exporter is not tested on {kind} models")
    from optimum.exporters.onnx import model_configs  # noqa: F401 - registers the kinds
    from optimum.exporters.tasks import TasksManager

    try:
        tasks = TasksManager.get_supported_tasks_for_model_type(kind, "onnx", library_name="transformers")
    except KeyError:
        return Exportable(None, f"optimum has no configuration for {kind} models")
    if TASK not in tasks:
        return Exportable(False, f"optimum exports {kind} models, but not for {TASK}")
    more = sorted(set(tasks[TASK](config).inputs) - _INPUTS)
    if more:
        return Exportable(
            False, f"a {kind} model exported by optimum needs {', '.join(more)}, which a bundle does not provide"
        )
    return Exportable(True)
