"""A bench from its options to its report: opens the bundles, draws the questions, measures, writes the files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qadeploy.bench.limits import Limits
from qadeploy.bench.measure import BenchRequest, Say, bench, source_of
from qadeploy.bench.options import BenchOptions
from qadeploy.bench.own import open_bundles
from qadeploy.bench.peers import parse_peers
from qadeploy.bench.workload import draw
from qadeploy.data.loading import read_split
from qadeploy.errors import InputError
from qadeploy.inference.bundle import newest_bundle
from qadeploy.inference.devices import parse_device
from qadeploy.options import check
from qadeploy.records import Example
from qadeploy.training.runs import find_run, held_out, known_examples


def bench_bundles(
    bundles: Sequence[str], options: BenchOptions, limits: Limits, say: Say
) -> tuple[dict[str, Any], list[Path]]:
    """Benches bundles against other tools.

    Args:
        bundles: Their folders; peers and limits refer to the first. Empty for the newest under ``bundles/``.
        options: What to measure, and how.
        limits: What the first bundle must reach.
        say: Called with one line of progress at a time.

    Returns:
        The report, and the files written to ``options.out``.

    Raises:
        InputError: An option, the data or a bundle's folder cannot be used.
        BundleError: The first bundle cannot be opened.
        MissingExtraError: ``options.out`` needs an optional package.
    """
    check(options)
    peers = parse_peers(options.against)
    if options.out:
        from qadeploy.bench.page import require_own, write  # a missing package fails here, not after the measurements

        require_own(Path(options.out))
    parse_device(options.device)
    opened, broken = open_bundles(bundles or [newest_bundle()])
    limits.check(peers, [bundle.precision for bundle in opened[1:]])
    checkpoint = Path(options.checkpoint or source_of(opened[0]))
    name, examples = _questions(checkpoint, options, say)
    workload = draw(name, examples, options.questions)
    if options.out:
        Path(options.out).mkdir(parents=True, exist_ok=True)
    known = (*known_examples(checkpoint), *examples) if "openvino" in peers else ()
    report = bench(BenchRequest(opened, broken, workload, peers, checkpoint, known, options, limits), say)
    return report, write(report, Path(options.out)) if options.out else []


def _questions(checkpoint: Path, options: BenchOptions, say: Say) -> tuple[str, Sequence[Example]]:
    """The annotated questions to draw from, and their name."""
    if options.data is not None:
        return options.data, read_split(options.data, "auto", options, say)
    if not checkpoint.is_dir():
        raise InputError(
            f"{checkpoint}: the checkpoint that the bundle was made from is missing: give --data FILE, and --checkpoint for the peers"
        )
    found = held_out(find_run(checkpoint), None)
    return found.name, found.examples
