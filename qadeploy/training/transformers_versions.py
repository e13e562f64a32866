"""What differs between the releases of transformers that qadeploy works with, in one place.

4.57 is the last release that optimum-onnx 0.1.0 admits; the 5.x line has other argument names and more progress bars, and no
question-answering pipeline.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import fields
from importlib.metadata import version
from typing import Any

from qadeploy.errors import FailureError

OLDEST, TOO_NEW = (4, 53), (6,)  # as pyproject.toml admits


def release(text: str) -> tuple[int, ...]:
    """The leading numbers of a version: (5, 0) of 5.0.0rc1, as far as a comparison needs them."""
    return tuple(int(part) for part in text.split(".")[:2])


def require_supported(found: str) -> None:
    """Raises FailureError if ``found``, a release of transformers, is none that qadeploy works with."""
    if not OLDEST <= release(found) < TOO_NEW:
        low, high = (".".join(map(str, numbers)) for numbers in (OLDEST, TOO_NEW))
        raise FailureError(
            f"transformers {found} is installed, but training and export need {low} or newer, below {high}: "
            f"pip install 'transformers>={low},<{high}'"
        )


require_supported(version("transformers"))  # before anything is imported from it that another release may lack

from transformers import TrainingArguments  # noqa: E402
from transformers.utils import logging  # noqa: E402

IS_5 = release(version("transformers")) >= (5,)
_RENAMED = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}


def silence() -> None:
    """Silences warnings, and the progress bars of loading and saving that 5 has for every model."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def trainer_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of TrainingArguments, given by their names in 4.57, as the installed release takes them."""
    known = {field.name for field in fields(TrainingArguments)}
    found = {_RENAMED[name] if _RENAMED.get(name) in known else name: value for name, value in options.items()}
    if "warmup_ratio" in found and "warmup_ratio" not in known:
        found["warmup_steps"] = min(found.pop("warmup_ratio"), math.nextafter(1.0, 0.0))  # from 1 on it counts steps
    return found


@contextmanager
def eager_attention(model: Any) -> Iterator[Any]:
    """The model with attention computed by plain matmuls and softmax, during the block.

    PyTorch's exporter gives fused attention nodes that guard against rows of padding alone. Before 5, many models choose how
    they compute attention when they are made, so there it is another one with the same weights.
    """
    before = getattr(model.config, "_attn_implementation", "eager")
    if before == "eager":
        yield model
    elif not IS_5:
        other = type(model)._from_config(deepcopy(model.config), attn_implementation="eager")
        other.load_state_dict(model.state_dict(), assign=True)
        yield other.eval()
    else:
        model.set_attn_implementation("eager")
        try:
            yield model
        finally:
            model.set_attn_implementation(before)
