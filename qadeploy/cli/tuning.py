"""``qadeploy tune``."""

from __future__ import annotations

from typing import Any

import click

from qadeploy.cli.common import command, main, note, print_result, sayer
from qadeploy.cli.options import options_of
from qadeploy.inference.tune_bundle import TuneOptions, tune_bundle


@command(
    main,
    example="""
qadeploy tune bundles/handbook-int8
qadeploy tune bundles/faq-int8 --data questions.jsonl --target throughput
qadeploy tune bundles/faq-int8 --threads 4 --dry-run
""",
)
@click.argument("bundle")
@options_of(TuneOptions)
def tune(as_json: bool, bundle: str, **given: Any) -> None:
    """Measure BUNDLE's session settings on this machine and store the best ones in it.

    Measured in interleaved rounds: which graph optimizers of ONNX Runtime to disable, whether idle threads spin or sleep, and
    how the windows of a question are spread over threads. Only clearly faster settings with the same logits are stored.
    """
    tuned = tune_bundle(bundle, TuneOptions(**given), sayer(as_json))
    print_result(as_json, tuned.to_dict(), tuned.lines())
    if tuned.remedy:
        note(f"Warning: {bundle}: {tuned.remedy}")
