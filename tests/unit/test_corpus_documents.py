"""Files to documents and documents to passages: offsets count in the text, and no text is lost."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qadeploy.corpus.cutting import LONGEST, cut
from qadeploy.corpus.documents import markdown_headings
from qadeploy.corpus.html import html_document
from qadeploy.corpus.records import Document, Heading
from qadeploy.corpus.terms import terms_of
from qadeploy.errors import InputError
from tests.corpora_for_tests import LAMPS, PAGE


def places(document: Document) -> list[tuple[str, str]]:
    return [(document.text[each.start : each.end], each.place) for each in cut(document)]


def test_markdown_is_cut_at_its_headings_and_not_at_what_looks_like_one():
    headings = markdown_headings(LAMPS)
    assert [(h.level, h.title) for h in headings] == [(1, "Lamps"), (2, "Trimming"), (2, "Oil")]
    assert [LAMPS[h.start : h.end] for h in headings] == ["# Lamps", "## Trimming", "Oil\n---"]
    found = places(Document("lamps.md", LAMPS, headings, has_lines=True))
    assert [place for _, place in found] == ["Lamps", "Lamps > Trimming", "Lamps > Oil"]
    assert found[1][0] == "## Trimming\n\nMungo Strand trims the light.\n\n```\n# no heading\n```"


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_front_matter_holds_no_heading(end):
    text = end.join(["---", "title: Lamps", "tags: [oil]", "---", "Lamps", "---", "They burn oil."])
    (heading,) = markdown_headings(text)
    assert (heading.title, text[heading.start : heading.end]) == ("Lamps", f"Lamps{end}---")
    rule = end.join(["---", "Lamps", "---", "They burn oil."])
    assert [heading.title for heading in markdown_headings(rule)] == ["Lamps"]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_headings_are_found_at_any_line_end(end):
    text = f"one\x0cpage\u2028line{end}{end}# Two{end}{end}three"
    (heading,) = markdown_headings(text)
    assert text[heading.start : heading.end] == "# Two"


def test_a_heading_right_below_another_shares_its_section():
    text = "# A\n\n## B\n\ntext\n\n# C\n\nmore"
    found = places(Document("x.md", text, markdown_headings(text), has_lines=True))
    assert found == [("# A\n\n## B\n\ntext", "A > B"), ("# C\n\nmore", "C")]


def test_html_is_its_text_with_headings_and_without_scripts():
    document = html_document(PAGE, "quay.html")
    assert document.title == "The quay"
    assert document.text == ("Boats & ropes\n\nThe night boat leaves Carrow Quay.\nAt eleven.\n\na\n  b\n\nAda\trope")
    assert document.headings == (Heading(0, 13, 1, "Boats & ropes"),)
    assert places(document)[0][1] == "The quay > Boats & ropes"


def test_html_is_read_to_its_end_or_refused():
    document = html_document("<div>" * 1_000 + "deep" + "</div>" * 1_000 + "<p>end", "deep.html")
    assert document.text.split() == ["deep", "end"]
    with pytest.raises(InputError, match=r"deep\.html: not readable HTML: Excessive depth"):
        html_document("<div>" * 5_000 + "deep", "deep.html")


def test_html_without_a_word_is_empty():
    assert html_document("<!-- nothing --><script>x</script>", "x.html").text == ""
    assert html_document("\0", "x.html").text == ""


def test_a_passage_of_plain_text_says_its_line():
    text = "\n".join(f"{number} " + "word " * 60 for number in range(1, 9)).replace("\n", "\n\n")
    found = places(Document("x.txt", text, has_lines=True))
    assert [(passage.split()[0], place) for passage, place in found] == [
        ("1", "line 1"),
        ("3", "line 5"),
        ("5", "line 9"),
        ("7", "line 13"),
    ]


def test_a_passage_never_crosses_a_page():
    document = Document("x.pdf", "one\ftwo\f\fthree", pages=(0, 4, 8, 9))
    assert places(document) == [("one", "page 1"), ("two", "page 2"), ("three", "page 4")]


def test_a_long_paragraph_is_cut_behind_sentences_else_words_else_anywhere():
    sentences = "A sentence of some length, which ends here. " * 60
    assert all(text.endswith("here.") for text, _ in places(Document("x", sentences)))
    words = "word " * 600
    assert all(text.startswith("word") and text.endswith("word") for text, _ in places(Document("x", words)))
    assert [len(text) for text, _ in places(Document("x", "x" * (2 * LONGEST + 5)))] == [LONGEST, LONGEST, 5]


@given(
    st.text(st.sampled_from("ab .\n\r\t\f\u2029。é🎹"), max_size=4_000).map(lambda text: text * 3),
    st.lists(st.integers(0, 12_000), max_size=4),
)
def test_every_character_but_white_space_is_in_one_passage(text, borders):
    pages = tuple(sorted({0, *(border for border in borders if border < len(text))}))
    found = list(cut(Document("x", text, pages=pages if borders else ())))
    assert all(0 < each.end - each.start <= LONGEST for each in found)
    assert all(a.end <= b.start for a, b in pairwise(found))
    covered = {at for each in found for at in range(each.start, each.end)}
    assert all(letter.isspace() for at, letter in enumerate(text) if at not in covered)


def test_terms_are_words_without_case_and_accents_and_pairs_in_scripts_without_spaces():
    assert terms_of("Where is the CAFÉ in Straße 12?") == ["where", "is", "the", "cafe", "in", "strasse", "12"]
    assert terms_of("東京都にiPhone") == ["東京", "京都", "都に", "iphone"]
    assert terms_of("서울은") == ["서울", "울은"]
    assert terms_of("हिन्दी में") == ["हिन्दी", "में"]
    assert terms_of("京") == ["京"]
    assert terms_of("?!") == []
