"""The charts: their data are the facts, flat and tiny data do not break them, and a page can hold several."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from qadeploy.core.calibration import ConfidenceBin
from qadeploy.reports import charts, figures
from qadeploy.reports.charts import draw_loss, draw_reliability, draw_scores, draw_search, facts_charts
from qadeploy.reports.facts import Calibration, overfitting
from qadeploy.reports.figures import COLOURS
from tests.run_facts_for_tests import METRICS, SEARCH, epoch, facts


def lines(axes) -> dict[str, list[tuple[float, float]]]:
    """The points of each line by its name."""
    return {
        line.get_label(): [tuple(xy) for xy in line.get_xydata()] for line in axes.lines if line.get_label()[0] != "_"
    }


def test_the_curves_are_the_epochs():
    rows = METRICS["epochs"]
    loss, scores = Figure().subplots(1, 2)
    draw_loss(loss, rows, 2)
    draw_scores(scores, rows, 2)
    assert lines(loss) == {
        "train loss": [(row["epoch"], row["train_loss"]) for row in rows[1:]],
        "dev loss": [(row["epoch"], row["eval_loss"]) for row in rows],
    }
    assert lines(scores)["F1"] == [(row["epoch"], row["eval_f1"]) for row in rows]
    assert lines(scores)["EM"] == [(row["epoch"], row["eval_exact_match"]) for row in rows]
    assert lines(scores)["accuracy"] == [(row["epoch"], 100 * row["eval_accuracy"]) for row in rows]
    assert [text.get_text() for text in loss.texts] == ["best"]


@pytest.mark.parametrize("values", [[0.0], [100.0, 100.0], [0.0, 0.0], [1e-9, 1e9]])
def test_flat_and_tiny_curves_can_be_drawn(values):
    rows = [epoch(n, None, v, min(v, 100.0)) for n, v in enumerate(values)]
    for draw in (draw_loss, draw_scores):
        svg = str(figures.svg("Title", lambda figure, draw=draw: draw(figure.subplots(), rows, 0), 290))
        ElementTree.fromstring(svg)
        assert "nan" not in svg
        for x, y in re.findall(r'<use href="[^"]*" x="([-\d.]+)" y="([-\d.]+)"', svg):
            assert 0 <= float(x) <= 440
            assert 0 <= float(y) <= 290
    assert ">120<" not in svg


def test_the_reliability_diagram_shows_the_bins_that_have_answers():
    bins = (ConfidenceBin(0.0, 0.1, 0, 0.0, 0.0), ConfidenceBin(0.5, 0.6, 8, 0.55, 0.75))
    figure = Figure()
    draw_reliability(figure, Calibration(bins, 0.0, 0.55, 0.75))
    upper, lower = figure.axes
    assert lines(upper)["answers, 95 % interval"] == [(pytest.approx(55), pytest.approx(75))]
    assert lines(upper)["perfect calibration"] == [(0, 0), (100, 100)]
    assert [(bar.get_x(), bar.get_height()) for bar in lower.patches] == [(50, 8)]


def test_the_trials_of_a_search_are_drawn_by_setting():
    figure = Figure()
    draw_search(figure, SEARCH)
    rate, epochs, negatives, empty = figure.axes
    assert [axes.get_xlabel() for axes in (rate, epochs, negatives)] == ["learning rate", "epochs", "negatives"]
    assert lines(rate) == {"trial": [(1e-4, 60.0), (3.2e-4, 64.5)], "kept": [(3.2e-4, 64.5)]}  # one trial failed
    assert lines(epochs)["kept"] == [(5, 64.5)]
    assert [text.get_text() for text in rate.get_xticklabels()] == ["0.0001", "0.00032"]
    assert not empty.axison


@pytest.mark.parametrize("settings", [{"epochs": 3}, {"learning_rate": 1e-4, "epochs": 2}])
def test_a_single_scored_trial_can_be_drawn(settings):
    found = {"trials": [{"settings": settings, "f1": 0.0, "seconds": 1.0}], "best": 1, "folds": None}
    ElementTree.fromstring(str(facts_charts(facts({"search": found}))["search"]))


def test_the_charts_of_a_run_share_a_page():
    drawn = "".join(facts_charts(facts({"search": SEARCH})).values())
    page = ElementTree.fromstring(f"<div>{drawn}</div>")
    ids = [e.get("id") for e in page.iter() if e.get("id")]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:url\(|href=")#([^")]+)', drawn)) <= set(ids)
    assert drawn == "".join(facts_charts(facts({"search": SEARCH})).values())  # nothing in it is random or dated
    assert "<style" not in drawn  # it would apply to the page
    assert "font" not in drawn
    assert set(re.findall(r"#[0-9a-f]{6}\b", drawn)) <= {"#000000"}  # the rest are variables of the page
    assert ">epoch</text>" in drawn


def test_the_colours_are_those_of_the_light_page():
    css = Path(charts.__file__).with_name("report.css").read_text(encoding="utf-8")
    light = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", css[: css.index("@media")]))
    assert {name: light[name] for name in COLOURS} == COLOURS


def test_texts_of_a_figure_are_escaped_and_not_formulas():
    svg = figures.svg("<i>", lambda figure: figure.text(0.5, 0.5, "<b>$x$"), 100)
    assert "&lt;b&gt;$x$" in svg
    assert 'aria-label="&lt;i&gt;"' in svg


def test_an_epoch_overfits_if_dev_loss_rises_while_train_loss_falls():
    rows = METRICS["epochs"]
    assert overfitting(rows) == [3]
    assert overfitting([{**row, "observation": ""} for row in rows]) == [3]
