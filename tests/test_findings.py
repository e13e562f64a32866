"""The sentences of a report, each against facts in which it is true and in which it is not."""

from __future__ import annotations

from dataclasses import replace

from qadeploy.reports import findings
from qadeploy.reports.run_report import Group, Grouping, ScoreFacts
from tests.run_facts_for_tests import epoch, facts


def test_the_gain_is_named_with_what_the_questions_can_tell():
    found = facts()
    known = replace(
        found, before=ScoreFacts(1, 40.0, 1, 10), after=ScoreFacts(1, 52.6, 1, 200, f1_interval=(46.6, 58.6))
    )
    assert (
        findings.gain(known) == "Fine-tuning moved F1 from 40.0 to 52.6 (+12.6); 200 questions tell it to about ±6.0."
    )
    assert findings.gain(replace(known, before=None)) == ""
    assert "was not measured" in findings.caption_change(replace(known, before=None))


def test_the_course_of_training():
    assert "Epoch 2 of 3" in findings.course(facts())
    assert "overfitting" in findings.course(facts())
    assert findings.course(facts({"best_epoch": 3})).startswith("The last epoch")
    calm = [epoch(0, None, 3, 10), epoch(1, 2, 2, 50), epoch(2, 1, 1, 40)]
    assert findings.course(facts({"epochs": calm, "best_epoch": 1})) == "Epoch 1 of 2 was the best by dev F1."
    assert "nothing speaks of overfitting" in findings.caption_loss(facts({"epochs": calm, "best_epoch": 1}))
    assert "from epoch 3 on" in findings.caption_loss(facts())
    assert "lowest, 1.800, after epoch 2" in findings.caption_loss(facts())
    assert (
        findings.caption_scores(facts()) == "Dev F1 is 60.0 after epoch 2, which is kept, against 20.0 before training."
    )


def test_honesty_of_confidence():
    found = facts()

    def said(confidence, accuracy):
        return findings.honesty(
            replace(found, calibration=replace(found.calibration, confidence=confidence, accuracy=accuracy))
        )

    assert "too sure: mean confidence 90\u00a0%, 60\u00a0% answered" in said(0.9, 0.6)
    assert "too modest" in said(0.4, 0.6)
    assert "about right" in said(0.62, 0.6)


def grouping(*groups: tuple[str, int, float, tuple[float, float] | None]) -> Grouping:
    return Grouping("By x", "", tuple(Group(n, c, f, f, i, i) for n, c, f, i in groups))


def test_groups_are_compared_only_where_there_is_enough():
    made = grouping(("a", 50, 20.0, (10, 30)), ("b", 60, 70.0, (60, 80)), ("c", 3, 0.0, None))
    text = findings.caption_groups(made, 50.0)
    assert text == "F1 goes from 20.0 (“a”) to 70.0 (“b”); “a” lies below all questions' 50.0 with the whole interval."
    assert "no group's whole interval" in findings.caption_groups(made, 25.0)
    assert "nothing to compare" in findings.caption_groups(grouping(("a", 50, 20.0, (10, 30))), 50.0)
    found = replace(facts(), groupings=(made,), after=ScoreFacts(1, 50.0, 1, 113))
    assert "Hardest by x: “a” (F1 20.0 on 50 questions)." in findings.takeaways(found)
    assert "Hardest by x: “a” (F1 20.0 on 50 questions)." in findings.weaknesses(found)


def test_counts_of_mistakes():
    found = facts()
    assert "7 of 19 questions (36.8\u00a0%)" in findings.caption_mistakes(found)
    assert "all are shown" in findings.caption_mistakes(found)
    assert "3 are shown" in findings.caption_mistakes(replace(found, mistakes=found.mistakes[:3]))
    assert findings.caption_mistakes(replace(found, wrong=0, mistakes=())).startswith("None of the 19")
    assert any(text.startswith("2 answers are entirely wrong") for text in findings.takeaways(found))
    assert any(text.startswith("1 answer is") for text in findings.takeaways(replace(found, surely_wrong=1)))


def test_the_check_s_worst_fault_is_named():
    check = {"rows": 10, "classes": {"exact": 6, "shifted": 3, "absent": 1}, "repaired": 3, "rejected": 1}
    assert findings.caption_check(facts({"data_check": check})) == (
        "60.0\u00a0% of 10 rows point exactly at their answer; the most frequent fault is 'shifted' (3 rows)."
    )
    clean = {"rows": 10, "classes": {"exact": 9, "no_answer": 1}, "repaired": 0, "rejected": 0}
    assert "no fault" in findings.caption_check(facts({"data_check": clean}))
    assert findings.caption_check(facts()) == ""
