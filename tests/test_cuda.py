"""Windows on a device: shapes, buffers, and fallbacks. On the CPU provider, through the same code."""

from __future__ import annotations

import gc
import os
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper

from qadeploy import Answerer
from qadeploy.core.windows import pad_batch
from qadeploy.errors import DeviceError, InputError
from qadeploy.export.attention import fuse_attention
from qadeploy.inference.bundle import MODEL, open_bundle
from qadeploy.inference.cuda import (
    GRAPH_ROWS,
    LONGEST,
    STEP,
    DeviceRunner,
    Shape,
    batches,
    graph_shape,
    round_up,
)
from qadeploy.inference.session import OnnxModel, Pending
from qadeploy.records import Window
from tests.conftest import triplets

LIMIT = 160  # positions of the tiny model


def session_of(model: bytes) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def model(bundle) -> bytes:
    return open_bundle(bundle).read(MODEL)


@pytest.fixture(scope="module")
def windows(bundle) -> list[Window]:
    """Windows of several lengths, real ones."""
    encoder = Answerer.load(bundle).encoder
    text = "Ada keeps the lamp in room 1. Bela keeps the boat outside. " * 6
    question = encoder.encode("Who keeps the boat?")
    return [
        window
        for size in (24, 40, 64, 150)
        for window in encoder.windows(question, encoder.encode(text), max_seq_len=size, doc_stride=8)
    ]


def runner_of(model: bytes, **changes: Any) -> DeviceRunner:
    values: dict[str, Any] = {"place": ("cpu", 0), "longest": LIMIT, **changes}
    return DeviceRunner(ort, values.pop("make", lambda graphs: session_of(model)), **values)


def assert_logits(found, wanted, tolerance=1e-4):
    assert len(found) == len(wanted)
    for (starts, ends), (s, e) in zip(found, wanted, strict=True):
        assert starts.dtype == np.float32
        assert starts.shape == s.shape
        np.testing.assert_allclose(starts, s, atol=tolerance)
        np.testing.assert_allclose(ends, e, atol=tolerance)


def alone(model: bytes, windows: list[Window]) -> list[tuple[Any, Any]]:
    """Logits computed in the simplest way: one unpadded window per run."""
    session = session_of(model)
    names = {i.name for i in session.get_inputs()}
    found = []
    for window in windows:
        feeds = {name: value for name, value in pad_batch([window], 0).items() if name in names}
        starts, ends = session.run(["start_logits", "end_logits"], feeds)
        found.append((starts[0], ends[0]))
    return found


def shifted(model: bytes) -> bytes:
    """The model with another bias at its answer head: a graph that runs and is wrong."""
    proto = onnx.load_model_from_string(model)
    bias = next(t for t in proto.graph.initializer if t.name.endswith("qa_outputs.bias"))
    bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + np.float32(1), bias.name))
    return proto.SerializeToString()


# ---------------------------------------------------------------- shapes


@pytest.mark.parametrize(
    ("lengths", "wanted"),
    [
        ([1], Shape(1, STEP)),
        ([STEP], Shape(1, STEP)),
        ([STEP + 1], Shape(1, 2 * STEP)),
        ([20, 384, 7], Shape(4, 384)),
        ([384] * 5, Shape(8, 384)),
        ([LONGEST], Shape(1, LONGEST)),
        ([LONGEST + 1], None),
        ([20] * (GRAPH_ROWS[-1] + 1), None),
        ([], None),
    ],
)
def test_few_windows_share_few_shapes(lengths, wanted):
    assert graph_shape(lengths) == wanted


def test_a_shape_never_exceeds_what_the_model_takes():
    assert graph_shape([150], longest=LIMIT) == Shape(1, LIMIT)
    assert graph_shape([505], longest=510) == Shape(1, 510)  # RoBERTa and its relatives end at 510, 512 less 2
    assert (round_up(9, 8), round_up(16, 8), round_up(17, 8, 20), round_up(30, 8, 20)) == (16, 16, 20, 30)


def test_batches_hold_every_window_once_by_length_within_the_budget():
    lengths = np.random.default_rng(1).integers(1, 500, 300).tolist()
    found = batches(lengths, tokens=2000)
    assert sorted(i for batch in found for i in batch) == list(range(300))
    assert all(len(batch) * max(lengths[i] for i in batch) <= 2000 for batch in found)
    flat = [lengths[i] for batch in found for i in batch]
    assert flat == sorted(flat, reverse=True)
    assert len(found) < 1.3 * sum(lengths) / 2000 + 1


def test_a_window_longer_than_the_budget_runs_by_itself():
    assert batches([50, 5000, 60], tokens=1000) == [[1], [2, 0]]


def test_without_a_mask_only_equal_lengths_share_a_batch():
    found = batches([5, 7, 5, 7, 9], masked=False)
    assert [len(batch) for batch in found] == [1, 2, 2]
    assert all(len({[5, 7, 5, 7, 9][i] for i in batch}) == 1 for batch in found)


# ---------------------------------------------------------------- logits


def test_few_windows_have_the_logits_of_windows_alone(model, windows):
    runner = runner_of(model)
    for count in (1, 2, 3, 8):
        assert_logits(runner.run(windows[-count:]), alone(model, windows[-count:]))
    assert "CUDA graphs (" in runner.notes()[0]


def test_many_windows_have_the_logits_of_windows_alone_in_their_order(model, windows):
    shuffled = [windows[i] for i in np.random.default_rng(3).permutation(len(windows))]
    assert len(shuffled) > GRAPH_ROWS[-1]
    assert_logits(runner_of(model).run(shuffled), alone(model, shuffled))


class Noted:
    """The session, recording each run with a binding: the graph's number, and name, address and shape of each buffer."""

    def __init__(self, model: bytes) -> None:
        self.real = session_of(model)
        self.runs: list[tuple[str, tuple[tuple[str, int, tuple[int, ...]], ...]]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def io_binding(self) -> Any:
        return NotedBinding(self.real.io_binding())

    def run_with_iobinding(self, binding: Any, options: Any) -> None:
        self.runs.append((options.get_run_config_entry("gpu_graph_id"), tuple(binding.buffers)))
        self.real.run_with_iobinding(binding.real, options)


class NotedBinding:
    def __init__(self, real: Any) -> None:
        self.real, self.buffers = real, []

    def bind_ortvalue_input(self, name: str, value: Any) -> None:
        self.buffers.append((name, value.data_ptr(), tuple(value.shape())))
        self.real.bind_ortvalue_input(name, value)

    def bind_ortvalue_output(self, name: str, value: Any) -> None:
        self.buffers.append((name, value.data_ptr(), tuple(value.shape())))
        self.real.bind_ortvalue_output(name, value)


def test_buffers_are_kept_and_replaced_values_do_not_linger(model, windows):
    session = Noted(model)
    runner = runner_of(model, make=lambda graphs: session)
    long, short = max(windows, key=len), min(windows, key=len)
    first = runner.run([short])
    runner.run([long])
    again = runner.run([short])
    assert_logits(again, first, 0)
    graphs = dict(session.runs)
    assert session.runs[0] == session.runs[-1]
    assert (len(graphs), set(session.runs)) == (2, set(graphs.items()))  # at the same addresses, as a graph needs


def test_warm_up_captures_every_length_and_numbers_each_graph(model, windows):
    session = Noted(model)
    runner = runner_of(model, make=lambda graphs: session)
    runner.warm_up(windows[0])
    assert f"({LIMIT // STEP} shapes captured)" in runner.notes()[0]
    runner.run(windows[:1] * 2)
    captured = set(session.runs)
    shapes = [next(shape for name, _, shape in buffers if name == "input_ids") for _, buffers in captured]
    two = (2, round_up(len(windows[0]), STEP, LIMIT))
    assert sorted(shapes) == [*((1, tokens) for tokens in range(STEP, LIMIT + 1, STEP)), two]
    numbers = {graph for graph, _ in captured}
    assert len(numbers) == len(captured)
    assert "-1" not in numbers
    runner.run([max(windows, key=len)])
    assert set(session.runs) == captured  # nothing is left to capture for one window


def test_threads_share_the_buffers_safely(model, windows):
    runner, wanted = runner_of(model), alone(model, windows)

    def work(i: int) -> None:
        for _ in range(5):
            assert_logits(runner.run([windows[i]]), wanted[i : i + 1])
            assert_logits(runner.run(windows), wanted)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(work, range(4)))


# ---------------------------------------------------------------- one thread


class Capturing:
    """The session with a trait of ONNX Runtime's CUDA provider: graphs belong to the thread that captured them.

    ``captures`` are the threads of all captures of all sessions, ``touched`` the threads of all other calls.
    """

    captures: ClassVar[list[tuple[int, str]]] = []
    touched: ClassVar[set[int]] = set()

    def __init__(self, model: bytes) -> None:
        self.touched.add(threading.get_ident())
        self.real = session_of(model)
        self.known: set[tuple[int, str]] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def io_binding(self) -> Any:
        self.touched.add(threading.get_ident())
        return self.real.io_binding()

    def run(self, *given: Any) -> Any:
        self.touched.add(threading.get_ident())
        return self.real.run(*given)

    def run_with_iobinding(self, binding: Any, options: Any) -> None:
        thread, graph = threading.get_ident(), options.get_run_config_entry("gpu_graph_id")
        self.touched.add(thread)
        if graph != "-1" and (thread, graph) not in self.known:
            self.known.add((thread, graph))
            self.captures.append((thread, graph))
        self.real.run_with_iobinding(binding, options)


@pytest.fixture
def capturing() -> Iterator[type[Capturing]]:
    Capturing.captures, Capturing.touched = [], set()
    yield Capturing
    Capturing.captures, Capturing.touched = [], set()


def test_each_shape_is_captured_once_whichever_threads_ask(model, windows, capturing):
    runners = [runner_of(model, make=lambda graphs: capturing(model)) for _ in range(2)]
    wanted = alone(model, windows)
    for runner in runners:
        runner.warm_up(windows[0])
    with ThreadPoolExecutor(4) as pool:
        for runner in runners:
            found = pool.map(lambda i, runner=runner: runner.run(windows[i : i + 1])[0], range(len(windows)))
            assert_logits(list(found), wanted)
            assert_logits(pool.submit(runner.run, windows).result(), wanted)
    assert len(capturing.captures) == 2 * LIMIT / STEP
    assert len(capturing.touched) == 1  # of all runners: a capture forbids other threads to use the GPU
    assert threading.get_ident() not in capturing.touched


@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded, use of fork:DeprecationWarning")  # Python 3.12
def test_a_forked_child_has_a_device_thread_of_its_own(model, windows):
    runner = runner_of(model)
    wanted = runner.run(windows[:1])
    child = os.fork()
    if not child:
        own = runner_of(model).run(windows[:1])
        os._exit(0 if np.array_equal(own[0][0], wanted[0][0]) else 3)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_logits_are_not_those_of_the_next_run(model, windows):
    """On a CPU OrtValue.numpy() is the buffer itself."""
    runner = runner_of(model)
    short, long = sorted(windows, key=len)[:2]
    assert graph_shape([len(short)]) == graph_shape([len(long)])  # they share a buffer
    found = runner.run([short])
    kept = [x.copy() for x in found[0]]
    runner.run([Window(long.input_ids[::-1].copy(), long.token_type_ids, 0, 0, 0, 0)])
    np.testing.assert_array_equal(found[0], kept)


# ---------------------------------------------------------------- what is given up


def test_a_session_that_cannot_capture_is_made_again_without(model, windows):
    asked: list[bool] = []

    def make(graphs: bool) -> Any:
        asked.append(graphs)
        if graphs:
            raise DeviceError("not all nodes are on the CUDA provider")
        return session_of(model)

    runner = runner_of(model, make=make)
    assert asked == [True, False]
    assert_logits(runner.run(windows[:2]), alone(model, windows[:2]))
    assert runner.notes()[0] == "one question: plain runs: not all nodes are on the CUDA provider"
    runner.warm_up(windows[0])
    assert runner.notes()[0] == "one question: plain runs: not all nodes are on the CUDA provider"


def test_a_capture_that_fails_is_given_up_and_the_windows_answered(model, windows):
    class Failing:
        """A session whose capture fails, as CUDA's may."""

        def __init__(self) -> None:
            self.real = session_of(model)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.real, name)

        def run_with_iobinding(self, binding: Any, options: Any) -> None:
            if options.get_run_config_entry("gpu_graph_id") != "-1":
                raise RuntimeError("operation not permitted when stream is capturing")
            self.real.run_with_iobinding(binding, options)

    first: list[weakref.ref[Failing]] = []

    def make(graphs: bool) -> Any:
        if graphs:
            failing = Failing()
            first.append(weakref.ref(failing))
            return failing
        gc.collect()
        assert first[0]() is None  # a stream that still captures would forbid this session its memory
        return session_of(model)

    runner = runner_of(model, make=make)
    assert_logits(runner.run(windows[:1]), alone(model, windows[:1]))
    assert not runner.graphs
    assert "capturing 1 x 32 tokens failed: operation not permitted" in runner.notes()[0]
    assert_logits(runner.run(windows[:1]), alone(model, windows[:1]))


def test_a_graph_that_replays_something_else_is_given_up(model, windows):
    class Stale:
        """A session whose replays repeat the captured run's logits."""

        def __init__(self) -> None:
            self.right, self.wrong = session_of(model), session_of(shifted(model))

        def __getattr__(self, name: str) -> Any:
            return getattr(self.right, name)

        def io_binding(self) -> Any:
            return Both(self.right.io_binding(), self.wrong.io_binding())

        def run_with_iobinding(self, binding: Any, options: Any) -> None:
            if options.get_run_config_entry("gpu_graph_id") == "-1":
                self.right.run_with_iobinding(binding.right, options)
            else:
                self.wrong.run_with_iobinding(binding.wrong, options)

    class Both:
        def __init__(self, right: Any, wrong: Any) -> None:
            self.right, self.wrong = right, wrong

        def bind_ortvalue_input(self, name: str, value: Any) -> None:
            self.right.bind_ortvalue_input(name, value)
            self.wrong.bind_ortvalue_input(name, value)

        def bind_ortvalue_output(self, name: str, value: Any) -> None:
            self.right.bind_ortvalue_output(name, value)
            self.wrong.bind_ortvalue_output(name, value)

    runner = runner_of(model, make=lambda graphs: Stale() if graphs else session_of(model))
    assert_logits(runner.run(windows[:1]), alone(model, windows[:1]))
    assert "a captured graph's logits were 1 from those of a plain run" in runner.notes()[0]


def test_batches_shrink_when_memory_runs_out_and_every_window_is_answered(model, windows):
    class Small:
        """A session on a device whose memory holds 200 tokens."""

        def __init__(self) -> None:
            self.real = session_of(model)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.real, name)

        def run(self, outputs: Any, feeds: Any, options: Any = None) -> Any:
            if feeds["input_ids"].size > 200:
                raise RuntimeError("bfc_arena.cc:360 Failed to allocate memory for requested buffer of size 1474560")
            return self.real.run(outputs, feeds, options)

    runner = runner_of(model, make=lambda graphs: Small())
    assert_logits(runner.run(windows), alone(model, windows))
    assert runner.notes()[1] == (
        "many questions: batches by length of at most 128 tokens, since the GPU's memory ran out"
    )


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        (
            "CUDA failure 2: out of memory",
            r"one window of \d+ tokens does not fit into the memory of the GPU: .* give another --device",
        ),
        ("CUDNN_STATUS_EXECUTION_FAILED", r"a run on the GPU failed: CUDNN_STATUS_EXECUTION_FAILED"),
    ],
)
def test_a_run_that_fails_is_an_error_of_ours(model, windows, said, wanted):
    class Failing:
        def __init__(self) -> None:
            self.real = session_of(model)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.real, name)

        def run(self, *given: Any) -> Any:
            raise RuntimeError(said)

    with pytest.raises(DeviceError, match=wanted):
        runner_of(model, make=lambda graphs: Failing()).run(windows)


def test_a_model_without_a_mask_runs_unpadded(model, windows):
    runner = runner_of(fuse_attention(model, heads=4).model)
    assert runner.notes()[0] == (
        "one question: plain runs: the model takes no attention_mask, so its windows cannot be padded"
    )
    for count in (3, len(windows)):
        assert_logits(runner.run(windows[:count]), alone(model, windows[:count]))


# ---------------------------------------------------------------- the host beside it


@pytest.fixture
def as_if_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime reports that it runs on CUDA, but runs on the CPU."""

    class Session(ort.InferenceSession):
        def __init__(self, *given: Any, providers: list[Any], **more: Any) -> None:
            super().__init__(*given, providers=["CPUExecutionProvider"], **more)
            self.asked = providers

        def get_providers(self) -> list[str]:
            return [each if isinstance(each, str) else each[0] for each in self.asked]

    buffer = ort.OrtValue.ortvalue_from_shape_and_type
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])
    monkeypatch.setattr(ort, "InferenceSession", Session)
    monkeypatch.setattr(ort.OrtValue, "ortvalue_from_shape_and_type", lambda shape, kind, *place: buffer(shape, kind))


def test_the_model_hands_its_windows_to_the_runner(as_if_on_cuda, model, windows):
    onnx_model = OnnxModel(lambda: model, device="cuda", longest=LIMIT)
    assert onnx_model.device == "cuda"
    onnx_model.warm_up(windows[0])
    wanted = alone(model, windows)
    assert_logits(onnx_model.run(windows), wanted)
    assert_logits(onnx_model.start(windows).result(), wanted)
    assert_logits(onnx_model.run_batch(windows), wanted)
    assert_logits(onnx_model.start(windows[:1]).result(), wanted[:1])
    assert onnx_model.notes() == [
        "one question: CUDA graphs (5 shapes captured)",
        "many questions: batches by length of at most 16384 tokens",
    ]
    assert OnnxModel(lambda: model, device="cpu").notes() == []


class OnDevice:
    """The runner as the model of an answerer, under the name of the device that it is made for."""

    device = "cuda"

    def __init__(self, model: bytes) -> None:
        self.runner = runner_of(model)
        self.run = self.runner.run

    def start(self, windows: list[Window]) -> Pending:
        return Pending(lambda: self.run(windows))


@pytest.fixture(scope="module")
def hosted(bundle, model) -> tuple[Answerer, Answerer]:
    """An answerer on the runner, and the bundle's own."""
    own = Answerer.load(bundle)
    return Answerer(own.encoder, own.settings, OnDevice(model)), own


def test_answers_over_the_runner_are_those_of_the_bundle(hosted):
    ours, theirs = hosted
    pairs = [(str(row["question"]), str(row["context"])) for row in triplets(40)]
    pairs.append((pairs[0][0], pairs[3][1]))
    found, wanted = ours.answer_batch(pairs), theirs.answer_batch(pairs)
    assert [(a[0].text, a[0].start, a[0].end) for a in found] == [(a[0].text, a[0].start, a[0].end) for a in wanted]
    assert ours.stats().entries == len({context for _, context in pairs})
    assert ours.answer(*pairs[5])[0].text == theirs.answer(*pairs[5])[0].text


@pytest.mark.parametrize("bad", [("", "A text."), ("Who?", "a \udc00 surrogate"), ("Who?", None)])
def test_a_bad_text_among_many_is_named_by_its_pair(hosted, bad):
    pairs = [("Who keeps the lamp?", "Ada keeps the lamp."), bad, ("Who keeps the boat?", "Bela keeps the boat.")]
    with pytest.raises(InputError, match=r"^pair 2: "):
        hosted[0].answer_batch(pairs)
