"""The search over recipes: every candidate's F1 on the dev part and speed on this machine, and the best of them.

What was measured is kept by content hash, so that a search that was cut off goes on and a second one is over at once.
Models are not kept: the chosen one is made again, from the same bytes to the same bytes.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from qadeploy.build import graph, products, protect, quantizers, recipes, sensitivity
from qadeploy.build.recipes import Material, Recipe
from qadeploy.build.report import SESSIONS, Reference, make_answerer
from qadeploy.data.readers import hash_examples
from qadeploy.doctor import diagnose
from qadeploy.errors import InputError
from qadeploy.evaluate import evaluate
from qadeploy.files import write_json
from qadeploy.runtime.answerer import Answerer
from qadeploy.timing import interleave

TARGETS = ("latency", "throughput", "size")
_ROUNDS = 3
_TIMED = 10
Say = Callable[[str], object]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A recipe's model as measured: percent of F1 lost on the dev part, speed as times the fp32 model's.

    ``latency`` is one question at a time, ``throughput`` many at once, both with the better of the known session
    settings for it, ``session`` the settings that are better for the target. ``failed`` says why there is no model.
    """

    recipe: str
    f1_lost: float = 0.0
    latency: float = 0.0
    throughput: float = 0.0
    size: int = 0
    session: int = 0
    seconds: float = 0.0
    failed: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The candidate as plain JSON values, its session settings spelled out."""
        return {**asdict(self), "session": SESSIONS[self.session]}


@dataclass
class Search:
    """A search over recipes for one model: ``source`` is its fp32 model, ``cache`` where measurements are kept."""

    reference: Reference
    source: bytes
    material: Material
    target: str
    cache: Path | None
    say: Say

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise InputError(f"target is {self.target!r}: choose one of {', '.join(TARGETS)}")

    def run(self, chosen: Sequence[Recipe], budget: float | None, max_f1_drop: float) -> list[Candidate]:
        """Measures the recipes in turn until ``budget`` seconds are over and one loses at most ``max_f1_drop``."""
        started = time.monotonic()
        found: list[Candidate] = []
        for recipe in chosen:
            over = budget is not None and time.monotonic() - started > budget
            if over and rank(found, self.target, max_f1_drop):
                self.say(f"  the budget of {budget:.0f} s is used up: {recipe.name} and what follows was not tried")
                break
            candidate = self._kept(recipe) or self._measure(recipe)
            found.append(candidate)
            self.say(f"  {line(candidate)}")
        return found

    def _measure(self, recipe: Recipe) -> Candidate:
        started = time.monotonic()
        try:
            made = recipe.make(self.material)
            answerers = [make_answerer(self.reference, made.model, session) for session in SESSIONS]
            lost = self._f1 - evaluate(answerers[0], self.reference.choosing).scores.f1
        except Exception as error:  # the quantizers raise anything on a graph that they do not know, and others may run
            candidate = Candidate(recipe.name, failed=f"{type(error).__name__}: {' '.join(str(error).split())[:160]}")
        else:
            latency, throughput = self._speeds(answerers, one=True), self._speeds(answerers, one=False)
            deciding = throughput if self.target == "throughput" else latency
            candidate = Candidate(
                recipe.name,
                lost,
                max(latency),
                max(throughput),
                len(made.model),
                deciding.index(max(deciding)),
                round(time.monotonic() - started, 1),
            )
        self._keep(recipe, candidate)
        return candidate

    @cached_property
    def _f1(self) -> float:
        """F1 of the PyTorch model on the dev part, percent."""
        return evaluate(self.reference.answerer, self.reference.choosing).scores.f1

    @cached_property
    def _float(self) -> Answerer:
        return make_answerer(self.reference, self.source, {})

    @cached_property
    def _timed(self) -> list[tuple[str, str]]:
        asked = self.reference.choosing
        return [(e.question, e.context) for e in asked[:: max(1, len(asked) // _TIMED)][:_TIMED]]

    def _speeds(self, answerers: Sequence[Answerer], *, one: bool) -> list[float]:
        """Times the fp32 model's speed, of each answerer: medians of interleaved rounds on dev questions."""

        def ask(answerer: Answerer) -> object:
            if one:
                return [answerer.answer(question, context) for question, context in self._timed]
            return answerer.answer_batch(self._timed)

        variants = {"float": lambda: ask(self._float)}
        variants |= {str(i): lambda a=a: ask(a) for i, a in enumerate(answerers)}  # type: ignore[misc]
        timings = interleave(variants, _ROUNDS)
        return [timings[str(i)].speedup for i in range(len(answerers))]

    # ------------------------------------------------------------ what is kept

    @cached_property
    def _ground(self) -> str:
        """Everything but the recipe that decides on a measurement: model, settings, questions, target, machine, code."""
        machine = diagnose()
        parts = (
            hashlib.sha256(self.source).hexdigest(),
            self.reference.checkpoint.settings.to_dict(),
            hash_examples(self.reference.choosing),
            self.target,
            machine["cpu"],
            machine["packages"]["onnxruntime"] or machine["packages"]["onnxruntime-gpu"],
            [inspect.getsource(m) for m in (graph, products, protect, quantizers, recipes, sensitivity)],
        )
        return json.dumps(parts, sort_keys=True)

    def _path(self, recipe: Recipe) -> Path | None:
        if self.cache is None:
            return None
        return self.cache / f"recipe-{hashlib.sha256((self._ground + recipe.name).encode()).hexdigest()}.json"

    def _kept(self, recipe: Recipe) -> Candidate | None:
        path = self._path(recipe)
        try:
            return Candidate(**json.loads(path.read_text(encoding="utf-8"))) if path else None
        except (OSError, ValueError, TypeError):
            return None

    def _keep(self, recipe: Recipe, candidate: Candidate) -> None:
        path = self._path(recipe)
        if path is None or candidate.failed:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, asdict(candidate))
        except OSError as error:
            self.say(f"  measurements are not kept: {path.parent}: {error.strerror}")


def rank(candidates: Sequence[Candidate], target: str, max_f1_drop: float) -> list[Candidate]:
    """The candidates that lose at most ``max_f1_drop`` points of F1, the best for the target first."""
    sound = [c for c in candidates if not c.failed and c.f1_lost <= max_f1_drop]
    if target == "size":
        return sorted(sound, key=lambda c: (c.size, -c.latency))
    return sorted(sound, key=lambda c: -(c.throughput if target == "throughput" else c.latency))


def line(candidate: Candidate) -> str:
    """One line of the leaderboard."""
    if candidate.failed:
        return f"{candidate.recipe:<22} {candidate.failed}"
    return (
        f"{candidate.recipe:<22} {candidate.size / 1e6:>6.1f} MB  F1 {-candidate.f1_lost:+6.2f}  "
        f"one at a time x{candidate.latency:.2f}  many x{candidate.throughput:.2f}"
    )
