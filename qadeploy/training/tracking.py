"""Experiment trackers: TensorBoard, MLflow and Weights & Biases, through the Trainer's own callbacks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from urllib.parse import urlsplit

from transformers import TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from qadeploy.errors import FailureError, InputError, MissingExtraError
from qadeploy.training import distributed
from qadeploy.training.runs import TENSORBOARD

NONE = "none"
_PATIENCE = 10  # seconds


def check_tracker(name: str) -> None:
    """Checks that a tracker can be used.

    Args:
        name: A value of ``--report-to``.

    Raises:
        MissingExtraError: Its package, or one of that package's dependencies, is not installed.
        InputError: An environment variable turns it off.
        FailureError: MLflow's server cannot be reached.
    """
    if name == NONE:
        return
    try:
        module = import_module(name)
    except ImportError as error:
        raise MissingExtraError(f"--report-to {name}", error.name or name, name) from error
    if name not in get_available_reporting_integrations():
        raise InputError(
            f"--report-to {name}: the environment turns it off: unset WANDB_DISABLED or DISABLE_MLFLOW_INTEGRATION"
        )
    if name == "mlflow":
        _check_server(module.get_tracking_uri())


def _check_server(uri: str) -> None:
    """Raises FailureError if MLflow's server cannot be reached; MLflow itself would retry for minutes."""
    import requests  # a dependency of MLflow

    if uri.startswith(("http://", "https://")):
        try:
            requests.head(uri, timeout=_PATIENCE)
        except requests.RequestException as error:
            raise FailureError(
                f"--report-to mlflow: {urlsplit(uri).hostname} cannot be reached within {_PATIENCE} s: check "
                f"MLFLOW_TRACKING_URI, or leave it out (--report-to {NONE})"
            ) from error


def tracker(name: str, folder: Path) -> list[TrainerCallback]:
    """The callback of a tracker, if any. TensorBoard writes to ``folder``; the others read environment variables."""
    if name == NONE or not distributed.is_first():
        return []
    if name != TENSORBOARD:
        return [INTEGRATION_TO_CALLBACK[name]()]
    from torch.utils.tensorboard import SummaryWriter

    return [INTEGRATION_TO_CALLBACK[name](SummaryWriter(str(folder)))]


@contextmanager
def tracker_errors(name: str) -> Iterator[None]:
    """Raises FailureError if the tracker raises an error of its own, for example because its server cannot be reached."""
    try:
        yield
    except Exception as error:
        if type(error).__module__.partition(".")[0] != name:
            raise
        raise FailureError(
            f"--report-to {name}: {error}: check its server and login, or leave it out (--report-to {NONE} with --resume)"
        ) from error
