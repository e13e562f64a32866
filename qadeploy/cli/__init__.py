"""The command line: parse, call one function, print. Heavy imports happen inside the commands."""

# Each module adds its commands to ``main``.
from qadeploy.cli import answering, benching, exporting, indexing, labelling, pushing, serving, training, tuning
from qadeploy.cli.common import main

__all__ = [
    "answering", "benching", "exporting", "indexing", "labelling", "main", "pushing", "serving", "training", "tuning",
]  # fmt: skip
