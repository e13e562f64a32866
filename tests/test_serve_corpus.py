"""A server with a corpus: questions without a context, over HTTP."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import threading
from pathlib import Path

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from schemathesis.specs.openapi.checks import positive_data_acceptance

from qadeploy import Answerer, Corpus
from qadeploy.corpus.options import READ
from qadeploy.errors import InputError
from qadeploy.serve.settings import Settings
from qadeploy.shipped import HANDBOOK, base_bundle_path
from tests.cli_for_tests import well
from tests.processes_for_tests import ended
from tests.servers_for_tests import Gate, Local, around, serving, started

_ROWS = [json.loads(line) for line in HANDBOOK.read_text(encoding="utf-8").splitlines()]
QUESTIONS = [row["question"] for row in _ROWS if row["split"] == "validation"][::4]
QUESTION = QUESTIONS[0]
PATIENT = {"request_timeout": 300.0, "max_wait": 300.0}  # on a slow machine nothing is refused
NOTE = "# 🏮 Lamps\n\n## Trimming\n\n🏮🏮 Mungo Strand trims the zyzzyx light at noon.\n"
ABOUT_NOTE = "Who trims the zyzzyx light?"  # only one passage has the word


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The papers of the handbook, and a note beyond the plane of 16 bits."""
    folder = tmp_path_factory.mktemp("papers")
    (folder / "handbook.jsonl").write_bytes(HANDBOOK.read_bytes())
    (folder / "note.md").write_text(NOTE, encoding="utf-8")
    (folder / "photo.png").write_bytes(b"no text")
    return folder


@pytest.fixture(scope="module")
def index(folder: Path) -> Path:
    place = folder.parent / f"{folder.name}-index"
    Corpus.build(folder, place)
    return place


@pytest.fixture(scope="module")
def corpus(index: Path) -> Corpus:
    return Corpus.load(index)


@pytest.fixture(scope="module")
def answerer() -> Answerer:
    return Answerer.load(base_bundle_path(), device="cpu", threads=1)


@pytest.fixture(scope="module")
def server(answerer, index):
    with serving(answerer, corpus=str(index), **PATIENT) as local:
        yield local


def told(answers) -> list[dict]:
    return [{**answer.to_dict(), "score": pytest.approx(answer.score, abs=1e-6)} for answer in answers]


def refused(response: httpx.Response, kind: str) -> str:
    assert (response.status_code, response.json()["error"]["type"]) == (422, kind), response.text
    return response.json()["error"]["message"]


def test_questions_are_answered_as_the_library_answers_them(server, corpus, answerer):
    assert len(QUESTIONS) == 50
    spans = {"allow_no_answer": False}  # so that there are some: this model was not trained on the handbook
    found = server.ask({"questions": QUESTIONS[:25]})
    found += server.ask([{"question": each, **spans} for each in QUESTIONS[25:]])
    expected = [corpus.answer(answerer, each) for each in QUESTIONS[:25]]
    expected += [corpus.answer(answerer, each, **spans) for each in QUESTIONS[25:]]
    assert [one["answers"] for one in found] == [told(answers) for answers in expected]
    documents = set()
    for one, question in zip(found, QUESTIONS, strict=True):
        read = [{"document": p.document, "place": p.place, "score": p.score} for p in corpus.search(question, READ)]
        assert one["passages"] == read
        (answer,) = one["answers"]
        if answer["text"]:
            snippet, text = answer["snippet"], corpus.text(answer["document"])
            assert text[answer["start"] : answer["end"]] == answer["text"]
            assert text[snippet["start"] : snippet["end"]] == snippet["text"]
            assert read[answer["passage"]]["document"] == answer["document"]
            documents.add(answer["document"])
    assert len(documents) > 10


def test_the_command_says_the_same(server, index):
    asked = well("ask", base_bundle_path(), "--corpus", index, "--question", QUESTION, "--top-k", "3", "--json")
    expected, found = json.loads(asked.stdout), server.ask({"question": QUESTION, "top_k": 3})
    assert found["passages"] == expected["passages"]
    assert found["answers"] == [
        {**each, "score": pytest.approx(each["score"], abs=1e-6)} for each in expected["answers"]
    ]


def test_each_question_of_a_batch_takes_a_verdict_with_offsets_as_in_the_response(answerer, tmp_path):
    path, text = tmp_path / "feedback.jsonl", "# Pub\n\n" + "The pub is quiet on Monday. 🏮\n\n" * 200 + NOTE
    (tmp_path / "note.md").write_text(text, encoding="utf-8")
    Corpus.build(tmp_path / "note.md", tmp_path / "index")
    with serving(answerer, corpus=str(tmp_path / "index"), feedback=str(path), **PATIENT) as local:
        asked = {"questions": ["When is the pub quiet?", ABOUT_NOTE], "allow_no_answer": False}
        response = local.post("/v1/answer", asked)

        def say(**what: object) -> int:
            body = {"request_id": response.headers["x-request-id"], **what}
            return local.post("/v1/feedback", body).status_code

        last = text.rindex("o")  # the passage has several
        assert say(question=1, verdict="wrong", answer={"text": "o"}) == 422
        assert say(question=1, verdict="wrong", answer={"text": "o", "start": 0}) == 422
        assert say(question=1, verdict="wrong", answer={"text": "o", "start": last}) == 204
        assert say(question=0, verdict="right") == 204
    first, second = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    assert first["question"] == ABOUT_NOTE
    assert first["answer_start"] == first["context"].rindex("o") < last
    assert (second["question"], second["answer"]) == (asked["questions"][0], response.json()[0]["answers"][0]["text"])


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 4, "offsets": "utf16", "snippet": 5},
        {"offsets": "utf8", "snippet": "sentence"},
        {"top_k": 3, "allow_no_answer": True},
        {"prefilter": 1, "min_score": 0.01, "distinct": True},
    ],
)
def test_options_hold_as_in_the_library(server, corpus, answerer, options):
    assert server.ask({"question": ABOUT_NOTE, **options})["answers"] == told(
        corpus.answer(answerer, ABOUT_NOTE, **options)
    )


def test_offsets_count_what_was_asked_for_in_the_document(server):
    utf16 = NOTE.encode("utf-16-le")
    answers = server.ask({"question": ABOUT_NOTE, "top_k": 5, "offsets": "utf16"})["answers"]
    (best, *_) = [answer for answer in answers if answer["document"] == "note.md"]
    assert best["place"] == "🏮 Lamps > Trimming"
    assert utf16[2 * best["start"] : 2 * best["end"]].decode("utf-16-le") == best["text"]


def test_a_question_may_still_bring_its_text_and_one_of_unknown_words_has_no_answer(server):
    context = "Ada keeps the lamp."
    nothing = {"answers": [], "passages": []}
    one = {"question": "Who keeps the lamp?", "context": context}
    unknown = {"question": "Qwrtz?", "trace": True}
    alone, own = server.ask(unknown), server.ask(one)
    assert alone == nothing
    assert (own["answers"][0]["text"], own.keys()) == ("Ada", {"answers"})
    assert "document" not in own["answers"][0]
    mixed = server.ask([{"question": "Qwrtz?"}, one, {"question": QUESTION}, {"question": "Qwrtz?"}])
    assert mixed == [nothing, own, server.ask({"question": QUESTION}), nothing]
    passages = {"question": "Who keeps the lamp?", "contexts": [context, "Cora."]}
    assert server.ask(passages)["answers"][0]["passage"] == 0
    assert server.service.scheduler.idle


def test_the_trace_shows_the_passages(server):
    found = server.ask({"question": QUESTION, "trace": True})
    assert {window["passage"] for window in found["trace"]["windows"]} == set(range(READ))
    assert found["answers"] == server.ask({"question": QUESTION})["answers"]


def test_many_ask_at_once_and_no_search_runs_in_the_event_loop(server, corpus):
    threads = set()

    class Watched(Corpus):
        def search(self, question, limit=20):
            threads.add(threading.current_thread().name.split("_")[0])
            return super().search(question, limit)

    server = Local(server.service)
    before, server.service.corpus = server.service.corpus, Watched.load(corpus.folder)

    async def ask(client: httpx.AsyncClient):
        return await asyncio.gather(*(client.post("/v1/answer", json={"question": q}) for q in QUESTIONS[:12] * 2))

    try:
        found = [response.json()["answers"] for response in server.run(ask)]
    finally:
        server.service.corpus = before
    assert found == [one["answers"] for one in server.ask({"questions": QUESTIONS[:12]})] * 2
    assert threads == {"encode"}


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"max_context_chars": 300}, "context_too_long", "question 1: the 5 passages have"),
        ({"max_windows": 7}, "too_many_windows", "question 2: "),
        ({"max_batch": 1}, "batch_too_large", "--max-batch"),
    ],
)
def test_the_limits_of_passages_hold_for_those_that_are_found(answerer, index, settings, kind, message):
    with serving(answerer, corpus=str(index), **settings) as local:
        assert message in refused(local.post("/v1/answer", {"questions": QUESTIONS[:2]}), kind)
        assert local.service.scheduler.idle


def test_a_deadline_holds_and_the_metrics_count_the_search(answerer, index):
    with serving(answerer, corpus=str(index), **PATIENT) as local:
        local.ask([{"question": QUESTION}, {"question": "Qwrtz?"}, {"question": "Who?", "context": "Ada."}])
        for stage, count in (("search", 2), ("tokenize", 2), ("decode", 3), ("run", READ + 1)):
            assert local.metric(f'qadeploy_stage_seconds_count{{stage="{stage}"}}') == count
        assert local.metric("qadeploy_queue_tokens") == local.metric("qadeploy_queue_questions") == 0
    gate = Gate(answerer.model)
    with serving(around(answerer, gate), corpus=str(index), request_timeout=0.3) as local:
        gate.closed = True
        late = local.post("/v1/answer", {"question": QUESTION})
        gate.open.set()
        assert (late.status_code, late.json()["error"]["type"]) == (504, "deadline")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"question": "Who?", "context": "Ada", "contexts": ["Ada"]}, "or neither for the corpus"),
        ([{"question": "Who?"}, {"question": "Who?", "context": ""}], "1.context: String should have at least 1"),
        ({"question": "Who?", "corpus": "x"}, "corpus: Extra inputs"),
        ("text", "with context unless the corpus is meant"),
    ],
)
def test_bodies_of_another_form_are_named(server, body, message):
    assert message in refused(server.post("/v1/answer", body), "invalid_request")


def test_the_server_says_what_it_answers_from(server, corpus):
    assert server.get("/v1/model").json()["corpus"] == {
        "documents": corpus.documents,
        "passages": corpus.passages,
        "sha256": corpus.hash,
    }
    document = server.get("/openapi.json").json()
    assert f"{corpus.documents} documents" in document["info"]["description"]
    assert "answered from the corpus" in document["paths"]["/v1/answer"]["post"]["description"]
    assert {"document", "place"} <= document["components"]["schemas"]["AnswerOut"]["properties"].keys()
    assert "from the corpus" in server.get("/docs").text


def test_without_a_corpus_a_text_is_needed(answerer):
    with serving(answerer) as local:
        message = refused(local.post("/v1/answer", {"question": "Who?"}), "invalid_request")
        assert message == "body: give either context, or contexts for several passages"
        assert "corpus" not in local.get("/v1/model").json()
        assert "CorpusOne" not in local.get("/openapi.json").text


def test_the_document_holds_for_anything_that_is_sent(server):
    document = schemathesis.openapi.from_asgi("/openapi.json", server.app)
    operation = next(one.ok() for one in document.get_all_operations() if one.ok().label == "POST /v1/answer")
    statuses = set()

    @hypothesis_settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy())
    def hold(case):
        statuses.add(case.call_and_validate(excluded_checks=[positive_data_acceptance]).status_code)

    hold()
    assert 200 in statuses
    assert max(statuses) < 500


def test_texts_of_the_corpus_are_not_logged(answerer, index, caplog):
    with serving(answerer, corpus=str(index), log_text=True) as local, caplog.at_level(logging.INFO, "qadeploy.serve"):
        local.ask({"question": ABOUT_NOTE})
    assert [r.fields["asked"] for r in caplog.records if r.getMessage() == "asked"] == [[{"question": ABOUT_NOTE}]]
    assert "Mungo" not in "".join(str(getattr(record, "fields", "")) for record in caplog.records)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"corpus": ""}, "--corpus is empty"),
        ({"feedback": ""}, "--feedback is empty: give a file, or leave it out"),
        ({"host": ""}, "--host is empty: give an address, or leave it out"),
        ({"corpus": "x", "corpus_passages": 9, "max_passages": 8}, "--corpus-passages is 9, but a question may have 8"),
        ({"corpus_passages": 101}, "corpus_passages must be a whole number from 1 to 100"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        Settings(**settings)


def test_documents_are_indexed_before_the_server_says_that_it_is_ready(folder, corpus, tmp_path):
    cache = str(tmp_path / "cache")
    with started(
        tmp_path, base_bundle_path(), "--corpus", str(folder), "--corpus-passages", "2", QADEPLOY_CACHE=cache
    ) as remote:
        found = httpx.post(f"{remote.url}/v1/answer", json={"question": ABOUT_NOTE}, trust_env=False).json()
        assert len(found["passages"]) == 2
        assert found["passages"][0]["document"] == "note.md"
        (opened,) = remote.events("corpus")
        assert (opened["documents"], opened["passages"]) == (corpus.documents, corpus.passages)
        (left_out,) = remote.events("not in the corpus")
        assert any(line.startswith("photo.png: ") for line in left_out["skipped"])
        assert remote.stop() == 0


@pytest.mark.parametrize(
    ("make", "code", "message"),
    [
        (lambda place: None, 2, "no such file or folder"),
        (lambda place: place.mkdir(), 2, "holds no files"),
        (lambda place: place.write_bytes(b"\xff\xfe\x00"), 2, "no file can be read"),
    ],
    ids=["nowhere", "empty", "unreadable"],
)
def test_a_corpus_that_cannot_be_used_is_one_error(make, code, message, tmp_path):
    place = tmp_path / "papers.txt"
    make(place)
    command = [sys.executable, "-m", "qadeploy", "serve", str(base_bundle_path()), "--corpus", str(place)]
    found = ended([*command, "--port", "0", "--threads", "1"], timeout=120)
    error = "\n".join(line for line in found.stderr.splitlines() if not line.startswith("{"))
    assert (found.returncode, found.stdout, "Traceback" in error) == (code, "", False)
    assert str(place) in error
    assert message in error
