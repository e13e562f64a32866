"""``qadeploy export``."""

from __future__ import annotations

from typing import Any

import click

from qadeploy.cli.common import command, main, print_result
from qadeploy.cli.options import options_of
from qadeploy.cli.progress import Progress
from qadeploy.export.options import ExportOptions


@command(
    main,
    example="""
qadeploy export --quantize
qadeploy export runs/faq --quantize --max-f1-drop 0.3 --target throughput
qadeploy export runs/faq --quantize --recipe int8-protected
qadeploy export runs/faq --device cuda
qadeploy export some/checkpoint --eval-data held_out.jsonl --out bundles/mine
qadeploy export runs/faq --quantize --spans-in-graph
qadeploy export bundles/faq-int8 --spans-in-graph --strings-in-graph
qadeploy export bundles/faq-int8 --web site
qadeploy export runs/faq --quantize --triton repository
qadeploy export bundles/faq-int8 --triton repository
""",
)
@click.argument("run", required=False)
@options_of(ExportOptions)
@click.option("--list-recipes", is_flag=True, help="Explain the int8 recipes and stop.")
def export(as_json: bool, run: str | None, list_recipes: bool, **given: Any) -> None:
    """Export RUN (a run or checkpoint folder; default: the newest run) to ONNX bundles and verify their logits and F1.

    With --quantize, every int8 recipe is measured on this machine, and the best one that keeps its F1 is written.
    RUN may also be a bundle, from which --spans-in-graph and --text-in-graph make further bundles, and --web a static site.
    """
    if list_recipes:
        from qadeploy.export.quantize.recipes import RECIPES

        known = {name: each.what for name, each in RECIPES.items()}
        print_result(as_json, known, [f"{name:<22} {what}" for name, what in known.items()])
        return
    from qadeploy.export.run import export_run

    with Progress(as_json) as progress:
        made = export_run(run, ExportOptions(**given), progress)
    print_result(as_json, made.to_dict(), made.lines)
