"""The differences between the releases of transformers that qadeploy supports, in one place.

4.57 is the last release that optimum-onnx 0.1.0 allows; the 5.x line has other argument names and more progress bars,
and no question-answering pipeline.
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

OLDEST, TOO_NEW = (4, 53), (6,)  # as in pyproject.toml


def release(text: str) -> tuple[int, ...]:
    """The first two numbers of a version, such as (5, 0) for 5.0.0rc1."""
    return tuple(int(part) for part in text.split(".")[:2])


def require_supported(found: str) -> None:
    """Raises FailureError if qadeploy does not support the release ``found`` of transformers."""
    if not OLDEST <= release(found) < TOO_NEW:
        low, high = (".".join(map(str, numbers)) for numbers in (OLDEST, TOO_NEW))
        raise FailureError(
            f"transformers {found} is installed, but training and export need {low} or newer, below {high}: "
            f"pip install 'transformers>={low},<{high}'"
        )


require_supported(version("transformers"))  # before imports that an unsupported release may lack

from transformers import TrainingArguments  # noqa: E402
from transformers.utils import logging  # noqa: E402

IS_5 = release(version("transformers")) >= (5,)
_RENAMED = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}


def silence() -> None:
    """Silences warnings, and the progress bars that release 5 shows whenever it loads or saves a model."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def trainer_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Renames options of TrainingArguments from their names in 4.57 to those of the installed release."""
    known = {field.name for field in fields(TrainingArguments)}
    found = {_RENAMED[name] if _RENAMED.get(name) in known else name: value for name, value in options.items()}
    if "warmup_ratio" in found and "warmup_ratio" not in known:
        found["warmup_steps"] = min(found.pop("warmup_ratio"), math.nextafter(1.0, 0.0))  # values from 1 on count steps
    return found


@contextmanager
def eager_attention(model: Any) -> Iterator[Any]:
    """The model with attention computed by plain matmuls and softmax, during the block.

    PyTorch's exporter adds nodes to fused attention that guard against rows of padding alone. Before release 5, many
    models choose their kind of attention when they are created, so the block gets a second model with the same weights.
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
