"""The answerer and the sessions under it: equal to PyTorch, and equal to itself in every call form."""

from __future__ import annotations

import itertools
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from qadeploy import Answer, Answerer
from qadeploy.core.decoding import WindowLogits, decode
from qadeploy.core.settings import Options
from qadeploy.errors import BundleError, TooManyWindowsError
from qadeploy.inference import session
from qadeploy.inference.bundle import open_bundle
from qadeploy.inference.pairs import to_answers
from qadeploy.inference.session import OnnxModel
from qadeploy.inference.trace import candidates
from qadeploy.records import Logits, Window
from qadeploy.training.checkpoint import load_checkpoint, torch_answerer
from tests.conftest import sealed_copy, triplets
from tests.processes_for_tests import succeeded

PAIRS = [(str(row["question"]), str(row["context"])) for row in triplets(24)]
GOLD = [str(row["answer"]) for row in triplets(24)]
LONG = " ".join(context for _, context in PAIRS)  # several windows at any size that this model accepts
MIXED = [*PAIRS, ("Who keeps the kettle?", LONG), ("Who keeps the rope?", LONG)]
FAMILY = "\U0001f469\u200d\U0001f469\u200d\U0001f467"
SCRIPTS = [
    "Zoe\u0308 keeps the \u00e5ngstr\u00f6m lamp; na\u00efve caf\u00e9.",
    f"{FAMILY} keeps the bell \U0001f514 in room 3.",
    "\u8c01\u4fdd\u7ba1\u949f\uff1f\u827e\u8fbe\u4fdd\u7ba1\u949f\u3002",
    "\u0622\u062f\u0627 \u062a\u062d\u062a\u0641\u0638 \u0628\u0627\u0644\u062c\u0631\u0633 3.",
    "  \u00a0Ada\u2003keeps\tthe\r\n bell.  ",
    "\u0130stanbul: \u1e9e keeps \ufb01ve bells.",
]
THREADS = 2  # of the answerer


@pytest.fixture(scope="module")
def by_torch(tiny) -> Answerer:
    return torch_answerer(load_checkpoint(tiny.run / "checkpoint"))


def same(left: list[list[Answer]], right: list[list[Answer]], tolerance: float = 1e-5) -> bool:
    """The same spans in the same order, with scores that differ by float rounding at most."""
    spans = [[(a.text, a.start, a.end) for a in answers] for answers in left]
    if spans != [[(a.text, a.start, a.end) for a in answers] for answers in right]:
        return False
    scores = [[a.score for answers in side for a in answers] for side in (left, right)]
    return bool(np.allclose(*scores, atol=tolerance))


def run_script(tmp_path: Path, script: str, *args: object, seconds: int = 120) -> None:
    path = tmp_path / "script.py"
    path.write_text(script)
    command = [sys.executable, str(path), *(str(a) for a in args)]
    succeeded(command, timeout=seconds)


# ---------------------------------------------------------------- answers


def test_every_call_form_gives_the_answers_of_pytorch(answerer, by_torch):
    batch = answerer.answer_batch(MIXED, top_k=3)
    assert [found[0].text for found in batch[: len(GOLD)]] == GOLD
    assert len(answerer.read(*MIXED[-1], Options()).windows) > 2
    assert same(batch, [answerer.answer(q, c, top_k=3) for q, c in MIXED])
    assert same(batch, list(answerer.answer_stream(MIXED, top_k=3)))
    assert same(batch, by_torch.answer_batch(MIXED, top_k=3), 1e-4)


def test_one_thread_answers_like_two(answerer, bundle):
    one = Answerer.load(bundle, device="cpu", threads=1)
    assert same(one.answer_batch(MIXED, top_k=2), answerer.answer_batch(MIXED, top_k=2))


@pytest.mark.parametrize("options", [Options(top_k=3), Options(max_seq_len=40, doc_stride=8, allow_no_answer=True)])
def test_encoding_running_and_decoding_step_by_step_gives_the_same(answerer, options):
    for question, context in MIXED[-3:]:
        pair = answerer.encode(question, context, options)
        logits = [answerer.model.run([window])[0] for window in pair.windows]
        steps, whole = answerer.decode(pair, logits, options), answerer.read(question, context, options)
        assert same([to_answers(steps, options)], [to_answers(whole, options)])
        assert len(steps.windows) == len(whole.windows)
    count = len(pair.windows)
    with pytest.raises(TooManyWindowsError, match=f"makes {count} windows"):
        answerer.encode(question, context, options, max_windows=count - 1)
    assert len(answerer.encode(question, context, options, max_windows=count).windows) == count


def test_order_is_kept_where_lengths_differ_much(answerer):
    pairs = [(q, c) if i % 3 else (q, f"{LONG} {c}") for i, (q, c) in enumerate(PAIRS)]
    assert same(answerer.answer_batch(pairs), [answerer.answer(q, c) for q, c in pairs])


def test_the_stream_is_lazy_and_takes_what_it_needs_of_an_endless_generator(answerer):
    taken = 0

    def endless():
        nonlocal taken
        for pair in itertools.cycle(PAIRS):
            taken += 1
            yield pair

    stream = answerer.answer_stream(endless())
    assert taken == 0
    found = [answers[0].text for answers in itertools.islice(stream, 70)]
    assert found == list(itertools.islice(itertools.cycle(GOLD), 70))
    assert taken <= 70 + 64


def test_an_empty_batch_and_an_empty_run(answerer):
    assert answerer.answer_batch([]) == []
    assert answerer.model.run([]) == []


def test_options_of_one_call_do_not_change_the_next(answerer):
    question, context = MIXED[-1]
    before = answerer.answer(question, context)
    lengths = {"max_answer_len": 1, "max_seq_len": 40, "doc_stride": 9}
    short = answerer.answer(question, context, top_k=4, **lengths, align_to_words=True, allow_no_answer=True)
    assert len(short) == 4
    assert answerer.answer(question, context) == before


def test_top_k_ranks_distinct_spans_and_does_not_move_scores(answerer):
    five = answerer.answer(*PAIRS[0], top_k=5)
    assert len({(a.start, a.end) for a in five}) == 5
    scores = [a.score for a in five]
    assert scores == sorted(scores, reverse=True)
    assert 0 < sum(scores) <= 1 + 1e-6
    assert answerer.answer(*PAIRS[0], top_k=2) == five[:2]
    every = answerer.answer(*PAIRS[0], top_k=10_000)
    assert every[:5] == five
    assert sum(a.score for a in every) == pytest.approx(1, abs=1e-4)


def test_max_answer_len_bounds_the_tokens_of_an_answer(answerer):
    context = answerer.encoder.encode(PAIRS[0][1])
    for limit in (1, 3):
        lengths = []
        for found in answerer.answer(*PAIRS[0], top_k=10_000, max_answer_len=limit):
            first, last = context.tokens_of(found.start, found.end)
            lengths.append(last - first + 1)
        assert max(lengths) == limit


def test_align_to_words_widens_to_word_borders(answerer):
    question, context = "Who keeps the lamps?", "Adaline keeps Cora-lamps, Belamina oboats."

    def cuts_a_word(a: Answer) -> bool:
        borders = (context[a.start - 1 : a.start + 1], context[a.end - 1 : a.end + 1])
        return any(len(two) == 2 and two.isalnum() for two in borders)

    free = answerer.answer(question, context, top_k=10_000)
    aligned = answerer.answer(question, context, top_k=10_000, align_to_words=True)
    assert any(cuts_a_word(a) for a in free)
    assert aligned
    assert not any(cuts_a_word(a) for a in aligned)


def test_the_trace_of_aligned_answers_names_the_best_one(answerer):
    options = Options(align_to_words=True, max_answer_len=1)  # one token: most answers are only a part of a word before
    context = "Adaline keeps Cora-lamps, Belamina oboats."
    reading = answerer.read("Who keeps the lamps?", context, options)
    (best,) = to_answers(reading, options)
    named = [each["text"] for each in candidates(reading, options) if each["answer"] == 1]
    assert named == [best.text]
    assert best.text != answerer.answer("Who keeps the lamps?", context, max_answer_len=1)[0].text


def test_no_answer_competes_only_where_it_is_allowed(answerer):
    free = answerer.answer(*PAIRS[0], top_k=10_000)
    competing = answerer.answer(*PAIRS[0], top_k=10_000, allow_no_answer=True)
    null = [a for a in competing if not a.text]
    assert all(a.text for a in free)
    assert [(a.start, a.end) for a in null] == [(0, 0)]
    reading = answerer.read(*PAIRS[0], Options(allow_no_answer=True))
    best = reading.decoded.spans[0]
    odds = np.exp((reading.decoded.null_logit - best.logit) / answerer.settings.temperature)
    assert null[0].score == pytest.approx(odds * competing[0].score, rel=1e-4)
    assert sum(a.score for a in competing) == pytest.approx(1, abs=1e-4)


def with_settings(bundle: Path, folder: Path, **changes: object) -> Answerer:
    stored = {**open_bundle(bundle).manifest["settings"], **changes}
    return Answerer.load(sealed_copy(bundle, folder, settings=stored), device="cpu", threads=1)


def test_the_stored_threshold_decides_about_the_null_answer(answerer, bundle, tmp_path):
    decoded = [answerer.read(q, c, Options(allow_no_answer=True)).decoded for q, c in PAIRS]
    differences = sorted(d.null_difference for d in decoded)
    threshold = (differences[9] + differences[10]) / 2
    unsure = with_settings(bundle, tmp_path / "unsure", null_threshold=threshold)
    found = unsure.answer_batch(PAIRS, top_k=2, allow_no_answer=True)
    assert [not a[0].text for a in found] == [d.null_difference > threshold for d in decoded]
    assert sum(not a[0].text for a in found) == len(PAIRS) - 10
    by_torch = torch_answerer(
        replace(load_checkpoint(answerer.bundle.manifest["source"]["checkpoint"]), settings=unsure.settings)
    )
    assert same(found, by_torch.answer_batch(PAIRS, top_k=2, allow_no_answer=True), 1e-4)
    assert same(unsure.answer_batch(PAIRS, allow_no_answer=False), answerer.answer_batch(PAIRS))
    # A model with a threshold may.
    assert unsure.answer_batch(PAIRS) == unsure.answer_batch(PAIRS, allow_no_answer=True)


def test_the_stored_temperature_sharpens_scores_and_moves_no_answer(answerer, bundle, tmp_path):
    t = answerer.settings.temperature
    sharp = with_settings(bundle, tmp_path / "sharp", temperature=t / 2)
    every = answerer.answer(*PAIRS[0], top_k=10_000)
    found = sharp.answer(*PAIRS[0], top_k=10_000)
    assert [(a.start, a.end) for a in found] == [(a.start, a.end) for a in every]
    total = sum(a.score**2 for a in every)
    assert [a.score for a in found] == pytest.approx([a.score**2 / total for a in every], rel=1e-3)


def test_a_bundle_from_before_thresholds_and_temperatures_loads(answerer, bundle, tmp_path):
    stored = {k: v for k, v in answerer.settings.to_dict().items() if k not in {"null_threshold", "temperature"}}
    old = Answerer.load(sealed_copy(bundle, tmp_path / "old", settings=stored, null_threshold=None), device="cpu")
    assert (old.settings.null_threshold, old.settings.temperature) == (None, 1.0)
    assert old.answer(*PAIRS[0])[0].text == GOLD[0]


def test_a_context_that_fits_is_one_window_whatever_the_lengths(answerer):
    question, context = PAIRS[5]
    wanted = answerer.answer(question, context, top_k=3)
    size = len(answerer.read(question, context, Options()).windows[0])
    for options in ({"max_seq_len": size}, {"max_seq_len": size, "doc_stride": 0}, {"doc_stride": 7}):
        assert answerer.answer(question, context, top_k=3, **options) == wanted


def test_several_windows_answer_as_the_best_of_each_alone(answerer):
    options = Options(max_seq_len=40, doc_stride=12)
    reading = answerer.read(*MIXED[-1], options)
    assert len(reading.windows) > 8
    alone = []
    for window, (starts, ends) in zip(reading.windows, reading.logits, strict=True):
        own_starts, own_ends = answerer.model.run([window])[0]
        np.testing.assert_allclose(own_starts, starts, atol=1e-5)
        np.testing.assert_allclose(own_ends, ends, atol=1e-5)
        own = WindowLogits([window], [own_starts], [own_ends], reading.context)
        alone.append(decode(own, max_answer_len=40).spans[0])
    best = max(alone, key=lambda span: span.logit)
    assert (reading.decoded.spans[0].start, reading.decoded.spans[0].end) == (best.start, best.end)
    assert reading.decoded.spans[0].logit == pytest.approx(best.logit, abs=1e-5)


@pytest.mark.parametrize("context", SCRIPTS)
@pytest.mark.parametrize("align", [False, True])
def test_offsets_are_code_points_in_every_script(answerer, context, align):
    found = answerer.answer(
        "Who keeps the bell?", context, top_k=50, align_to_words=align, max_seq_len=24, doc_stride=3
    )
    assert found
    for a in found:
        assert a.text == context[a.start : a.end] == a.text.strip() != ""


def test_padded_batches_give_the_logits_of_single_runs(answerer):
    windows = [
        w for q, c in MIXED for size in (36, 64, 160) for w in answerer.read(q, c, Options(1, None, size, 12)).windows
    ]
    assert len({len(w) for w in windows}) > 4
    for alone, padded in zip(answerer.model.run(windows), answerer.model.run_batch(windows), strict=True):
        for left, right in zip(alone, padded, strict=True):
            assert left.dtype == right.dtype == np.float32
            np.testing.assert_allclose(left, right, atol=1e-5)


def windows_of(answerer: Answerer, max_seq_len: int = 64) -> list[Window]:
    return [w for q, c in MIXED for w in answerer.read(q, c, Options(1, None, max_seq_len, 12)).windows]


def same_logits(left: list[Logits], right: list[Logits]) -> None:
    for ours, theirs in zip(left, right, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)


def crafted(
    factor: float, outputs: tuple[str, str] = ("start_logits", "end_logits"), ints: int = TensorProto.INT64
) -> bytes:
    """A model without attention_mask whose logits are its ids times ``factor``; ``ints`` is the type of its inputs."""
    shape = ["batch", "sequence"]
    inputs = [helper.make_tensor_value_info(n, ints, shape) for n in ("input_ids", "token_type_ids")]
    floats = [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n in outputs]
    nodes = [helper.make_node("Cast", ["input_ids"], ["ids"], to=TensorProto.FLOAT)]
    nodes += [helper.make_node("Mul", ["ids", "factor"], [name]) for name in outputs]
    weights = [numpy_helper.from_array(np.float32([factor]), "factor")]
    graph = helper.make_graph(nodes, "crafted", inputs, floats, weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10).SerializeToString()


@pytest.mark.parametrize("ints", [TensorProto.INT64, TensorProto.INT32])
def test_a_model_without_a_mask_never_sees_padding(answerer, sessions, ints):
    model = OnnxModel(lambda: crafted(2.0, ints=ints), device="cpu", threads=2, pad_token_id=7)
    windows = windows_of(answerer)
    assert len({len(w) for w in windows}) > 4
    expected = [(2.0 * w.input_ids.astype(np.float32),) * 2 for w in windows]
    for run in (model.run, lambda given: model.start(given).result(), model.run_batch):
        sessions.begun.clear()
        same_logits(run(windows), expected)
        seen = [row.tolist() for begun in sessions.begun for row in begun.inputs["input_ids"]]
        assert sorted(seen) == sorted(w.input_ids.tolist() for w in windows)
    assert len(sessions.begun) == len({len(w) for w in windows})


def test_inputs_of_another_type_are_refused():
    with pytest.raises(BundleError, match="not those of a question-answering model"):
        OnnxModel(lambda: crafted(1.0, ints=TensorProto.INT8), device="cpu")


@pytest.mark.parametrize("one", [None, "wide", "narrow"])
def test_every_layout_gives_the_logits_of_one_thread(answerer, bundle, tmp_path, sessions, one):
    manifest = {"session": {"layout": {"one": one}, "config": {"session.intra_op.allow_spinning": "0"}}}
    model = Answerer.load(sealed_copy(bundle, tmp_path / "copy", **manifest), device="cpu", threads=2).model
    expected = Answerer.load(bundle, device="cpu", threads=1).model.run(windows_of(answerer))

    def wide() -> int:
        return sum(run.threads == 2 for run in sessions.begun)

    for count in (1, 2, 3):
        sessions.begun.clear()
        same_logits(model.run(windows_of(answerer)[:count]), expected[:count])
        assert (wide(), len(sessions.begun)) == ({None: count % 2, "wide": count, "narrow": 0}[one], count)
    sessions.begun.clear()
    same_logits(model.start(windows_of(answerer)).result(), expected)
    assert (wide(), len(sessions.begun)) == (0, len(expected))


def test_only_many_questions_keep_one_copy_of_the_weights(answerer, bundle, sessions):
    model = Answerer.load(bundle, device="cpu", threads=2).model
    wide = weakref.ref(sessions.created.pop())
    windows = windows_of(answerer)
    expected = model.start(windows).result()
    assert wide() is None
    same_logits(model.run(windows[:1]), expected[:1])
    same_logits(model.start(windows).result(), expected)
    assert [each.get_session_options().intra_op_num_threads for each in sessions.created] == [1, 2]


def test_a_session_does_not_keep_the_bytes_of_its_model():
    data = crafted(1.0)
    before = sys.getrefcount(data)
    model = OnnxModel(lambda: data, device="cpu", threads=2)
    model.start([Window(np.arange(8), np.zeros(8, dtype=np.int64), 0, 0, 0, 0)]).result()
    assert sys.getrefcount(data) == before


def test_a_single_question_keeps_its_session_beside_many(answerer, bundle, sessions):
    model = Answerer.load(bundle, device="cpu", threads=2).model
    windows = windows_of(answerer)
    for run in (lambda: model.run(windows[:1]), lambda: model.start(windows).result()) * 2:
        run()
    assert [each.get_session_options().intra_op_num_threads for each in sessions.created] == [2, 1]


def test_session_entries_of_the_bundle_reach_onnx_runtime(bundle, tmp_path, sessions):
    entry = {"session.set_denormal_as_zero": "1"}
    Answerer.load(sealed_copy(bundle, tmp_path / "copy", session={"config": entry}), device="cpu")
    options = sessions.created[-1].get_session_options()
    assert options.get_session_config_entry("session.set_denormal_as_zero") == "1"


def test_a_bundle_cannot_have_onnx_runtime_write_a_file(bundle, tmp_path):
    target = tmp_path / "written"
    session = {"config": {"session.collect_node_memory_stats_to_file": str(target)}}
    copy = sealed_copy(bundle, tmp_path / "wrong", session=session)
    for opening in (open_bundle, lambda folder: Answerer.load(folder, device="cpu")):
        with pytest.raises(BundleError, match=r"collect_node_memory_stats_to_file.*which qadeploy does not pass on"):
            opening(copy)
    assert not target.exists()


def test_windows_that_were_begun_can_be_dropped(bundle, sessions, monkeypatch):
    monkeypatch.setattr(session, "LARGE", 1)  # every call
    model = Answerer.load(bundle, device="cpu", threads=2).model
    windows = [Window(np.arange(24), np.zeros(24, dtype=np.int64), 0, 0, 0, 0)] * 1000
    pending = model.start(windows)
    pending.cancel()
    pending.cancel()
    same_logits(model.run(windows[:4]), model.start(windows[:4]).result())
    assert len(sessions.begun) < len(windows)
    assert sessions.shrink_after(lambda: model.run(windows[:4]))  # no call counts as running


def squares() -> bytes:
    """A model that makes a table of tokens times tokens of each window: 64 MB for 4,000 tokens."""
    shape = ["batch", "sequence"]
    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, shape)
    outputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n in ("start_logits", "end_logits")]
    axes = [numpy_helper.from_array(np.int64([i]), f"axis{i}") for i in (1, 2)]
    nodes = [
        helper.make_node("Cast", ["input_ids"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["floats", "axis1"], ["row"]),
        helper.make_node("Unsqueeze", ["floats", "axis2"], ["column"]),
        helper.make_node("Mul", ["row", "column"], ["table"]),
        helper.make_node("ReduceMax", ["table"], ["start_logits"], axes=[2], keepdims=0),
        helper.make_node("ReduceMin", ["table"], ["end_logits"], axes=[2], keepdims=0),
    ]
    graph = helper.make_graph(nodes, "squares", [ids], outputs, axes)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10).SerializeToString()


MEMORY = """
import sys
import numpy as np
from qadeploy.records import Window
from qadeploy.inference import session
from qadeploy.inference.session import OnnxModel, Pending

def resident():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmRSS"))

def window(tokens):
    return Window(np.arange(tokens), None, 0, tokens, 0, 0)

def grown(large):
    session.LARGE = large
    with open(sys.argv[1], "rb") as file:
        data = file.read()
    model = OnnxModel(lambda: data, device="cpu", threads=2)
    model.run([window(8)] * 4)
    before = resident()
    large = model.run([window(4000)] * 3)
    assert large[0][0][-1] == 3999.0 ** 2, large
    model.start([window(4000)] * 3).result()
    return resident() - before

usual = session.LARGE
kept, given_back = grown(10**12), grown(usual)
print(f"{kept:.0f} MB kept, {given_back:.0f} MB after giving back")
sys.exit(0 if kept > 100 and given_back < kept / 4 else f"{kept:.0f} MB kept, {given_back:.0f} MB after giving back")
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="memory is read from /proc")
def test_memory_taken_by_large_inputs_is_given_back(tmp_path):
    (tmp_path / "model.onnx").write_bytes(squares())
    run_script(tmp_path, MEMORY, tmp_path / "model.onnx")
