"""The paths of the models, the data set and the pages that qadeploy ships. Imports nothing heavy."""

from __future__ import annotations

from pathlib import Path

from qadeploy.errors import BundleError, CheckpointError

BASE_MODEL = "minilm-l6-qa"
BASE_BUNDLE = "minilm-l6-qa-int8"
HANDBOOK = Path(__file__).parent / "data" / "handbook.jsonl"
PAGE = Path(__file__).parent / "serve" / "page"


def base_model_path() -> Path:
    """Returns the folder of the base model that qadeploy ships, in the installed package or the checkout.

    Raises:
        CheckpointError: Neither the installed package nor the checkout has it.
    """
    found = _folder(BASE_MODEL, "model.safetensors")
    if found is None:
        raise CheckpointError(f"the base model models/{BASE_MODEL} is not part of this installation: give --base PATH")
    return found


def base_bundle_path() -> Path:
    """Returns the folder of the bundle of the base model that qadeploy ships: int8, for a CPU.

    Raises:
        BundleError: Neither the installed package nor the checkout has it.
    """
    found = _folder(BASE_BUNDLE, "manifest.json")
    if found is None:
        raise BundleError(f"the bundle models/{BASE_BUNDLE} is not in this installation: name a bundle")
    return found


def _folder(name: str, file: str) -> Path | None:
    package = Path(__file__).resolve().parent
    folders = (package / "models" / name, package.parent / "models" / name)
    return next((folder for folder in folders if (folder / file).is_file()), None)
