"""``qadeploy bench`` and ``doctor``."""

from __future__ import annotations

from typing import Any

import click

from qadeploy.bench.limits import Limits, complaint
from qadeploy.bench.options import BenchOptions
from qadeploy.cli.common import command, fail, main, note, print_result
from qadeploy.cli.options import options_of
from qadeploy.options import declared


@command(
    main,
    example="""
qadeploy bench
qadeploy bench bundles/faq-int8 bundles/faq --data held_out.jsonl --against pipeline,openvino --out results
qadeploy bench bundles/faq-int8 --against pipeline,torch --max-f1-drop 0.5 --min-speedup 4
""",
)
@click.argument("bundles", nargs=-1, metavar="[BUNDLE]...")
@options_of(BenchOptions)
@options_of(Limits)
def bench(as_json: bool, bundles: tuple[str, ...], **given: Any) -> None:
    """Measure BUNDLEs (default: the newest) against other tools on the same questions, and score the answers.

    Peers and limits refer to the first BUNDLE; further ones are shown for comparison.
    """
    from qadeploy.bench import table
    from qadeploy.bench.run import bench_bundles

    limits = Limits(**{name: given.pop(name) for name in declared(Limits)})
    report, written = bench_bundles(bundles, BenchOptions(**given), limits, note)
    text = table.lines(report)
    if written:
        text.append(f"written: {', '.join(map(str, written))}")
    print_result(as_json, report, text)
    if problem := complaint(report):
        fail(problem, 1)


@command(main, example="qadeploy doctor")
def doctor(as_json: bool) -> None:
    """Show what this installation can do and what is missing."""
    from qadeploy.inference.doctor import diagnose, diagnosis_lines, gpu_bundles

    report = {**diagnose(), "gpu_bundles": gpu_bundles()}
    print_result(as_json, report, diagnosis_lines(report))
