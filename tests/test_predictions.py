"""The three predictions files, compared with the published algorithm of run_qa.py as a plain loop."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qadeploy.core.decoding import WindowLogits, decode, rank_answers
from qadeploy.core.settings import QaSettings
from qadeploy.evaluation.predictions import predict, write_predictions
from qadeploy.evaluation.scoring import evaluate
from qadeploy.records import NO_ANSWER, Answer, Example
from tests.conftest import Tiny, triplets
from tests.tokenizers_for_tests import encoder, thorough

CONTEXT = "The library opens at nine and closes at half past six. The museum's oldest map shows only two bridges."
QUESTION = "Who?"


def reference(
    context: str,
    features: list[dict[str, Any]],
    n_best_size: int,
    max_answer_length: int,
    negative: bool,
    threshold: float,
) -> tuple[str, list[dict[str, Any]], float | None]:
    """``postprocess_qa_predictions`` of transformers' utils_qa.py for one example: text, n best, null odds.

    ``features`` hold offset_mapping (None outside the context), start_logits and end_logits. Unlike the original every
    start is paired with every end, not the n best of either alone, and a span that two windows hold is kept once.
    """
    spans: dict[tuple[int, int], tuple[float, float, float]] = {}
    null = (np.inf, 0.0, 0.0)
    for feature in features:
        starts, ends, offsets = feature["start_logits"], feature["end_logits"], feature["offset_mapping"]
        null = min(null, (starts[0] + ends[0], starts[0], ends[0]))
        for i, begin in enumerate(offsets):
            for j, finish in enumerate(offsets):
                if begin is None or finish is None or j < i or j - i + 1 > max_answer_length:
                    continue
                found = (starts[i] + ends[j], starts[i], ends[j])
                place = (begin[0], finish[1])
                spans[place] = max(spans.get(place, found), found)
    listed = [(*logits, context[a:b]) for (a, b), logits in spans.items()]
    if negative:
        listed.append((*null, ""))
    listed = sorted(listed, key=lambda p: p[0], reverse=True)[:n_best_size]
    if negative and not any(p[3] == "" for p in listed):
        listed.append((*null, ""))
    scores = np.array([p[0] for p in listed], dtype=np.float64)
    probabilities = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
    n_best = [
        {"text": p[3], "start_logit": float(p[1]), "end_logit": float(p[2]), "probability": float(probability)}
        for p, probability in zip(listed, probabilities, strict=True)
    ]
    if not negative:
        return n_best[0]["text"], n_best, None
    best = next(p for p in n_best if p["text"])
    difference = float(null[0]) - best["start_logit"] - best["end_logit"]
    return "" if difference > threshold else best["text"], n_best, difference


def case(seed: int, room: int) -> tuple[WindowLogits, list[dict[str, Any]]]:
    """Windows over CONTEXT with random logits, and the same in run_qa.py's form."""
    tool = encoder("bert")
    question, context = tool.encode(QUESTION), tool.encode(CONTEXT)
    windows = tool.windows(
        question, context, max_seq_len=len(question) + tool.special_tokens + room, doc_stride=room // 3
    )
    rng = np.random.default_rng(seed)
    starts, ends = ([rng.normal(0, 3, len(w)).astype(np.float32) for w in windows] for _ in range(2))
    features = []
    for window, s, e in zip(windows, starts, ends, strict=True):
        inside = range(window.context_offset, window.context_offset + window.context_length)
        offsets: list[Any] = [None] * len(window)
        offsets[window.context_begin : window.context_begin + window.context_length] = [
            tuple(int(n) for n in context.offsets[i]) for i in inside
        ]
        assert window.null_index == 0  # as run_qa.py assumes
        features.append({"offset_mapping": offsets, "start_logits": s, "end_logits": e})
    return WindowLogits(windows, starts, ends, context), features


@thorough
@given(
    seed=st.integers(0, 9999),
    room=st.sampled_from((9, 17, 60)),
    size=st.sampled_from((1, 3, 20, 5000)),
    negative=st.booleans(),
    threshold=st.sampled_from((-3.0, 0.0, 4.0)),
)
def test_the_files_say_what_run_qa_says(seed, room, size, negative, threshold):
    scored, features = case(seed, room)
    settings = QaSettings(max_answer_len=7, null_threshold=threshold if negative else None)
    decoded = decode(scored, max_answer_len=7, allow_no_answer=negative)
    (answer,) = rank_answers(
        decoded, CONTEXT, top_k=1, allow_no_answer=negative, null_threshold=settings.null_threshold
    )
    example = Example("q", QUESTION, CONTEXT)
    found = predict(example, answer, scored, settings, n_best_size=size, allow_no_answer=negative)
    text, n_best, odds = reference(CONTEXT, features, size, 7, negative, threshold)
    assert found.text == text
    assert found.null_odds == (None if odds is None else pytest.approx(odds, abs=1e-5))
    keys = ("text", "start_logit", "end_logit")
    assert [[e[k] for k in keys] for e in found.n_best] == [[e[k] for k in keys] for e in n_best]
    # Their softmax is over what is listed, ours over everything: the same up to a factor, which is 1 where all is listed.
    share = sum(e["probability"] for e in found.n_best)
    assert share <= 1 + 1e-6
    assert [e["probability"] / share for e in found.n_best] == pytest.approx(
        [e["probability"] for e in n_best], abs=1e-6
    )
    if size == 5000:
        assert share == pytest.approx(1)
    assert all(CONTEXT[e["start"] : e["end"]] == e["text"] for e in found.n_best)


def test_the_probabilities_do_not_depend_on_how_many_are_listed():
    scored, _ = case(4, 17)
    short, long = (
        predict(Example("q", QUESTION, CONTEXT), NO_ANSWER, scored, QaSettings(), n_best_size=n) for n in (2, 20)
    )
    assert short.n_best == long.n_best[:2]
    assert len(long.n_best) == 20


def test_the_null_answer_is_listed_even_where_it_is_the_worst():
    scored, _ = case(4, 60)
    scored.start_logits[0][0] = -90.0
    example = Example("q", QUESTION, CONTEXT)
    found = predict(example, NO_ANSWER, scored, QaSettings(), n_best_size=3, allow_no_answer=True)
    assert [bool(e["text"]) for e in found.n_best] == [True, True, True, False]
    assert found.n_best[-1] == {
        "text": "",
        "start_logit": -90.0,
        "end_logit": float(scored.end_logits[0][0]),
        "probability": pytest.approx(0, abs=1e-12),
        "start": 0,
        "end": 0,
    }


def test_a_context_without_a_visible_token_is_null_by_the_largest_float(tmp_path):
    tool = encoder("bert")
    question, context = tool.encode(QUESTION), tool.encode(" ")
    windows = tool.windows(question, context, max_seq_len=30, doc_stride=4)
    logits = [np.zeros(len(w), dtype=np.float32) for w in windows]
    example = Example("q", QUESTION, " ")
    null = Answer("", 0, 0, 1.0)
    found = predict(example, null, WindowLogits(windows, logits, logits, context), QaSettings(), allow_no_answer=True)
    assert (found.null_odds, [e["text"] for e in found.n_best]) == (sys.float_info.max, [""])
    write_predictions(tmp_path, [found])
    assert json.loads((tmp_path / "null_odds.json").read_text()) == {"q": sys.float_info.max}


def test_every_id_has_its_entry_and_null_odds_of_another_model_go(tmp_path):
    scored, _ = case(1, 60)
    example = Example("a", QUESTION, CONTEXT, also=("b", "c"))
    answer = Answer("nine", 21, 25, 0.5)
    for allow in (True, False):
        found = predict(example, answer, scored, QaSettings(), n_best_size=2, allow_no_answer=allow)
        write_predictions(tmp_path, [found])
        values = {p.name: json.loads(p.read_text()) for p in tmp_path.iterdir()}
        names = {"predictions.json", "nbest_predictions.json", *(["null_odds.json"] if allow else [])}
        assert set(values) == names
        assert all(list(value) == ["a", "b", "c"] for value in values.values())
        assert values["predictions.json"]["b"] == "nine"
        assert values["nbest_predictions.json"]["c"] == list(found.n_best)


@pytest.mark.parametrize("allow", [False, True])
def test_recording_changes_no_score_and_keeps_what_was_answered(tiny: Tiny, bundle: Path, allow: bool):
    from qadeploy import Answerer
    from qadeploy.data.loading import read

    answerer = Answerer.load(bundle)
    examples = read(str(tiny.data)).examples[:70]  # more than one chunk of the answerer
    recorded = evaluate(answerer, examples, allow_no_answer=allow, n_best_size=4)
    plain = evaluate(answerer, examples, allow_no_answer=allow)
    assert recorded.answers == plain.answers
    assert {i: p.text for p in recorded.recorded for i in p.ids} == plain.predictions(examples)
    for prediction, answer in zip(recorded.recorded, plain.answers, strict=True):
        entry = next(e for e in prediction.n_best if e["text"] == answer.text)
        assert entry["probability"] == pytest.approx(answer.score)
        assert (prediction.null_odds is not None) == allow


def test_words_shared_with_the_question_count_once_in_a_recorded_probability(bundle: Path):
    from dataclasses import replace

    from qadeploy import Answerer

    loaded = Answerer.load(bundle)
    settings = replace(loaded.settings, bm25_weight=2.0, max_seq_len=48, doc_stride=8)
    answerer = Answerer(loaded.encoder, settings, loaded.model)
    context = " ".join(str(row["context"]) for row in triplets(12))
    examples = [Example(str(row["question"]), str(row["question"]), context) for row in triplets(4)]
    recorded = evaluate(answerer, examples, allow_no_answer=False, n_best_size=4)
    for prediction, answer in zip(recorded.recorded, recorded.answers, strict=True):
        assert prediction.n_best[0]["text"] == answer.text
        assert prediction.n_best[0]["probability"] == pytest.approx(answer.score)
