"""The charts: marks stand where the numbers say, flat and tiny data do not break them."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

import pytest

from qadeploy.reports.charts import Series, curves, facts_charts, reliability, strip
from tests.run_facts_for_tests import facts


def places(svg: str, style: str) -> list[tuple[float, float]]:
    """Where the marks of a style stand."""
    found = re.findall(rf'class="mark {style}" transform="translate\(([\d.]+) ([\d.]+)\)"', svg)
    return [(float(x), float(y)) for x, y in found]


def test_marks_stand_where_the_numbers_are():
    line = Series("x", "a", "circle", ((0, 10.0), (1, 20.0), (2, 15.0)))
    svg = str(curves([line], 1, "percent", "Title"))
    (x0, y0), (x1, y1), (x2, y2) = places(svg, "a")
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert y1 < y2 < y0  # SVG counts downwards
    assert y2 - y1 == pytest.approx(y0 - y2, abs=0.2)
    ticks = {
        float(t): float(y)
        for y, t in re.findall(r'class="tick" x="39.0" y="([\d.]+)" text-anchor="end">([\d.]+)<', svg)
    }
    assert ticks[10.0] - 4 == pytest.approx(y0, abs=0.2)
    assert ticks[20.0] - 4 == pytest.approx(y1, abs=0.2)


@pytest.mark.parametrize("points", [((0, 0.0),), ((0, 100.0), (1, 100.0)), ((0, 0.0), (1, 0.0)), ((0, 1e-9), (1, 1e9))])
def test_flat_and_tiny_curves_can_be_drawn(points):
    svg = str(curves([Series("x", "a", "circle", points), Series("empty", "b", "square", ())], 0, "percent", "Title"))
    ElementTree.fromstring(svg)
    assert "nan" not in svg
    for x, y in places(svg, "a"):
        assert 0 <= x <= 440
        assert 0 <= y <= 300
    if max(y for _, y in points) == 100:
        assert ">101<" not in svg


def test_every_chart_of_a_run_is_well_formed_and_shows_each_epoch():
    drawn = facts_charts(facts())
    for svg in drawn.values():
        ElementTree.fromstring(str(svg))
    assert [len(places(str(drawn["loss"]), s)) for s in "ab"] == [3, 4]
    assert [len(places(str(drawn["scores"]), s)) for s in "abc"] == [4, 4, 4]


def test_a_perfectly_calibrated_bin_stands_on_the_diagonal():
    from qadeploy.core.calibration import ConfidenceBin
    from qadeploy.reports.run_report import Calibration

    bins = (ConfidenceBin(0.0, 0.1, 0, 0.0, 0.0), ConfidenceBin(0.5, 0.6, 8, 0.55, 0.55))
    svg = str(reliability(Calibration(bins, 0.0, 0.55, 0.55), "Title"))
    ((x, y),) = places(svg, "a")
    x0, y0, x1, y1 = map(
        float, re.findall(r'class="diagonal" x1="([\d.]+)" y1="([\d.]+)" x2="([\d.]+)" y2="([\d.]+)"', svg)[0]
    )
    assert (x - x0) / (x1 - x0) == pytest.approx(0.55, abs=1e-3)
    assert (y - y0) / (y1 - y0) == pytest.approx(0.55, abs=1e-3)
    assert svg.count('class="bar"') == 1


def test_a_strip_without_an_interval_is_hollow():
    hollow = str(strip(50.0, None, 40.0, None, 45.0))
    assert hollow.count("few") == 2
    assert "whisker" not in hollow
    full = str(strip(50.0, (40.0, 60.0), 40.0, (30.0, 50.0)))
    assert 'x1="40.00%" y1="11" x2="60.00%"' in full
    assert "overall" not in full
