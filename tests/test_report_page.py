"""A run's report page: complete and harmless HTML, nothing to load, readable colours, no errors in a browser."""

from __future__ import annotations

import re
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from qadeploy.data.check import CheckedData, RowClass
from qadeploy.data.check_text import MEANING
from qadeploy.reports.findings import searched
from qadeploy.reports.report_page import CHECK_FLAGS, report_page
from tests.conftest import CHROMIUM, needs_chromium
from tests.processes_for_tests import ended
from tests.run_facts_for_tests import ARABIC, EVIL, FAMILY, LONG, SEARCH, facts

CHECK = {
    "rows": 1380,
    "classes": {"exact": 1146, "shifted": 200, "absent": 34, "utf16": 0, "repeated": 120, "duplicate": 12},
    "repaired": 200,
    "rejected": 34,
}
VOID = {"meta", "link", "br", "img", "hr", "input"}


class Reader(HTMLParser):
    """Elements with their attributes, texts by element, and whatever is opened or closed amiss."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.problems: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(page)
        self.close()
        self.problems += [f"<{tag}> is never closed" for tag in self.open]

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if len(dict(attrs)) != len(attrs):
            self.problems.append(f"<{tag}> has an attribute twice")
        if tag not in VOID:
            self.open.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if not self.open or self.open[-1] != tag:
            self.problems.append(f"</{tag}> closes {self.open[-1:]} at {self.getpos()}")
        else:
            self.open.pop()

    def handle_data(self, data):
        for tag in set(self.open):
            self.texts[tag][-1] += data


@pytest.fixture(scope="module")
def page() -> str:
    return report_page(facts({"data_check": CHECK}))


@pytest.fixture(scope="module")
def reader(page: str) -> Reader:
    return Reader(page)


def test_every_element_is_closed_and_every_id_is_unique(reader):
    assert reader.problems == []
    ids = [a["id"] for _, a in reader.elements if "id" in a]
    assert len(ids) == len(set(ids))
    targets = [a["href"] for tag, a in reader.elements if tag == "a"]
    assert {t.removeprefix("#") for t in targets} <= set(ids)
    named = [a["aria-labelledby"] for _, a in reader.elements if "aria-labelledby" in a]
    assert set(named) <= set(ids)


def test_nothing_is_loaded_and_nothing_runs(page, reader):
    for tag, attributes in reader.elements:
        assert tag not in {"script", "iframe", "object", "embed", "img", "base", "form"}
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href", "srcset", "xlink:href", "data", "action"):
            assert (attributes.get(name) or "#").startswith(("#", "data:,")), (tag, attributes)
    style = "".join(reader.texts["style"])
    assert "url(" not in style
    assert "@import" not in style


def test_hostile_text_is_shown_as_text(page, reader):
    assert EVIL not in page
    assert any(EVIL in text for text in reader.texts["blockquote"])
    assert any(EVIL in text for text in reader.texts["h3"])
    assert page.count("</style>") == 1


def test_spans_are_marked_by_code_points_in_any_script(reader):
    marks = reader.texts["mark"]
    assert {"مونغو", "الغرفة", FAMILY, "a rope", "the lamp"} <= set(marks)
    assert ARABIC in reader.texts["blockquote"]
    for tag, attributes in reader.elements:
        if tag in {"blockquote", "dd"} and attributes.get("class") != "none" and tag == "blockquote":
            assert attributes["dir"] == "auto"
    (two,) = [t for t in reader.texts["blockquote"] if t.startswith("It left")]
    assert two == "It left at six, or about six sharp."
    classes = [a.get("class") for tag, a in reader.elements if tag == "mark"]
    assert "gold answered" in classes  # "six" of "at six" is both


def test_long_contexts_are_clipped_around_their_spans(reader):
    (clipped,) = [t for t in reader.texts["blockquote"] if "a rope" in t]
    assert len(clipped) < len(LONG) / 3
    assert clipped.startswith(" … ")
    assert "the lamp" in clipped


def test_characters_that_html_forbids_are_replaced(tmp_path):
    from dataclasses import replace

    found = facts()
    first = found.mistakes[0]
    broken = replace(first, example=replace(first.example, question="a\x00b\ud800c\ufffed\x1be"))
    page = report_page(replace(found, mistakes=(broken, *found.mistakes[1:])))
    assert "a\ufffdb\ufffdc\ufffdd\ufffde" in page
    page.encode("utf-8")


def test_every_chart_has_axes_a_title_a_legend_and_a_caption(reader):
    charts = [a for tag, a in reader.elements if tag == "svg" and a.get("class") == "chart"]
    assert len(charts) == 3
    assert all(a["role"] == "img" and a["aria-label"] for a in charts)
    figures = reader.texts["figure"]
    assert len(reader.texts["figcaption"]) >= 8
    assert all(text.strip().endswith(".") for text in reader.texts["figcaption"])
    for words in (
        ("loss", "epoch", "train loss", "dev loss"),
        ("percent", "epoch", "F1", "accuracy"),
        ("confidence (%)", "exactly right (%)"),
    ):
        assert any(all(w in text for w in words) for text in figures), words


def test_the_numbers_shown_are_those_of_the_facts(reader):
    found = facts({"data_check": CHECK})
    tiles = reader.texts["b"]
    assert f"{found.after.f1:.1f}" in tiles
    assert f"{found.calibration.error:.3f}" in tiles
    rows = [" ".join(text.split()) for text in reader.texts["tr"]]
    for groups in found.groupings.values():
        for name, scores in groups.items():
            assert any(r.startswith(f"{name}{scores.total} question") and f"{scores.f1:.1f}" in r for r in rows)
    assert any(r.startswith("shifted") and r.endswith("200") for r in rows)
    assert not any(r.startswith("utf16") for r in rows)
    assert any(r.startswith("repeated") and "counted separately" in r for r in rows)
    assert found.run.command in reader.texts["code"]


def test_flags_of_a_check_are_apart_from_its_classes_which_add_up_to_all_rows(reader):
    rows = [text.strip() for text in reader.texts["tr"]]
    starts = [f"{kind}{meaning}" for kind, meaning in MEANING.items()]
    shown = [row.removeprefix(start) for start in starts for row in rows if row.startswith(start)]
    assert sum(int(number.replace(",", "")) for number in shown) == CHECK["rows"]
    flags = {row for row in rows if "counted separately" in row}
    assert flags == {f"{flag}{text}; counted separately{CHECK['classes'][flag]}" for flag, text in CHECK_FLAGS.items()}


def test_every_class_and_flag_of_a_check_is_explained():
    assert set(MEANING) == {*RowClass}
    assert {*MEANING, *CHECK_FLAGS} == set(CheckedData("", ()).to_dict()["classes"])


def test_small_groups_have_hollow_marks_and_no_intervals(reader):
    dots = [a["class"] for tag, a in reader.elements if tag == "i" and (a.get("class") or "").startswith("dot")]
    shown = [
        facts().before,
        facts().after,
        *(scores for groups in facts().groupings.values() for scores in groups.values()),
    ]
    assert [c.endswith("few") for c in dots[::2]] == [row.f1_interval is None for row in shown]
    places = [a["style"] for tag, a in reader.elements if tag == "i" and a.get("class") == "whisker a"]
    assert places == [
        f"left: {low:.2f}%; right: {100 - high:.2f}%"
        for low, high in (row.f1_interval for row in shown if row.f1_interval)
    ]


def test_a_search_is_shown_with_all_its_trials():
    found = facts({"search": SEARCH})
    reader = Reader(report_page(found))
    assert reader.problems == []
    assert "Search for settings" in reader.texts["h3"]
    assert searched(found) in reader.texts["figcaption"]
    rows = ["".join(text.split()) for text in reader.texts["tr"]]
    first = rows.index("TrialLearningrateEpochsNegativesF1%Seconds")
    assert rows[first + 1 : first + 4] == [
        "10.00013160.090",
        "2kept0.000325364.5163",
        "3failed:trainingranoutof<memory>2.7e-0522–4",
    ]


def test_what_a_run_lacks_is_left_out():
    bare = Reader(report_page(facts({"held_out_base": None})))
    assert bare.problems == []
    assert "Search for settings" not in bare.texts["h3"]
    assert "Data check" not in bare.texts["h3"]
    assert any(text.startswith("The base model was not measured") for text in bare.texts["figcaption"])
    full = Reader(report_page(facts({
        "no_answer": {"null_threshold": -1.2, "held_out": {"f1": 61.2, "f1_threshold_0": 58.0, "f1_always_answer": 40.1}},
        "calibration": {"temperature": 1.31, "held_out": {"ece_before": 0.312}},
    })))  # fmt: skip
    assert "Questions without an answer" in full.texts["h3"]
    assert any("0.312" in text for text in full.texts["figcaption"])
    assert any("-1.200" in text for text in full.texts["p"])


# ---------------------------------------------------------------- colours


def luminance(colour: str) -> float:
    """Relative luminance, WCAG 2.1."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    """Contrast ratio, WCAG 2.1."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_the_contrast_formula_on_known_colours():
    assert contrast("#000000", "#ffffff") == pytest.approx(21.0)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.005)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_and_lines_can_be_seen(page, scheme):
    blocks = re.findall(r":root \{(.*?)\}", page, re.DOTALL)
    colours = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", blocks[scheme == "dark"]))
    for surface in ("page", "card"):
        for text in ("text", "muted", "a", "b", "c"):
            assert contrast(colours[text], colours[surface]) >= 4.5, (text, surface)
    for mark in ("gold", "answered"):
        assert contrast(colours["text"], colours[mark]) >= 4.5
        assert contrast(colours["bar"], colours["card"]) >= 1.5


# ---------------------------------------------------------------- a browser


def opened(path: Path) -> subprocess.CompletedProcess[str]:
    options = ("--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom")
    return ended([CHROMIUM, *options, f"--user-data-dir={path.parent / 'profile'}", path.as_uri()], timeout=120)


@needs_chromium
def test_a_browser_opens_it_without_a_complaint(page, tmp_path):
    path = tmp_path / "report.html"
    path.write_text(page, encoding="utf-8")
    done = opened(path)
    assert "<title>fa q: report of a run</title>" in done.stdout  # no script changed it, nothing was cut off
    assert done.stdout.rstrip().endswith("</html>")
    assert "CONSOLE" not in done.stderr, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@needs_chromium
def test_the_browser_test_would_see_a_complaint(tmp_path):
    path = tmp_path / "bad.html"
    path.write_text("<script>console.error('seen'); nothing()</script>", encoding="utf-8")
    done = opened(path)
    assert "CONSOLE" in done.stderr


def test_the_page_of_a_real_run(tiny):
    text = Path(tiny.run / "report.html").read_text(encoding="utf-8")
    reader = Reader(text)
    assert reader.problems == []
    assert f"{tiny.metrics['dev']['f1']:.1f}" in reader.texts["b"]
    assert any("None of the 20 questions" in p for p in reader.texts["p"])
