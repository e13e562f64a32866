"""Copies of questions on parts of their contexts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qadeploy.records import Annotation, Example
from qadeploy.training.negatives import crops_of, sentences

TEXT = (
    "The boat leaves at ten. Ada keeps the lamp, and Bela the rope! Who keeps the bell? Cora does. The hall is quiet."
)


def question(*answers: str, context: str = TEXT) -> Example:
    return Example("q", "Who?", context, tuple(Annotation(a, context.index(a)) for a in answers))


def test_every_run_of_sentences_that_holds_the_answers_occurs():
    made = crops_of([question("Ada", "Bela")], 200, seed=1)
    cut = [TEXT[start:end] for start, end in sentences(TEXT)]
    assert len(cut) == 5
    runs = {"".join(cut[first:last]) for first in (0, 1) for last in (2, 3, 4, 5)} - {TEXT}
    assert {e.context for e in made} == runs
    for crop in made:
        assert [crop.context[a.start : a.end] for a in crop.answers] == ["Ada", "Bela"]
    assert len({e.id for e in made}) == len(made)


@given(
    st.lists(st.text(st.sampled_from("ab .!?\n\u4e2d\u3002"), min_size=1, max_size=20), min_size=1, max_size=6),
    st.data(),
)
def test_answers_keep_their_text_and_contexts_only_shrink(parts, data):
    context = "".join(parts)
    start = data.draw(st.integers(0, len(context) - 1))
    end = data.draw(st.integers(start + 1, len(context)))
    example = Example("q", "Who?", context, (Annotation(context[start:end], start),))
    assert "".join(context[a:b] for a, b in sentences(context)) == context
    for crop in crops_of([example], 3, seed=data.draw(st.integers(0, 9))):
        (answer,) = crop.answers
        assert crop.context[answer.start : answer.end] == context[start:end]
        assert crop.context in context
        assert len(crop.context) < len(context)


@pytest.mark.parametrize("example", [question(), question("Ada", context="Ada keeps it."), question(TEXT)])
def test_no_copy_without_an_answer_or_of_the_whole_context(example):
    assert crops_of([example], 5, seed=1) == ()


def test_copies_depend_on_the_seed_alone():
    examples = [question("Cora"), question("ten")]
    assert crops_of(examples, 2, 1) == crops_of(examples, 2, 1) != crops_of(examples, 2, 2)
    assert crops_of(examples, 0, 1) == ()
