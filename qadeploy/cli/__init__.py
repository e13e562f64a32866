"""The command line: parse, call one function, print. A module a group of commands, which import what is heavy inside."""

from qadeploy.cli import answering, benching, exporting, training, tuning  # each adds its commands to the group
from qadeploy.cli.common import main

__all__ = ["answering", "benching", "exporting", "main", "training", "tuning"]
