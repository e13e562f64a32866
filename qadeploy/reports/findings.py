"""The facts of a run in plain sentences: the main findings, and the captions of the charts."""

from __future__ import annotations

from collections.abc import Sequence

from qadeploy.data.check import RowClass
from qadeploy.data.wording import plural
from qadeploy.reports.run_report import SMALLEST_GROUP, SURE, Epoch, Group, GroupedBy, Grouping, RunFacts

_HONEST = 0.05  # mean confidence and share of right answers this close are called about right
_GROUPED_BY = {
    GroupedBy.QUESTION_WORD: "The first question word in the question; whom and whose count as who.",
    GroupedBy.ANSWER_LENGTH: "Words in the annotated answer, the first one if there are several.",
    GroupedBy.CONTEXT_LENGTH: "Words in the context.",
}


def takeaways(facts: RunFacts) -> tuple[str, ...]:
    """Returns the main findings, the most important first."""
    sure = facts.results.surely_wrong
    annotation = (
        f"{sure:,} {'answer is' if sure == 1 else 'answers are'} entirely wrong at a confidence of {_percent(SURE, 0)} or "
        "more: check their annotations first."
    )
    found = (gain(facts), course(facts), honesty(facts), *hardest(facts), annotation if sure else "")
    return tuple(text for text in found if text)


def weaknesses(facts: RunFacts) -> tuple[str, ...]:
    """Returns the model's weaknesses: the hardest groups, and a confidence that is too high or too low."""
    calibration = facts.results.calibration
    off = abs(calibration.confidence - calibration.accuracy) > _HONEST
    found = (*hardest(facts), *([honesty(facts)] if off else []))
    return found or ("No group of questions stood out as weaker than the rest.",)


def gain(facts: RunFacts) -> str:
    """Returns how fine-tuning changed F1, and how precise F1 is; "" if the base model was not measured."""
    after, before = facts.results.after, facts.results.before
    if before is None:
        return ""
    text = f"Fine-tuning moved F1 from {before.f1:.1f} to {after.f1:.1f} ({after.f1 - before.f1:+.1f})"
    if not after.f1_interval:
        return f"{text}."
    half = (after.f1_interval[1] - after.f1_interval[0]) / 2
    return f"{text}; on {plural(after.total, 'question')} F1 is precise to about ±{half:.1f}."


def course(facts: RunFacts) -> str:
    """Returns which epoch was the best, or that the mean is kept, and whether overfitting followed."""
    best, last, mean = facts.best_epoch, facts.epochs[-1].number, facts.mean
    if mean:
        text = f"The mean of the weights of {mean.number} epochs is kept: no epoch is better on the dev set, beyond chance."
    elif best == last:
        return "The last epoch was the best by dev F1: more epochs may help." if last else ""
    else:
        text = f"Epoch {best} of {last} was the best by dev F1."
    if not any(e.overfits for e in facts.epochs if e.number > best):
        return text
    return (
        f"{text} After epoch {best} the train loss kept falling while the dev loss rose (overfitting): more data will help, but "
        "more epochs will not."
    )


def honesty(facts: RunFacts) -> str:
    """Returns whether the model is right as often as its confidence says."""
    claimed, real = facts.results.calibration.confidence, facts.results.calibration.accuracy
    said = f"mean confidence {_percent(claimed, 0)}, exactly right {_percent(real, 0)}"
    if abs(claimed - real) <= _HONEST:
        return f"Confidence is about right overall: {said}."
    return f"The model is {'overconfident' if claimed > real else 'underconfident'}: {said}."


def hardest(facts: RunFacts) -> tuple[str, ...]:
    """Returns the weakest group of each grouping whose whole interval lies below the overall F1."""
    found = []
    for grouping in facts.results.groupings:
        below = _below(grouping, facts.results.after.f1)
        if below:
            worst = min(below, key=lambda g: g.scores.f1)
            found.append(
                f"Hardest by {grouping.by.value}: {_quoted(worst)} (F1 {worst.scores.f1:.1f} on {plural(worst.scores.total, 'question')})."
            )
    return tuple(found)


def judged(facts: RunFacts) -> str:
    """Returns how many questions the scores are about, and which."""
    which = "held-out questions" if facts.results.held_out else "questions of the dev set"
    return f"{facts.results.after.total:,} {which}"


def searched(facts: RunFacts) -> str:
    """Returns how a search chose the settings, and which figures are therefore too high; "" if there was no search."""
    search = facts.search
    if search is None:
        return ""
    by = f"mean F1 of {search.folds} folds" if search.folds else "F1 on the dev set"
    figures = "the figures of the folds and of the dev set" if search.folds else "the figures of the dev set"
    honest = "; those of the held-out set are not" if facts.results.held_out else ""
    return f"The settings are the best of {plural(len(search.scored), 'trial')} by {by}, so {figures} are optimistic{honest}."


def data_remarks(facts: RunFacts) -> tuple[str, ...]:
    """Returns what to know about the data before trusting the scores."""
    data = facts.data
    remarks = (
        (data.skipped, f"{data.skipped:,} ambiguous rows were skipped."),
        (
            data.first_taken,
            f"{data.first_taken:,} answers occur several times in their context; the first occurrence was used.",
        ),
        (
            data.leaked,
            f"{plural(data.leaked, 'held-out context')} {'is' if data.leaked == 1 else 'are'} also in the training data: the scores "
            "are optimistic.",
        ),
    )
    return tuple(text for number, text in remarks if number)


# ---------------------------------------------------------------- captions


def caption_loss(facts: RunFacts) -> str:
    """Returns what the loss curves show."""
    epochs = facts.epochs
    trained = [e.train_loss for e in epochs if e.train_loss is not None]
    lowest = min(epochs, key=lambda e: e.eval_loss)
    text = f"Dev loss is lowest, {lowest.eval_loss:.3f}, {_at(lowest)}"
    if len(trained) > 1:
        text += f"; train loss goes from {trained[0]:.3f} to {trained[-1]:.3f}"
    overfits = next((f"overfitting starts at epoch {e.number}" for e in epochs if e.overfits), "no sign of overfitting")
    return f"{text}; {overfits}."


def caption_scores(facts: RunFacts) -> str:
    """Returns what the score curves show."""
    first = facts.epochs[0]
    best = facts.mean or next(e for e in facts.epochs if e.number == facts.best_epoch)
    text = f"Dev F1 is {best.f1:.1f} {'with the mean of the epochs' if facts.mean else _at(best)}, which is kept"
    return f"{text}, up from {first.f1:.1f} {_at(first)}." if first.f1 < best.f1 else f"{text}."


def caption_groups(grouping: Grouping, overall: float) -> str:
    """Returns what the scores by group show: the range, and which groups are clearly weaker."""
    sized = [g for g in grouping.groups if g.scores.total >= SMALLEST_GROUP]
    if len(sized) < 2:
        text = f"Fewer than two groups have {SMALLEST_GROUP} questions or more, so there is nothing to compare."
    else:
        low, high = min(sized, key=lambda g: g.scores.f1), max(sized, key=lambda g: g.scores.f1)
        below = [_quoted(g) for g in _below(grouping, overall)]
        are = f"{_listed(below)} {'is' if len(below) == 1 else 'are'} clearly" if below else "no group is clearly"
        text = (
            f"F1 goes from {low.scores.f1:.1f} ({_quoted(low)}) to {high.scores.f1:.1f} ({_quoted(high)}); {are} below the overall F1 of "
            f"{overall:.1f}."
        )
    return f"{text} {_GROUPED_BY[grouping.by]}"


def caption_calibration(facts: RunFacts) -> str:
    """Returns what the reliability diagram shows."""
    found = facts.results.calibration
    points = 100 * (found.confidence - found.accuracy)
    return (
        f"{calibration_error(facts)} Points below the diagonal are overconfident; overall, the mean confidence is "
        f"{abs(points):.1f} points {'above' if points > 0 else 'below'} the share of right answers."
    )


def calibration_error(facts: RunFacts) -> str:
    """Returns the expected calibration error in words, and what it was before the temperature."""
    found = facts.results.calibration
    text = (
        f"On average, confidence is {100 * found.error:.1f} points away from the share of exactly right answers "
        f"(ECE {found.error:.3f})"
    )
    if found.temperature is not None and found.error_before is not None:
        text += f"; before the temperature of {found.temperature:.2f} the ECE was {found.error_before:.3f}"
    return f"{text}."


def caption_windows(facts: RunFacts) -> str:
    """Returns what the counts of windows show."""
    settings, parts = facts.run.metrics["settings"], facts.data.parts
    share = _share(sum(p.by_windows[0] for p in parts), sum(p.questions for p in parts))
    longest = settings.get("long_seq_len")
    return (
        f"{share} of the questions fit into one window of {settings['max_seq_len']} tokens; longer contexts are read in "
        + (f"windows of {longest} tokens." if longest else f"windows that overlap by {settings['doc_stride']}.")
    )


def caption_check(facts: RunFacts) -> str:
    """Returns what the data check shows; "" if there is none."""
    check = facts.data.check
    if check is None:
        return ""
    faults = {n: c for n, c in check.classes.items() if c and n not in {RowClass.EXACT, RowClass.NO_ANSWER}}
    exact = check.classes.get(RowClass.EXACT, 0)
    text = f"{_share(exact, check.rows)} of {plural(check.rows, 'row')} point exactly at their answer"
    if not faults:
        return f"{text}; no fault was found."
    worst = max(faults, key=lambda n: faults[n])
    return f"{text}; the most frequent fault is “{worst}” ({plural(faults[worst], 'row')})."


def caption_no_answer(facts: RunFacts) -> str:
    """Returns what the null threshold gains; "" if there is none."""
    found = facts.results.no_answer
    if found is None:
        return ""
    return (
        f"F1 is {found.f1:.1f} with the null threshold chosen on the dev set ({found.null_threshold:+.3f}), "
        f"{found.f1_threshold_0:.1f} with a threshold of 0 and {found.f1_always_answer:.1f} if every question is answered."
    )


def caption_mistakes(facts: RunFacts) -> str:
    """Returns how many mistakes there are, which are shown, and in what order."""
    wrong, shown = facts.results.wrong, len(facts.results.mistakes)
    if not wrong:
        return f"{mistakes(facts)}."
    which = "all" if shown == wrong else f"the worst {shown}"
    return f"{mistakes(facts)}; {which} are shown, lowest F1 first, then highest confidence."


def mistakes(facts: RunFacts) -> str:
    """Returns how many answers are not fully right, without a full stop."""
    wrong, total = facts.results.wrong, facts.results.after.total
    if not wrong:
        return f"None of the {plural(total, 'question')} was answered wrong"
    return f"{wrong:,} of {plural(total, 'answer')} ({_share(wrong, total)}) {'is' if wrong == 1 else 'are'} not fully right"


# ---------------------------------------------------------------- parts of sentences


def _below(grouping: Grouping, overall: float) -> list[Group]:
    return [g for g in grouping.groups if g.scores.f1_interval and g.scores.f1_interval[1] < overall]


def _quoted(group: Group) -> str:
    return f"“{group.name}”"


def _at(epoch: Epoch) -> str:
    return f"after epoch {epoch.number}" if epoch.number else "before training"


def _share(part: int, whole: int) -> str:
    return _percent(part / max(1, whole))


def _percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f}\u00a0%"


def _listed(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
