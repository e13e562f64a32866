"""The span head against the decoder: on random logits, on real windows of four families, through the command line."""

from __future__ import annotations

import json
import shutil
from contextlib import chdir
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto

from qadeploy import Answerer
from qadeploy.cli import main
from qadeploy.core.settings import QaSettings
from qadeploy.core.windows import CONTEXT_MASK, context_mask
from qadeploy.data.loading import read
from qadeploy.errors import BundleError, FailureError, GateError, InputError
from qadeploy.export.fp16 import to_fp16
from qadeploy.inference.bundle import MODEL, newest_bundle, open_bundle
from qadeploy.inference.graph_model import GraphModel
from qadeploy.integrations.onnx_standalone.in_graph import compare_spans, cut_windows, spans_in_graph, strings_in_graph
from qadeploy.integrations.onnx_standalone.span_head import OUTPUTS, SpanHead, add_span_head
from qadeploy.records import Example, FloatArray, IntArray
from tests.conftest import sealed_copy
from tests.models_for_tests import BY_NAME, bare_model, exported_model
from tests.tokenizers_for_tests import NAMES, encoder, family, texts, thorough

INF = np.float32(np.inf)


def logits_model(head: SpanHead) -> GraphModel:
    """A head behind logits that are inputs: what the mask, the band and the ranking do, without a model."""
    return GraphModel(add_span_head(bare_model(), head))


def brute_force(
    starts: FloatArray, ends: FloatArray, mask: IntArray, head: SpanHead
) -> tuple[list[tuple[int, int, np.float32]], float]:
    """Every valid span of a window, best first (ties: earlier, then shorter), and the log of the sum of their weights."""
    spans = [
        (i, j, starts[i] + ends[j])
        for i in np.flatnonzero(mask)
        for j in np.flatnonzero(mask)
        if i <= j < i + head.max_answer_len
    ]
    spans.sort(key=lambda span: (-span[2], span[0], span[1]))
    weights = np.asarray([float(span[2]) / head.temperature for span in spans])
    return spans, float(np.logaddexp.reduce(weights)) if spans else -np.inf


def run(model: GraphModel, starts: FloatArray, ends: FloatArray, mask: IntArray) -> dict[str, np.ndarray]:
    ids = np.zeros(starts.shape, np.int64)
    return model.run({"input_ids": ids, "logits": np.stack([starts, ends], axis=-1), CONTEXT_MASK: mask})


@thorough
@given(data=st.data())
def test_the_head_equals_a_loop_over_all_spans(data):
    """Any mask, with holes too, any width, ties, more slots than spans, several windows at once."""
    head = SpanHead(
        data.draw(st.sampled_from((1, 3, 40))),
        data.draw(st.integers(1, 9)),
        data.draw(st.sampled_from((0.5, 1.0, 2.0))),
        data.draw(st.sampled_from((0, -1))),
    )
    batch, tokens = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 12))
    rng = np.random.default_rng(data.draw(st.integers(0, 9999)))
    shape = (batch, tokens)
    if data.draw(st.booleans(), "ties"):
        starts, ends = (rng.integers(-1, 2, shape).astype(np.float32) for _ in range(2))
    else:
        starts, ends = (rng.normal(0, 5, shape).astype(np.float32) for _ in range(2))
    mask = (rng.random(shape) < data.draw(st.sampled_from((0.0, 0.4, 1.0)), "share")).astype(np.int64)
    out = run(logits_model(head), starts, ends, mask)
    for i in range(batch):
        spans, log_sum = brute_force(starts[i], ends[i], mask[i], head)
        best = spans[: head.top_k]
        empty = head.top_k - len(best)
        assert out["span_starts"][i].tolist() == [s[0] for s in best] + [-1] * empty
        assert out["span_ends"][i].tolist() == [s[1] for s in best] + [-1] * empty
        assert out["span_scores"][i].tolist() == [s[2] for s in best] + [-INF] * empty
        assert out["log_sum"][i, 0] == pytest.approx(log_sum, rel=1e-5, abs=1e-5)
        null = head.null_index % tokens
        assert out["null_scores"][i, 0] == starts[i, null] + ends[i, null]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_broken_logits_show_in_log_sum(bad):
    head = SpanHead(3, 4, 1.0, 0)
    starts, mask = np.zeros((2, 6), np.float32), np.ones((2, 6), np.int64)
    starts[0, 2] = bad
    out = run(logits_model(head), starts, np.zeros((2, 6), np.float32), mask)
    assert np.isnan(out["log_sum"][0, 0])
    assert np.isfinite(out["log_sum"][1, 0])
    mask[0, 2] = 0  # nobody asks for it
    assert np.isfinite(run(logits_model(head), starts, np.zeros((2, 6), np.float32), mask)["log_sum"]).all()


@pytest.mark.parametrize("name", NAMES)
@thorough
@given(text=texts(12, 1))
def test_the_mask_is_where_a_span_may_begin(name, text):
    kind = encoder(name)
    question, context = kind.encode("Who?"), kind.encode(text)
    for window in kind.windows(question, context, max_seq_len=len(question) + kind.special_tokens + 9, doc_stride=3):
        mask = context_mask(window, context)
        begin = window.context_begin
        assert not mask[:begin].any()
        assert not mask[begin + window.context_length :].any()
        for i in range(window.context_length):
            cover = text[slice(*context.offsets[window.context_offset + i])]
            assert bool(mask[begin + i]) == bool(cover.strip())


@pytest.mark.parametrize("name", NAMES)
def test_the_null_position_is_the_decoders(name):
    """XLNet's CLS is last, so its position is counted from the window's end."""
    kind = encoder(name)
    head = SpanHead.of(kind, QaSettings())
    windows = kind.windows(kind.encode("Who?"), kind.encode("Ada keeps it."), max_seq_len=64, doc_stride=0)
    assert all(head.null_index % len(w) == w.null_index for w in windows)
    assert (head.null_index < 0) == (name == "xlnet")


def test_padding_moves_a_null_position_that_is_counted_from_the_end():
    head = SpanHead(1, 4, 1.0, -1)
    model = GraphModel(add_span_head(bare_model(mask=True), head))
    logits = np.arange(10, dtype=np.float32).reshape(1, 5, 2)
    mask = np.array([[1, 1, 1, 0, 0]])
    feeds = {"input_ids": np.zeros((1, 5), np.int64), "logits": logits, "attention_mask": mask, CONTEXT_MASK: mask}
    assert model.run(feeds)["null_scores"].tolist() == [[4 + 5]]


# ---------------------------------------------------------------- real models and windows


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("name", ["BERT", "RoBERTa", "DistilBERT", "ALBERT"])
def test_the_head_equals_the_decoder_on_real_windows_of_four_families(name, relative):
    made = exported_model(BY_NAME[name])
    head = SpanHead.of(made.encoder, replace(made.settings, relative_to_null=relative))
    assert head.to_dict()["relative_to_null"] is relative
    cuts = list(cut_windows(made.encoder, made.settings, read("handbook").examples[::100]))
    proof = compare_spans(GraphModel(add_span_head(made.model, head)), head, cuts, made.encoder.config.pad_token_id)
    assert proof.windows >= 2 * len(cuts) >= 40  # alone and padded
    assert proof.spans > 0.9 * proof.windows * head.top_k  # spans of the same text count once
    assert proof.different == 0
    assert proof.score_difference < 1e-5


def test_a_difference_is_found(monkeypatch):
    made = exported_model(BY_NAME["BERT"])
    head = SpanHead.of(made.encoder, made.settings)
    cuts = list(cut_windows(made.encoder, made.settings, read("handbook").examples[::200]))
    model = GraphModel(add_span_head(made.model, replace(head, max_answer_len=head.max_answer_len - 1)))
    assert compare_spans(model, head, cuts, 0).different > 0
    model = GraphModel(add_span_head(made.model, replace(head, null_index=1)))
    assert compare_spans(model, head, cuts, 0).different == 2 * len(cuts)


@pytest.mark.parametrize("kind", ["", "fused", "int8", "fp16"])
def test_bundles_of_every_kind_take_a_head(kind, tiny, tiny_export, tmp_path):
    source = open_bundle(tiny.bundle("" if kind == "fp16" else kind))
    if kind == "fp16":
        fp16 = to_fp16(source.read(MODEL), source.manifest["architecture"])
        source = open_bundle(sealed_copy(source.folder, tmp_path / "fp16", fp16.model, precision="fp16"))
    made = spans_in_graph(source, tmp_path / "mine", read(str(tiny.data)).examples[:12], top_k=7)
    manifest = made.manifest
    assert manifest["outputs"] == ["start_logits", "end_logits", *OUTPUTS]
    assert manifest["inputs"] == [*source.manifest["inputs"], CONTEXT_MASK]
    assert manifest["made"]["from"] == source.name
    assert manifest["made"]["proof"]["different"] == 0
    assert manifest["in_graph"]["k"] == 7
    assert made.in_graph == "spans"
    proto = onnx.load_model_from_string(made.read(MODEL))
    if kind != "fused":  # whose domain ONNX Runtime's optimizer leaves out of the imports
        onnx.checker.check_model(proto)
    with pytest.raises(BundleError, match=rf"mine: its graph answers by itself .* load .*, {source.name}$"):
        Answerer.load(made.folder)
    with pytest.raises(FailureError, match=rf"mine: has its spans in the graph already: .*, {source.name}$"):
        spans_in_graph(made, tmp_path / "again", [])


# ---------------------------------------------------------------- what is refused


def test_a_head_that_differs_is_not_written(bundle, tiny, tmp_path, monkeypatch):
    broken = SpanHead.of
    monkeypatch.setattr(SpanHead, "of", lambda *a: replace(broken(*a), null_index=2))
    monkeypatch.setattr(
        "qadeploy.integrations.onnx_standalone.in_graph.add_span_head",
        lambda m, h: add_span_head(m, replace(h, null_index=1)),
    )
    with pytest.raises(GateError, match=r"mine: the spans of the graph differ .* on \d+ of \d+ windows"):
        spans_in_graph(open_bundle(bundle), tmp_path / "mine", read(str(tiny.data)).examples[:3])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"opset": 14}, "opset 14, the span head needs 15"),
        ({"kind": TensorProto.FLOAT16}, "logits are not float32"),
        ({"outputs": ("left", "right")}, "outputs left, right: a span head goes behind"),
    ],
)
def test_models_that_take_no_head_are_named(change, message):
    with pytest.raises(FailureError, match=message):
        add_span_head(bare_model(**change), SpanHead(1, 5, 1.0, 0))


def test_a_top_k_below_one_is_refused():
    with pytest.raises(InputError, match="span-top-k 0 is below 1"):
        SpanHead.of(family("bert").encoder, QaSettings(), 0)


def test_without_a_window_to_compare_nothing_is_written(bundle, tmp_path):
    long = Example("a", "who keeps it and why, " * 60, "Ada.")  # fills every window
    for make in (spans_in_graph, strings_in_graph):
        with pytest.raises(InputError, match=r"mine: none of the questions can be asked.*--eval-data FILE"):
            make(open_bundle(bundle), tmp_path / "mine", [] if make is strings_in_graph else [long])
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- the command line


def invoke(*args: object) -> tuple[int, str]:
    result = CliRunner().invoke(main, ["export", *(str(a) for a in args)])
    return result.exit_code, result.output


def test_export_puts_a_head_on_every_bundle_of_a_run_but_the_fused(tiny, tmp_path):
    place = tmp_path / "bundles" / "mine"
    with chdir(tmp_path):
        code, output = invoke(tiny.run, "--out", place, "--spans-in-graph", "--span-top-k", "3", "--json")
    assert code == 0, output
    made = sorted(p.name for p in place.parent.iterdir())
    assert made == ["mine", "mine-fused", "mine-spans"]
    assert open_bundle(place.with_name("mine-spans")).manifest["in_graph"]["k"] == 3
    assert "mine-spans: 3 spans per window from the graph itself" in output
    assert newest_bundle(place.parent) == place


def test_export_of_a_bundle_makes_the_further_one_only(bundle, tiny, tmp_path):
    mine = tmp_path / "mine"
    shutil.copytree(bundle, mine)
    code, output = invoke(mine, "--spans-in-graph", "--eval-data", tiny.data, "--json")
    assert code == 0, output
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "mine-spans"]
    listed = json.loads(output[output.index("{") :])["bundles"]
    assert list(listed) == [str(tmp_path / "mine-spans")]
    assert "decoder's on all" in output


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "is a bundle, which allows only --spans-in-graph, --text-in-graph, --web and --triton"),
        (("--spans-in-graph", "--span-top-k", "0"), "0 is not in the range x>=1"),
    ],
)
def test_export_of_a_bundle_says_what_it_needs(args, message, bundle, tmp_path):
    code, output = invoke(bundle, *args, "--out", tmp_path / "x")
    assert (code, message in output) == (2, True), output
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_is_taken_is_named_before_any_work(bundle, tmp_path):
    taken: Path = tmp_path / "mine-spans"
    taken.mkdir()
    (taken / "notes").write_text("mine")
    code, output = invoke(bundle, "--spans-in-graph", "--out", tmp_path / "mine")
    assert code == 2, output
    assert "mine-spans: exists and is not a bundle" in output
