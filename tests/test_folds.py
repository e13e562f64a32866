"""Cross-validation by passage, on data of which a third has no answer, and the run that it leaves."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest
from click.testing import CliRunner

from qadeploy.cli import main
from qadeploy.data.loading import read
from qadeploy.data.splits import folds_by_passage
from qadeploy.errors import FailureError, InputError
from qadeploy.evaluation.scoring import evaluate
from qadeploy.records import Annotation, Example
from qadeploy.training import folds as module
from qadeploy.training.checkpoint import load_checkpoint, torch_answerer
from qadeploy.training.folds import cross_validate
from qadeploy.training.options import TrainOptions
from qadeploy.training.train import RunResult, train
from tests.conftest import tiny_arguments, tiny_options, triplets, unanswerable, write_jsonl

# ---------------------------------------------------------------- splitting


def examples(sizes: list[int]) -> list[Example]:
    """Passages with the given numbers of questions, which do not follow each other in the list."""
    rounds = max(sizes)
    return [
        Example(f"{p}-{r}", f"{r}?", f"passage {p}", (Annotation("p", 0),))
        for r in range(rounds)
        for p, size in enumerate(sizes)
        if r < size
    ]


@pytest.mark.parametrize("folds", [2, 3, 5])
def test_passages_are_never_split_and_nothing_is_lost(folds):
    given = examples([7, 1, 1, 3, 2, 5, 4, 1, 6])
    parts = folds_by_passage(given, folds, 13)
    assert len(parts) == folds
    assert sorted(e.id for part in parts for e in part) == sorted(e.id for e in given)
    places = [{e.context for e in part} for part in parts]
    assert sum(map(len, places)) == len(set().union(*places)) == 9
    assert max(map(len, parts)) - min(map(len, parts)) <= 2  # one passage has 7 of the 30 questions
    assert all([e.id for e in given if e in part] == [e.id for e in part] for part in parts)
    assert folds_by_passage(given, folds, 13) == parts


def test_another_seed_is_another_split_and_k_passages_are_enough():
    given = examples([1] * 10)
    assert folds_by_passage(given, 5, 1) != folds_by_passage(given, 5, 2)
    assert [len(part) for part in folds_by_passage(given, 10, 1)] == [1] * 10


@pytest.mark.parametrize(
    ("folds", "message"), [(1, "folds is 1: at least 2"), (-1, "at least 2"), (4, "3 passages cannot be split into 4")]
)
def test_folds_that_cannot_be(folds, message):
    with pytest.raises(InputError, match=message):
        folds_by_passage(examples([5, 5, 5]), folds, 13)


# ---------------------------------------------------------------- cross-validation


def test_the_folds_are_in_the_metrics_of_a_normal_run(folded, tiny_checkpoint, tmp_path):
    metrics = json.loads((folded.run / "metrics.json").read_text())
    assert folded.output == {"run": str(folded.run), **metrics}
    found = metrics.pop("folds")
    assert [row["questions"] for row in found["rows"]] == [24, 24, 24]
    assert [row["passages"] for row in found["rows"]] == [24, 24, 24]
    for name in ("exact_match", "f1", "accuracy"):
        values = [row[name] for row in found["rows"]]
        assert found["mean"][name] == pytest.approx(statistics.mean(values))
        assert found["std"][name] == pytest.approx(statistics.stdev(values))
        assert all(0 <= value <= 100 for value in values)
    assert json.loads((folded.run / "run.json").read_text())["options"]["data"] == str(folded.data)
    assert sorted(p.name for p in folded.run.parent.iterdir()) == ["some"]

    options = tiny_options(folded.data, tiny_checkpoint, tmp_path / "plain", epochs=2)
    plain = train(options, lambda line: None, progress=False)
    timeless = {"seconds": 0, "speed": None}
    assert {**plain.metrics, **timeless} == {**metrics, **timeless}


def test_a_fold_is_what_training_without_it_scores_on_it(folded, tiny_checkpoint, tmp_path):
    parts = folds_by_passage(read(str(folded.data)).examples, 3, 13)
    left_out = {e.context for e in parts[1]}
    rows = unanswerable(72)
    data = write_jsonl(tmp_path / "rest.jsonl", [row for row in rows if row["context"] not in left_out])
    # The loader of held-out data uses the seed, so the compared run has such data too.
    other = write_jsonl(tmp_path / "left_out.jsonl", [row for row in rows if row["context"] in left_out])
    options = tiny_options(data, tiny_checkpoint, tmp_path / "run", epochs=2, eval_data=str(other))
    train(options, lambda line: None, progress=False)
    scores = evaluate(torch_answerer(load_checkpoint(tmp_path / "run" / "checkpoint")), parts[1]).scores
    row = folded.output["folds"]["rows"][1]
    assert (scores.f1, scores.exact_match, scores.accuracy) == pytest.approx(
        (row["f1"], row["exact_match"], row["accuracy"])
    )


def test_a_table_is_printed(folded):
    said = folded.remarks.splitlines()
    head = next(i for i, line in enumerate(said) if line.split()[:2] == ["fold", "questions"])
    for line, row in zip(said[head + 1 :], folded.output["folds"]["rows"], strict=False):
        cells = line.split()
        assert [float(x) for x in cells[1:]] == pytest.approx(
            [row[k] for k in ("questions", "passages", "best_epoch", "accuracy", "exact_match", "f1")], abs=0.06
        )
    mean, std = folded.output["folds"]["mean"]["f1"], folded.output["folds"]["std"]["f1"]
    assert f"F1 {mean:.1f} ± {std:.1f}" in said[head + 4]


def test_of_the_questions_of_a_fold_only_those_that_are_scored_count(tiny_checkpoint, tmp_path):
    data = write_jsonl(tmp_path / "rows.jsonl", triplets(16))
    options = tiny_options(data, tiny_checkpoint, tmp_path / "run", epochs=1, max_eval_samples=3)
    found = cross_validate(options, 2, lambda line: None, progress=False)
    assert [(row["questions"], row["passages"]) for row in found["rows"]] == [(3, 3), (3, 3)]


def test_rows_marked_as_validation_are_in_no_fold_and_warnings_come_through(tiny_checkpoint, tmp_path):
    rows = [{**row, "split": "validation" if i < 4 else "train"} for i, row in enumerate(triplets(16))]
    dev = write_jsonl(tmp_path / "dev.jsonl", [{**rows[4], "split": ""}, *triplets(20)[16:]])
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    said: list[str] = []
    options = tiny_options(data, tiny_checkpoint, tmp_path / "run", epochs=1, dev_data=str(dev))
    found = cross_validate(options, 2, said.append, progress=False)
    assert [row["questions"] for row in found["rows"]] == [6, 6]
    assert sum("WARNING: 1 dev passages are also in the training data" in line for line in said) == 1
    assert sum("WARNING: 1 held-out passages" in line for line in said) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dev.jsonl", "rows.jsonl"]


def test_all_folds_are_scored_by_one_metric(tiny_checkpoint, tmp_path, monkeypatch):
    rows = triplets(8)
    rows[0]["context"] = f"{rows[0]['context']} {100 * 'я'}"  # over 10 % of the letters, and none in the other fold
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    asked = []

    def scored(options: TrainOptions, say: object, **others: object) -> RunResult:
        asked.append(options.metric)
        scores = dict.fromkeys(("exact_match", "f1", "accuracy", "total"), 1)
        return RunResult(tmp_path, {"held_out": scores, "best_epoch": 1, "settings": {}})

    monkeypatch.setattr(module, "train", scored)
    cross_validate(tiny_options(data, tiny_checkpoint, tmp_path / "run"), 2, str, progress=False)
    assert asked == ["mixed", "mixed"]


@pytest.mark.parametrize("fault", [FailureError("it broke"), InputError("{}: is no good"), KeyboardInterrupt()])
def test_what_ends_a_fold_leaves_nothing(fault, tiny_checkpoint, tmp_path, monkeypatch):
    data = write_jsonl(tmp_path / "rows.jsonl", triplets(8))

    def failing(options: TrainOptions, say: object, **others: object) -> None:
        (Path(options.out) / "checkpoints").mkdir(parents=True)
        raise type(fault)(*(str(a).format(options.data) for a in fault.args))

    monkeypatch.setattr(module, "train", failing)
    with pytest.raises(type(fault)) as caught:
        cross_validate(tiny_options(data, tiny_checkpoint, tmp_path / "run"), 2, str, progress=False)
    if isinstance(fault, InputError):
        assert str(caught.value) == f"fold 1: {data}: is no good"  # the file that the user gave
    assert [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]


@pytest.mark.parametrize(
    ("rows", "folds", "message"),
    [
        (8, "1", "folds is 1: at least 2"),
        (8, "9", "8 passages cannot be split into 9 folds"),
        (3, "2", "3 passages in 2 folds leave 1 to train on, 2 are needed"),
    ],
)
def test_folds_that_cannot_be_are_refused_before_anything(rows, folds, message, tiny_checkpoint, tmp_path):
    data = write_jsonl(tmp_path / "rows.jsonl", triplets(rows))
    result = CliRunner().invoke(main, tiny_arguments(data, tiny_checkpoint, tmp_path / "run", "--folds", folds))
    assert result.exit_code == 2
    assert message in result.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]


def test_a_place_that_is_taken_is_refused_before_the_folds(tiny_checkpoint, tmp_path):
    data = write_jsonl(tmp_path / "rows.jsonl", triplets(8))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("keep me")
    with pytest.raises(InputError, match="not a run folder"):
        cross_validate(tiny_options(data, tiny_checkpoint, tmp_path / "mine"), 2, str, progress=False)
