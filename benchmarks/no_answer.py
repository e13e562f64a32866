"""What a tuned null threshold and a fitted temperature bring, on questions of which a third has no answer.

    python benchmarks/no_answer.py FOLDER/squadshifts_new_wiki.json --out benchmarks/results/no_answer.json

The files are SQuAD v1.1 JSON with several articles. A third of the questions of every paragraph is moved to another
paragraph of the same article, one that does not hold the annotated answers: it is near in topic and holds no
answer. Split by article: 8 articles are drawn as ``models/prepare_data.py`` draws them, so that the base model
that ships has never seen them; 3 of them are the dev part (the threshold and the temperature are chosen on it), 5
are held out. Training takes whole paragraphs of the other articles.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from qadeploy.build.checkpoint import load_checkpoint, torch_answerer
from qadeploy.build.train import TrainOptions, train
from qadeploy.data.readers import read
from qadeploy.doctor import diagnose
from qadeploy.evaluate import Evaluation, evaluate
from qadeploy.files import write_json
from qadeploy.qa.metrics import bootstrap_interval
from qadeploy.qa.settings import QaSettings

SEED = 13  # of models/prepare_data.py
UNSEEN, DEV = 8, 3  # articles that the base model has not seen, and those of them that are the dev part
Json = dict[str, Any]


def moved(article: Json, generator: random.Random) -> Json:
    """The article with a third of its questions moved to another paragraph of it, without their answers."""
    paragraphs = [{"context": p["context"], "qas": []} for p in article["paragraphs"]]
    for number, paragraph in enumerate(article["paragraphs"]):
        for qa in paragraph["qas"]:
            golds = {a["text"].lower() for a in qa["answers"]}
            places = [
                i
                for i, p in enumerate(paragraphs)
                if i != number and not any(gold in p["context"].lower() for gold in golds)
            ]
            if places and generator.random() < 1 / 3:
                entry = {"id": qa["id"], "question": qa["question"], "answers": [], "is_impossible": True}
                paragraphs[generator.choice(places)]["qas"].append(entry)
            else:
                paragraphs[number]["qas"].append({**qa, "is_impossible": False})
    return {"title": article["title"], "paragraphs": paragraphs}


def split(articles: Sequence[Json], train_questions: int) -> dict[str, list[Json]]:
    """The parts ``train``, ``dev`` and ``held_out``, by article; train is cut to whole paragraphs."""
    titles = sorted(a["title"] for a in articles)
    if len(set(titles)) < 2 * UNSEEN:
        raise SystemExit(f"{len(set(titles))} articles are too few: the split is by article and needs {2 * UNSEEN}")
    unseen = random.Random(SEED).sample(titles, UNSEEN)
    parts: dict[str, list[Json]] = {"train": [], "dev": [], "held_out": []}
    for article in articles:
        title = article["title"]
        place = "train" if title not in unseen else "dev" if title in unseen[:DEV] else "held_out"
        parts[place].append(moved(article, random.Random(f"{SEED} {title}")))
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


def measured(evaluation: Evaluation) -> Json:
    """EM, F1 and what of them falls to the questions with and without an answer; the calibration error."""
    return {**evaluation.scores.to_dict(), "ece": evaluation.calibration_error}


def main() -> None:
    """Makes the parts, trains, scores the held-out part in three ways, writes the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("files", nargs="+", type=Path, help="SQuAD v1.1 JSON with several articles")
    parser.add_argument("--base", help="checkpoint to start from (default: the base model that ships)")
    parser.add_argument("--train-questions", type=int, default=2400)
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
    for name, part in split(articles, given.train_questions).items():
        write_json(folder / f"{name}.json", {"version": "2.0", "data": part})
    options = TrainOptions(
        data=str(folder / "train.json"),
        dev_data=str(folder / "dev.json"),
        eval_data=str(folder / "held_out.json"),
        base=given.base,
        out=str(folder / "run"),
        epochs=given.epochs,
        seed=SEED,
    )
    metrics = train(options, print, progress=False).metrics

    checkpoint = load_checkpoint(folder / "run" / "checkpoint")
    chosen = checkpoint.settings
    held_out = read(options.eval_data or "").examples

    def scored(settings: QaSettings, allow: bool) -> Evaluation:
        return evaluate(torch_answerer(replace(checkpoint, settings=settings)), held_out, allow_no_answer=allow)

    tuned = scored(chosen, True)
    zero = scored(replace(chosen, null_threshold=0.0), True)
    always = scored(chosen, False)
    uncalibrated = scored(replace(chosen, temperature=1.0), True)
    gains = {
        name: {
            "f1": 100.0 * float((tuned.scores.rows_f1 - other.scores.rows_f1).mean()),
            "interval": list(bootstrap_interval(tuned.scores.rows_f1 - other.scores.rows_f1)),
        }
        for name, other in (("over_threshold_0", zero), ("over_always_answer", always))
    }
    report = {
        "questions": {name: _counts(folder / f"{name}.json") for name in ("train", "dev", "held_out")},
        "settings": chosen.to_dict(),
        "held_out": {
            "tuned": measured(tuned),
            "threshold_0": measured(zero),
            "always_answer": measured(always),
            "gain_of_tuned_f1": gains,
            "ece_temperature_1": uncalibrated.calibration_error,
        },
        "dev": {"no_answer": metrics["no_answer"], "calibration": metrics["calibration"]},
        "options": {"base": given.base, "epochs": given.epochs, "train_questions": given.train_questions, "seed": SEED},
        "threads": torch.get_num_threads(),
        "seconds": round(time.time() - started, 1),
        "environment": diagnose(),
    }
    for line in table(report):
        print(line)
    return report


def _counts(path: Path) -> dict[str, int]:
    examples = read(str(path)).examples
    return {"questions": len(examples), "without_answer": sum(not e.answers for e in examples)}


def table(report: Json) -> list[str]:
    """The held-out figures as lines of text."""
    held = report["held_out"]
    lines = [f"{'held out':<16} {'EM':>6} {'F1':>6} {'HasAns F1':>10} {'NoAns F1':>9}"]
    for name in ("tuned", "threshold_0", "always_answer"):
        row = held[name]
        lines.append(
            f"{name:<16} {row['exact_match']:>6.1f} {row['f1']:>6.1f} {row['HasAns_f1']:>10.1f} {row['NoAns_f1']:>9.1f}"
        )
    for name, gain in held["gain_of_tuned_f1"].items():
        low, high = gain["interval"]
        lines.append(f"tuned {name.replace('_', ' ')}: {gain['f1']:+.2f} F1 (95 % {low:+.2f} to {high:+.2f})")
    lines.append(
        f"ECE at temperature 1: {held['ece_temperature_1']:.3f}, at the fitted one: {held['tuned']['ece']:.3f}"
    )
    return lines


if __name__ == "__main__":
    main()
