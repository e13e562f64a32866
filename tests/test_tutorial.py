"""docs/tutorial.md, as far as asking: its rows are clean, and a model trained on them gives the answer that it promises."""

from __future__ import annotations

import re
from pathlib import Path

from tests.cli_for_tests import well

TUTORIAL = (Path(__file__).parents[1] / "docs/tutorial.md").read_text(encoding="utf-8")


def test_the_model_trained_on_the_tutorials_rows_gives_its_answer(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = re.search(r"```json\n(.*?)```", TUTORIAL, re.DOTALL)
    Path("faq.jsonl").write_text(rows[1], encoding="utf-8")
    assert "11 rows; faq-clean.rejected.jsonl: 0 rows" in well("check", "faq.jsonl", "--fix", "faq-clean.jsonl").output
    well("train", "--data", "faq-clean.jsonl", "--out", "runs/faq")
    asked = [re.search(rf'--{name} "(.*?)"', TUTORIAL)[1] for name in ("question", "context")]
    promised = re.search(r"The best answer is `(.*?)`", TUTORIAL)[1]
    said = well("ask", "runs/faq", "--top-k", 2, "--question", asked[0], "--context", asked[1]).output
    assert f"1. {promised} " in said
