"""``qadeploy tune``."""

from __future__ import annotations

import os
import time
import warnings
from pathlib import Path
from typing import Any

import click

from qadeploy.cli.common import columns_options, command, main, note, print_result, read_examples, sayer, take_reading
from qadeploy.errors import InputError, MachineWarning


@command(
    main,
    example="""
qadeploy tune bundles/handbook-int8
qadeploy tune bundles/faq-int8 --data questions.jsonl --target throughput
qadeploy tune bundles/faq-int8 --threads 4 --dry-run
""",
)
@click.argument("bundle")
@click.option(
    "--target",
    type=click.Choice(["latency", "throughput"]),
    default="latency",
    show_default=True,
    help="What the settings are measured by: one question at a time, or many at once.",
)
@click.option(
    "--data", default="handbook", show_default=True, help="Questions to measure with: anything that train reads."
)
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads that answering will have.  [default: all]")
@click.option("--dry-run", is_flag=True, help="Measure and print only.")
@columns_options
def tune(
    as_json: bool, bundle: str, target: str, data: str, threads: int | None, dry_run: bool, **options: Any
) -> None:
    """Measure BUNDLE's session settings again on this machine, and store the best in it.

    Graph optimizers of ONNX Runtime to leave out, idle threads that spin or sleep, and the layout of a question's
    windows on threads are timed in turns. Settings change only where others are clearly faster and the logits stay.
    """
    from qadeploy import Answerer
    from qadeploy.inference.bundle import MODEL, rewrite_manifest
    from qadeploy.inference.session import OnnxModel, onnxruntime
    from qadeploy.inference.tuning import FP32_TOLERANCE, model_of
    from qadeploy.inference.tuning import tune as tune_session
    from qadeploy.machine import entry_has_vnni, machine

    examples = read_examples(data, "all", take_reading(options), annotated=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MachineWarning)  # this is what it asks for
        loaded = Answerer.load(bundle, device="cpu", threads=threads)
    opened = loaded.bundle
    assert opened is not None  # noqa: S101 - load sets it
    if not dry_run and not os.access(opened.folder.resolve().parent, os.W_OK):
        raise InputError(f"{bundle}: its folder cannot be written to: copy the bundle first, or give --dry-run")
    manifest, model = opened.manifest, opened.read(MODEL)

    def make(session: Any) -> Answerer:
        onnx = OnnxModel(
            lambda: model, device="cpu", threads=threads, pad_token_id=opened.encoder.pad_token_id, options=session
        )
        return Answerer(loaded.encoder, loaded.settings, onnx)

    # Rounding in another order may move int8 logits: by less than int8 itself did is no other model.
    tolerance = FP32_TOLERANCE
    if opened.precision != "fp32":
        tolerance = max(tolerance, float(manifest.get("parity", {}).get("max_abs_diff", 0.0)))
    pairs = [(e.question, e.context) for e in examples]
    found = tune_session(make, pairs, manifest.get("session"), target=target, tolerance=tolerance, say=sayer(as_json))
    here = machine()
    entry = here.to_dict(threads=model_of(loaded).threads, onnxruntime=onnxruntime().__version__)
    exported_on = manifest.get("exported_on") or manifest.get("machine")
    remedy = _remedy(opened.precision, here.has_vnni, entry_has_vnni(exported_on))
    tuning = {"date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "data": data, **found.to_dict()}
    if not dry_run:
        changes = {"session": found.session, "machine": entry, "tuning": tuning}
        rewrite_manifest(opened, {**changes, **({"exported_on": exported_on} if exported_on else {})})
    value = {
        "bundle": bundle,
        "written": not dry_run,
        "changed": found.changed,
        "before": found.before,
        "session": found.session,
        "machine": entry,
        "remedy": remedy,
        "tuning": tuning,
    }
    print_result(as_json, value, [*found.lines(), *_verdict(bundle, found, dry_run)])
    if remedy:
        note(f"Warning: {bundle}: {remedy}")


def _verdict(bundle: str, found: Any, dry_run: bool) -> list[str]:
    lines = [
        f"logits moved by at most {found.logits_apart:.1e}, up to {found.tolerance:.1e} is allowed",
        f"{Path(bundle)}: {'settings changed to' if found.changed else 'nothing is clearly faster, settings stay'} "
        f"{found.session or 'the defaults'}",
    ]
    return [*lines, "dry run: nothing was written"] if dry_run else lines


def _remedy(precision: str, has_vnni: bool, exported_with_vnni: bool) -> str | None:
    """What to do where int8 products may come out wrong here; None where there is nothing to do.

    An export on a machine without VNNI gives 7 bits to the weights, so that nothing saturates.
    """
    if precision != "int8" or has_vnni or not exported_with_vnni:
        return None
    return (
        "this machine has no VNNI, so 8-bit products may saturate, which costs right answers and no setting mends: "
        "export the run again on this machine (qadeploy export RUN --quantize)"
    )
