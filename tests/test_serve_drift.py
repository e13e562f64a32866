"""Drift in /metrics: the figures of the questions that a server answers, and those of the held-out data."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from qadeploy import Answerer
from qadeploy.core.drift import BOUNDS, Figure
from qadeploy.core.settings import Options
from qadeploy.evaluation.scoring import evaluate
from qadeploy.records import Example
from qadeploy.training.runs import dev_set, find_run
from tests.conftest import sealed_copy, triplets
from tests.servers_for_tests import serving

PAIRS = [(str(row["question"]), str(row["context"])) for row in triplets(3)]
QUESTION, CONTEXT = PAIRS[0]


def distribution(local, metric: str, figure: str, answerer) -> dict[str, float]:
    """The values of a drift metric of one figure, by the bound of the bucket."""
    line = rf'{metric}{{(?=.*hash="{answerer.bundle.hash}")(?=.*figure="{figure}").*le="([^"]+)".*}} (\S+)'
    return {bound: float(value) for bound, value in re.findall(line, local.get("/metrics").text)}


def test_the_held_out_questions_are_distributed_as_the_manifest_says(answerer, tiny):
    held_out = dev_set(find_run(tiny.run))
    with serving(answerer) as local:
        local.ask([{"question": e.question, "context": e.context} for e in held_out])
        for figure, bounds in BOUNDS.items():
            found = distribution(local, "qadeploy_drift_bucket", figure, answerer)
            assert len(found) == len(bounds) + 1
            assert found["+Inf"] == len(held_out) == answerer.bundle.manifest["measured"]["total"]
            shares = distribution(local, "qadeploy_drift_held_out", figure, answerer)
            assert shares == {bound: pytest.approx(count / len(held_out)) for bound, count in found.items()}


def test_drift_counts_what_was_answered_whatever_was_requested(answerer):
    with serving(answerer) as local:
        best, second = answerer.answer(QUESTION, CONTEXT, top_k=2)
        local.ask({"question": QUESTION, "context": CONTEXT, "min_score": 1.0})
        local.ask({"question": QUESTION, "context": "\u200b"})
        read = answerer.encode(QUESTION, CONTEXT, Options())
        nothing = answerer.encode(QUESTION, "\u200b", Options())
        for figure, total in (
            ("score", best.score),
            ("margin", best.score - second.score),
            ("no_answer", 1),
            ("question_tokens", 2 * len(read.question)),
            ("context_tokens", len(read.context) + len(nothing.context)),
        ):
            name = f'{{figure="{figure}",hash="{answerer.bundle.hash}"}}'
            assert local.metric(f"qadeploy_drift_sum{name}") == pytest.approx(total, abs=1e-6)
            assert local.metric(f"qadeploy_drift_count{name}") == 2


def test_held_out_questions_are_watched_as_they_would_be_served(answerer):
    # "no answer" always wins if it competes, as it does by default.
    settings = replace(answerer.settings, null_threshold=-100.0)
    examples = [Example(question, question, context) for question, context in PAIRS]
    other = Answerer(answerer.encoder, settings, answerer.model)
    found = evaluate(other, examples, allow_no_answer=False, drift=True)
    assert all(answer.text for answer in found.answers)
    assert found.drift[Figure.NO_ANSWER].counts == (0, 3)


def test_a_bundle_without_figures_of_held_out_questions_is_served(bundle, tmp_path):
    with serving(Answerer.load(sealed_copy(bundle, tmp_path / "old", drift=None), device="cpu", threads=1)) as local:
        local.ask({"question": QUESTION, "context": CONTEXT})
        text = local.get("/metrics").text
        assert "qadeploy_drift_count{" in text
        assert "qadeploy_drift_held_out{" not in text
