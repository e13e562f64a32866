"""Quantization: from an fp32 bundle to an int8 one, by the best recipe on this machine, behind a gate of EM and F1."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qadeploy.core.metrics import bootstrap_interval
from qadeploy.errors import GateError, InputError
from qadeploy.evaluation.scoring import Evaluation
from qadeploy.export.finishing import finish_bundle, tune_model
from qadeploy.export.parity import parity_windows
from qadeploy.export.quantize.recipes import RECIPES, Material, QuantizedModel, Recipe
from qadeploy.export.quantize.search import (
    MeasuredRecipe,
    Say,
    Search,
    SearchOptions,
    Step,
    leaderboard,
    leaderboard_lines,
    rank,
)
from qadeploy.export.reference import Reference, counted, make_answerer
from qadeploy.inference.bundle import MODEL, Bundle, open_bundle, writing_bundle
from qadeploy.inference.tuning import Tuning
from qadeploy.machine import machine


def quantize(
    reference: Reference,
    source: Bundle,
    out: Path,
    options: SearchOptions,
    *,
    recipe: str | None = None,
    reduce_range: bool = False,
    say: Say = lambda _: None,
    on_step: Callable[[Step], object] = lambda _: None,
) -> Bundle:
    """Writes the int8 bundle ``out`` from the fp32 bundle ``source`` and returns it, verified.

    Recipes are measured until the budget is used up and one passes: F1 on the judging questions (see ``judging``), speed on
    this machine. Of those that lose at most ``max_f1_drop`` points there, the best for the target is judged on the held-out
    questions. Then its session settings are measured; if they move its logits, it is judged again. If it fails, the next best
    is judged. If all fail, the recipe that lost least is chosen with a warning, provided that the 95 % intervals of its losses
    reach ``max_f1_drop``: on a few hundred questions a single answer can be half a point. The manifest contains the leaderboard.

    Args:
        reference: The PyTorch model and the questions.
        source: The fp32 bundle.
        out: The folder to write.
        options: What decides between recipes, and how long the search may take.
        recipe: The only recipe to measure; None means any.
        reduce_range: Give weights 7 bits, for CPUs without VNNI; always done if this CPU lacks VNNI.
        say: Called with lines of text.
        on_step: Called with the state of the search.

    Raises:
        InputError: The recipe is unknown, or cannot have 7-bit weights although ``reduce_range`` asks for them.
        GateError: Every recipe loses more than ``max_f1_drop``, and chance does not explain it; ``out`` is left as it was.
    """
    checkpoint = reference.checkpoint
    material = Material(
        source.folder / MODEL,
        getattr(checkpoint.model.config, "num_attention_heads", None),
        checkpoint.encoder.config.pad_token_id,
        parity_windows(checkpoint, reference.choosing),
        reduce_range=reduce_range or not machine().has_vnni,
    )
    search = Search(reference, material, options, [source.manifest["session"]], say, on_step)
    known = find_recipes(recipe, reduce_range)
    candidates = search.run(known)
    waiting, duel = search.settle(rank(candidates, options))
    gate = _Gate(reference, material, search)
    found: _Accepted | None = None
    while found is None:
        if waiting:
            found = gate.judge(waiting.pop(0), lambda loss: loss.f1 <= options.max_f1_drop)
        elif found := gate.least_doubtful(candidates):
            low, high = found.loss.interval
            say(
                f"WARNING: {found.candidate.recipe} loses {found.loss.f1:.2f} points of F1 (95 % interval of the change {low:+.2f} to "
                f"{high:+.2f}) on {reference.questions}. {options.max_f1_drop:g} are allowed, but so few questions do not prove that "
                "more is lost, and no recipe measured does better: judge on more with --eval-data"
            )
        elif len(candidates) < len(known):  # all that the budget allowed failed: go on
            done = len(candidates)
            candidates += search.run(known[done : done + 1], done)
            waiting = rank(candidates[-1:], options)
        else:
            break

    chosen = found.candidate.recipe if found else None
    names = [each.name for each in known]
    board = leaderboard(candidates, names, gate.held_out, max_f1_drop=options.max_f1_drop, chosen=chosen)
    if found is None:
        for text in leaderboard_lines(board, search.judges.to_dict()):
            say(text)
        raise GateError(
            f"{out}: every recipe loses more than {options.max_f1_drop} points of F1, judged on {reference.questions}, so none was "
            f"written ({_losses(candidates, gate.held_out)}). Allow more with --max-f1-drop, or judge on more questions with "
            "--eval-data"
        )
    with writing_bundle(out) as work:
        (work / MODEL).write_bytes(found.made.model)
        rewritten = material.rewritten
        manifest: dict[str, Any] = {
            "graph": "single-node attention" if rewritten.fused else "plain",
            "attention_nodes": rewritten.fused,
            "attentions": rewritten.attentions,
            "from": source.name,
            "recipe": chosen,
            "what": RECIPES[found.candidate.recipe].what,
            "reduce_range": material.reduce_range and RECIPES[found.candidate.recipe].ranged,
            "target": options.target,
            "float_nodes": list(found.made.float_nodes),
            "max_f1_drop": options.max_f1_drop,
            "judged_on": search.judges.to_dict(),
            "leaderboard": board,
            "duel": duel and asdict(duel),
        }
        finish_bundle(
            reference, work, out.name, precision="int8", made=manifest, tuning=found.tuning, evaluation=found.evaluation
        )
    return open_bundle(out)


@dataclass(frozen=True, slots=True)
class _Loss:
    """Points of F1 lost on the held-out questions, and the 95 % interval of the change."""

    f1: float
    interval: tuple[float, float]


@dataclass(frozen=True, slots=True)
class _Accepted:
    """A recipe that passed: its model, session settings and answers to the held-out questions."""

    candidate: MeasuredRecipe
    made: QuantizedModel
    tuning: Tuning
    evaluation: Evaluation
    loss: _Loss


class _Gate:
    """Judges recipes on the held-out questions."""

    def __init__(self, reference: Reference, material: Material, search: Search) -> None:
        self._reference, self._material, self._search = reference, material, search
        self._judged: dict[str, tuple[Evaluation, _Loss]] = {}

    @property
    def held_out(self) -> dict[str, float]:
        """The points of F1 that each recipe lost on the held-out questions."""
        return {recipe: loss.f1 for recipe, (_, loss) in self._judged.items()}

    def judge(self, candidate: MeasuredRecipe, allowed: Callable[[_Loss], bool]) -> _Accepted | None:
        """The recipe with its session settings if its loss is ``allowed``, also after they move its logits; else None."""
        known = self._judged.get(candidate.recipe)
        if known and not allowed(known[1]):
            return None
        made = RECIPES[candidate.recipe].make(self._material)
        evaluation, loss = known or self._lost(candidate.recipe, made.model, candidate.session)
        if not allowed(loss):
            return None
        self._search.step(f"{candidate.recipe}: measuring session settings")
        tuning = tune_model(self._reference, made.model, candidate.session, target=self._search.options.target)
        if tuning.logits_apart:
            evaluation, loss = self._lost(candidate.recipe, made.model, tuning.session)
            if not allowed(loss):
                return None
        return _Accepted(candidate, made, tuning, evaluation, loss)

    def least_doubtful(self, candidates: Sequence[MeasuredRecipe]) -> _Accepted | None:
        """Of the recipes whose excessive loss chance may explain, the one that lost least; None if there is none."""
        limit, worth = self._search.options.max_f1_drop, self._search.judges.worth
        count = len(self._reference.examples)

        def lost(candidate: MeasuredRecipe) -> float:
            if candidate.recipe not in self._judged:
                return candidate.f1_lost
            return (worth * candidate.f1_lost + count * self.held_out[candidate.recipe]) / (worth + count)

        doubtful = (c for c in candidates if not c.failed and -c.f1_change_interval[1] <= limit)
        found = (self.judge(each, lambda loss: -loss.interval[1] <= limit) for each in sorted(doubtful, key=lost))
        return next(filter(None, found), None)

    def _lost(self, recipe: str, model: bytes, session: Mapping[str, Any]) -> tuple[Evaluation, _Loss]:
        evaluation = _held_out(self._reference, recipe, model, session)
        change = evaluation.scores.rows_f1 - self._reference.scores.rows_f1
        loss = _Loss(self._reference.scores.f1 - evaluation.scores.f1, bootstrap_interval(change))
        self._judged[recipe] = evaluation, loss
        return evaluation, loss


def _held_out(reference: Reference, recipe: str, model: bytes, session: Mapping[str, Any]) -> Evaluation:
    """The model's answers to the held-out questions."""
    answerer = make_answerer(reference, model, session)
    return counted(answerer, reference.examples, f"{recipe} answers the held-out questions", reference.count)


def find_recipes(name: str | None, reduce_range: bool) -> list[Recipe]:
    """The recipe of this name, or all that ``reduce_range`` allows. Raises InputError if the name fits none."""
    fitting = {each.name: each for each in RECIPES.values() if each.ranged or not reduce_range}
    if name is None:
        return list(fitting.values())
    if name in RECIPES and name not in fitting:
        raise InputError(f"recipe {name} always has 8-bit weights: leave out --reduce-range, or choose another")
    if name not in RECIPES:
        raise InputError(f"recipe is {name!r}: choose one of {', '.join(fitting)} (qadeploy export --list-recipes)")
    return [RECIPES[name]]


def _losses(candidates: Sequence[MeasuredRecipe], judged: dict[str, float]) -> str:
    return "; ".join(
        f"{c.recipe}: {c.failed or f'{c.f1_lost:.2f} on the judging questions'}"
        + (f", {judged[c.recipe]:.2f} held out" if c.recipe in judged else "")
        for c in candidates
    )
