"""The API in this process: its forms, its errors, its limits, and its description of itself."""

from __future__ import annotations

import asyncio
import json
import logging
import time

import httpx
import pytest

from qadeploy.core.settings import Options
from qadeploy.errors import InputError
from qadeploy.serve.run import JsonFormatter
from qadeploy.serve.settings import Settings
from tests.conftest import triplets
from tests.servers_for_tests import JSON, Fixed, Gate, around, serving

PAIRS = [(str(row["question"]), str(row["context"])) for row in triplets(12)]
QUESTION, CONTEXT = PAIRS[0]
LONG = " ".join(context for _, context in PAIRS * 4)
EXOTIC = [
    "\U0001f469‍\U0001f469‍\U0001f467 Ada keeps the lamp 🏮 in room 0.",
    "آدا تحتفظ بالجرس 3. Ada keeps the lamp.",
    "एडा दीपक रखती है। Ada keeps the lamp.",
    "Zoë keeps the ångström lamp; naïve café.",
]


def told(answers) -> list[dict]:
    return [pytest.approx(answer.to_dict(), abs=1e-6) for answer in answers]


def error(response: httpx.Response, status: int, kind: str) -> dict:
    assert response.status_code == status, response.text
    assert response.headers["x-request-id"] == response.json()["request_id"]
    found = response.json()["error"]
    assert found["type"] == kind
    assert set(found) == {"type", "message", "limit", "flag"}
    return found


# ---------------------------------------------------------------- answers


def test_one_question(server, answerer):
    found = server.ask({"question": QUESTION, "context": CONTEXT})
    assert found == {"answers": told(answerer.answer(QUESTION, CONTEXT))}
    assert found["answers"][0]["text"] == "Ada"


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 4},
        {"top_k": 3, "max_answer_len": 1},
        {"max_seq_len": 40, "doc_stride": 8},
        {"align_to_words": True},
        {"allow_no_answer": True, "top_k": 2},
        {"prefilter": 1, "top_k": 2},
        {"top_k": 2.0, "max_answer_len": None},
    ],
)
def test_the_options_of_a_call_are_the_answerers(server, answerer, options):
    given = {name: int(value) if isinstance(value, float) else value for name, value in options.items()}
    expected = answerer.answer(QUESTION, LONG, **given)
    assert server.ask({"question": QUESTION, "context": LONG, **options}) == {"answers": told(expected)}


def test_a_batch_and_many_questions_on_one_context(server, answerer):
    batch = server.ask([{"question": q, "context": c, "top_k": 2} for q, c in PAIRS])
    assert batch == [{"answers": told(answers)} for answers in answerer.answer_batch(PAIRS, top_k=2)]
    before = answerer.stats()
    context = LONG + " A context that nobody has asked about."
    many = server.ask({"questions": [q for q, _ in PAIRS], "context": context})
    assert answerer.stats().misses == before.misses + 1
    expected = answerer.answer_batch([(q, context) for q, _ in PAIRS])
    assert many == [{"answers": told(answers)} for answers in expected]
    assert server.ask({"questions": [QUESTION], "context": CONTEXT}) == [
        server.ask({"question": QUESTION, "context": CONTEXT})
    ]


@pytest.mark.parametrize("context", EXOTIC)
def test_offsets_count_code_points(server, context):
    for answer in server.ask({"question": QUESTION, "context": context, "top_k": 5})["answers"]:
        assert context[answer["start"] : answer["end"]] == answer["text"] != ""


def test_the_trace_shows_tokens_windows_and_logits(server, answerer):
    context = EXOTIC[0] + " " + LONG
    found = server.ask({"question": QUESTION, "context": context, "top_k": 2, "trace": True})
    assert found["answers"] == server.ask({"question": QUESTION, "context": context, "top_k": 2})["answers"]
    reading = answerer.read(QUESTION, context, Options(top_k=2))
    trace = found["trace"]
    assert len(trace["windows"]) == len(reading.windows) > 1
    for shown, window, (starts, ends) in zip(trace["windows"], reading.windows, reading.logits, strict=True):
        assert shown["input_ids"] == window.input_ids.tolist()
        assert shown["start_logits"] == pytest.approx(starts.tolist(), abs=1e-3)
        assert shown["end_logits"] == pytest.approx(ends.tolist(), abs=1e-3)
        assert len(shown["pieces"]) == len(shown["offsets"]) == shown["tokens"] == len(window)
        inside = [i for i, offset in enumerate(shown["offsets"]) if offset is not None]
        first = shown["context_begin"]
        assert inside == list(range(first, first + shown["context_length"]))
        for i in inside:
            start, end = shown["offsets"][i]
            piece = shown["pieces"][i].removeprefix("##")
            assert piece in {"[UNK]", context[start:end].lower()}
    assert trace["candidates"][0]["answer"] == 1


def test_a_context_without_a_token_has_no_answer(server):
    assert server.ask({"question": QUESTION, "context": "​"}) == {"answers": []}
    empty = {"answer": "", "score": 0.0, "start": 0, "end": 0}
    assert server.post("/", {"inputs": {"question": QUESTION, "context": "​"}}).json() == empty


def test_the_hugging_face_task_has_its_shapes(server, answerer):
    def post(inputs, **parameters):
        response = server.post("/", {"inputs": inputs, "parameters": parameters, "options": {"use_cache": False}})
        assert response.status_code == 200, response.text
        return response.json()

    def shape(answers):
        return [pytest.approx({"answer": a.text, "score": a.score, "start": a.start, "end": a.end}) for a in answers]

    one, other = ({"question": q, "context": c} for q, c in PAIRS[:2])
    best = [answerer.answer(q, c, top_k=2, align_to_words=True) for q, c in PAIRS[:2]]
    assert post(one) == post(one, top_k=1) == post(one, top_k=None) == shape(best[0])[0]
    assert post(one, top_k=2) == shape(best[0])
    assert post([one, other]) == [shape(best[0])[0], shape(best[1])[0]]
    assert post([one], top_k=2) == [shape(best[0])]
    pieces = answerer.answer(QUESTION, CONTEXT, top_k=4, max_answer_len=1)
    assert post(one, top_k=4, max_answer_len=1, align_to_words=False, max_question_len=3) == shape(pieces)
    null = answerer.answer(QUESTION, CONTEXT, top_k=3, allow_no_answer=True, align_to_words=True)
    assert post(one, top_k=3, handle_impossible_answer=True) == shape(null)


def test_many_callers_at_once_get_their_own_answers(server, answerer):
    expected = [[a.text for a in answers] for answers in answerer.answer_batch(PAIRS, top_k=2)]

    async def ask(client: httpx.AsyncClient):
        bodies = [{"question": q, "context": c, "top_k": 2} for q, c in PAIRS * 8]
        return await asyncio.gather(*(client.post("/v1/answer", json=body) for body in bodies))

    found = [[a["text"] for a in response.json()["answers"]] for response in server.run(ask)]
    assert found == expected * 8


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"context": CONTEXT}, "question: Field required"),
        ({"question": QUESTION, "context": CONTEXT, "topk": 3}, "topk: Extra inputs"),
        ({"question": QUESTION, "questions": [QUESTION], "context": CONTEXT}, "question: Extra inputs"),
        ({"question": "  ", "context": CONTEXT}, "question: String should match"),
        ({"question": QUESTION, "context": CONTEXT, "top_k": 0}, "top_k: Input should be greater"),
        ({"question": QUESTION, "context": CONTEXT, "top_k": "3"}, "top_k: Input should be a valid integer"),
        ({"question": QUESTION, "context": CONTEXT, "top_k": True}, "top_k: Input should be a valid integer"),
        ({"question": QUESTION, "context": CONTEXT, "top_k": 2.5}, "top_k: Input should be a valid integer"),
        ({"question": QUESTION, "context": 5}, "context: Input should be a valid string"),
        ([], "List should have at least 1 item"),
        (
            [{"question": QUESTION, "context": CONTEXT}, {"question": QUESTION}],
            "1: give either context, or contexts for several passages",
        ),
        ({"questions": [], "context": CONTEXT}, "List should have at least 1 item"),
        ("text", "give an object with question and context"),
        (None, "Field required"),
    ],
)
def test_bodies_of_another_form_are_named(server, body, message):
    assert message in error(server.post("/v1/answer", body), 422, "invalid_request")["message"]


@pytest.mark.parametrize(
    ("content", "status", "kind"),
    [
        (b"", 422, "invalid_request"),
        (b"{", 422, "invalid_request"),
        (b'{"question": "Who?", "context": "\xff"}', 400, "bad_request"),
        (b'{"question": "Who?", "context": "\\ud800 keeps the lamp"}', 422, "invalid_request"),
        (b'{"\\ud800": 1, "question": "Who?", "context": "Ada"}', 422, "invalid_request"),
        (b'{"question": "Who?", "context": "Ada", "top_k": 1e999}', 422, "invalid_request"),
        (b'{"question": "Who?", "context": "Ada", "top_k": ' + b"9" * 5000 + b"}", 400, "bad_request"),
        (b"[" * 100_000, 400, "bad_request"),
    ],
)
def test_what_is_no_json_or_no_text_is_refused(server, content, status, kind):
    error(server.request("POST", "/v1/answer", content=content, headers=JSON), status, kind)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"max_seq_len": 10_000}, "invalid_input", "more than the model's limit of"),
        ({"max_seq_len": 10**309}, "invalid_input", "max_seq_len must be a whole number from 1, not one of over"),
        ({"doc_stride": 10**309}, "invalid_input", "doc_stride must be a whole number from 0, not one of over"),
        ({"max_seq_len": 4}, "question_too_long", "leaves no room"),
        ({"max_seq_len": 30, "doc_stride": 30}, "stride", "doc_stride must be below max_seq_len 30"),
        ({"max_seq_len": 14, "doc_stride": 1}, "too_many_windows", "at most 20 are allowed"),
    ],
)
def test_options_that_do_not_fit_are_named(answerer, options, kind, message):
    with serving(answerer, max_windows=20) as local:
        found = error(local.post("/v1/answer", {"question": "Who?", "context": LONG, **options}), 422, kind)
    assert message in found["message"]
    assert found["flag"] == ("--max-windows" if kind == "too_many_windows" else None)


def test_a_question_that_leaves_no_more_than_doc_stride_is_answered(server, answerer):
    room = 30 - len(answerer.encoder.encode(QUESTION)) - answerer.encoder.special_tokens
    body = {"question": QUESTION, "context": LONG, "max_seq_len": 30, "doc_stride": room}
    (expected,) = told(answerer.answer(QUESTION, LONG, max_seq_len=30, doc_stride=room // 2))
    response = server.post("/v1/answer", body)
    assert response.status_code == 200, response.text
    assert response.json()["answers"] == [expected]


@pytest.mark.parametrize(
    ("setting", "value", "body", "kind", "status"),
    [
        ("max_body_bytes", 100, {"question": QUESTION, "context": CONTEXT + " " * 100}, "body_too_large", 413),
        ("max_context_chars", 10, {"question": QUESTION, "context": CONTEXT}, "context_too_long", 422),
        ("max_question_chars", 5, {"question": QUESTION, "context": CONTEXT}, "question_too_long", 422),
        ("max_batch", 2, [{"question": QUESTION, "context": CONTEXT}] * 3, "batch_too_large", 422),
        ("max_batch", 2, {"questions": [QUESTION] * 3, "context": CONTEXT}, "batch_too_large", 422),
        ("max_top_k", 3, {"question": QUESTION, "context": CONTEXT, "top_k": 4}, "top_k_too_large", 422),
        (
            "max_answer_tokens",
            9,
            {"question": QUESTION, "context": CONTEXT, "max_answer_len": 10},
            "answer_too_long",
            422,
        ),
        ("max_windows", 2, {"question": QUESTION, "context": LONG}, "too_many_windows", 422),
    ],
)
def test_each_limit_has_an_error_that_names_it_and_its_flag(answerer, setting, value, body, kind, status):
    with serving(answerer, **{setting: value}) as local:
        found = error(local.post("/v1/answer", body), status, kind)
        flag = "--" + setting.replace("_", "-")
        assert found["limit"] == value
        assert found["flag"] == flag
        assert flag in found["message"]
        assert local.post("/v1/answer", {"question": "Who?", "context": "Ada"}).status_code == 200
        assert local.get("/v1/model").json()["limits"][setting] == value


def test_a_prefilter_keeps_a_long_context_within_the_limit_of_windows(answerer):
    body = {"question": QUESTION, "context": LONG, "trace": True}
    with serving(answerer, max_windows=2) as local:
        found = local.ask({**body, "prefilter": 2})
        assert len(found["trace"]["windows"]) == len(found["trace"]["prefilter"]["read"]) == 2
        assert len(found["trace"]["prefilter"]["scores"]) > 2
        refused = error(local.post("/v1/answer", {**body, "prefilter": 3}), 422, "too_many_windows")
        assert "lower prefilter" in refused["message"]
        assert error(local.post("/v1/answer", {**body, "prefilter": 0}), 422, "invalid_request")


def test_a_body_is_counted_while_it_streams(answerer):
    sent = []

    async def endless():
        while True:
            sent.append(1)
            yield b" " * 1000

    with serving(answerer, max_body_bytes=10_000) as local:
        found = error(local.request("POST", "/v1/answer", content=endless(), headers=JSON), 413, "body_too_large")
    assert found["limit"] == 10_000
    assert len(sent) <= 12


def test_a_body_that_does_not_come_is_given_up(answerer):
    async def slow():
        yield b"{"
        await asyncio.sleep(10)

    with serving(answerer, request_timeout=0.1) as local:
        found = error(local.request("POST", "/v1/answer", content=slow(), headers=JSON), 408, "slow_body")
    assert found["flag"] == "--request-timeout"


@pytest.mark.parametrize(
    ("method", "path", "status", "kind"),
    [("GET", "/nothing", 404, "not_found"), ("GET", "/v1/answer", 405, "method"), ("DELETE", "/", 405, "method")],
)
def test_what_is_not_there_is_an_error_of_the_same_form(server, method, path, status, kind):
    response = server.request(method, path)
    error(response, status, kind)
    assert status == 404 or response.headers["allow"]


def test_a_deadline_a_full_queue_and_a_caller_who_leaves(answerer):
    gate = Gate(answerer.model)
    body = {"question": QUESTION, "context": CONTEXT}
    with serving(around(answerer, gate), request_timeout=0.3, max_queue=2) as local:
        gate.closed = True

        async def ask(client: httpx.AsyncClient):
            first = [asyncio.ensure_future(client.post("/v1/answer", json=body)) for _ in range(2)]
            await asyncio.sleep(0.1)
            started = time.monotonic()
            full = await client.post("/v1/answer", json=body)
            assert time.monotonic() - started < 0.15
            return full, await asyncio.gather(*first)

        full, late = local.run(ask)
        found = error(full, 429, "queue_full")
        assert (found["limit"], found["flag"]) == (2, "--max-queue")
        assert int(full.headers["retry-after"]) >= 1
        for response in late:
            assert error(response, 504, "deadline")["flag"] == "--request-timeout"
        assert local.metric("qadeploy_queue_questions") == 0
        gate.open.set()
        assert local.ask(body)["answers"]
        assert local.metric('qadeploy_dropped_total{reason="full"}') == 1
        assert local.metric('qadeploy_dropped_total{reason="deadline"}') == 2
        assert local.metric('qadeploy_requests_total{route="/v1/answer",status="504"}') == 2
        assert local.metric('qadeploy_requests_total{route="/v1/answer",status="429"}') == 1


def test_who_leaves_has_his_windows_dropped(answerer):
    gate = Gate(answerer.model)
    with serving(around(answerer, gate)) as local:
        gate.closed = True
        before = len(gate.ran)
        statuses = []

        async def leave():
            messages = [
                {"type": "http.request", "body": json.dumps({"question": QUESTION, "context": LONG}).encode()},
                {"type": "http.disconnect"},
            ]

            async def receive():
                if len(messages) == 1:
                    while len(gate.ran) == before:
                        await asyncio.sleep(0.001)
                return messages.pop(0)

            async def send(message):
                statuses.append(message.get("status"))

            scope = {
                "type": "http",
                "method": "POST",
                "path": "/v1/answer",
                "raw_path": b"/v1/answer",
                "query_string": b"",
            }
            headers = [(b"content-type", b"application/json")]
            await local.app({**scope, "headers": headers, "client": ("test", 1), "server": ("test", 2)}, receive, send)

        asyncio.run(leave())
        assert statuses[0] == 499
        assert local.service.scheduler.idle
        gate.open.set()
        assert local.metric('qadeploy_dropped_total{reason="disconnect"}') == 1
    assert len(gate.ran) == before + 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_are_an_error_and_counted(answerer, value):
    with serving(around(answerer, Fixed(value))) as local:
        for path, body in (
            ("/v1/answer", {"question": QUESTION, "context": CONTEXT}),
            ("/v1/answer", [{"question": QUESTION, "context": CONTEXT}] * 2),
            ("/", {"inputs": {"question": QUESTION, "context": CONTEXT}}),
        ):
            found = error(local.post(path, body), 500, "bad_logits")
            assert "NaN or infinite" in found["message"]
        assert local.metric("qadeploy_bad_logits_total") == 3
        assert local.get("/health/ready").status_code == 200


def test_a_model_that_breaks_tells_the_log_and_not_the_caller(answerer, caplog):
    class Breaks(Fixed):
        broken = False

        def run(self, windows):
            if self.broken:
                raise OSError("secret path /srv/model")
            return super().run(windows)

    model = Breaks(0.0)
    with serving(around(answerer, model)) as local, caplog.at_level(logging.INFO, "qadeploy.serve"):
        model.broken = True
        response = local.post("/v1/answer", {"question": QUESTION, "context": CONTEXT})
        assert "secret" not in response.text
        error(response, 500, "internal")
        assert local.get("/health/live").status_code == 200
    logged = [record for record in caplog.records if record.getMessage() == "answering failed"]
    assert logged[0].fields["request_id"] == response.headers["x-request-id"]
    assert "secret path" in JsonFormatter().format(logged[0])


def test_an_unexpected_error_has_the_headers_of_any_answer_and_its_reason_in_the_log(answerer, caplog, monkeypatch):
    def breaks(*_: object) -> None:
        raise OSError("secret path /srv/model")

    monkeypatch.setattr("qadeploy.serve.answering.check_limits", breaks)
    with serving(answerer, cors_origins=("https://a.example",)) as local, caplog.at_level("INFO", "qadeploy.serve"):
        asked = {"x-request-id": "mine", "origin": "https://a.example"}
        response = local.post("/v1/answer", {"question": QUESTION, "context": CONTEXT}, headers=asked)
    assert "secret" not in response.text
    error(response, 500, "internal")
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["access-control-allow-origin"] == "https://a.example"
    logged = {record.getMessage(): JsonFormatter().format(record) for record in caplog.records}
    assert "secret path" in logged["the server failed"]
    assert '"mine"' in logged["the server failed"]
    assert '"mine"' in logged["request"]


# ---------------------------------------------------------------- tokens, origins, logs


def test_a_token_is_needed_where_one_is_set(answerer):
    body = {"question": QUESTION, "context": CONTEXT}
    with serving(answerer, token="s3cret", protect_metrics=True) as local:
        for path in ("/v1/answer", "/"):
            for header in (
                {},
                {"authorization": "Bearer wrong"},
                {"authorization": "s3cret"},
                {"authorization": "Basic s3cret"},
            ):
                response = local.post(path, body, headers=header)
                error(response, 401, "unauthorized")
                assert response.headers["www-authenticate"] == "Bearer"
        right = {"authorization": "bearer s3cret"}
        assert local.post("/v1/answer", body, headers=right).status_code == 200
        assert local.get("/v1/model").status_code == local.get("/metrics").status_code == 401
        assert local.get("/anything").status_code == 401
        for path in ("/", "/docs", "/openapi.json", "/health/live", "/health/ready", "/static/reference.css"):
            assert local.get(path).status_code == 200
        assert local.get("/metrics", headers=right).status_code == 200
        assert local.get("/openapi.json").json()["paths"]["/v1/answer"]["post"]["security"]
    with serving(answerer, token="s3cret") as local:
        assert local.get("/metrics").status_code == 200


@pytest.mark.parametrize("token", ["", " a", "tök", "a\nb"])
def test_a_token_that_no_header_can_hold_is_refused(token):
    with pytest.raises(InputError, match="--token"):
        Settings(token=token)


def test_while_it_drains_it_answers_and_closes_connections(answerer):
    with serving(answerer) as local:
        assert "connection" not in local.get("/health/ready").headers
        local.service.draining = True
        assert local.get("/health/ready").json() == {"status": "draining"}
        assert local.get("/health/live").status_code == 200
        response = local.post("/v1/answer", {"question": QUESTION, "context": CONTEXT})
        assert (response.status_code, response.headers["connection"]) == (200, "close")


def test_a_worker_that_died_is_not_said_to_drain(answerer, monkeypatch):
    with serving(answerer) as local:
        monkeypatch.setattr(type(local.service.scheduler), "alive", property(lambda self: False))
        response = local.get("/health/ready")
        assert (response.status_code, response.json()) == (503, {"status": "broken"})


def test_other_origins_are_refused_unless_they_are_named(answerer, server):
    asked = {"origin": "https://a.example", "access-control-request-method": "POST"}
    response = server.request("OPTIONS", "/v1/answer", headers=asked)
    assert "access-control-allow-origin" not in response.headers
    assert "access-control-allow-origin" not in server.get("/v1/model", headers=asked).headers
    with serving(answerer, cors_origins=("https://a.example",), token="t") as local:
        response = local.request("OPTIONS", "/v1/answer", headers=asked)
        assert response.headers["access-control-allow-origin"] == "https://a.example"
        other = local.request("OPTIONS", "/v1/answer", headers={**asked, "origin": "https://b.example"})
        assert "access-control-allow-origin" not in other.headers


def test_the_log_has_ids_and_figures_and_texts_only_where_they_are_asked_for(answerer, caplog):
    body = [{"question": QUESTION, "context": CONTEXT}] * 2
    with serving(answerer) as local, caplog.at_level(logging.DEBUG, "qadeploy.serve"):
        kept = local.post("/v1/answer", body, headers={"x-request-id": "abc-1.2"})
        made = local.post("/v1/answer", {"question": QUESTION, "contxt": CONTEXT}, headers={"x-request-id": "a b"})
        local.get("/health/ready")
    assert kept.headers["x-request-id"] == "abc-1.2"
    assert len(made.headers["x-request-id"]) == 32
    records = [r for r in caplog.records if r.getMessage() == "request"]
    lines = [json.loads(JsonFormatter().format(r)) for r in records]
    assert [(x["status"], x["route"], x["level"]) for x in lines] == [
        (200, "/v1/answer", "info"),
        (422, "/v1/answer", "info"),
        (200, "/health/ready", "debug"),
    ]
    assert lines[0] | {"request_id": "abc-1.2", "questions": 2, "windows": 2, "method": "POST"} == lines[0]
    assert lines[1]["error"] == "invalid_request"
    assert CONTEXT not in caplog.text
    assert QUESTION not in "".join(JsonFormatter().format(r) for r in caplog.records)
    with serving(answerer, log_text=True) as local, caplog.at_level(logging.INFO, "qadeploy.serve"):
        local.post("/v1/answer", body)
    asked = [r.fields["asked"] for r in caplog.records if r.getMessage() == "asked"]
    assert asked == [body]


# ---------------------------------------------------------------- what it tells about itself


def test_the_model_route_gives_the_manifest(server, answerer):
    found = server.get("/v1/model").json()
    assert found["manifest"] == answerer.bundle.manifest
    assert (found["name"], found["hash"]) == (answerer.bundle.name, answerer.bundle.hash)
    assert (found["device"], found["workers"]) == ("cpu", 1)


def test_metrics_count_what_was_done(answerer):
    with serving(answerer) as local:
        windows = len(answerer.encode(QUESTION, LONG, Options()).windows)
        local.ask({"question": QUESTION, "context": LONG})
        local.ask([{"question": QUESTION, "context": CONTEXT}] * 3)
        for stage, count in (("queue", 2), ("tokenize", 4), ("run", windows + 3), ("decode", 4)):
            assert local.metric(f'qadeploy_stage_seconds_count{{stage="{stage}"}}') == count
        assert local.metric("qadeploy_batch_windows_sum") == windows + 3
        assert local.metric('qadeploy_requests_total{route="/v1/answer",status="200"}') == 2
        assert local.metric("qadeploy_queue_windows") == local.metric("qadeploy_queue_tokens") == 0
        assert local.metric("process_resident_memory_bytes") > 1e6
        local.get("/a/secret/path")
        text = local.get("/metrics").text
        assert f'hash="{answerer.bundle.hash}"' in text
        assert "secret" not in text
        assert 'route="other",status="404"' in text


def test_a_dead_worker_is_told(answerer):
    with serving(answerer) as local:
        assert local.get("/health/live").json() == {"status": "live"}
        local.service.scheduler.close()
        assert local.get("/health/live").status_code == local.get("/health/ready").status_code == 503


def test_pages_need_nothing_from_elsewhere(server):
    for path in ("/", "/docs"):
        response = server.get(path)
        assert response.headers["content-type"].startswith("text/html")
        policy = response.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "http://" not in response.text.replace("http://www.w3.org", "")
        assert "https://" not in response.text
        assert "<style" not in response.text
        assert " style=" not in response.text
    docs = server.get("/docs").text
    for told in ("POST /v1/answer", "POST /", "GET /metrics", "Retry-After", "Who trims the light?", "max_answer_len"):
        assert told in docs
    assert server.get("/static/../app.py").status_code == 404
    assert server.get("/static/%2e%2e/app.py").status_code == 404


def test_every_answer_has_safe_headers(server):
    for response in (server.get("/"), server.get("/nothing"), server.get("/static/reference.css")):
        assert response.headers["x-content-type-options"] == "nosniff"
