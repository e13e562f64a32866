"""The page of ``qadeploy label`` in a real browser, against its server in a thread of this process."""

from __future__ import annotations

import contextlib
import json
import re
import resource
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from playwright.sync_api import Browser, Page, expect

from qadeploy import Answerer
from qadeploy.data.fields import DataOptions
from qadeploy.data.loading import read
from qadeploy.labelling.desk import Desk
from qadeploy.labelling.items import load_items
from qadeploy.labelling.store import Store
from qadeploy.serve.labelling import create_label_app
from qadeploy.shipped import base_bundle_path
from tests.conftest import needs_chromium, write_jsonl
from tests.test_page import PAGE

pytestmark = needs_chromium

LAMP = {"context": "Ada keeps the lamp in room 7. Fay keeps the boat outside.", "question": "Who keeps the lamp?"}
# Each has a span, from its first word to its last: beyond 16 bits, right to left, with marks, without spaces.
SCRIPTS = {
    "\U0001f514\U0001f469\u200d\U0001f680 Ada \U0001f981 keeps\r\n\tthe bell \U0001f514 in room 3.": ("Ada", "bell"),
    "\U0001f3ee \u0627\u0644\u0645\u064a\u0646\u0627\u0621 \u0635\u063a\u064a\u0631 \u062c\u062f\u0627 \u0647\u0646\u0627 \U0001f3ee.": ("\u0635\u063a\u064a\u0631", "\u062c\u062f\u0627"),
    "\U0001f514 \u0906\u0926\u093e \u0926\u0940\u092a\u0915 \u0930\u0916\u0924\u0940 \u0939\u0948\u0964": ("\u0926\u0940\u092a\u0915", "\u0930\u0916\u0924\u0940"),
    "\U0001f514 Ade\u0301le n\u0303u keeps e\u0301 the o\u0308 lamp.": ("n\u0303u", "e\u0301"),
    "\U0001f514\u0e41\u0e21\u0e27\u0e01\u0e34\u0e19\u0e1b\u0e25\u0e32": ("\u0e01\u0e34\u0e19", "\u0e1b\u0e25\u0e32"),
}  # fmt: skip
UNITS = """([first, last]) => { const reading = document.querySelector("#reading"), text = reading.textContent;
    const start = text.indexOf(first), end = text.indexOf(last, start) + last.length, walk = document.createTreeWalker(reading, 4);
    const range = document.createRange(); let at = 0;
    for (let node; (node = walk.nextNode()); at += node.length) {
      if (start >= at && start < at + node.length) range.setStart(node, start - at);
      if (end > at && end <= at + node.length) range.setEnd(node, end - at);
    } """


@dataclass
class Desktop:
    page: Page
    out: Path

    @property
    def rows(self) -> list[dict[str, Any]]:
        return (
            [json.loads(line) for line in self.out.read_text("utf-8").split("\n") if line] if self.out.exists() else []
        )

    @property
    def marked(self) -> str:
        return self.page.evaluate("document.querySelector('#reading mark')?.textContent ?? ''")

    def press(self, *keys: str) -> None:
        for key in keys:
            self.page.keyboard.press(key)

    def act(self, key: str, name: str) -> None:
        """Presses a key and waits until the page shows what the server has answered to its call."""
        with self.page.expect_response(f"**/v1/label/{name}"):
            self.page.keyboard.press(key)
        expect(self.page.locator("#ask")).to_have_attribute("aria-busy", "false")

    def drag(self, first: str, last: str) -> None:
        """Selects the words from ``first`` to ``last`` with the mouse."""
        boxes = self.page.evaluate(
            UNITS
            + """ const rects = [...range.getClientRects()], a = rects[0], z = rects.at(-1);
            const rtl = getComputedStyle(reading).direction === "rtl", near = 0.5;
            return [[rtl ? a.right - near : a.left + near, a.top + a.height / 2],
              [rtl ? z.left + near : z.right - near, z.top + z.height / 2]]; }""",
            [first, last],
        )
        (x, y), (to_x, to_y) = boxes
        self.page.mouse.move(x, y)
        self.page.mouse.down()
        self.page.mouse.move(to_x, to_y, steps=4)
        self.page.mouse.up()


@contextlib.contextmanager
def labelling(browser: Browser, source: Path) -> Iterator[Desktop]:
    out = source.parent / "rows.jsonl"
    answerer = Answerer.load(base_bundle_path(), device="cpu", threads=1)
    with Store.open(out, "Ada") as store, socket.create_server(("127.0.0.1", 0)) as listener:
        desk = Desk(load_items(str(source), DataOptions(), print), store, "Ada", answerer)
        app = create_label_app(desk, "secret")
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off", ws="none"))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        context = browser.new_context(reduced_motion="reduce")
        context.set_default_timeout(20_000)
        said: list[str] = []
        try:
            page = context.new_page()
            page.on("pageerror", lambda error: said.append(str(error)))
            page.on("request", lambda asked: None if asked.url.startswith(url) else said.append(asked.url))
            page.goto(f"{url}/#secret")
            expect(page.locator("#counter")).to_contain_text("left")
            yield Desktop(page, out)
            assert said == []
        finally:
            context.close()
            server.should_exit = True
            thread.join(30)
            desk.close()


def test_the_page_has_nothing_that_a_strict_policy_forbids():
    script, markup = (PAGE / "label.js").read_text("utf-8"), (PAGE / "label.html").read_text("utf-8")
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|eval\(|https?://", script)
    assert not re.search(r"<style|\sstyle=|\son\w+=|https?://|<script(?! src=\"/static/)", markup)
    assert not re.search(r"url\(|@import|https?://", (PAGE / "label.css").read_text("utf-8"))


def test_accept_correct_none_skip_and_undo_by_keyboard(browser, tmp_path):
    rows = [LAMP | {"question": LAMP["question"] + "?" * n} for n in range(4)]
    with labelling(browser, write_jsonl(tmp_path / "q.jsonl", rows)) as desk:
        page = desk.page
        expect(page.locator("#model")).to_have_text("annotator: Ada")
        expect(page.locator("#counter")).to_have_text("0 done, 4 rows left")
        expect(page.locator("#keys")).to_be_visible()
        proposed = desk.marked
        assert proposed
        expect(page.locator("#answer")).to_contain_text("the model, ")
        asked = page.locator("#asked").inner_text()
        desk.act("s", "skip")
        assert page.locator("#asked").inner_text() != asked
        desk.act("Enter", "decide")
        expect(page.locator("#counter")).to_have_text("1 done, 3 rows left")
        assert desk.rows[0]["answer"] == LAMP["context"][desk.rows[0]["answer_start"] :][: len(desk.rows[0]["answer"])]
        desk.act("n", "decide")
        expect(page.locator("#counter")).to_have_text("2 done, 2 rows left")
        assert (desk.rows[1]["answer"], desk.rows[1]["is_impossible"]) == ("", True)
        # From the first word: three on, and two more words into it; a character more, one less at the start; back and again.
        desk.press(
            "ArrowUp", "ArrowUp", "ArrowRight", "ArrowRight", "ArrowRight", "Shift+ArrowRight", "Shift+ArrowRight"
        )
        assert desk.marked == "lamp in room"
        desk.press("Control+Shift+ArrowRight", "Control+Shift+ArrowRight", "Alt+Shift+ArrowRight")
        assert desk.marked == "amp in room 7"
        desk.press("Alt+Shift+ArrowLeft", "Shift+ArrowLeft")
        assert desk.marked == "lamp in room"
        expect(page.locator("#answer")).to_contain_text("your selection")
        desk.press("Escape")
        expect(page.locator("#answer")).to_contain_text("the model, ")
        desk.press("ArrowUp", "Shift+ArrowRight")
        assert desk.marked == "Ada keeps"
        desk.act("Enter", "decide")
        assert (desk.rows[2]["answer"], desk.rows[2]["answer_start"]) == ("Ada keeps", 0)
        desk.act("u", "undo")
        expect(page.locator("#counter")).to_have_text("2 done, 2 rows left")
        assert (len(desk.rows), desk.marked) == (2, "Ada keeps")
        for _ in range(2):
            desk.act("Enter", "decide")
        expect(page.locator("#reading")).to_have_text("All rows are decided.")
        assert page.locator("#accept").is_disabled()
        expect(page.locator("#estimate")).to_contain_text("Every fifth row is drawn at random")
        desk.act("u", "undo")
        expect(page.locator("#counter")).to_have_text("3 done, 1 row left")
    assert len(read(str(desk.out)).examples) == 3


def test_offsets_count_code_points_in_any_script(browser, tmp_path):
    rows = [{"context": text, "question": "Who keeps the bell?"} for text in SCRIPTS]
    with labelling(browser, write_jsonl(tmp_path / "q.jsonl", rows)) as desk:
        for _ in SCRIPTS:
            text = desk.page.evaluate("document.querySelector('#reading').textContent")
            first, last = SCRIPTS[text]
            begin = text.index(first)
            wanted = text[begin : text.index(last, begin) + len(last)]
            desk.drag(first, last)
            assert desk.marked == wanted
            assert desk.page.evaluate("document.querySelector('#reading').textContent") == text
            desk.press("Escape", *["ArrowUp"] * 3)  # the same once more from the first word, by keyboard
            forwards = (
                "ArrowLeft"
                if desk.page.evaluate("getComputedStyle(document.querySelector('#reading')).direction") == "rtl"
                else "ArrowRight"
            )
            for key, goal in ((forwards, first), (f"Shift+{forwards}", wanted)):
                for _ in range(12):
                    if desk.marked == goal:
                        break
                    desk.press(key)
                assert desk.marked == goal
            desk.act("Enter", "decide")
            row = desk.rows[-1]
            assert (row["answer"], row["answer_start"]) == (wanted, begin)
    assert len(read(str(desk.out)).examples) == len(SCRIPTS)  # which verifies each offset


def test_questions_are_typed_on_passages(browser, tmp_path):
    (tmp_path / "docs").mkdir()
    for name in ("a", "b"):
        (tmp_path / "docs" / f"{name}.txt").write_text(f"{LAMP['context']} {name}")
    with labelling(browser, tmp_path / "docs") as desk:
        page = desk.page
        page.keyboard.type("Who keeps the lamp? s")  # a letter that is not a command here
        desk.act("Enter", "ask")
        assert desk.marked
        desk.act("Enter", "decide")
        expect(page.locator("#counter")).to_have_text("1 done, 2 passages left")
        assert page.locator("#question").input_value() == ""
        page.keyboard.type("Who keeps the lamp? s")
        desk.act("Enter", "ask")
        desk.act("n", "decide")
        expect(page.locator("#problem")).to_contain_text("already")
        assert page.locator("#question").input_value() == "Who keeps the lamp? s"
        desk.act("s", "skip")
        expect(page.locator("#source")).to_contain_text("b.txt")
        desk.press("Escape")
        desk.act("u", "undo")
        assert page.locator("#question").input_value() == "Who keeps the lamp? s"
        assert (desk.rows, desk.marked != "") == ([], True)


def test_a_full_disk_is_told_and_the_row_stays(browser, tmp_path):
    with labelling(browser, write_jsonl(tmp_path / "q.jsonl", [LAMP])) as desk:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))
        try:
            desk.act("Enter", "decide")
            expect(desk.page.locator("#problem")).to_contain_text("rows.jsonl: File too large")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        expect(desk.page.locator("#counter")).to_have_text("0 done, 1 row left")
        assert (desk.rows, desk.marked != "") == ([], True)
        desk.act("Enter", "decide")
        assert len(desk.rows) == 1


def test_two_tabs_do_not_decide_one_row_twice(browser, tmp_path):
    with labelling(browser, write_jsonl(tmp_path / "q.jsonl", [LAMP])) as desk:
        other = desk.page.context.new_page()
        other.goto(desk.page.url)
        expect(other.locator("#counter")).to_have_text("0 done, 1 row left")  # the only row, so both show it
        desk.act("Enter", "decide")
        other.keyboard.press("Enter")
        expect(other.locator("#problem")).to_contain_text("decided in another tab, so this decision was not saved")
        expect(other.locator("#reading")).to_have_text("All rows are decided.")
        assert len(desk.rows) == 1
