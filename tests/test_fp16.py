"""fp16 bundles on the CPU provider: what is fused, what stays exact, and the gate."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper

from qadeploy import Answerer
from qadeploy.cli import main
from qadeploy.errors import FailureError, GateError, InputError
from qadeploy.export.fp16 import Fp16Model, exact_nodes, fp16_lines, judging_questions, to_fp16, write_fp16
from qadeploy.export.onnx import export_graph
from qadeploy.export.parity import TOLERANCES
from qadeploy.inference.bundle import MANIFEST, MODEL, newest_bundle, open_bundle
from qadeploy.inference.doctor import diagnose, diagnosis_lines, gpu_bundles
from qadeploy.inference.session import OnnxModel
from qadeploy.training.checkpoint import TorchModel, load_checkpoint
from tests.models_for_tests import BY_NAME

FUSED = ("BERT", "DistilBERT", "RoBERTa", "XLM-R", "ELECTRA", "ALBERT")  # every attention one node
PLAIN = ("MPNet", "ModernBERT", "DeBERTa-v3")


def nodes(model: bytes) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load_model_from_string(model).graph.node)


class Made:
    """One architecture's checkpoint, its fp32 graph and what it becomes in fp16."""

    def __init__(self, name: str, folder: Any) -> None:
        self.checkpoint = load_checkpoint(BY_NAME[name].save(folder / "checkpoint"))
        export_graph(self.checkpoint, folder)
        self.plain = (folder / MODEL).read_bytes()
        config = self.checkpoint.model.config
        self.architecture = {
            "model_type": config.model_type,
            "layers": config.num_hidden_layers,
            "heads": config.num_attention_heads,
            "hidden": config.hidden_size,
        }
        self.fp16 = to_fp16(self.plain, self.architecture)

    def windows(self) -> list[Any]:
        encoder = self.checkpoint.encoder
        text = "The keeper of the old lamp lives beside the harbour and counts the boats at night. " * 4
        question, context = encoder.encode("Who counts the boats?"), encoder.encode(text)
        return [w for n in (30, 75) for w in encoder.windows(question, context, max_seq_len=n, doc_stride=8)]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Any:
    """The architectures by name, each made once."""
    known: dict[str, Made] = {}

    def get(name: str) -> Made:
        if name not in known:
            known[name] = Made(name, tmp_path_factory.mktemp(name))
        return known[name]

    return get


# ---------------------------------------------------------------- the graph


@pytest.mark.parametrize("name", FUSED)
def test_attention_and_normalisation_are_fused(made, name):
    found: Fp16Model = made(name).fp16
    count = nodes(found.model)
    layers = made(name).checkpoint.model.config.num_hidden_layers
    assert (count["Attention"], count["SkipLayerNormalization"]) == (layers, 2 * layers)
    assert count["Softmax"] == 0
    assert found.attentions == found.layers == layers


@pytest.mark.parametrize("name", [*FUSED, *PLAIN])
def test_weights_are_fp16_and_logits_fp32(made, name):
    proto = onnx.load_model_from_string(made(name).fp16.model)
    kinds = Counter(t.data_type for t in proto.graph.initializer if len(t.dims) == 2)
    assert kinds[TensorProto.FLOAT16] > 8
    assert kinds[TensorProto.FLOAT] == 0
    outputs = {o.name: o.type.tensor_type.elem_type for o in proto.graph.output}
    assert outputs == {"start_logits": TensorProto.FLOAT, "end_logits": TensorProto.FLOAT}


@pytest.mark.parametrize("name", [*FUSED, *PLAIN])
def test_logits_stay_pytorchs_within_what_fp16_rounds(made, name):
    """MPNet's were off by 0.4 when its distance buckets were computed in fp16."""
    own = made(name)
    model = OnnxModel(
        lambda: own.fp16.model, device="cpu", threads=1, pad_token_id=own.checkpoint.encoder.config.pad_token_id
    )
    reference = TorchModel(own.checkpoint.model, own.checkpoint.encoder.config.pad_token_id)
    windows = own.windows()
    for runs in (model.run(windows), model.run_batch(windows)):
        for theirs, ours in zip(reference.run(windows), runs, strict=True):
            apart = max(float(np.abs(a - b).max()) for a, b in zip(theirs, ours, strict=True))
            assert 0 < apart < TOLERANCES["fp16"]


def test_integer_inputs_are_narrow_where_that_saves_casts(made):
    bert = made("BERT").fp16
    assert bert.int32_inputs
    assert nodes(bert.model)["Cast"] == 2  # the logits; none is left before the embedding
    types = {i.type.tensor_type.elem_type for i in onnx.load_model_from_string(bert.model).graph.input}
    assert types == {TensorProto.INT32}
    mpnet = onnx.load_model_from_string(made("MPNet").fp16.model)  # ids go to Equal and Gather there
    types = {i.type.tensor_type.elem_type for i in mpnet.graph.input}
    assert types == {TensorProto.INT32 if made("MPNet").fp16.int32_inputs else TensorProto.INT64}


def test_what_ends_as_an_integer_or_an_angle_stays_exact(made):
    mpnet, modernbert, bert = (made(name) for name in ("MPNet", "ModernBERT", "BERT"))
    kinds = {n.name: n.op_type for n in onnx.load_model_from_string(mpnet.fp16.model).graph.node}
    assert {"Log", "Div"} <= {kinds[name] for name in mpnet.fp16.exact if name in kinds}
    kinds = {n.name: n.op_type for n in onnx.load_model_from_string(modernbert.fp16.model).graph.node}
    assert {"Cos", "Sin"} <= {kinds[name] for name in modernbert.fp16.exact if name in kinds}
    # No matmul with weights stays in fp32.
    assert not {"MatMul", "Gemm", "Attention"} & {kind for name, kind in kinds.items() if name in bert.fp16.exact}


def test_exact_nodes_end_where_the_integers_begin():
    """x -> Mul -> Log -> Cast(int64), and beside it x -> Exp."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [4])
    ints = helper.make_tensor_value_info("i", TensorProto.INT64, [4])
    floats = helper.make_tensor_value_info("f", TensorProto.FLOAT, [4])
    graph = helper.make_graph(
        [
            helper.make_node("Mul", ["x", "x"], ["m"], "mul"),
            helper.make_node("Log", ["m"], ["l"], "log"),
            helper.make_node("Cast", ["l"], ["i"], "cast", to=TensorProto.INT64),
            helper.make_node("Exp", ["m"], ["f"], "exp"),
        ],
        "g",
        [x],
        [ints, floats],
    )
    assert set(exact_nodes(helper.make_model(graph))) == {"mul", "log", "cast"}


def test_a_graph_that_cannot_be_converted_is_an_error_of_ours():
    with pytest.raises(FailureError, match="cannot convert this bert model to fp16"):
        to_fp16(b"no model", {"model_type": "bert", "layers": 2, "heads": 2, "hidden": 32})


# ---------------------------------------------------------------- the bundle


@pytest.fixture(scope="module")
def written(reference, tiny, tiny_export, tmp_path_factory) -> Any:
    return write_fp16(
        reference, open_bundle(tiny.bundle()), tmp_path_factory.mktemp("fp16") / "keepers-fp16", device="cpu"
    )


def test_the_bundle_says_what_it_is_and_where_it_was_measured(written):
    made, judged = written.manifest["made"], written.manifest["made"]["judged_on"]
    assert written.precision == "fp16"
    assert (made["graph"], made["attention_nodes"], made["inputs"]) == ("fused", 2, "int32")
    assert (made["measured_on"], written.manifest["measured"]["device"]) == ("cpu", "cpu")
    assert made["arithmetic"].startswith("fp16 weights; ONNX Runtime computes in fp32")
    assert set(written.manifest["files"]) == {MODEL, "tokenizer.json", "README.md"}
    assert 0 < written.manifest["parity"]["max_abs_diff"] <= TOLERANCES["fp16"]
    assert (judged["held_out"], judged["enough"]) == (6, False)
    assert judged["questions"] == 96  # all that the run has
    assert judged["f1_change"] >= -0.1
    assert "fewer than 1000 questions" in fp16_lines(written)[-1]


def test_doctor_tells_of_the_bundles_for_gpus(written, tmp_path):
    damaged = written.folder.parent / "damaged"
    damaged.mkdir()
    (damaged / MANIFEST).write_text("{", encoding="utf-8")
    (one,) = gpu_bundles(written.folder.parent)
    assert one == {"bundle": str(written.folder), "measured_on": "cpu", "paths": []}
    line = next(line for line in diagnosis_lines({**diagnose(), "gpu_bundles": [one]}) if "keepers-fp16" in line)
    assert line.endswith("measured on cpu; its paths are tried when it is loaded on a GPU")
    assert gpu_bundles(tmp_path / "nothing") == []


def test_the_bundle_answers_like_fp32(written, tiny, reference):
    pairs = [(e.question, e.context) for e in reference.examples]
    ours = Answerer.load(written.folder).answer_batch(pairs)
    theirs = Answerer.load(tiny.bundle()).answer_batch(pairs)
    assert [(a[0].start, a[0].end) for a in ours] == [(a[0].start, a[0].end) for a in theirs]
    assert written.model_bytes < 0.6 * open_bundle(tiny.bundle()).model_bytes


def test_answers_that_got_worse_are_not_written(reference, tiny, tiny_export, tmp_path, monkeypatch):
    """The conversion breaks the answer head: the best logits become the worst."""
    real = to_fp16

    def broken(model, architecture):
        found = real(model, architecture)
        proto = onnx.load_model_from_string(found.model)
        weight = next(t for t in proto.graph.initializer if list(t.dims) == [48, 2])
        weight.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(weight), weight.name))
        return replace(found, model=proto.SerializeToString())

    monkeypatch.setattr("qadeploy.export.fp16.to_fp16", broken)
    out = tmp_path / "bad"
    with pytest.raises(GateError, match=r"bad: fp16 loses \d+\.\d\d points of F1 against fp32 .* more than 0.1"):
        write_fp16(reference, open_bundle(tiny.bundle()), out, device="cpu")
    with pytest.raises(GateError, match="its logits differ from PyTorch by up to"):
        write_fp16(reference, open_bundle(tiny.bundle()), out, device="cpu", max_f1_drop=100)
    assert not out.exists()


def test_without_any_question_nothing_is_compared_or_written(reference, tiny, tiny_export, tmp_path):
    nothing = replace(
        reference,
        run=replace(reference.run, checkpoint=tmp_path / "unknown"),
        held_out=replace(reference.held_out, examples=()),
    )
    out = tmp_path / "none"
    with pytest.raises(
        InputError, match="none: there is no question to compare fp16 with fp32 on: give --eval-data FILE"
    ):
        write_fp16(nothing, open_bundle(tiny.bundle()), out, device="cpu")
    assert not out.exists()


def test_judging_takes_the_held_out_questions_first_and_no_question_twice(reference):
    some, every = judging_questions(reference, 20), judging_questions(reference, 1000)
    assert tuple(some[:6]) == tuple(every[:6]) == reference.examples
    assert (len(some), len(every)) == (20, 96)
    assert len({(e.question, e.context) for e in every}) == 96
    assert tuple(judging_questions(reference, 3)) == reference.examples


def test_export_for_cuda_without_one_says_so_and_measures_on_the_cpu(tiny, tmp_path):
    out = tmp_path / "keepers"
    done = CliRunner().invoke(main, ["export", str(tiny.run), "--out", str(out), "--device", "cuda", "--no-optimize"])
    assert done.exit_code == 0, done.output
    assert "so the fp16 bundle is judged on the CPU" in done.output
    made = open_bundle(tmp_path / "keepers-fp16").manifest["made"]
    assert (made["from"], made["measured_on"]) == ("keepers", "cpu")
    assert newest_bundle(tmp_path).name == "keepers"  # a bundle for GPUs is chosen only by name
    assert "keepers-fp16" in done.output
