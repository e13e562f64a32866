"""Where the pipeline on a bundle answers like transformers' pipeline, and every difference in docs/migrating.md."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from qadeploy.compat import QuestionAnsweringPipeline, pipeline
from qadeploy.core.decoding import WindowLogits, span_table
from qadeploy.core.settings import Options
from qadeploy.inference.bundle import open_bundle
from qadeploy.inference.pairs import DecodedPair
from qadeploy.shipped import base_model_path
from tests import test_compat
from tests.compat_for_tests import BOAT, CONTEXT, LAMP, ROWS, Both, Loud, shape, their_pipeline
from tests.conftest import sealed_copy
from tests.models_for_tests import BY_NAME

LONG = [" ".join(str(row["context"]) for row in ROWS[i : i + 6]) for i in range(90)]
DOCS = Path(__file__).parents[1] / "docs" / "migrating.md"
# transformers passes torch's tensors to numpy 2 without conversion.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning:transformers.pipelines")


@pytest.fixture(scope="module")
def theirs(tiny) -> Loud:
    return Loud(their_pipeline(tiny.run / "checkpoint"))


@pytest.fixture(scope="module")
def ours(bundle) -> QuestionAnsweringPipeline:
    return pipeline("question-answering", model=bundle, device=-1)


@pytest.fixture(scope="module")
def base() -> Both:
    """The base model that ships, which knows English."""
    return Both.around(base_model_path())


@pytest.mark.parametrize(
    "options", [{}, {"align_to_words": False}, {"max_answer_len": 2}, {"max_seq_len": 60, "doc_stride": 8}]
)
def test_three_hundred_questions_on_one_window_have_the_same_answers(options, theirs, ours):
    items = [{"question": row["question"], "context": row["context"]} for row in ROWS]
    assert shape(ours(items, **options)) == shape(theirs(items, **options))


def best_by_window(found: DecodedPair) -> tuple[int, int]:
    """The place of the word-aligned span with the highest probability by a softmax per window."""
    best: tuple[float, tuple[int, int]] = (-np.inf, (0, 0))
    for window, (starts, ends) in zip(found.windows, found.logits, strict=True):
        table = span_table(WindowLogits([window], [starts], [ends], found.context), found.settings.max_answer_len)
        free = [window.null_index, *range(window.context_begin, window.context_begin + window.context_length)]
        table = table - np.logaddexp.reduce(starts[free]) - np.logaddexp.reduce(ends[free])
        first, extra = divmod(int(table.argmax()), table.shape[1])
        words = found.context.words
        place = found.context.visible(int(words[first, 0]), int(words[first + extra, 1]))
        best = max(best, (float(table[first, extra]), place))
    return best[1]


def test_on_several_windows_answers_differ_only_where_the_pipeline_adds_up_or_goes_window_by_window(
    theirs, ours, monkeypatch
):
    """Ninety questions, and windows so short that each context is cut into many: every difference is explained."""
    options = {"max_seq_len": 40, "doc_stride": 12, "max_answer_len": 15}
    items = [{"question": str(row["question"]), "context": c} for row, c in zip(ROWS, LONG, strict=False)]
    added = theirs(list(items), **options)
    monkeypatch.setattr(theirs.pipe, "get_answer", lambda answers, target: None)  # which adds up scores of equal texts
    unadded, mine = theirs(list(items), **options), ours(items, **options)
    equal = by_window = 0
    for item, theirs_added, theirs_alone, own in zip(items, added, unadded, mine, strict=True):
        place, alone = ((answer["start"], answer["end"]) for answer in (own, theirs_alone))
        found = ours.answerer.read(item["question"], item["context"], Options(align_to_words=True, **options))
        assert len(found.windows) > 3
        equal += place == (theirs_added["start"], theirs_added["end"])
        if place != alone:
            assert best_by_window(found) == alone
            by_window += 1
    assert by_window > 0
    assert 0.2 * len(items) < equal < len(items)  # how many depends on how the tiny model was trained


def test_added_scores_go_above_one_and_choose_another_answer(base):
    """The keeper is in one window, another name in two: the other name's added scores overtake."""
    context = "Mungo Strand keeps the lamp at Hedda Point. Ada Lind carries the lamp oil. The hall is quiet."
    call = {"question": LAMP, "context": context, "max_seq_len": 20}
    added, found = base.theirs(**call), base.ours(**call)
    assert added["answer"] == "Ada Lind"
    assert added["score"] > 1
    assert found["answer"] == "Mungo Strand"
    assert found["score"] < 1
    three = base.ours(**call, top_k=3)
    assert three[0] == found
    assert sum(answer["score"] for answer in three) <= 1


def test_an_answer_in_several_places_stands_where_the_best_is(base):
    context = "Ada Lind came late. It was a quiet hall in the old town by the sea. Ada Lind keeps the lamp there."
    call = {"question": LAMP, "context": context, "max_seq_len": 20}
    added, found = base.theirs(**call), base.ours(**call)
    assert added["answer"] == found["answer"] == "Ada Lind"
    assert (added["start"], found["start"]) == (context.index("Ada Lind"), context.rindex("Ada Lind"))
    assert added["score"] > 1 > found["score"]


def test_texts_that_differ_in_case_are_one_answer_of_several_in_both(base):
    context = "Ada Lind is here. Ada lind was late. The lamp is kept by ada lind."
    for qa in (base.theirs, base.ours):
        found = qa(question=LAMP, context=context, top_k=4)
        texts = [answer["answer"].lower() for answer in found]
        assert len(texts) == len(set(texts)) == 4
        assert found[0]["start"] == context.index("ada lind")


def test_tokens_of_the_question_are_no_answers(base):
    """If the tokenizer pads on the left, the context comes first, and the pipeline masks nothing."""
    left = Both.around(base_model_path(), "left")
    context = "It."
    call = {"question": "The lamp is kept by Ada Lind at Hedda Point, is it?", "context": context, "top_k": 3}
    theirs, ours = left.theirs(**call), left.ours(**call)
    assert theirs[0]["start"] > len(context)
    assert theirs[0]["answer"] == ""
    assert ours[0]["answer"] == "It"
    assert all(context[answer["start"] : answer["end"]] == answer["answer"] != "" for answer in ours)


def test_a_question_is_cut_where_max_question_len_is_given(base):
    context = "Mungo Strand keeps the lamp at Hedda Point."
    question = f"Who keeps the lamp {'that stood in the hall ' * 4}?"
    call = {"context": context, "top_k": 3}
    assert base.theirs(question=question, **call) == base.theirs(question=question, **call, max_question_len=4)
    assert base.ours(question=question, **call, max_question_len=4) == base.ours(question="Who keeps the lamp", **call)
    assert base.ours(question=question, **call, max_question_len=4) != base.ours(question=question, **call)
    long = {"question": question * 20, **call, "max_question_len": 20}
    with pytest.raises(Exception, match="Sequence to truncate too short"):
        base.theirs(**long)
    assert len(base.ours(**long)) == 3


def test_no_filler_of_score_zero_among_the_answers(base):
    call = {"question": LAMP, "context": "Mungo", "top_k": 3}
    theirs = base.theirs(**call)
    assert [answer["answer"] for answer in theirs if answer["score"]] == ["Mungo"]
    assert "" in [answer["answer"] for answer in theirs]
    assert shape(base.ours(**call)) == [{"start": 0, "end": 5, "answer": "Mungo"}]


def test_more_than_one_answer_asked_for_is_always_a_list(base):
    call = {"question": LAMP, "context": "  ", "top_k": 3}
    assert base.ours(**call) == [base.theirs(**call)]


def test_a_list_of_questions_on_a_text_in_a_dict_is_not_a_question_a_letter(theirs, ours):
    row = {"question": [LAMP, BOAT], "context": CONTEXT}
    assert [answer["end"] for answer in theirs(row)] == [1, 1]
    assert ours(row) == ours(**row)
    assert shape(ours(row)) == shape(theirs(**row))


def test_answers_have_no_white_space_at_their_borders(tmp_path):
    both = Both.around(BY_NAME["XLM-R"].save(tmp_path))  # whose tokens include the space before a word
    call = {"question": LAMP, "context": "Ada keeps the lamp in room 3.  Bela keeps the boat outside.", "top_k": 5}
    theirs, ours = ([answer["answer"] for answer in qa(**call)] for qa in (both.theirs, both.ours))
    assert any(text != text.strip() for text in theirs)
    assert [text.strip() for text in ours] == ours


def test_weights_stored_in_fp16_run_in_it_there(base):
    """The pipeline's dtype is "auto"; a bundle's fp32 model computes in float32 whatever the checkpoint held."""
    fp16 = their_pipeline(base_model_path())
    assert fp16.model.dtype == torch.float16
    assert base.theirs.pipe.model.dtype == torch.float32


def test_the_null_answer_competes_at_the_bundles_threshold(bundle, tmp_path, theirs):
    settings = open_bundle(bundle).settings.to_dict()
    call = {"question": LAMP, "context": CONTEXT, "handle_impossible_answer": True, "top_k": 2}
    by_probability = shape(theirs(**call))
    for threshold, place in ((-1000.0, 0), (1000.0, None)):
        changed = sealed_copy(bundle, tmp_path / str(threshold), settings={**settings, "null_threshold": threshold})
        texts = [answer["answer"] for answer in pipeline(model=changed)(**call)]
        assert [i for i, text in enumerate(texts) if text == ""] == ([] if place is None else [place])
    assert shape(pipeline(model=bundle)(**call)) == by_probability


def test_every_test_that_the_docs_name_is_there():
    named = set(re.findall(r"`(test_\w+)`", DOCS.read_text(encoding="utf-8")))
    assert len(named) >= 8
    assert named <= {*globals(), *vars(test_compat)}
