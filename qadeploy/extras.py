"""Imports of optional packages, which only some users install."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from qadeploy.errors import MissingExtraError


def import_extra(module: str, purpose: str, extra: str, package: str = "") -> Any:
    """Imports a module of an optional package.

    Args:
        module: The dotted name of the module.
        purpose: What needs the module, for the message.
        extra: The extra of qadeploy that installs the package.
        package: The name of the package, if it is not the first part of ``module``.

    Raises:
        MissingExtraError: The package is not installed.
    """
    top = module.partition(".")[0]
    try:
        import_module(top)  # fails if ``top`` is blocked, even if the submodule was imported earlier
        return import_module(module)
    except ImportError as error:
        raise MissingExtraError(purpose, package or top, extra) from error
