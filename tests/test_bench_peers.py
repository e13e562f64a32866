"""The peers, each loaded and run on the tiny model; missing packages; a broken bundle."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from qadeploy import Answerer
from qadeploy.bench.cold import cold
from qadeploy.bench.measure import status_of
from qadeploy.bench.options import BenchOptions
from qadeploy.bench.own import open_bundles, variants
from qadeploy.bench.peers import PEERS, parse_peers
from qadeploy.bench.peers.setup import Setup, weights_bytes
from qadeploy.bench.variant import Variant
from qadeploy.bench.workload import calibration, draw, windows_of
from qadeploy.data.loading import read
from qadeploy.errors import BundleError, FailureError, InputError, MissingExtraError
from qadeploy.inference.bundle import open_bundle
from qadeploy.timing import spread
from qadeploy.training.checkpoint import load_checkpoint
from tests.conftest import sealed_copy


@pytest.fixture(scope="module")
def examples(tiny):
    return read(str(tiny.data)).examples


@pytest.fixture(scope="module")
def scratch(tmp_path_factory) -> Path:
    """One folder for all peers, so that the export is made once."""
    return tmp_path_factory.mktemp("peers")


def setup(tiny, examples, scratch: Path, kind: str = "") -> Setup:
    folder = scratch / (kind or "fp32")
    folder.mkdir(exist_ok=True)
    return Setup(tiny.run / "checkpoint", open_bundle(tiny.bundle(kind)), "cpu", 1, False, examples[:16], folder)


@pytest.mark.parametrize("name", ["torch", "optimum-direct"])
def test_a_float_runtime_behind_our_windows_gives_the_fp32_bundles_answers(name, tiny, tiny_export, examples, scratch):
    variant = PEERS[name](setup(tiny, examples, scratch))
    assert (variant.peer, variant.precision) == (name, "fp32")
    asker = variant.load()
    pairs = [(e.question, e.context) for e in examples[::12]]
    expected = [found[0] for found in Answerer.load(tiny.bundle()).answer_batch(pairs)]
    for found in (asker.answer_all(pairs), [asker.answer_one(*pair) for pair in pairs]):
        assert [(a.text, a.start) for a in found] == [(a.text, a.start) for a in expected]
        assert [a.score for a in found] == pytest.approx([a.score for a in expected], abs=1e-4)


def test_bf16_halves_the_weights_and_answers_alike(tiny, tiny_export, examples, scratch):
    given = setup(tiny, examples, scratch)
    full, half = PEERS["torch"](given), PEERS["torch-bf16"](given)
    assert half.size * 2 == full.size
    pairs = [(e.question, e.context) for e in examples[::12]]
    found = half.load().answer_all(pairs)
    assert sum(a.text == e.answers[0].text for a, e in zip(found, examples[::12], strict=True)) >= len(pairs) - 1
    assert any(a.score != b.score for a, b in zip(found, full.load().answer_all(pairs), strict=True))


@pytest.mark.parametrize("name", ["pipeline", "optimum"])
def test_a_pipeline_answers_in_order_one_pair_and_many(name, tiny, tiny_export, examples, scratch):
    variant = PEERS[name](setup(tiny, examples, scratch, "int8" if name == "optimum" else ""))
    assert variant.precision == ("int8" if name == "optimum" else "fp32")
    asker = variant.load()
    pairs = [(e.question, e.context) for e in examples[:3]]
    one_by_one = [asker.answer_one(*pair) for pair in pairs]
    assert [a.text for a in asker.answer_all(pairs)] == [a.text for a in one_by_one]
    assert asker.answer_all(pairs[:1]) == one_by_one[:1]
    assert all(c[a.start : a.end] == a.text for a, (_, c) in zip(one_by_one, pairs, strict=True))
    assert asker.answerer is None


def test_openvino_int8_calibrated_on_other_contexts_answers(tiny, tiny_export, examples, scratch):
    pytest.importorskip("openvino", reason="the extra peers is not installed")
    pytest.importorskip("nncf", reason="the extra peers is not installed")
    variant = PEERS["openvino"](setup(tiny, examples, scratch))
    assert variant.precision == "int8"
    assert "calibrated on 16 windows" in variant.remark
    asker = variant.load()
    asked = examples[16:40]
    pairs = [(e.question, e.context) for e in asked]
    found = asker.answer_all(pairs)
    right = sum(a.text == e.answers[0].text for a, e in zip(found, asked, strict=True))
    assert right >= 0.8 * len(asked)
    assert [asker.answer_one(*pair).text for pair in pairs] == [a.text for a in found]


@pytest.mark.parametrize(
    ("name", "package", "fix"),
    [
        ("openvino", "openvino", "not installed: pip install 'qadeploy[peers]' (openvino)"),
        ("torch", "torch", "not installed: pip install 'qadeploy[train]' (torch)"),
        ("optimum", "optimum.onnxruntime", "not installed: pip install 'qadeploy[optimum]' (optimum-onnx)"),
    ],
)
def test_a_missing_package_is_a_line_with_its_fix(
    name, package, fix, tiny, tiny_export, examples, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError) as error:
        PEERS[name](setup(tiny, examples, tmp_path))
    assert status_of(error.value) == fix


def test_a_checkpoint_that_is_gone_is_named(tiny, tiny_export, examples, tmp_path):
    given = setup(tiny, examples, tmp_path)
    gone = Setup(tmp_path / "gone", given.bundle, "cpu", 1, False, (), tmp_path)
    for name in ("pipeline", "torch", "optimum"):
        with pytest.raises(FailureError, match="gone: the bundle's source checkpoint no longer exists"):
            PEERS[name](gone)


def test_weights_in_several_files_count_together(tiny, tmp_path):
    whole = tiny.run / "checkpoint"
    load_checkpoint(whole).model.save_pretrained(tmp_path / "parts", max_shard_size="100KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 1
    assert weights_bytes(str(tmp_path / "parts"), 4) == weights_bytes(str(whole), 4) > 100_000
    (tmp_path / "none").mkdir()
    with pytest.raises(FailureError, match="none: has no weights as safetensors: save"):
        weights_bytes(str(tmp_path / "none"), 4)


def test_peers_are_named_once_and_known():
    assert parse_peers("torch, pipeline,torch,") == ["torch", "pipeline"]
    assert parse_peers("") == []
    with pytest.raises(InputError, match="unknown peer keras: choose from pipeline, torch, torch-bf16"):
        parse_peers("pipeline,keras")


def test_bundles_of_one_name_get_names_that_differ(tiny, tiny_export, tmp_path):
    copy = sealed_copy(tiny.bundle(), tmp_path / "keepers")
    found, broken = open_bundles([tiny.bundle(), copy, tiny.bundle("int8")])
    names = [v.name for v in variants(found, BenchOptions(device="cpu", threads=1), False)]
    assert names == [f"qadeploy fp32 ({tiny.bundle()})", f"qadeploy fp32 ({copy})", "qadeploy int8 (keepers-int8)"]
    assert broken == {}
    with pytest.raises(InputError, match="is named twice"):
        open_bundles([tiny.bundle(), f"{tiny.bundle()}/"])


def test_a_damaged_bundle_is_a_row_unless_it_is_the_first(tiny, tiny_export, tmp_path):
    damaged = sealed_copy(tiny.bundle(), tmp_path / "damaged")
    (damaged / "model.onnx").write_bytes(b"nothing")
    found, broken = open_bundles([tiny.bundle(), damaged])
    assert len(found) == 1
    assert "does not match the manifest" in status_of(broken[f"qadeploy ({damaged})"])
    with pytest.raises(BundleError):
        open_bundles([damaged, tiny.bundle()])
    with pytest.raises(InputError, match="no such bundle folder"):
        open_bundles([tiny.bundle(), tmp_path / "typo"])


def test_start_up_and_memory_of_a_bundle_in_fresh_processes(tiny, tiny_export, examples):
    (variant,) = variants([open_bundle(tiny.bundle())], BenchOptions(device="cpu", threads=1), False)
    found = cold(variant, [(e.question, e.context) for e in examples[:4]], 2)
    seconds = found["startup_seconds_by_process"]
    assert found["cold_note"] == ""
    assert len(seconds) == 2
    assert all(0.02 < s < 60 for s in seconds)
    assert 2e7 < found["peak_memory_bytes"] < 1e9
    assert found["startup_seconds"] == pytest.approx(sum(seconds) / 2)


def test_a_process_that_fails_says_why():
    variant = Variant(
        "broken",
        "fp32",
        0,
        "qadeploy.bench.own:load",
        {"path": "gone", "device": "cpu", "threads": 1, "load_timeout": None, "allow_no_answer": False},
    )
    found = cold(variant, [("Who?", "Ada.")], 3)
    assert (found["startup_seconds_by_process"], found["peak_memory_bytes"]) == ([], None)
    assert "ended with 1" in found["cold_note"]
    assert "gone: no such bundle folder" in found["cold_note"]
    assert found["startup_seconds"] is None


def test_calibration_never_sees_a_context_that_is_asked_about(examples):
    workload = draw("keepers", examples, 10)
    found = calibration(examples, workload, 7)
    assert len(found) == 7
    assert not {e.context for e in found} & {e.context for e in workload.examples}
    assert spread(range(10), 3) == [0, 3, 6]
    assert spread([1, 2], 5) == [1, 2]


def test_windows_of_many_are_those_of_each(tiny, tiny_export, examples):
    answerer = Answerer.load(tiny.bundle())
    settings = answerer.settings.changed(max_seq_len=24, doc_stride=4)
    found = windows_of(answerer.encoder, settings, examples[:4])
    one = [w for e in examples[:4] for w in windows_of(answerer.encoder, settings, [e])]
    assert [w.input_ids.tolist() for w in found] == [w.input_ids.tolist() for w in one]
    assert len(found) > 4


def test_the_pipeline_says_why_it_is_missing_from_transformers_5_on(tiny, tiny_export, examples, tmp_path, monkeypatch):
    monkeypatch.setattr("qadeploy.training.transformers_versions.IS_5", True)
    with pytest.raises(
        FailureError, match=r"^transformers .* has no question-answering pipeline.*'transformers<5'"
    ) as error:
        PEERS["pipeline"](setup(tiny, examples, tmp_path))
    assert "has no question-answering pipeline" in status_of(error.value)
