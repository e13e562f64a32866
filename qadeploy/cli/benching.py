"""``qadeploy bench`` and ``doctor``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from qadeploy.cli.common import (
    command,
    device_option,
    fail,
    main,
    note,
    print_result,
    read_examples,
    reading_options,
    take_reading,
)
from qadeploy.errors import InputError


@command(
    main,
    example="""
qadeploy bench
qadeploy bench bundles/faq-int8 bundles/faq --data held_out.jsonl --against pipeline,openvino --out results
qadeploy bench bundles/faq-int8 --against pipeline,torch --max-f1-drop 0.5 --min-speedup 4
""",
)
@click.argument("bundles", nargs=-1, metavar="[BUNDLE]...")
@click.option("--data", help="Annotated questions.  [default: those that the first bundle's run held out]")
@click.option(
    "--against",
    default="pipeline,optimum",
    show_default=True,
    help="Peers, by commas: pipeline, torch, torch-bf16, optimum, optimum-direct, openvino; empty for none.",
)
@click.option("--questions", default=200, show_default=True, help="Questions at most, drawn evenly.")
@click.option(
    "--latency-questions",
    default=50,
    show_default=True,
    type=click.IntRange(min=1),
    help="How many of them are also asked one at a time, for p50, p95 and p99.",
)
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(min=1), help="Interleaved rounds.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads of every variant.  [default: all]")
@click.option(
    "--checkpoint",
    type=click.Path(),
    help="The PyTorch checkpoint for the peers.  [default: the first bundle's source]",
)
@click.option("--out", type=click.Path(file_okay=False), help="Folder for bench.json, bench.html and bench.png.")
@click.option("--min-f1", type=float, help="Exit with 1 if the first bundle's F1 is lower.")
@click.option(
    "--max-f1-drop",
    type=float,
    help="Exit with 1 if it loses more points of F1 than this to the best other variant in float (peer or fp32 bundle).",
)
@click.option(
    "--min-speedup",
    type=float,
    help="Exit with 1 if it is not so many times as fast as the pipeline, or else the first peer.",
)
@device_option
@reading_options
def bench(
    as_json: bool,
    bundles: tuple[str, ...],
    data: str | None,
    against: str,
    questions: int,
    latency_questions: int,
    rounds: int,
    threads: int | None,
    checkpoint: str | None,
    out: str | None,
    min_f1: float | None,
    max_f1_drop: float | None,
    min_speedup: float | None,
    device: str,
    **options: Any,
) -> None:
    """Measure BUNDLEs (default: the newest) against other tools on the same questions, answers scored.

    Peers and limits go by the first BUNDLE; the others stand beside it.
    """
    from qadeploy.bench import measure, table
    from qadeploy.bench.limits import Limits, complaint
    from qadeploy.bench.own import open_bundles
    from qadeploy.bench.peers import parse_peers
    from qadeploy.bench.workload import draw
    from qadeploy.inference.bundle import newest_bundle
    from qadeploy.inference.devices import parse_device
    from qadeploy.training.runs import find_run, held_out, known_examples

    peers = parse_peers(against)
    parse_device(device)
    opened, broken = open_bundles(bundles or [newest_bundle()])
    limits = Limits(min_f1, max_f1_drop, min_speedup)
    limits.check(peers, [bundle.precision for bundle in opened[1:]])
    source = Path(checkpoint or measure.source_of(opened[0]))
    if data is None:
        if not source.is_dir():
            raise InputError(
                f"{source}: the checkpoint that the bundle was made from is not there: give --data FILE, and --checkpoint for the peers"
            )
        name, examples = held_out(find_run(source), None)
    else:
        name, examples = data, read_examples(data, "auto", take_reading(options))
    workload = draw(name, examples, questions)
    if out:
        from qadeploy.bench.page import write  # what it needs is missed now, not after the measurements

        Path(out).mkdir(parents=True, exist_ok=True)
    known = (*known_examples(source), *examples) if "openvino" in peers else ()
    request = measure.Request(
        opened, broken, workload, peers, source, known, rounds, latency_questions, device, threads, limits
    )
    report = measure.bench(request, note)
    text = table.lines(report)
    if out:
        text.append(f"written: {', '.join(str(path) for path in write(report, Path(out)))}")
    print_result(as_json, report, text)
    if problem := complaint(report):
        fail(problem, 1)


@command(main, example="qadeploy doctor")
def doctor(as_json: bool) -> None:
    """Show what this installation can do, and what stands in the way."""
    from qadeploy.inference.doctor import diagnose, gpu_bundles, lines

    report = {**diagnose(), "gpu_bundles": gpu_bundles()}
    print_result(as_json, report, lines(report))
