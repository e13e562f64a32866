"""The pages under docs/ and at the repository's root: their Python examples run, their commands and links exist."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import click
import pytest

from qadeploy.cli import main

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {str(page.relative_to(ROOT)): page.read_text(encoding="utf-8") for page in PAGES}
LAMP, BOAT = "Who keeps the lamp?", "Who keeps the boat?"
CONTEXT = "Ada keeps the lamp in room 3. Bela keeps the boat outside."
# Named files are left out: tests/test_embedding.py runs them.
EXAMPLES = [(page, text) for page in TEXTS for text in re.findall(r"^```python\n(.*?)^```", TEXTS[page], re.S | re.M)]


@pytest.mark.parametrize(("page", "text"), EXAMPLES, ids=[page for page, _ in EXAMPLES])
def test_python_examples_run(page, text, bundle, tmp_path, monkeypatch):
    (tmp_path / "bundles").mkdir()
    for name in set(re.findall(r"\"bundles/([\w-]+)\"", text)):
        (tmp_path / "bundles" / name).symlink_to(bundle)
    monkeypatch.chdir(tmp_path)
    names = {"context": CONTEXT, "questions": [LAMP, BOAT]}
    if "http://localhost" in text:  # the tests of the server and of Triton make these calls; here only the imports run
        tree = ast.parse(text)
        tree.body = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        exec(compile(tree, page, "exec"), names)
    else:
        exec(compile(text, page, "exec"), names)


def commands() -> list[tuple[str, str]]:
    """The calls of qadeploy in the shell blocks, with the page that holds them."""
    found = []
    for page, text in TEXTS.items():
        for block in re.findall(r"^```sh\n(.*?)^```", text, re.S | re.M):
            lines = block.replace("\\\n", " ").splitlines()
            found += [(page, line.strip()) for line in lines if line.strip().startswith("qadeploy ")]
    return found


def test_flags_of_commands_exist():
    lines = commands()
    assert len(lines) >= 10
    for page, line in lines:
        _, name, *words = shlex.split(line, comments=True)
        command = main.get_command(click.Context(main), name)
        assert command is not None, f"{page}: {line}"
        known = {flag for param in command.params for flag in (*param.opts, *param.secondary_opts)}
        flags = {word.partition("=")[0].replace("_", "-") for word in words if word.startswith("--")}
        assert flags <= known, f"{page}: {line}"


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as the repository page and the site make them."""
    titles = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_links_lead_somewhere():
    for page, text in TEXTS.items():
        for link in re.findall(r"\]\(([^()\s]+)\)", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)):
            path, _, anchor = link.partition("#")
            if ":" in path:
                continue
            target = (ROOT / page).parent / path if path else ROOT / page
            assert target.exists(), f"{page}: {link}"
            if anchor:
                assert anchor in anchors(target.read_text(encoding="utf-8")), f"{page}: {link}"


def test_every_page_is_in_the_navigation():
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
    listed = re.findall(r": ([\w-]+\.md)$", nav, re.M)
    pages = {page.removeprefix("docs/") for page in TEXTS if page.startswith("docs/")}
    assert sorted(listed) == sorted({*pages, "changelog.md", "contributing.md"})


def test_files_named_for_contributors_exist():
    named = re.findall(r"`([\w/]+(?:\.py|/))`", TEXTS["CONTRIBUTING.md"])
    assert len(named) >= 30
    rooms = [ROOT, *(ROOT / "qadeploy").rglob("*/"), ROOT / "qadeploy"]
    missing = [name for name in named if not any((room / name).exists() for room in rooms)]
    assert missing == []
