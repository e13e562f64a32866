"""The exception tree as drawn in the docstring, and what a caller sees of each error."""

from __future__ import annotations

import inspect
import re

import pytest

from qadeploy import errors

CLASSES = {
    name: value
    for name, value in inspect.getmembers(errors, inspect.isclass)
    if issubclass(value, BaseException) and value.__module__ == errors.__name__
}
WARNINGS = {errors.DataWarning, errors.DeviceWarning, errors.MachineWarning}
DRAWN = re.compile(r"(?P<lead>(?:[│ ] {3})*(?:[├└]── )?)(?P<name>[A-Z]\w+) *(?P<about>.*)")


def drawn() -> list[tuple[str, str | None, str]]:
    """The tree in the docstring: name, parent, and what is written beside it."""
    found: list[tuple[str, str | None, str]] = []
    above: dict[int, str] = {}
    for line in (errors.__doc__ or "").splitlines()[2:]:
        if line:
            match = DRAWN.fullmatch(line)
            assert match, line
            depth = len(match["lead"]) // 4
            above[depth] = match["name"]
            found.append((match["name"], above.get(depth - 1), match["about"]))
    return found


def test_the_tree_drawn_is_the_tree_of_classes():
    tree = {name: parent for name, parent, _ in drawn()}
    assert len(tree) == len(drawn())
    roots = {errors.QadeployError: Exception, **dict.fromkeys(WARNINGS, UserWarning)}
    assert tree == {n: None if c in roots else c.__base__.__name__ for n, c in CLASSES.items()}
    assert all(root.__base__ is base for root, base in roots.items())
    assert all(base.__module__ == "builtins" for c in CLASSES.values() for base in c.__bases__[1:])


def test_the_exit_codes_drawn_hold_for_every_class_below():
    codes = {name: int(m[1]) for name, _, about in drawn() if (m := re.search(r"\(exit code (\d)\)", about))}
    assert codes == {"InputError": 2, "FailureError": 1}
    for cls in set(CLASSES.values()) - WARNINGS:
        roots = [name for name in codes if issubclass(cls, CLASSES[name])]
        assert cls.exit_code == (codes[roots[0]] if roots else 1)
        assert cls is errors.QadeployError or len(roots) == 1


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_every_error_says_what_it_means(name):
    assert inspect.getdoc(CLASSES[name])
    beside = {drawn_name: about for drawn_name, _, about in drawn()}
    assert beside[name] or name == "QadeployError"


@pytest.mark.parametrize("name", sorted(CLASSES.keys() - {"DataError", "MissingExtraError"}))
def test_an_error_is_its_message(name):
    assert str(CLASSES[name]("one message")) == "one message"


@pytest.mark.parametrize(("count", "hidden"), [(1, 0), (20, 0), (21, 1), (99, 79)])
@pytest.mark.parametrize("fix", ["", "Add answer_start."])
def test_a_data_error_keeps_every_problem_and_shows_twenty(count, hidden, fix):
    lines = [f"f.csv: row {n}, field answer: is empty" for n in range(1, count + 1)]
    error = errors.DataError(lines, fix)
    assert error.problems == tuple(lines)
    expected = lines[:20] + [f"... and {hidden} more rows with problems"] * bool(hidden) + [fix] * bool(fix)
    assert str(error).splitlines() == expected


def test_a_missing_extra_gives_the_pip_line():
    assert str(errors.MissingExtraError("reading parquet", "pyarrow", "parquet")) == (
        "reading parquet needs the package pyarrow, which is not installed: pip install 'qadeploy[parquet]'"
    )


def test_an_error_is_one_line_also_if_it_has_no_message():
    assert errors.one_line(ValueError("two\n  lines")) == "two lines"
    assert errors.one_line(ValueError("long"), 2) == "lo"
    assert errors.one_line(ValueError("x" * 5_000)) == "x" * 5_000  # our own messages end with what to do
    assert errors.one_line(MemoryError()) == "MemoryError"
