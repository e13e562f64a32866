"""Export, optimisation and quantization: proven equal or not written; and how the run to export is found."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import numpy_helper
from transformers import AutoTokenizer, FNetConfig, FNetForQuestionAnswering

from qadeploy import Answerer
from qadeploy.data.loading import hash_examples, read
from qadeploy.data.splits import carve_by_passage
from qadeploy.errors import CheckpointError, FailureError, GateError, InputError
from qadeploy.evaluation.scoring import Evaluation
from qadeploy.export import reference as reference_module
from qadeploy.export.fused import fusion_line, optimize
from qadeploy.export.fusion import fuse_file
from qadeploy.export.onnx import export, export_graph, read_shared_weights
from qadeploy.export.options import ExportOptions
from qadeploy.export.parity import Parity, measure_parity, parity_windows, require_parity
from qadeploy.export.plan import plan_lines
from qadeploy.export.quantize import run as quantize_run
from qadeploy.export.quantize.recipes import RECIPES
from qadeploy.export.quantize.run import quantize
from qadeploy.export.quantize.search import SearchOptions
from qadeploy.export.reference import make_reference
from qadeploy.inference.bundle import CARD, MANIFEST, MODEL, open_bundle
from qadeploy.inference.session import OnnxModel
from qadeploy.inference.tuning import SPINNING
from qadeploy.records import Example, Window
from qadeploy.shipped import base_bundle_path, base_model_path
from qadeploy.training.checkpoint import TorchModel, load_checkpoint
from qadeploy.training.exportable import exporters
from qadeploy.training.provenance import weights_hash
from qadeploy.training.runs import HeldOut, Run, dev_set, find_run, held_out
from qadeploy.training.train import train
from tests.conftest import sealed_copy, tiny_options, triplets, write_jsonl

KINDS = ("", "fused", "int8")


def largest_difference(checkpoint, model, windows: list[Window]) -> float:
    """The largest difference of any logit to PyTorch, each window alone."""
    reference = TorchModel(checkpoint.model, checkpoint.encoder.config.pad_token_id)
    return max(
        float(np.abs(a - b).max())
        for window in windows
        for a, b in zip(reference.run_batch([window])[0], model.run([window])[0], strict=True)
    )


def windows_of(checkpoint, examples: list[Example], sizes: list[int]) -> list[Window]:
    encoder = checkpoint.encoder
    return [
        window
        for example in examples
        for size in sizes
        for window in encoder.windows(
            encoder.encode(example.question), encoder.encode(example.context), max_seq_len=size, doc_stride=size // 4
        )
    ]


# ---------------------------------------------------------------- the bundles of one export


@pytest.mark.parametrize("kind", ["", "fused"])
def test_exact_bundles_have_the_logits_of_pytorch(tiny, tiny_export, kind):
    checkpoint = load_checkpoint(tiny.run / "checkpoint")
    text = " ".join(str(row["context"]) for row in triplets(12))
    windows = windows_of(checkpoint, [Example("a", "Who keeps the bell?", text)], [30, 64, 160])
    assert len({len(w) for w in windows}) >= 4
    assert largest_difference(checkpoint, Answerer.load(tiny.bundle(kind)).model, windows) < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_the_manifest_says_what_was_made_from_what_and_what_was_measured(tiny, tiny_export, kind):
    bundle = open_bundle(tiny.bundle(kind))
    manifest = bundle.manifest
    assert manifest["name"] == bundle.name
    assert bundle.precision == ("int8" if kind == "int8" else "fp32")
    mask = [] if kind == "int8" else ["attention_mask"]  # see test_int8_is_smaller
    assert manifest["inputs"] == ["input_ids", *mask, "token_type_ids"]
    assert manifest["architecture"]["layers"] == 2
    assert bundle.settings.to_dict() == tiny.metrics["settings"]

    measured = manifest["measured"]
    assert measured["total"] == 20
    assert measured["dev_set"]
    assert measured["f1"] == measured["exact_match"] == measured["pytorch"]["f1"] == 100.0
    assert (measured["f1_change"], measured["f1_change_interval"]) == (0.0, [0.0, 0.0])
    assert measured["ms_per_question"] > 0
    assert measured["speedup_to_pytorch"] > 0

    parity = manifest["parity"]
    assert parity["windows"] >= 20
    assert parity["shortest"] < parity["longest"] <= 160
    assert (parity["max_abs_diff"] < 1e-4) == (kind != "int8")

    source = manifest["source"]
    record = json.loads((tiny.run / "run.json").read_text())
    assert source["checkpoint"] == str(tiny.run / "checkpoint")
    assert source["run"]["data_sha256"] == record["data_sha256"]
    assert source["checkpoint_sha256"] == weights_hash(tiny.run / "checkpoint")
    used = ("torch", "optimum" if exporters()[0] == "optimum" else "onnxscript", "onnx", "onnxruntime")
    assert all(manifest["versions"][name] != "none" for name in used)
    card = (bundle.folder / CARD).read_text()
    assert f"# {bundle.name}" in card
    assert "EM 100.0" in card


def test_the_fused_bundle_counts_its_attention_nodes(tiny, tiny_export):
    bundle = open_bundle(tiny.bundle("fused"))
    graph = onnx.load_model_from_string(bundle.read(MODEL)).graph
    counts = Counter(node.op_type for node in graph.node)
    made = bundle.manifest["made"]
    assert made["fused_nodes"]["Attention"] == counts["Attention"] == made["layers"] == 2
    assert "fused 2 of 2 attention layers" in fusion_line(bundle)
    assert "not every" not in fusion_line(bundle)
    made["fused_nodes"]["Attention"] = 1
    assert "not every attention layer" in fusion_line(bundle)


def quantized(model: bytes) -> int:
    """The number of matmuls in int8: of kinds of their own, or, in the static recipe, of dequantized weights."""
    nodes = onnx.load_model_from_string(model).graph.node
    dequantized = {node.output[0] for node in nodes if node.op_type == "DequantizeLinear"}
    counts = Counter(node.op_type for node in nodes if node.op_type != "MatMul" or node.input[1] in dequantized)
    return sum(counts[kind] for kind in ("MatMulInteger", "MatMulNBits", "MatMul"))


def test_int8_is_smaller_and_keeps_attention_matmuls_in_float(tiny, tiny_export, plain_int8):
    plain, small = open_bundle(tiny.bundle()), open_bundle(tiny.bundle("int8"))
    assert small.model_bytes < 0.8 * plain.model_bytes
    counts = Counter(n.op_type for n in onnx.load_model_from_string(small.read(MODEL)).graph.node)
    made = small.manifest["made"]
    # The chosen recipe depends on the machine, and some recipes keep matmuls in float: these are named.
    every = quantized(open_bundle(plain_int8).read(MODEL))
    assert every >= 6
    assert quantized(small.read(MODEL)) >= every - len(made["float_nodes"])
    assert counts["MultiHeadAttention"] == made["attention_nodes"] == made["attentions"] == 2  # in float
    assert small.manifest["inputs"] == ["input_ids", "token_type_ids"]  # windows run unpadded: nothing to mask
    assert made["max_f1_drop"] == 0.5
    assert [row["recipe"] for row in made["leaderboard"]] == list(RECIPES)
    chosen = next(row for row in made["leaderboard"] if row["recipe"] == made["recipe"])
    assert chosen["f1_lost"] <= 0.5 >= chosen["f1_lost_held_out"]
    # The final measurement began with the recipe's settings from the search, and the bundle runs with its result.
    session, trials = small.manifest["session"], small.manifest["tuning"]["trials"]
    graphs = {False: "all of the runtime's", True: "without SkipLayerNormFusion"}
    assert trials[0]["settings"] == graphs["disabled_optimizers" in chosen["session"]]
    taken = {t["step"]: t["settings"] for t in trials if t["taken"]}
    assert taken["optimizers"] == graphs["disabled_optimizers" in session]
    assert (taken.get("idle threads") == "sleep") == (session.get("config", {}).get(SPINNING) == "0")


# ---------------------------------------------------------------- the gates


def test_int8_below_the_gate_is_not_written_and_an_older_bundle_stays(reference, tiny, bundle, tmp_path):
    out = tmp_path / "small"
    source = open_bundle(bundle)
    with pytest.raises(GateError, match=r"small: every recipe loses more than -1.*--max-f1-drop"):
        quantize(reference, source, out, SearchOptions(-1.0), recipe="int8", say=print)
    assert list(tmp_path.iterdir()) == []
    shutil.copytree(tiny.bundle("int8"), out)
    before = (out / MANIFEST).read_bytes()
    with pytest.raises(GateError):
        quantize(reference, source, out, SearchOptions(-1.0), recipe="int8", say=print)
    assert [p.name for p in tmp_path.iterdir()] == ["small"]
    assert (out / MANIFEST).read_bytes() == before


@pytest.mark.parametrize("wrong", [1, 6])
def test_a_loss_that_chance_may_explain_is_a_warning(wrong, reference, bundle, tmp_path, monkeypatch):
    """One wrong answer of 6 is 17 points of F1, and the interval of its loss begins at 0."""
    held_out = quantize_run._held_out

    def worse(*given: Any) -> Evaluation:
        found = held_out(*given)
        rows = found.scores.rows_f1.copy()
        rows[:wrong] = 0.0
        return replace(found, scores=replace(found.scores, rows_f1=rows))

    monkeypatch.setattr(quantize_run, "_held_out", worse)
    said: list[str] = []
    lost = 100 * wrong / len(reference.examples)
    arguments = (reference, open_bundle(bundle), tmp_path / "small", SearchOptions(0.5))
    if wrong == 6:
        with pytest.raises(GateError, match=rf"every recipe loses more than 0\.5 .*{lost:.2f} held out"):
            quantize(*arguments, recipe="int8", say=said.append)
        assert list(tmp_path.iterdir()) == []
        return
    (row,) = quantize(*arguments, recipe="int8", say=said.append).manifest["made"]["leaderboard"]
    assert (row["verdict"], row["f1_lost_held_out"]) == ("chosen", pytest.approx(lost))
    (warning,) = (line for line in said if "WARNING" in line)
    assert f"WARNING: int8 loses {lost:.2f} points of F1 (95 % interval of the change -" in warning
    assert "to +0.00) on " in warning


def test_a_graph_that_moves_the_logits_is_not_written(reference, bundle, tmp_path):
    proto = onnx.load_model(bundle / MODEL)
    bias = next(t for t in proto.graph.initializer if "qa_outputs.bias" in t.name)
    bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + np.float32(0.01), bias.name))
    moved = sealed_copy(bundle, tmp_path / "moved", proto.SerializeToString())
    with pytest.raises(GateError, match=r"fused: its logits differ from PyTorch by up to 1\.00e-02"):
        optimize(reference, open_bundle(moved), tmp_path / "fused")
    assert [p.name for p in tmp_path.iterdir()] == ["moved"]


def test_contexts_are_cut_beside_a_long_question_too(tiny):
    checkpoint = load_checkpoint(find_run(tiny.run).checkpoint)
    question = Example("long", "who keeps the lamp in the hall and " * 5, "Ada keeps the lamp in room 7 outside. " * 20)
    asked = len(checkpoint.encoder.encode(question.question))
    windows = parity_windows(checkpoint, [question])
    assert asked == 50
    assert len(windows[0]) == asked + 96 < checkpoint.settings.max_seq_len
    assert len(windows) > 1


@pytest.mark.parametrize(("difference", "passes"), [(9e-5, True), (2e-4, False), (math.nan, False), (math.inf, False)])
def test_parity_is_required(difference, passes):
    parity = Parity(difference, 0.0, 1.0, windows=24, shortest=20, longest=90)
    if passes:
        require_parity(parity, "mine")
    else:
        with pytest.raises(GateError, match=r"^mine: its logits differ"):
            require_parity(parity, "mine")


@pytest.mark.parametrize(
    ("theirs", "own", "usual", "passes"),
    [
        (7e-5, 2e-5, 2e-5, True),  # PyTorch itself is off
        (3e-4, 5e-4, 5e-4, True),
        (7e-5, 2e-4, 2e-4, False),
        (3e-5, 2e-4, 2e-5, True),  # a single logit is off
        (3e-5, 2e-3, 2e-5, False),
        (math.inf, math.inf, math.inf, False),
        (math.nan, math.nan, math.nan, False),
    ],
)
def test_rounding_is_no_wrong_export(theirs, own, usual, passes):
    parity = Parity(
        2e-4, 0.0, 1.0, 24, shortest=20, longest=90, pytorch_rounding=theirs, rounding=own, usual_rounding=usual
    )
    with contextlib.nullcontext() if passes else pytest.raises(GateError, match=r"^mine: its logits differ"):
        require_parity(parity, "mine")


def test_logits_so_large_that_float32_rounds_them_are_compared_in_float64(tiny, tmp_path):
    """The head's weights are so large that rounding alone moves logits by more than the tolerance."""
    checkpoint, examples = load_checkpoint(tiny.run / "checkpoint"), read(str(tiny.data)).examples[:6]
    with torch.no_grad():
        checkpoint.model.qa_outputs.weight *= 3_000
    export_graph(checkpoint, tmp_path)
    proto = onnx.load_model(tmp_path / MODEL)
    bias = next(t for t in proto.graph.initializer if "qa_outputs.bias" in t.name)
    wrong = onnx.ModelProto.FromString(proto.SerializeToString())
    moved = next(t for t in wrong.graph.initializer if t.name == bias.name)
    moved.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + np.float32(0.1), bias.name))
    pad = checkpoint.encoder.config.pad_token_id
    right, other = (OnnxModel(p.SerializeToString, device="cpu", pad_token_id=pad) for p in (proto, wrong))
    parity = measure_parity(checkpoint, right, examples, 1e-4)
    assert parity.max_abs_diff > 1e-4
    require_parity(parity, "right")
    with pytest.raises(GateError, match=r"^wrong: its logits differ from PyTorch by up to 1\.0"):
        require_parity(measure_parity(checkpoint, other, examples, 1e-4), "wrong")
    assert checkpoint.model.dtype == torch.float32
    assert "rounding" not in measure_parity(checkpoint, right, examples, 1.0).to_dict()


@pytest.mark.parametrize(("budget", "seconds"), [(None, 20.0), (300.0, 20.0), (30.0, 5.0)])
def test_a_small_budget_shortens_the_measuring_of_a_bundle(tiny, budget, seconds, monkeypatch):
    monkeypatch.setattr(reference_module, "_SECONDS", 20.0)
    run = find_run(str(tiny.run))
    made = make_reference(run, HeldOut("keepers", dev_set(run)[:2]), budget=budget)
    assert made.measuring == seconds
    slow = replace(made, seconds=0.001)  # so that the time and not the least number of questions decides
    (line, *_) = plan_lines(ExportOptions(optimize=False), slow, budget or 300.0)
    assert f"fp32 {seconds:.0f} s" in line
    assert "fp16" not in line
    (implied, *_) = plan_lines(ExportOptions(optimize=False, device="cuda"), slow, budget or 300.0)
    assert "fp16" in implied


def test_parity_is_measured_on_windows_of_many_lengths_and_of_several_a_context(tiny):
    checkpoint = load_checkpoint(tiny.run / "checkpoint")
    text = " ".join(str(row["context"]) for row in triplets(12))
    windows = parity_windows(checkpoint, [Example("a", "Who keeps the bell?", text)] * 4)
    assert len({len(w) for w in windows}) >= 3
    assert any(w.context_offset for w in windows)


def test_a_model_that_optimum_cannot_export_is_named(reference, tmp_path):
    pytest.importorskip("optimum.exporters.onnx", reason="the extra optimum is not installed")
    config = FNetConfig(vocab_size=300, hidden_size=16, num_hidden_layers=1, intermediate_size=16)
    checkpoint = replace(reference.checkpoint, model=FNetForQuestionAnswering(config).eval())
    with pytest.raises(FailureError, match="optimum cannot export a fnet model: "):
        export(replace(reference, checkpoint=checkpoint), tmp_path / "out", "optimum")
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_cannot_tell_padding_from_text_is_refused(tiny_checkpoint, tmp_path):
    config = FNetConfig(vocab_size=300, hidden_size=16, num_hidden_layers=1, intermediate_size=16)
    FNetForQuestionAnswering(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_checkpoint).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="fnet models accept no attention_mask"):
        load_checkpoint(tmp_path)


def test_a_failure_of_the_fusions_is_named_and_leaves_the_model(tmp_path):
    (tmp_path / MODEL).write_bytes(b"no model")
    with pytest.raises(FailureError, match=r"^ONNX Runtime's graph optimisation failed: .*DecodeError"):
        fuse_file(tmp_path / MODEL, {"heads": 2, "hidden": 8})
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"no model"]


def test_a_model_without_known_fusions_is_named(reference, bundle, tmp_path):
    source = open_bundle(bundle)
    source.manifest["architecture"]["model_type"] = "gpt2"
    with pytest.raises(FailureError, match="no fusions for gpt2"):
        optimize(reference, source, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- runs and what they held out


def test_the_newest_run_is_found(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("first", "second", ".second.77.tmp"):
        shutil.copytree(tiny.run, tmp_path / "runs" / name)
        (tmp_path / "runs" / name / "run.json").touch()  # the hidden one is work that was cut off
    (tmp_path / "runs" / "notes").mkdir()
    assert find_run(None).name == "second"
    (tmp_path / "runs" / "first" / "run.json").touch()
    assert find_run(None).name == "first"


def test_a_checkpoint_inside_a_run_is_the_run(tiny, tiny_checkpoint):
    run, checkpoint = find_run(tiny.run), find_run(tiny.run / "checkpoint")
    assert run == checkpoint
    assert (run.name, run.checkpoint) == ("keepers", tiny.run / "checkpoint")
    assert find_run(tiny_checkpoint) == Run(tiny_checkpoint.parent.name, tiny_checkpoint, None)


@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        ("no runs", InputError, "run qadeploy train first"),
        ("no folder", InputError, "mine: no such folder"),
        ("empty folder", CheckpointError, "mine: neither a finished run"),
        ("no checkpoint", CheckpointError, "mine: the run has no checkpoint"),
        ("unfinished", CheckpointError, "mine: neither a finished run"),
        ("cut record", CheckpointError, "mine/run.json: not valid JSON"),
        ("foreign record", CheckpointError, "mine/run.json: is not the record of a finished run"),
        ("unfinished record", CheckpointError, "mine is not finished .* qadeploy train --resume --out mine"),
    ],
)
def test_what_is_no_run_is_named(fault, error, message, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mine = Path("mine")
    if fault not in {"no runs", "no folder", "empty folder"}:
        shutil.copytree(tiny.run, mine)
    if fault == "empty folder":
        mine.mkdir()
    elif fault == "no checkpoint":
        shutil.rmtree(mine / "checkpoint")
    elif fault == "unfinished":
        (mine / "run.json").unlink()
    elif fault == "cut record":
        (mine / "run.json").write_text('{"status"')
    elif fault == "foreign record":
        (mine / "run.json").write_text("[1]")
    elif fault == "unfinished record":
        record = json.loads((mine / "run.json").read_text())
        (mine / "run.json").write_text(json.dumps({**record, "status": "running"}))
    with pytest.raises(error, match=message):
        find_run(None if fault == "no runs" else mine)


def test_the_questions_held_out_are_those_of_training(tiny):
    run = find_run(tiny.run)
    found = held_out(run, None)
    source, examples = found.name, found.examples
    every = read(str(tiny.data)).examples
    trained, dev = carve_by_passage(every, 0.2, 13)
    assert source == f"{tiny.data} (dev set)"
    assert examples == dev_set(run) == dev
    assert len(dev) == tiny.metrics["dev"]["total"]
    assert not {e.context for e in trained} & {e.context for e in dev}


def copy_run(tiny, folder: Path, **options: object) -> Run:
    """The tiny run with other options in its record."""
    shutil.copytree(tiny.run, folder)
    record = json.loads((folder / "run.json").read_text())
    record["options"].update(options)
    (folder / "run.json").write_text(json.dumps(record))
    return find_run(folder)


def test_data_that_changed_since_the_run_is_refused(tiny, tmp_path):
    data = write_jsonl(tmp_path / "mine.jsonl", triplets())
    run = copy_run(tiny, tmp_path / "run", data=str(data))
    assert len(held_out(run, None).examples) == len(dev_set(run)) == 20
    write_jsonl(data, triplets()[:-1])
    with pytest.raises(InputError, match=r"mine.jsonl: is not what the run was trained on.*--eval-data"):
        held_out(run, None)
    assert dev_set(run) == ()  # split from other rows, it would contain training questions
    data.unlink()
    with pytest.raises(InputError, match="no such file") as caught:
        held_out(run, None)
    assert "--eval-data FILE" in str(caught.value)
    assert dev_set(run) == ()


def test_held_out_data_that_changed_since_the_run_are_refused(tiny, tmp_path):
    data = write_jsonl(tmp_path / "mine.jsonl", triplets(12))
    run = copy_run(tiny, tmp_path / "run", eval_data=str(data), max_eval_samples=5)
    run.record["eval_data_sha256"] = hash_examples(read(str(data)).examples[:5])
    assert len(held_out(run, None).examples) == 5
    write_jsonl(data, triplets(12)[1:])
    with pytest.raises(
        InputError, match=r"mine.jsonl: changed since the run was evaluated on it: give --eval-data FILE"
    ):
        held_out(run, None)
    assert len(held_out(run, str(data)).examples) == 11


def test_held_out_data_of_the_run_or_of_the_call_come_first(tiny, tiny_checkpoint, tmp_path):
    rows = triplets(12)
    named = write_jsonl(tmp_path / "named.jsonl", rows[:5])
    mixed = write_jsonl(tmp_path / "mixed.jsonl", [*rows[:4], *({**r, "split": "validation"} for r in rows[4:6])])
    run = copy_run(tiny, tmp_path / "run", eval_data=str(named))
    assert held_out(run, None) == HeldOut(str(named), read(str(named)).examples)
    assert [e.question for e in held_out(run, str(mixed)).examples] == [r["question"] for r in rows[4:6]]
    with pytest.raises(InputError, match="not known what this checkpoint was trained on: give --eval-data"):
        held_out(find_run(tiny_checkpoint), None)


# ---------------------------------------------------------------- the base model that ships


def test_the_base_model_exports_with_the_logits_of_pytorch(tmp_path):
    try:
        checkpoint = load_checkpoint(base_model_path())
    except CheckpointError as error:
        pytest.skip(str(error))
    first, second = read("handbook").examples[::500]
    export_graph(checkpoint, tmp_path)
    pad = checkpoint.encoder.config.pad_token_id
    model = OnnxModel(lambda: str(tmp_path / MODEL), device="cpu", pad_token_id=pad)
    require_parity(measure_parity(checkpoint, model, [first]), "exported")
    longest = checkpoint.settings.max_seq_len
    windows = [w for size in (48, 100, longest) for w in windows_of(checkpoint, [second], [size])[-2:]]
    assert len({len(w) for w in windows}) >= 4
    assert largest_difference(checkpoint, model, windows) < 1e-4


# ---------------------------------------------------------------- threshold and temperature


def test_what_the_dev_part_chose_is_in_the_run_and_the_bundle(folded, tmp_path):
    metrics = json.loads((folded.run / "metrics.json").read_text())
    chosen = metrics["settings"]
    assert chosen == json.loads((folded.run / "checkpoint" / "qadeploy.json").read_text())
    assert chosen["null_threshold"] is not None
    assert chosen["temperature"] != 1.0
    assert metrics["no_answer"]["null_threshold"] == chosen["null_threshold"]
    dev = metrics["no_answer"]["dev"]
    assert dev["f1"] == pytest.approx(metrics["dev"]["f1"])
    assert dev["f1"] > dev["f1_always_answer"]
    assert metrics["calibration"]["temperature"] == chosen["temperature"]
    assert 0 <= metrics["calibration"]["dev"]["ece"] <= 1
    assert "calibration error (ECE)" in folded.remarks

    run = find_run(folded.run)
    reference = make_reference(run, HeldOut("keepers", dev_set(run)))
    assert reference.scores.to_dict() == metrics["dev"]
    manifest = export(reference, tmp_path / "bundle").manifest
    assert manifest["settings"] == chosen
    measured = manifest["measured"]
    assert measured["ece"] == pytest.approx(metrics["calibration"]["dev"]["ece"], abs=1e-4)
    for name in ("HasAns_f1", "NoAns_f1", "HasAns_total", "NoAns_total"):
        assert measured[name] == pytest.approx(metrics["dev"][name])
    card = (tmp_path / "bundle" / CARD).read_text()
    assert f"by more than {chosen['null_threshold']:.3f}" in card
    assert f"at temperature {chosen['temperature']:.3f}" in card
    assert f"on the {measured['NoAns_total']} without" in card

    answerer = Answerer.load(tmp_path / "bundle", device="cpu")
    asked = [(e.question, e.context) for e in reference.examples]
    texts = [a[0].text for a in answerer.answer_batch(asked, allow_no_answer=True)]
    right = [
        any(t == a.text for a in e.answers) or not (t or e.answers)
        for t, e in zip(texts, reference.examples, strict=True)
    ]
    assert 100 * np.mean(right) == pytest.approx(metrics["dev"]["exact_match"])


def test_the_base_model_that_ships_and_its_bundle_can_say_no_answer():
    settings = load_checkpoint(base_model_path()).settings
    assert settings.null_threshold is not None
    assert settings.relative_to_null
    assert open_bundle(base_bundle_path()).settings == settings


def test_dev_data_of_its_own_is_found_again_and_noticed_where_it_changed(tiny_checkpoint, tmp_path):
    data, dev = (
        write_jsonl(tmp_path / f"{n}.jsonl", rows) for n, rows in (("data", triplets(12)), ("dev", triplets(20)[12:]))
    )
    options = tiny_options(data, tiny_checkpoint, tmp_path / "run", epochs=1, dev_data=str(dev))
    metrics = train(options, lambda line: None, progress=False).metrics
    run = find_run(tmp_path / "run")
    assert dev_set(run) == read(str(dev)).examples
    assert held_out(run, None) == HeldOut(str(dev), read(str(dev)).examples)
    assert metrics["dev"]["total"] == 8
    write_jsonl(dev, triplets(20)[13:])
    assert dev_set(run) == ()
    with pytest.raises(
        InputError, match=r"dev.jsonl: is not the dev data that the run was made with: give --eval-data"
    ):
        held_out(run, None)


# ---------------------------------------------------------------- shared weights


def test_shared_weights_are_read_where_they_lie_in_branches_too():
    made = onnx.helper.make_node
    branch = onnx.helper.make_graph(
        [made("MatMul", ["x", "again"], ["y"], "inner")], "b", [], [onnx.helper.make_tensor_value_info("y", 1, [1, 2])]
    )
    nodes = [
        made("Identity", ["w"], ["shared"], "first"),
        made("Identity", ["shared"], ["again"], "second"),
        made("Identity", ["x"], ["kept"], "of an input"),
        made("Identity", ["w"], ["told"], "of an output"),
        made("If", ["yes"], ["z"], "branches", then_branch=branch, else_branch=branch),
        made("MatMul", ["kept", "shared"], ["u"], "outer"),
    ]
    tensors = [numpy_helper.from_array(np.array([[1, 2], [3, 4]], np.float32), "w")]
    tensors.append(numpy_helper.from_array(np.array(True), "yes"))
    inputs = [onnx.helper.make_tensor_value_info("x", 1, [1, 2])]
    shapes = {"z": [1, 2], "u": [1, 2], "told": [2, 2]}
    outputs = [onnx.helper.make_tensor_value_info(name, 1, shape) for name, shape in shapes.items()]
    model = onnx.helper.make_model(
        onnx.helper.make_graph(nodes, "g", inputs, outputs, tensors),
        opset_imports=[onnx.helper.make_opsetid("", 17)],
        ir_version=9,
    )

    def run() -> list[np.ndarray]:
        session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        return session.run(None, {"x": np.array([[5, 6]], np.float32)})

    before = run()
    read_shared_weights(model.graph)
    onnx.checker.check_model(model)
    assert [node.name for node in model.graph.node] == ["of an input", "of an output", "branches", "outer"]
    assert model.graph.node[-1].input[1] == "w"
    assert all(attribute.g.node[0].input[1] == "w" for attribute in model.graph.node[2].attribute)
    for old, new in zip(before, run(), strict=True):
        np.testing.assert_array_equal(old, new)
