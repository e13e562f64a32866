"""``report.html``: the facts of a run as one self-contained page, without scripts and without anything to load."""

from __future__ import annotations

from pathlib import Path

from qadeploy.reports import charts, findings, svg
from qadeploy.reports.excerpts import Piece, excerpt
from qadeploy.reports.page import render, value
from qadeploy.reports.run_report import SMALLEST_GROUP, Mistake, RunFacts

_TEMPLATE = Path(__file__).with_name("report.html.j2")

CHECK_CLASSES = {
    "exact": "the answer stands where the row says",
    "shifted": "the answer stands some characters away from where the row says",
    "utf16": "offsets counted in UTF-16 units",
    "whitespace": "equal but for white space",
    "case": "equal but for letter case",
    "detokenised": "equal but for anything that is no letter or digit",
    "absent": "the answer is not in its context",
    "empty": "an empty context, question or answer",
    "no_answer": "a question without an answer",
    "repeated": "the answer occurs several times in its context",
    "duplicate": "the question was asked before on the same context",
}


def report_page(facts: RunFacts) -> str:
    """The page as HTML. What comes from the data is escaped; characters that HTML forbids become U+FFFD."""
    return render(
        _TEMPLATE,
        facts=facts,
        findings=findings,
        charts=charts,
        svg=svg,
        drawn=charts.facts_charts(facts),
        takeaways=findings.takeaways(facts),
        captions=[findings.caption_groups(g, facts.after.f1) for g in facts.groupings],
        smallest=SMALLEST_GROUP,
        check_classes=CHECK_CLASSES,
        pieces=_pieces,
        golds=_golds,
        duration=_duration(facts.seconds),
        configuration=_configuration(facts),
        count=findings.count,
    )


def _pieces(mistake: Mistake) -> tuple[Piece, ...]:
    golds = [(a.start, a.end) for a in mistake.example.answers]
    answered = [(mistake.answer.start, mistake.answer.end)] if mistake.answer.text else []
    return excerpt(mistake.example.context, golds, answered)


def _golds(mistake: Mistake) -> list[str]:
    """The distinct annotated texts, in order."""
    return list(dict.fromkeys(a.text for a in mistake.example.answers))


def _configuration(facts: RunFacts) -> list[tuple[str, list[tuple[str, str]]]]:
    """Tables of names and values: what the run was asked, what it chose, what it ran on."""
    record = facts.record
    base = {"name": facts.base, "sha256": record["base"].get("sha256"), "licence": facts.base_license}
    rest = {k: v for k, v in record.items() if k not in {"status", "options", "base", "versions", "machine"}}
    tables = {
        "Options": record["options"],
        "Settings of the model": facts.settings,
        "Base model": base,
        "Versions": record["versions"],
        "Machine": record["machine"],
        "Record": rest,
    }
    return [(title, [(str(k), value(v)) for k, v in values.items()]) for title, values in tables.items() if values]


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 100 else f"{minutes / 60:.1f} h"
