"""The report files of a run: all are written, and a failure costs only one of them, with a warning."""

from __future__ import annotations

from qadeploy.data.loading import DataSet
from qadeploy.reports.facts import RunRecord
from qadeploy.training import report_files
from qadeploy.training.features import FeatureSet
from qadeploy.training.report_files import write_report_files
from qadeploy.training.run_log import RunLog
from tests.run_facts_for_tests import ANSWERS, METRICS, RECORD, parts

FILES = ("README.md", "curves.png", "report.html")


def write(folder, metrics, say):
    sets = []
    for part in parts():
        first = [0]
        for windows in part.windows:
            first.append(first[-1] + windows)
        sets.append(FeatureSet(part.examples, (), (), tuple(first)))
    write_report_files(folder, RunRecord("fa q", RECORD, metrics), sets, ANSWERS, DataSet("faq", ()), RunLog(say))


def test_all_files_are_there_and_nothing_is_said(tmp_path):
    said: list[str] = []
    write(tmp_path, METRICS, said.append)
    assert tuple(sorted(p.name for p in tmp_path.iterdir())) == FILES
    assert said == []
    assert "5–8" in (tmp_path / "report.html").read_text(encoding="utf-8")  # windows of the long context


def test_a_file_that_fails_is_warned_of_and_the_others_are_there(tmp_path, monkeypatch):
    def fail(facts):
        raise ValueError("no paper left")

    monkeypatch.setattr(report_files, "report_page", fail)
    said: list[str] = []
    write(tmp_path, METRICS, said.append)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["README.md", "curves.png"]
    (line,) = said
    assert "WARNING: report.html cannot be made" in line
    assert "ValueError: no paper left (test_report_files.py, line" in line


def test_facts_that_fail_are_warned_of_for_each_file_that_needs_them(tmp_path):
    said: list[str] = []
    write(tmp_path, {**METRICS, "settings": None}, said.append)
    assert [p.name for p in tmp_path.iterdir()] == ["curves.png"]
    assert [line.split()[1] for line in said] == ["report.html", "README.md"]
