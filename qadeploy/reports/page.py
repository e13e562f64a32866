"""Renders templates as self-contained pages: the engine, its filters, and the characters that HTML forbids."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

# Control characters, surrogates and non-characters: HTML forbids them, and half a surrogate pair cannot be written.
_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")


def render(template: Path, **values: Any) -> str:
    """Renders a template, which may include ``report.css``; characters that HTML forbids become U+FFFD.

    In an HTML template (``.html.j2``) texts are escaped.
    """
    environment = Environment(
        loader=FileSystemLoader([template.parent, Path(__file__).parent]),
        autoescape=select_autoescape(["html.j2"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        percent="{:.1f}".format, interval=_interval, signed=_signed, shortened=_short, value=value
    )
    return _FORBIDDEN.sub("\ufffd", environment.get_template(template.name).render(**values))


def value(found: Any) -> str:
    """Formats a recorded value for people to read."""
    if found is None:
        return "–"
    if isinstance(found, bool):
        return "yes" if found else "no"
    return f"{found:g}" if isinstance(found, float) else str(found)


def _interval(bounds: Sequence[float] | None) -> str:
    return f"{bounds[0]:.0f}–{bounds[1]:.0f}" if bounds else ""


def _signed(number: float) -> str:
    return f"{number:+.1f}".replace("-", "−")


def _short(text: str, longest: int = 400) -> str:
    return text if len(text) <= longest else f"{text[:longest]}…"
