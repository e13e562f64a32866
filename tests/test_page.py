"""The page of ``qadeploy serve`` in a real browser, against a real server in a thread of this process."""

from __future__ import annotations

import contextlib
import re
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import uvicorn
from hatchling.builders.wheel import WheelBuilder
from playwright.sync_api import Browser, Page, expect

from qadeploy import Answerer
from qadeploy.data.loading import read
from qadeploy.serve.app import create_app
from qadeploy.serve.pages import examples
from qadeploy.serve.search import open_corpus
from qadeploy.serve.settings import Settings
from qadeploy.shipped import BASE_BUNDLE, BASE_MODEL
from tests.conftest import needs_chromium, sealed_copy
from tests.servers_for_tests import service_of
from tests.sessions_for_tests import Sessions, until
from tests.test_session_answerer import FAMILY, LONG, SCRIPTS

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "qadeploy" / "serve" / "page"
LAMP = ("Who keeps the lamp?", "Ada keeps the lamp in room 7. Fay keeps the boat outside.")
TEXTS = [
    LAMP,
    *(("Who keeps the bell?", text) for text in SCRIPTS),
    (
        "Who keeps the bell?",
        f"\U0001f514\U0001f514 {FAMILY} rests.\r\n\n\tAda \U0001f981 keeps the bell \U0001f514 in room 3.",
    ),
    (
        "Who keeps the lamp?",
        "\u0906\u0926\u093e \u0926\u0940\u092a\u0915 \u0930\u0916\u0924\u0940 \u0939\u0948\u0964 \U0001f3ee Ada keeps the lamp.",
    ),
    (
        "Who keeps the lamp?",
        "\u0627\u0644\u0645\u064a\u0646\u0627\u0621 \u0635\u063a\u064a\u0631 \U0001f3ee. Ada keeps the lamp in \u0627\u0644\u063a\u0631\u0641\u0629 7.",
    ),
]


@contextlib.contextmanager
def serving(bundle: Path, **settings: Any) -> Iterator[str]:
    """A server of the bundle on a free port of loopback; its address."""
    answerer = Answerer.load(bundle, device="cpu", threads=1)
    service = service_of(answerer, Settings(threads=1, **settings))
    if service.settings.corpus is not None:
        service.corpus = open_corpus(service.settings.corpus)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(create_app(service), log_config=None, lifespan="off", ws="none"))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(30)
            service.close()


@dataclass
class Desk:
    """An open page, its console messages, and its requests to other hosts."""

    url: str
    page: Page
    console: list[str] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)

    def type(self, question: str, context: str) -> None:
        if self.page.locator("#edit").is_visible():
            self.page.locator("#edit").click()
        self.page.get_by_label("Text", exact=True).fill(context)
        self.page.get_by_label("Question", exact=True).fill(question)

    def ask(self, question: str, context: str) -> list[dict[str, Any]]:
        """Asks on the page; returns the API's response to the same question."""
        self.type(question, context)
        context = self.page.locator("#context").input_value()  # a browser writes every line end as \n
        with self.page.expect_response("**/v1/answer") as response:
            self.page.get_by_role("button", name="Ask").click()
        assert response.value.ok
        expect(self.page.locator("#result")).to_be_visible()
        body = {"question": question, "context": context, "top_k": 5}
        return httpx.post(f"{self.url}/v1/answer", json=body, trust_env=False).json()["answers"]

    def highlighted(self) -> tuple[str, str, str]:
        """The text before the highlight, in it, and after it."""
        return tuple(
            self.page.evaluate(
                """() => { const mark = document.querySelector("#reading mark"), all = document.createRange();
                all.selectNodeContents(document.querySelector("#reading"));
                const before = all.cloneRange(), after = all.cloneRange();
                before.setEndBefore(mark); after.setStartAfter(mark);
                return [before.toString(), mark.textContent, after.toString()]; }"""
            )
        )


@contextlib.contextmanager
def opened(browser: Browser, url: str, quiet: bool = True, **options: Any) -> Iterator[Desk]:
    context = browser.new_context(**{"reduced_motion": "reduce", **options})
    context.set_default_timeout(10_000)
    try:
        desk = Desk(url, context.new_page())
        desk.page.on("console", lambda message: desk.console.append(f"{message.type}: {message.text}"))
        desk.page.on("pageerror", lambda error: desk.console.append(f"error: {error}"))
        desk.page.on("request", lambda asked: desk.outside.append(asked.url) if not asked.url.startswith(url) else None)
        desk.page.goto(url)
        expect(desk.page.locator("#example option")).to_have_count(7)
        yield desk
        assert desk.outside == []
        if quiet:
            assert desk.console == []
    finally:
        context.close()


@pytest.fixture(scope="module")
def url(bundle: Path) -> Iterator[str]:
    with serving(bundle) as url:
        yield url


# ---------------------------------------------------------------- the files


def test_the_wheel_holds_the_page():
    files = {file.distribution_path for file in WheelBuilder(str(ROOT)).recurse_included_files()}
    own = {f"qadeploy/serve/page/{path.name}" for path in PAGE.iterdir()}
    assert {"qadeploy/serve/page/index.html", "qadeploy/serve/page/app.js"} < own <= files
    assert "qadeploy/data/handbook.jsonl" in files  # of which the examples are made


def test_the_wheel_holds_the_base_model_and_its_bundle():
    files = {file.distribution_path: Path(file.path) for file in WheelBuilder(str(ROOT)).recurse_included_files()}
    models = {name: path for name, path in files.items() if name.startswith("qadeploy/models/")}
    assert {f"qadeploy/models/{BASE_MODEL}/model.safetensors", f"qadeploy/models/{BASE_BUNDLE}/model.onnx"} < set(
        models
    )
    assert sum(path.stat().st_size for path in models.values()) < 75e6


def test_the_page_has_nothing_that_a_strict_policy_forbids():
    found: list[str] = []

    class Look(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            names = dict(attrs)
            found.extend(f"{tag} {name}" for name in names if name == "style" or name.startswith("on"))
            found.extend(
                f"{tag} {v}" for n, v in attrs if n in {"src", "href"} and not (v or "").startswith(("/", "#"))
            )
            if tag == "style" or (tag == "script" and "src" not in names):
                found.append(tag)

    Look().feed((PAGE / "index.html").read_text("utf-8"))
    assert found == []
    script = (PAGE / "app.js").read_text("utf-8")
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|eval\(|https?://", script)
    assert not re.search(r"url\(|@import|https?://", (PAGE / "style.css").read_text("utf-8"))


def test_the_examples_were_held_out_from_training():
    held_out = {(e.question, e.context) for e in read("handbook").part("validation")}
    found = examples()
    assert (len(found), [len(one["questions"]) for one in found]) == (6, [3] * 6)
    assert {(question, one["context"]) for one in found for question in one["questions"]} <= held_out
    assert len({one["title"] for one in found}) == 6


# ---------------------------------------------------------------- asking


@needs_chromium
def test_each_answer_is_highlighted_where_it_stands_in_any_script(browser, url):
    with opened(browser, url) as desk:
        for question, text in TEXTS:
            answers = desk.ask(question, text)
            context = desk.page.locator("#context").input_value()
            shown = desk.page.locator("#answers bdi")
            assert shown.all_text_contents() == [answer["text"] for answer in answers]
            for number, answer in enumerate(answers):
                if number:
                    shown.nth(number).click()
                before, inside, after = desk.highlighted()
                assert (inside, before + inside + after) == (answer["text"], context)
                assert (len(before), len(before + inside)) == (answer["start"], answer["end"]), text
                pressed = desk.page.locator("#answers button").evaluate_all("all => all.map(b => b.ariaPressed)")
                assert pressed.index("true") == number
                assert pressed.count("true") == 1


@needs_chromium
def test_the_highlight_comes_into_view_in_a_long_text(browser, url):
    with opened(browser, url) as desk:
        deep = "\n" * 200  # no tokens, so the answer is this far down whatever the model's limit
        best = desk.ask("Who keeps the piano?", f"{deep}Dora keeps the piano.{deep}")[0]
        assert desk.highlighted()[1] == best["text"] != ""
        expect(desk.page.locator("mark")).to_be_in_viewport()
        assert desk.page.evaluate("scrollY") == 0
        place = desk.page.evaluate("document.querySelector('#reading').scrollTop")
        assert place > 500
        desk.page.locator("#edit").click()  # to the same place, with the answer selected
        selected = "document.querySelector('#context').value.slice(...['selectionStart', 'selectionEnd'].map(k => document.querySelector('#context')[k]))"
        assert desk.page.evaluate(selected) == best["text"]


@needs_chromium
def test_examples_come_with_questions_and_what_was_typed_comes_back(browser, url):
    with opened(browser, url) as desk:
        page, first = desk.page, examples()[0]
        assert page.locator("#context").input_value() == first["context"]
        assert page.locator("#question").input_value() == first["questions"][0]
        page.get_by_role("button", name=first["questions"][2]).click()
        expect(page.locator("mark")).to_be_visible()
        assert page.locator("#question").input_value() == first["questions"][2]
        page.get_by_role("combobox", name="Example").select_option("3")
        expect(page.locator("mark")).to_have_count(0)
        expect(page.locator("#result")).to_be_hidden()
        assert page.locator("#context").input_value() == examples()[3]["context"]
        desk.type(*LAMP)
        assert page.get_by_role("combobox", name="Example").input_value() == "-1"
        page.get_by_role("combobox", name="Example").select_option("1")
        page.get_by_role("combobox", name="Example").select_option("-1")
        assert page.locator("#context").input_value() == LAMP[1]


@needs_chromium
def test_the_null_answer_is_offered_where_the_model_has_a_threshold(browser, bundle, tmp_path):
    from qadeploy.inference.bundle import open_bundle

    settings = {**open_bundle(bundle).manifest["settings"], "null_threshold": -1000.0}  # so low that it always wins
    with serving(sealed_copy(bundle, tmp_path / "null", settings=settings)) as url, opened(browser, url) as desk:
        desk.ask(*LAMP)
        assert desk.page.locator("#answers bdi").first.inner_text() == "No answer in this text"
        assert desk.page.locator("#said").inner_text().startswith("No answer in this text, ")
        expect(desk.page.locator("mark")).to_have_count(0)
        desk.page.locator("#answers bdi").nth(1).click()
        assert desk.highlighted()[1] == "Ada"
        desk.page.get_by_label('Allow "no answer"').uncheck()
        desk.ask(*LAMP)
        assert desk.page.locator("#answers bdi").first.inner_text() == "Ada"


@needs_chromium
def test_a_model_without_a_threshold_offers_no_null_answer(browser, url):
    with opened(browser, url) as desk:
        expect(desk.page.locator("#model")).to_contain_text("keepers · fp32 · cpu")
        expect(desk.page.locator("#null-choice")).to_be_hidden()


@needs_chromium
def test_the_trace_shows_tokens_windows_and_logits(browser, url):
    with opened(browser, url) as desk:
        page = desk.page
        desk.ask("Who keeps the kettle?", LONG)
        body = {"question": "Who keeps the kettle?", "context": LONG, "top_k": 5, "trace": True}
        told = httpx.post(f"{url}/v1/answer", json=body, trust_env=False).json()
        trace = told["trace"]
        assert len(trace["windows"]) > 2
        page.get_by_text("How the model found it").click()
        expect(page.locator(".tokens")).to_be_visible()
        best = next(c for c in trace["candidates"] if c["answer"] == 1)
        number = best["window"]
        for shown in (trace["windows"][number - 1], trace["windows"][number % len(trace["windows"])]):
            assert page.locator(".tokens span").all_text_contents() == shown["pieces"]
            for kind in ("start", "end"):
                cells = page.locator(f".{kind} .cells i")
                heats = [
                    float(h) for h in cells.evaluate_all("all => all.map(c => c.style.getPropertyValue('--heat'))")
                ]
                logits = np.array(shown[f"{kind}_logits"])
                assert len(heats) == shown["tokens"]
                assert int(np.argmax(heats)) == int(np.argmax(logits))
                assert (max(heats), min(heats)) == (1.0, 0.0)
                assert f"“{shown['pieces'][int(np.argmax(logits))]}”" in str(
                    page.locator(f".{kind} .cells").get_attribute("aria-label")
                )
            if shown is trace["windows"][number - 1]:
                first, last = best["tokens"]
                assert page.locator(".tokens .chosen").all_text_contents() == shown["pieces"][first : last + 1]
                page.get_by_role("button", name="Next window" if number < len(trace["windows"]) else "Previous").click()
                if number == len(trace["windows"]):
                    break
        rows = page.locator("tbody tr")
        assert rows.count() == min(12, len(trace["candidates"]))
        assert trace["candidates"][0]["verdict"] in rows.first.inner_text()
        numbers = page.locator(".numbers").inner_text()
        assert f"{trace['settings']['temperature']:.3f}" in numbers
        assert f"{len(trace['windows'])} of at most {trace['settings']['max_seq_len']} tokens" in numbers
        with page.expect_request("**/v1/answer") as asked:  # the fold is open, so one request brings both
            desk.type(*LAMP)
            page.keyboard.press("Control+Enter")
        assert asked.value.post_data_json["trace"] is True
        expect(page.locator(".tokens .chosen")).to_have_text(["ada"])


# ---------------------------------------------------------------- for everybody


@needs_chromium
def test_all_of_it_works_by_keyboard(browser, url):
    with opened(browser, url) as desk:
        page = desk.page
        name = "document.activeElement.id || document.activeElement.textContent.trim()"
        ring = "getComputedStyle(document.activeElement).outlineStyle"

        def tab(until: str) -> None:
            for _ in range(12):
                page.keyboard.press("Tab")
                assert page.evaluate(ring) == "solid"
                if page.evaluate(name) == until:
                    return
            raise AssertionError(f"{until} is not reached")

        tab("context")
        page.keyboard.press("Control+a")
        page.keyboard.type(LAMP[1])
        tab("question")
        page.keyboard.press("Control+a")
        page.keyboard.type(LAMP[0])
        page.keyboard.press("Enter")
        expect(page.locator("mark")).to_have_text("Ada")
        expect(page.get_by_role("status").first).to_have_text(re.compile(r"^Answer: Ada, \d+ %$"))
        assert page.evaluate(name) == "question"
        tab("go")
        page.keyboard.press("Tab")  # the first answer
        page.keyboard.press("Tab")
        other = page.evaluate("document.activeElement.querySelector('bdi').textContent")
        page.keyboard.press("Enter")
        expect(page.locator("mark")).to_have_text(other)
        tab("How the model found it")
        page.keyboard.press("Enter")
        expect(page.locator(".tokens")).to_be_visible()
        page.locator("#edit").focus()
        page.keyboard.press("Enter")
        assert page.evaluate(name) == "context"
        page.keyboard.press("Control+Enter")  # chosen from the text, which keeps the focus
        expect(page.locator("mark")).to_have_text("Ada")
        assert page.evaluate(name) == "reading"


# The colours of every element with its own text and of its background, read back from a canvas as displayed.
CONTRAST = """() => {
  const brush = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const paint = (colours) => { brush.clearRect(0, 0, 1, 1);
    for (const colour of colours) { brush.fillStyle = colour; brush.fillRect(0, 0, 1, 1); }
    return [...brush.getImageData(0, 0, 1, 1).data].slice(0, 3); };
  const light = (rgb) => { const [r, g, b] = rgb.map((v) => v / 255).map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const found = [];
  for (const element of document.querySelectorAll("body *")) {
    const text = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim()) || element.matches("textarea, select");
    if (!text || !element.checkVisibility() || element.closest("[aria-disabled=true], .unseen, noscript, option")) continue;
    const under = [];
    for (let at = element; at; at = at.parentElement) under.unshift(getComputedStyle(at).backgroundColor);
    const back = paint(under), front = paint([...under, getComputedStyle(element).color]);
    const [low, high] = [light(back), light(front)].sort((a, b) => a - b);
    found.push([element.tagName + " " + element.textContent.trim().slice(0, 30), (high + 0.05) / (low + 0.05)]);
  }
  return found;
}"""


@needs_chromium
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_background(browser, url, scheme):
    with opened(browser, url, color_scheme=scheme) as desk:
        desk.ask(*LAMP)
        desk.page.get_by_text("How the model found it").click()
        expect(desk.page.locator(".tokens")).to_be_visible()
        desk.page.locator("#question").fill(" ")
        desk.page.keyboard.press("Enter")
        expect(desk.page.get_by_role("alert")).to_have_text("There is no question yet.")
        found = desk.page.evaluate(CONTRAST)
        assert len(found) > 60
        assert [(name, round(ratio, 2)) for name, ratio in found if ratio < 4.5] == []
        background = desk.page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert background == {"light": "rgb(246, 243, 236)", "dark": "rgb(19, 21, 24)"}[scheme]


@needs_chromium
def test_it_fits_a_small_screen(browser, url):
    with opened(browser, url, viewport={"width": 360, "height": 740}, has_touch=True) as desk:
        page = desk.page
        desk.ask("Who keeps the kettle?", f"{LONG} {'unbroken' * 40}")
        expect(page.locator("mark")).to_be_in_viewport()
        expect(page.locator("#answers button").first).to_be_in_viewport()
        page.locator("#answers button").last.tap()  # further down: the text stays in sight
        expect(page.locator("#answers button").last).to_be_in_viewport()
        expect(page.locator("mark")).to_be_in_viewport()
        page.get_by_text("How the model found it").click()
        expect(page.locator(".tokens")).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth") == 360


@needs_chromium
def test_motion_only_where_it_is_welcome(browser, url):
    for wish, name in (("reduce", "none"), ("no-preference", "drawn")):
        with opened(browser, url, reduced_motion=wish) as desk:
            desk.ask(*LAMP)
            assert desk.page.evaluate("getComputedStyle(document.querySelector('mark')).animationName") == name


# ---------------------------------------------------------------- when it does not work


@needs_chromium
def test_a_token_is_asked_for_and_kept_in_the_tab(browser, bundle):
    with serving(bundle, token="open sesame") as url, opened(browser, url, quiet=False) as desk:
        page, problem = desk.page, desk.page.get_by_role("alert")
        field = page.get_by_label("This server requires a token")
        expect(field).to_be_focused()
        expect(problem).to_be_empty()
        page.keyboard.type("guessed")
        page.keyboard.press("Enter")
        expect(problem).to_contain_text("The server rejected this token.")
        field.fill("open sesame")
        page.keyboard.press("Enter")
        expect(field).to_be_hidden()
        expect(page.locator("#model")).to_contain_text("keepers")
        page.keyboard.press("Control+Enter")
        expect(page.locator("mark")).to_be_visible()
        page.reload()
        expect(page.locator("#model")).to_contain_text("keepers")
        expect(field).to_be_hidden()
        assert page.evaluate("[localStorage.length, document.cookie]") == [0, ""]


@needs_chromium
def test_what_goes_wrong_is_said_in_words(browser, bundle, monkeypatch):
    limits = {"max_body_bytes": 20_000, "max_context_chars": 9_000, "max_queue": 1, "request_timeout": 1.5}
    sessions = Sessions(monkeypatch)
    with serving(bundle, **limits) as url, opened(browser, url, quiet=False) as desk:
        page, problem = desk.page, desk.page.get_by_role("alert")

        def asks(question: str, context: str, words: str) -> None:
            desk.type(question, context)
            page.keyboard.press("Control+Enter")
            expect(problem).to_contain_text(words)
            expect(page.locator("#result")).to_be_hidden()
            expect(page.locator("mark")).to_have_count(0)

        desk.ask(*LAMP)
        asks("Who?", " ", "There is no text yet")
        asks(
            "Who?",
            "word " * 5_000,
            "The text is too long to send. The server accepts at most 20,000 bytes. Shorten it and ask again.",
        )
        asks(
            "Who?", "word " * 2_000, "The context has 10000 characters, at most 9000 are allowed (--max-context-chars)."
        )
        expect(page.locator("#count")).to_have_text("10,000 characters, at most 9,000")
        expect(problem).to_contain_text(re.compile(r"request [0-9a-f]{32}"))

        sessions.hold()
        with ThreadPoolExecutor(1) as pool:
            body = {"question": LAMP[0], "context": LAMP[1]}
            first = pool.submit(httpx.post, f"{url}/v1/answer", json=body, trust_env=False, timeout=20)
            until(lambda: sessions.begun)
            asks(*LAMP, "The server is busy. Ask again in 1 second.")
            expect(problem).to_have_text("The server was busy. You can ask again now.")
            assert first.result().status_code == 504
        asks(*LAMP, "There was no answer in time. Ask again, or use a shorter text.")
        sessions.release()

        sessions.broken = True
        asks(*LAMP, "The server failed to answer.")
        sessions.broken = False
        page.context.set_offline(True)
        asks(*LAMP, "The server cannot be reached.")
        page.context.set_offline(False)
        desk.ask(*LAMP)
        assert desk.highlighted()[1] == "Ada"
        expect(problem).to_be_empty()
        assert not [line for line in desk.console if "Failed to load resource" not in line]
