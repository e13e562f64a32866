"""The line that is rewritten on a terminal, and its form elsewhere."""

from __future__ import annotations

import io

import pytest

from qadeploy.cli.progress import Progress
from qadeploy.export.quantize.search import Step


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(text: str) -> str:
    """The final text of a terminal's rewritten line."""
    return text.rpartition("\r\x1b[K")[2]


def test_a_terminal_sees_one_line_that_says_where_it_stands(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    stream = Terminal()
    with Progress(False, stream) as progress:
        progress.step(Step(3, 7, "int8-mixed: answering 486 questions", 250.9))
        line = shown(stream.getvalue())
        assert line == "[########------------] 3/7  4:10 of the budget left  int8-mixed: answering 486 questions"
        progress.say("a result")
        assert shown(stream.getvalue()) == line  # drawn again below what stays
        progress.step(Step(0, 1, "making the model", None))
        assert shown(stream.getvalue()) == "[--------------------] 0/1  making the model"
        monkeypatch.setenv("COLUMNS", "30")
        progress.step(Step(7, 7, "x" * 100, 0.0))
        assert len(shown(stream.getvalue())) == 29  # one that wraps could not be rewritten
    assert shown(stream.getvalue()) == ""
    assert "\n" not in stream.getvalue()
    assert capsys.readouterr().out == "a result\n"


def test_a_count_is_shown_with_what_is_counted():
    stream = Terminal()
    with Progress(False, stream) as progress:
        progress.count(5, 20, " windows read")
        assert shown(stream.getvalue()) == "[#####---------------] 5/20 windows read"
    assert shown(stream.getvalue()) == ""


@pytest.mark.parametrize("as_json", [False, True])
def test_elsewhere_only_lines_that_stay_are_printed(as_json, capsys):
    stream = io.StringIO()
    with Progress(as_json, stream) as progress:
        progress.step(Step(1, 7, "making the model", 3.0))
        progress.say("a result")
    assert stream.getvalue() == ""
    said = capsys.readouterr()
    assert (said.out, said.err) == (("", "a result\n") if as_json else ("a result\n", ""))


def test_an_error_leaves_no_line_behind():
    stream = Terminal()

    def interrupted() -> None:
        with Progress(False, stream) as progress:
            progress.step(Step(1, 7, "making the model", None))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert shown(stream.getvalue()) == ""
