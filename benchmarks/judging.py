"""How often int8 changes answers to questions that a model was trained on, against those that it has not seen.

    python benchmarks/judging.py runs/handbook bundles/handbook benchmarks/results/judging.json

Every recipe's model and the fp32 bundle answer the dev part, the held-out questions and the training part. The
training part's figures stand there twice: plain, and by the weights of ``qadeploy/export/quantize/judging.py``.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np

from qadeploy.errors import InputError, QadeployError
from qadeploy.evaluation.scoring import Evaluation, evaluate
from qadeploy.export.parity import parity_windows
from qadeploy.export.quantize.judging import weights
from qadeploy.export.quantize.recipes import RECIPES, Material
from qadeploy.export.reference import Reference, make_answerer, make_reference
from qadeploy.files import write_json
from qadeploy.inference.bundle import MODEL, open_bundle
from qadeploy.inference.doctor import diagnose
from qadeploy.records import Example
from qadeploy.training.runs import find_run, held_out, known_examples


@click.command(help=__doc__)
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
def main(run: Path, bundle: Path, out: Path) -> None:
    """Measures, prints the figures and writes the JSON."""
    found = find_run(run)
    reference = make_reference(found, *held_out(found, None))
    if not reference.dev:
        raise InputError(f"{run}: its dev part is not to be had: train it again on data that are there")
    opened = open_bundle(bundle)
    model, session = opened.read(MODEL), opened.manifest["session"]
    seen = {e.context for e in (*reference.dev, *reference.examples)}
    parts = {
        "dev": reference.dev,
        "held_out": reference.examples,
        "training": tuple(e for e in known_examples(found.checkpoint) if e.context not in seen),
    }
    checkpoint = reference.checkpoint
    heads, pad = checkpoint.model.config.num_attention_heads, checkpoint.encoder.config.pad_token_id
    material = Material(model, heads, pad, parity_windows(checkpoint, reference.dev))
    exact = _answers(reference, model, session, parts)
    scores = {name: np.asarray([a.score for a in part.answers]) for name, part in exact.items()}
    weighed = weights(scores["dev"], scores["training"])[len(scores["dev"]) :]
    recipes = {}
    for name, recipe in RECIPES.items():
        others = _answers(reference, recipe.make(material).model, session, parts)
        unseen = [_figures(exact[p], others[p], np.ones(len(parts[p]))) for p in ("dev", "held_out")]
        rows = {
            "unseen": {
                k: float(np.average([u[k] for u in unseen], weights=[len(parts["dev"]), len(parts["held_out"])]))
                for k in unseen[0]
            },
            "training": _figures(exact["training"], others["training"], np.ones(len(parts["training"]))),
            "training_weighed": _figures(exact["training"], others["training"], weighed),
        }
        recipes[name] = rows
        shown = ", ".join(f"{k} {v['answers_changed']:.1f} %" for k, v in rows.items())
        click.echo(f"{name}: answers changed: {shown}")
    report = {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "environment": diagnose(),
        "bundle": {"name": bundle.name, "sha256": opened.hash},
        "questions": {name: len(part) for name, part in parts.items()},
        "f1": {name: part.scores.f1 for name, part in exact.items()},
        "recipes": recipes,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, report)


def _answers(
    reference: Reference, model: bytes, session: Mapping[str, Any], parts: Mapping[str, Sequence[Example]]
) -> dict[str, Evaluation]:
    answerer = make_answerer(reference, model, session)
    return {name: evaluate(answerer, part) for name, part in parts.items()}


def _figures(exact: Evaluation, other: Evaluation, weighed: Any) -> dict[str, float]:
    """Percent of answers changed, the mean change of F1 and of its size, in points, by the weights."""
    changed = [a.text != b.text for a, b in zip(exact.answers, other.answers, strict=True)]
    difference = other.scores.rows_f1 - exact.scores.rows_f1
    rows = {"answers_changed": np.asarray(changed), "f1_change": difference, "f1_moved": np.abs(difference)}
    return {name: 100 * float(np.average(values, weights=weighed)) for name, values in rows.items()}


if __name__ == "__main__":
    try:
        main()
    except QadeployError as error:
        raise SystemExit(f"Error: {error}") from error
