"""What the documentation site adds to the pages: help, options, pages from the repository's root, links out of ``docs/``."""

from __future__ import annotations

import importlib
import logging
import os.path
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from mkdocs.structure.files import File, Files

from qadeploy.cli import main
from qadeploy.options import table

ROOT = Path(__file__).resolve().parent.parent
ROOT_PAGES = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}  # site pages by source
OPTIONS = re.compile(r"<!-- options: (\S+)\.(\w+) -->")
LINK = re.compile(r"\[([^\[\]]+)\]\(([^()\s]+)\)")
log = logging.getLogger("mkdocs.hooks")


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages from the repository's root."""
    for source, page in ROOT_PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Fills in the commands' help and tables of options, and resolves links from the page's place in the repository.

    A link to a file that is not on the site leads to ``repo_url``; without one its text is left.
    """
    sources = {site: source for source, site in ROOT_PAGES.items()}
    here = sources.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def resolve(link: re.Match[str]) -> str:
        text, target = link.groups()
        path, mark, anchor = target.partition("#")
        if not path or ":" in path:
            return link[0]
        path = os.path.normpath(os.path.join(os.path.dirname(here), path))
        if path in ROOT_PAGES or path.startswith("docs/"):
            return f"[{text}]({ROOT_PAGES.get(path, path.removeprefix('docs/'))}{mark}{anchor})"
        if not (ROOT / path).exists():
            log.warning("%s: the link to %s leads nowhere", here, target)
        return f"[{text}]({config.repo_url}/blob/main/{path})" if config.repo_url else text

    markdown = markdown.replace("<!-- commands -->", "\n".join(_commands()))
    markdown = OPTIONS.sub(lambda found: table(getattr(importlib.import_module(found[1]), found[2])), markdown)
    return LINK.sub(resolve, markdown)


def _commands() -> Iterator[str]:
    group = click.Context(main, info_name="qadeploy")
    for name in main.list_commands(group):
        command = main.get_command(group, name)
        if command is not None and not command.hidden:
            context = click.Context(command, info_name=name, parent=group, terminal_width=80)
            yield f"## qadeploy {name}\n\n```text\n{command.get_help(context)}\n```\n"
