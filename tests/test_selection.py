"""What training chooses on its dev set, against plain loops over every span."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from qadeploy.core.metrics import exact_match, f1
from qadeploy.core.settings import QaSettings
from qadeploy.records import Annotation, Example
from qadeploy.training.checkpoint import load_checkpoint
from qadeploy.training.features import FeatureSet, make_features
from qadeploy.training.run_log import RunLog
from qadeploy.training.selection import (
    answers_of,
    calibration_report,
    can_tune_threshold,
    choose_settings,
    initial_settings,
    no_answer_report,
    report_choice,
    score_logits,
)

NULL = QaSettings(40, 12, 15, null_threshold=0.0)
TEXT = "Ada keeps the lamp in room 3. Bela keeps the boat outside. The hall is quiet. Cora keeps the bell. " * 2
Logits = tuple[np.ndarray, np.ndarray]


def examples(count: int = 18) -> list[Example]:
    """Questions on contexts of one to three windows; every third has no answer."""
    words = ["Ada", "the lamp in room 3", "Bela", "boat outside. The hall is quiet. Cora keeps the bell"]
    found = []
    for i in range(count):
        context = f"Room {i}. " + TEXT[: 80 + 40 * (i % 3)]
        answers = [w for w in words[i % 4 :] if w in context][: 1 + i % 2]
        gold = tuple(Annotation(w, context.index(w)) for w in answers) if i % 3 else ()
        found.append(Example(str(i), "Who keeps it?", context, gold))
    return found


@pytest.fixture(scope="module")
def features(tiny_checkpoint: Path) -> FeatureSet:
    return make_features(examples(), load_checkpoint(tiny_checkpoint).encoder, NULL, "here")


def logits_of(features: FeatureSet, seed: int = 0, help_gold: float = 3.0, null: float = 0.0) -> Logits:
    """Random logits in which annotated spans stand out a little."""
    generator = np.random.default_rng(seed)
    starts, ends = generator.normal(size=(2, len(features), 40)).astype(np.float32)
    for row, feature in enumerate(features.features):
        first, last = feature.positions[0]
        starts[row, first] += help_gold * generator.random()
        ends[row, last] += help_gold * generator.random()
        starts[row, feature.window.null_index] += null
    return starts, ends


def spans(features: FeatureSet, logits: Logits, index: int, longest: int) -> tuple[dict[tuple[int, int], float], float]:
    """By plain loops: code point span to its best logit over windows, and the lowest null logit over windows."""
    context, best, null = features.contexts[index], {}, math.inf
    for row in range(features.first[index], features.first[index + 1]):
        w, starts, ends = features.features[row].window, logits[0][row], logits[1][row]
        null = min(null, float(starts[w.null_index]) + float(ends[w.null_index]))
        for a in range(w.context_length):
            for b in range(a, min(w.context_length, a + longest)):
                logit = float(starts[w.context_begin + a]) + float(ends[w.context_begin + b])
                offsets = context.offsets[w.context_offset + a, 0], context.offsets[w.context_offset + b, 1]
                key = (int(offsets[0]), int(offsets[1]))
                best[key] = max(best.get(key, -math.inf), logit)
    return best, null


def brute_best(features: FeatureSet, logits: Logits, longest: int) -> list[tuple[str, float]]:
    """One row per question: the best span's text, and the null logit minus its logit."""
    rows = []
    for i, example in enumerate(features.examples):
        table, null = spans(features, logits, i, longest)
        (start, end), top = max(table.items(), key=lambda item: item[1])
        rows.append((example.context[start:end], null - top))
    return rows


def texts_at(rows: list[tuple[str, float]], threshold: float | None) -> list[str]:
    """The answers: null where it exceeds the best span by more than the threshold; None never."""
    return ["" if threshold is not None and difference > threshold else text for text, difference in rows]


def brute_f1_row(example: Example, text: str) -> float:
    return max(f1(text, gold) for gold in [a.text for a in example.answers] or [""])


def brute_f1(features: FeatureSet, texts: list[str]) -> float:
    return 100 * sum(map(brute_f1_row, features.examples, texts)) / len(texts)


@pytest.mark.parametrize("threshold", [-2.0, 0.0, 1.5])
def test_answers_follow_the_rule_of_squad_v2(features, threshold):
    logits = logits_of(features, null=3.0)
    found = [a.text for a in answers_of(features, logits, replace(NULL, null_threshold=threshold))]
    assert found == texts_at(brute_best(features, logits, 15), threshold)
    assert 0 < sum(not t for t in found) < len(found)
    scores = score_logits(features, logits, replace(NULL, null_threshold=threshold))
    assert scores.f1 == pytest.approx(brute_f1(features, found))


@pytest.mark.parametrize(("seed", "null"), [(0, 3.0), (1, -2.0), (2, 8.0)])
def test_the_threshold_is_the_mean_of_the_best_of_samples(features, seed, null):
    logits = logits_of(features, seed, null=null)
    chosen = choose_settings(features, logits, NULL)
    # Of bootstrap samples, whatever their seed.
    rows = brute_best(features, logits, NULL.max_answer_len)
    span_f1, null_f1 = (
        [brute_f1_row(e, t) for e, t in zip(features.examples, texts, strict=True)]
        for texts in (texts_at(rows, None), [""] * len(rows))
    )
    generator = random.Random(7)
    found = []
    for _ in range(1500):
        sample = [generator.randrange(len(rows)) for _ in rows]
        values = sorted({rows[i][1] for i in sample})
        tried = [values[0] - 1, *((a + b) / 2 for a, b in pairwise(values)), values[-1] + 1]
        earned = [sum(null_f1[i] if rows[i][1] > t else span_f1[i] for i in sample) for t in tried]
        top = max(earned)
        found.append(min((t for t, e in zip(tried, earned, strict=True) if e > top - 1e-9), key=abs))
    assert chosen.null_threshold == pytest.approx(np.mean(found), abs=4 * np.std(found) / math.sqrt(200))

    report = no_answer_report(features, logits, chosen)
    assert report["f1"] == pytest.approx(score_logits(features, logits, chosen).f1)
    for name, threshold in (("f1_threshold_0", 0.0), ("f1_always_answer", None)):
        by_hand = brute_f1(features, texts_at(rows, threshold))
        assert report[name] == pytest.approx(by_hand)


def given(features: FeatureSet, logits: Logits, settings: QaSettings, temperature: float) -> list[tuple[float, float]]:
    """By plain loops, one row per question: the score of the answer given, and whether it matches exactly."""
    rows = []
    for i, example in enumerate(features.examples):
        table, null = spans(features, logits, i, settings.max_answer_len)
        (start, end), top = max(table.items(), key=lambda item: item[1])
        total = sum(math.exp(x / temperature) for x in (*table.values(), null))
        unanswered = null - top > (settings.null_threshold or 0.0)
        text, logit = ("", null) if unanswered else (example.context[start:end], top)
        right = max(exact_match(text, a.text) for a in example.answers) if example.answers else float(not text)
        rows.append((math.exp(logit / temperature) / total, right))
    return rows


@pytest.mark.parametrize("help_gold", [3.0, 8.0])
def test_the_temperature_makes_scores_as_high_as_answers_are_right(features, help_gold):
    logits = logits_of(features, 3, help_gold=help_gold, null=1.0)
    chosen = choose_settings(features, logits, NULL)
    right = [r for _, r in given(features, logits, chosen, 1.0)]
    hits = sum(right)
    assert 2 < hits < len(right)
    targets = [(hits + 1) / (hits + 2) if r else 1 / (len(right) - hits + 2) for r in right]

    def loss(temperature: float) -> float:
        scores = [score for score, _ in given(features, logits, chosen, temperature)]
        squares = sum((p - t) ** 2 for p, t in zip(scores, targets, strict=True))
        return squares + 0.6 * math.log(temperature) ** 2  # the prior of fit_temperature

    grid = np.geomspace(0.2, 5, 61)
    assert chosen.temperature == pytest.approx(grid[np.argmin([loss(t) for t in grid])], rel=0.08)
    assert loss(chosen.temperature) < loss(1.0)


def test_the_report_of_the_calibration_is_that_of_the_scores(features):
    logits = logits_of(features, 3, null=1.0)
    settings = replace(NULL, temperature=0.5)
    report = calibration_report(features, logits, settings)
    for name, temperature in (("ece_before", 1.0), ("ece", 0.5)):
        bins: dict[int, list[float]] = {}
        for share, right in given(features, logits, settings, temperature):
            bins.setdefault(math.ceil(share * 10), []).append(right - share)
        by_hand = sum(abs(sum(gaps)) for gaps in bins.values()) / len(features.examples)
        assert report[name] == pytest.approx(by_hand, abs=1e-6)
    assert sum(b["count"] for b in report["bins"]) == len(features.examples)


def test_a_balanced_threshold_is_chosen_only_on_ten_questions_of_each_kind(tiny_checkpoint):
    kinds = [[e for e in examples(60) if bool(e.answers) == answered] for answered in (True, False)]
    encoder = load_checkpoint(tiny_checkpoint).encoder
    for answered, unanswered in ((10, 10), (20, 9), (9, 20)):
        some = make_features([*kinds[0][:answered], *kinds[1][:unanswered]], encoder, NULL, "here")
        enough = min(answered, unanswered) >= 10
        assert can_tune_threshold(some, balanced=False)
        assert can_tune_threshold(some, balanced=True) == enough
        # The model gives the questions without an answer the surest spans, which a product of the two shares follows far.
        chosen = choose_settings(some, logits_of(some, null=-9.0), NULL, balanced=True)
        assert (chosen.null_threshold != 0) == enough


def test_without_questions_of_both_kinds_the_threshold_stays(tiny_checkpoint, features):
    answerable = [e for e in examples() if e.answers]
    some = make_features(answerable, load_checkpoint(tiny_checkpoint).encoder, NULL, "here")
    logits = logits_of(some, null=3.0)
    assert can_tune_threshold(features, balanced=False)
    assert not can_tune_threshold(some, balanced=False)
    chosen = choose_settings(some, logits, replace(NULL, null_threshold=0.75))
    assert chosen.null_threshold == 0.75
    report = report_choice(some, logits, chosen)
    assert report == (calibration_report(some, logits, chosen), no_answer_report(some, logits, chosen))
    said: list[str] = []
    for tuned in (False, True):
        RunLog(said.append).choice("dev", *report, chosen, tuned=tuned)
    assert ["NOT tuned" in line for line in said] == [True, False]

    never = choose_settings(some, logits, replace(NULL, null_threshold=None))
    assert never.null_threshold is None
    report = report_choice(some, logits, never)
    assert report[1] is None
    RunLog(said.append).choice("dev", *report, never)
    assert "null threshold" not in said[-1]
    assert f"temperature {never.temperature:.3f}" in said[-1]
    assert all(a.text for a in answers_of(some, logits, never))


def test_what_epochs_are_judged_with_owes_nothing_to_the_base(features, tiny_checkpoint):
    stored = replace(NULL, null_threshold=4.0, temperature=2.0)
    found = initial_settings(stored, features)
    assert replace(found, max_answer_len=NULL.max_answer_len) == replace(NULL, relative_to_null=True)
    answerable = [e for e in examples() if e.answers]
    some = make_features(answerable, load_checkpoint(tiny_checkpoint).encoder, NULL, "here")
    found = initial_settings(stored, some)
    assert replace(found, max_answer_len=NULL.max_answer_len) == replace(NULL, null_threshold=None)
    none = Example("none", "Who?", answerable[0].context, ())
    taught = make_features([*answerable, none], load_checkpoint(tiny_checkpoint).encoder, NULL, "here")
    assert initial_settings(stored, taught, unlabelled=1) == found  # nobody said that it has no answer
    assert initial_settings(stored, taught).relative_to_null


@pytest.mark.parametrize(("short", "longest"), [(97, 9), (98, 8), (99, 8), (0, 9)])
def test_the_longest_answer_is_one_that_98_percent_of_training_answers_fit_in(tiny_checkpoint, short, longest):
    texts = ["Ada"] * (short // 2) + ["the lamp"] * (short - short // 2)
    texts += ["keeps the lamp in room 3. Bela keeps"] * (100 - short)
    made = [Example(str(i), "Who?", TEXT, (Annotation(t, TEXT.index(t)),)) for i, t in enumerate(texts)]
    none = Example("none", "Who?", TEXT, ())
    encoder = load_checkpoint(tiny_checkpoint).encoder
    assert initial_settings(NULL, make_features([*made, none], encoder, NULL, "here")).max_answer_len == longest
    assert initial_settings(NULL, make_features([none], encoder, NULL, "here")).max_answer_len == NULL.max_answer_len
