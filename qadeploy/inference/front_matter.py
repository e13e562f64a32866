"""The YAML block at the head of a model card, as the Hugging Face hub reads it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.repocard import metadata_load

TASK = "question-answering"
_METRICS = {"exact_match": "EM", "f1": "F1"}


def front_matter(
    name: str,
    *,
    library: str,
    base: Mapping[str, Any] | None,
    dataset: str,
    dev_set: bool,
    scores: Mapping[str, float],
    tags: Sequence[str] = (),
) -> str:
    """The block with its ``---`` lines.

    Args:
        name: The name of the model.
        library: The library that loads it.
        base: The record of the base model (name, sha256, license), whose licence the model inherits; None if not known.
        dataset: The data set that was scored.
        dev_set: Whether the scores are for the dev set carved from it.
        scores: The scores in percent, by metric.
        tags: Further tags.
    """
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
                dataset_split=split or ("dev" if dev_set else "validation"),
                metric_type=metric,
                metric_name=title,
                metric_value=round(float(scores[metric]), 2),
            )
            for metric, title in _METRICS.items()
        ],
    )
    return f"---\n{data.to_yaml()}\n---\n"


def base_label(base: Mapping[str, Any]) -> str:
    """The name of the base model on the hub, or its folder's name without the path on the training machine."""
    name = str(base["name"])
    if base.get("sha256") is None and not Path(name).is_absolute():
        return name  # weights without a local folder came from the hub
    path = Path(name)
    return path.parent.name if path.name == "checkpoint" and path.parent.name else path.name


def license_of(folder: str | Path) -> str | None:
    """The licence named by the model card in a folder; None without a licence or a readable card."""
    path = Path(folder) / "README.md"
    if not path.is_file():
        return None
    try:
        found = (metadata_load(path) or {}).get("license")
    except Exception:  # yaml's errors, ValueError, UnicodeDecodeError: nothing depends on this card
        return None
    return found if isinstance(found, str) else None
