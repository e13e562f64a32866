"""Where the base model and the data set lie that qadeploy ships. Imports nothing heavy."""

from __future__ import annotations

from pathlib import Path

from qadeploy.errors import CheckpointError

BASE_MODEL = "minilm-l6-qa"
HANDBOOK = Path(__file__).parent / "data" / "handbook.jsonl"


def base_model_path() -> Path:
    """The folder of the base model that qadeploy ships, in the installed package or the checkout.

    Raises CheckpointError where neither has it.
    """
    package = Path(__file__).resolve().parent
    for folder in (package / "models" / BASE_MODEL, package.parent / "models" / BASE_MODEL):
        if (folder / "model.safetensors").is_file():
            return folder
    raise CheckpointError(f"the base model models/{BASE_MODEL} is not in this installation: give --base PATH")
