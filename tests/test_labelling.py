"""``qadeploy label``: its file at any time, its queue, its estimate, and its server."""

from __future__ import annotations

import contextlib
import json
import random
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from qadeploy import Answerer
from qadeploy.core.metrics import score
from qadeploy.data.fields import DataOptions
from qadeploy.data.loading import read
from qadeploy.errors import FailureError, InputError
from qadeploy.labelling.desk import EVERY, DecidedError, Desk, Estimate, is_sampled
from qadeploy.labelling.items import Item, Proposal, key_of, load_items, load_predictions
from qadeploy.labelling.store import Store
from qadeploy.records import Annotation, Answer, Example
from qadeploy.shipped import base_bundle_path
from tests.cli_for_tests import run, well
from tests.conftest import NAMES, triplets, write_jsonl

SILENT = print


def row(number: int, annotator: str = "ada", answer: str = "Ada", **other: Any) -> dict[str, Any]:
    context = f"Ada \U0001f981 keeps {number}."
    fields = {
        "annotator": annotator, "time": f"2026-01-01T00:{number // 60:02}:{number % 60:02}.000Z", "id": f"{number}-{annotator}",
        "context": context, "question": "Who?", "answer": answer, "answer_start": 0 if answer else -1,
        "is_impossible": not answer,
    }  # fmt: skip
    return fields | other


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


class Scores:
    """A model of known certainty: it answers with the first word, and is surer the longer the question."""

    bundle = SimpleNamespace(hash="hash")

    def __init__(self) -> None:
        self.asked: list[str] = []

    def answer(self, question: str, context: str, top_k: int = 1) -> list[Answer]:
        self.asked.append(question)
        end = context.index(" ")
        return [Answer(context[:end], 0, end, len(question) / 1000)]


def rows_to_label(count: int) -> list[Item]:
    """The longer the question, the earlier in the file: the least certain are the last."""
    pairs = [("?" * (count - i), f"{NAMES[i % 12]} keeps lamp {i}.") for i in range(count)]
    return [Item(key_of(*pair), f"row-{i}", pair[1], pair[0]) for i, pair in enumerate(pairs)]


@contextlib.contextmanager
def desk_of(path: Path, items: list[Item], annotator: str = "ada", **options: Any) -> Iterator[Desk]:
    with Store.open(path, annotator) as store:
        desk = Desk(items, store, annotator, options.pop("answerer", Scores()), **options)
        desk._asking.join(10) if not desk.documents else None
        try:
            yield desk
        finally:
            desk.close()


# ---------------------------------------------------------------- the file


def test_the_file_is_training_data_at_any_time(tmp_path):
    place = tmp_path / "rows.jsonl"
    with Store.open(place, "ada") as store:
        assert not place.exists()
        for number, answer in enumerate(["Ada", "", "Ada \U0001f981"]):
            store.append(row(number, answer=answer))
            examples = read(str(place)).examples
            assert len(examples) == number + 1
            assert [a.text for a in examples[-1].answers] == ([answer] if answer else [])
        assert store.undo()["answer"] == "Ada \U0001f981"
        assert len(read(str(place)).examples) == 2
    assert len(lines(place)) == 2


@pytest.mark.parametrize("cut", [1, 5, 20, 150])
def test_a_line_that_was_cut_short_goes_and_nothing_else(tmp_path, cut):
    place = tmp_path / "rows.jsonl"
    with Store.open(place, "ada") as store:
        store.append(row(1))
        whole = place.read_bytes()
        store.append(row(2))
    content = place.read_bytes()
    place.write_bytes(content[: len(whole) + cut])
    with Store.open(place, "ada") as store:
        assert place.read_bytes() == whole
        store.append(row(2))
        assert place.read_bytes() == content
        store.undo()
        store.undo()
        assert place.read_bytes() == b""
        with pytest.raises(FailureError, match="no decision to undo"):
            store.undo()


def test_a_line_that_was_cut_short_behind_a_brace_goes_too(tmp_path):
    place = tmp_path / "rows.jsonl"
    place.write_text('{"annotator": "ada", "context": "{a}')
    with Store.open(place, "ada") as store:
        assert (store.rows, place.read_bytes()) == ([], b"")


def test_a_last_line_that_lacks_only_its_end_is_kept(tmp_path):
    place = tmp_path / "rows.jsonl"
    with Store.open(place, "ada") as store:
        store.append(row(1))
    content = place.read_bytes()
    place.write_bytes(content[:-1])
    with Store.open(place, "ada") as store:
        assert len(store.rows) == 1
        assert place.read_bytes() == content


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ('{"context": "a", "question": "b", "answer": "a"}\n', "line 1: has no field annotator"),
        ('{"context": "a", "question": "b", "answer": "a"}', "line 1: has no field annotator"),
        ("a poem", "line 1: is not a JSON object"),
        ("[1]\n", "line 1: is not a JSON object"),
        (json.dumps(row(1) | {"answer_start": 1.0}) + "\n", "line 1: a field has a value of another type"),
    ],
)
def test_other_data_are_left_alone(tmp_path, content, told):
    place = tmp_path / "rows.jsonl"
    place.write_text(content)
    with pytest.raises(InputError, match=told), Store.open(place, "ada"):
        pass
    assert place.read_text() == content


def test_two_processes_do_not_write_one_file(tmp_path):
    place = tmp_path / "rows.jsonl"
    refused = pytest.raises(InputError, match="another command is writing it")
    with Store.open(place, "ada"), refused, Store.open(place, "bela"):
        pass
    with Store.open(place, "bela"):
        pass


def test_a_file_that_another_program_changes_is_not_written_to(tmp_path):
    place = tmp_path / "rows.jsonl"
    with Store.open(place, "ada") as store:
        store.append(row(1))
        with place.open("a") as stream:
            stream.write("more")
        for change in (lambda: store.append(row(2)), store.undo):
            with pytest.raises(FailureError, match="another program has changed it"):
                change()
        place.unlink()
        with pytest.raises(FailureError, match="moved or deleted"):
            store.append(row(2))
        assert not place.exists()


def test_on_a_full_disk_nothing_of_a_decision_is_left(tmp_path):
    place = tmp_path / "rows.jsonl"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Store.open(place, "ada") as store:
        store.append(row(1))
        content = place.read_bytes()
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(content) + 50, before[1]))
        try:
            with pytest.raises(OSError, match="File too large") as raised:
                store.append(row(2))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert raised.value.filename == str(place)
        assert place.read_bytes() == content
        store.append(row(2))
    assert [each["id"] for each in lines(place)] == ["1-ada", "2-ada"]


WRITER = """
import sys; from pathlib import Path; from qadeploy.labelling.store import Store; from tests.test_labelling import row
with Store.open(Path(sys.argv[1]), "ada") as store:
    print("open", flush=True)
    for number in range(len(store.rows), 10**6):
        store.append(row(number, more="x" * 3000))
        print(number, flush=True)
"""


def test_a_writer_that_is_killed_loses_nothing_that_it_said_was_saved(tmp_path):
    place, chance = tmp_path / "rows.jsonl", random.Random(3)
    saved = -1
    for _ in range(3):
        with subprocess.Popen([sys.executable, "-c", WRITER, str(place)], stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout.readline() == "open\n"
            said = [int(writer.stdout.readline()) for _ in range(chance.randrange(1, 9))]
            time.sleep(chance.random() / 100)
            writer.kill()
            said += [int(line) for line in writer.stdout.read().splitlines()]
        saved = max([saved, *said])
    with Store.open(place, "ada") as store:
        kept = [each["id"] for each in store.rows]
        assert kept in ([f"{n}-ada" for n in range(saved + 1)], [f"{n}-ada" for n in range(saved + 2)])
        last = store.undo()
        assert last["id"] == kept[-1]
    assert len(read(str(place)).examples) == len(kept) - 1


def test_annotators_may_disagree_and_train_still_reads_the_file(tmp_path):
    place, aside = tmp_path / "rows.jsonl", tmp_path / "rows.contradicting.jsonl"
    with Store.open(place, "ada") as store:
        store.append(row(1))
        store.append(row(2))
    with Store.open(place, "bela") as store:
        assert store.rows == []
        with pytest.raises(FailureError, match="no decision"):
            store.undo()
        store.append(row(1, "bela", "keeps") | {"answer_start": 6})
        store.append(row(2, "bela", ""))
        assert (len(lines(place)), len(lines(aside))) == (3, 1)
        assert [len(e.answers) for e in read(str(place)).examples] == [2, 1]
        assert [e.answers for e in read(str(aside)).examples] == [()]
    with Store.open(place, "ada") as store, pytest.raises(FailureError, match="another annotator's follows it"):
        store.undo()
    with Store.open(place, "bela") as store:
        assert store.undo()["question"] == "Who?"
        assert lines(aside) == []


# ---------------------------------------------------------------- what is read


def test_rows_are_read_as_train_reads_them_once_each(tmp_path):
    data = write_jsonl(tmp_path / "q.jsonl", [{"text": "A b.", "question": q} for q in ("Q?", "R?", "Q?")])
    found = load_items(str(data), DataOptions(columns="context=text"), SILENT)
    assert [(i.id, i.context, i.question) for i in found] == [("row-1", "A b.", "Q?"), ("row-2", "A b.", "R?")]


def test_documents_are_cut_into_passages(tmp_path):
    (tmp_path / "a.md").write_text("# Lamps\n\nAda keeps the lamp.\n")
    (tmp_path / "b.bin").write_text("?")
    told: list[str] = []
    found = load_items(str(tmp_path), DataOptions(), told.append)
    assert [(item.document, item.question, "Ada keeps the lamp." in item.context) for item in found] == [
        ("a.md", "", True)
    ]
    assert "b.bin" in told[0]
    assert len(load_items(str(tmp_path / "a.md"), DataOptions(), SILENT)) == 1


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([{"context": "a", "question": ""}], "row 1, field question"),
        ([{"contexts": ["a"], "question": "b"}], "row 1, field contexts: has several passages"),
        ([{"id": "1", "answer": "a", "score": 1, "start": 0, "end": 1}], "--predictions"),
    ],
)
def test_rows_that_cannot_be_labelled_are_named(tmp_path, rows, told):
    data = write_jsonl(tmp_path / "q.jsonl", rows)
    with pytest.raises(InputError, match=told):
        load_items(str(data), DataOptions(), SILENT)


def test_a_folder_without_text_is_refused(tmp_path):
    with pytest.raises(InputError, match="holds no text to label: give a folder with"):
        load_items(str(tmp_path), DataOptions(), SILENT)


def test_answers_of_a_run_are_the_proposals(tmp_path):
    data = write_jsonl(tmp_path / "q.jsonl", triplets(3))
    answers = tmp_path / "answers.jsonl"
    well("answer", base_bundle_path(), "--input", data, "--output", answers)
    items = load_items(str(data), DataOptions(), SILENT)
    found = load_predictions(str(answers), items)
    assert [found[item.key].answer.text for item in items] == [each["answer"] for each in lines(answers)]
    write_jsonl(answers, [each | {"start": 1, "end": 2} for each in lines(answers)])
    with pytest.raises(InputError, match="row 1, field start: the answer is not there"):
        load_predictions(str(answers), items)
    write_jsonl(answers, [each | {"id": "other"} for each in lines(answers)])
    with pytest.raises(InputError, match="no id is that of a row"):
        load_predictions(str(answers), items)
    with pytest.raises(InputError, match="row 1: lacks end, id, score, start"):
        load_predictions(str(data), items)


# ---------------------------------------------------------------- the queue


def test_least_certain_first_and_every_fifth_at_random(tmp_path):
    items = rows_to_label(60)
    sampled = sorted(item.key for item in items if is_sampled(item.key))
    others = [item.key for item in reversed(items) if not is_sampled(item.key)]
    with desk_of(tmp_path / "rows.jsonl", items) as desk:
        shown = []
        while (found := desk.show("tab")) is not None:
            shown.append(found.item.key)
            desk.decide(found.item.key, (0, 3))
    assert [key for key in shown if key in sampled] == sampled
    assert [key for key in shown if key not in sampled] == others
    assert [key in sampled for key in shown[:10]] == [n % EVERY == EVERY - 1 for n in range(10)]
    kept = lines(tmp_path / "rows.jsonl")
    assert len({each["id"] for each in kept}) == 60
    assert len(read(str(tmp_path / "rows.jsonl")).examples) == 60


def test_the_first_row_does_not_wait_for_the_model_to_see_all(tmp_path):
    items, answerer = rows_to_label(10_000), Scores()
    with Store.open(tmp_path / "rows.jsonl", "ada") as store:
        desk = Desk(items, store, "ada", answerer)
        assert desk.show("tab") is not None
        assert len(answerer.asked) < 9_000
        desk.close()


def test_two_tabs_have_different_rows_and_no_row_is_decided_twice(tmp_path):
    with desk_of(tmp_path / "rows.jsonl", rows_to_label(3)) as desk:
        first, second, third = (desk.show(tab).item.key for tab in ("a", "b", "c"))
        assert len({first, second, third}) == 3
        assert desk.show("a").item.key == first
        desk.decide(second, None)
        with pytest.raises(DecidedError, match="decided in another tab"):
            desk.decide(second, (0, 3))
        desk.decide(first, (0, 3))
        assert desk.show("a").item.key == desk.show("b").item.key == third  # all that is left
        desk.decide(third, None)
        assert desk.show("a") is None
        assert desk.counts == (3, 0)
        assert desk.undo("a").item.key == third
        assert desk.show("a").item.key == third
        assert desk.counts == (2, 1)


def test_a_skipped_row_comes_again_when_the_others_are_decided(tmp_path):
    with desk_of(tmp_path / "rows.jsonl", rows_to_label(2)) as desk:
        first = desk.show("a").item.key
        desk.skip("a", first)
        second = desk.show("a").item.key
        desk.decide(second, (0, 3))
        assert (first != second, desk.show("a").item.key) == (True, first)


def test_annotators_see_their_own_rows_only(tmp_path):
    items = rows_to_label(4)
    with desk_of(tmp_path / "rows.jsonl", items) as desk:
        for _ in range(2):
            desk.decide(desk.show("a").item.key, (0, 3))
    with desk_of(tmp_path / "rows.jsonl", items) as desk:
        assert desk.counts == (2, 2)
        assert desk.undo("a").undone["answer_start"] == 0  # from an earlier start of label
        assert desk.counts == (1, 3)
    with desk_of(tmp_path / "rows.jsonl", items, "bela") as desk:
        assert desk.counts == (0, 4)
        assert desk.show("a").undone is None


@pytest.mark.parametrize("span", [(0, 0), (2, 1), (-1, 2), (0, 99), (3, 4)])
def test_a_span_that_is_no_answer_is_refused(tmp_path, span):
    with desk_of(tmp_path / "rows.jsonl", rows_to_label(1)) as desk:
        with pytest.raises(InputError, match="must be a part of the text"):
            desk.decide(desk.show("a").item.key, span)
        assert not (tmp_path / "rows.jsonl").exists()


def test_questions_on_passages(tmp_path):
    items = [Item(key_of("", text), text[:3], text, document="a.md") for text in ("Ada rests.", "Bela keeps.")]
    place = tmp_path / "rows.jsonl"
    with desk_of(place, items) as desk:
        first = desk.show("a").item.key
        assert desk.ask(first, " Who rests? ").text == "Ada"
        desk.decide(first, (0, 3), " Who rests? ")
        with pytest.raises(DecidedError, match="asked this question on this passage already"):
            desk.decide(first, None, "Who rests?")
        with pytest.raises(InputError, match="question is empty"):
            desk.decide(first, None, " ")
        desk.decide(first, None, "Who sleeps?")
        assert desk.show("a").item.key == first
        desk.skip("a", first)
        assert desk.show("a").item.key != first
        assert desk.undo("a").undone["question"] == "Who sleeps?"
        assert desk.show("a").item.key == first
        assert (desk.counts, desk.estimate.total, desk.estimate.exact_match) == ((1, 2), 1, 100.0)
    with desk_of(place, items) as desk:
        assert desk.counts == (1, 1)
        assert desk.show("a").item.key == items[1].key
    assert lines(place)[0]["document"] == "a.md"
    assert read(str(place)).examples[0].question == "Who rests?"


def test_a_typed_question_gets_a_span_though_the_model_says_that_there_is_no_answer(tmp_path):
    text = "It sailed at dawn, before the fog came in."
    answerer = Answerer.load(base_bundle_path(), device="cpu", threads=1)
    place = tmp_path / "rows.jsonl"
    with desk_of(place, [Item(key_of("", text), "a", text)], answerer=answerer) as desk:
        key = desk.show("a").item.key
        refused, best = answerer.answer("Who was the captain?", text, top_k=2)
        assert (refused.text, desk.ask(key, "Who was the captain?")) == ("", best)
        assert text[best.start : best.end] == best.text
        desk.decide(key, (13, 17), "Who was the captain?")  # dawn
        assert desk.estimate.exact_match == 0.0
    assert lines(place)[0]["predicted"] == ""


# ---------------------------------------------------------------- the estimate


def test_the_estimate_is_the_products_metric_on_the_random_rows_only(tmp_path):
    items, chance = rows_to_label(80), random.Random(1)
    with desk_of(tmp_path / "rows.jsonl", items) as desk:
        assert desk.estimate == Estimate(0, None, None)
        for _ in range(60):
            key = desk.show("a").item.key
            right = chance.random() < 0.6
            desk.decide(key, (0, desk._items[key].context.index(" ")) if right else chance.choice([None, (1, 3)]))
        found = desk.estimate
    kept = [each for each in lines(tmp_path / "rows.jsonl") if is_sampled(key_of(each["question"], each["context"]))]
    examples = [
        Example("", e["question"], e["context"], (Annotation(e["answer"], e["answer_start"]),) if e["answer"] else ())
        for e in kept
    ]
    scores = score(examples, [Answer(each["predicted"], 0, 0, 0.0) for each in kept])
    assert found.total == len(kept) > 5
    assert found.exact_match == pytest.approx(scores.exact_match)
    with desk_of(tmp_path / "rows.jsonl", items) as desk:
        assert desk.estimate == found
    other = {item.key: Proposal(Answer("x", 0, 1, 0.5), "another model") for item in items}
    with desk_of(tmp_path / "rows.jsonl", items, predictions=other) as desk:
        assert desk.estimate.total == 0


# ---------------------------------------------------------------- the command and its server


@contextlib.contextmanager
def started(*args: object) -> Iterator[tuple[subprocess.Popen[str], httpx.Client]]:
    command = [sys.executable, "-m", "qadeploy", "label", *map(str, args), "--port", "0", "--json", "--threads", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            line = process.stdout.readline()
            assert line, process.stderr.read()
            url, _, token = json.loads(line)["url"].partition("#")
            with httpx.Client(
                base_url=url, headers={"authorization": f"Bearer {token}"}, trust_env=False, timeout=60
            ) as client:
                yield process, client
        finally:
            process.kill()


def test_over_http_from_the_first_row_to_training_data(tmp_path):
    data, out = write_jsonl(tmp_path / "q.jsonl", triplets(4)), tmp_path / "rows.jsonl"
    asked = [data, "--out", out, "--bundle", base_bundle_path(), "--annotator", "Ada"]
    with started(*asked) as (process, client):

        def call(name: str, **body: Any) -> httpx.Response:
            return client.post(f"v1/label/{name}", json={"tab": "t", **body})

        told = call("show").json()
        assert (told["done"], told["left"], told["annotator"]) == (0, 4, "Ada")
        first = told["row"]
        best = Answerer.load(base_bundle_path(), device="cpu", threads=1).answer(first["question"], first["context"])[0]
        assert first["proposal"]["text"] == best.text
        key, span = first["key"], {"start": best.start, "end": best.end}
        second = call("decide", key=key, question="", **span).json()["row"]["key"]
        assert lines(out)[0]["answer"] == best.text
        again = call("decide", key=key, question="", **span)
        assert (again.status_code, "another tab" in again.text) == (409, True)
        for body in (
            {"start": 0, "end": None},
            {"start": -1, "end": 3},
            {"start": "0", "end": 3},
            {"start": 0.5, "end": 3},
        ):
            assert call("decide", key=second, question="", **body).status_code == 422
        assert call("decide", key="nothing", question="", start=None, end=None).status_code == 422
        assert call("decide", key=second, question="", start=None, end=None).json()["left"] == 2
        # Other websites, with or without the token, and under their own host name.
        for headers in ({"authorization": ""}, {"authorization": "Bearer x"}):
            assert client.post("v1/label/undo", json={"tab": "t"}, headers=headers).status_code == 401
        assert client.post("v1/label/undo", json={"tab": "t"}, headers={"host": "evil.example"}).status_code == 400
        assert client.get("/", headers={"host": "evil.example"}).status_code == 400
        page = client.get("/", headers={"authorization": ""})
        assert (page.status_code, "script-src 'self'" in page.headers["content-security-policy"]) == (200, True)
        assert "access-control-allow-origin" not in page.headers
        assert "another command is writing it" in run("label", *asked, "--port", 0).stderr
        process.send_signal(signal.SIGKILL)
        process.wait(20)
    with started(*asked) as (process, client):
        undone = client.post("v1/label/undo", json={"tab": "t"}).json()["row"]
        assert (undone["key"], undone["undone"]["span"]) == (second, None)
        undone = client.post("v1/label/undo", json={"tab": "t"}).json()
        assert (undone["row"]["key"], undone["row"]["undone"]["span"], undone["left"]) == (key, [*span.values()], 4)
        assert client.post("v1/label/undo", json={"tab": "t"}).status_code == 500
        client.post("v1/label/decide", json={"tab": "t", "key": key, "question": "", **span})
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        assert "1 done by Ada, 3 rows left" in process.stderr.read()
    assert [a.text for a in read(str(out)).examples[0].answers] == [best.text]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["q.jsonl", "rows.jsonl"]


@pytest.mark.usefixtures("elsewhere")
def test_mistakes_are_told_in_one_sentence(tmp_path):
    data = write_jsonl(tmp_path / "q.jsonl", triplets(2))
    (tmp_path / "link.jsonl").symlink_to(data)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for args, told in (
            ((data, "--out", "rows.jsonl", "--port", port), f"--port {port}: cannot listen there"),
            ((data, "--out", data), "is the data to label"),
            ((data, "--out", "rows.csv"), "must end in .jsonl"),
            ((data, "--out", "nowhere/rows.jsonl"), "its folder does not exist"),
            ((data, "--out", "rows.jsonl", "--annotator", " "), "--annotator: give a printable name"),
            (("nowhere.jsonl", "--out", "rows.jsonl", "--port", 0), "nowhere.jsonl: no such file"),
            ((tmp_path / "nowhere", "--out", "rows.jsonl", "--port", 0), "no such file"),
        ):
            result = run("label", *args)
            assert (result.exit_code, result.stderr.count("Error: ")) == (2, 1), result.output
            assert told in result.stderr
    assert list(Path.cwd().iterdir()) == []
