"""The client of a Triton server: against Triton and MLServer if they are installed, and against sockets that misbehave."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import socket
import sys
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.http

from qadeploy import Answerer
from qadeploy.core.decoding import WindowLogits, decode
from qadeploy.core.encoded_text import EncodedText
from qadeploy.core.settings import Options
from qadeploy.core.windows import CONTEXT_MASK, pad_batch, pad_context_masks
from qadeploy.data.loading import read
from qadeploy.errors import BundleError, InputError, RemoteError
from qadeploy.inference.bundle import MODEL, open_bundle
from qadeploy.inference.session import OnnxModel
from qadeploy.integrations.onnx_standalone.in_graph import spans_in_graph
from qadeploy.integrations.triton.client import TritonModel, TritonOptions, triton_answerer
from qadeploy.integrations.triton.repository import add_bundle
from qadeploy.records import Window
from tests.conftest import sealed_copy, triplets
from tests.inference_servers_for_tests import Server, free_port, mlserver, needs_servers, triton
from tests.processes_for_tests import succeeded

SPANS = 5  # a window, of the bundles with their spans in the graph
# Questions of one window and of several (of 160 tokens), so of many lengths.
LONG = " ".join(str(row["context"]) for row in triplets(40))
PAIRS = [
    *((str(row["question"]), str(row["context"])) for row in triplets(24)),
    ("Who keeps the lamp?", LONG),
    ("Who keeps the bell in room 5?", LONG[: len(LONG) // 2]),
]


def as_served(bundle: Path) -> Answerer:
    """The bundle's answerer with a session like the server's, without the settings that the server does not support."""
    own = Answerer.load(bundle)
    opened = open_bundle(bundle)
    model = OnnxModel(lambda: opened.read(MODEL), device="cpu", threads=1, pad_token_id=opened.encoder.pad_token_id)
    return Answerer(own.encoder, own.settings, model, opened)


def same(answerer: Answerer, bundle: Path) -> None:
    expected = as_served(bundle).answer_batch(PAIRS, top_k=3)
    found = answerer.answer_batch(PAIRS, top_k=3)
    assert [[(a.text, a.start, a.end) for a in answers] for answers in found] == [
        [(a.text, a.start, a.end) for a in answers] for answers in expected
    ]
    scores = [[a.score for answers in each for a in answers] for each in (found, expected)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)
    assert len({answers[0].text for answers in found}) > 5


def same_passages(answerer: Answerer, bundle: Path) -> None:
    """Passages of one window and of several, an empty one among them, in every call and with the options of answers for people."""
    local = as_served(bundle)
    passages = [LONG, PAIRS[0][1], " ", *(context for _, context in PAIRS[1:6])]
    options: dict[str, Any] = {"top_k": 5, "distinct": True, "snippet": "sentence", "offsets": "utf16"}
    asked = [(question, passages[i % 4 :]) for i, (question, _) in enumerate(PAIRS)]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        expected = local.answer_batch(asked, **options)
        calls = [answerer.answer(question, contexts=texts, **options) for question, texts in asked]
        forms = [calls, answerer.answer_batch(asked, **options), asyncio.run(answerer.aanswer_batch(asked, **options))]
    assert len({str(w.message) for w in told if "is empty and skipped" in str(w.message)}) > 1
    assert {a.passage for answers in expected for a in answers} > {0, 1, 3}
    for found in forms:
        assert [[replace(a, score=0) for a in answers] for answers in found] == [
            [replace(a, score=0) for a in answers] for answers in expected
        ]
        scores = [[a.score for answers in each for a in answers] for each in (found, expected)]
        assert scores[0] == pytest.approx(scores[1], abs=1e-5)


# ---------------------------------------------------------------- real servers


@pytest.fixture(scope="module")
def repository(tiny, bundle, tmp_path_factory) -> Path:
    """fp32 one by one, the same with batches, and int8; fp32 (with batches) and int8 with their spans in the graph."""
    root = tmp_path_factory.mktemp("models")
    shutil.copytree(bundle, root / "batched")
    for folder, size in ((bundle, None), (root / "batched", 4), (tiny.bundle("int8"), None)):
        add_bundle(open_bundle(folder), root / "repository", max_batch=size)
    examples = read(str(tiny.data)).examples[:4]
    for kind, size in (("", 4), ("int8", None)):
        source = open_bundle(tiny.bundle(kind))
        made = spans_in_graph(source, root / f"{source.name}-spans", examples, top_k=SPANS)
        add_bundle(made, root / "repository", max_batch=size)
    return root / "repository"


@pytest.fixture(scope="module")
def server(repository, tmp_path_factory) -> Iterator[Server]:
    with triton(repository, tmp_path_factory.mktemp("triton")) as running:
        yield running


@needs_servers
@pytest.mark.parametrize("name", ["keepers", "batched", "keepers-int8"])
def test_triton_takes_the_repository_as_written_and_answers_as_the_local_model(name, server, repository):
    answerer = triton_answerer(server.url, repository / name / "1")
    same(answerer, repository / name / "1")
    assert answerer.model.served.version == "1"
    assert answerer.model.served.bundle == open_bundle(repository / name / "1").hash
    assert answerer.model.served.binary
    text = server.log.read_text()
    assert f"successfully loaded '{name}'" in text
    assert "ignore version directory" not in text


@needs_servers
@pytest.mark.parametrize("name", ["keepers", "batched"])
def test_passages_are_answered_through_triton_as_by_the_local_model(name, server, repository):
    same_passages(triton_answerer(server.url, repository / name / "1"), repository / name / "1")


@needs_servers
def test_triton_joins_requests_of_one_length_and_what_it_joins_stays_the_same(server, repository):
    folder = repository / "batched/1"
    answerer = triton_answerer(server.url, folder, connections=16)
    window = answerer.encode(*PAIRS[0], Options()).windows[0]
    before = _runs(server, "batched")
    alone = as_served(folder).model.run([window])[0]
    for starts, ends in answerer.model.run([window] * 64):
        np.testing.assert_allclose((starts, ends), alone, atol=1e-5)
    after = _runs(server, "batched")
    assert sum(size * (after[size] - before.get(size, 0)) for size in after) == 64
    assert max(after) in {2, 3, 4}


@needs_servers
@pytest.mark.parametrize("multiple", [1, 32])
def test_batches_of_the_client_are_cut_and_padded(multiple, server, repository):
    answerer = triton_answerer(server.url, repository / "batched/1", batch=3, multiple=multiple)
    same(answerer, repository / "batched/1")


def infer(client: Any, name: str, windows: list[Window], contexts: list[EncodedText], pad: int) -> dict[str, Any]:
    """Calls the server as a client without qadeploy does: all tensors in, all out."""
    told = client.get_model_metadata(name)
    feeds = {**pad_batch(windows, pad), CONTEXT_MASK: pad_context_masks(windows, contexts)}
    inputs = []
    for each in told["inputs"]:
        assert each["datatype"] == "INT64"
        inputs.append(tritonclient.http.InferInput(each["name"], feeds[each["name"]].shape, "INT64"))
        inputs[-1].set_data_from_numpy(feeds[each["name"]])
    reply = client.infer(name, inputs)
    return {each["name"]: reply.as_numpy(each["name"]) for each in told["outputs"]}


@needs_servers
@pytest.mark.parametrize(("kind", "together"), [("", 1), ("", 4), ("int8", 1)])
def test_spans_from_the_server_are_those_of_the_decoder(kind, together, server, tiny):
    """Each window alone, and in padded batches."""
    source = tiny.bundle(kind)
    local = as_served(source)
    begun = [local.encode(question, context, Options()) for question, context in PAIRS]
    asked = [(window, each.context) for each in begun for window in each.windows]
    assert len(asked) > len(PAIRS)
    limits = {"max_answer_len": local.settings.max_answer_len, "temperature": local.settings.temperature}
    with tritonclient.http.InferenceServerClient(server.url.removeprefix("http://")) as client:
        for first in range(0, len(asked), together):
            windows, contexts = map(list, zip(*asked[first : first + together], strict=True))
            out = infer(client, f"{source.name}-spans", windows, contexts, open_bundle(source).encoder.pad_token_id)
            for row, (window, context) in enumerate(zip(windows, contexts, strict=True)):
                starts, ends = local.model.run([window])[0]
                decoded = decode(WindowLogits([window], [starts], [ends], context), top_k=SPANS, **limits)
                assert len(decoded.spans) == SPANS
                shift = window.context_offset - window.context_begin
                places = zip(out["span_starts"][row] + shift, out["span_ends"][row] + shift, strict=True)
                assert list(places) == [(span.start_token, span.end_token) for span in decoded.spans]
                scores = np.exp(out["span_scores"][row] / limits["temperature"] - out["log_sum"][row])
                assert scores == pytest.approx([span.score for span in decoded.spans], abs=1e-5)
                assert out["null_scores"][row] == pytest.approx([decoded.null_logit], abs=1e-5)


@needs_servers
def test_several_threads_and_a_loop_share_an_answerer(server, repository):
    answerer = triton_answerer(server.url, repository / "keepers/1", connections=3)
    expected = [answerer.answer(*pair)[0] for pair in PAIRS]
    with ThreadPoolExecutor(8) as threads:
        assert [found[0] for found in threads.map(lambda pair: answerer.answer(*pair), PAIRS)] == expected

    async def ask() -> list[Any]:
        return await asyncio.gather(*(answerer.aanswer(*pair) for pair in PAIRS))

    assert [found[0] for found in asyncio.run(ask())] == expected


FORK = """
import os, sys
from qadeploy.integrations.triton.client import triton_answerer

answerer = triton_answerer(*sys.argv[1:3])
pair = sys.argv[3:5]
expected = answerer.answer(*pair)
stream = answerer.answer_stream([pair] * 200)
first = next(stream)  # and now requests of the stream are on their way
child = os.fork()
if not child:
    sys.exit(0 if answerer.answer(*pair) == expected and len(list(stream)) == 199 else 3)
status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
sys.exit(status or (0 if len(list(stream)) == 199 and answerer.answer(*pair) == expected else 4))
"""


@needs_servers
def test_a_forked_child_makes_its_own_connections(server, repository):
    command = [sys.executable, "-c", FORK, server.url, str(repository / "keepers/1"), *PAIRS[0]]
    succeeded(command, timeout=60)


@needs_servers
def test_a_wrong_name_lists_the_models(server, repository):
    with pytest.raises(
        RemoteError, match=r"typo.* \(it has batched, keepers, keepers-int8, keepers-int8-spans, keepers-spans\)"
    ):
        triton_answerer(server.url, repository / "keepers/1", name="typo")
    with pytest.raises(RemoteError, match="keepers"):
        triton_answerer(server.url, repository / "keepers/1", version="9")


@needs_servers
def test_another_bundle_than_the_servers_is_refused(server, repository, tmp_path):
    other = sealed_copy(repository / "keepers/1", tmp_path / "keepers", name="another")
    with pytest.raises(
        RemoteError, match=r"version 1 of keepers is the bundle [0-9a-f]{12}, but .*/keepers is [0-9a-f]{12}: give"
    ):
        triton_answerer(server.url, other)


@needs_servers
def test_a_server_that_is_killed_and_comes_back(repository, tmp_path):
    """Killed in mid-run it is an error; once it is back the same answerer goes on, also if its model is another version."""
    models = shutil.copytree(repository / "keepers", tmp_path / "models/keepers")
    port = free_port()
    with triton(models.parent, tmp_path, port) as first:
        answerer = triton_answerer(first.url, models / "1")
        expected = answerer.answer(*PAIRS[0])
        stream = answerer.answer_stream(PAIRS[0] for _ in range(100_000))
        assert next(stream) == expected
        first.stop(signal.SIGKILL)
        with pytest.raises(RemoteError, match=f"http://127.0.0.1:{port}: no inference server answers"):
            list(stream)
        with pytest.raises(RemoteError, match="no inference server answers"):
            answerer.answer(*PAIRS[0])
    with triton(models.parent, tmp_path, port):
        assert answerer.answer(*PAIRS[0]) == expected
    add_bundle(open_bundle(sealed_copy(models / "1", tmp_path / "keepers", name="second")), models.parent)
    with triton(models.parent, tmp_path, port) as third:
        with pytest.raises(
            RemoteError, match="now answers with version 2 of keepers, but this client was made for version 1"
        ):
            answerer.answer(*PAIRS[0])
        again = triton_answerer(third.url, models / "2")
        assert (again.model.served.version, again.answer(*PAIRS[0])) == ("2", expected)


@needs_servers
@pytest.mark.parametrize("kind", ["", "int8"])
def test_mlserver_answers_as_the_local_model(kind, tiny, tiny_export, tmp_path):
    """MLServer supports the protocol, but neither Triton's configuration nor its index."""
    with mlserver(tiny.bundle(kind), "keepers", tmp_path) as running:
        answerer = triton_answerer(running.url, tiny.bundle(kind), name="keepers")
        same(answerer, tiny.bundle(kind))
        assert (answerer.model.served.version, answerer.model.served.bundle) == ("", "")
        with pytest.raises(RemoteError, match="typo"):
            triton_answerer(running.url, tiny.bundle(kind), name="typo")


def _runs(server: Server, name: str) -> dict[int, int]:
    """How many runs there were of each number of windows."""
    (stats,) = server.get(f"/v2/models/{name}/stats")["model_stats"]
    return {each["batch_size"]: each["compute_infer"]["count"] for each in stats["batch_stats"]}


# ---------------------------------------------------------------- servers that do wrong


class Odd:
    """A server's responses, which tests change. Its logits for a window are the window's length."""

    def __init__(self) -> None:
        names = ("input_ids", "attention_mask", "token_type_ids")
        self.server: dict[str, Any] = {"name": "odd", "extensions": []}
        self.inputs = [{"name": name, "datatype": "INT64", "shape": [-1, -1]} for name in names]
        self.outputs = [{"name": n, "datatype": "FP32", "shape": [-1, -1]} for n in ("start_logits", "end_logits")]
        self.ready = 200
        self.config: dict[str, Any] = {}
        self.answer: Any = None
        self.version = "1"
        self.requests: list[tuple[int, int]] = []
        self.headers: list[str | None] = []
        self.rows: list[list[int]] = []

    def get(self, path: str) -> tuple[int, Any]:
        if path == "v2":
            return 200, self.server
        if path.endswith("/ready"):
            return self.ready, {}
        if path.endswith("/config"):
            return 200, self.config
        return 200, {"name": "odd", "versions": [self.version], "inputs": self.inputs, "outputs": self.outputs}

    def post(self, body: Any) -> tuple[int, Any]:
        if self.answer is not None:
            return self.answer
        given = {each["name"]: each for each in body["inputs"]}
        rows, tokens = given["input_ids"]["shape"]
        self.requests.append((rows, tokens))
        masks = np.reshape(given["attention_mask"]["data"], (rows, tokens))
        ids = np.reshape(given["input_ids"]["data"], (rows, tokens))
        self.rows += [[int(i) for i, m in zip(*row, strict=True) if m] for row in zip(ids, masks, strict=True)]
        data = (np.ones((rows, tokens)) * masks.sum(1, keepdims=True)).ravel().tolist()
        outputs = [{**each, "shape": [rows, tokens], "data": data} for each in self.outputs]
        return 200, {"model_name": "odd", "model_version": self.version, "outputs": outputs}


@contextmanager
def speaking(odd: Odd) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def reply(self, code: int, value: Any) -> None:
            odd.headers.append(self.headers.get("authorization"))
            data = value if isinstance(value, bytes) else json.dumps(value).encode()
            self.send_response(code)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self) -> None:
            self.reply(*odd.get(self.path.strip("/")))

        def do_POST(self) -> None:
            self.reply(*odd.post(json.loads(self.rfile.read(int(self.headers["content-length"])))))

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def gpu(odd: Odd, max_batch: int = 5) -> None:
    odd.server["extensions"] = ["model_configuration"]
    odd.config = {"max_batch_size": max_batch, "instance_group": [{"kind": "KIND_GPU", "count": 3}]}


def windows_of(bundle: Path, *lengths: int) -> list[Any]:
    own = Answerer.load(bundle)
    question = own.encoder.encode("Who?")
    context = own.encoder.encode(LONG)
    return [own.encoder.windows(question, context, max_seq_len=n, doc_stride=0)[0] for n in lengths]


def test_a_cpu_gets_windows_one_by_one_and_logits_come_back_in_order(bundle):
    odd = Odd()
    lengths = [20, 50, 20, 33, 90, 21]
    with speaking(odd) as url:
        model = TritonModel(url, "odd", open_bundle(bundle))
        windows = windows_of(bundle, *lengths)
        found = model.run(windows)
    assert model.threads == 4
    assert sorted(odd.requests) == sorted((1, n) for n in lengths)
    assert sorted(odd.rows) == sorted(w.input_ids.tolist() for w in windows)
    assert [(len(starts), starts[0], ends[-1]) for starts, ends in found] == [(n, n, n) for n in lengths]
    assert all(part.dtype == np.float32 for both in found for part in both)


def test_a_gpu_gets_batches_in_multiples_of_64_tokens_up_to_the_models_longest(bundle):
    odd = Odd()
    gpu(odd)
    lengths = [20, 50, 65, 33, 150, 21, 64, 40, 41]
    with speaking(odd) as url:
        model = TritonModel(url, "odd", open_bundle(bundle))
        found = model.run(windows_of(bundle, *lengths))
    assert model.threads == 6  # two for each instance
    assert open_bundle(bundle).encoder.position_limit == 160
    assert sum(rows for rows, _ in odd.requests) == len(lengths)
    assert max(rows for rows, _ in odd.requests) <= 5
    assert {tokens for _, tokens in odd.requests} <= {64, 128, 160}
    assert [starts[0] for starts, _ in found] == lengths
    assert [len(ends) for _, ends in found] == lengths


def test_no_windows_make_no_request(bundle):
    odd = Odd()
    with speaking(odd) as url:
        assert TritonModel(url, "odd", open_bundle(bundle)).run([]) == []
    assert odd.requests == []


def test_headers_go_with_every_request(bundle):
    odd = Odd()
    with speaking(odd) as url:
        TritonModel(url, "odd", open_bundle(bundle), TritonOptions(headers={"Authorization": "Bearer me"})).run(
            windows_of(bundle, 20)
        )
    assert set(odd.headers) == {"Bearer me"}


def changed(**values: Any):
    return lambda odd: [setattr(odd, name, value) for name, value in values.items()]


def replaced(group: str, number: int, **values: Any):
    return lambda odd: getattr(odd, group)[number].update(values)


UNFIT = {
    "inputs": (
        lambda odd: odd.inputs.pop(),
        "takes input_ids, attention_mask, but the bundle needs input_ids, attention_mask, tok",
    ),
    "no inputs": (changed(inputs=[]), "takes nothing, but the bundle needs input_ids"),
    "type": (
        replaced("inputs", 1, datatype="FP32"),
        "takes attention_mask as FP32, but the bundle needs INT64 or INT32",
    ),
    "outputs": (
        replaced("outputs", 0, name="logits"),
        "gives logits, end_logits, but the bundle needs start_logits, end",
    ),
    "output type": (replaced("outputs", 0, datatype="INT8"), "gives start_logits as INT8, but the bundle needs FP32"),
    "shape": (replaced("inputs", 0, shape=[-1, 384]), r"has input_ids in the shape \[-1, 384\], but the bundle needs"),
    "not ready": (changed(ready=400), "model odd is not ready"),
}


@pytest.mark.parametrize("what", UNFIT)
def test_a_model_that_is_not_the_bundles_is_refused_at_once(what, bundle):
    odd = Odd()
    UNFIT[what][0](odd)
    with speaking(odd) as url, pytest.raises(RemoteError, match=UNFIT[what][1]) as caught:
        TritonModel(url, "odd", open_bundle(bundle))
    assert str(caught.value).startswith(url)


SHORT = {"outputs": [{"name": "start_logits", "datatype": "FP32", "shape": [1, 2], "data": [0.0, 1.0]}]}
ANSWERS = {
    "its error": ((500, {"error": "out of memory"}), "odd: out of memory"),
    "no JSON": ((200, b"<html>"), "no inference server answers"),
    "shape": ((200, SHORT), r"odd answered float32 \[1, 2\] for start_logits, but float \[1, 20\] is needed"),
    "nothing": ((200, {"outputs": []}), "odd answered nothing for start_logits"),
}


@pytest.mark.parametrize("what", ANSWERS)
def test_an_answer_that_is_none_is_an_error(what, bundle):
    odd = Odd()
    odd.answer, message = ANSWERS[what]
    with speaking(odd) as url:
        model = TritonModel(url, "odd", open_bundle(bundle))
        with pytest.raises(RemoteError, match=message):
            model.run(windows_of(bundle, 20))
        odd.answer = None
        assert len(model.run(windows_of(bundle, 20))) == 1  # and the next call is well


def test_int32_inputs_are_sent_as_such(bundle):
    odd = Odd()
    for each in odd.inputs:
        each["datatype"] = "INT32"
    seen: list[str] = []
    answer = odd.post
    odd.post = lambda body: (seen.extend(each["datatype"] for each in body["inputs"]), answer(body))[1]  # type: ignore[method-assign]
    with speaking(odd) as url:
        TritonModel(url, "odd", open_bundle(bundle)).run(windows_of(bundle, 20))
    assert seen == ["INT32"] * 3


def test_another_version_than_at_first_is_an_error(bundle):
    odd = Odd()
    with speaking(odd) as url:
        model = TritonModel(url, "odd", open_bundle(bundle))
        odd.version = "2"
        with pytest.raises(
            RemoteError,
            match="now answers with version 2 of odd, but this client was made for version 1: make a new one",
        ):
            model.run(windows_of(bundle, 20))


def test_nobody_answers(bundle):
    port = free_port()
    with pytest.raises(RemoteError, match=rf"http://127.0.0.1:{port}: no inference server answers \(Connection"):
        triton_answerer(f"http://127.0.0.1:{port}", bundle)
    with pytest.raises(RemoteError, match=r"http://nowhere\.invalid:8000: no inference server answers"):
        triton_answerer("http://nowhere.invalid:8000", bundle)


def test_a_server_that_takes_too_long(bundle):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(RemoteError, match=rf"{url}: did not answer within 0.3 s: raise timeout"):
            triton_answerer(url, bundle, timeout=0.3)


@pytest.mark.parametrize(
    "url", ["localhost:8000", "grpc://localhost:8001", "", "http://", "http://h:port", "http://h:1/?a=1"]
)
def test_what_is_no_url_is_named(url, bundle):
    with pytest.raises(InputError, match="give a URL such as http://localhost:8000"):
        triton_answerer(url, bundle)


def test_a_bundle_with_its_spans_in_the_graph_names_the_one_to_load(repository):
    with pytest.raises(BundleError, match=r"its graph answers by itself \(spans in the graph\).* made from, keepers$"):
        triton_answerer("http://localhost:1", repository / "keepers-spans/1")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"batch": 0}, "batch 0 is below 1"),
        ({"multiple": 0}, "multiple 0 is below 1"),
        ({"connections": 0}, "connections 0 is below 1"),
        ({"timeout": 0}, "timeout 0 is not above 0 seconds"),
    ],
)
def test_options_out_of_range_are_named(option, message, bundle):
    with pytest.raises(InputError, match=message):
        triton_answerer("http://localhost:1", bundle, **option)
