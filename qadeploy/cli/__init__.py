"""The command line: parse, call one function, print. A module a group of commands, which import what is heavy inside."""

from qadeploy.cli import answering, benching, exporting, serving, training, tuning  # each adds its commands
from qadeploy.cli.common import main

__all__ = ["answering", "benching", "exporting", "main", "serving", "training", "tuning"]
