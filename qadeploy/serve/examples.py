"""Texts and questions to try on the page: papers of the handbook that were held out from training."""

from __future__ import annotations

import json
from typing import Any

from qadeploy.shipped import HANDBOOK

# Ids of rows in data/handbook.jsonl, three per paper.
_ROWS = (
    ("his-18-03", "his-18-07", "his-18-02"),
    ("saf-09-02", "saf-09-01", "saf-09-06"),
    ("eng-02-03", "eng-02-07", "eng-02-05"),
    ("ops-11-05", "ops-11-06", "ops-11-02"),
    ("pst-08-04", "pst-08-01", "pst-08-03"),
    ("ops-14-04", "ops-14-10", "ops-14-09"),
)


def examples() -> list[dict[str, Any]]:
    """Six papers, each ``{"title", "context", "questions": [...]}``, in the order of the page."""
    found = map(json.loads, HANDBOOK.read_text(encoding="utf-8").strip().split("\n"))
    rows = {row["id"]: row for row in found}
    return [
        {
            "title": rows[chosen[0]]["title"],
            "context": rows[chosen[0]]["context"],
            "questions": [rows[name]["question"] for name in chosen],
        }
        for chosen in _ROWS
    ]
