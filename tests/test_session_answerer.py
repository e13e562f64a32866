"""The answerer and the sessions under it: equal to PyTorch, equal to itself in every call form, and safe to share."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from qadeploy import Answer, Answerer
from qadeploy.core.decoding import WindowLogits, decode_many
from qadeploy.core.settings import Options
from qadeploy.errors import (
    BundleError,
    DataError,
    DeviceError,
    InputError,
    LogitsError,
    QuestionTooLongError,
    StrideError,
    TooManyWindowsError,
)
from qadeploy.inference import session
from qadeploy.inference.answerer import to_answers
from qadeploy.inference.bundle import open_bundle
from qadeploy.inference.session import OnnxModel, Pending
from qadeploy.records import Example, Logits, Window
from qadeploy.training.checkpoint import load_checkpoint, torch_answerer
from tests.conftest import NAMES, THINGS, sealed_copy, triplets
from tests.sessions_for_tests import Sessions

PAIRS = [(str(row["question"]), str(row["context"])) for row in triplets(24)]
GOLD = [str(row["answer"]) for row in triplets(24)]
LONG = " ".join(context for _, context in PAIRS)  # several windows of any size this model takes
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


@pytest.fixture(scope="module")
def answerer(bundle: Path) -> Answerer:
    return Answerer.load(bundle, device="cpu", threads=2)


@pytest.fixture
def sessions(monkeypatch: pytest.MonkeyPatch) -> Iterator[Sessions]:
    """The sessions that are created in a test."""
    watched = Sessions(monkeypatch)
    yield watched
    watched.release()


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
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


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
    short = answerer.answer(
        question,
        context,
        top_k=4,
        max_answer_len=1,
        max_seq_len=40,
        doc_stride=9,
        align_to_words=True,
        allow_no_answer=True,
    )
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
    assert unsure.answer_batch(PAIRS) == unsure.answer_batch(
        PAIRS, allow_no_answer=True
    )  # a model with a threshold may


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
        alone.append(
            decode_many([WindowLogits([window], [own_starts], [own_ends], reading.context)], max_answer_len=40)[
                0
            ].spans[0]
        )
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


# ---------------------------------------------------------------- contexts that are kept, and streams


def test_twenty_questions_on_one_document_tokenise_it_once(bundle, monkeypatch):
    document = " ".join(LONG for _ in range(20))[:20_000]
    asked = [(f"Who keeps the {thing} of {name}?", document) for thing in THINGS[:4] for name in NAMES[:5]]
    loaded, seen = Answerer.load(bundle, device="cpu", threads=2), []
    encode = loaded.encoder.encode
    monkeypatch.setattr(loaded.encoder, "encode", lambda text: seen.append(text) or encode(text))
    with_cache = Answerer(loaded.encoder, loaded.settings, loaded.model)
    alone = [with_cache.answer(*pair) for pair in asked]
    assert same(alone, with_cache.answer_batch(asked))
    assert seen.count(document) == 1
    stats = with_cache.stats()
    assert (stats.misses, stats.hits, stats.entries) == (1, 39, 1)
    assert stats.bytes == with_cache.encoder.encode(document).nbytes
    without = Answerer.load(bundle, device="cpu", threads=2, context_cache_bytes=0)
    assert same([without.answer(*pair) for pair in asked[:2]], alone[:2])
    assert (without.stats().misses, without.stats().entries) == (2, 0)
    assert same(without.answer_batch(asked[:2]), alone[:2])  # one call tokenises it once all the same
    assert (without.stats().misses, without.stats().hits) == (3, 1)


def test_a_stream_gives_all_answers_before_the_error(answerer):
    def source(broken):
        yield from PAIRS * 4
        if broken:
            raise OSError("the file went away")
        yield "", "text"

    found = []

    def take(broken):
        found.clear()
        found.extend(answers[0].text for answers in answerer.answer_stream(source(broken)))

    with pytest.raises(InputError, match=r"^pair 97: question is empty"):
        take(broken=False)
    assert found == GOLD * 4  # three chunks of 32
    with pytest.raises(OSError, match="the file went away"):
        take(broken=True)
    assert found == GOLD * 4


def test_the_next_questions_are_tokenised_while_the_model_works(bundle, sessions, monkeypatch):
    own = Answerer.load(bundle, device="cpu", threads=2)
    begin, order = own.model.start, []

    def start(windows):
        order.append(len(windows))
        if len(order) == 2:  # the second chunk is cut into windows, and none of the first has run
            sessions.release()
        return begin(windows)

    monkeypatch.setattr(own.model, "start", start)
    sessions.hold()
    assert [a[0].text for a in own.answer_batch(PAIRS * 3)] == GOLD * 3
    assert sum(order) == len(PAIRS * 3)


def test_a_stream_that_is_left_drops_its_work(bundle, sessions, monkeypatch):
    monkeypatch.setattr(session, "LARGE", 1)  # every call
    own = Answerer.load(bundle, device="cpu", threads=2)
    stream = own.answer_stream(itertools.cycle(PAIRS))
    assert next(stream)[0].text == GOLD[0]
    stream.close()
    found = []
    assert sessions.shrink_after(lambda: found.extend(own.answer(*PAIRS[1])))  # no call counts as running
    assert found[0].text == GOLD[1]


# ---------------------------------------------------------------- threads and processes


def test_sixteen_threads_with_mixed_options_answer_like_one(answerer):
    options = [
        {},
        {"top_k": 3},
        {"max_seq_len": 40, "doc_stride": 8},
        {"max_seq_len": 64, "doc_stride": 20, "top_k": 2},
        {"allow_no_answer": True, "top_k": 2},
        {"align_to_words": True, "max_answer_len": 4},
    ]
    calls = [(MIXED[n % len(MIXED)], options[n % len(options)]) for n in range(240)]

    def ask(call):
        (question, context), chosen = call
        if len(question) % 2:
            return answerer.answer(question, context, **chosen)
        return answerer.answer_batch([(question, context)], **chosen)[0]

    serial = [ask(call) for call in calls]
    with ThreadPoolExecutor(16) as pool:
        assert same(list(pool.map(ask, calls)), serial)


FORK = """
import os, sys
from qadeploy import Answerer

def answers(answerer):
    found = answerer.answer_batch(pairs) + [answerer.answer(*pairs[0])]
    return [(a[0].text, a[0].start) for a in found]

pairs = [("Who keeps the lamp?", "Ada keeps the lamp in room 0. Fay keeps the boat outside.")] * 6
answerer = Answerer.load(sys.argv[1], device="cpu", threads=2)
expected = answers(answerer)  # every session and the pool are in use before the fork
for asks in (True, False):
    child = os.fork()
    if not child:
        sys.exit(0 if not asks or answers(answerer) == expected else 3)  # the interpreter shuts down as usual
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status:
        sys.exit(f"child that asks={asks} ended with {status}")
stream = answerer.answer_stream(pairs * 40)
first = next(stream)  # and now windows of the stream are on their way
child = os.fork()
if not child:
    rest = [(a[0].text, a[0].start) for a in stream]
    sys.exit(0 if rest == (expected[:-1] * 40)[1:] else 5)
status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
if status or len(list(stream)) != 239:
    sys.exit(f"child within a stream ended with {status}")
sys.exit(0 if answers(answerer) == expected and expected[0][0] == "Ada" else 4)
"""

SPAWN = """
import multiprocessing, sys
from qadeploy import Answerer

def load(path):
    global answerer
    answerer = Answerer.load(path, device="cpu", threads=1)

def ask(pair):
    return answerer.answer(*pair)[0].text

if __name__ == "__main__":
    pairs = [("Who keeps the lamp?", f"{name} keeps the lamp in room 0.") for name in ("Ada", "Bela", "Cora")]
    with multiprocessing.get_context("spawn").Pool(2, load, (sys.argv[1],)) as pool:
        found = pool.map(ask, pairs)
    sys.exit(0 if found == ["Ada", "Bela", "Cora"] else f"found {found}")
"""


def test_after_a_fork_parent_and_child_answer(bundle, tmp_path):
    run_script(tmp_path, FORK, bundle)


def test_spawned_processes_answer(bundle, tmp_path):
    run_script(tmp_path, SPAWN, bundle)


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("question", "context", "message"),
    [
        ("", "Some text.", "question is empty"),
        (" \n", "Some text.", "question is empty"),
        ("Who?", "", "context is empty"),
        ("Who?", "\u2003", "context is empty"),
        (None, "Some text.", "question must be text, not NoneType"),
        ("Who?", 7, "context must be text, not int"),
        ("Who?", b"bytes", "context must be text, not bytes"),
        ("Who?", "half \ud800 pair", "lone surrogate"),
    ],
)
def test_bad_texts_are_named_alone_and_in_a_batch(answerer, question, context, message):
    with pytest.raises(InputError, match=message) as caught:
        answerer.answer(question, context)
    assert "pair" not in str(caught.value).partition(message)[0]
    with pytest.raises(InputError, match=f"^pair 2: .*{message}"):
        answerer.answer_batch([PAIRS[0], (question, context), PAIRS[1]])


@pytest.mark.parametrize("pair", ["no pair", ("one",), ("a", "b", "c"), None, {"question": "q", "context": "c"}])
def test_what_is_no_pair_is_named(answerer, pair):
    with pytest.raises(InputError, match=r"^pair 3: must be a \(question, context\) pair, not \w+"):
        answerer.answer_batch([PAIRS[0], PAIRS[1], pair])


def test_a_bad_pair_late_in_a_stream_is_numbered_from_its_start(answerer):
    stream = answerer.answer_stream([*PAIRS * 3, ("Who?", "")])
    with pytest.raises(InputError, match=r"^pair 73: context is empty"):
        list(stream)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"top_k": 0}, InputError, "top_k must be a whole number from 1, not 0"),
        ({"max_answer_len": 0}, InputError, "max_answer_len"),
        ({"max_seq_len": 161}, InputError, "limit of 160 tokens"),
        ({"max_seq_len": 5}, QuestionTooLongError, "no room for the context"),
        ({"max_seq_len": 40, "doc_stride": 40}, StrideError, "doc_stride must be below max_seq_len 40, not 40"),
        ({"doc_stride": -1}, InputError, "doc_stride"),
    ],
)
def test_bad_options_are_named(answerer, options, error, message):
    with pytest.raises(error, match=message):
        answerer.answer("Who keeps the lamp?", LONG, **options)


@pytest.mark.parametrize("tokens", [1, 4, 9])
def test_a_question_that_leaves_no_more_than_doc_stride_overlaps_by_half_of_its_room(answerer, tokens):
    question = "Who keeps the lamp?"
    size = len(answerer.encoder.encode(question)) + answerer.encoder.special_tokens + tokens
    expected = answerer.answer(question, LONG, max_seq_len=size, doc_stride=tokens // 2, top_k=3)
    assert answerer.answer(question, LONG, max_seq_len=size, doc_stride=tokens, top_k=3) == expected
    assert answerer.answer_batch([(question, LONG)], max_seq_len=size, doc_stride=size - 1, top_k=3) == [expected]


def test_every_question_without_room_is_named_before_any_is_asked(answerer):
    long = "Who keeps the lamp " * 60
    examples = [Example(i, q, "Ada.") for i, q in (("a", "Who?"), ("b", long), ("c", "Who?"), ("d", long))]
    with pytest.raises(DataError) as caught:
        answerer.require_room(examples, "faq.jsonl")
    numbers = [
        re.match(r"faq\.jsonl: question (\d) \(id (\w)\), field question: .*no room", p) for p in caught.value.problems
    ]
    assert [n and n.groups() for n in numbers] == [("2", "b"), ("4", "d")]
    answerer.require_room(examples[::2], "faq.jsonl")


@pytest.mark.skipif("CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="this is a CUDA build")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_cuda_on_a_cpu_build_says_what_to_install(bundle, device):
    with pytest.raises(DeviceError, match=r"CPU build.*pip install 'qadeploy\[gpu\]'"):
        Answerer.load(bundle, device=device)


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "cpu:0", "", "CUDA"])
def test_unknown_devices_are_refused(bundle, device):
    with pytest.raises(InputError, match="choose auto, cpu, cuda or cuda:N"):
        Answerer.load(bundle, device=device)


@pytest.mark.parametrize("threads", [0, -2])
def test_threads_are_at_least_one(bundle, threads):
    with pytest.raises(InputError, match=f"threads {threads} is below 1"):
        Answerer.load(bundle, threads=threads)


def test_load_says_what_it_loaded(bundle):
    loaded = Answerer.load(str(bundle))
    assert loaded.bundle is not None
    assert loaded.bundle.folder == bundle
    assert (loaded.settings, loaded.encoder.config) == (loaded.bundle.settings, loaded.bundle.encoder)
    assert set(loaded.model.inputs) == {"input_ids", "attention_mask", "token_type_ids"}
    with pytest.raises(InputError, match="no such bundle folder"):
        Answerer.load(bundle / "nowhere")


def test_a_model_and_an_encoder_that_disagree_on_segments_are_refused(bundle, tmp_path):
    encoder = {**open_bundle(bundle).manifest["encoder"], "segments": 0}
    with pytest.raises(BundleError, match="disagree on token_type_ids"):
        Answerer.load(sealed_copy(bundle, tmp_path / "copy", encoder=encoder))


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


@pytest.mark.parametrize("factor", [np.nan, np.inf, -np.inf])
def test_logits_that_are_no_numbers_are_an_error(bundle, tmp_path, factor):
    broken = Answerer.load(sealed_copy(bundle, tmp_path / "broken", crafted(float(factor))))
    with pytest.raises(LogitsError, match="NaN or infinite logits"):
        broken.answer(*PAIRS[0])


def test_of_many_pairs_the_one_with_such_logits_is_named(answerer, monkeypatch):
    real = answerer.model.run
    bad = answerer.read(*PAIRS[3], Options()).windows[0].input_ids.tolist()

    def run(windows):
        found = real(windows)
        return [(s * np.nan if w.input_ids.tolist() == bad else s, e) for w, (s, e) in zip(windows, found, strict=True)]

    monkeypatch.setattr(answerer.model, "run", run)
    monkeypatch.setattr(answerer.model, "start", lambda windows: Pending(lambda: run(windows)))
    seen = []
    with pytest.raises(LogitsError, match="pair 4: the model returned NaN or infinite logits"):
        seen.extend(answerer.answer_stream(PAIRS))
    assert len(seen) == 3  # those before it


def test_a_graph_that_is_no_question_answering_model_is_refused():
    with pytest.raises(BundleError, match="not those of a question-answering model"):
        OnnxModel(lambda: crafted(1.0, ("logits", "other")), device="cpu")
    with pytest.raises(BundleError, match="ONNX Runtime cannot load it"):
        OnnxModel(lambda: b"no model", device="cpu")
