"""``qadeploy push``."""

from __future__ import annotations

from typing import Any

import click

from qadeploy.cli.common import command, main, print_result
from qadeploy.cli.options import options_of
from qadeploy.export.push import PushOptions
from qadeploy.export.push import push as upload


@command(
    main,
    example="""
qadeploy push bundles/faq-int8 my-org/faq-int8 --private
qadeploy push runs/faq my-org/faq --revision v2
""",
)
@click.argument("source", metavar="RUN|BUNDLE")
@click.argument("repo")
@options_of(PushOptions)
def push(as_json: bool, source: str, repo: str, **given: Any) -> None:
    """Upload RUN (its best checkpoint and its card) or BUNDLE to the repository REPO (ORG/NAME) on the Hugging Face hub.

    Data, predictions and logs are not uploaded. The token comes from HF_TOKEN or hf auth login. The uploaded files are listed.
    """
    made = upload(source, repo, PushOptions(**given))
    print_result(as_json, made.to_dict(), made.lines())
