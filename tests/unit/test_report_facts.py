"""The facts of a run's report against brute force over its questions and answers."""

from __future__ import annotations

import shlex
from dataclasses import replace

import numpy as np
import pytest

from qadeploy.cli import main
from qadeploy.core.metrics import exact_match, f1, score
from qadeploy.reports import findings
from qadeploy.reports.facts import (
    SMALLEST_GROUP,
    SURE,
    GroupedBy,
    RunRecord,
    count_words,
    make_facts,
    question_word,
    worst_mistakes,
)
from qadeploy.shipped import BASE_MODEL
from tests.run_facts_for_tests import ANSWERS, EXAMPLES, JUDGED, METRICS, RECORD, example, facts, parts

ROWS = [
    (
        max(exact_match(text, g) for g in [a.text for a in e.answers] or [""]),
        max(f1(text, g) for g in [a.text for a in e.answers] or [""]),
        confidence,
    )
    for e, text, confidence in JUDGED
]


def command_of(options):
    return RunRecord("run", {"options": options}, {}).command


def test_scores_are_the_means_of_the_rows():
    found = facts().after
    assert found.total == len(JUDGED)
    assert found.exact_match == pytest.approx(100 * np.mean([r[0] for r in ROWS]))
    assert found.f1 == pytest.approx(100 * np.mean([r[1] for r in ROWS]))
    assert found.f1_interval[0] < found.f1 < found.f1_interval[1]


@pytest.mark.parametrize("by", GroupedBy)
def test_groups_add_up_to_all_questions(by):
    found = facts()
    groups = found.groupings[by].values()
    total = sum(g.total for g in groups)
    assert total == len(JUDGED)
    for name in ("f1", "exact_match", "accuracy"):
        assert sum(g.total * getattr(g, name) for g in groups) == pytest.approx(total * getattr(found.after, name))
        for group in groups:
            interval = getattr(group, f"{name}_interval")
            assert (interval is None) == (group.total < SMALLEST_GROUP)
            if interval:
                assert interval[0] <= getattr(group, name) <= interval[1]


def test_groups_hold_the_questions_that_belong_to_them():
    words, answers, contexts = facts().groupings.values()
    where = words["where"]
    assert (where.total, where.f1) == (12, 100.0)
    low, high = where.f1_interval  # the bootstrap of twelve ones would claim 100 to 100
    assert (low, high) == (pytest.approx(75.75, abs=0.01), 100.0)
    assert list(words) == ["who", "what", "when", "where", "how", "which", "other"]
    of_two = [
        f
        for (e, _, _), (_, f, _) in zip(JUDGED, ROWS, strict=True)
        if e.answers and len(e.answers[0].text.split()) == 2
    ]
    assert (answers["2"].total, answers["2"].f1) == (len(of_two), pytest.approx(100 * np.mean(of_two)))
    assert (next(iter(answers)), answers["no answer"].total) == ("no answer", 1)
    assert [(name, scores.total) for name, scores in contexts.items()] == [("1–50", 18), ("over 800", 1)]


@pytest.mark.parametrize(
    ("question", "word"),
    [
        ("Who's there?", "who"),
        ("To whom was it sold, and when?", "who"),
        ("In WHICH year?", "which"),
        ("Somewhere, somehow: what then?", "what"),
        ("Name the dog.", "other"),
        ("", "other"),
    ],
)
def test_question_words(question, word):
    assert question_word(question) == word


def test_words_of_scripts_without_spaces_are_characters():
    assert count_words("the sky  is\nblue") == 4
    assert count_words("東京タワー") == 5
    assert count_words("in 東京") == 3
    assert count_words(" ") == 0


def test_mistakes_are_the_lowest_f1_and_the_most_confident_of_equals():
    brute = sorted(((f, -c, i) for i, (_, f, c) in enumerate(ROWS) if f < 1), key=lambda t: t[:2])
    found = facts()
    assert [m.example.id for m in found.mistakes] == [EXAMPLES[i].id for _, _, i in brute]
    assert found.wrong == len(brute) == 7
    assert found.surely_wrong == sum(f == 0 and c >= SURE for _, f, c in ROWS) == 2
    few = worst_mistakes(EXAMPLES, ANSWERS, score(EXAMPLES, ANSWERS), 3)
    assert few == found.mistakes[:3]


def test_calibration_is_guo_s_error_on_the_answers():
    found = facts().calibration
    error = 0.0
    for i in range(10):
        inside = [(c, e) for e, _, c in ROWS if i / 10 < c <= (i + 1) / 10]
        if inside:
            error += len(inside) / len(ROWS) * abs(np.mean([e for _, e in inside]) - np.mean([c for c, _ in inside]))
    assert found.error == pytest.approx(error)
    assert sum(b.count for b in found.bins) == len(ROWS)
    assert (found.temperature, found.error_before) == (None, None)
    fitted = facts({"calibration": {"temperature": 1.5, "held_out": {"ece_before": 0.3}, "dev": {"ece_before": 0.9}}})
    assert (fitted.calibration.temperature, fitted.calibration.error_before) == (1.5, 0.3)


def test_parts_are_counted():
    train, dev, judged = facts().parts
    assert (train.questions, train.contexts, train.windows, train.by_windows) == (2, 2, 3, (1, 1, 0, 0, 0))
    assert (dev.questions, dev.windows) == (1, 1)
    assert (judged.questions, judged.without_answer, judged.windows) == (19, 1, 23)
    assert judged.by_windows == (18, 0, 0, 1, 0)
    assert judged.context_words[1] == max(len(e.context.split()) for e in EXAMPLES)
    assert all(sum(p.by_windows) == p.questions for p in (train, dev, judged))
    first, *rest = parts()
    taught = replace(first, examples=(*first.examples, example("t", "Who?", "Ada.")), windows=(*first.windows, 1))
    for unlabelled, without_answer in ((0, 1), (1, 0)):
        run = RunRecord("run", RECORD, METRICS)
        found = make_facts(run, [replace(taught, unlabelled=unlabelled), *rest], ANSWERS).parts[0]
        assert (found.questions, found.without_answer) == (3, without_answer)


def test_without_a_held_out_set_the_dev_set_is_judged_with_settings_chosen_for_the_base_too():
    found = facts(held_out=False)
    assert not found.held_out
    assert found.before.f1 == METRICS["dev_base"]["f1"] != METRICS["epochs"][0]["eval_f1"]
    assert found.before.f1_interval is None
    assert findings.judged(found) == "19 questions of the dev set"


def test_leaks_and_skipped_rows_are_counted():
    found = facts(skipped=3, first_taken=4)
    assert (found.skipped, found.first_taken, found.leaked) == (3, 4, 0)
    (train, dev, judged), run = parts(), RunRecord("run", RECORD, METRICS)
    leaking = replace(train, examples=(train.examples[0], EXAMPLES[0]))
    assert make_facts(run, [leaking, dev, judged], ANSWERS).leaked == 1
    assert make_facts(run, [dev, judged], ANSWERS).leaked == 0


def test_no_answer_facts_are_those_of_the_judged_questions():
    scores = {"f1": 61.2, "f1_threshold_0": 58.0, "f1_always_answer": 40.1}
    chosen = {"null_threshold": -1.2, "dev": {**scores, "f1": 1.0}, "held_out": scores}
    assert facts({"no_answer": chosen}).no_answer == {"null_threshold": -1.2, **scores}
    assert facts().no_answer is None


@pytest.mark.parametrize("data", [("faq & answers.jsonl",), ("old.csv", "new rows.jsonl")])
def test_the_command_gives_the_options_back_to_the_command_line(data):
    options = RECORD["options"] | {"data": data if len(data) > 1 else data[0]}
    command = command_of(options)
    words = shlex.split(command.replace("\\\n", " "))
    assert words[:2] == ["qadeploy", "train"]
    train = main.commands["train"]
    parsed = train.make_context("train", words[2:]).params
    for name, value in options.items():
        assert parsed[name] == (data if name == "data" else value), name


def test_the_base_that_ships_needs_no_naming():
    assert "--base" not in command_of({**RECORD["options"], "base": BASE_MODEL})
    assert "--base" in command_of(RECORD["options"])


def test_flags_and_mappings_are_written_as_the_command_line_takes_them():
    options = {"fast": True, "slow": False, "columns": {"context": "review", "answer": "a b"}, "none": None}
    assert command_of(options).split(" \\\n  ") == [
        "qadeploy train",
        "--fast",
        "--columns 'context=review,answer=a b'",
    ]


def test_a_run_without_mistakes():
    *learned, judged = parts()
    right = [replace(a, text=e.answers[0].text) for e, a in zip(EXAMPLES[7:], ANSWERS[7:], strict=True)]
    judged = replace(judged, examples=EXAMPLES[7:], windows=judged.windows[7:])
    found = make_facts(RunRecord("run", RECORD, METRICS), [*learned, judged], right)
    assert (found.wrong, found.surely_wrong, found.mistakes) == (0, 0, ())
