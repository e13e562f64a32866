"""Packages that only some users need: they are imported when they are needed."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from qadeploy.errors import MissingExtraError


def import_extra(module: str, purpose: str, extra: str, package: str = "") -> Any:
    """Imports a module of an optional package.

    Args:
        module: Its name, with dots.
        purpose: What needs it, for the message.
        extra: The extra of qadeploy that brings it.
        package: The name of the package, if it is not the first part of ``module``.

    Raises:
        MissingExtraError: It is not installed.
    """
    top = module.partition(".")[0]
    try:
        import_module(top)  # a module of it may have been imported before it was blocked
        return import_module(module)
    except ImportError as error:
        raise MissingExtraError(purpose, package or top, extra) from error
