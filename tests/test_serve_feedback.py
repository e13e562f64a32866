"""Verdicts on answers: the file on the disk, refusals, and that check and train read the rows."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
from pathlib import Path

import httpx
import pytest

from qadeploy.data.loading import read
from qadeploy.errors import InputError
from qadeploy.files import append_line
from qadeploy.serve.feedback import Feedback
from tests.conftest import triplets
from tests.servers_for_tests import serving, started

PAIRS = [(str(row["question"]), f"🏮 {row['context']}") for row in triplets(4)]
QUESTION, CONTEXT = PAIRS[0]
ASKED = {"question": QUESTION, "context": CONTEXT}


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "feedback.jsonl"


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def ask(local, value, route: str = "/v1/answer") -> str:
    response = local.post(route, value)
    assert response.status_code == 200, response.text
    return response.headers["x-request-id"]


def say(local, request_id: str, verdict: str, **more) -> httpx.Response:
    return local.post("/v1/feedback", {"request_id": request_id, "verdict": verdict, **more})


def test_verdicts_become_rows_that_training_reads(answerer, bundle, path):
    best = answerer.answer(QUESTION, CONTEXT)[0]
    with serving(answerer, feedback=str(path)) as local:
        number = ask(local, {**ASKED, "offsets": "utf16", "min_score": 1.0})  # what was sent does not matter
        assert say(local, number, "right").status_code == 204
        right = {"text": "lamp", "start": CONTEXT.index("lamp")}
        assert say(local, ask(local, ASKED), "wrong", answer=right).status_code == 204
        assert say(local, ask(local, ASKED), "wrong", answer={"text": ""}).status_code == 204
        assert say(local, ask(local, ASKED), "wrong").status_code == 204
    first, second, third, fourth = rows(path)
    assert (first["question"], first["context"]) == (QUESTION, CONTEXT)
    assert (first["answer"], first["answer_start"], first["request"]) == (best.text, best.start, f"{number}-0")
    assert first["bundle"] == answerer.bundle.hash
    assert (second["answer"], second["answer_start"], second["predicted"]) == ("lamp", right["start"], best.text)
    assert (third["answer"], third["is_impossible"]) == ("", True)
    assert "answer" not in fourth
    known = path.with_name("known.jsonl")
    for row, expected in ((first, [(best.text, best.start)]), (second, [("lamp", right["start"])]), (third, [])):
        known.write_text(json.dumps(row) + "\n")
        (example,) = read(str(known)).examples
        assert [(a.text, a.start) for a in example.answers] == expected


def test_each_question_of_a_request_and_each_route_has_its_own(answerer, path):
    batch = [{"question": q, "context": c} for q, c in PAIRS]
    passages = {"question": QUESTION, "contexts": [CONTEXT, *(c for _, c in PAIRS[1:])]}
    with serving(answerer, feedback=str(path)) as local:
        number = ask(local, batch)
        for index in (2, 0):
            assert say(local, number, "right", question=index).status_code == 204
        assert say(local, number, "right", question=4).status_code == 404
        assert say(local, ask(local, passages), "right").status_code == 204
        assert say(local, ask(local, {"inputs": ASKED}, "/"), "right").status_code == 204
    found = rows(path)
    assert [row["question"] for row in found[:2]] == [PAIRS[2][0], PAIRS[0][0]]
    best = answerer.answer(QUESTION, contexts=passages["contexts"])[0]
    assert found[2]["context"] == passages["contexts"][best.passage]
    for row in found:
        start = row["answer_start"]
        assert row["context"][start : start + len(row["answer"])] == row["answer"]


def test_a_verdict_that_is_sent_again_is_one_row_and_another_one_is_refused(answerer, path):
    with serving(answerer, feedback=str(path)) as local:
        number = ask(local, ASKED)
        assert [say(local, number, "right").status_code for _ in range(2)] == [204, 204]
        refused = say(local, number, "wrong", answer={"text": ""})
        assert (refused.status_code, refused.json()["error"]["type"]) == (409, "judged")
        local.post("/v1/answer", {"question": PAIRS[1][0], "context": PAIRS[1][1]}, headers={"X-Request-ID": number})
        assert say(local, number, "right").status_code == 204  # another question under the same X-Request-ID
    assert [row["question"] for row in rows(path)] == [QUESTION, PAIRS[1][0]]
    assert len(read(str(path)).examples) == 2


@pytest.mark.parametrize(
    ("verdict", "answer", "message"),
    [
        ("wrong", {"text": "nowhere"}, "does not occur in the context"),
        ("wrong", {"text": "e"}, "times: give answer.start"),
        ("wrong", {"text": "lamp", "start": 1}, "does not occur in the context at answer.start"),
        ("wrong", {"text": "lamp", "start": -1}, "answer.start"),
        ("right", {"text": "lamp"}, "answer is only for the verdict wrong"),
        ("perhaps", None, "verdict"),
    ],
)
def test_what_cannot_be_stored_is_refused(verdict, answer, message, answerer, path):
    with serving(answerer, feedback=str(path)) as local:
        refused = say(local, ask(local, ASKED), verdict, answer=answer)
        assert refused.status_code == 422
        assert message in refused.json()["error"]["message"]
        assert say(local, "unknown", "right").status_code == 404
    assert not path.exists()


def test_without_the_flag_nothing_is_remembered(answerer):
    with serving(answerer) as local:
        assert say(local, ask(local, ASKED), "right").status_code == 404


def test_a_full_file_is_put_aside_and_the_one_before_is_deleted(answerer, path):
    with serving(answerer, feedback=str(path), feedback_bytes=1_000) as local:
        sizes = []
        for _ in range(12):
            assert say(local, ask(local, ASKED), "right").status_code == 204
            sizes.append(sum(each.stat().st_size for each in path.parent.glob("feedback.jsonl*")))
    assert max(sizes) < 3_000
    left = {each.name for each in path.parent.iterdir()}
    assert "feedback.jsonl.1" in left
    assert left <= {"feedback.jsonl", "feedback.jsonl.1"}
    assert rows(path.with_name("feedback.jsonl.1"))


def test_a_verdict_can_be_sent_again_although_newer_questions_have_filled_the_memory(answerer, path, monkeypatch):
    monkeypatch.setattr("qadeploy.serve.feedback._KEPT", 1)  # a single question
    with serving(answerer, feedback=str(path)) as local:

        def evicts(descriptor: int, line: bytes) -> None:
            ask(local, {"question": PAIRS[1][0], "context": PAIRS[1][1]})
            append_line(descriptor, line)

        def fails(descriptor: int, line: bytes) -> None:
            ask(local, {"question": PAIRS[1][0], "context": PAIRS[1][1]})
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        number = ask(local, ASKED)
        monkeypatch.setattr("qadeploy.serve.feedback.append_line", fails)
        assert say(local, number, "right").status_code == 507
        monkeypatch.setattr("qadeploy.serve.feedback.append_line", evicts)
        assert [say(local, number, "right").status_code for _ in range(2)] == [204, 204]
    assert [row["question"] for row in rows(path)] == [QUESTION]


def test_a_full_file_that_cannot_be_put_aside_holds_each_verdict_once(answerer, path, caplog):
    path.with_name("feedback.jsonl.1").mkdir()
    with serving(answerer, feedback=str(path), feedback_bytes=1) as local:
        numbers = [ask(local, ASKED) for _ in range(2)]
        assert [say(local, number, "right").status_code for number in numbers] == [204, 204]
    assert [row["request"] for row in rows(path)] == [f"{number}-0" for number in numbers]
    assert "the full feedback file was not renamed" in caplog.messages


def test_a_full_disk_is_said_and_leaves_nothing_half_written(answerer, path):
    with serving(answerer, feedback=str(path)) as local:
        assert say(local, ask(local, ASKED), "right").status_code == 204
        before, size = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
        number = ask(local, ASKED)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 20, size[1]))
        try:
            refused = say(local, number, "right")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, size)
        assert refused.status_code == 507
        assert "the feedback was not stored" in refused.json()["error"]["message"]
        assert path.read_bytes() == before
        assert say(local, number, "right").status_code == 204
    assert len(rows(path)) == 2


def test_a_kill_loses_no_verdict_and_a_cut_line_is_removed(bundle, path, tmp_path):
    with started(tmp_path, bundle, "--feedback", str(path)) as server:
        reply = httpx.post(f"{server.url}/v1/answer", json=ASKED, timeout=30)
        verdict = {"request_id": reply.headers["x-request-id"], "verdict": "right"}
        assert httpx.post(f"{server.url}/v1/feedback", json=verdict, timeout=30).status_code == 204
        server.stop(signal.SIGKILL)
    whole = path.read_bytes()
    assert len(rows(path)) == 1
    path.write_bytes(whole + whole[:50])
    Feedback(path, 10**6).close()
    assert path.read_bytes() == whole


def test_other_files_and_other_writers_are_left_alone(path):
    path.write_text('{"question": "q", "context": "c", "answer": "c"}\n')
    with pytest.raises(InputError, match="is not a feedback file: give --feedback another name"):
        Feedback(path, 10**6)
    path.unlink()
    first = Feedback(path, 10**6)
    with pytest.raises(InputError, match="another command is writing it"):
        Feedback(path, 10**6)
    first.close()
    assert os.listdir(path.parent) == []
