"""The model card of a run, and the front matter that it shares with bundles."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import yaml

from qadeploy.inference.front_matter import base_label, front_matter, license_of
from qadeploy.reports.run_card import run_card
from tests.run_facts_for_tests import EXAMPLES, RECORD, SEARCH, facts


def head(card: str) -> dict[str, Any]:
    """The front matter, parsed."""
    found = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    assert found
    return yaml.safe_load(found[1])


def test_the_front_matter_is_what_the_hub_expects():
    found = facts()
    values = head(run_card(found))
    assert values["pipeline_tag"] == "question-answering"
    assert values["library_name"] == "transformers"
    assert values["license"] == "cc-by-4.0"
    assert values["base_model"] == "base"
    assert values["metrics"] == ["exact_match", "f1"]
    (index,) = values["model-index"]
    assert index["name"] == "fa q"
    (result,) = index["results"]
    assert result["task"]["type"] == "question-answering"
    assert result["dataset"]["split"] == "validation"
    assert {m["type"]: m["value"] for m in result["metrics"]} == {
        "exact_match": round(found.after.exact_match, 2),
        "f1": round(found.after.f1, 2),
    }


def test_the_card_says_what_was_measured():
    found = facts()
    card = run_card(found)
    low, high = found.after.f1_interval
    assert f"{found.after.f1:.1f} ({low:.1f} to {high:.1f})" in card
    assert f"on {len(EXAMPLES)} held-out questions" in card
    assert "F1 20.0" not in card
    assert "| base model | 10.0 | 20.0 | 9.0 |" in card
    assert f"```sh\n{found.run.command}\n```" in card
    assert "```sh\nqadeploy export 'runs/fa q' --quantize\n```" in card
    assert "overconfident" in card
    assert "It answers every question, even if the text holds no answer." in card
    for heading in ("Intended use", "How to run it", "Results", "Known limits", "Data", "Training"):
        assert f"\n## {heading}\n" in card


def test_a_card_without_held_out_questions_says_that_the_scores_are_too_high():
    card = run_card(facts(held_out=False))
    assert "so the scores are slightly too high" in card
    assert head(card)["model-index"][0]["results"][0]["dataset"]["split"] == "dev"


@pytest.mark.parametrize(
    ("folds", "held_out", "sentence"),
    [
        (None, True, "best of 2 trials by F1 on the dev set, so the figures of the dev set are optimistic; those of the held-out set are not."),
        (None, False, "best of 2 trials by F1 on the dev set, so the figures of the dev set are optimistic."),
        (5, True, "by mean F1 of 5 folds, so the figures of the folds and of the dev set are optimistic; those of the held-out set are not."),
    ],
)  # fmt: skip
def test_a_card_says_which_figures_a_search_makes_too_high(folds, held_out, sentence):
    assert sentence in run_card(facts({"search": {**SEARCH, "folds": folds}}, held_out=held_out))
    assert "so the figures" not in run_card(facts(held_out=held_out))


def test_names_cannot_break_the_markdown():
    from qadeploy.reports.run_card import _code, _code_block

    assert _code("a `b`` c\nd") == "``` a `b`` c d ```"
    assert _code_block("x ```` y", "sh").startswith("`````sh\n")


def test_bases_are_named_without_the_machine_s_paths():
    local = {"sha256": "0" * 64}
    assert base_label({"name": "bert-base-uncased", "sha256": None}) == "bert-base-uncased"
    assert base_label({"name": "org/model", "sha256": None}) == "org/model"
    assert base_label({"name": "/home/me/models/mine", **local}) == "mine"
    assert base_label({"name": "runs/faq/checkpoint", **local}) == "faq"
    assert base_label({"name": "minilm-l6-qa", **local}) == "minilm-l6-qa"


def test_hub_data_are_named_and_unknown_things_are_left_out():
    values = head(
        front_matter(
            "m",
            library="qadeploy",
            base=None,
            dataset="hub:squad:validation",
            dev_set=False,
            scores={"f1": 1, "exact_match": 0},
        )
    )
    assert values["datasets"] == ["squad"]
    assert values["model-index"][0]["results"][0]["dataset"] == {
        "name": "squad",
        "type": "squad",
        "split": "validation",
    }
    assert not {"license", "base_model"} & set(values)


@pytest.mark.parametrize(
    ("text", "license_name"),
    [
        ("---\nlicense: apache-2.0\n---\n# x\n", "apache-2.0"),
        ("# no front matter\n", None),
        ("---\nlicense: [a, b]\n---\n", None),
        ("---\n: : :\n  - broken\n---\n", None),
        ("---\njust text\n---\n", None),
        (None, None),
    ],
)
def test_the_licence_is_that_of_the_base_s_card(text, license_name, tmp_path):
    if text is not None:
        (tmp_path / "README.md").write_text(text)
    assert license_of(tmp_path) == license_name


def test_a_real_run_and_its_bundle_have_cards_that_agree_with_their_records(tiny, bundle):
    run, made = head((tiny.run / "README.md").read_text()), head((bundle / "README.md").read_text())
    metrics = json.loads((tiny.run / "metrics.json").read_text())
    for values, library in ((run, "transformers"), (made, "qadeploy")):
        assert values["library_name"] == library
        assert "license" not in values
        scores = {m["type"]: m["value"] for m in values["model-index"][0]["results"][0]["metrics"]}
        assert scores == {"exact_match": metrics["eval_exact_match"], "f1": metrics["eval_f1"]}
    assert "onnx" in made["tags"]
    assert RECORD["base"].keys() == json.loads((tiny.run / "run.json").read_text())["base"].keys()
