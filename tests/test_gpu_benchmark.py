"""benchmarks/gpu.py: what it makes of its lines, and that what fails is a row. ``--device cpu`` is its dry run."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import gpu, gpu_plan, gpu_worker
from qadeploy.records import Annotation, Answer, Example


def row(model: str, scenario: str, variant: str, ms: float, phase: str = "main", items: int = 1) -> dict[str, object]:
    return {
        "kind": "row",
        "model": model,
        "scenario": scenario,
        "variant": variant,
        "phase": phase,
        "median_ms": ms,
        "least_ms": ms,
        "most_ms": ms,
        "items": items,
        "items_per_second": 1000 * items / ms,
        "utilisation": None,
    }


def found(lines, what):
    return next(t for t in gpu.ratios(lines) if t["target"].startswith(what))


def test_targets_are_ratios_of_one_run():
    lines = [
        row(gpu_plan.BASE, gpu_plan.ONE_384, gpu_plan.LATENCY, 0.5),
        row(gpu_plan.BASE, gpu_plan.ONE_384, gpu_plan.EAGER, 5.0),
        row(gpu_plan.BASE, gpu_plan.MIXED, gpu_plan.THROUGHPUT, 10.0),
        row(gpu_plan.BASE, gpu_plan.MIXED, gpu_plan.ORT_PLAIN, 12.0),
        row(gpu_plan.BASE, gpu_plan.MIXED, gpu_plan.SDPA, 30.0),
        row(gpu_plan.BASE, gpu_plan.MIXED, gpu_plan.SORTED, 9.0),
        row(gpu_plan.BASE, gpu_plan.MIXED, gpu_plan.COMPILED, 22.0, "compiled"),
        row(gpu_plan.BASE, gpu_plan.MIXED, gpu_plan.THROUGHPUT, 11.0, "compiled"),
        row(gpu_plan.BASE, gpu_plan.E2E_ONE, gpu_plan.LATENCY, 64.0, items=64),
        row("BERT-large shape", gpu_plan.MANY_384, gpu_plan.THROUGHPUT, 8.0, items=32),
    ]
    eager = found(lines, "base model, 1 x 384: ours / torch eager")
    assert (eager["found"], eager["met"]) == (pytest.approx(0.1), True)
    padded = found(lines, "base model, mixed: padded ONNX Runtime")
    assert (padded["found"], padded["met"]) == (pytest.approx(1.2), False)
    assert found(lines, "base model, mixed: best torch")["found"] == pytest.approx(0.9)  # against the best of them
    assert found(lines, "base model, mixed: torch compiled")["found"] == pytest.approx(2.0)  # of its own rounds
    assert found(lines, "base model, one question")["found"] == pytest.approx(1.0)
    large = found(lines, "BERT-large shape, 32 x 384")
    assert (large["found"], large["met"]) == (pytest.approx(4000), True)
    assert found(lines, "BERT-large shape: of MLPerf")["found"] == pytest.approx(4000 / 9369)


def test_what_was_not_measured_is_neither_met_nor_missed():
    assert {(t["found"], t["met"]) for t in gpu.ratios([])} == {(None, None)}
    assert all("not measured" in line for line in gpu.closing(gpu.ratios([]))[1:])


def test_correctness_is_paired_and_counts_equal_places():
    examples = [Example(str(i), "Who?", "Ada and Bela", (Annotation("Ada", 0),)) for i in range(4)]
    right = [Answer("Ada", 0, 3, 0.9)] * 4
    answers = [*right[:3], Answer("Bela", 8, 12, 0.4)]
    compared = gpu_worker.compare(examples, answers, right)
    assert (compared["equal_answers"], compared["f1"], compared["f1_change"]) == (0.75, 75.0, -25.0)
    low, high = compared["f1_change_interval"]
    assert low < -25 < high <= 0
    assert gpu_worker.compare(examples, [], right)["equal_answers"] is None


def test_a_variant_that_fails_is_a_row_and_the_others_are_timed(tmp_path: Path):
    plan = gpu_plan.Plan(
        gpu_plan.BASE, "cpu", True, 2, 3, time.time() + 60, str(tmp_path / "rows.jsonl"), str(tmp_path)
    )
    worker = gpu_worker.Worker(plan)
    calls = {"good": 0, "late": 0}

    def good() -> None:
        calls["good"] += 1
        time.sleep(0.03)

    def late() -> None:
        calls["late"] += 1
        time.sleep(0.03)
        if calls["late"] > 3:
            raise RuntimeError("out of memory")

    def bad() -> None:
        raise ValueError("no kernel")

    times = worker.rounds({"good": good, "bad": bad, "late": late}, gpu_plan.MIXED)
    assert [len(times[name]) for name in ("good", "bad", "late")] == [3, 0, 1]
    lines = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    failed = {line["variant"]: line["reason"] for line in lines if line["kind"] == "failed"}
    assert failed == {"bad": "ValueError: no kernel", "late": "RuntimeError: out of memory"}
    text = "\n".join(gpu.table(lines))
    assert f"NOT MEASURED bad ({gpu_plan.MIXED}): ValueError: no kernel" in text


def test_what_is_short_is_repeated_and_what_is_slow_has_fewer_rounds(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(gpu_worker, "_LONG", 0.25)
    plan = gpu_plan.Plan(
        gpu_plan.BASE, "cpu", True, 2, 9, time.time() + 60, str(tmp_path / "rows.jsonl"), str(tmp_path)
    )
    calls = {"short": 0, "slow": 0}

    def short() -> None:
        calls["short"] += 1
        time.sleep(0.001)

    def slow() -> None:
        calls["slow"] += 1
        time.sleep(0.1)

    times = gpu_worker.Worker(plan).rounds({"short": short, "slow": slow}, gpu_plan.MIXED)
    assert (len(times["short"]), len(times["slow"])) == (9, 3)
    assert calls["slow"] == 2 + 3
    assert calls["short"] > 2 + 9
    assert 0.001 <= min(times["short"]) < 0.1 <= min(times["slow"])


def test_when_the_time_is_up_nothing_more_begins(tmp_path: Path):
    plan = gpu_plan.Plan(gpu_plan.BASE, "cpu", True, 2, 3, time.time() - 1, str(tmp_path / "rows.jsonl"), str(tmp_path))
    worker = gpu_worker.Worker(plan)
    assert worker.rounds({"any": lambda: pytest.fail("it ran")}, gpu_plan.MIXED) == {"any": []}
    assert "TimeoutError: the time was up" in (tmp_path / "rows.jsonl").read_text()


def test_a_process_that_dies_is_blamed_on_who_began_last_and_tried_again_without(tmp_path: Path, monkeypatch):
    """The worker is a script here that dies in its second variant, and ends well where it is told to pass it over."""
    script = tmp_path / "worker.py"
    script.write_text(
        "import json, os, sys\n"
        "plan = json.load(open(sys.argv[1]))\n"
        "def say(**values):\n"
        "    open(plan['rows'], 'a').write(json.dumps({'model': plan['model'], **values}) + '\\n')\n"
        "for name in ('one', 'two'):\n"
        "    if name in plan['skip']: continue\n"
        "    say(kind='begin', variant=name)\n"
        "    if name == 'two': print('Segmentation fault', flush=True), os._exit(139)\n"
        "say(kind='done')\n",
        encoding="utf-8",
    )
    monkeypatch.setattr(gpu, "WORKER", (sys.executable, str(script)))
    plan = gpu_plan.Plan(
        gpu_plan.BASE, "cpu", True, 2, 3, time.time() + 60, str(tmp_path / "rows.jsonl"), str(tmp_path)
    )
    lines = gpu.run_model(plan)
    assert lines[-1]["kind"] == "done"
    failed = [line for line in lines if line["kind"] == "failed"]
    assert [line["variant"] for line in failed] == ["two"]
    assert failed[0]["reason"] == "its process ended with 139: Segmentation fault"


def test_without_nvidia_smi_nothing_is_made_up():
    watcher = gpu_plan.Gpu("cpu")
    assert watcher.memory() is None
    assert watcher.utilisation(lambda: pytest.fail("it ran")) is None
    watcher.close()


@pytest.mark.parametrize(
    ("visible", "device", "name"),
    [
        (None, "cuda", "0"),
        (None, "cuda:1", "1"),
        ("3,1", "cuda", "3"),
        ("3, GPU-8f4d", "cuda:1", "GPU-8f4d"),
        ("", "cuda", "0"),
        ("3", "cuda:1", "1"),
    ],
)
def test_nvidia_smi_is_asked_about_the_gpu_that_cuda_means(visible, device, name, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert gpu_plan.smi_name(device) == name


def test_a_tool_that_reports_is_read_while_it_runs(tmp_path: Path, monkeypatch):
    """A script in nvidia-smi's place, which writes what that does, and once that a figure is not to be had."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho '[N/A], 400'\nwhile true; do echo '55, 700'; sleep 0.02; done\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    watcher = gpu_plan.Gpu("cuda:0")
    try:
        assert watcher.memory() == 700
        assert watcher.utilisation(lambda: time.sleep(0.01), seconds=0.2) == 55
    finally:
        watcher.close()


def test_a_reference_that_fails_is_a_row_and_the_answers_are_not_compared(tmp_path: Path):
    class Subject:
        pairs = (("Who?", "Ada and Bela"),)
        checkpoint = SimpleNamespace(model=SimpleNamespace(to=lambda device: None))

        def load_reference(self) -> None:
            raise RuntimeError("CUDA out of memory")

    plan = gpu_plan.Plan(
        gpu_plan.BASE, "cpu", True, 1, 3, time.time() + 60, str(tmp_path / "rows.jsonl"), str(tmp_path)
    )
    right = gpu_worker.Worker(plan).right_answers(Subject())
    assert right == []
    failed = gpu.written(tmp_path / "rows.jsonl")[-1]
    assert (failed["kind"], failed["variant"]) == ("failed", gpu_plan.REFERENCE)
    assert failed["reason"] == "RuntimeError: CUDA out of memory"
    example = Example("0", "Who?", "Ada and Bela", (Annotation("Ada", 0),))
    compared = gpu_worker.compare([example], [Answer("Ada", 0, 3, 0.9)], right)
    assert (compared["equal_answers"], compared["f1"]) == (None, 100.0)


def test_a_process_killed_in_a_line_loses_that_line_alone(tmp_path: Path, monkeypatch):
    script = tmp_path / "worker.py"
    script.write_text(
        "import json, sys, time\n"
        "stream = open(json.load(open(sys.argv[1]))['rows'], 'a')\n"
        "print(json.dumps({'kind': 'begin', 'model': 'base model', 'variant': 'one'}), file=stream)\n"
        'print(\'{"kind": "row", "mod\', end=\'\', file=stream, flush=True)\n'
        "time.sleep(60)\n",
        encoding="utf-8",
    )
    monkeypatch.setattr(gpu, "WORKER", (sys.executable, str(script)))
    plan = gpu_plan.Plan(gpu_plan.BASE, "cpu", True, 2, 3, time.time() - 1, str(tmp_path / "rows.jsonl"), str(tmp_path))
    lines = gpu.run_model(plan)
    assert [line["kind"] for line in lines] == ["begin", "failed"]
    assert lines[-1]["reason"] == "the time was up"
    assert gpu.written(tmp_path / "rows.jsonl") == lines


def test_dwarfs_differ_from_the_real_shapes_in_size_only():
    assert set(gpu_plan.DWARFS) == set(gpu_plan.SHAPES)
    assert np.isclose(sum(gpu_plan.SHARES.values()), 1)
    assert all(hidden % heads == 0 for hidden, _, heads, _ in [*gpu_plan.SHAPES.values(), *gpu_plan.DWARFS.values()])
