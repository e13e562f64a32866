"""The contracts of hosting platforms: SageMaker's two routes, and the Open Inference Protocol, by their own clients."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import tritonclient.http
from tritonclient.utils import InferenceServerException

from qadeploy.serve.answering import answered_by
from tests.conftest import triplets
from tests.processes_for_tests import succeeded
from tests.servers_for_tests import Fixed, around, serving, started

PAIRS = [(str(row["question"]), f"🏮 {row['context']}") for row in triplets(6)]
QUESTION, CONTEXT = PAIRS[0]
INFER = "/v2/models/keepers/infer"


def texts(name: str, values: list[str]) -> dict[str, object]:
    return {"name": name, "shape": [len(values)], "datatype": "BYTES", "data": values}


def body(questions: list[str], contexts: list[str], **more: object) -> dict[str, object]:
    return {"inputs": [texts("question", questions), texts("context", contexts)], **more}


def test_sagemaker_pings_and_invokes(server):
    assert (server.get("/ping").status_code, server.get("/ping").content) == (200, b"")
    asked = {"question": QUESTION, "context": CONTEXT, "top_k": 2}
    assert server.post("/invocations", asked).json() == server.ask(asked)
    assert server.post("/invocations", {"question": QUESTION}).status_code == 422


def test_platforms_are_told_when_not_to_send(answerer):
    with serving(answerer) as local:
        local.service.draining = True
        paths = ("/ping", "/v2/health/ready", "/v2/models/keepers/ready")
        assert [local.get(path).status_code for path in paths] == [503] * 3
        assert local.get("/v2/health/live").json() == {"live": True}


def test_the_token_guards_answers_and_not_the_health_checks(answerer):
    with serving(answerer, token="secret") as local:
        assert [local.get(path).status_code for path in ("/ping", "/v2/health/live", "/v2/health/ready")] == [200] * 3
        assert [local.get(path).status_code for path in ("/v2", "/v2/models/keepers")] == [401] * 2
        refused = [local.post(path, body([QUESTION], [CONTEXT])) for path in (INFER, "/invocations")]
        assert [response.status_code for response in refused] == [401] * 2


def test_tritons_client_is_answered_as_by_the_library(bundle, answerer, tmp_path):
    def tensor(name: str, values: list[str], shape: list[int], *, binary: bool = False):
        made = tritonclient.http.InferInput(name, shape, "BYTES")
        made.set_data_from_numpy(np.asarray(values, dtype=object).reshape(shape), binary_data=binary)
        return made

    questions, contexts = ([pair[i] for pair in PAIRS] for i in range(2))
    with (
        started(tmp_path, bundle) as server,
        tritonclient.http.InferenceServerClient(server.url.removeprefix("http://")) as client,
    ):
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("keepers")
        described = client.get_model_metadata("keepers")
        assert [each["name"] for each in described["inputs"]] == ["question", "context"]
        for shape, options in (([6], {}), ([6, 1], {"allow_no_answer": True}), ([6], {"max_answer_len": 1})):
            inputs = [tensor("question", questions, shape), tensor("context", contexts, shape)]
            found = client.infer("keepers", inputs, request_id="seven", parameters=options)
            assert found.get_response()["id"] == "seven"
            best = [answers[0] for answers in answerer.answer_batch(PAIRS, **options)]
            assert [a.decode() if isinstance(a, bytes) else a for a in found.as_numpy("answer")] == [
                a.text for a in best
            ]
            assert found.as_numpy("score") == pytest.approx([a.score for a in best], abs=1e-6)
            assert found.as_numpy("start").tolist() == [a.start for a in best]
            assert found.as_numpy("end").tolist() == [a.end for a in best]
        wanted = [tritonclient.http.InferRequestedOutput("end", binary_data=False)]
        inputs = [tensor("question", questions, [6]), tensor("context", contexts[:1], [1])]  # one context for all
        found = client.infer("keepers", inputs, outputs=wanted)
        assert [each["name"] for each in found.get_response()["outputs"]] == ["end"]
        assert found.as_numpy("end").tolist() == [answerer.answer(q, contexts[0])[0].end for q in questions]
        with pytest.raises(InferenceServerException, match=r"binary tensors are not supported"):
            client.infer("keepers", [tensor("question", questions, [6], binary=True), inputs[1]])
        with pytest.raises(InferenceServerException, match="there is no model other here"):
            client.infer("other", inputs)


SDKS = ("sagemaker==2.257.7", "kserve==0.21.0")
CLIENTS = """
import asyncio, json, sys, urllib.parse
from kserve import InferenceRESTClient, InferInput, InferRequest, RESTConfig
from sagemaker.local.entities import _wait_for_serving_container
from sagemaker.local.local_session import LocalSagemakerRuntimeClient

url, question, context = sys.argv[1:]
port = urllib.parse.urlparse(url).port
_wait_for_serving_container(port)
sagemaker = LocalSagemakerRuntimeClient({"local": {"serving_port": port}})
body = json.dumps({"question": question, "context": context})
invoked = sagemaker.invoke_endpoint(body, "qa", ContentType="application/json", Accept="application/json")

async def infer():
    client = InferenceRESTClient(RESTConfig(protocol="v2", retries=0))
    inputs = [InferInput("question", [1], "BYTES", [question]), InferInput("context", [1], "BYTES", [context])]
    ready = [await client.is_server_live(url), await client.is_server_ready(url), await client.is_model_ready(url, "keepers")]
    found = await client.infer(url, InferRequest("keepers", inputs), model_name="keepers")
    try:
        await client.infer(url, InferRequest("keepers", inputs[:1]), model_name="keepers")
    except Exception as error:
        return ready, {each.name: each.data[0] for each in found.outputs}, str(error)

print(json.dumps([json.loads(invoked["Body"].data), *asyncio.run(infer())]))
"""


@pytest.mark.slow
def test_the_sdks_of_sagemaker_and_kserve(bundle, answerer, tmp_path):
    """Installs half a gigabyte of packages in a separate environment."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-compile", *SDKS], check=True)
    with started(tmp_path, bundle) as server:
        command = [python, "-c", CLIENTS, server.url, QUESTION, CONTEXT]
        said = succeeded(command, cwd=tmp_path).stdout
    invoked, ready, found, refused = json.loads(said.splitlines()[-1])
    best = answerer.answer(QUESTION, CONTEXT)[0]
    assert ready == [True] * 3
    assert (found["answer"], found["start"], found["end"]) == (best.text, best.start, best.end)
    assert found["score"] == pytest.approx(best.score, abs=1e-6)
    assert [invoked["answers"][0][name] for name in ("text", "start", "end")] == [best.text, best.start, best.end]
    assert "give the inputs question and context, each once" in refused


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"inputs": [texts("question", [QUESTION])]}, "give the inputs question and context"),
        ({"inputs": [texts("question", [QUESTION]), texts("text", [CONTEXT])]}, "give the inputs question and context"),
        (
            {"inputs": [texts("question", [QUESTION])] * 2 + [texts("context", [CONTEXT])]},
            "give the inputs question and",
        ),
        (body([QUESTION] * 3, [CONTEXT] * 2), "3 questions need as many contexts, or one for all of them, not 2"),
        (body([], []), "0 questions need as many contexts"),
        (body([QUESTION, " "], [CONTEXT]), "question 2 is empty"),
        (body([QUESTION], [""]), "context 1 is empty"),
        ({"inputs": [texts("question", [QUESTION]), {**texts("context", [CONTEXT]), "datatype": "FP32"}]}, "BYTES"),
        ({"inputs": [texts("question", [QUESTION]), {**texts("context", [CONTEXT]), "data": [1.5]}]}, "strings"),
        ({"inputs": [texts("question", [QUESTION]), {**texts("context", [CONTEXT]), "shape": [2]}]}, "has 1 values"),
        (body([QUESTION], [CONTEXT], outputs=[{"name": "answers"}]), "there is no output answers: choose from answer,"),
        (body([QUESTION], [CONTEXT], parameters={"max_answer_len": 0}), "parameters.max_answer_len"),
        (
            body([QUESTION], [CONTEXT], parameters={"top_k": 2}),
            "top_k is not supported here, because the outputs hold one",
        ),
        (body([QUESTION], [CONTEXT], parameters={"trace": True}), "trace is not supported here"),
        (body([QUESTION], [CONTEXT], parameters={"snippet": 20}), "snippet is not supported here"),
        (body([QUESTION] * 65, [CONTEXT]), "the request holds 65 questions"),
    ],
)
def test_what_is_wrong_is_named(server, given, message):
    response = server.post(INFER, given)
    assert response.status_code == 422
    assert message in response.json()["error"]
    assert response.json()["request_id"] == response.headers["x-request-id"]


def test_a_context_without_an_answer_gives_an_empty_one(server):
    found = server.post(INFER, body([QUESTION], ["\u200b"])).json()
    assert [each["data"] for each in found["outputs"]] == [[""], [0.0], [0], [0]]


def test_parameters_of_other_servers_and_defaults_are_ignored_and_min_score_is_not(server):
    defaults = {"top_k": 1, "trace": False, "snippet": None, "binary_data_output": True, "priority": 2}
    best = server.post(INFER, body([QUESTION], [CONTEXT])).json()["outputs"]
    assert server.post(INFER, body([QUESTION], [CONTEXT], parameters=defaults)).json()["outputs"] == best
    found = server.post(INFER, body([QUESTION], [CONTEXT], parameters={"min_score": 1.0})).json()["outputs"]
    assert [each["data"] for each in found] == [[""], [0.0], [0], [0]]


def test_a_model_that_fails_is_an_error_and_no_answer(answerer):
    with serving(around(answerer, Fixed(float("nan")))) as local:
        assert local.post(INFER, body([QUESTION], [CONTEXT])).status_code == 500


def test_the_limit_counts_questions_and_not_tensors(answerer):
    with serving(answerer, max_batch=1) as local:
        assert local.post(INFER, body([QUESTION], [CONTEXT])).status_code == 200
        refused = local.post(INFER, body([QUESTION] * 2, [CONTEXT]))
        assert (refused.status_code, refused.json()["error"]) == (
            422,
            "the request holds 2 questions, at most 1 are allowed (--max-batch)",
        )


def test_the_version_is_that_of_the_bundle_that_answers_even_if_a_reload_comes_between(answerer, monkeypatch):
    async def reloaded(request, service, *given):
        found = await answered_by(request, service, *given)
        service.engine = replace(service.engine, hash="new")
        return found

    monkeypatch.setattr("qadeploy.serve.contracts.answered_by", reloaded)
    with serving(answerer) as local:
        found = [local.post(INFER, body([QUESTION], [CONTEXT])).json()["model_version"] for _ in range(2)]
    assert found == [answerer.bundle.hash, "new"]
