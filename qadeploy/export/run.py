"""``qadeploy export`` as a function: from a run to its bundles, or from a bundle to further ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from qadeploy.data.loading import read
from qadeploy.errors import FailureError, GateError, InputError
from qadeploy.export import fp16, fused
from qadeploy.export.onnx import export
from qadeploy.export.options import ExportOptions
from qadeploy.export.plan import plan_lines
from qadeploy.export.quantize.run import find_recipes, quantize
from qadeploy.export.quantize.search import SearchOptions, Step, leaderboard_lines
from qadeploy.export.reference import Reference, make_reference, table
from qadeploy.files import cache_folder
from qadeploy.inference.answerer import Answerer
from qadeploy.inference.bundle import Bundle, check_place, is_bundle, open_bundle
from qadeploy.inference.hub import is_hub
from qadeploy.integrations.onnx_standalone.in_graph import add_in_graph, wordpiece_of
from qadeploy.integrations.onnx_standalone.wordpiece import check_wordpiece
from qadeploy.integrations.triton.repository import add_bundle, check_repository, takes
from qadeploy.integrations.web.npm import onnxruntime_web
from qadeploy.integrations.web.site import check_site, write_site
from qadeploy.machine import quick_collections
from qadeploy.options import check
from qadeploy.records import Example
from qadeploy.timing import seconds_of, spread
from qadeploy.training.checkpoint import Hub
from qadeploy.training.exportable import exporters
from qadeploy.training.runs import find_run, held_out


class Listener(Protocol):
    """Receives the progress of an export."""

    def say(self, message: str) -> None:
        """Receives a line of text."""

    def count(self, done: int, of: int, rest: str) -> None:
        """Receives how much of the current step is done, and its name."""

    def step(self, step: Step) -> None:
        """Receives the state of the search over int8 recipes."""


@dataclass
class Exported:
    """What an export made.

    Attributes:
        bundles: The bundles made from the run.
        further: The bundles made from these or from a given one, whose graphs answer by themselves; a static site is one.
        triton: The folders added to a model repository.
        lines: The closing report as text.
    """

    bundles: list[Bundle] = field(default_factory=list)
    further: list[Bundle] = field(default_factory=list)
    triton: dict[str, Any] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The manifests by folder, and the folders added for Triton, as plain JSON values."""
        value: dict[str, Any] = {"bundles": {str(b.folder): b.manifest for b in (*self.bundles, *self.further)}}
        return value | ({"triton": self.triton} if self.triton else {})


def export_run(source: str | None, options: ExportOptions, listener: Listener) -> Exported:
    """Makes everything that ``options`` request.

    Args:
        source: A run or checkpoint folder, or a bundle to make further ones from; None means the newest run.
        options: What to make.
        listener: Receives the progress.

    Raises:
        InputError: Options contradict each other, or something else is in the place of a bundle.
        FailureError: A step failed.
        GateError: A bundle lost more than it may.
    """
    check(options)
    for flag, given in (("--recipe", options.recipe), ("--reduce-range", options.reduce_range)):
        if given and not options.quantize:
            raise InputError(f"{flag} says how to make the int8 bundle: give --quantize too")
    if options.triton:
        check_repository(Path(options.triton))
    if options.web:
        check_site(Path(options.web))
        onnxruntime_web(listener.say)  # fails now rather than after scoring if it cannot be downloaded
    if source and is_bundle(source):
        return _from_bundle(source, options, listener)
    with quick_collections():
        return _Export(source, options, listener).run()


def _from_bundle(source: str, options: ExportOptions, listener: Listener) -> Exported:
    in_graph = options.spans_in_graph or options.text_in_graph
    if options.quantize or (options.out and not in_graph) or not (in_graph or options.triton or options.web):
        raise InputError(
            f"{source}: is a bundle, which allows only --spans-in-graph, --text-in-graph, --web and --triton: give the "
            "run for --quantize or --out"
        )
    if in_graph and is_hub(source) and not options.out:
        raise InputError(f"{source}: is on the hub: give --out for the graphs made from it")
    opened, made = open_bundle(source), Exported()
    if in_graph or options.web:
        examples = read(options.eval_data or "handbook", options).examples
        if options.text_in_graph or options.web:
            wordpiece_of(opened)
        Answerer.load(opened.folder, device="cpu", threads=1, load_timeout=options.load_timeout)  # may be untrusted
        made.further = _in_graph(opened, Path(options.out or opened.folder), examples, options, listener)
    if options.triton:
        _to_triton(made, [opened, *made.further], options, listener)
    if options.web:
        made.further.append(write_site(opened, Path(options.web), examples, listener.say))
    return made


def _in_graph(
    bundle: Bundle, place: Path, examples: Sequence[Example], options: ExportOptions, listener: Listener
) -> list[Bundle]:
    spans = options.span_top_k if options.spans_in_graph else None
    strings = options.text_in_graph and bundle.precision != "fp16"
    return add_in_graph(bundle, place, examples, spans=spans, strings=strings, say=listener.say)


def _to_triton(made: Exported, bundles: Sequence[Bundle], options: ExportOptions, listener: Listener) -> None:
    """Adds bundles to a model repository; of several, those that it cannot hold are skipped with a message."""
    repository = Path(options.triton or "")
    for bundle in bundles:
        if len(bundles) > 1 and not takes(bundle):
            listener.say(
                f"{bundle.folder}: not for Triton, because it takes one question per run: left out of {repository}"
            )
            continue
        added = add_bundle(bundle, repository, max_batch=options.triton_batch)
        made.triton[str(added.folder)] = asdict(added) | {"folder": str(added.folder)}
        state = "added" if added.new else "already there"
        made.lines += [
            f"{added.folder}: {state}, version {added.version}",
            *(f"  {remark}" for remark in added.remarks),
        ]


class _Export:
    """The bundles of one run, step by step."""

    def __init__(self, source: str | None, options: ExportOptions, listener: Listener) -> None:
        self.options, self.listener = options, listener
        exporters(options.exporter)  # fails now rather than after scoring if it is not installed
        self.found = find_run(source)
        self.place = Path(options.out or f"bundles/{self.found.name}")
        self.fused, self.int8, self.fp16 = (
            self.place.with_name(self.place.name + end) for end in ("-fused", "-int8", "-fp16")
        )
        for folder in (self.place, self.fused, self.int8, self.fp16):
            check_place(folder)
        self.budget = seconds_of("budget", options.budget)
        if options.recipe:
            find_recipes(options.recipe, options.reduce_range)
        self.made = Exported()

    def run(self) -> Exported:
        reference = self._reference()
        for line in plan_lines(self.options, reference, self.budget):
            self.listener.say(line)
        plain = export(reference, self.place, self.options.exporter)
        self.made.bundles.append(plain)
        self.listener.say(f"{self.place}: logits within {plain.manifest['parity']['max_abs_diff']:.1e} of PyTorch")
        if self.options.optimize:
            self._fuse(reference, plain)
        if self.options.wants_fp16:
            made = fp16.write_fp16(reference, plain, self.fp16, device=self.options.device, say=self.listener.say)
            self.made.bundles.append(made)
            for text in fp16.fp16_lines(made):
                self.listener.say(f"{self.fp16}: {text}")
        board = self._quantize(reference, plain) if self.options.quantize else []
        for bundle in self.made.bundles:
            if bundle.folder != self.fused:
                self.made.further += _in_graph(bundle, bundle.folder, reference.examples, self.options, self.listener)
        rows = [(bundle.name, bundle.manifest) for bundle in self.made.bundles]
        size = 4 * plain.manifest["architecture"]["parameters"]
        self.made.lines += [*board, "", *table(reference, size, rows)]
        if self.options.triton:
            self.made.lines.append("")
            served = [b for b in (*self.made.bundles, *self.made.further) if b.folder != self.fused]
            _to_triton(self.made, served, self.options, self.listener)
        if self.options.web:
            shown = next((b for b in self.made.bundles if b.folder == self.int8), plain)
            self.made.further.append(write_site(shown, Path(self.options.web), reference.examples, self.listener.say))
        return self.made

    def _reference(self) -> Reference:
        """The PyTorch model and the questions that judge the bundles."""
        found = held_out(self.found, self.options.eval_data, self.options)
        judges = replace(found, examples=tuple(spread(found.examples, self.options.max_eval_samples)))
        count, every = len(judges.examples), len(found.examples)
        of = "" if count == every else f" of {every} (--max-eval-samples)"
        self.listener.say(f"exporting {self.found.checkpoint}, judged on {count}{of} questions of {judges.name}")
        hub = Hub(trust_remote_code=self.options.trust_remote_code, allow_pickle=self.options.allow_pickle)
        reference = make_reference(self.found, judges, hub, self.listener.count, self.budget)
        if self.options.text_in_graph or self.options.web:
            check_wordpiece(reference.checkpoint.tokenizer.backend_tokenizer)
        return reference

    def _fuse(self, reference: Reference, plain: Bundle) -> None:
        try:
            self.made.bundles.append(fused.optimize(reference, plain, self.fused))
            self.listener.say(f"{self.fused}: {fused.fusion_line(self.made.bundles[-1])}")
        except GateError:
            raise
        except FailureError as error:
            self.listener.say(f"no optimised graph: {error}")

    def _quantize(self, reference: Reference, plain: Bundle) -> list[str]:
        """Writes the int8 bundle; returns the leaderboard's lines."""
        options = self.options
        self.listener.say(f"int8 recipes for {options.target}, against the fp32 model:")
        made = quantize(
            reference,
            plain,
            self.int8,
            SearchOptions(options.max_f1_drop, options.target, self.budget, cache_folder() if options.cache else None),
            recipe=options.recipe,
            reduce_range=options.reduce_range,
            say=self.listener.say,
            on_step=self.listener.step,
        )
        self.made.bundles.append(made)
        how = made.manifest["made"]
        self.listener.say(f"{self.int8}: recipe {how['recipe']}, {how['what']}")
        return ["", *leaderboard_lines(how["leaderboard"], how["judged_on"], how["recipe"])]
