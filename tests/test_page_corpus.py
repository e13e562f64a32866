"""The page of ``qadeploy serve --corpus`` in a real browser: answers from untrusted documents."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from playwright.sync_api import expect

from qadeploy import Corpus
from qadeploy.shipped import base_bundle_path
from tests.conftest import needs_chromium
from tests.test_page import Desk, opened, serving

LAMPS = "# Lamps 🏮\n\n## Trimming\n\n🏮🏮 Mungo Strand trims the light at noon. 🏮\n\n# Boats\n\nFay keeps the boat.\n"
HOSTILE = "<img src=x onerror=alert(1)>.md"
ATTACK = "# <script>alert(2)</script> Ropes\n\n<b onclick=alert(3)>Bela</b> keeps the rope <img src=/x onerror=alert(4)> in room 7.\n"
QUESTION, ABOUT_ROPE = "Who trims the light?", "Who keeps the rope?"


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("documents")
    (folder / "lamps.md").write_text(LAMPS, encoding="utf-8")
    (folder / HOSTILE).write_text(ATTACK, encoding="utf-8")
    index = folder.parent / f"{folder.name}-index"
    Corpus.build(folder, index)
    with serving(base_bundle_path(), corpus=str(index)) as url:
        yield url


def told(url: str, question: str) -> list[dict[str, Any]]:
    body = {"question": question, "top_k": 5}
    return httpx.post(f"{url}/v1/answer", json=body, trust_env=False).json()["answers"]


def asked(desk: Desk, question: str) -> list[dict[str, Any]]:
    """Asks a question by keyboard; returns the API's response to the same question."""
    desk.page.get_by_label("Question", exact=True).fill(question)
    with desk.page.expect_response("**/v1/answer") as response:
        desk.page.keyboard.press("Enter")
    assert response.value.ok
    expect(desk.page.locator("#result")).to_be_visible()
    return told(desk.url, question)


@needs_chromium
def test_an_answer_is_shown_with_its_document_its_place_and_its_passage(browser, url):
    with opened(browser, url) as desk:
        page = desk.page
        expect(page.locator("#context")).to_have_value("")
        expect(page.locator("#count")).to_have_text("2 documents")
        assert page.get_by_label("Text", exact=True).get_attribute("placeholder").startswith("Leave this empty")
        answers = asked(desk, QUESTION)
        best = answers[0]
        assert (best["document"], best["place"]) == ("lamps.md", "Lamps 🏮 > Trimming")
        expect(page.locator("#source span")).to_have_text([best["document"], best["place"]])
        before, inside, after = desk.highlighted()
        assert (inside, before + inside + after) == (best["text"], best["snippet"]["text"])
        expect(page.locator("mark")).to_be_in_viewport()
        said = page.get_by_role("status").first.inner_text()
        assert said.startswith(f"Answer: {best['text']}, ")
        assert said.endswith(", from lamps.md, Lamps 🏮 > Trimming")
        reading = page.get_by_role("region", name="The passage with the answer highlighted")
        assert reading.get_attribute("aria-describedby") == "source"
        assert page.locator("#answers bdi").all_text_contents() == [answer["text"] for answer in answers]
        answers = asked(desk, ABOUT_ROPE)  # of both documents
        other = next(i for i, answer in enumerate(answers) if answer["document"] not in {"", answers[0]["document"]})
        page.locator("#answers button").nth(other).focus()
        page.keyboard.press("Enter")
        expect(page.locator("#source span")).to_have_text([answers[other]["document"], answers[other]["place"]])
        assert desk.highlighted()[1] == answers[other]["text"]
        page.get_by_text("How the model found it").click()
        expect(page.locator(".tokens")).to_be_visible()
        page.locator("#edit").click()
        expect(page.locator("#source")).to_be_hidden()
        desk.ask("Who keeps the lamp?", "Ada keeps the lamp in room 7.")  # a typed text takes precedence
        expect(page.locator("#source")).to_be_hidden()
        assert desk.highlighted()[1] == "Ada"


@needs_chromium
def test_nothing_of_a_document_is_run(browser, url):
    with opened(browser, url) as desk:
        page, dialogs = desk.page, []
        page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
        documents = [answer["document"] for answer in asked(desk, ABOUT_ROPE)]
        button = page.locator("#answers button").nth(documents.index(HOSTILE))
        button.click()
        expect(page.locator("#source span").first).to_have_text(HOSTILE)
        expect(button.locator(".from span").first).to_have_text(HOSTILE)
        assert "".join(desk.highlighted()) == ATTACK.strip()
        assert page.locator("#ask script, #ask img, #ask b").count() == 0
        page.get_by_text("How the model found it").click()
        expect(page.locator(".tokens")).to_be_visible()
        assert page.locator("main script, main img, main b").count() == 0
        assert dialogs == []


@needs_chromium
def test_words_that_no_document_has_are_said_to_be_unknown(browser, url):
    with opened(browser, url) as desk:
        page = desk.page
        asked(desk, QUESTION)
        assert asked(desk, "Qwrtz?") == []
        expect(page.get_by_role("status").first).to_have_text("No word of the question occurs in the documents.")
        expect(page.locator("mark")).to_have_count(0)
        expect(page.locator("#source")).to_be_hidden()
        expect(page.locator("#trace")).to_be_hidden()


@needs_chromium
def test_with_a_token_the_documents_are_known_once_it_is_given(browser, url, tmp_path):
    (tmp_path / "lamps.md").write_text(LAMPS, encoding="utf-8")
    Corpus.build(tmp_path / "lamps.md", tmp_path / "index")
    with (
        serving(base_bundle_path(), corpus=str(tmp_path / "index"), token="open sesame") as locked,
        opened(browser, locked, quiet=False) as desk,
    ):
        page = desk.page
        page.get_by_label("This server requires a token").fill("open sesame")
        page.keyboard.press("Enter")
        expect(page.locator("#context")).to_have_value("")
        page.get_by_label("Question", exact=True).fill(QUESTION)
        page.keyboard.press("Enter")
        expect(page.locator("#source span").first).to_have_text("lamps.md")
