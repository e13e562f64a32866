"""The metric of EM and F1 is chosen once, from the training data, and stored with the model."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from qadeploy.cli import main
from qadeploy.evaluation.scoring import evaluate
from qadeploy.export.quantize.judging import find_judges
from qadeploy.export.reference import make_reference
from qadeploy.training.checkpoint import load_checkpoint, torch_answerer
from qadeploy.training.runs import dev_set, find_run, held_out
from qadeploy.training.train import train
from tests.conftest import Tiny, tiny_options, write_jsonl

NAMES, THINGS = ("王小明", "李大華", "陳美玲", "林志強", "黃雅婷"), ("燈", "船", "鐘", "梯子")


def chinese(count: int = 40) -> list[dict[str, object]]:
    """Rows on who keeps which thing; each row its own passage."""
    return [
        {
            "context": f"{NAMES[i % 5]}保管{THINGS[i % 4]}，在第{i}號房。{NAMES[(i + 2) % 5]}保管{THINGS[(i + 1) % 4]}。",
            "question": f"誰保管{THINGS[i % 4]}？",
            "answer": NAMES[i % 5],
        }
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Tiny:
    root = tmp_path_factory.mktemp("chinese")
    data = write_jsonl(root / "chinese.jsonl", chinese())
    said: list[str] = []
    result = train(
        tiny_options(data, tiny_checkpoint, root / "runs" / "chinese", epochs=1), said.append, progress=False
    )
    return Tiny(root, data, result.folder, result.metrics, said)


def f1_of_characters(prediction: str, gold: str) -> float:
    """F1 over the bag of characters; the rows hold nothing else but numbers."""
    bags = [Counter(c for c in text if c not in "，。") for text in (prediction, gold)]
    return 2 * (bags[0] & bags[1]).total() / (bags[0].total() + bags[1].total())


def test_a_run_on_chinese_scores_characters_and_stores_the_metric(run):
    assert run.metrics["settings"]["metric"] == "mixed"
    assert json.loads((run.run / "checkpoint" / "qadeploy.json").read_text())["metric"] == "mixed"
    assert any("metric of EM and F1: mixed" in line for line in run.said)
    assert "Percent (metric mixed), on " in (run.run / "README.md").read_text(encoding="utf-8")

    dev = dev_set(find_run(run.run))
    found = evaluate(torch_answerer(load_checkpoint(run.run / "checkpoint")), dev)
    assert found.metric == "mixed"
    assert found.scores.to_dict() == run.metrics["dev"]
    by_hand = [f1_of_characters(a.text, e.answers[0].text) for a, e in zip(found.answers, dev, strict=True)]
    assert not any(c.isdigit() for a in found.answers for c in a.text)
    assert found.scores.rows_f1.tolist() == pytest.approx(by_hand)
    assert any(0 < f1 < 1 for f1 in by_hand)


def test_the_gates_of_export_judge_by_the_metric_of_the_run(run):
    found = find_run(run.run)
    reference = make_reference(found, held_out(found, None))
    assert reference.scores.to_dict() == run.metrics["dev"]  # nothing was held out
    judges = find_judges(reference, reference.answerer)
    answers = [reference.answerer.answer(e.question, e.context)[0].text for e in judges.examples]
    by_hand = [f1_of_characters(text, e.answers[0].text) for text, e in zip(answers, judges.examples, strict=True)]
    assert judges.rows_f1.tolist() == pytest.approx(by_hand)


def test_the_run_is_asked_for_another_metric(run, tmp_path, tiny_checkpoint):
    options = tiny_options(run.data, tiny_checkpoint, tmp_path / "run", epochs=1, metric="squad")
    result = train(options, lambda line: None, progress=False)
    assert result.metrics["settings"]["metric"] == "squad"
    answerer = torch_answerer(load_checkpoint(result.folder / "checkpoint"))
    scores = evaluate(answerer, dev_set(find_run(result.folder))).scores
    assert scores.to_dict() == result.metrics["dev"]
    assert set(scores.rows_f1) <= {0, 1}  # a text without spaces is one word


@pytest.mark.parametrize(
    ("flags", "metric", "origin"),
    [
        ((), "mixed", "stored with the model"),
        (("--metric", "squad"), "squad", "as asked"),
        (("--metric", "auto"), "mixed", "chosen by the script of the data"),
    ],
)
def test_evaluate_says_by_which_metric(flags, metric, origin, run):
    def evaluated(*more: str) -> Any:
        result = CliRunner().invoke(main, ["evaluate", str(run.run), "--data", str(run.data), *flags, *more])
        assert result.exit_code == 0, result.output
        return result.stdout

    assert f"metric of EM and F1: {metric} ({origin})" in evaluated()
    found = json.loads(evaluated("--json"))
    assert found["metric"] == metric
    assert (found["f1"] == found["exact_match"]) == (metric == "squad")


def test_a_metric_that_does_not_exist_is_refused(run):
    result = CliRunner().invoke(main, ["evaluate", str(run.run), "--data", str(run.data), "--metric", "cmrc"])
    assert result.exit_code == 2
    assert "'cmrc' is not one of 'auto', 'squad', 'mixed'" in result.output
