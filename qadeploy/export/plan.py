"""What an export will do and roughly how long it takes, estimated from PyTorch's time per question before it starts."""

from __future__ import annotations

from qadeploy.export.fp16 import QUESTIONS
from qadeploy.export.options import ExportOptions
from qadeploy.export.parity import PARITY_RUNS
from qadeploy.export.quantize.recipes import RECIPES
from qadeploy.export.quantize.search import judged_questions, timing_seconds
from qadeploy.export.reference import ROUNDS, Reference
from qadeploy.inference.tuning import least_seconds

_LONG = 900  # seconds; a longer plan also says what would shorten it
# Rough guesses, not measurements: int8's share of the time of fp32, and the seconds per parameter of each step.
_INT8 = 0.4
_EXPORTING, _FUSING, _QUANTIZING = 2e-7, 2e-7, 2e-7


def plan_lines(options: ExportOptions, reference: Reference, budget: float) -> list[str]:
    """The bundles to make with their expected times, as text.

    Args:
        options: What to make.
        reference: The PyTorch model, the questions, and its time per question.
        budget: Seconds that measuring int8 recipes may take, once one keeps its F1.
    """
    each = reference.seconds
    parameters = sum(p.numel() for p in reference.checkpoint.model.parameters())
    steps = {"fp32": _EXPORTING * parameters + _bundle_seconds(reference, each)}
    if options.optimize:
        steps["fused"] = _FUSING * parameters + _bundle_seconds(reference, each)
    search = ""
    if options.quantize:
        recipes = 1 if options.recipe else len(RECIPES)
        judged = judged_questions(reference, each, budget)
        one = _QUANTIZING * parameters + judged * each * _INT8 + timing_seconds(each, budget)
        fitting = min(recipes, 1 + int(max(0.0, budget - judged * each) / one))
        steps["int8"] = judged * each + fitting * one + _bundle_seconds(reference, each * _INT8)
        search = f": {recipes} recipe{'s' * (recipes > 1)}, about {one:.0f} s each"
        search += f", of which about {fitting} fit --budget {options.budget}" if fitting < recipes else ""
    if options.wants_fp16:
        steps["fp16"] = (
            _FUSING * parameters + 2 * max(len(reference.examples), QUESTIONS) * each + _bundle_seconds(reference, each)
        )
    total = sum(steps.values())
    parts = ", ".join(f"{name} {_time(seconds)}{search if name == 'int8' else ''}" for name, seconds in steps.items())
    lines = [f"PyTorch takes {1000 * each:.0f} ms per question; about {_time(total)} on an idle machine: {parts}"]
    if total > _LONG:
        shorter = ["fewer questions (--max-eval-samples)"]
        shorter += ["no optimised graph (--no-optimize)"] if options.optimize else []
        shorter += (
            ["a recipe of your choice (--recipe) or a smaller --budget"]
            if options.quantize and not options.recipe
            else []
        )
        lines.append(f"shorter with {', '.join(shorter)}")
    return lines


def _bundle_seconds(reference: Reference, each: float) -> float:
    """The seconds to tune, check and measure a model that takes ``each`` seconds per question."""
    tuning = max(reference.measuring, least_seconds(each))
    timing = (ROUNDS + 1) * len(reference.timed) * (each + reference.seconds)
    return tuning + PARITY_RUNS * (reference.seconds + 2 * each) + len(reference.examples) * each + timing


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
