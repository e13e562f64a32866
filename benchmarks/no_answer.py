"""What a tuned null threshold and a fitted temperature bring, on questions of which a third has no answer.

    python benchmarks/no_answer.py FOLDER/squadshifts_new_wiki.json --out benchmarks/results/no_answer.json

The files are SQuAD v1.1 JSON with several articles. A third of the questions of every paragraph is moved to another
paragraph of the same article, one that does not hold the annotated answers: it is near in topic and holds no
answer. Split by article: 8 articles are drawn as ``models/prepare_data.py`` draws them, so that the base model
that ships has never seen them, in two halves of 4. Training takes whole paragraphs of the other articles, with the first
half as its dev data. Each half is then held out once: it is scored with the settings that the other half chose
(for the second, those that training stored), so that every question of the 8 articles counts. With ``--train-share``
below a third, training sees fewer questions without an answer than are asked: what a threshold is for.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qadeploy.core.metrics import Scores, bootstrap_interval
from qadeploy.data.readers import read
from qadeploy.evaluation.scoring import Evaluation, evaluate
from qadeploy.files import write_json
from qadeploy.inference.answerer import Answerer
from qadeploy.inference.doctor import diagnose
from qadeploy.inference.session import Pending
from qadeploy.records import Example, FloatArray, Window
from qadeploy.training.checkpoint import TorchModel, load_checkpoint
from qadeploy.training.features import make_features
from qadeploy.training.selection import choose_settings, unchosen_settings
from qadeploy.training.train import TrainOptions, train

SEED = 13  # of models/prepare_data.py
UNSEEN = 8  # articles that the base model has not seen, half of them the first half
SHARE = 1 / 3  # of the questions is moved
Json = dict[str, Any]


def moved(article: Json, share: float, generator: random.Random) -> Json:
    """The article with ``share`` of its questions moved to another paragraph of it, without their answers."""
    paragraphs = [{"context": p["context"], "qas": []} for p in article["paragraphs"]]
    for number, paragraph in enumerate(article["paragraphs"]):
        for qa in paragraph["qas"]:
            golds = {a["text"].lower() for a in qa["answers"]}
            places = [
                i
                for i, p in enumerate(paragraphs)
                if i != number and not any(gold in p["context"].lower() for gold in golds)
            ]
            if places and generator.random() < share:
                entry = {"id": qa["id"], "question": qa["question"], "answers": [], "is_impossible": True}
                paragraphs[generator.choice(places)]["qas"].append(entry)
            else:
                paragraphs[number]["qas"].append({**qa, "is_impossible": False})
    return {"title": article["title"], "paragraphs": paragraphs}


def split(articles: Sequence[Json], train_questions: int, train_share: float) -> dict[str, list[Json]]:
    """The parts ``train``, ``first`` and ``second``, by article; train is cut to whole paragraphs."""
    titles = sorted(a["title"] for a in articles)
    if len(set(titles)) < 2 * UNSEEN:
        raise SystemExit(f"{len(set(titles))} articles are too few: the split is by article and needs {2 * UNSEEN}")
    unseen = random.Random(SEED).sample(titles, UNSEEN)
    parts: dict[str, list[Json]] = {"train": [], "first": [], "second": []}
    for article in articles:
        title = article["title"]
        place = "train" if title not in unseen else "first" if title in unseen[: UNSEEN // 2] else "second"
        share = train_share if place == "train" else SHARE
        parts[place].append(moved(article, share, random.Random(f"{SEED} {title}")))
    paragraphs = [p for article in parts["train"] for p in article["paragraphs"]]
    random.Random(SEED).shuffle(paragraphs)
    kept, count = [], 0
    for paragraph in paragraphs:
        if count >= train_questions:
            break
        kept.append(paragraph)
        count += len(paragraph["qas"])
    parts["train"] = [{"title": "train", "paragraphs": kept}]
    return parts


class Remembering:
    """A model that runs each distinct window once: the ways of scoring differ in what follows the logits."""

    def __init__(self, model: TorchModel) -> None:
        self.model = model
        self.known: dict[bytes, tuple[FloatArray, FloatArray]] = {}

    def run(self, windows: Sequence[Window]) -> list[tuple[FloatArray, FloatArray]]:
        """Start and end logits of each window, float32 ``[tokens]`` each, in order."""
        new = {w.input_ids.tobytes(): w for w in windows if w.input_ids.tobytes() not in self.known}
        self.known.update(zip(new, self.model.run(list(new.values())), strict=True))
        return [self.known[w.input_ids.tobytes()] for w in windows]

    def start(self, windows: Sequence[Window]) -> Pending:
        """``run``, when the result is asked for."""
        return Pending(partial(self.run, windows))


def measured(evaluations: Sequence[Evaluation]) -> Json:
    """The scores and the calibration error of the questions of all evaluations together."""
    rows = [e.scores for e in evaluations]
    scores = Scores(
        np.concatenate([r.rows_exact_match for r in rows]),
        np.concatenate([r.rows_f1 for r in rows]),
        np.concatenate([r.rows_accuracy for r in rows]),
        np.concatenate([r.rows_has_answer for r in rows]),
    )
    answers = tuple(a for e in evaluations for a in e.answers)
    return {**scores.to_dict(), "ece": Evaluation(scores, answers, True).calibration_error}


def main() -> None:
    """Makes the parts, trains, scores each half by what the other chose, writes the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("files", nargs="+", type=Path, help="SQuAD v1.1 JSON with several articles")
    parser.add_argument("--base", help="checkpoint to start from (default: the base model that ships)")
    parser.add_argument("--train-questions", type=int, default=800)
    parser.add_argument("--train-share", type=float, default=SHARE, help="of them moved (default: a third)")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--keep", type=Path, help="keep the parts and the run in this folder")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "no_answer.json")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = run(given, given.keep or Path(folder))
    given.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(given.out, report)
    print(f"written: {given.out}")


def run(given: argparse.Namespace, folder: Path) -> Json:
    """The report; parts and run lie in ``folder``."""
    started = time.time()
    folder.mkdir(parents=True, exist_ok=True)
    articles = [a for path in given.files for a in json.loads(path.read_text(encoding="utf-8"))["data"]]
    for name, part in split(articles, given.train_questions, given.train_share).items():
        write_json(folder / f"{name}.json", {"version": "2.0", "data": part})
    options = TrainOptions(
        data=str(folder / "train.json"),
        dev_data=str(folder / "first.json"),
        base=given.base,
        out=str(folder / "run"),
        epochs=given.epochs,
        seed=SEED,
    )
    metrics = train(options, print, progress=False).metrics

    checkpoint = load_checkpoint(folder / "run" / "checkpoint")
    model = Remembering(TorchModel(checkpoint.model, checkpoint.encoder.config.pad_token_id))
    parts = {name: read(str(folder / f"{name}.json")).examples for name in ("train", "first", "second")}
    features = make_features(parts["second"], checkpoint.encoder, checkpoint.settings, "second")
    unchosen = unchosen_settings(checkpoint.settings, parts["train"])
    chosen_on = {
        "first": checkpoint.settings,
        "second": choose_settings(features, padded(model.run([f.window for f in features.features])), unchosen),
    }

    def scored(allow: bool = True, **changes: float) -> list[Evaluation]:
        """The evaluation of each half by the settings that the other chose."""
        found = []
        for half, other in (("second", "first"), ("first", "second")):
            settings = replace(chosen_on[other], **changes)  # type: ignore[arg-type]
            answerer = Answerer(checkpoint.encoder, settings, model)
            found.append(evaluate(answerer, parts[half], allow_no_answer=allow))
        return found

    ways = {
        "tuned": scored(),
        "threshold_0": scored(null_threshold=0.0),
        "always_answer": scored(allow=False),
        "temperature_1": scored(temperature=1.0),
    }
    rows = {name: np.concatenate([e.scores.rows_f1 for e in way]) for name, way in ways.items()}
    differences = {name: rows["tuned"] - rows[name] for name in ("threshold_0", "always_answer")}
    report = {
        "questions": {name: _counts(part) for name, part in parts.items()},
        "chosen_on": {name: settings.to_dict() for name, settings in chosen_on.items()},
        "held_out": {name: measured(way) for name, way in ways.items()},
        "held_out_by_half": {
            half: {name: measured([way[i]]) for name, way in ways.items()} for i, half in enumerate(("second", "first"))
        },
        "gain_of_tuned_f1": {
            f"over_{name}": {"f1": 100.0 * float(rows.mean()), "interval": list(bootstrap_interval(rows))}
            for name, rows in differences.items()
        },
        "dev": {"no_answer": metrics["no_answer"], "calibration": metrics["calibration"]},
        "options": {
            "base": given.base,
            "epochs": given.epochs,
            "train_questions": given.train_questions,
            "train_share": given.train_share,
            "seed": SEED,
        },
        "threads": torch.get_num_threads(),
        "seconds": round(time.time() - started, 1),
        "environment": diagnose(),
    }
    for line in table(report):
        print(line)
    return report


def padded(logits: Sequence[tuple[FloatArray, FloatArray]]) -> tuple[FloatArray, FloatArray]:
    """Start and end logits as two arrays ``[windows, longest]``, as the Trainer gives them."""
    longest = max(len(starts) for starts, _ in logits)
    both = [[np.pad(row, (0, longest - len(row))) for row in side] for side in zip(*logits, strict=True)]
    return np.stack(both[0]), np.stack(both[1])


def _counts(examples: Sequence[Example]) -> dict[str, int]:
    return {"questions": len(examples), "without_answer": sum(not e.answers for e in examples)}


def table(report: Json) -> list[str]:
    """The held-out figures as lines of text."""
    lines = [f"{'held out':<16} {'EM':>6} {'F1':>6} {'HasAns F1':>10} {'NoAns F1':>9} {'ECE':>6}"]
    for name, row in report["held_out"].items():
        lines.append(
            f"{name:<16} {row['exact_match']:>6.1f} {row['f1']:>6.1f} {row['HasAns_f1']:>10.1f} {row['NoAns_f1']:>9.1f} "
            f"{row['ece']:>6.3f}"
        )
    for name, gain in report["gain_of_tuned_f1"].items():
        low, high = gain["interval"]
        lines.append(f"tuned {name.replace('_', ' ')}: {gain['f1']:+.2f} F1 (95 % {low:+.2f} to {high:+.2f})")
    for name, settings in report["chosen_on"].items():
        threshold, temperature = settings["null_threshold"], settings["temperature"]
        lines.append(f"chosen on the {name} half: null threshold {threshold:+.2f}, temperature {temperature:.2f}")
    return lines


if __name__ == "__main__":
    main()
