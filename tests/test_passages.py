"""One question on many passages, and display options: the same in the library, over HTTP, in ``answer`` and in ``ask``."""

from __future__ import annotations

import asyncio
import json
import random
import re

import numpy as np
import pyarrow
import pyarrow.parquet as parquet
import pytest

from qadeploy import Answer, Answerer
from qadeploy.batch.run import BatchRequest, answer_files
from qadeploy.core.decoding import span_table
from qadeploy.core.settings import Options
from qadeploy.errors import CallError, DataWarning, InputError, StrideError, TooManyWindowsError
from qadeploy.integrations.transformers_pipeline import pipeline
from qadeploy.options import declared
from tests.cli_for_tests import run
from tests.conftest import triplets, write_jsonl
from tests.servers_for_tests import serving

ROWS = triplets(48)
TEXTS = [f"{row['context']} 🏮" if i % 3 else str(row["context"]) for i, row in enumerate(ROWS)]
LAMP = str(ROWS[0]["question"])
LONG = " ".join(TEXTS)  # several windows
OPTIONS = {"top_k": 3, "distinct": True, "snippet": "sentence", "offsets": "utf16"}


def asked(count: int) -> list[tuple[str, list[str]]]:
    """Questions, each with one to seven passages, now and then a long one."""
    draw = random.Random(3)
    found = []
    for i in range(count):
        passages = draw.sample(TEXTS, draw.randint(1, 7))
        if i % 20 == 0:
            passages.insert(draw.randint(0, len(passages)), LONG)
        found.append((str(draw.choice(ROWS)["question"]), passages))
    return found


def same(found: list[Answer], expected: list[Answer]) -> None:
    """Equal except for the last bits of a score, which depend on the order of summation."""
    assert [(a.text, a.start, a.end, a.passage, a.snippet) for a in found] == [
        (a.text, a.start, a.end, a.passage, a.snippet) for a in expected
    ]
    assert [a.score for a in found] == pytest.approx([a.score for a in expected], abs=1e-6)


# ---------------------------------------------------------------- meaning


@pytest.mark.parametrize("context", [TEXTS[1], LONG], ids=["short", "long"])
@pytest.mark.parametrize("options", [{}, {"prefilter": 2}, {"allow_no_answer": True, "align_to_words": True}], ids=str)
def test_one_passage_is_answered_as_a_context(answerer, context, options):
    alone = answerer.answer(LAMP, context, top_k=8, **options)
    found = answerer.answer(LAMP, contexts=[context], top_k=8, **options)
    assert [(a.text, a.start, a.end, a.score) for a in found] == [(a.text, a.start, a.end, a.score) for a in alone]
    assert {a.passage for a in found if a.text} == {0}
    assert {a.passage for a in alone} | {a.passage for a in found if not a.text} == {None}


def test_a_permutation_of_passages_permutes_their_indices_alone(answerer):
    passages = [LONG, *TEXTS[:6]]
    draw = random.Random(5)
    for options in ({}, {"prefilter": 5}, {"distinct": True, "allow_no_answer": True}):
        expected = answerer.answer(LAMP, contexts=passages, top_k=10, **options)
        for _ in range(4):
            order = draw.sample(range(7), 7)
            found = answerer.answer(LAMP, contexts=[passages[i] for i in order], top_k=10, **options)
            for one, other in zip(found, expected, strict=True):
                assert (one.text, one.start, one.end) == (other.text, other.start, other.end)
                assert one.score == pytest.approx(other.score, abs=1e-6)
                assert other.passage == (None if one.passage is None else order[one.passage])


def test_the_scores_are_one_softmax_over_all_passages(answerer):
    passages = TEXTS[:4]
    every = answerer.answer(LAMP, contexts=passages, top_k=100_000, allow_no_answer=True)
    assert sum(a.score for a in every) <= 1 + 1e-6
    assert {a.passage for a in every} == {0, 1, 2, 3, None}
    for answer in every:
        if answer.text:
            assert passages[answer.passage][answer.start : answer.end] == answer.text
    # By hand: the weights of all spans of each passage alone, and the lowest null logit.
    chosen = Options(allow_no_answer=True)
    alone = [answerer.read(LAMP, passage, chosen) for passage in passages]
    logits = [span_table(pair.scored, pair.settings.max_answer_len) for pair in alone]
    null = min(pair.decoded.null_logit for pair in alone)
    temperature = answerer.settings.temperature
    total = np.exp(null / temperature) + sum(np.exp(table.astype(float) / temperature).sum() for table in logits)
    best = max(float(table.max()) for table in logits)
    assert max(a.score for a in every if a.text) == pytest.approx(np.exp(best / temperature) / total, rel=1e-5)
    assert next(a.score for a in every if not a.text) == pytest.approx(np.exp(null / temperature) / total, rel=1e-5)


def test_no_span_crosses_from_one_passage_into_the_next(answerer):
    halves = ["Ada keeps the", "lamp in room 0."]
    for answer in answerer.answer(LAMP, contexts=halves, top_k=1_000):
        assert halves[answer.passage][answer.start : answer.end] == answer.text


def test_passages_come_from_the_context_cache(bundle):
    fresh = Answerer.load(bundle, device="cpu", threads=1)
    fresh.answer(LAMP, contexts=TEXTS[:5])
    fresh.answer("Who keeps the bell?", contexts=TEXTS[1:6])
    fresh.answer(LAMP, TEXTS[0])
    assert (fresh.stats().hits, fresh.stats().misses) == (5, 6)


def test_prefilter_counts_the_windows_of_all_passages(answerer):
    passages = [LONG, *TEXTS[:5]]
    everything = answerer.encode(LAMP, passages, Options())
    pair = answerer.encode(LAMP, passages, Options(prefilter=3))
    assert len(pair.windows) == 3 < len(everything.windows) == len(pair.ranking.scores)
    best = sorted(sorted(pair.ranking.scores, reverse=True)[:3])
    assert sorted(pair.ranking.scores[i] for i in pair.ranking.chosen) == best
    assert [w.input_ids.tolist() for w in pair.windows] == [
        everything.windows[i].input_ids.tolist() for i in pair.ranking.chosen
    ]


def test_windows_of_all_passages_count_against_the_limit(answerer):
    assert len(answerer.encode(LAMP, TEXTS[:5], Options(), max_windows=5).windows) == 5
    with pytest.raises(
        TooManyWindowsError, match=r"6 passages of \d+ tokens: they make 6 windows, but at most 5 are allowed"
    ):
        answerer.encode(LAMP, TEXTS[:6], Options(), max_windows=5)
    with pytest.raises(
        TooManyWindowsError, match=r"prefilter reads 4 of their 6 windows, but at most 3 .*: lower prefilter"
    ):
        answerer.encode(LAMP, TEXTS[:6], Options(prefilter=4), max_windows=3)


# ---------------------------------------------------------------- the faces


def test_200_questions_have_the_same_answers_in_the_library_over_http_and_in_answer(answerer, server, bundle, tmp_path):
    questions = asked(200)
    single = [answerer.answer(question, contexts=passages, **OPTIONS) for question, passages in questions]
    assert {a.passage for answers in single for a in answers} >= {0, 1, 2, 3, 4, 5}
    for number, answers in enumerate(answerer.answer_stream(iter(questions), **OPTIONS)):
        same(answers, single[number])
    for number, (question, passages) in enumerate(questions):
        served = server.ask({"question": question, "contexts": passages, **OPTIONS})
        expected = [a.to_dict() for a in single[number]]
        assert [{**a, "score": 0} for a in served["answers"]] == [{**a, "score": 0} for a in expected]
        assert [a["score"] for a in served["answers"]] == pytest.approx([a["score"] for a in expected], abs=1e-6)
    rows = [{"id": f"q{i}", "question": q, "contexts": p} for i, (q, p) in enumerate(questions)]
    source = write_jsonl(tmp_path / "asked.jsonl", rows)
    request = {"bundle": str(bundle), "inputs": (str(source),), "device": "cpu", "threads": 1}
    answer_files(BatchRequest(**request, output=str(tmp_path / "told.jsonl"), snippet="sentence", offsets="utf16"))
    answer_files(BatchRequest(**request, output=str(tmp_path / "told"), snippet="sentence", offsets="utf16"))
    lines = [json.loads(line) for line in (tmp_path / "told.jsonl").read_text("utf-8").splitlines()]
    table = parquet.read_table(tmp_path / "told").to_pylist()
    for number, (line, row) in enumerate(zip(lines, table, strict=True)):
        best = single[number][0]
        assert {**line, "skipped": []} == row
        assert line["id"] == f"q{number}"
        assert (line["answer"], line["start"], line["end"], line["passage"]) == (
            best.text, best.start, best.end, best.passage,
        )  # fmt: skip
        assert (line["snippet"], line["snippet_start"], line["snippet_end"]) == (
            best.snippet.text, best.snippet.start, best.snippet.end,
        )  # fmt: skip
        assert line["score"] == pytest.approx(best.score, abs=1e-6)


def test_coroutines_and_batches_answer_passages_too(answerer):
    questions = [*asked(12), (LAMP, TEXTS[0])]  # a pair with a context among them

    async def gather() -> list[list[Answer]]:
        calls = [answerer.aanswer(q, contexts=p, **OPTIONS) for q, p in questions[:-1]]
        return await asyncio.gather(*calls, answerer.aanswer(*questions[-1], **OPTIONS))

    expected = answerer.answer_batch(questions, **OPTIONS)
    assert expected[-1][0].passage is None
    for found, one in zip(asyncio.run(gather()), expected, strict=True):
        same(found, one)
    for found, one in zip(asyncio.run(answerer.aanswer_batch(questions, **OPTIONS)), expected, strict=True):
        same(found, one)


def test_http_takes_passages_in_every_form(answerer, server):
    passages = TEXTS[:3]
    one = server.ask({"question": LAMP, "contexts": passages})
    assert server.ask([{"question": LAMP, "contexts": passages}, {"question": LAMP, "context": passages[0]}])[0] == one
    many = server.ask({"questions": [LAMP, "Who keeps the bell?"], "contexts": passages})
    assert many[0] == one
    assert "skipped" not in one
    traced = server.ask({"question": LAMP, "contexts": [" ", *passages], "trace": True, "offsets": "utf8"})
    assert traced["skipped"] == [0]
    assert [window["passage"] for window in traced["trace"]["windows"]] == [1, 2, 3]
    window = traced["trace"]["windows"][2]
    assert window["context_offset"] == 0
    first, last = (window["offsets"][window["context_begin"] + i] for i in (0, window["context_length"] - 1))
    assert passages[2][first[0] : last[1]] == passages[2]
    assert any(c["answer"] == 1 for c in traced["trace"]["candidates"])


def test_a_request_with_passages_exceeds_the_same_limits(answerer):
    with serving(answerer, max_passages=4, max_windows=3, max_context_chars=200) as local:
        for passages, kind, flag in (
            (["a"] * 5, "too_many_passages", "--max-passages"),
            (["a " * 60, "b " * 60], "context_too_long", "--max-context-chars"),
            (["a"] * 4, "too_many_windows", "--max-windows"),
        ):
            response = local.post("/v1/answer", {"question": LAMP, "contexts": passages})
            error = response.json()["error"]
            assert (response.status_code, error["type"], error["flag"]) == (422, kind, flag)
            assert flag in error["message"]
        assert "the 2 passages have 240 characters, at most 200 are allowed" in str(
            local.post("/v1/answer", {"question": LAMP, "contexts": ["a " * 60, "b " * 60]}).json()
        )
        assert local.get("/v1/model").json()["limits"]["max_passages"] == 4


@pytest.mark.parametrize("count", [101, 10_000, 100_000])
def test_too_many_passages_are_refused_with_the_flag(server, count):
    body = {"question": LAMP, "contexts": ["a"] * count}
    for form in (body, [body], {"questions": [LAMP], "contexts": body["contexts"]}):
        response = server.post("/v1/answer", form)
        error = response.json()["error"]
        assert (response.status_code, error["type"], error["flag"]) == (422, "too_many_passages", "--max-passages")
        assert re.search(r"has \d+ passages( or more)?, at most 100 are allowed", error["message"])


def test_the_largest_batch_with_the_most_passages_and_every_option_is_read(server):
    """It is refused for the number of its windows, not for the size of its JSON."""
    options = {"top_k": 3, "max_answer_len": 128, "max_seq_len": 40, "doc_stride": 10, "align_to_words": False}
    options |= {"allow_no_answer": False, "prefilter": 256, "overlap_threshold": 0.25, "min_score": 0.0125, **OPTIONS}
    body = [{"question": LAMP, "contexts": ["a"] * 100, **options}] * 64
    assert set(options) == set(declared(Options))
    error = server.post("/v1/answer", body).json()["error"]
    assert error["type"] == "too_many_windows", error


def test_ask_takes_several_contexts(answerer, bundle, tmp_path):
    (tmp_path / "b.txt").write_text(TEXTS[1], encoding="utf-8")
    contexts = ["--context", TEXTS[0], "--context", f"@{tmp_path / 'b.txt'}"]
    command = ["ask", str(bundle), "--question", LAMP, *contexts, "--top-k", "2"]
    expected = answerer.answer(LAMP, contexts=TEXTS[:2], top_k=2)
    told = run(*command, "--json")
    assert [a["passage"] for a in json.loads(told.stdout)["answers"]] == [a.passage for a in expected]
    shown = run(*command, "--context", "", "--snippet", "sentence", "--offsets", "utf8", "--trace")
    best = expected[0]
    assert re.search(rf"1\. {best.text}   score 0\.\d+, passage {best.passage}, bytes {best.start}-", shown.stdout)
    assert "contexts[2] is empty and skipped" in shown.stderr
    assert "2 passages" in shown.stdout
    assert "passage 1 tokens 0-" in shown.stdout
    none = run(*command, "--min-score", "1")
    assert none.stdout == "no answer has a score of 1 or more\n"


def test_the_pipeline_takes_passages(answerer, bundle):
    qa = pipeline("question-answering", model=str(bundle), device="cpu")
    expected = qa.answerer.answer(
        LAMP, contexts=TEXTS[:3], align_to_words=True, max_answer_len=15, allow_no_answer=False
    )[0]
    found = qa(question=LAMP, contexts=TEXTS[:3])
    assert (found["answer"], found["passage"]) == (expected.text, expected.passage)
    both = qa([{"question": LAMP, "contexts": TEXTS[:3]}, {"question": LAMP, "context": TEXTS[0]}])
    assert {**both[0], "score": 0} == {**found, "score": 0}
    assert "passage" not in both[1]
    for bad, words in (
        ([], "contexts is empty"),
        ("text", "contexts must be a list of texts, not str"),
        (["", " "], "every passage is empty"),
    ):
        with pytest.raises(CallError, match=words):
            qa(question=LAMP, contexts=bad)
    with pytest.raises(CallError, match="has contexts besides question and context"):
        qa({"question": LAMP, "context": "a", "contexts": ["b"]})


# ---------------------------------------------------------------- rows of passages


def test_rows_of_passages_and_of_contexts_share_a_file(bundle, tmp_path):
    rows = [{"question": LAMP, "context": TEXTS[0]}, {"question": LAMP, "contexts": ["", *TEXTS[:2]]}]
    source = write_jsonl(tmp_path / "mixed.jsonl", rows)
    answer_files(BatchRequest(str(bundle), (str(source),), str(tmp_path / "out"), device="cpu"))
    first, second = parquet.read_table(tmp_path / "out").to_pylist()
    assert (first["passage"], first["skipped"]) == (None, [])
    assert second["passage"] in {1, 2}
    assert second["skipped"] == [0]
    assert list(first) == ["id", "answer", "score", "start", "end", "passage", "skipped", "bundle"]


def test_passages_are_read_from_parquet_and_csv_under_any_name(bundle, tmp_path):
    table = pyarrow.table({"question": [LAMP], "found": [TEXTS[:3]]})
    parquet.write_table(table, tmp_path / "a.parquet")
    cell = json.dumps(TEXTS[:3], ensure_ascii=False).replace('"', '""')
    (tmp_path / "b.csv").write_text(f'question,found\n{LAMP},"{cell}"\n', encoding="utf-8")
    found = []
    for name in ("a.parquet", "b.csv"):
        command = ["answer", str(bundle), "--input", str(tmp_path / name), "--output", str(tmp_path / f"{name}.jsonl")]
        done = run(*command, "--columns", "contexts=found")
        assert done.exit_code == 0, done.stderr
        found.append(json.loads((tmp_path / f"{name}.jsonl").read_text("utf-8")))
    assert found[0] == found[1]
    assert found[0]["passage"] in {0, 1, 2}


def test_a_folder_of_answers_is_not_continued_with_other_snippets(bundle, tmp_path):
    source = write_jsonl(tmp_path / "asked.jsonl", [{"question": LAMP, "contexts": TEXTS[:2]}])
    request = {"bundle": str(bundle), "inputs": (str(source),), "output": str(tmp_path / "out"), "device": "cpu"}
    answer_files(BatchRequest(**request, snippet="sentence", min_score=0.01))
    answer_files(BatchRequest(**request, snippet="sentence", min_score=0.01))
    with pytest.raises(InputError) as refused:
        answer_files(BatchRequest(**request, offsets="utf8"))
    for line in (
        "--min-score was 0.01, now it is 0.0",
        "--snippet was sentence, now it is not given",
        "--offsets was codepoints, now it is utf8",
    ):
        assert line in str(refused.value)


# ---------------------------------------------------------------- bad input

BAD = [
    ([], "contexts is empty: give at least one passage"),
    (["", " \n"], "contexts: every passage is empty: give some text"),
    (["a", None], r"contexts\[1\] must be text, not NoneType"),
    ("text", "contexts must be a list of texts, not str"),
    ({"a"}, "contexts must be a list of texts, not set"),
    (["a", "b\ud800"], r"contexts\[1\]: the text holds a lone surrogate"),
]


@pytest.mark.parametrize(("passages", "words"), BAD, ids=[str(i) for i in range(len(BAD))])
def test_bad_passages_are_refused_by_name(answerer, passages, words):
    with pytest.raises(InputError, match=words):
        answerer.answer(LAMP, contexts=passages)
    with pytest.raises(InputError, match=words):
        asyncio.run(answerer.aanswer(LAMP, contexts=passages))
    if not isinstance(passages, str | set):
        with pytest.raises(InputError, match=f"pair 2: {words}"):
            answerer.answer_batch([(LAMP, TEXTS[0]), (LAMP, passages)])


def test_a_question_has_either_a_context_or_passages(answerer, server):
    with pytest.raises(InputError, match="context and contexts are given: leave one of them out"):
        answerer.answer(LAMP, "a", contexts=["b"])
    with pytest.raises(InputError, match="there is no context: give context, or contexts for several passages"):
        answerer.answer(LAMP)
    for body in ({"question": LAMP}, {"question": LAMP, "context": "a", "contexts": ["b"]}, {"questions": [LAMP]}):
        response = server.post("/v1/answer", body)
        assert response.status_code == 422
        assert "give either context, or contexts for several passages" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("passages", "words"),
    [
        ([], "contexts: List should have at least 1 item"),
        (["", " "], "contexts: every passage is empty"),
        ([3], "contexts.0: Input should be a valid string"),
        ("a", "contexts: Input should be a valid list"),
    ],
)
def test_http_refuses_bad_passages_by_name(server, passages, words):
    response = server.post("/v1/answer", {"question": LAMP, "contexts": passages})
    assert response.status_code == 422
    assert words in response.json()["error"]["message"]


def test_an_empty_passage_among_good_ones_is_skipped_and_named(answerer):
    passages = ["", TEXTS[0], " \n", TEXTS[1]]
    plain = answerer.answer(LAMP, contexts=[TEXTS[0], TEXTS[1]], top_k=3)
    with pytest.warns(DataWarning, match=r"^contexts\[0\], contexts\[2\] are empty and skipped$"):
        found = answerer.answer(LAMP, contexts=passages, top_k=3)
    assert [(a.text, a.score, a.passage) for a in found] == [(a.text, a.score, 2 * a.passage + 1) for a in plain]
    with pytest.warns(DataWarning, match=r"^pair 2: contexts\[0\] is empty and skipped$"):
        answerer.answer_batch([(LAMP, TEXTS[0]), (LAMP, ["", TEXTS[0]])])


def test_what_a_context_refuses_passages_refuse(answerer):
    with pytest.raises(StrideError):
        answerer.answer(LAMP, contexts=[TEXTS[0], LONG], doc_stride=5_000)
    with pytest.raises(InputError, match="question is empty"):
        answerer.answer(" ", contexts=TEXTS[:2])


def test_rows_with_bad_passages_are_set_aside_with_file_row_and_field(bundle, tmp_path):
    rows = [
        {"question": LAMP, "contexts": TEXTS[:2]},
        {"question": LAMP, "contexts": []},
        {"question": LAMP, "contexts": ["", " "]},
        {"question": LAMP, "contexts": ["a", 3]},
        {"question": LAMP, "contexts": "plain text"},
        {"question": LAMP, "contexts": ["a"], "context": "b"},
        {"question": "", "contexts": ["a"]},
    ]
    source = write_jsonl(tmp_path / "asked.jsonl", rows)
    answer_files(BatchRequest(str(bundle), (str(source),), str(tmp_path / "out.jsonl"), device="cpu"))
    told = [json.loads(line) for line in (tmp_path / "out.rejected.jsonl").read_text("utf-8").splitlines()]
    assert [(one["file"], one["row"], one["field"], one["reason"]) for one in told] == [
        (str(source), 2, "contexts", "is an empty list: give at least one passage"),
        (str(source), 3, "contexts", "holds no passage with text"),
        (str(source), 4, "contexts[1]", "must be text, not a number"),
        (str(source), 5, "contexts", "must be a list of texts, not text"),
        (str(source), 6, "contexts", "is given together with context: leave one of them out"),
        (str(source), 7, "question", "is empty"),
    ]


# ---------------------------------------------------------------- options for people


def test_distinct_answers_do_not_overlap_and_keep_their_scores(answerer):
    every = {(a.passage, a.start, a.end): a.score for a in answerer.answer(LAMP, contexts=TEXTS[:3], top_k=100_000)}
    for threshold in (0.0, 0.3, 1.0):
        options = {"distinct": True, "overlap_threshold": threshold}
        found = answerer.answer(LAMP, contexts=TEXTS[:3], top_k=20, **options)
        for i, one in enumerate(found):
            assert one.score == pytest.approx(every[one.passage, one.start, one.end], rel=1e-6)
            for better in found[:i]:
                if better.passage == one.passage:
                    shared = min(one.end, better.end) - max(one.start, better.start)
                    shorter = min(one.end - one.start, better.end - better.start)
                    assert max(shared, 0) <= threshold * shorter
        assert found[0] == answerer.answer(LAMP, contexts=TEXTS[:3])[0]


def test_min_score_leaves_out_what_is_below(answerer):
    every = answerer.answer(LAMP, TEXTS[0], top_k=10, allow_no_answer=True)
    limit = every[3].score
    kept = answerer.answer(LAMP, TEXTS[0], top_k=10, allow_no_answer=True, min_score=limit)
    assert kept == [a for a in every if a.score >= limit]
    assert answerer.answer(LAMP, TEXTS[0], min_score=1.0) == []


def test_offsets_count_what_the_caller_counts(answerer):
    context = f"🏮🏮 naïve 東京. {TEXTS[0]}"
    plain = answerer.answer(LAMP, context, top_k=5, snippet="sentence")
    for unit, codec, size in (("utf16", "utf-16-le", 2), ("utf8", "utf-8", 1)):
        encoded = context.encode(codec)
        found = answerer.answer(LAMP, context, top_k=5, snippet="sentence", offsets=unit)
        for one, before in zip(found, plain, strict=True):
            assert encoded[size * one.start : size * one.end].decode(codec) == one.text == before.text
            assert encoded[size * one.snippet.start : size * one.snippet.end].decode(codec) == one.snippet.text
            assert one.end > before.end


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"min_score": 1.5}, "min_score must be a number from 0 to 1, not 1.5"),
        ({"overlap_threshold": -1}, "overlap_threshold must be a number from 0 to 1, not -1"),
        ({"distinct": 1}, "distinct must be true or false, not 1"),
        ({"snippet": 0}, "snippet must be sentence or a whole number from 1 to 5000, not 0"),
        ({"snippet": "line"}, "snippet must be sentence or a whole number from 1 to 5000, not 'line'"),
        ({"offsets": "bytes"}, "offsets is 'bytes': choose codepoints, utf16, utf8"),
    ],
)
def test_bad_options_are_refused(answerer, options, words):
    with pytest.raises(InputError, match=words):
        answerer.answer(LAMP, TEXTS[0], **options)
