"""Drawing a run: everything is there, and a failure costs one drawing, aloud, and nothing else."""

from __future__ import annotations

from qadeploy.data.readers import DataSet
from qadeploy.training import drawings
from qadeploy.training.drawings import draw_run
from qadeploy.training.features import FeatureSet
from tests.run_facts_for_tests import ANSWERS, METRICS, RECORD, parts

FILES = ("README.md", "curves.png", "report.html")


def draw(folder, metrics, say):
    sets = []
    for part in parts():
        first = [0]
        for windows in part.windows:
            first.append(first[-1] + windows)
        sets.append(FeatureSet(part.examples, (), (), tuple(first)))
    draw_run(folder, "fa q", RECORD, metrics, sets, ANSWERS, DataSet("faq", ()), say)


def test_all_is_drawn_and_nothing_is_said(tmp_path):
    said: list[str] = []
    draw(tmp_path, METRICS, said.append)
    assert tuple(sorted(p.name for p in tmp_path.iterdir())) == FILES
    assert said == []
    assert "5–8" in (tmp_path / "report.html").read_text(encoding="utf-8")  # windows of the long context


def test_what_fails_is_said_and_the_rest_is_drawn(tmp_path, monkeypatch):
    def fail(facts):
        raise ValueError("no paper left")

    monkeypatch.setattr(drawings, "report_page", fail)
    said: list[str] = []
    draw(tmp_path, METRICS, said.append)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["README.md", "curves.png"]
    (line,) = said
    assert line.startswith("WARNING: report.html could not be drawn")
    assert "ValueError: no paper left (test_drawings.py, line" in line


def test_facts_that_cannot_be_had_are_said_for_each_drawing_of_them(tmp_path):
    said: list[str] = []
    draw(tmp_path, {**METRICS, "settings": None}, said.append)
    assert [p.name for p in tmp_path.iterdir()] == ["curves.png"]
    assert [line.split()[1] for line in said] == ["report.html", "README.md"]
