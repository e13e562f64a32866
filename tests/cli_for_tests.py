"""Runs commands of the command line in this process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

from qadeploy.cli import main

ROOT = Path(__file__).parents[1]
SEED = {"context": "The sky is blue.", "question": "What color is the sky?", "answer": "blue"}


def run(*args: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in args])


def well(*args: object) -> Result:
    """Runs a command that must succeed."""
    result = run(*args)
    assert result.exit_code == 0, (result.output, result.exception)
    return result


def value(result: Result) -> Any:
    """Stdout as exactly one JSON object on one line."""
    assert len(result.stdout.splitlines()) == 1, result.stdout
    found = json.loads(result.stdout)
    assert isinstance(found, dict)
    return found


def files(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("*")}


def fails(code: int, messages: list[str], *args: object) -> str:
    """Runs a command that must end with ``code``, one clear message, and leave the folder as it was."""
    assert Path.cwd() != ROOT, "other tests write there meanwhile: use the fixture elsewhere"
    before = files(Path.cwd())
    result = run(*args)
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    assert result.stderr.count("Error: ") == 1, result.stderr
    for message in messages:
        assert message in result.stderr
    assert files(Path.cwd()) == before
    return result.stderr
