"""The provenance of a run and a bundle: the base model and the versions of the software that made them."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from qadeploy.errors import CheckpointError
from qadeploy.files import hash_file
from qadeploy.inference.front_matter import license_of
from qadeploy.shipped import base_model_path
from qadeploy.training.checkpoint import Checkpoint


def versions_of(names: Iterable[str], *, missing: str) -> dict[str, str]:
    """The versions of Python and of the packages; ``missing`` for a name that is not installed as a package."""
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = missing
    return found


def base_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """The base's name, the SHA-256 of its weights, its commit on the hub and its licence; None if not known."""
    weights = Path(checkpoint.name) / "model.safetensors"
    commit = getattr(checkpoint.model.config, "_commit_hash", None)  # whatever branch or tag was requested
    return {
        "name": base_name(checkpoint.name),
        "sha256": hash_file(weights) if weights.is_file() else None,
        "commit": str(commit) if commit else None,
        "license": license_of(checkpoint.name),
    }


def base_name(name: str) -> str:
    """How a record names the base: the shipped model by its name, not by the path where it is installed."""
    with suppress(CheckpointError):
        if name == str(base_model_path()):
            return base_model_path().name
    return name
