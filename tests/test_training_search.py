"""``train --search``: trials, the run that they leave, kills, and everything that is refused."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qadeploy.errors import FailureError, InputError
from qadeploy.files import hash_file, holding, is_temporary
from qadeploy.records import Annotation, Example
from qadeploy.training import search as module
from qadeploy.training.options import TrainOptions
from qadeploy.training.search import recorded_search, train_with_search
from tests.cli_for_tests import fails, run, value, well
from tests.conftest import Once, tiny_options, triplets, unanswerable, write_jsonl

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.test_training_search"])
GIVEN = (
    *("--learning-rate", 0.003, "--negatives", 0, "--crops", 0, "--precision", "fp32"),
    *("--dev-fraction", 0.2, "--no-progress"),
)
QUESTIONS = [Example(str(n), "Who?", "Ada.", (Annotation("Ada", 0),)) for n in range(20)]


@pytest.fixture
def here(elsewhere: None, tiny_checkpoint: Path) -> list[Any]:
    """Data in an empty folder, and the command that trains on them with two settings given."""
    write_jsonl(Path("few.jsonl"), triplets(24))
    return ["train", "--data", "few.jsonl", "--base", tiny_checkpoint, *GIVEN]


def rows(metrics: dict[str, Any]) -> list[tuple[dict[str, float], float | None]]:
    """Settings and F1 of the trials."""
    return [(row["settings"], row["f1"]) for row in metrics["search"]["trials"]]


def refused(*arguments: object) -> str:
    """The error of a command whose input cannot be used; its lock may touch the folder."""
    result = run(*arguments)
    assert (result.exit_code, result.stderr.count("Error: ")) == (2, 1), result.output
    return result.stderr


@pytest.fixture(scope="session")
def searched(once: Once[tuple[Path, dict[str, Any], str]], tiny_checkpoint: Path) -> tuple[Path, dict[str, Any], str]:
    """A run after a search of three trials: its folder, what it printed as JSON, and its remarks."""

    def build(root: Path) -> tuple[Path, dict[str, Any], str]:
        data, out = write_jsonl(root / "few.jsonl", triplets(24)), root / "run"
        options = ("--data", data, "--base", tiny_checkpoint, "--out", out, *GIVEN)
        result = well("train", *options, "--search", 3, "--json")
        return out, value(result), result.stderr

    return once("searched", build)


# ---------------------------------------------------------------- the search


def test_the_run_has_the_settings_of_the_best_trial(searched):
    out, printed, said = searched
    metrics = json.loads((out / "metrics.json").read_text())
    assert printed == {"run": str(out), **metrics}
    trials, best = metrics["search"]["trials"], metrics["search"]["best"]
    assert [set(row["settings"]) for row in trials] == 3 * [{"epochs", "batch_size"}]
    assert trials[0]["settings"] == {"epochs": 3, "batch_size": 16}
    assert all(0 <= row["f1"] <= 100 and row["seconds"] > 0 for row in trials)
    assert trials[best - 1]["f1"] == max(row["f1"] for row in trials)
    assert metrics["search"]["folds"] is None
    options = json.loads((out / "run.json").read_text())["options"]
    assert trials[best - 1]["settings"].items() <= options.items()
    assert (options["learning_rate"], options["out"]) == (0.003, str(out))
    assert metrics["eval_f1"] == trials[best - 1]["f1"]  # on a CPU the same training reaches the same
    assert sorted(p.name for p in out.parent.iterdir()) == ["few.jsonl", "run"]
    assert sum(line.startswith("  trial ") for line in said.splitlines()) == 3
    assert "optuna" not in said
    assert "study" not in said


def test_the_report_and_the_card_tell_of_the_search(searched):
    out = searched[0]
    sentence = (
        "The settings are the best of 3 trials by F1 on the dev set, so the figures of the dev set are optimistic."
    )
    assert sentence in (out / "README.md").read_text()
    page = (out / "report.html").read_text()
    assert sentence in page
    assert 'aria-label="F1 by setting"' in page
    assert 'aria-label="Table of trials"' in page


def test_what_is_drawn_depends_on_the_trials_so_far_and_the_seed_alone():
    space = module._space(TrainOptions(), QUESTIONS)
    first = module._draw(space, [], 13)
    assert first == {"learning_rate": 1e-4, "epochs": 2, "batch_size": 16, "negatives": 1}
    done: list[dict[str, Any]] = [{"settings": first, "f1": 50.0}]
    for number in range(30):
        drawn = module._draw(space, done, 13)
        assert drawn == module._draw(space, done, 13)
        assert 2.5e-5 <= drawn["learning_rate"] <= 4e-4
        assert 1 <= drawn["epochs"] <= 4
        assert drawn["batch_size"] in {8, 16, 32}
        assert 1 <= drawn["negatives"] <= 3
        done.append({"settings": drawn, "f1": None if number % 3 else float(number)})
    assert len({str(row["settings"]) for row in done}) == len(done)
    assert module._draw(space, done, 14) != module._draw(space, done, 13)


@pytest.mark.parametrize(
    ("given", "varied"),
    [
        ({"learning_rate": 1e-3, "epochs": 2}, {"batch_size", "negatives"}),
        ({"batch_tokens": 512}, {"learning_rate", "epochs", "negatives"}),
        ({"negatives": 0}, {"learning_rate", "epochs", "batch_size"}),
    ],
)
def test_what_is_given_is_not_searched_for(given, varied):
    assert module._space(TrainOptions(**given), QUESTIONS).keys() == varied
    none = replace(QUESTIONS[0], answers=())
    assert module._space(TrainOptions(**given), [*QUESTIONS, none]).keys() == varied - {"negatives"}


def test_trials_are_compared_by_folds(here):
    found = value(well(*here, "--batch-size", 8, "--search", 2, "--folds", 2, "--json"))
    trials, best = found["search"]["trials"], found["search"]["best"]
    assert found["search"]["folds"] == 2
    assert trials[best - 1]["f1"] == found["folds"]["mean"]["f1"] == max(row["f1"] for row in trials)
    assert [row.keys() for row in trials] == 2 * [{"settings", "f1", "seconds"}]
    assert "by mean F1 of 2 folds" in Path("runs/few/README.md").read_text()


# ---------------------------------------------------------------- interrupted


def killed(options: TrainOptions) -> None:
    """A search that dies in its second trial, after a save."""
    gc.freeze()
    from qadeploy.training import trainer

    prune = trainer.prune

    def die(*arguments: Any) -> None:
        if Path(f"{options.out}.search.json").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        prune(*arguments)

    trainer.prune = die  # type: ignore[assignment]
    train_with_search(options, 3, str, progress=False)


def test_a_killed_search_continues_with_the_trials_that_are_missing(searched, here, tiny_checkpoint):
    given: dict[str, Any] = {"epochs": None, "batch_size": None}
    options = tiny_options(Path("few.jsonl"), tiny_checkpoint, Path("runs/few"), **given)
    child = FORKS.Process(target=killed, args=(options,))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    state = Path("runs/few.search.json")
    begun = json.loads(state.read_text())
    assert [row["settings"] for row in begun["rows"]] == [{"epochs": 3, "batch_size": 16}]
    assert begun["record"]["base"]["sha256"] == hash_file(tiny_checkpoint / "model.safetensors")
    assert begun["record"]["teacher_sha256"] is begun["record"]["unlabelled_sha256"] is None
    assert [is_temporary(p.name) for p in Path("runs").iterdir() if p != state].count(True) >= 1

    fails(2, ["runs/few.search.json: holds an unfinished search", "--resume"], *here, "--search", 3)
    again = ("train", "--resume", "--out", "runs/few", "--no-progress")
    assert "cannot be resumed, because it was started differently:\n  --seed was 13, now 6" in refused(
        *again, "--seed", 6
    )
    assert "--folds was None, now 2" in refused(*again, "--folds", 2)
    with holding(state):
        assert "runs/few.search.json: another command is writing it" in refused(*again)

    result = well(*again, "--json")
    assert "search: 3 trials, 1 of them done" in result.stderr
    assert rows(value(result)) == rows(searched[1])
    assert value(result)["eval_f1"] == searched[1]["eval_f1"]
    assert [p.name for p in Path("runs").iterdir()] == ["few"]
    assert "was complete already" in well(*again, "--search", 3).output


@pytest.mark.slow
def test_an_interrupted_last_training_continues(here, monkeypatch):
    def interrupt(folder: Path, newest: int, best: int | None) -> None:
        if Path("runs/few") in folder.parents:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("qadeploy.training.trainer.prune", interrupt)
        said = run(*here, "--batch-size", 8, "--search", 2).output
    assert "runs/few.search.json: the trials are kept: qadeploy train --resume --out runs/few continues" in said
    result = well("train", "--resume", "--out", "runs/few", "--no-progress", "--json")
    assert "runs/few: resumes after step" in result.stderr
    assert len(value(result)["search"]["trials"]) == 2
    assert [p.name for p in Path("runs").iterdir()] == ["few"]


# ---------------------------------------------------------------- failed


def test_a_trial_that_diverges_is_recorded_and_the_search_goes_on(here, tiny_checkpoint, monkeypatch):
    draws = [{"learning_rate": 1e30, "epochs": 1}, {"learning_rate": 3e-3, "epochs": 1}]
    monkeypatch.setattr(module, "_draw", lambda space, rows, seed: draws[len(rows)])
    options = tiny_options(Path("few.jsonl"), tiny_checkpoint, Path("run"), epochs=None, learning_rate=None)
    said: list[str] = []
    metrics = train_with_search(options, 2, said.append, progress=False).metrics
    failed, good = metrics["search"]["trials"]
    assert (failed["f1"], failed["settings"]) == (None, draws[0])
    assert failed["error"].startswith("training diverged")
    assert (metrics["search"]["best"], good["f1"]) == (2, metrics["eval_f1"])
    assert any("failed: training diverged" in line for line in said)


def test_if_all_trials_fail_the_last_error_ends_the_search(here, tiny_checkpoint):
    options = tiny_options(
        Path("few.jsonl"), tiny_checkpoint, Path("run"), batch_size=4, epochs=None, learning_rate=1e30
    )
    with pytest.raises(FailureError, match=r"all 2 trials failed, the last with this error: training diverged"):
        train_with_search(options, 2, str, progress=False)
    assert sorted(p.name for p in Path().iterdir()) == ["few.jsonl"]


def test_an_error_that_other_settings_cannot_avoid_ends_the_search_at_once(here):
    fails(1, ["nowhere"], "train", "--data", "few.jsonl", "--base", "./nowhere", "--out", "run", "--search", 2)


# ---------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("more", "messages"),
    [
        (["--search", 1], ["search is 1: at least 2 trials are needed"]),
        (
            ["--search", 2, "--epochs", 2, "--batch-size", 8],
            ["nothing is left", "leave out one of --learning-rate, --epochs, --batch-size, --negatives"],
        ),
        (["--search", 2, "--device", "tpu"], ["tpu"]),
    ],
)
def test_a_search_that_cannot_be_is_refused_before_data_are_read(more, messages, here):
    Path("few.jsonl").unlink()
    fails(2, messages, *here, *more)


def test_negatives_alone_cannot_be_searched_for_if_there_are_none_by_default(here, tiny_checkpoint):
    data = write_jsonl(Path("some.jsonl"), unanswerable(12))
    given = {"epochs": 2, "batch_size": 8, "learning_rate": 1e-3, "negatives": None}
    options = tiny_options(data, tiny_checkpoint, Path("run"), **given)
    with pytest.raises(InputError, match=r"leave out one of --learning-rate, --epochs, --batch-size$"):
        train_with_search(options, 2, str, progress=False)


def test_optuna_is_missed_before_data_are_read(here, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    Path("few.jsonl").unlink()
    fails(1, ["--search needs the package optuna", "pip install 'qadeploy[search]'"], *here, "--search", 2)


def test_several_processes_are_refused(here, monkeypatch):
    for name, number in (("WORLD_SIZE", 2), ("LOCAL_RANK", 0), ("RANK", 0)):
        monkeypatch.setenv(name, str(number))
    fails(2, ["--search trains in one process: run it without torchrun"], *here, "--search", 2)


def test_a_run_in_the_way_is_named(here):
    Path("runs/few").mkdir(parents=True)
    Path("runs/few/run.json").write_text(json.dumps({"status": "running", "options": {}}))
    fails(2, ["runs/few: holds an unfinished run"], *here, "--search", 2)
    fails(2, ["runs/few: the unfinished run is not from a search"], *here, "--search", 2, "--resume")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"trials": 2, "record": {"options": {}}, "rows": []}'])
def test_a_file_that_holds_no_search_is_kept(text, here):
    Path("runs").mkdir()
    Path("runs/few.search.json").write_text(text)
    with pytest.raises(InputError, match=r"few.search.json: is not the record of a search"):
        recorded_search(Path("runs/few"))
    fails(2, ["runs/few.search.json: is not the record of a search"], *here, "--search", 2)
