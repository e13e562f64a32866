"""The provenance of a run and a bundle: the base model and the versions of the software that made them."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable
from contextlib import suppress
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from qadeploy.errors import CheckpointError
from qadeploy.files import hash_file
from qadeploy.inference.front_matter import license_of
from qadeploy.shipped import base_model_path
from qadeploy.training.checkpoint import Checkpoint, weight_files


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
    return {
        "name": base_name(checkpoint.name),
        "sha256": weights_hash(Path(checkpoint.name)),
        "commit": commit_of(checkpoint),
        "license": license_of(checkpoint.name),
    }


def weights_hash(folder: Path) -> str | None:
    """The SHA-256 of a checkpoint's weights, or of the names and hashes of several files; None if there are none."""
    hashes = {file.name: hash_file(file) for file in weight_files(folder)}
    if len(hashes) > 1:
        return sha256(json.dumps(hashes).encode()).hexdigest()
    return next(iter(hashes.values()), None)


def commit_of(checkpoint: Checkpoint) -> str | None:
    """The commit of a checkpoint on the hub, whatever branch or tag was requested; None for a folder."""
    commit = getattr(checkpoint.model.config, "_commit_hash", None)
    return str(commit) if commit else None


def base_name(name: str) -> str:
    """How a record names the base: the shipped model by its name, not by the path where it is installed."""
    with suppress(CheckpointError):
        if name == str(base_model_path()):
            return base_model_path().name
    return name
