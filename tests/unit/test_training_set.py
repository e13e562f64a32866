"""Which windows train on which labels: windows with an answer's text at an unannotated place have none."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qadeploy.core.settings import QaSettings
from qadeploy.core.windows import Encoder
from qadeploy.data.lengths import load_encoder
from qadeploy.records import Annotation, Example
from qadeploy.shipped import base_model_path
from qadeploy.training.features import FeatureSet, make_features
from qadeploy.training.training_set import SoftLabels, TrainingSet, collate, masked_windows

# 20 words of one token; the question has 2 tokens, 3 are special: 16 - 5 = 11 words a window, overlap 3.
WINDOWS = (range(11), range(8, 19), range(16, 20))
SMALL = QaSettings(max_seq_len=16, doc_stride=3)


@pytest.fixture(scope="module")
def base() -> Encoder:
    return load_encoder(str(base_model_path()))


def example(words: dict[int, str], *answers: tuple[int, str]) -> Example:
    """The word "sea" twenty times, but for ``words``; answers begin at words."""
    all_words = [words.get(i, "sea") for i in range(20)]
    starts = [sum(len(w) + 1 for w in all_words[:i]) for i in range(20)]
    return Example("e", "what ?", " ".join(all_words), tuple(Annotation(text, starts[i]) for i, text in answers))


def features_of(base: Encoder, *examples: Example) -> FeatureSet:
    made = make_features(examples, base, SMALL, "x")
    per_example = [
        range(f.window.context_offset, f.window.context_offset + f.window.context_length) for f in made.features
    ]
    assert per_example == list(WINDOWS) * len(examples)
    return made


@pytest.mark.parametrize(
    ("words", "answers", "masked"),
    [
        ({1: "sky", 18: "sky"}, [(1, "sky")], {1, 2}),
        ({9: "sky", 19: "sky"}, [(9, "sky")], {2}),  # windows 0 and 1 hold the annotation
        ({9: "sky", 2: "sky"}, [(9, "sky")], set()),
        ({1: "sky"}, [(1, "sky")], set()),
        ({1: "sky", 18: "Sky"}, [(1, "sky")], set()),  # another letter case
        ({1: "sky", 18: "skies"}, [(1, "sk")], set()),  # part of a word
        ({1: "sky", 18: "sky"}, [(1, "sky"), (18, "sky")], set()),  # annotated too
        ({1: "sky", 2: "sun", 12: "sun"}, [(1, "sky"), (2, "sun")], {1}),  # one of several answers
        ({1: "sky", 18: "sky"}, [(1, "sky"), (17, "sea sky sea")], set()),  # part of an annotation, which window 1 cuts
        ({1: "sky", 2: "sun", 10: "sky", 11: "sun"}, [(1, "sky sun")], {1}),
        # Window 1 ends after the first of the words.
        ({1: "sky", 2: "sun", 18: "sky", 19: "sun"}, [(1, "sky sun")], {2}),
        ({1: "sky", 18: "sky"}, [(1, "sky ")], {1, 2}),  # white space around an answer does not count
        ({1: "sky", 18: "sky"}, [], set()),
    ],
)
def test_windows_that_hold_the_text_of_an_answer_elsewhere(base, words, answers, masked):
    assert masked_windows(features_of(base, example(words, *answers))) == masked


def test_windows_are_numbered_over_all_questions(base):
    one, other = example({1: "sky", 18: "sky"}, (1, "sky")), example({1: "sun", 18: "sky"}, (1, "sun"))
    assert masked_windows(features_of(base, other, one, other, one)) == {4, 5, 10, 11}


def test_a_context_without_tokens_masks_nothing(base):
    made = make_features([Example("e", "what ?", "\u200b", (Annotation("\u200b", 0),))], base, SMALL, "x")
    assert len(made.contexts[0]) == 0
    assert masked_windows(made) == frozenset()


@settings(deadline=None)
@given(st.sets(st.integers(0, 19), min_size=1), st.data())
def test_a_window_is_masked_if_and_only_if_it_holds_the_text_and_no_annotation(base, places, data):
    annotated = data.draw(st.sets(st.sampled_from(sorted(places)), min_size=1))
    made = features_of(base, example(dict.fromkeys(places, "sky"), *((i, "sky") for i in annotated)))
    expected = {n for n, words in enumerate(WINDOWS) if places & set(words) and not annotated & set(words)}
    assert masked_windows(made) == expected


def test_without_a_teacher_masked_windows_are_left_out(base):
    made = features_of(base, example({1: "sky"}, (1, "sky")), example({1: "sky"}, (1, "sky")))
    found = TrainingSet(made, groups=(0, 0), masked=frozenset({1, 5}))
    assert [found[i].feature for i in range(len(found))] == [made[i] for i in (0, 2, 3, 4)]
    assert found.lengths == [16, 9, 16, 16]
    assert found.units == [[0, 1, 2, 3]]
    assert found.answered == {0, 2}
    assert all(found[i].labelled for i in range(len(found)))


def test_with_a_teacher_masked_windows_keep_its_labels_alone(base):
    made = features_of(base, example({1: "sky"}, (1, "sky")), example({}))
    soft = [SoftLabels(*(np.asarray([n], dtype=kind) for kind in (int, np.float32) * 2)) for n in range(6)]
    found = TrainingSet(made, unlabelled=1, soft=soft, masked=frozenset({1}))
    assert [found[i].labelled for i in range(6)] == [True, False, True, False, False, False]
    assert [found[i].soft for i in range(6)] == soft
    assert collate([found[0], found[1]], 0)["labelled"].tolist() == [True, False]
