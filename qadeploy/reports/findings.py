"""The facts of a run in plain sentences: what to take away, and what to read off each chart."""

from __future__ import annotations

from collections.abc import Sequence

from qadeploy.reports.run_report import SMALLEST_GROUP, SURE, Epoch, Group, Grouping, RunFacts

_HONEST = 0.05  # mean confidence and share of right answers this close are called right on the whole


def takeaways(facts: RunFacts) -> tuple[str, ...]:
    """What a reader of the run should know first, the most important first."""
    found = [gain(facts), course(facts), honesty(facts), *(_hardest(g, facts.after.f1) for g in facts.groupings)]
    if facts.surely_wrong:
        are = "answer is" if facts.surely_wrong == 1 else "answers are"
        found.append(
            f"{facts.surely_wrong:,} {are} entirely wrong at a confidence of {_percent(SURE, 0)} or more: look at the "
            "annotation first."
        )
    return tuple(text for text in found if text)


def weaknesses(facts: RunFacts) -> tuple[str, ...]:
    """What was seen to be weak: the hardest groups, dishonest confidence, remarks on the data."""
    found = [_hardest(g, facts.after.f1) for g in facts.groupings]
    calibration = facts.calibration
    if abs(calibration.confidence - calibration.accuracy) > _HONEST:
        found.append(honesty(facts))
    return tuple(text for text in (*found, *facts.data_remarks) if text)


def gain(facts: RunFacts) -> str:
    """What fine-tuning did to F1, and how finely so many questions can tell; "" where it was not measured."""
    after, before = facts.after, facts.before
    if before is None:
        return ""
    change = after.f1 - before.f1
    text = f"Fine-tuning moved F1 from {before.f1:.1f} to {after.f1:.1f} ({change:+.1f})"
    if not after.f1_interval:
        return f"{text}."
    half = (after.f1_interval[1] - after.f1_interval[0]) / 2
    return f"{text}; {count(after.total, 'question')} tell it to about ±{half:.1f}."


def course(facts: RunFacts) -> str:
    """Which epoch was the best, and what came after it."""
    best, last = facts.best_epoch, _last(facts.epochs)
    later = [e for e in facts.epochs if e.number > best]
    if not later:
        return "The last epoch was the best by dev F1: more epochs may help." if last else ""
    if _overfits(facts):
        return (
            f"Epoch {best} of {last} was the best by dev F1. After it the train loss kept falling while the dev loss "
            "rose (overfitting): more data helps, more epochs do not."
        )
    return f"Epoch {best} of {last} was the best by dev F1."


def honesty(facts: RunFacts) -> str:
    """Whether the model is as often right as it says."""
    claimed, real = facts.calibration.confidence, facts.calibration.accuracy
    said = f"mean confidence {_percent(claimed, 0)}, {_percent(real, 0)} answered exactly"
    if abs(claimed - real) <= _HONEST:
        return f"Confidence is about right on the whole: {said}."
    return f"The model is too {'sure' if claimed > real else 'modest'}: {said}."


# ---------------------------------------------------------------- captions


def caption_change(facts: RunFacts) -> str:
    """What to read off the scores before and after."""
    text = gain(facts) or f"F1 is {facts.after.f1:.1f}; the base model was not measured on these questions."
    return f"{text} Whiskers are 95\u00a0% intervals."


def caption_loss(facts: RunFacts) -> str:
    """What to read off the curves of loss."""
    trained = [e for e in facts.epochs if e.train_loss is not None]
    lowest = min(facts.epochs, key=lambda e: e.eval_loss)
    text = f"Dev loss is lowest, {lowest.eval_loss:.3f}, {_at(lowest)}"
    if len(trained) > 1:
        first, last = trained[0], trained[-1]
        text += f"; train loss goes from {first.train_loss:.3f} to {last.train_loss:.3f}"
    parted = next((e.number for e in facts.epochs if e.observation.startswith("overfitting")), None)
    return f"{text}; " + (
        "nothing speaks of overfitting." if parted is None else f"overfitting shows from epoch {parted} on."
    )


def caption_scores(facts: RunFacts) -> str:
    """What to read off the curves of scores."""
    best = next(e for e in facts.epochs if e.number == facts.best_epoch)
    first = facts.epochs[0]
    text = f"Dev F1 is {best.f1:.1f} {_at(best)}, which is kept"
    return f"{text}, against {first.f1:.1f} {_at(first)}." if first.number != best.number else f"{text}."


def caption_groups(grouping: Grouping, overall: float) -> str:
    """What to read off the scores by group: the range, and who is below the whole beyond doubt."""
    sized = [g for g in grouping.groups if g.count >= SMALLEST_GROUP]
    if len(sized) < 2:
        return f"Fewer than two groups have {SMALLEST_GROUP} questions or more, so there is nothing to compare."
    low, high = min(sized, key=lambda g: g.f1), max(sized, key=lambda g: g.f1)
    below = [_quoted(g) for g in _below(grouping, overall)]
    doubt = (
        f"{_listed(below)} {'lies' if len(below) == 1 else 'lie'} below all questions' {overall:.1f} with the whole interval"
        if below
        else f"no group's whole interval lies below all questions' {overall:.1f}"
    )
    return f"F1 goes from {low.f1:.1f} ({_quoted(low)}) to {high.f1:.1f} ({_quoted(high)}); {doubt}."


def caption_calibration(facts: RunFacts) -> str:
    """What to read off the reliability diagram."""
    found = facts.calibration
    side = "surer" if found.confidence > found.accuracy else "less sure"
    points = 100 * abs(found.confidence - found.accuracy)
    return (
        f"{calibration_error(facts)} Below the diagonal lie answers surer than right; on the whole the model is "
        f"{points:.1f} points {side} than right."
    )


def calibration_error(facts: RunFacts) -> str:
    """The expected calibration error in words, and what it was before the temperature."""
    found = facts.calibration
    text = (
        f"A confidence is on average {100 * found.error:.1f} points away from the share of such answers that is "
        f"exactly right (ECE {found.error:.3f})"
    )
    if found.temperature is not None and found.error_before is not None:
        text += f"; before the temperature of {found.temperature:.2f} the ECE was {found.error_before:.3f}"
    return f"{text}."


def caption_windows(facts: RunFacts) -> str:
    """What to read off the counts of windows."""
    questions = sum(p.questions for p in facts.parts)
    one = sum(p.by_windows[0] for p in facts.parts)
    return (
        f"{_share(one, questions)} of the questions fit into one window of {facts.settings['max_seq_len']} tokens; "
        f"longer contexts are read in windows that overlap by {facts.settings['doc_stride']}."
    )


def caption_check(facts: RunFacts) -> str:
    """What to read off the data check."""
    check = facts.data_check
    if check is None:
        return ""
    faults = {n: c for n, c in check.classes.items() if c and n not in {"exact", "no_answer"}}
    text = f"{_share(check.classes.get('exact', 0), check.rows)} of {count(check.rows, 'row')} point exactly at their answer"
    if not faults:
        return f"{text}; no fault was found."
    worst = max(faults, key=lambda n: faults[n])
    return f"{text}; the most frequent fault is {worst!r} ({count(faults[worst], 'row')})."


def caption_no_answer(facts: RunFacts) -> str:
    """What the null threshold brings."""
    found = facts.no_answer
    return (
        f"F1 is {found['f1']:.1f} with the null threshold chosen on the dev part ({found['null_threshold']:+.3f}), "
        f"{found['f1_threshold_0']:.1f} with a threshold of 0 and {found['f1_always_answer']:.1f} where every question "
        "is answered."
    )


def caption_mistakes(facts: RunFacts) -> str:
    """How many mistakes there are, which are shown, and in what order."""
    total = facts.after.total
    if not facts.wrong:
        return f"None of the {count(total, 'question')} was answered wrong."
    text = f"{facts.wrong:,} of {count(total, 'question')} ({_share(facts.wrong, total)}) are not fully right"
    shown = "all are" if len(facts.mistakes) == facts.wrong else f"{len(facts.mistakes)} are"
    return f"{text}; {shown} shown, the lowest F1 first, of equals the most confident."


def count(number: int, noun: str) -> str:
    """``1,234 questions``, ``1 question``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


# ---------------------------------------------------------------- parts of sentences


def _hardest(grouping: Grouping, overall: float) -> str:
    """The weakest group of some size, where its whole interval lies below the overall F1; else nothing."""
    below = _below(grouping, overall)
    if not below:
        return ""
    worst = min(below, key=lambda g: g.f1)
    return (
        f"Hardest {grouping.title[:1].lower()}{grouping.title[1:]}: {_quoted(worst)} (F1 {worst.f1:.1f} on "
        f"{count(worst.count, 'question')})."
    )


def _below(grouping: Grouping, overall: float) -> list[Group]:
    return [g for g in grouping.groups if g.f1_interval and g.f1_interval[1] < overall]


def _quoted(group: Group) -> str:
    return f"“{group.name}”"


def _overfits(facts: RunFacts) -> bool:
    return any(e.observation.startswith("overfitting") for e in facts.epochs if e.number > facts.best_epoch)


def _last(epochs: Sequence[Epoch]) -> int:
    return max((e.number for e in epochs), default=0)


def _at(epoch: Epoch) -> str:
    return f"after epoch {epoch.number}" if epoch.number else "before training"


def _share(part: int, whole: int) -> str:
    return _percent(part / max(1, whole))


def _percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f}\u00a0%"


def _listed(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
