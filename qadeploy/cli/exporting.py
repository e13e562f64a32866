"""``qadeploy export``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qadeploy.cli.common import command, main, print_result, reading_options, sayer, seconds_of, take_reading
from qadeploy.cli.progress import Progress
from qadeploy.errors import InputError

if TYPE_CHECKING:
    from qadeploy.inference.bundle import Bundle


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
qadeploy export runs/faq --quantize --triton repository
qadeploy export bundles/faq-int8 --triton repository
""",
)
@click.argument("run", required=False)
@click.option("--out", help="Bundle folder.  [default: bundles/NAME after the run]")
@click.option("--quantize", is_flag=True, help="Also write NAME-int8, if it keeps its F1.")
@click.option(
    "--device",
    default="cpu",
    show_default=True,
    help="cuda (or cuda:N): also write NAME-fp16, the graph for GPUs; made and judged on the CPU where there is none.",
)
@click.option(
    "--optimize/--no-optimize", default=True, show_default=True, help="Also write NAME-fused, the optimised graph."
)
@click.option("--eval-data", help="Held-out questions to judge on.  [default: those that the run held out]")
@click.option("--max-f1-drop", default=0.5, show_default=True, help="Points of F1 that int8 may lose.")
@click.option(
    "--target",
    type=click.Choice(["latency", "throughput", "size"]),
    default="latency",
    show_default=True,
    help="What the int8 recipe is chosen for: one question at a time, many at once, or bytes.",
)
@click.option("--recipe", help="Take this int8 recipe instead of measuring all; --list-recipes names them.")
@click.option("--list-recipes", is_flag=True, help="Explain the recipes and stop.")
@click.option(
    "--budget",
    default="5m",
    show_default=True,
    help="Time for measuring recipes, e.g. 90s or 5m; once one keeps its F1.",
)
@click.option(
    "--spans-in-graph",
    is_flag=True,
    help="Also write NAME-spans of each but NAME-fused: the graph takes a context mask and returns the best spans itself.",
)
@click.option("--span-top-k", default=20, show_default=True, help="Spans a window of --spans-in-graph.")
@click.option(
    "--strings-in-graph",
    is_flag=True,
    help="Also write NAME-text of each bundle for a CPU: one file, text in, answer out (WordPiece tokenizers).",
)
@click.option(
    "--cache/--no-cache",
    default=True,
    show_default=True,
    help="Keep what was measured in $QADEPLOY_CACHE (~/.cache/qadeploy), so that a search that was cut off goes on.",
)
@click.option(
    "--triton",
    help="Also add the bundles, but for NAME-fused and NAME-text, to this Triton model repository; a bundle given as RUN is added as it is.",
)
@click.option(
    "--triton-batch",
    type=click.IntRange(min=1),
    help="Windows that Triton may run together.  [default: 32 for fp16, which is for GPUs, else 1]",
)
@reading_options
def export(
    as_json: bool,
    run: str | None,
    out: str | None,
    quantize: bool,
    device: str,
    optimize: bool,
    eval_data: str | None,
    max_f1_drop: float,
    target: str,
    recipe: str | None,
    list_recipes: bool,
    budget: str,
    spans_in_graph: bool,
    span_top_k: int,
    strings_in_graph: bool,
    cache: bool,
    triton: str | None,
    triton_batch: int | None,
    **options: Any,
) -> None:
    """Export RUN (a run or checkpoint folder, default the newest run) to ONNX bundles, with proof.

    With --quantize every int8 recipe is measured on this machine, and the best of those that keep their F1 is written.
    RUN may be a bundle too, of which --spans-in-graph and --strings-in-graph make further ones.
    """
    from qadeploy.data.readers import read
    from qadeploy.export.quantize.recipes import RECIPES
    from qadeploy.inference.bundle import check_place, is_bundle, open_bundle
    from qadeploy.integrations.onnx_standalone.in_graph import add_in_graph
    from qadeploy.integrations.onnx_standalone.wordpiece import check_wordpiece

    if list_recipes:
        known = {name: each.what for name, each in RECIPES.items()}
        print_result(as_json, known, [f"{name:<22} {what}" for name, what in known.items()])
        return
    say = sayer(as_json)
    reading = take_reading(options)
    spans = span_top_k if spans_in_graph else None
    if span_top_k < 1:
        raise InputError(f"span-top-k {span_top_k} is below 1: it is the number of spans that a window returns")
    if triton:
        from qadeploy.integrations.triton.repository import check_repository

        check_repository(Path(triton))
    if run and is_bundle(run):
        in_graph = spans_in_graph or strings_in_graph
        if quantize or (out and not in_graph) or not (in_graph or triton):
            raise InputError(
                f"{run}: is a bundle, of which only --spans-in-graph, --strings-in-graph and --triton make more: give the run "
                "for --quantize or --out"
            )
        opened, place = open_bundle(run), Path(out or run)
        value: dict[str, Any] = {}
        lines: list[str] = []
        further: list[Bundle] = []
        if in_graph:
            examples = read(eval_data or "handbook", reading).examples
            further = add_in_graph(opened, place, examples, spans=spans, strings=strings_in_graph, say=say)
            value["bundles"] = {str(b.folder): b.manifest for b in further}
        if triton:
            value["triton"], lines = _to_triton([opened, *further], Path(triton), triton_batch, say)
        print_result(as_json, value, lines)
        return
    from qadeploy.errors import FailureError, GateError
    from qadeploy.export import fp16 as half_step
    from qadeploy.export import fused as optimize_step
    from qadeploy.export import onnx as export_step
    from qadeploy.export.quantize import int8 as quantize_step
    from qadeploy.export.quantize.leaderboard import leaderboard_lines
    from qadeploy.export.reference import make_reference, table
    from qadeploy.inference.devices import parse_device
    from qadeploy.training.feature_cache import cache_folder
    from qadeploy.training.runs import find_run, held_out

    found = find_run(run)
    place = Path(out or f"bundles/{found.name}")
    check_place(place)
    if not 0 <= max_f1_drop <= 100:
        raise InputError(f"max-f1-drop {max_f1_drop} is not between 0 and 100 points")
    seconds = seconds_of("budget", budget)
    if recipe:
        quantize_step.find_recipe(recipe)
    fused_place, int8_place, fp16_place = (place.with_name(place.name + end) for end in ("-fused", "-int8", "-fp16"))
    on_cuda = parse_device(device).kind == "cuda"
    for folder in (fused_place, int8_place, fp16_place):
        check_place(folder)
    source, examples = held_out(found, eval_data, reading)
    say(f"exporting {found.checkpoint}, judged on {len(examples)} questions of {source}")
    reference = make_reference(found, source, examples)
    if strings_in_graph:
        check_wordpiece(reference.checkpoint.tokenizer.backend_tokenizer)
    bundles = [export_step.export(reference, place)]
    say(f"{place}: logits within {bundles[0].manifest['parity']['max_abs_diff']:.1e} of PyTorch")
    if optimize:
        try:
            bundles.append(optimize_step.optimize(reference, bundles[0], fused_place))
            say(f"{fused_place}: {optimize_step.fusion_line(bundles[-1])}")
        except GateError:
            raise
        except FailureError as error:
            say(f"no optimised graph: {error}")
    if on_cuda:
        bundles.append(half_step.half(reference, bundles[0], fp16_place, device=device, say=say))
        for text in half_step.half_lines(bundles[-1]):
            say(f"{fp16_place}: {text}")
    closing: list[str] = []
    if quantize:
        say(f"int8 recipes for {target}, against the fp32 model:")
        with Progress(as_json) as progress:
            quantized = quantize_step.quantize(
                reference,
                bundles[0],
                int8_place,
                max_f1_drop,
                target=target,
                recipe=recipe,
                budget=seconds,
                cache=cache_folder() if cache else None,
                say=progress.say,
                on_step=progress.step,
            )
        bundles.append(quantized)
        made = quantized.manifest["made"]
        say(f"{int8_place}: recipe {made['recipe']}, {made['what']}")
        closing = ["", *leaderboard_lines(made["leaderboard"], made["judged_on"])]
    further = []
    for bundle in bundles:
        if bundle.folder != fused_place:
            strings = strings_in_graph and bundle.folder != fp16_place
            further += add_in_graph(bundle, bundle.folder, examples, spans=spans, strings=strings, say=say)
    rows = [(bundle.name, bundle.manifest) for bundle in bundles]
    size = 4 * bundles[0].manifest["architecture"]["parameters"]
    lines = table(reference, size, rows)
    value = {"bundles": {str(b.folder): b.manifest for b in [*bundles, *further]}}
    if triton:
        served = [b for b in [*bundles, *further] if b.folder != fused_place]
        value["triton"], more = _to_triton(served, Path(triton), triton_batch, say)
        lines = [*lines, "", *more]
    print_result(as_json, value, [*closing, "", *lines])


def _to_triton(
    bundles: Sequence[Bundle], repository: Path, max_batch: int | None, say: Callable[[str], object]
) -> tuple[dict[str, Any], list[str]]:
    """Adds bundles to a model repository; what was added as JSON, by folder, and as lines.

    One that a repository cannot hold is passed over with a line said, where there are others.
    """
    from qadeploy.integrations.triton.repository import add_bundle, takes

    value: dict[str, Any] = {}
    lines = []
    for bundle in bundles:
        if len(bundles) > 1 and not takes(bundle):
            say(f"{bundle.folder}: not for Triton, as it takes one question a run: {repository} goes without it")
            continue
        added = add_bundle(bundle, repository, max_batch=max_batch)
        value[str(added.folder)] = asdict(added) | {"folder": str(added.folder)}
        lines.append(f"{added.folder}: {'added' if added.new else 'was there already'}, version {added.version}")
        lines += [f"  {remark}" for remark in added.remarks]
    return value, lines
