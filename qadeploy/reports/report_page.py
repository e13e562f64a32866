"""``report.html``: the facts of a run as one self-contained page that loads nothing and has no scripts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qadeploy.data.check_text import MEANING
from qadeploy.reports import findings
from qadeploy.reports.charts import facts_charts
from qadeploy.reports.excerpts import Piece, excerpt
from qadeploy.reports.facts import SMALLEST_GROUP, WINDOW_GROUPS, Mistake, RunFacts, RunRecord
from qadeploy.reports.page import render

_TEMPLATE = Path(__file__).with_name("report.html.j2")

CHECK_FLAGS = {
    "repeated": "the answer occurs several times in its context",
    "duplicate": "an earlier row has the same question and context",
}


def report_page(facts: RunFacts) -> str:
    """Returns the page as HTML. Texts from the data are escaped; characters that HTML forbids become U+FFFD."""
    return render(
        _TEMPLATE,
        facts=facts,
        findings=findings,
        drawn=facts_charts(facts),
        smallest=SMALLEST_GROUP,
        window_groups=WINDOW_GROUPS,
        speeds={row["epoch"]: row for row in facts.run.metrics.get("speed", {}).get("epochs", ())},
        check_classes=MEANING,
        check_flags=CHECK_FLAGS,
        pieces=_pieces,
        duration=_duration(facts.run.metrics.get("seconds", 0.0)),
        configuration=_configuration(facts.run),
    )


def _pieces(mistake: Mistake) -> tuple[Piece, ...]:
    golds = [(a.start, a.end) for a in mistake.example.answers]
    answered = [(mistake.answer.start, mistake.answer.end)] if mistake.answer.text else []
    return excerpt(mistake.example.context, golds, answered)


def _configuration(run: RunRecord) -> dict[str, Mapping[str, Any]]:
    """Tables of names and values: the run's options, what it chose, what it ran on."""
    record = run.record
    base = record["base"]
    rest = {k: v for k, v in record.items() if k not in {"status", "options", "base", "versions", "machine"}}
    return {
        "Options": record["options"],
        "Settings of the model": run.metrics["settings"],
        "Base model": {"name": base["name"], "sha256": base.get("sha256"), "licence": base.get("license")},
        "Versions": record["versions"],
        "Machine": record["machine"],
        "Record": rest,
    }


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 100 else f"{minutes / 60:.1f} h"
