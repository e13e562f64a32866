"""Quantization: from an fp32 bundle to an int8 one, by the best recipe on this machine, behind a gate of EM and F1."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qadeploy.errors import GateError, InputError
from qadeploy.evaluation.scoring import Evaluation
from qadeploy.export.manifest import finish_bundle, tune_model
from qadeploy.export.parity import parity_windows
from qadeploy.export.quantize.leaderboard import leaderboard, leaderboard_lines
from qadeploy.export.quantize.recipes import RECIPES, Material, Recipe
from qadeploy.export.quantize.search import MeasuredRecipe, Say, Search, SearchOptions, Step, rank
from qadeploy.export.reference import Reference, counted, make_answerer
from qadeploy.inference.bundle import MODEL, Bundle, open_bundle, writing_bundle
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

    Every recipe is measured: F1 on the judging questions (see ``judging``), speed on this machine. Of those that lose at most
    ``max_f1_drop`` points there, the best for the target is judged on the held-out questions, before it gets its session
    settings and, if these move its logits, after; if it fails there, the next one is. The manifest holds the leaderboard.

    Args:
        reference: The PyTorch model and the questions.
        source: The fp32 bundle.
        out: The folder to write.
        options: What decides, and how long it may take.
        recipe: Measure only this one.
        reduce_range: Give weights 7 bits, for CPUs without VNNI; always done if this one has none.
        say: Gets lines of text.
        on_step: Gets the state of the search.

    Raises:
        InputError: The recipe or the target is unknown.
        GateError: Every recipe loses more than ``max_f1_drop`` against PyTorch; ``out`` is left as it was.
    """
    max_f1_drop = options.max_f1_drop
    checkpoint = reference.checkpoint
    material = Material(
        source.folder / MODEL,
        getattr(checkpoint.model.config, "num_attention_heads", None),
        checkpoint.encoder.config.pad_token_id,
        parity_windows(checkpoint, reference.choosing),
        reduce_range=reduce_range or not machine().has_vnni,
    )
    search = Search(reference, material.source, material, options, [source.manifest["session"]], say, on_step)
    known = find_recipes(recipe, reduce_range)
    candidates = search.run(known)
    waiting, duel = search.settle(rank(candidates, options))
    judged: dict[str, float] = {}

    def board(chosen: str | None = None) -> list[dict[str, Any]]:
        names = [each.name for each in known]
        return leaderboard(candidates, names, judged, max_f1_drop=max_f1_drop, chosen=chosen)

    while waiting or len(candidates) < len(known):
        if not waiting:  # all that the budget allowed failed on the held-out questions: go on
            done = len(candidates)
            candidates += search.run(known[done : done + 1], done)
            waiting = rank(candidates[-1:], options)
            continue
        candidate = waiting.pop(0)
        made = RECIPES[candidate.recipe].make(material)
        evaluation = _held_out(reference, candidate.recipe, made.model, candidate.session)
        judged[candidate.recipe] = reference.scores.f1 - evaluation.scores.f1
        if not judged[candidate.recipe] <= max_f1_drop:
            continue
        search.step(f"{candidate.recipe}: measuring session settings")
        tuning = tune_model(reference, made.model, candidate.session, target=options.target)
        if tuning.logits_apart:
            evaluation = _held_out(reference, candidate.recipe, made.model, tuning.session)
            judged[candidate.recipe] = reference.scores.f1 - evaluation.scores.f1
            if not judged[candidate.recipe] <= max_f1_drop:
                continue
        with writing_bundle(out) as work:
            (work / MODEL).write_bytes(made.model)
            rewritten = material.rewritten
            manifest: dict[str, Any] = {
                "graph": "single-node attention" if rewritten.fused else "plain",
                "attention_nodes": rewritten.fused,
                "attentions": rewritten.attentions,
                "from": source.name,
                "recipe": candidate.recipe,
                "what": RECIPES[candidate.recipe].what,
                "reduce_range": material.reduce_range and RECIPES[candidate.recipe].ranged,
                "target": options.target,
                "float_nodes": list(made.float_nodes),
                "max_f1_drop": max_f1_drop,
                "judged_on": search.judges.to_dict(),
                "leaderboard": board(candidate.recipe),
                "duel": duel and asdict(duel),
            }
            finish_bundle(
                reference, work, out.name, precision="int8", made=manifest, tuning=tuning, evaluation=evaluation
            )
        return open_bundle(out)
    for text in leaderboard_lines(board(), search.judges.to_dict()):
        say(text)
    raise GateError(
        f"{out}: every recipe loses more than {max_f1_drop} points of F1, judged on {reference.questions}, so none was "
        f"written ({_losses(candidates, judged)}). Allow more with --max-f1-drop, or judge on more questions with --eval-data"
    )


def _held_out(reference: Reference, recipe: str, model: bytes, session: Mapping[str, Any]) -> Evaluation:
    """The model's answers to the held-out questions."""
    answerer = make_answerer(reference, model, session)
    return counted(answerer, reference.examples, f"{recipe} answers the held-out questions", reference.count)


def find_recipes(name: str | None, reduce_range: bool) -> list[Recipe]:
    """The recipe of this name, or all that ``reduce_range`` allows. Raises InputError if there is none."""
    fitting = {each.name: each for each in RECIPES.values() if each.ranged or not reduce_range}
    if name is None:
        return list(fitting.values())
    if name in RECIPES and name not in fitting:
        raise InputError(f"recipe {name} has 8-bit weights always: leave out --reduce-range, or choose another")
    if name not in RECIPES:
        raise InputError(f"recipe is {name!r}: choose one of {', '.join(fitting)} (qadeploy export --list-recipes)")
    return [RECIPES[name]]


def _losses(candidates: Sequence[MeasuredRecipe], judged: dict[str, float]) -> str:
    return "; ".join(
        f"{c.recipe}: {c.failed or f'{c.f1_lost:.2f} on the judging questions'}"
        + (f", {judged[c.recipe]:.2f} held out" if c.recipe in judged else "")
        for c in candidates
    )
