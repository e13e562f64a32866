"""The search over recipes: the deciding questions and their weights, and what is printed, kept and chosen."""

from __future__ import annotations

import inspect
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from qadeploy.cli import main
from qadeploy.core.metrics import bootstrap_interval
from qadeploy.errors import GateError
from qadeploy.export.parity import parity_windows
from qadeploy.export.quantize import judging
from qadeploy.export.quantize.judging import find_judges, weights
from qadeploy.export.quantize.recipes import RECIPES, Material, QuantizedModel, Recipe
from qadeploy.export.quantize.run import quantize
from qadeploy.export.quantize.search import (
    MeasuredRecipe,
    Search,
    SearchOptions,
    Step,
    code_of,
    duel_line,
    leaderboard,
    leaderboard_lines,
    rank,
)
from qadeploy.export.reference import Reference, make_answerer, make_reference
from qadeploy.inference.answerer import Answerer
from qadeploy.inference.bundle import MODEL, open_bundle
from qadeploy.inference.tuning import SESSIONS
from qadeploy.training.runs import HeldOut, find_run, known_examples
from tests.timing_for_tests import Clock, Slowed


@pytest.fixture(scope="module")
def source(bundle) -> bytes:
    return open_bundle(bundle).read(MODEL)


@pytest.fixture(scope="module")
def material(reference, bundle) -> Material:
    return Material(bundle / MODEL, 4, 0, parity_windows(reference.checkpoint, reference.examples))


def search(reference: Reference, material: Material, cache: Path | None = None, **changes: Any) -> Search:
    listeners = {name: changes.pop(name) for name in ("say", "on_step") if name in changes}
    options = SearchOptions(**{"max_f1_drop": 100.0, "cache": cache, **changes})
    return Search(reference, material, options, **listeners)


# ---------------------------------------------------------------- the judges


def test_a_small_dev_set_gets_questions_of_the_training_part_and_no_context_twice(reference, source):
    judges = find_judges(reference, make_answerer(reference, source, {}))
    dev, training = judges.examples[: judges.dev], judges.examples[judges.dev :]
    assert dev == reference.dev
    assert len(training) == 76  # all of 96 but the dev set
    assert not {e.context for e in dev} & {e.context for e in training}
    assert set(training) <= set(known_examples(reference.run.checkpoint))
    assert judges.weights.mean() == pytest.approx(1)
    assert judges.to_dict() == {"dev": 20, "training": 76, "worth": round(judges.worth, 1)}
    assert 20 < judges.worth <= 96


@pytest.mark.parametrize("why", ["enough", "no time", "no run", "few wanted"])
def test_the_dev_set_judges_alone_where_it_is_large_or_there_is_no_other(why, reference, source, monkeypatch):
    seconds, expected = None, 0
    if why == "enough":
        monkeypatch.setattr(judging, "ENOUGH", 20)
    elif why == "no time":
        seconds = 0.0
    elif why == "no run":
        reference = replace(reference, run=replace(reference.run, record=None, checkpoint=Path("none")))
    else:
        monkeypatch.setattr(judging, "MOST", 9)
        expected = 9
    judges = find_judges(reference, make_answerer(reference, source, {}), seconds)
    assert (judges.dev, len(judges.examples) - judges.dev) == (20, expected)
    if not expected:
        assert judges.weights.tolist() == [1.0] * 20
        assert judges.change(make_answerer(reference, source, {}))["f1_change_training"] is None


def test_held_out_questions_never_judge(tiny, source):
    run = find_run(tiny.run)
    asked = known_examples(run.checkpoint)[:30]
    reference = make_reference(run, HeldOut("some", tuple(asked)))
    judges = find_judges(reference, make_answerer(reference, source, {}))
    assert not {e.context for e in asked} & {e.context for e in judges.examples[judges.dev :]}


def test_each_class_of_certainty_weighs_as_in_the_dev_set():
    generator = np.random.default_rng(0)
    dev, training = generator.uniform(0, 1, 80), 1 - generator.uniform(0, 1, 400) ** 3 / 2  # surer by far
    found = weights(dev, training)
    every = np.concatenate([dev, training])
    assert found.mean() == pytest.approx(1)
    assert (found >= 0).all()
    edges = np.quantile(dev, [0.25, 0.5, 0.75])
    for low, high in zip([-1, *edges], [*edges, 2], strict=True):
        share = found[(every >= low) & (every < high)].sum() / len(every)
        assert share == pytest.approx(0.25)  # a quarter of the dev set each
    assert np.average(every, weights=found) < training.mean() - 0.1  # no longer as sure as on memorised questions


@pytest.mark.parametrize(("dev", "training"), [([0.5, 0.7], []), ([], [0.5])])
def test_one_part_alone_weighs_the_same_everywhere(dev, training):
    assert weights(np.array(dev), np.array(training)).tolist() == [1.0] * (len(dev) + len(training))


def test_equal_scores_weigh_the_same():
    assert weights(np.ones(8), np.ones(4)) == pytest.approx(np.ones(12))


def test_the_change_is_the_weighted_mean_of_pairs_with_its_interval(reference, source):
    answerer = make_answerer(reference, source, {})
    judges = find_judges(reference, answerer)
    assert tuple(judges.change(answerer).values()) == (0.0, (0.0, 0.0), 0.0, 0.0)
    rows = judges.rows_f1.copy()
    rows[[0, 30, 31]] -= 0.5  # as if the float model had been worse on three questions
    gained = 0.5 * judges.weights * np.isin(np.arange(96), [0, 30, 31])
    found = replace(judges, rows_f1=rows).change(answerer)
    assert found["f1_lost"] == pytest.approx(-100 * gained.mean())
    assert found["f1_change_interval"] == pytest.approx(bootstrap_interval(gained))
    assert (found["f1_change_dev"], found["f1_change_training"]) == pytest.approx((100 * 0.5 / 20, 100 * 1 / 76))


# ---------------------------------------------------------------- searching


def test_every_recipe_is_measured_in_steps_and_kept(reference, material, tmp_path):
    steps: list[Step] = []
    said: list[str] = []
    recipes = [RECIPES["int8"], RECIPES["int8-weights"]]
    one = search(reference, material, tmp_path, budget=500.0, on_step=steps.append, say=said.append)
    found = one.run(recipes)
    assert [c.recipe for c in found] == ["int8", "int8-weights"]
    for candidate in found:
        assert candidate.latency_range[0] <= candidate.latency <= candidate.latency_range[1]
        assert candidate.throughput_range[0] <= candidate.throughput <= candidate.throughput_range[1]
        assert 0 < candidate.size < len(material.model)
        assert candidate.session in SESSIONS
    assert [line.split()[0] for line in said] == ["1/2", "2/2"]
    assert {s.of for s in steps if s.doing.startswith("int8")} == {2}
    assert [s.done for s in steps if s.doing == "int8-weights: making the model"] == [1]
    assert all(0 < s.left <= 500 for s in steps)
    assert [s.left for s in steps] == sorted((s.left for s in steps), reverse=True)
    again: list[Step] = []
    assert search(reference, material, tmp_path, budget=500.0, on_step=again.append).run(recipes) == found
    assert not any("making" in s.doing for s in again)
    other = search(reference, material, tmp_path, target="throughput", on_step=again.append)
    other.run(recipes[:1])
    assert any("making" in s.doing for s in again)  # another target is another search


def module_of(folder: Path, text: str) -> ModuleType:
    made = ModuleType("made")
    made.__file__ = str(folder / f"{abs(hash(text))}.py")
    Path(made.__file__).write_text(text, encoding="utf-8")
    return made


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ('"""Another."""\n\n\ndef f():\n    """What it does."""  # and why\n    return  1\n', True),
        ("def f():\n    return 2\n", False),
        ('def f():\n    return "1"\n', False),
    ],
)
def test_kept_measurements_outlive_an_edited_comment_but_not_edited_code(text, same, tmp_path):
    plain = module_of(tmp_path, '"""One."""\n\n\ndef f():\n    # a comment\n    return 1\n')
    assert (code_of(module_of(tmp_path, text)) == code_of(plain)) == same


def test_a_recipe_is_found_again_after_an_edited_comment(reference, material, tmp_path, monkeypatch):
    recipes = [RECIPES["int8"]]
    found = search(reference, material, tmp_path).run(recipes)
    real = inspect.getsource
    monkeypatch.setattr(inspect, "getsource", lambda module: f"# edited\n{real(module)}")
    steps: list[Step] = []
    assert search(reference, material, tmp_path, on_step=steps.append).run(recipes) == found
    assert not any("making" in s.doing for s in steps)
    monkeypatch.setattr("qadeploy.export.quantize.search.onnx.__version__", "another")
    search(reference, material, tmp_path, on_step=steps.append).run(recipes)
    assert any("making" in s.doing for s in steps)


def test_a_recipe_that_fails_is_said_and_not_kept(reference, material, tmp_path):
    def broken(_: Material) -> QuantizedModel:
        raise ValueError("no such\nmatmul")

    (candidate,) = search(reference, material, tmp_path).run([Recipe("mine", "x", broken)])
    assert candidate.failed == "ValueError: no such matmul"
    assert list(tmp_path.iterdir()) == []


def test_the_budget_ends_the_search_once_a_recipe_passes(reference, material):
    said: list[str] = []
    recipes = list(RECIPES.values())[:2]
    one = search(reference, material, budget=0.0, say=said.append)
    assert len(one.run(recipes)) == 1
    assert "the budget of 0 s is used up: int8-static and later recipes were not tried" in said[-1]
    assert len(search(reference, material, budget=0.0, max_f1_drop=-100.0).run(recipes)) == 2  # none passes


def candidate(recipe: str, speed: float, spread: float = 0.1, lost: float = 0.0, **values: Any) -> MeasuredRecipe:
    ranges = (speed - spread, speed + spread)
    return MeasuredRecipe(recipe, lost, (-1.0, 1.0), 0.0, None, speed, ranges, speed, ranges, 1000, {}, 1.0, **values)


def test_the_two_best_are_timed_against_each_other_only_where_their_ranges_overlap(reference, material):
    apart = [candidate("int8", 2.0), candidate("int8-weights", 1.5)]
    assert search(reference, material).settle(apart) == (apart, None)
    assert search(reference, material, target="size").settle(apart[:1] * 2)[1] is None
    assert search(reference, material).settle(apart[:1]) == (apart[:1], None)


@pytest.mark.parametrize(
    ("seconds", "order", "why"),
    [
        ((0.010, 0.010), ["second", "first", "third"], "as fast and loses less F1"),
        ((0.010, 0.0099), ["second", "first", "third"], "as fast and loses less F1"),
        ((0.010, 0.009), ["second", "first", "third"], "faster"),
        ((0.009, 0.010), ["first", "second", "third"], "faster"),
    ],
)
def test_the_two_best_are_put_in_order_by_their_own_rounds(seconds, order, why, reference, material, monkeypatch):
    models = [material.model, RECIPES["int8"].make(material).model]
    made = {
        n: Recipe(n, "x", lambda _, m=m: QuantizedModel(m)) for n, m in zip(("first", "second"), models, strict=True)
    }
    clock = Clock(monkeypatch)

    def make(_: Reference, file: Path, session: Any) -> Answerer:
        model = file.read_bytes()
        slowed = Slowed(model, session, clock, lambda *_: seconds[models.index(model)])
        return Answerer(reference.checkpoint.encoder, reference.checkpoint.settings, slowed)

    monkeypatch.setattr("qadeploy.export.quantize.search.RECIPES", made)
    monkeypatch.setattr("qadeploy.export.quantize.search.make_answerer", make)
    said: list[str] = []
    close = [candidate("first", 2.0, lost=0.4), candidate("second", 1.95, lost=0.1), candidate("third", 1.9)]
    ranked, duel = search(reference, material, say=said.append).settle(close)
    assert [c.recipe for c in ranked] == order
    assert (duel.chosen, duel.why) == (order[0], why)
    assert duel.ratio == pytest.approx(seconds[0] / seconds[1])
    assert said == [f"  {duel_line(duel)}"]
    assert "second against first: x" in said[0]


def test_candidates_are_ranked_by_what_is_wanted_and_those_that_lose_too_much_left_out():
    found = [
        candidate("a", 1.0),
        candidate("b", 3.0, lost=0.6),
        candidate("c", 2.0, lost=0.5),
        candidate("d", 0, failed="x"),
    ]
    assert [c.recipe for c in rank(found, SearchOptions(0.5))] == ["c", "a"]
    assert [c.recipe for c in rank([replace(found[0], size=9), found[2]], SearchOptions(0.5, "size"))] == ["a", "c"]


# ---------------------------------------------------------------- the leaderboard


def test_the_leaderboard_says_of_every_recipe_why_it_was_not_chosen():
    found = [
        candidate("won", 3.0, lost=0.25),
        candidate("refused", 4.0),
        candidate("lossy", 5.0, lost=0.75),
        candidate("slow", 1.0),
        MeasuredRecipe("broken", failed="ValueError: no such matmul"),
    ]
    known = [*(c.recipe for c in found), "late"]
    rows = leaderboard(found, known, {"won": 0.1, "refused": 0.9}, max_f1_drop=0.5, chosen="won")
    assert {row["recipe"]: row["verdict"] for row in rows} == {
        "won": "chosen",
        "refused": "lost 0.90 on the held-out questions",
        "lossy": "loses more than 0.5",
        "slow": "not the best",
        "broken": "failed: ValueError: no such matmul",
        "late": "not tried: the budget was used up",
    }
    assert rows[0]["f1_lost_held_out"] == 0.1
    lines = leaderboard_lines(rows, {"dev": 20, "training": 76, "worth": 87.2}, "won")
    assert len(lines) == len(rows) + 2
    assert [line[0] for line in lines[1:-1]] == ["*", " ", " ", " ", " ", " "]
    assert "-0.25 (-1.00 to +1.00)" in lines[1]
    assert "3.00 (2.90 to 3.10)" in lines[1]
    assert "20 dev and 76 training questions, weighted like the dev set (worth 87 of equal weight)" in lines[-1]
    assert "on 20 dev questions, against" in leaderboard_lines(rows, {"dev": 20, "training": 0, "worth": 20})[-1]


def test_the_table_is_printed_where_none_passes_too(reference, bundle, tmp_path):
    said: list[str] = []
    with pytest.raises(GateError, match="every recipe loses more than -1"):
        quantize(
            reference, open_bundle(bundle), tmp_path / "small", SearchOptions(-1.0), recipe="int8", say=said.append
        )
    assert any(line.startswith(" int8 ") and line.endswith("loses more than -1") for line in said)


def test_export_prints_the_table_of_the_manifest(tiny, tiny_export, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert json.loads(tiny_export.stdout)["bundles"]  # progress and remarks are on stderr
    done = CliRunner().invoke(
        main, ["export", str(tiny.run), "--quantize", "--recipe", "int8", "--no-optimize", "--out", "b/k"]
    )
    assert done.exit_code == 0, done.output
    made = open_bundle("b/k-int8").manifest["made"]
    for line in leaderboard_lines(made["leaderboard"], made["judged_on"], made["recipe"]):
        assert line in done.stdout
    assert "\x1b" not in done.output
    assert "1/1 int8 " in done.stdout
    shutil.rmtree("b")


def test_the_bundles_say_how_their_settings_were_found(tiny, tiny_export):
    for kind in ("", "fused", "int8"):
        manifest = open_bundle(tiny.bundle(kind)).manifest
        assert manifest["machine"]["instruction_sets"]
        assert manifest["machine"]["threads"] == manifest["tuning"]["threads"]
        assert manifest["machine"]["onnxruntime"] == manifest["versions"]["onnxruntime"]
        assert {"optimizers"} <= {t["step"] for t in manifest["tuning"]["trials"]}
    made = open_bundle(tiny.bundle("int8")).manifest["made"]
    assert made["judged_on"]["dev"] == 20
