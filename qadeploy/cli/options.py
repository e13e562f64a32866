"""Flags made from declared options."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from qadeploy.options import Option, declared

_Function = TypeVar("_Function", bound=Callable[..., Any])


def options_of(
    cls: type, *names: str, without: tuple[str, ...] = (), env: bool = False
) -> Callable[[_Function], _Function]:
    """Adds the options that a dataclass declares to a command, in the order of their declaration.

    Args:
        cls: The dataclass.
        names: The options to add; all of them if none is named.
        without: Options to leave out.
        env: Whether environment variables set the options too.
    """

    def add(function: _Function) -> _Function:
        chosen = [
            each for each in declared(cls).values() if (not names or each.name in names) and each.name not in without
        ]
        for each in reversed(chosen):
            function = click_option(each, env=env)(function)
        return function

    return add


class NumberOrWord(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.2 on
    """A whole number, or one of the words among the option's choices."""

    name = "number or word"

    def __init__(self, each: Option) -> None:
        self._option = each
        self.choices = each.choices

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Returns the number or the word."""
        found = int(value) if isinstance(value, str) and value.isdecimal() and len(value) < 10 else value
        if problem := self._option.problem(found):
            self.fail(problem, param, ctx)
        return found


def click_option(each: Option, *, env: bool = False) -> Callable[[_Function], _Function]:
    """The click option for a declared option."""
    flags = [each.flag, *each.also]
    if each.off:
        flags[-1] += f"/{each.off}"
    kind: Any = {int: click.INT, float: click.FLOAT, str: click.STRING}.get(each.kind)
    if each.choices:
        kind = click.Choice(each.choices) if each.kind is str else NumberOrWord(each)
    elif each.kind is int and (each.least is not None or each.most is not None):
        low, high = (None if x is None else int(x) for x in (each.least, each.most))
        kind = click.IntRange(low, high)
    elif each.kind is float and (each.least is not None or each.most is not None):
        kind = click.FloatRange(each.least, each.most)
    is_flag = each.kind is bool and not each.off
    return click.option(
        *flags,
        each.name,
        type=None if each.kind is bool else kind,
        metavar=f"[{'|'.join(each.choices)}|N]" if each.choices and each.kind is not str else None,
        is_flag=is_flag or None,
        multiple=each.many,
        default=((each.default,) if isinstance(each.default, str) else each.default or None)
        if each.many
        else each.default,
        envvar=each.env if env else None,
        help=each.help if is_flag and each.default is False else f"{each.help}  [default: {each.default_text}]",
    )
