"""The sentences of a report, each with facts for which it is true and facts for which it is not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from qadeploy.reports import findings
from qadeploy.reports.facts import GroupedBy, Groups, RunFacts, ScoreFacts
from tests.run_facts_for_tests import epoch, facts


def changed(**changes: Any) -> RunFacts:
    """The facts of the run with other results."""
    return replace(facts(), **changes)


def test_the_gain_is_named_with_what_the_questions_can_tell():
    known = changed(before=ScoreFacts(1, 40.0, 1, 10), after=ScoreFacts(1, 52.6, 1, 200, f1_interval=(46.6, 58.6)))
    assert findings.gain(known) == (
        "Fine-tuning moved F1 from 40.0 to 52.6 (+12.6); on 200 questions F1 is precise to about ±6.0."
    )
    assert findings.gain(changed(before=None)) == ""


def test_the_course_of_training():
    assert "Epoch 2 of 3" in findings.course(facts())
    assert "overfitting" in findings.course(facts())
    assert findings.course(facts({"best_epoch": 3})).startswith("The last epoch")
    calm = [epoch(0, None, 3, 10), epoch(1, 2, 2, 50), epoch(2, 1, 1, 40)]
    assert findings.course(facts({"epochs": calm, "best_epoch": 1})) == "Epoch 1 of 2 was the best by dev F1."
    assert "no sign of overfitting" in findings.caption_loss(facts({"epochs": calm, "best_epoch": 1}))
    assert "overfitting starts at epoch 3" in findings.caption_loss(facts())
    assert "lowest, 1.800, after epoch 2" in findings.caption_loss(facts())
    assert findings.caption_scores(facts()) == (
        "Dev F1 is 60.0 after epoch 2, which is kept, up from 20.0 before training."
    )
    averaged = facts({"mean_of_epochs": {**epoch(3, None, 1.9, 61.0), "epochs": 3}})
    assert findings.course(averaged).startswith(
        "The mean of the weights of 3 epochs is kept: no epoch is better on the dev set, beyond chance. After"
    )
    assert findings.caption_scores(averaged).startswith(
        "Dev F1 is 61.0 with the mean of the epochs, which is kept, up from"
    )


def test_honesty_of_confidence():

    def said(confidence, accuracy):
        calibration = replace(facts().calibration, confidence=confidence, accuracy=accuracy)
        return findings.honesty(changed(calibration=calibration))

    assert "overconfident: mean confidence 90\u00a0%, exactly right 60\u00a0%." in said(0.9, 0.6)
    assert "underconfident" in said(0.4, 0.6)
    assert "about right" in said(0.62, 0.6)


def test_the_caption_of_the_reliability_diagram_names_the_distance():

    def said(confidence, accuracy):
        calibration = replace(facts().calibration, confidence=confidence, accuracy=accuracy)
        return findings.caption_calibration(changed(calibration=calibration))

    assert said(0.9, 0.6).endswith("the mean confidence is 30.0 points above the share of right answers.")
    assert said(0.58, 0.6).endswith("the mean confidence is 2.0 points below the share of right answers.")
    assert said(0.6, 0.6).endswith("the mean confidence is equal to the share of right answers.")


def scored(*groups: tuple[str, int, float, tuple[float, float] | None]) -> Groups:
    return {name: ScoreFacts(f1, f1, f1, count, *[interval] * 3) for name, count, f1, interval in groups}


def test_groups_are_compared_only_if_they_are_large_enough():
    by = GroupedBy.ANSWER_LENGTH
    made = scored(("a", 50, 20.0, (10, 30)), ("b", 60, 70.0, (60, 80)), ("c", 3, 0.0, None))
    text = findings.caption_groups(by, made, 50.0)
    assert text.startswith(
        "F1 goes from 20.0 (“a”) to 70.0 (“b”); “a” is clearly below the overall F1 of 50.0. Words in"
    )
    assert "no group is clearly" in findings.caption_groups(by, made, 25.0)
    assert "nothing to compare" in findings.caption_groups(by, scored(("a", 50, 20.0, (10, 30))), 50.0)
    found = changed(groupings={by: made}, after=ScoreFacts(1, 50.0, 1, 113))
    assert "Hardest by answer length: “a” (F1 20.0 on 50 questions)." in findings.takeaways(found)
    assert "Hardest by answer length: “a” (F1 20.0 on 50 questions)." in findings.weaknesses(found)


def test_counts_of_mistakes():
    found = facts()
    assert "7 of 19 answers (36.8\u00a0%)" in findings.caption_mistakes(found)
    assert "all are shown" in findings.caption_mistakes(found)
    assert "the worst 3 are shown" in findings.caption_mistakes(changed(mistakes=found.mistakes[:3]))
    assert findings.caption_mistakes(changed(wrong=0, mistakes=())).startswith("None of the 19")
    assert any(text.startswith("2 answers are entirely wrong") for text in findings.takeaways(found))
    assert any(text.startswith("1 answer is") for text in findings.takeaways(changed(surely_wrong=1)))


def test_the_check_s_worst_fault_is_named():
    check = {
        "rows": 10,
        "classes": {"exact": 6, "shifted": 3, "absent": 1, "repeated": 5},
        "repaired": 3,
        "rejected": 1,
    }
    assert findings.caption_check(facts({"data_check": check})) == (
        "60.0\u00a0% of 10 rows point exactly at their answer; the most frequent fault is “shifted” (3 rows)."
    )
    clean = {"rows": 10, "classes": {"exact": 9, "no_answer": 1}, "repaired": 0, "rejected": 0}
    assert "no fault" in findings.caption_check(facts({"data_check": clean}))
    assert findings.caption_check(facts()) == ""


def test_remarks_on_the_data():
    assert findings.data_remarks(facts()) == ()
    assert [text.split()[0] for text in findings.data_remarks(facts(skipped=3, first_taken=4))] == ["3", "4"]
    assert findings.data_remarks(facts(skipped=1)) == ("1 ambiguous row left out.",)
    found = facts()
    one, two = (replace(found, leaked=n) for n in (1, 2))
    assert findings.data_remarks(one)[0].startswith("1 held-out context is also in the training data")
    assert findings.data_remarks(two)[0].startswith("2 held-out contexts are also in the training data")
