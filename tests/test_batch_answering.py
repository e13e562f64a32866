"""The answers and rejections of a shard's rows, compared with the answerer itself."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qadeploy import Answerer
from qadeploy.batch.answering import Answered, BrokenModelError, Rejected, Result, ShardAnswering, of_dict, to_dict
from qadeploy.batch.plan import BatchPlan, BatchSettings, make_plan
from qadeploy.batch.ranges import Reader
from qadeploy.errors import FailureError, InputError
from tests.answerers_for_tests import BREAK, NAN, RAISE, PoisonedLoad
from tests.conftest import triplets

GOOD = [{"context": row["context"], "question": row["question"]} for row in triplets(90)]
BAD: dict[str, Any] = {
    "question": {"context": "Ada.", "question": " "},
    "context": {"context": None, "question": "Who?", "id": "mine"},
    "": {"context": "Ada.", "question": "Who " * 300 + "?", "id": 7},
    "id": {"context": "Ada.", "question": "Who?", "id": ["a"]},
}


@pytest.fixture(scope="module")
def answerer(bundle: Path) -> Answerer:
    return PoisonedLoad(str(bundle))()


def planned(folder: Path, rows: list[Any], **changes: Any) -> BatchPlan:
    path = folder / "rows.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return make_plan(BatchSettings("h", {}, changes.get("allow_no_answer", False)), [str(path)], 1000)


def streamed(answerer: Answerer, plan: BatchPlan) -> list[Result]:
    return ShardAnswering(answerer, plan, plan.shards[0], Reader(plan.settings.data_options)).stream()


def alone(
    answerer: Answerer, plan: BatchPlan, known: dict[int, Result] | None = None
) -> tuple[list[Result], list[Any]]:
    told: list[Any] = []
    work = ShardAnswering(answerer, plan, plan.shards[0], Reader(plan.settings.data_options))
    return work.alone(known or {}, lambda *what: told.append(what)), told


@pytest.mark.parametrize("allow_no_answer", [False, True])
def test_a_shard_is_answered_as_the_answerer_answers(answerer, allow_no_answer, tmp_path):
    plan = planned(tmp_path, GOOD, allow_no_answer=allow_no_answer)
    found = streamed(answerer, plan)
    for number, (row, result) in enumerate(zip(GOOD, found, strict=True), 1):
        best = answerer.answer(row["question"], row["context"], allow_no_answer=allow_no_answer)[0]
        assert result == Answered(f"row-{number}", best.text, round(best.score, 7), best.start, best.end)
    assert alone(answerer, plan)[0] == found


def test_bad_rows_are_set_aside_between_good_ones(answerer, tmp_path):
    rows: list[Any] = list(GOOD)
    places = (0, 40, 41, 89)
    for place, bad in zip(places, BAD.values(), strict=True):
        rows[place] = bad
    plan = planned(tmp_path, [*rows, '{"context":', '{"context": "A\\ud800", "question": "Who?", "id": "\\ud800"}'])
    found = streamed(answerer, plan)
    assert found == alone(answerer, plan)[0]
    path = str(tmp_path / "rows.jsonl")
    rejected = {r.row: r for r in found if isinstance(r, Rejected)}
    assert sorted(rejected) == [1, 41, 42, 90, 91, 92]
    assert rejected[1] == Rejected(path, 1, "question", "row-1", "is empty")
    assert rejected[41] == Rejected(path, 41, "context", "mine", "must be text, not null")
    assert (rejected[42].id, rejected[42].field) == ("7", "")
    assert "tokens" in rejected[42].reason
    assert rejected[90] == Rejected(path, 90, "id", "row-90", "must be text, not a list")
    assert rejected[91].reason.startswith("not valid JSON: ")
    assert (rejected[92].field, rejected[92].id) == ("context", "?")
    good = streamed(answerer, planned(tmp_path, GOOD))
    assert [r for n, r in enumerate(found[:90]) if n not in places] == [
        r for n, r in enumerate(good) if n not in places
    ]


def test_a_row_that_raises_is_rejected_alone(answerer, tmp_path):
    rows = [dict(row) for row in GOOD]
    rows[50]["question"] = rows[51]["question"] = RAISE
    found = streamed(answerer, planned(tmp_path, rows))
    assert [n for n, r in enumerate(found) if isinstance(r, Rejected)] == [50, 51]
    assert found[50].reason == "RuntimeError: no kernel for this"
    assert found[52:] == streamed(answerer, planned(tmp_path, GOOD))[52:]


def test_logits_that_are_no_numbers_reject_their_row(answerer, tmp_path, monkeypatch):
    rows = [dict(row) for row in GOOD[:9]]
    rows[4]["question"] = NAN
    real = answerer.model.run
    length = len(answerer.encoder.encode(NAN).ids)

    def run(windows: Any) -> Any:
        logits = real(windows)
        asked = answerer.encoder.encode(NAN).ids
        return [
            (s * np.nan, e) if list(w.input_ids[1 : 1 + length]) == list(asked) else (s, e)
            for w, (s, e) in zip(windows, logits, strict=True)
        ]

    monkeypatch.setattr(answerer.model, "run", run)
    found = streamed(answerer, planned(tmp_path, rows))
    assert [n for n, r in enumerate(found) if isinstance(r, Rejected)] == [4]
    assert "NaN" in found[4].reason


def test_a_model_that_always_gives_nan_rejects_every_row_and_ends(answerer, tmp_path, monkeypatch):
    real = answerer.model.run
    monkeypatch.setattr(answerer.model, "run", lambda windows: [(s * np.nan, e) for s, e in real(windows)])
    found = streamed(answerer, planned(tmp_path, GOOD))
    assert len(found) == len(GOOD)
    assert all(isinstance(one, Rejected) and "NaN" in one.reason for one in found)


def test_a_model_that_breaks_is_told_apart_from_a_row_that_fails(bundle, tmp_path):
    rows = [dict(row) for row in GOOD[:9]]
    rows[4]["question"] = BREAK
    with pytest.raises(
        BrokenModelError, match=r"row 1, or one asked with it: RuntimeError: illegal.*; since then the model"
    ):
        streamed(PoisonedLoad(str(bundle))(), planned(tmp_path, rows))


def test_rows_that_are_known_are_not_asked_again(answerer, tmp_path):
    plan = planned(tmp_path, GOOD[:4])
    whole, told = alone(answerer, plan)
    assert told == [(1,), (1, whole[0]), (2,), (2, whole[1]), (3,), (3, whole[2]), (4,), (4, whole[3])]
    killer = ShardAnswering(answerer, plan, plan.shards[0], Reader(plan.settings.data_options)).killer(3, 2)
    found, told = alone(answerer, plan, {1: whole[0], 3: killer})
    assert found == [whole[0], whole[1], killer, whole[3]]
    assert [what[0] for what in told] == [2, 2, 4, 4]
    assert "ended 2 times" in killer.reason


def test_results_survive_as_json(answerer, tmp_path):
    plan = planned(tmp_path, [*GOOD[:30], BAD["question"]])
    found = streamed(answerer, plan)
    assert [of_dict(json.loads(json.dumps(to_dict(r)))) for r in found] == found


def test_rows_that_no_longer_can_be_read_are_no_rejections(answerer, tmp_path):
    plan = planned(tmp_path, GOOD)
    Path(plan.sources[0].path).unlink()
    with pytest.raises(InputError, match=r"rows.jsonl: no such file"):
        streamed(answerer, plan)


@pytest.mark.parametrize("how", [streamed, alone])
def test_rows_that_change_while_they_are_read_are_no_answers(how, answerer, tmp_path, monkeypatch):
    plan = planned(tmp_path, GOOD)
    read = Reader.rows

    def shorter(reader: Reader, *where: Any) -> Iterator[Any]:
        yield from islice(read(reader, *where), 3)

    monkeypatch.setattr(Reader, "rows", shorter)
    with pytest.raises(FailureError, match=r"rows.jsonl: was changed while it was being answered"):
        how(answerer, plan)
