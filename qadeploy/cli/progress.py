"""A progress line that is rewritten in place on a terminal, below permanent lines. Without a terminal only those are printed."""

from __future__ import annotations

import shutil
import sys
from typing import IO, Any

import click

_BAR = 20
_CLEAR = "\r\x1b[K"


class Progress:
    """A rewritten line on ``stream`` (default stderr) if that is a terminal; remarks on stdout, or on stderr with ``--json``.

    A context manager: the line disappears when it ends.
    """

    def __init__(self, as_json: bool, stream: IO[str] | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._as_json = as_json
        self._live = self._stream.isatty()
        self._text = ""

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self._text = ""
        self._draw()

    def say(self, message: str) -> None:
        """Prints a permanent line above the progress line."""
        text, self._text = self._text, ""
        self._draw()
        click.echo(message, err=self._as_json)
        self._text = text
        self._draw()

    def step(self, step: Any) -> None:
        """Shows the state of a search (a ``search.Step``): recipes done, the current one, the budget left."""
        left = "" if step.left is None else f"  {int(step.left) // 60}:{int(step.left) % 60:02d} of the budget left"
        self.count(step.done, step.of, f"{left}  {step.doing}")

    def show(self, text: str) -> None:
        """Shows a text as the progress line."""
        self._text = text
        self._draw()

    def count(self, done: int, of: int, rest: str) -> None:
        """Shows ``done`` out of ``of``, followed by ``rest``."""
        full = _BAR * done // max(1, of)
        self.show(f"[{'#' * full}{'-' * (_BAR - full)}] {done}/{of}{rest}")

    def _draw(self) -> None:
        if self._live:
            columns = shutil.get_terminal_size().columns
            self._stream.write(_CLEAR + self._text[: max(0, columns - 1)])
            self._stream.flush()
