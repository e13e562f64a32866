"""The YAML block at the head of a model card, as the Hugging Face hub reads it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.repocard import metadata_load

TASK = "question-answering"
_METRICS = {"exact_match": "EM", "f1": "F1"}
_DEV = " (dev part)"


def front_matter(
    name: str,
    *,
    library: str,
    base: Mapping[str, Any] | None,
    source: str,
    scores: Mapping[str, float],
    tags: Sequence[str] = (),
) -> str:
    """The block with its ``---`` lines, for a model that earned ``scores`` (percent) on ``source``.

    ``base`` is the record of the base model (name, sha256, license), None where it is not known. The licence is
    the base's; what is not known is left out.
    """
    dataset = source.removesuffix(_DEV)
    hub, _, split = dataset.removeprefix("hub:").partition(":") if dataset.startswith("hub:") else ("", "", "")
    data = ModelCardData(
        model_name=name,
        license=base.get("license") if base else None,
        library_name=library,
        pipeline_tag=TASK,
        base_model=base_label(base) if base else None,
        datasets=[hub] if hub else None,
        tags=["extractive-qa", *tags],
        metrics=list(_METRICS),
        eval_results=[
            EvalResult(
                task_type=TASK,
                dataset_type=hub or Path(dataset).stem,
                dataset_name=hub or Path(dataset).stem,
                dataset_split=split or ("dev" if source.endswith(_DEV) else "validation"),
                metric_type=metric,
                metric_name=title,
                metric_value=round(float(scores[metric]), 2),
            )
            for metric, title in _METRICS.items()
        ],
    )
    return f"---\n{data.to_yaml()}\n---\n"


def base_label(base: Mapping[str, Any]) -> str:
    """The base's name on the hub, or of its folder: no path of the machine that trained on it."""
    name = str(base["name"])
    if base.get("sha256") is None and not Path(name).is_absolute():
        return name  # weights that lay in no folder came from the hub
    path = Path(name)
    return path.parent.name if path.name == "checkpoint" and path.parent.name else path.name


def license_of(folder: str | Path) -> str | None:
    """The licence that the model card in a folder names; None where there is none, or no card that can be read."""
    path = Path(folder) / "README.md"
    if not path.is_file():
        return None
    try:
        found = (metadata_load(path) or {}).get("license")
    except Exception:  # yaml's errors, ValueError, UnicodeDecodeError: somebody else's card, which nothing depends on
        return None
    return found if isinstance(found, str) else None
