"""The facts of a run in plain sentences: the main findings, and the captions of the charts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qadeploy.data.check import RowClass
from qadeploy.data.wording import plural
from qadeploy.reports.facts import SMALLEST_GROUP, SURE, GroupedBy, Groups, RunFacts, overfitting

_FAULTS = {*RowClass} - {RowClass.EXACT, RowClass.NO_ANSWER}
_HONEST = 0.05  # mean confidence and share of right answers this close are called about right
_GROUPED_BY = {
    GroupedBy.QUESTION_WORD: "The first question word in the question; whom and whose count as who.",
    GroupedBy.ANSWER_LENGTH: "Words in the annotated answer, the first one if there are several.",
    GroupedBy.CONTEXT_LENGTH: "Words in the context.",
}


def takeaways(facts: RunFacts) -> tuple[str, ...]:
    """Returns the main findings, the most important first."""
    annotation = (
        f"{plural(facts.surely_wrong, 'answer')} {_are(facts.surely_wrong)} entirely wrong at a confidence of "
        f"{_percent(SURE, 0)} or more: check their annotations first."
    )
    found = (gain(facts), course(facts), honesty(facts), *hardest(facts), annotation if facts.surely_wrong else "")
    return tuple(text for text in found if text)


def weaknesses(facts: RunFacts) -> tuple[str, ...]:
    """Returns the model's weaknesses: the hardest groups, and a confidence that is too high or too low."""
    off = abs(facts.calibration.confidence - facts.calibration.accuracy) > _HONEST
    found = (*hardest(facts), *([honesty(facts)] if off else []))
    return found or ("No group of questions stood out as weaker than the rest.",)


def gain(facts: RunFacts) -> str:
    """Returns how fine-tuning changed F1, and how precise F1 is; "" if the base model was not measured."""
    after, before = facts.after, facts.before
    if before is None:
        return ""
    text = f"Fine-tuning moved F1 from {before.f1:.1f} to {after.f1:.1f} ({after.f1 - before.f1:+.1f})"
    if not after.f1_interval:
        return f"{text}."
    half = (after.f1_interval[1] - after.f1_interval[0]) / 2
    return f"{text}; on {plural(after.total, 'question')} F1 is precise to about ±{half:.1f}."


def course(facts: RunFacts) -> str:
    """Returns which epoch was the best, or that the mean is kept, and whether overfitting followed."""
    metrics = facts.run.metrics
    best, last, mean = metrics["best_epoch"], metrics["epochs"][-1]["epoch"], metrics.get("mean_of_epochs")
    if mean:
        text = f"The mean of the weights of {mean['epochs']} epochs is kept: no epoch is better on the dev set, beyond chance."
    elif best == last:
        return "The last epoch was the best by dev F1: more epochs may help." if last else ""
    else:
        text = f"Epoch {best} of {last} was the best by dev F1."
    if not any(epoch > best for epoch in overfitting(metrics["epochs"])):
        return text
    return (
        f"{text} After epoch {best} the train loss kept falling while the dev loss rose (overfitting): more data will help, but "
        "more epochs will not."
    )


def honesty(facts: RunFacts) -> str:
    """Returns whether the model is right as often as its confidence says."""
    claimed, real = facts.calibration.confidence, facts.calibration.accuracy
    said = f"mean confidence {_percent(claimed, 0)}, exactly right {_percent(real, 0)}"
    if abs(claimed - real) <= _HONEST:
        return f"Confidence is about right overall: {said}."
    return f"The model is {'overconfident' if claimed > real else 'underconfident'}: {said}."


def hardest(facts: RunFacts) -> tuple[str, ...]:
    """Returns the weakest group of each grouping whose whole interval lies below the overall F1."""
    found = []
    for by, groups in facts.groupings.items():
        if below := _below(groups, facts.after.f1):
            worst = min(below, key=lambda name: groups[name].f1)
            total = plural(groups[worst].total, "question")
            found.append(f"Hardest by {by.value}: “{worst}” (F1 {groups[worst].f1:.1f} on {total}).")
    return tuple(found)


def judged(facts: RunFacts) -> str:
    """Returns how many questions the scores are about, and which."""
    which = "held-out questions" if facts.held_out else "questions of the dev set"
    return f"{facts.after.total:,} {which}"


def searched(facts: RunFacts) -> str:
    """Returns how a search chose the settings, and which figures are therefore too high; "" if there was no search."""
    search = facts.run.metrics.get("search")
    if not search:
        return ""
    folds, scored = search["folds"], sum(trial["f1"] is not None for trial in search["trials"])
    by = f"mean F1 of {folds} folds" if folds else "F1 on the dev set"
    figures = "the figures of the folds and of the dev set" if folds else "the figures of the dev set"
    honest = "; those of the held-out set are not" if facts.held_out else ""
    return f"The settings are the best of {plural(scored, 'trial')} by {by}, so {figures} are optimistic{honest}."


def data_remarks(facts: RunFacts) -> tuple[str, ...]:
    """Returns what to know about the data before trusting the scores."""
    skipped, first_taken, leaked = facts.skipped, facts.first_taken, facts.leaked
    remarks = {
        f"{plural(skipped, 'ambiguous row')} left out.": skipped,
        f"{plural(first_taken, 'answer')} with several places in the context: the first was used.": first_taken,
        f"{plural(leaked, 'held-out context')} {_are(leaked)} also in the training data: the scores are optimistic.": leaked,
    }
    return tuple(text for text, number in remarks.items() if number)


def caption_loss(facts: RunFacts) -> str:
    """Returns what the loss curves show."""
    rows = facts.run.metrics["epochs"]
    trained = [row["train_loss"] for row in rows if row["train_loss"] is not None]
    lowest = min(rows, key=lambda row: row["eval_loss"])
    text = f"Dev loss is lowest, {lowest['eval_loss']:.3f}, {_at(lowest)}"
    if len(trained) > 1:
        text += f"; train loss goes from {trained[0]:.3f} to {trained[-1]:.3f}"
    epochs = overfitting(rows)
    return f"{text}; {f'overfitting starts at epoch {epochs[0]}' if epochs else 'no sign of overfitting'}."


def caption_scores(facts: RunFacts) -> str:
    """Returns what the score curves show."""
    metrics = facts.run.metrics
    rows, mean = metrics["epochs"], metrics.get("mean_of_epochs")
    kept = mean or next(row for row in rows if row["epoch"] == metrics["best_epoch"])
    text = f"Dev F1 is {kept['eval_f1']:.1f} {'with the mean of the epochs' if mean else _at(kept)}, which is kept"
    return text + (
        f", up from {rows[0]['eval_f1']:.1f} {_at(rows[0])}." if rows[0]["eval_f1"] < kept["eval_f1"] else "."
    )


def caption_groups(by: GroupedBy, groups: Groups, overall: float) -> str:
    """Returns what the scores by group show: the range, and which groups are clearly weaker."""
    sized = [name for name, scores in groups.items() if scores.total >= SMALLEST_GROUP]
    if len(sized) < 2:
        text = f"Fewer than two groups have {SMALLEST_GROUP} questions or more, so there is nothing to compare."
    else:
        low, high = (pick(sized, key=lambda name: groups[name].f1) for pick in (min, max))
        below = [f"“{name}”" for name in _below(groups, overall)]
        text = (
            f"F1 goes from {groups[low].f1:.1f} (“{low}”) to {groups[high].f1:.1f} (“{high}”); "
            f"{_listed(below) or 'no group'} {_are(len(below) or 1)} clearly below the overall F1 of {overall:.1f}."
        )
    return f"{text} {_GROUPED_BY[by]}"


def caption_calibration(facts: RunFacts) -> str:
    """Returns what the reliability diagram shows."""
    found = facts.calibration
    points = round(100 * (found.confidence - found.accuracy), 1)
    place = f"{abs(points)} points {'above' if points > 0 else 'below'}" if points else "equal to"
    return (
        f"{calibration_error(facts)} Points below the diagonal are overconfident; overall, the mean confidence is {place} "
        "the share of right answers."
    )


def calibration_error(facts: RunFacts) -> str:
    """Returns the expected calibration error in words, and what it was before the temperature."""
    found = facts.calibration
    text = (
        f"On average, confidence is {100 * found.error:.1f} points away from the share of exactly right answers "
        f"(ECE {found.error:.3f})"
    )
    if found.temperature is not None and found.error_before is not None:
        text += f"; before the temperature of {found.temperature:.2f} the ECE was {found.error_before:.3f}"
    return f"{text}."


def caption_windows(facts: RunFacts) -> str:
    """Returns what the counts of windows show."""
    settings, parts = facts.run.metrics["settings"], facts.parts
    share = _share(sum(p.by_windows[0] for p in parts), sum(p.questions for p in parts))
    longest = settings.get("long_seq_len")
    return (
        f"{share} of the questions fit into one window of {settings['max_seq_len']} tokens; longer contexts are read in "
        + (f"windows of {longest} tokens." if longest else f"windows that overlap by {settings['doc_stride']}.")
    )


def caption_check(facts: RunFacts) -> str:
    """Returns what the data check shows; "" if there is none."""
    check = facts.run.metrics.get("data_check")
    if not check:
        return ""
    classes, rows = check["classes"], check["rows"]
    text = f"{_share(classes.get(RowClass.EXACT, 0), rows)} of {plural(rows, 'row')} point exactly at their answer"
    faults = [kind for kind in classes if classes[kind] and kind in _FAULTS]
    if not faults:
        return f"{text}; no fault was found."
    worst = max(faults, key=lambda kind: classes[kind])
    return f"{text}; the most frequent fault is “{worst}” ({plural(classes[worst], 'row')})."


def caption_mistakes(facts: RunFacts) -> str:
    """Returns how many mistakes there are, which are shown, and in what order."""
    shown = len(facts.mistakes)
    which = "all" if shown == facts.wrong else f"the worst {shown}"
    order = f"; {which} are shown, lowest F1 first, then highest confidence" if facts.wrong else ""
    return f"{mistakes(facts)}{order}."


def mistakes(facts: RunFacts) -> str:
    """Returns how many answers are not fully right, without a full stop."""
    wrong, total = facts.wrong, facts.after.total
    if not wrong:
        return f"None of the {plural(total, 'question')} was answered wrong"
    return f"{wrong:,} of {plural(total, 'answer')} ({_share(wrong, total)}) {_are(wrong)} not fully right"


def _below(groups: Groups, overall: float) -> list[str]:
    """The groups whose whole interval lies below the overall F1."""
    return [name for name, scores in groups.items() if scores.f1_interval and scores.f1_interval[1] < overall]


def _at(row: Mapping[str, Any]) -> str:
    return f"after epoch {row['epoch']}" if row["epoch"] else "before training"


def _share(part: int, whole: int) -> str:
    return _percent(part / max(1, whole))


def _percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f}\u00a0%"


def _are(number: int) -> str:
    return "is" if number == 1 else "are"


def _listed(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
