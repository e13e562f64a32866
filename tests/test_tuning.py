"""Session settings measured again: clearly faster ones are used, those that move logits are not, writes are complete."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from qadeploy import Answerer
from qadeploy.cli import main
from qadeploy.errors import BundleError, InputError
from qadeploy.inference.bundle import MANIFEST, MODEL, open_bundle, rewrite_manifest
from qadeploy.inference.tuning import FP32_TOLERANCE, ROUNDS, SPINNING, Tuning, tune
from qadeploy.machine import INSTRUCTION_SETS, Machine, machine
from qadeploy.timing import Timing, interleave, spread
from tests.conftest import sealed_copy, triplets, write_jsonl
from tests.timing_for_tests import Clock, Slowed

WITHOUT = {"disabled_optimizers": ["SkipLayerNormFusion"]}
SLEEP = {"config": {SPINNING: "0"}}


def timing(*seconds: float) -> Timing:
    return Timing(seconds, 0.0, 0.0, 0.0, 1.0, (1.0, 1.0))


@pytest.mark.parametrize(
    ("seconds", "faster", "slower"),
    [
        ([0.9] * 9, True, False),
        ([0.9] * 8 + [1.5], True, False),  # one round was disturbed
        ([0.9] * 7 + [1.5] * 2, False, False),
        ([0.99] * 9, False, False),  # always faster, but by too little
        ([1.0] * 9, False, False),
        ([1.1] * 9, False, True),
        ([0.9] * 4 + [1.1], False, False),  # of five rounds, all
        ([0.9] * 5, True, False),
    ],
)
def test_clearly_is_beyond_chance_and_worth_it(seconds, faster, slower):
    first, other = timing(*[1.0] * len(seconds)), timing(*seconds)
    assert (other.clearly_faster(first), other.clearly_slower(first)) == (faster, slower)
    assert (first.clearly_slower(other), first.clearly_faster(other)) == (faster, slower)


def test_variants_are_told_apart_by_the_rounds_that_they_ran_in(monkeypatch):
    clock = Clock(monkeypatch)
    timings = interleave({"a": lambda: clock.take(1), "b": lambda: clock.take(4), "c": lambda: clock.take(1)}, ROUNDS)
    assert timings["a"].clearly_faster(timings["b"])
    assert timings["b"].clearly_slower(timings["a"])
    assert not timings["a"].clearly_faster(timings["c"])
    assert (timings["b"].median, timings["b"].speedup) == (4, 0.25)


# ---------------------------------------------------------------- choosing


@pytest.fixture(scope="module")
def loaded(bundle) -> Answerer:
    return Answerer.load(bundle, device="cpu")


def pairs() -> list[tuple[str, str]]:
    return [(str(row["question"]), str(row["context"])) for row in triplets(4)]


def tuned(
    loaded: Answerer, slow: Any, stored: Any = None, moved: float = 0.0, threads: int = 2, **options: Any
) -> Tuning:
    model = loaded.bundle.read(MODEL)

    def make(session: Mapping[str, Any]) -> Answerer:
        apart = moved if session.get("disabled_optimizers") else 0.0
        slowed = Slowed(model, session, clock, slow, moved=apart, threads=threads)
        return Answerer(loaded.encoder, loaded.settings, slowed)

    with pytest.MonkeyPatch.context() as patch:
        clock = Clock(patch)
        return tune(make, pairs(), stored, **options)


def slow_by(**seconds: float) -> Any:
    """A millisecond a call, and more with fused layer norms, with spinning threads, and by layout."""

    def slow(settings: Any, windows: int) -> float:
        late = 0.001 + seconds.get("fused", 0) * (not settings.disabled_optimizers)
        late += seconds.get("spin", 0) * (settings.config.get(SPINNING) != "0")
        layout = settings.one or "rule"
        return late + seconds.get(layout, 0) + seconds.get(f"{layout}_several", 0) * (windows > 1)

    return slow


def test_the_fastest_settings_are_taken_step_by_step(loaded):
    found = tuned(loaded, slow_by(fused=0.006, spin=0.006, rule=0.006, wide=0.006))
    assert found.session == {**WITHOUT, **SLEEP, "layout": {"one": "narrow", "threads": 2}}
    assert found.changed
    assert found.before == {}
    assert [t.settings for t in found.trials if t.taken] == ["without SkipLayerNormFusion", "sleep", "narrow", "narrow"]
    taken = next(t for t in found.trials if t.taken)
    assert taken.speedup > 1.02
    assert taken.ms_range[0] <= taken.ms <= taken.ms_range[1]
    assert json.loads(json.dumps(found.to_dict()))["threads"] == 2
    text = "\n".join(found.lines())
    assert "4 questions one at a time, 2 threads, medians of 9 interleaved rounds" in text
    assert text.count("<- taken") == 4


def test_what_is_stored_stays_where_nothing_is_clearly_faster_and_keeps_its_other_entries(loaded):
    stored = {
        **WITHOUT,
        "config": {SPINNING: "0", "session.set_denormal_as_zero": "1"},
        "layout": {"one": "wide"},
        "other": 1,
    }

    def all_but_stored(settings: Any, windows: int) -> float:
        same = settings.disabled_optimizers and settings.config.get(SPINNING) == "0" and settings.one == "wide"
        return 0.001 if same else 0.007

    found = tuned(loaded, all_but_stored, stored)
    assert (found.session, found.changed) == (stored, False)


def test_a_layout_that_is_slower_for_some_questions_is_not_taken(loaded):
    found = tuned(loaded, slow_by(spin=0, rule=0.006, wide=0.006, narrow_several=0.02), SLEEP)
    assert "layout" not in found.session
    assert any(t.step == "layout, questions of several windows" for t in found.trials)


def test_a_layout_of_other_threads_does_not_count_and_the_rule_can_come_back(loaded):
    stored = {"layout": {"one": "narrow", "threads": 2}}
    assert "layout" not in tuned(loaded, slow_by(narrow=0.006, wide=0.006), stored).session
    other = {"layout": {"one": "narrow", "threads": 9}}
    found = tuned(loaded, slow_by(rule=0.006, wide=0.006), other)
    assert found.session["layout"] == {"one": "narrow", "threads": 2}
    rows = [t for t in found.trials if t.step.startswith("layout")]
    assert rows[0].settings == "wide"  # the entry for these threads comes first


def test_settings_that_move_the_logits_too_far_are_left_out(loaded):
    slow = slow_by(fused=0.006)
    found = tuned(loaded, slow, moved=0.01, threads=1, tolerance=FP32_TOLERANCE)
    assert found.session == {}
    dropped = next(t for t in found.trials if not t.sound)
    assert dropped.logits_apart == pytest.approx(0.01, rel=1e-3)
    assert not dropped.taken
    assert "above the tolerance: left out" in "\n".join(found.lines())
    allowed = tuned(loaded, slow, moved=0.01, threads=1, tolerance=0.02)
    assert allowed.session == WITHOUT
    assert allowed.logits_apart == pytest.approx(0.01, rel=1e-3)


def test_one_thread_has_neither_idle_threads_nor_layouts_and_many_at_once_spin_nowhere(loaded):
    assert {t.step for t in tuned(loaded, slow_by(), threads=1).trials} == {"optimizers"}
    found = tuned(loaded, slow_by(fused=0.01), target="throughput")
    assert {t.step for t in found.trials} >= {"optimizers", "layout, questions of one window"}
    assert "idle threads" not in {t.step for t in found.trials}
    assert found.session["disabled_optimizers"] == ["SkipLayerNormFusion"]


def test_a_large_model_is_asked_fewer_questions(loaded):
    found = tuned(loaded, slow_by(), threads=1, seconds=0.1)
    assert (found.questions, found.rounds) == (1, 5)


@pytest.mark.parametrize(
    ("target", "asked", "message"), [("size", 1, "choose one of latency"), ("latency", 0, "no question")]
)
def test_what_cannot_be_measured_is_named(loaded, target, asked, message):
    with pytest.raises(InputError, match=message):
        tune(lambda session: loaded, pairs()[:asked], target=target)


def test_rows_at_even_distances():
    assert spread(range(10), 3) == [0, 3, 6]
    assert spread([1, 2], 5) == [1, 2]


# ---------------------------------------------------------------- the manifest


def test_a_manifest_is_rewritten_and_the_files_stay(bundle, tmp_path):
    copy = sealed_copy(bundle, tmp_path / "mine")
    link = tmp_path / "current"
    link.symlink_to(copy)
    before = open_bundle(link)
    after = rewrite_manifest(before, {"session": WITHOUT})
    assert link.is_symlink()
    assert after.manifest == {**before.manifest, "session": WITHOUT}
    assert open_bundle(copy).manifest == after.manifest
    assert sorted(p.name for p in tmp_path.iterdir()) == ["current", "mine"]


def test_a_bundle_that_was_damaged_meanwhile_stays_as_it_is(bundle, tmp_path):
    opened = open_bundle(sealed_copy(bundle, tmp_path / "mine"))
    (opened.folder / MODEL).write_bytes(b"damaged")
    before = (opened.folder / MANIFEST).read_bytes()
    with pytest.raises(BundleError, match=r"model\.onnx: does not match"):
        rewrite_manifest(opened, {"session": {}})
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]
    assert (opened.folder / MANIFEST).read_bytes() == before


# ---------------------------------------------------------------- the command


def run(*arguments: object) -> Any:
    return CliRunner().invoke(main, ["tune", *(str(a) for a in arguments)])


@pytest.fixture(scope="module")
def questions(tmp_path_factory) -> Path:
    rows = [{k: row[k] for k in ("context", "question")} for row in triplets(8)]  # no answers: none are needed
    return write_jsonl(tmp_path_factory.mktemp("asked") / "questions.jsonl", rows)


@pytest.fixture
def foreign(tiny, tiny_export, tmp_path) -> Path:
    """The int8 bundle as if from another machine."""
    entry = {"cpu": "another", "instruction_sets": list(INSTRUCTION_SETS), "threads": 64, "onnxruntime": "1.20"}
    return sealed_copy(tiny.bundle("int8"), tmp_path / "bundles" / "mine", machine=entry)


def test_tune_writes_settings_and_machine_and_the_warning_is_gone(foreign, questions, recwarn):
    before = open_bundle(foreign).manifest
    done = run(foreign, "--data", questions, "--threads", "2", "--json")
    assert done.exit_code == 0, done.output
    value = json.loads(done.stdout)
    after = open_bundle(foreign).manifest
    assert after["files"] == before["files"]
    here = {"cpu": machine().cpu, "instruction_sets": list(machine().instruction_sets)}
    assert (
        after["machine"] == value["machine"] == {**here, "threads": 2, "onnxruntime": before["versions"]["onnxruntime"]}
    )
    assert after["exported_on"] == before["machine"]
    assert after["session"] == value["session"]
    assert after["tuning"]["data"] == str(questions)
    assert after["tuning"]["tolerance"] == max(FP32_TOLERANCE, before["parity"]["max_abs_diff"])
    assert {"optimizers", "idle threads"} <= {t["step"] for t in after["tuning"]["trials"]}
    same = set(before) - {"machine", "session", "tuning"}
    assert {k: after[k] for k in same} == {k: before[k] for k in same}
    assert [p.name for p in foreign.parent.iterdir()] == ["mine"]
    Answerer.load(foreign, device="cpu")
    assert not recwarn.list  # neither tune nor the load after it warned
    run(foreign, "--data", questions, "--threads", "1", "--target", "throughput")
    again = open_bundle(foreign).manifest
    assert again["exported_on"] == before["machine"]  # whose speeds the manifest holds
    assert again["tuning"]["target"] == "throughput"


def test_a_dry_run_prints_and_writes_nothing(foreign, questions):
    before = (foreign / MANIFEST).read_bytes()
    done = run(foreign, "--data", questions, "--threads", "1", "--dry-run")
    assert done.exit_code == 0, done.output
    assert "8 questions one at a time, 1 thread, medians of 9 interleaved rounds" in done.stdout
    assert "logits moved by at most" in done.stdout
    assert "dry run: nothing was written" in done.stdout
    assert (foreign / MANIFEST).read_bytes() == before


def test_the_handbook_is_asked_where_no_data_are_given(bundle):
    done = run(bundle, "--threads", "1", "--dry-run", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["tuning"]["data"] == "handbook"


@pytest.mark.parametrize(
    ("kind", "exported_with", "warned"),
    [("int8", ["avx2", "avx512_vnni"], True), ("int8", ["avx2"], False), ("", ["avx2", "avx512_vnni"], False)],
)
def test_int8_without_vnni_names_the_remedy(
    kind, exported_with, warned, tiny, tiny_export, questions, tmp_path, monkeypatch
):
    monkeypatch.setattr("qadeploy.machine.machine", lambda: Machine("an old one", ("avx2",)))
    path = sealed_copy(tiny.bundle(kind), tmp_path / "mine", machine={"instruction_sets": exported_with})
    done = run(path, "--data", questions, "--threads", "1", "--dry-run", "--json")
    assert done.exit_code == 0, done.output
    assert ("no VNNI, so 8-bit matmuls may saturate" in done.stderr) is warned
    assert (json.loads(done.stdout)["remedy"] is not None) is warned


@pytest.mark.parametrize("fault", ["no bundle", "no data", "no questions", "read only"])
def test_what_tune_cannot_use_is_named(fault, foreign, questions, tmp_path, monkeypatch):
    arguments: list[object] = [foreign, "--data", questions]
    if fault == "no bundle":
        arguments[0], said = tmp_path / "none", "none: no such bundle folder"
    elif fault == "no data":
        arguments[2], said = tmp_path / "none.jsonl", "none.jsonl: no such file"
    elif fault == "no questions":
        arguments[2], said = write_jsonl(tmp_path / "empty.jsonl", []), "empty.jsonl"
    else:
        monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write everywhere
        said = "the folder that holds it is not writable: copy the bundle first, or give --dry-run"
    done = run(*arguments)
    assert done.exit_code == 2
    assert said in done.stderr
    assert "Traceback" not in done.output
