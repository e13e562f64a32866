"""The command line: parse, call one function, print. Heavy imports happen inside the commands."""

# Each module adds its commands to ``main``.
from qadeploy.cli import answering, bundles, indexing, labelling, serving, training
from qadeploy.cli.common import main

__all__ = ["answering", "bundles", "indexing", "labelling", "main", "serving", "training"]
