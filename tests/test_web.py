"""Static sites of ``qadeploy export --web``: what is written and refused, and the page in a real browser.

Needs npm, which downloads onnxruntime-web once; for the page also Chromium. Without them these tests skip.
"""

from __future__ import annotations

import contextlib
import functools
import http.server
import io
import json
import shutil
import tarfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

from qadeploy import Answerer
from qadeploy.core.settings import Options
from qadeploy.data.loading import read
from qadeploy.errors import FailureError
from qadeploy.inference.bundle import open_bundle
from qadeploy.integrations.web.npm import INTEGRITY, VERSION, onnxruntime_web
from qadeploy.integrations.web.site import write_site
from qadeploy.shipped import base_bundle_path
from tests.cli_for_tests import fails, well
from tests.conftest import needs_chromium, sealed_copy, triplets

ARCHIVE = f"onnxruntime-web-{VERSION}.tgz"
needs_npm = pytest.mark.skipif(shutil.which("npm") is None, reason="npm is not installed")
EMOJI = (
    "Who keeps the lamp?",
    "\U0001f3ee\U0001f468\u200d\U0001f469\u200d\U0001f467 Mungo Strand \U0001f981 keeps the lamp. C\u0327a va.",
)
ABSENT = ("Who was the captain?", "It sailed at dawn, before the fog came in.")


def questions() -> list[tuple[str, str]]:
    examples = read("handbook").examples[::150]
    long = "\n\n".join(example.context for example in examples)
    return [
        *((example.question, example.context) for example in examples[:5]),
        (examples[2].question, long),
        EMOJI,
        ABSENT,
        ("When did it sail?", ABSENT[1]),
        (
            "Wer h\u00fctet die Glocke?",
            "\u5317\u4eac\u3002 \u00c4da h\u00fctet die Glocke;\r\n\r\n\tFay \u0628\u062d\u0631 nicht.",
        ),
        ("Who keeps\0 the bell?", "A\0da \ufffd keeps the bell.\0 Fay keeps\0 the boat."),
    ]


@pytest.fixture(scope="module")
def site(once: Any) -> Path:
    """The site of the bundle that ships, in a folder below the root of its host."""

    def build(root: Path) -> Path:
        try:
            onnxruntime_web()
        except FailureError as error:
            pytest.skip(str(error))
        return write_site(
            open_bundle(base_bundle_path()), root / "some" / "where", read("handbook").examples[:4]
        ).folder

    return once("site", build)


@contextlib.contextmanager
def hosting(root: Path, **headers: str) -> Iterator[str]:
    """A web server of a folder; its address."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def end_headers(self) -> None:
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            super().end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=root)) as server:
        threading.Thread(target=server.serve_forever).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


# ---------------------------------------------------------------- the folder


def test_the_folder_says_what_it_was_made_of(site):
    source, made = open_bundle(base_bundle_path()), open_bundle(site)
    assert made.manifest["made"]["from_sha256"] == source.hash
    assert made.manifest["web"] == {"onnxruntime-web": VERSION, "integrity": INTEGRITY}
    assert made.manifest["made"]["proof"]["equal"] == 4
    card = (site / "README.md").read_text("utf-8")
    assert all(text in card for text in (source.hash, f"onnxruntime-web {VERSION}", "http.server --directory where"))
    assert {"index.html", "answerer.js", "tools.js", "ort-wasm-simd-threaded.wasm"} < {p.name for p in site.iterdir()}


def test_a_site_is_replaced_and_nothing_else(site, tmp_path, monkeypatch):
    bundle, place = open_bundle(base_bundle_path()), tmp_path / "site"
    shutil.copytree(site, place)
    (place / "index.html").write_text("damaged")
    write_site(bundle, place, read("handbook").examples[:1])
    assert (place / "index.html").read_bytes() == (site / "index.html").read_bytes()
    shutil.copytree(site, tmp_path / "mixed")
    (tmp_path / "mixed" / "notes.txt").touch()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    (tmp_path / "link").symlink_to(place)
    sealed_copy(base_bundle_path(), tmp_path / "bundle")
    sealed_copy(base_bundle_path(), tmp_path / "fp16", precision="fp16")
    monkeypatch.chdir(tmp_path)
    for source, out, message in (
        (
            "bundle",
            "mixed",
            "mixed: holds notes.txt beside a bundle, which would be deleted: move it away, or give another --web",
        ),
        ("bundle", "other", "other: exists and is not a bundle, so it is not overwritten: give another --web"),
        ("bundle", "link", "link: is a link, which is not overwritten: give --web the folder itself or another name"),
        ("bundle", "bundle", "bundle: holds a bundle and no page, so it is not overwritten: give another --web"),
        ("fp16", "new", "fp16: is fp16, which is for GPUs: give the int8 or fp32 bundle for --web"),
    ):
        fails(2, [message], "export", source, "--web", out)
    fails(1, ["its graph answers by itself"], "export", "site", "--web", "new")


# ---------------------------------------------------------------- npm


def test_without_npm_the_fix_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("QADEPLOY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", "")
    monkeypatch.chdir(tmp_path)
    by_hand = (
        f"or copy {ARCHIVE} into {tmp_path / 'cache'} (npm pack onnxruntime-web@{VERSION} makes it on any machine)"
    )
    message = (
        f"--web needs onnxruntime-web@{VERSION}, and npm is not on the PATH to download it: install Node.js, {by_hand}"
    )
    fails(1, [message], "export", base_bundle_path(), "--web", "new")


def test_without_a_home_the_cache_is_asked_for(monkeypatch):
    # As if the user had no home folder.
    monkeypatch.setattr("qadeploy.integrations.web.npm.cache_folder", lambda: None)
    with pytest.raises(FailureError, match="no home folder: set QADEPLOY_CACHE"):
        onnxruntime_web()


def test_a_copy_in_the_cache_that_was_changed_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("QADEPLOY_CACHE", str(tmp_path))
    (tmp_path / ARCHIVE).write_bytes(b"another")
    with pytest.raises(FailureError, match=rf"{ARCHIVE}: is not onnxruntime-web@{VERSION}, .* remove it"):
        onnxruntime_web()


@needs_npm
def test_npm_that_fails_is_quoted(tmp_path, monkeypatch):
    for name, value in {"registry": "http://127.0.0.1:9", "cache": str(tmp_path / "npm"), "fetch_retries": "0"}.items():
        monkeypatch.setenv(f"npm_config_{name}", value)
    monkeypatch.setenv("QADEPLOY_CACHE", str(tmp_path / "cache"))
    with pytest.raises(FailureError, match=r"npm cannot download onnxruntime-web@.*ECONNREFUSED.*registry, or copy"):
        onnxruntime_web()
    assert not (tmp_path / "cache").exists()


@needs_npm
def test_another_package_of_that_name_is_refused(tmp_path, monkeypatch):
    root = tmp_path / "registry"
    root.mkdir()
    with tarfile.open(root / "other.tgz", "w:gz") as archive:
        data = json.dumps({"name": "onnxruntime-web", "version": VERSION}).encode()
        entry = tarfile.TarInfo("package/package.json")
        entry.size = len(data)
        archive.addfile(entry, io.BytesIO(data))
    with hosting(root) as url:
        version = {"name": "onnxruntime-web", "version": VERSION, "dist": {"tarball": f"{url}/other.tgz"}}
        (root / "onnxruntime-web").write_text(json.dumps({"name": "onnxruntime-web", "versions": {VERSION: version}}))
        monkeypatch.setenv("npm_config_registry", url)
        monkeypatch.setenv("npm_config_cache", str(tmp_path / "npm"))
        monkeypatch.setenv("QADEPLOY_CACHE", str(tmp_path / "cache"))
        with pytest.raises(FailureError, match="registry has another onnxruntime-web"):
            onnxruntime_web()
    assert not (tmp_path / "cache").exists()


# ---------------------------------------------------------------- the page


@dataclass
class Opened:
    """A site in the browser, its console messages, and its requests to other hosts."""

    page: Page
    console: list[str] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)

    def ask(self, question: str, context: str, **options: object) -> dict[str, Any]:
        """What ``answerer.js`` answers, and as ``slice`` the part of the context at its place for JavaScript."""
        found: dict[str, Any] = self.page.evaluate(
            """async ([question, context, options]) => {
                window.answerer ??= (await import("./answerer.js")).Answerer.load();
                const found = await (await window.answerer).answer(question, context, options);
                return { ...found, slice: context.slice(found.utf16.start, found.utf16.end) }; }""",
            [question, context, options],
        )
        return found


@contextlib.contextmanager
def opened(browser: Browser, url: str, script: str = "") -> Iterator[Opened]:
    context = browser.new_context(reduced_motion="reduce")
    context.set_default_timeout(120_000)
    try:
        found = Opened(context.new_page())
        host = "/".join(url.split("/")[:3])
        found.page.on("console", lambda message: found.console.append(f"{message.type}: {message.text}"))
        found.page.on("pageerror", lambda error: found.console.append(f"error: {error}"))
        found.page.on("request", lambda r: found.outside.append(r.url) if not r.url.startswith(f"{host}/") else None)
        if script:
            found.page.add_init_script(script)
        found.page.goto(url)
        yield found
        assert (found.console, found.outside) == ([], [])
    finally:
        context.close()


def same_answers(opens: Opened, answerer: Answerer, asked: list[tuple[str, str]], tolerance: float) -> None:
    """The browser's answers equal the Answerer's, with and without "no answer", and their places fit JavaScript strings."""
    for question, context in asked:
        for allowed in (None, False, True) if len(context) < 200 else (None,):  # a long one takes seconds
            (theirs,) = answerer.answer(question, context, allow_no_answer=allowed)
            (units,) = answerer.answer(question, context, allow_no_answer=allowed, offsets="utf16")
            ours = opens.ask(question, context, **({} if allowed is None else {"allowNoAnswer": allowed}))
            assert (ours["text"], ours["start"], ours["end"]) == (theirs.text, theirs.start, theirs.end)
            assert (ours["utf16"], ours["slice"]) == ({"start": units.start, "end": units.end}, theirs.text)
            assert ours["score"] == pytest.approx(theirs.score, abs=tolerance)


@needs_npm
@needs_chromium
@pytest.mark.parametrize("isolated", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_answers_are_the_answerers(isolated, browser, site):
    answerer, asked = Answerer.load(base_bundle_path(), device="cpu", threads=1), questions()
    assert len(answerer.read(*asked[5], Options()).windows) > 4
    assert {bool(answerer.answer(*pair)[0].text) for pair in asked} == {True, False}
    headers = {"Cross_Origin_Opener_Policy": "same-origin", "Cross_Origin_Embedder_Policy": "require-corp"}
    more_processors = (
        "Object.defineProperty(navigator, 'hardwareConcurrency', { value: 4 })"  # the runtime uses half of them
    )
    with (
        hosting(site.parents[1], **(headers if isolated else {})) as url,
        opened(browser, f"{url}/some/where/", more_processors) as opens,
    ):
        assert opens.page.evaluate("crossOriginIsolated") == isolated
        # Floats round differently in WebAssembly, which moves some int8 activations by a step.
        same_answers(opens, answerer, asked, 0.1)


@needs_npm
@needs_chromium
def test_scores_of_the_fp32_bundle_of_a_run_are_the_answerers(browser, site, tiny, brief, tmp_path):
    well("export", tiny.run, "--no-optimize", "--out", tmp_path / "keepers", "--web", tmp_path / "site")
    rows = [(str(row["question"]), str(row["context"])) for row in triplets(12)]
    asked = [*rows, (rows[3][0], " ".join(context for _, context in rows)), EMOJI]
    answerer = Answerer.load(tmp_path / "keepers", device="cpu", threads=1)
    with hosting(tmp_path / "site") as url, opened(browser, f"{url}/") as opens:
        same_answers(opens, answerer, asked, 1e-4)


@needs_npm
@needs_chromium
def test_the_page_shows_the_answer_in_the_text(browser, site):
    with hosting(site.parent) as url, opened(browser, f"{url}/where/") as opens:
        page = opens.page
        expect(page.locator("#model")).to_have_text("minilm-l6-qa-int8 · int8")
        page.get_by_role("button", name="Ask").click()
        expect(page.get_by_role("alert")).to_have_text("There is no text yet: paste one.")
        page.get_by_label("Text", exact=True).fill(EMOJI[1])
        page.get_by_label("Question", exact=True).fill(EMOJI[0])
        page.get_by_role("button", name="Ask").click()
        expect(page.locator("#reading mark")).to_have_text("Mungo Strand")
        expect(page.locator("#answers bdi")).to_have_text("Mungo Strand")
        expect(page.locator("#facts")).to_contain_text("Characters 7 to 19.")
        assert page.locator("#reading").text_content() == EMOJI[1]
        page.get_by_role("button", name="Edit").click()
        page.get_by_label("Text", exact=True).fill(ABSENT[1])
        expect(page.locator("#result")).to_be_hidden()
        page.get_by_label("Question", exact=True).fill(ABSENT[0])
        page.keyboard.press("Control+Enter")
        expect(page.locator("#answers bdi")).to_have_text("No answer in this text")
        expect(page.locator("#reading mark")).to_have_count(0)
        page.get_by_label('Allow "no answer"').uncheck()
        page.keyboard.press("Control+Enter")
        expect(page.locator("#reading mark")).to_have_count(1)
        page.get_by_label("Question", exact=True).fill("who " * 400)
        page.keyboard.press("Control+Enter")
        expect(page.get_by_role("alert")).to_have_text(
            "The question is too long, or nothing in the text can be an answer."
        )
        half = page.evaluate("""async () => { const { Answerer } = await import("./answerer.js"), one = await Answerer.load();
            return [await one.answer("Who keeps the lamp?", "\\ud83d Ada keeps the lamp.", { allowNoAnswer: false }),
                    await one.answer(" ", "Ada").catch((error) => error.message)]; }""")
        assert (half[0]["text"], half[0]["start"], half[1]) == ("Ada", 2, "The question is empty.")


@needs_npm
@needs_chromium
def test_a_browser_that_cannot_run_the_model_is_told_so(browser, site):
    with hosting(site.parent) as url:
        with opened(browser, f"{url}/where/", "delete globalThis.WebAssembly") as opens:
            words = (
                "The model cannot be loaded. This browser has no WebAssembly, or it is turned off. The model needs it."
            )
            expect(opens.page.get_by_role("alert")).to_have_text(words)
            expect(opens.page.get_by_role("button", name="Ask")).to_be_disabled()
        page = browser.new_page()
        page.goto((site / "index.html").as_uri())
        expect(page.get_by_text("If you opened the page as a file")).to_be_visible()
        page.close()
        page = browser.new_page()
        page.route("**/model.onnx?*", lambda route: route.fulfill(status=404))
        page.goto(f"{url}/where/")
        words = "The model cannot be loaded. /where/model.onnx: the web server returned status 404."
        expect(page.get_by_role("alert")).to_have_text(words)
        page.close()
