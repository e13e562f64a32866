"""A real server in its own process: signals, restarts, the real Hugging Face client, and modules it must not load."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlparse

import httpx
import pytest

from qadeploy import Answerer
from tests.conftest import sealed_copy, triplets
from tests.processes_for_tests import ended, succeeded
from tests.servers_for_tests import started

PAIRS = [(str(row["question"]), str(row["context"])) for row in triplets(12)]
BODY = {"question": PAIRS[0][0], "context": PAIRS[0][1]}
HEAVY = ("torch", "transformers", "optimum", "datasets", "accelerate", "onnx", "pyarrow")

# ``qadeploy serve`` whose model takes its time once it is warm, so that requests are running when the signal comes.
SLOW = """
import sys, time
from qadeploy.inference.session import OnnxModel

run, runs = OnnxModel.run, []

def slow(self, windows):
    runs.append(time.sleep(SECONDS if len(runs) >= 2 else 0))
    return run(self, windows)

OnnxModel.run = slow
from qadeploy.cli import main
main(["serve", *sys.argv[1:]])
"""

CLIENT = """
import json, sys
from huggingface_hub import InferenceClient

client = InferenceClient(model=sys.argv[1])
found = [client.question_answering(**call) for call in json.loads(sys.argv[2])]
print(json.dumps(found))
"""

# The server, asked once from a thread of its own process, and then what it has loaded.
LOADED = f"""
import os, signal, sys, threading, urllib.request
import qadeploy.serve
found = [name for name in {HEAVY!r} if name in sys.modules]
assert not found, found
from qadeploy.serve.run import serve
from qadeploy.serve.settings import Settings

def ask(url, service):
    def work():
        body = b'{{"question": "Who keeps the lamp?", "context": "Ada keeps the lamp.", "trace": true}}'
        request = urllib.request.Request(url + "/v1/answer", body, {{"content-type": "application/json"}})
        print(urllib.request.urlopen(request).status)
        for path in ("/", "/docs", "/metrics", "/openapi.json", "/v1/model"):
            print(urllib.request.urlopen(url + path).status)
        print([name for name in {HEAVY!r} if name in sys.modules])
        os.kill(os.getpid(), signal.SIGINT)
    threading.Thread(target=work).start()

serve(sys.argv[1], Settings(port=0, threads=1), ask)
"""


@pytest.fixture(scope="module")
def remote(bundle, tmp_path_factory):
    with started(tmp_path_factory.mktemp("server"), bundle) as server:
        yield server


def slow(bundle, seconds: float) -> tuple[str, ...]:
    return (sys.executable, "-c", SLOW.replace("SECONDS", str(seconds)), str(bundle))


def ask_in_background(url: str, found: list[httpx.Response], **options) -> threading.Thread:
    thread = threading.Thread(target=lambda: found.append(httpx.post(f"{url}/v1/answer", timeout=30, **options)))
    thread.start()
    return thread


def test_the_hugging_face_client_works_unchanged(remote, bundle):
    answerer = Answerer.load(bundle, device="cpu", threads=1)
    question, context = PAIRS[0]
    calls = [{"question": q, "context": c} for q, c in PAIRS]
    several = {"top_k": 3, "max_answer_len": 2, "doc_stride": 8, "max_seq_len": 64}
    calls.append({"question": question, "context": context, "align_to_words": False, **several})
    calls.append({"question": question, "context": context, "handle_impossible_answer": True, "max_question_len": 5})
    environment = {**os.environ, "HF_HUB_OFFLINE": "0"}  # which also forbids loopback
    command = [sys.executable, "-c", CLIENT, remote.url, json.dumps(calls)]
    done = succeeded(command, timeout=60, env=environment)
    found = json.loads(done.stdout)
    expected = [answerer.answer(q, c, align_to_words=True) for q, c in PAIRS]
    expected.append(answerer.answer(question, context, **several))
    expected.append(answerer.answer(question, context, allow_no_answer=True, align_to_words=True))
    for one, answers in zip(found, expected, strict=True):
        shown = [{"answer": a.text, "start": a.start, "end": a.end, "score": pytest.approx(a.score)} for a in answers]
        assert one == (shown if len(shown) > 1 else shown[0])


def test_callers_at_once_share_the_server(remote, bundle):
    expected = [answers[0].text for answers in Answerer.load(bundle, device="cpu", threads=1).answer_batch(PAIRS)]

    def caller(_: int) -> list[str]:
        with httpx.Client(base_url=remote.url, timeout=30) as client:
            replies = [client.post("/v1/answer", json={"question": q, "context": c}).json() for q, c in PAIRS]
        return [reply["answers"][0]["text"] for reply in replies]

    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(caller, range(8))) == [expected] * 8


def test_who_hangs_up_has_his_windows_dropped(bundle, tmp_path):
    with started(tmp_path, bundle, command=slow(bundle, 0.3)) as server:
        place = urlparse(server.url)
        body = json.dumps({"question": "Who keeps the bell?", "context": " ".join(c for _, c in PAIRS * 12)}).encode()
        head = f"POST /v1/answer HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        with socket.create_connection((place.hostname, place.port)) as connection:
            connection.sendall(head.encode() + body)
            wait_for(lambda: metric(server.url, "qadeploy_queue_windows") > 2)
        wait_for(lambda: metric(server.url, "qadeploy_queue_questions") == 0)
        assert metric(server.url, 'qadeploy_dropped_total{reason="disconnect"}') == 1
        assert metric(server.url, 'qadeploy_stage_seconds_count{stage="run"}') <= 3


def test_sigterm_turns_ready_off_then_closes_the_listener_then_finishes_and_ends_with_0(bundle, tmp_path):
    with started(tmp_path, bundle, "--drain-delay", "1", command=slow(bundle, 1.5)) as server:
        assert httpx.get(f"{server.url}/health/ready").status_code == 200
        running: list[httpx.Response] = []
        threads = [ask_in_background(server.url, running, json=BODY)]
        wait_for(lambda: metric(server.url, "qadeploy_queue_questions") == 1)
        server.process.send_signal(signal.SIGTERM)
        begun = time.monotonic()
        wait_for(lambda: httpx.get(f"{server.url}/health/ready").status_code == 503)
        assert time.monotonic() - begun < 1
        assert httpx.get(f"{server.url}/health/live").status_code == 200
        threads.append(ask_in_background(server.url, running, json=BODY))  # requests are still accepted
        wait_for(lambda: not listens(server.url))
        assert 0.9 <= time.monotonic() - begun < 2.5
        for thread in threads:
            thread.join()
        assert [response.status_code for response in running] == [200, 200]
        assert server.process.wait(10) == 0
        assert [event["signal"] for event in server.events("draining")] == ["SIGTERM"]
        assert server.events("stopped")


def test_a_second_signal_ends_it_at_once_with_1(bundle, tmp_path):
    with started(tmp_path, bundle, "--drain-delay", "30") as server:
        server.process.send_signal(signal.SIGTERM)
        wait_for(lambda: httpx.get(f"{server.url}/health/ready").status_code == 503)
        assert server.stop(signal.SIGTERM, 5) == 1
        assert "second signal" in server.log.read_text().splitlines()[-1]


def test_killed_and_started_again_it_is_ready_within_3_seconds(bundle, tmp_path):
    with started(tmp_path, bundle) as server:
        port = str(urlparse(server.url).port)
        httpx.post(f"{server.url}/v1/answer", json=BODY)
        assert server.stop(signal.SIGKILL) == -9
    begun = time.monotonic()
    with started(tmp_path, bundle, "--port", port) as server:
        assert httpx.get(f"{server.url}/health/ready").status_code == 200
        seconds = time.monotonic() - begun
        assert httpx.post(f"{server.url}/v1/answer", json=BODY).json()["answers"][0]["text"] == "Ada"
    print(f"ready again after {seconds:.2f} s")
    if os.getloadavg()[0] < 0.5 * (os.cpu_count() or 1):  # otherwise other work on the machine would be measured too
        assert seconds < 3


def test_a_bundle_whose_model_gives_nan_answers_with_a_typed_error(bundle, tmp_path):
    import numpy as np
    import onnx
    from onnx import numpy_helper

    model = onnx.load(bundle / "model.onnx")
    weight = next(t for t in model.graph.initializer if len(t.dims) == 2 and t.data_type == onnx.TensorProto.FLOAT)
    weight.CopyFrom(numpy_helper.from_array(np.full(list(weight.dims), np.nan, np.float32), weight.name))
    crafted = sealed_copy(bundle, tmp_path / "crafted", model.SerializeToString())
    with started(tmp_path, crafted) as server:
        response = httpx.post(f"{server.url}/v1/answer", json=BODY)
        assert response.status_code == 500
        assert response.json()["error"]["type"] == "bad_logits"
        assert metric(server.url, "qadeploy_bad_logits_total") == 1
        assert httpx.get(f"{server.url}/health/live").status_code == 200


def test_a_running_server_has_loaded_no_training_package(bundle):
    done = succeeded([sys.executable, "-c", LOADED, str(bundle)], timeout=60)
    assert done.stdout.split("\n") == ["200"] * 6 + ["[]", ""]


def test_every_line_of_the_log_is_json_without_texts(remote):
    httpx.post(f"{remote.url}/v1/answer", json=BODY)
    lines = [json.loads(line) for line in remote.log.read_text().splitlines()]
    assert {"time", "level", "event"} <= set.intersection(*(set(line) for line in lines))
    assert remote.events("threads")[0]["source"] == "--threads"
    assert BODY["context"] not in remote.log.read_text()


def test_a_port_that_is_taken_is_named(remote, bundle):
    port = str(urlparse(remote.url).port)
    command = [sys.executable, "-m", "qadeploy", "serve", str(bundle), "--port", port]
    done = ended(command, timeout=60)
    assert done.returncode == 2
    assert done.stderr == f"Error: --host 127.0.0.1 --port {port}: cannot listen there: Address already in use\n"


def metric(url: str, name: str) -> float:
    rows = [row.rpartition(" ") for row in httpx.get(f"{url}/metrics").text.splitlines()]
    return next(float(value) for key, _, value in rows if key == name)


def listens(url: str) -> bool:
    try:
        socket.create_connection((urlparse(url).hostname, urlparse(url).port), timeout=1).close()
    except ConnectionRefusedError:
        return False
    return True


def wait_for(true, seconds: float = 10) -> None:
    begun = time.monotonic()
    while not true():
        assert time.monotonic() - begun < seconds
        time.sleep(0.01)
