"""Negatives: no text that is made for a question may answer it, and each belongs to its question."""

from __future__ import annotations

import pytest

from qadeploy.records import Annotation, Example
from qadeploy.training.negatives import LONGEST, ExamplesWithNegatives, holds_answer, with_negatives, without_answer


def example(question: str, context: str, *answers: str, number: int = 0) -> Example:
    return Example(f"q{number}", question, context, tuple(Annotation(a, context.index(a)) for a in answers))


LAMPS = "Ada keeps the lamp in the tower. Bela keeps the boat by the quay. Nobody keeps the old stone bridge."
SHIPS = "The lamp of the ship is kept by Cleo. Ada never saw a ship. The quay was built of oak in winter."
BREAD = "Bread is baked at four in the morning. The baker sings. His oven is older than the town itself."


def test_a_question_is_put_to_another_passage_that_shares_its_words_and_not_its_answer():
    examples = [
        example("Who keeps the boat by the quay?", LAMPS, "Bela"),
        example("Who keeps the lamp of the ship?", SHIPS, "Cleo", number=1),
        example("When is bread baked?", BREAD, "four in the morning", number=2),
    ]
    paired = with_negatives(examples, 1)
    assert paired.examples[:3] == tuple(examples)
    assert paired.groups[:3] == (0, 1, 2)
    made = paired.examples[3:]
    assert [paired.groups[3 + i] for i in range(len(made))] == [0, 1, 2]
    assert made[0].context == SHIPS  # of the two others the one about a quay
    assert made[0].id == "q0#elsewhere-1"
    assert made[1].id == "q1#removed-1"
    assert made[1].context == "Ada never saw a ship. The quay was built of oak in winter."
    assert (paired.on_other_passages, paired.answer_removed) == (2, 1)
    assert all(not e.answers for e in made)


def test_a_passage_that_holds_the_answer_is_never_a_negative():
    examples = [example("Who keeps the lamp?", LAMPS, "Ada"), example("Who sings?", BREAD, "The baker", number=1)]
    paired = with_negatives([*examples, example("Is it oak?", SHIPS, "oak", number=2)], 3)
    for made, group in zip(paired.examples[3:], paired.groups[3:], strict=True):
        assert not holds_answer(paired.examples[group], made.context)
    assert SHIPS not in [e.context for e, g in zip(paired.examples[3:], paired.groups[3:], strict=True) if g == 0]


def test_a_pair_that_the_data_annotates_is_not_made_again():
    examples = [
        example("Who keeps the lamp?", LAMPS, "Ada"),
        example("Who keeps the lamp?", BREAD, "The baker", number=1),  # odd, but somebody says so
        example("What is old?", BREAD, "His oven", number=2),
    ]
    made = with_negatives(examples, 2).examples[3:]
    assert BREAD not in [e.context for e in made if e.question == "Who keeps the lamp?" and e.id.startswith("q0")]


@pytest.mark.parametrize(
    ("context", "answers", "wanted"),
    [
        (LAMPS, ("Bela",), "Ada keeps the lamp in the tower. Nobody keeps the old stone bridge."),
        (LAMPS, ("tower. Bela",), "Nobody keeps the old stone bridge."),  # an answer that crosses two sentences
        (LAMPS, ("Ada", "Bela"), "Nobody keeps the old stone bridge."),  # two annotators
        ("Ada sails in spring. In autumn, when the wind turns, ada stays at home.", ("Ada",), None),  # elsewhere too
        ("Ada keeps the lamp. Yes.", ("lamp",), None),  # next to nothing is left
        (
            "“Ada sails!” he said.\nThe harbour lies empty all through the winter.",
            ("Ada",),
            "The harbour lies empty all through the winter.",
        ),
    ],
)
def test_what_is_left_without_the_sentences_of_the_answer(context, answers, wanted):
    one = Example("q", "?", context, tuple(Annotation(a, context.index(a)) for a in answers))
    found = without_answer(one)
    assert found == wanted


@pytest.mark.parametrize(
    ("text", "held"), [("It was in 1915.", True), ("It was in 19151.", False), ("ADA did.", True), ("Adam did.", False)]
)
def test_an_answer_is_held_as_whole_words_in_any_case(text, held):
    assert holds_answer(Example("q", "?", "Ada 1915", (Annotation("Ada", 0), Annotation("1915", 4))), text) is held


@pytest.mark.parametrize(
    ("answer", "text", "held"),
    [
        ("東京", "昨日は東京に行きました。", True),
        ("มะลิ", "บ้านของมะลิอยู่ที่เชียงใหม่", True),
        ("北京", "北京市在北方。", True),
        ("서울", "서울은 한국의 수도이다.", True),
        ("12", "昨年は12人が来ました。", True),
        ("12", "昨年は312人が来ました。", False),
        ("ink", "They were drinking ink.", True),
        ("ink", "They were drinking.", False),
    ],
)
def test_an_answer_is_held_in_scripts_that_write_words_together(answer, text, held):
    assert holds_answer(Example("q", "?", answer, (Annotation(answer, 0),)), text) is held


def test_of_a_long_passage_a_part_is_taken_that_ends_at_a_word():
    long = "Word " * 1_000
    paired = with_negatives(
        [example("Who?", LAMPS, "Ada"), example("Word?", long + "Cleo ends it.", "Cleo", number=1)], 1
    )
    part = next(e.context for e in paired.examples if e.id == "q0#elsewhere-1")
    assert LONGEST - 10 < len(part) <= LONGEST
    assert part.endswith("Word")


def test_passages_without_a_word_of_two_letters_serve_as_they_are_near():
    contexts = [f"{letter} b c d e f g h i j k l m n o p q r" for letter in "xyz"]
    made = with_negatives([example(f"Who {context[0]}?", context, context[0]) for context in contexts], 1).examples[3:]
    assert [e.context for e in made] == [contexts[1], contexts[2], contexts[1]]


def test_nothing_is_made_of_one_passage_without_other_sentences_nor_for_unanswerable_questions():
    alone = [example("Who keeps?", "Ada keeps.", "Ada"), Example("n", "What?", "Ada keeps.")]
    paired = with_negatives(alone, 2)
    assert paired == ExamplesWithNegatives(tuple(alone), (0, 1))
    assert with_negatives(alone, 0) == paired
