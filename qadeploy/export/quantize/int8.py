"""Quantization: an fp32 bundle to a new int8 one by the recipe that serves best here, behind a gate of EM and F1."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qadeploy.errors import GateError, InputError
from qadeploy.evaluation.scoring import evaluate
from qadeploy.export.manifest import finish_bundle, tune_model
from qadeploy.export.parity import parity_windows
from qadeploy.export.quantize.leaderboard import leaderboard, leaderboard_lines
from qadeploy.export.quantize.recipes import RECIPES, Material
from qadeploy.export.quantize.search import Candidate, Say, Search, Step, rank
from qadeploy.export.reference import Reference, make_answerer
from qadeploy.inference.bundle import MODEL, Bundle, open_bundle, writing_bundle


def quantize(
    reference: Reference,
    source: Bundle,
    out: Path,
    max_f1_drop: float,
    *,
    target: str = "latency",
    recipe: str | None = None,
    budget: float | None = None,
    cache: Path | None = None,
    say: Say = lambda _: None,
    on_step: Callable[[Step], object] = lambda _: None,
) -> Bundle:
    """Writes the int8 bundle ``out`` from the fp32 bundle ``source`` and returns it, verified.

    Every recipe (or the one named) is measured: F1 on the judging questions (see ``judging``), speed on this machine. Of those
    that lose at most ``max_f1_drop`` points there, the best for ``target`` gets its session settings and is judged on the
    held-out questions; where they refuse it, the next one is. The manifest holds the leaderboard. ``budget`` is in
    seconds, and does not end the search before a recipe passes. ``say`` gets lines, ``on_step`` where it stands. Raises InputError on an unknown
    recipe or target, GateError where every candidate loses more than ``max_f1_drop`` against PyTorch, and then ``out``
    is left as it was.
    """
    model = source.read(MODEL)
    checkpoint = reference.checkpoint
    material = Material(
        model,
        getattr(checkpoint.model.config, "num_attention_heads", None),
        checkpoint.encoder.config.pad_token_id,
        parity_windows(checkpoint, reference.choosing),
    )
    search = Search(reference, model, material, target, cache, budget, say, on_step)
    known = [find_recipe(recipe)] if recipe else list(RECIPES.values())
    candidates = search.run(known, max_f1_drop)
    waiting, duel = search.settle(rank(candidates, target, max_f1_drop))
    judged: dict[str, float] = {}

    def board(chosen: str | None = None) -> list[dict[str, Any]]:
        names = [each.name for each in known]
        return leaderboard(candidates, names, judged, max_f1_drop=max_f1_drop, chosen=chosen)

    while waiting or len(candidates) < len(known):
        if not waiting:  # the held-out questions refused what the budget allowed to try: go on
            done = len(candidates)
            candidates += search.run(known[done : done + 1], max_f1_drop, done)
            waiting = rank(candidates[-1:], target, max_f1_drop)
            continue
        candidate = waiting.pop(0)
        made = RECIPES[candidate.recipe].make(material)
        search.step(f"{candidate.recipe}: measuring session settings")
        tuning = tune_model(reference, made.model, candidate.session, target=target)
        search.step(f"{candidate.recipe}: answering the held-out questions")
        answerer = make_answerer(reference, made.model, tuning.session)
        lost = reference.scores.f1 - evaluate(answerer, reference.examples).scores.f1
        judged[candidate.recipe] = lost
        if not lost <= max_f1_drop:
            continue
        with writing_bundle(out) as work:
            (work / MODEL).write_bytes(made.model)
            manifest: dict[str, Any] = {
                "graph": "single-node attention" if material.fused.fused else "plain",
                "attention_nodes": material.fused.fused,
                "attentions": material.fused.attentions,
                "from": source.name,
                "recipe": candidate.recipe,
                "what": RECIPES[candidate.recipe].what,
                "target": target,
                "float_nodes": list(made.float_nodes),
                "max_f1_drop": max_f1_drop,
                "judged_on": search.judges.to_dict(),
                "leaderboard": board(candidate.recipe),
                "duel": duel and asdict(duel),
            }
            finish_bundle(reference, work, out.name, precision="int8", made=manifest, tolerance=None, tuning=tuning)
        return open_bundle(out)
    for text in leaderboard_lines(board(), search.judges.to_dict()):
        say(text)
    raise GateError(
        f"{out}: every recipe loses more than {max_f1_drop} points of F1, judged on {reference.questions}, so none was "
        f"written ({_losses(candidates, judged)}). Allow more with --max-f1-drop, or judge on more questions with --eval-data"
    )


def find_recipe(name: str) -> Any:
    """The recipe of this name. Raises InputError where there is none."""
    if name not in RECIPES:
        raise InputError(f"recipe is {name!r}: choose one of {', '.join(RECIPES)} (qadeploy export --list-recipes)")
    return RECIPES[name]


def _losses(candidates: Sequence[Candidate], judged: dict[str, float]) -> str:
    return "; ".join(
        f"{c.recipe}: {c.failed or f'{c.f1_lost:.2f} on the judging questions'}"
        + (f", {judged[c.recipe]:.2f} held out" if c.recipe in judged else "")
        for c in candidates
    )
