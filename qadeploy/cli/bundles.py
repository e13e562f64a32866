"""What becomes of a run: ``qadeploy export``, ``tune``, ``bench``, ``doctor`` and ``push``."""

from __future__ import annotations

from typing import Any

import click

from qadeploy.bench.limits import Limits, complaint
from qadeploy.bench.options import BenchOptions
from qadeploy.cli.common import command, fail, main, note, print_result, sayer
from qadeploy.cli.options import options_of
from qadeploy.cli.progress import Progress
from qadeploy.export.options import ExportOptions
from qadeploy.export.push import PushOptions
from qadeploy.export.push import push as upload
from qadeploy.inference.tune_bundle import TuneOptions, tune_bundle
from qadeploy.options import declared


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
    """Upload RUN (its checkpoint and its card) or BUNDLE to the repository REPO (ORG/NAME) on the Hugging Face hub.

    Data, predictions and logs are not uploaded. The token comes from HF_TOKEN or hf auth login. The uploaded files are listed.
    """
    made = upload(source, repo, PushOptions(**given))
    print_result(as_json, made.to_dict(), made.lines())
