"""``qadeploy bench`` as a whole, on the tiny model: one real run, its output, files and exit code."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import struct
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from qadeploy import Answerer
from qadeploy.bench import table
from qadeploy.bench.measure import BenchRequest, bench
from qadeploy.bench.options import BenchOptions
from qadeploy.bench.own import open_bundles
from qadeploy.bench.page import bench_page, draw_plot, require_own, write
from qadeploy.bench.peers import PEERS
from qadeploy.bench.split import PARTS, measure_split
from qadeploy.bench.variant import Asker, Variant
from qadeploy.bench.workload import draw
from qadeploy.data.loading import read
from qadeploy.errors import FailureError, InputError
from qadeploy.inference.bundle import open_bundle
from qadeploy.records import NO_ANSWER, Annotation
from tests.cli_for_tests import run
from tests.conftest import sealed_copy
from tests.processes_for_tests import ended
from tests.test_report_page import Reader

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def benched(tiny, tiny_export, tmp_path_factory) -> tuple[dict[str, Any], Path, str]:
    """The int8 and the fp32 bundle against the pipeline, once: the JSON, the folder written, the remarks."""
    out = tmp_path_factory.mktemp("bench") / "new" / "folder"
    args = ["bench", tiny.bundle("int8"), tiny.bundle(), "--against", "pipeline", "--questions", 12, "--rounds", 2]
    args += ["--latency-questions", 4, "--threads", 1, "--out", out, "--min-f1", 1, "--max-f1-drop", 100, "--json"]
    with contextlib.chdir(tiny.root):
        result = run(*args)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout), out, result.stderr


def test_every_variant_has_every_figure(benched, tiny):
    report = benched[0]
    names = [v["name"] for v in report["variants"]]
    assert names == ["qadeploy int8 (keepers-int8)", "qadeploy fp32 (keepers)", "transformers pipeline, torch fp32"]
    for v in report["variants"]:
        assert v["status"] == "ok"
        assert (v["exact_match"], v["total"]) == (100.0, 12)
        assert len(v["seconds_by_round"]) == 2
        assert v["questions_per_second"] == pytest.approx(float(np.median([12 / s for s in v["seconds_by_round"]])))
        assert v["windows_per_second"] == pytest.approx(v["questions_per_second"])  # each context is one window
        assert v["latency_ms"]["p50"] <= v["latency_ms"]["p95"] <= v["latency_ms"]["p99"]
        assert v["latency_questions"] == 4
        assert v["size_bytes"] > 10_000
        assert v["peak_memory_bytes"] > 2e7
        assert len(v["startup_seconds_by_process"]) == (1 if v["peer"] else 3)
        assert 0 < v["peak_share"]["text_to_answers"] < 1
        assert (v["split"] is None) == bool(v["peer"])
        assert v["f1_drop"]["points"] == 0.0
    pipeline = report["variants"][2]
    assert report["speedup_against"] == pipeline["name"]
    assert pipeline["speedup"] == {"median": 1.0, "range": [1.0, 1.0]}
    ours = report["variants"][0]
    ratios = [a / b for a, b in zip(pipeline["seconds_by_round"], ours["seconds_by_round"], strict=True)]
    assert ours["speedup"]["median"] == pytest.approx(float(np.median(ratios)))
    assert report["workload"]["questions"] == report["workload"]["windows"] == 12
    assert report["workload"]["metric"] == "squad"
    assert [row["held"] for row in report["limits"]] == [True, True]


def test_the_environment_is_in_every_output(benched, tiny):
    report, out, _ = benched
    for text in ("\n".join(table.lines(report)), (out / "bench.html").read_text(encoding="utf-8")):
        assert report["environment"]["cpu"]["model"] in text
        assert report["environment"]["packages"]["onnxruntime"] in text
        for kind in ("int8", ""):
            assert open_bundle(tiny.bundle(kind)).hash[:12] in text
        for flag in report["environment"]["cpu"]["features"]:
            assert flag in text
        assert "1 threads" in text
    assert report["bundles"][0] == {
        "name": "keepers-int8",
        "sha256": open_bundle(tiny.bundle("int8")).hash,
        "precision": "int8",
    }


def test_what_is_written_is_json_a_page_and_a_picture(benched):
    report, out, remarks = benched
    assert sorted(p.name for p in out.iterdir()) == ["bench.html", "bench.json", "bench.png"]
    assert json.loads((out / "bench.json").read_text()) == report
    head = (out / "bench.png").read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    assert min(struct.unpack(">II", head[16:])) > 400
    assert "preparing pipeline" in remarks


def test_the_page_is_whole_loads_nothing_and_shows_the_numbers(benched):
    report, out, _ = benched
    reader = Reader((out / "bench.html").read_text(encoding="utf-8"))
    assert reader.problems == []
    for tag, attributes in reader.elements:
        assert tag not in {"script", "iframe", "img", "object", "form"}
        for name in ("src", "href"):
            assert (attributes.get(name) or "#").startswith(("#", "data:,"))
    rows = [" ".join(text.split()) for text in reader.texts["tr"]]
    for number, v in enumerate(report["variants"], 1):
        (row,) = [r for r in rows if r.startswith(f"{number}. {v['name']}")]
        assert f"{v['questions_per_second']:.1f}" in row
        assert f"{v['latency_ms']['p99']:.1f}" in row
    charts = [a for tag, a in reader.elements if tag == "svg" and a.get("class") == "chart"]
    assert len(charts) == 1


def test_faster_stands_to_the_left_and_better_above(benched):
    report = json.loads(json.dumps(benched[0]))
    for v, ms, f1 in zip(report["variants"], (10.0, 20.0, 40.0), (50.0, 60.0, 55.0), strict=True):
        v["latency_ms"]["p50"], v["f1"], v["f1_interval"] = ms, f1, [f1 - 5, f1 + 5]
    axes = Figure().subplots()
    draw_plot(axes, report)
    assert [line.get_xydata().tolist() for line in axes.lines] == [[[10, 50]], [[20, 60]], [[40, 55]]]
    assert [line.get_marker() for line in axes.lines] == ["D" if v["peer"] else "o" for v in report["variants"]]


def test_the_terminals_table_has_a_line_a_variant_and_the_split(benched):
    lines = table.lines(benched[0])
    assert lines[0].split()[:4] == ["variant", "q/s", "x", "(range)"]
    assert sum(line.startswith("qadeploy int8 (keepers-int8) ") for line in lines) == 1
    assert sum("a question's time is tokenise" in line for line in lines) == 2
    assert lines[-2:] == [
        f"--min-f1 1: {benched[0]['variants'][0]['f1']:.2f}, held",
        f"--max-f1-drop 100: 0.00 (against {benched[0]['variants'][0]['f1_drop']['against']}), held",
    ]


@pytest.mark.parametrize("script", ["readme_table", "compare_pipeline", "long_documents", "several_answers", "browser"])
def test_the_documented_tables_are_those_of_the_results(script):
    command = [sys.executable, "-m", f"benchmarks.{script}", "--check"]
    done = ended(command, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_large_model_is_measured_with_names_of_files_alone(tiny_checkpoint, tmp_path):
    shutil.copytree(tiny_checkpoint, tmp_path / "work" / "base")
    article = {"paragraphs": [{"context": "a", "qas": [{"id": "q", "question": "?", "answers": []}]}]}
    (tmp_path / "data.json").write_text(json.dumps({"data": [article] * 7}))
    code = (
        "import sys\nfrom pathlib import Path\nfrom benchmarks import large_model as m\n"
        "m.watched = lambda command, *folder: print(*command) or sys.exit()\n"
        f"work = m._Work(Path(), Path({str(tmp_path / 'data.json')!r}), Path({str(tmp_path / 'work')!r}), 1, 1, 1)\n"
        "m.measure(work, sys.argv[1:], print)"
    )
    for step in ("train", "export-optimum", "export-torch", "bench"):
        done = ended([sys.executable, "-c", code, step], cwd=ROOT)
        assert (done.returncode, done.stderr) == (0, "")
        command, _, exporter = step.partition("-")
        assert command in done.stdout
        assert exporter in done.stdout
        assert str(tmp_path) not in done.stdout


def test_the_split_adds_up(tiny, tiny_export):
    examples = read(str(tiny.data)).examples
    answerer = Answerer.load(tiny.bundle(), threads=1)
    for _ in range(4):  # another process may take the CPU during one part of the rounds
        split = measure_split(answerer, [(e.question, e.context) for e in examples], 5)
        if 0.5 < split.apart / split.whole < 1.5 and 0 < split.whole_of_model < 1.2:
            break
    value = split.to_dict()
    assert sum(value["shares"].values()) == pytest.approx(1.0)
    assert all(value["ms_per_question"][name] > 0 for name in PARTS)
    assert split.apart == pytest.approx(sum(value["ms_per_question"][name] for name in PARTS))
    # The times of the parts, one after the other, add up to about the time of the whole call.
    assert 0.5 < split.apart / split.whole < 1.5
    assert 0 < split.whole_of_model < 1.2
    assert len(split.windows) == len(examples)


# ---------------------------------------------------------------- what breaks


def failing(after: int):
    """A peer that answers correctly a number of times, then raises."""

    def load() -> Asker:
        calls = 0

        def answer_all(pairs):
            nonlocal calls
            calls += 1
            if calls > after:
                raise ValueError("the cat pulled the plug")
            return [NO_ANSWER] * len(pairs)

        return Asker(answer_all, lambda question, context: NO_ANSWER)

    return load


def request(tiny, peers: list[str], **changes: Any) -> BenchRequest:
    opened, broken = open_bundles(changes.pop("bundles", [tiny.bundle("int8")]))
    workload = draw("keepers", read(str(tiny.data)).examples, 6)
    values = {
        "bundles": opened, "broken": broken, "workload": workload, "peers": peers, "checkpoint": tiny.run / "checkpoint",
        "known": (), "options": BenchOptions(rounds=2, latency_questions=2, device="cpu", threads=1),
    }  # fmt: skip
    return BenchRequest(**{**values, **changes})


def test_what_fails_on_the_way_is_a_row_and_stops_nobody(tiny, tiny_export, tmp_path, monkeypatch):
    import sys

    module = sys.modules[__name__]
    for name, after in (("at-once", 0), ("later", 2)):
        monkeypatch.setattr(module, f"load_{name.replace('-', '_')}", failing(after), raising=False)
        variant = Variant(name, "fp32", 1, f"{__name__}:load_{name.replace('-', '_')}", {}, name)
        monkeypatch.setitem(PEERS, name, lambda setup, variant=variant: variant)

    def refused(setup):
        raise FailureError("no such thing on this machine")

    monkeypatch.setitem(PEERS, "refused", refused)
    monkeypatch.setitem(sys.modules, "openvino", None)
    damaged = sealed_copy(tiny.bundle(), tmp_path / "damaged")
    (damaged / "tokenizer.json").write_text("{}")
    peers = ["at-once", "later", "refused", "openvino"]
    report = bench(request(tiny, peers, bundles=[tiny.bundle("int8"), damaged]), lambda said: None)
    status = {v["name"]: v["status"] for v in report["variants"]}
    assert status == {
        "qadeploy int8 (keepers-int8)": "ok",
        "at-once": "failed: ValueError: the cat pulled the plug",
        "later": "failed: ValueError: the cat pulled the plug",
        "refused": "failed: FailureError: no such thing on this machine",
        "openvino": "not installed: pip install 'qadeploy[peers]' (openvino)",
        f"qadeploy ({damaged})": status[f"qadeploy ({damaged})"],
    }
    assert "does not match the manifest" in status[f"qadeploy ({damaged})"]
    assert not report["speedup_against_peer"]
    assert report["variants"][0]["f1_drop"] is None
    text = "\n".join(table.lines(report))
    assert re.search(r"^later +failed: ValueError: the cat pulled the plug$", text, re.M)
    reader = Reader(bench_page(report))
    assert reader.problems == []
    assert sum("the cat pulled the plug" in row for row in reader.texts["tr"]) == 2


@pytest.mark.parametrize(("given", "metric", "f1"), [(None, "mixed", 100), ("squad", "squad", 0)])
def test_answers_are_scored_by_the_metric_of_the_bundle_unless_another_is_given(
    given, metric, f1, tiny, tiny_export, tmp_path
):
    settings = {**open_bundle(tiny.bundle()).settings.to_dict(), "metric": "mixed"}
    bundle = sealed_copy(tiny.bundle(), tmp_path / "mixed", settings=settings)
    quoted = [replace(e, answers=(Annotation(f"“{e.answers[0].text}”", 0),)) for e in read(str(tiny.data)).examples[:4]]
    options = BenchOptions(rounds=1, latency_questions=1, device="cpu", threads=1, metric=given)
    asked = request(tiny, [], bundles=[bundle], workload=draw("quoted", quoted, 4), options=options)
    report = bench(asked, lambda said: None)
    assert report["workload"]["metric"] == metric
    assert report["variants"][0]["f1"] == f1


def test_a_report_without_a_variant_that_ran_is_still_written(benched, tmp_path):
    report = json.loads(json.dumps(benched[0]))
    report["variants"] = [{"name": "ours", "peer": "", "status": "failed: Error: broken"}]
    report |= {"speedup_against": "", "limits": []}
    assert [p.name for p in write(report, tmp_path / "out")] == ["bench.json", "bench.html"]
    reader = Reader((tmp_path / "out" / "bench.html").read_text(encoding="utf-8"))
    assert reader.problems == []
    assert any("broken" in text for text in reader.texts["p"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--min-f1", "100", "--data", "wrong.jsonl"], "F1 is 0.00, --min-f1 requires at least 100"),
        (["--min-speedup", "2", "--against", "torch", "--checkpoint", "gone"], "because no peer ran"),
    ],
)
def test_a_limit_that_does_not_hold_is_exit_code_1_after_the_table(options, message, tiny, tiny_export, tmp_path):
    rows = [json.loads(line) for line in tiny.data.read_text().splitlines()]
    with contextlib.chdir(tmp_path):
        wrong = [json.dumps({**row, "answer": "hall"}) for row in rows if "The hall" in row["context"]]
        Path("wrong.jsonl").write_text("\n".join(wrong))
        data = [] if "--data" in options else ["--data", str(tiny.data)]
        given = ["--questions", "2", "--rounds", "1", "--on-ambiguous", "first", *data]
        result = run("bench", tiny.bundle("int8"), "--against", "", *given, *options)
    assert result.exit_code == 1, result.output
    assert "Traceback" not in result.output
    assert "NOT HELD" in result.stdout
    assert message in result.stderr
    assert result.stderr.count("Error: ") == 1


def test_limits_that_nothing_can_be_held_against_are_refused_at_once(tiny, tiny_export, tmp_path):
    given = ["--data", str(tiny.data), "--against", "", "--out", str(tmp_path / "o")]
    command = ["bench", str(tiny.bundle("int8")), *given]
    result = run(*command, "--max-f1-drop", "0.5")
    assert result.exit_code == 2
    assert "--max-f1-drop needs a float variant to compare with" in result.stderr
    assert not (tmp_path / "o").exists()
    shutil.rmtree(tmp_path, ignore_errors=True)


@pytest.mark.parametrize("name", ["bench.json", "bench.html", "bench.png"])
def test_files_that_are_no_report_are_not_overwritten(name, bundle, tmp_path):
    (tmp_path / name).write_text('{"mine": true}')
    done = run("bench", bundle, "--out", tmp_path)
    assert done.exit_code == 2
    assert f"{tmp_path}: {name} would be overwritten, but this is no report of bench: give another --out" in done.stderr
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [(name, '{"mine": true}')]


def test_a_file_is_no_place_for_a_report(bundle, tmp_path):
    (tmp_path / "bench.json").write_text("mine")
    done = run("bench", bundle, "--out", tmp_path / "bench.json")
    assert done.exit_code == 2
    assert "bench.json: is a file, but --out names a folder for bench.json, bench.html, bench.png" in done.stderr
    assert (tmp_path / "bench.json").read_text() == "mine"


def test_a_report_is_replaced_by_the_next(benched, tmp_path):
    write(benched[0], tmp_path)
    require_own(tmp_path)
    (tmp_path / "bench.json").unlink()
    with pytest.raises(InputError, match="no report of bench"):
        require_own(tmp_path)
