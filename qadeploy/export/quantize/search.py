"""The search over recipes: what each costs in F1 and gains in speed on this machine, which is best, and the leaderboard.

Measurements are cached by content hash, so an interrupted search resumes and a repeated one ends at once.
Models are not cached: the chosen one is made again, byte for byte the same.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import onnx

from qadeploy import timing
from qadeploy.data.loading import hash_examples
from qadeploy.errors import one_line
from qadeploy.export import attention, graph
from qadeploy.export.quantize import judging, matmuls, quantizers, recipes, smoothquant
from qadeploy.export.quantize.judging import ENOUGH, Judges, find_judges, fitting_questions
from qadeploy.export.quantize.recipes import RECIPES, Material, Recipe
from qadeploy.export.reference import Reference, make_answerer
from qadeploy.files import hash_file, write_json
from qadeploy.inference.session import onnxruntime
from qadeploy.inference.tuning import ROUNDS, SESSIONS, asking
from qadeploy.integrations.onnx_standalone import nodes
from qadeploy.machine import machine, return_freed_memory, usable_cpus
from qadeploy.timing import interleave, spread

_ROUNDS = 5
_TIMED = 12
_LEAST_TIMED = 3
_TIMING = 1 / 4  # the share of the budget that may go into timing
_DUEL_TIMED = 16
# Runs of a timed question, in runs of fp32: fp32 twice, int8 with each session setting and once more, in half the time.
_RUNS = (_ROUNDS + 1) * (2 + (len(SESSIONS) + 1) / 2)
_JUDGING = 1 / 2  # the share of the budget that may go into answering the judging questions
# The modules that measurements depend on.
_CODE = (attention, graph, nodes, judging, matmuls, smoothquant, quantizers, recipes, timing)
Say = Callable[[str], object]


@dataclass(frozen=True, slots=True)
class Step:
    """The state of a search: recipes ``done`` of ``of``, what it is doing, seconds left of the budget (None: no limit)."""

    done: int
    of: int
    doing: str
    left: float | None


@dataclass(frozen=True, slots=True)
class MeasuredRecipe:
    """The figures of a recipe's model: points of F1 lost on the judging questions, speed as a multiple of the fp32 model's.

    ``f1_lost`` is the weighted mean, ``f1_change_interval`` the 95 % interval of the change (above 0: a gain).
    ``latency`` is for one question at a time, ``throughput`` for many at once, with minimum and maximum of the rounds;
    ``session`` is the better of the known session settings for the target. ``failed`` says why there is no model.
    """

    recipe: str
    f1_lost: float = 0.0
    f1_change_interval: tuple[float, float] = (0.0, 0.0)
    f1_change_dev: float = 0.0
    f1_change_training: float | None = None
    latency: float = 0.0
    latency_range: tuple[float, float] = (0.0, 0.0)
    throughput: float = 0.0
    throughput_range: tuple[float, float] = (0.0, 0.0)
    size: int = 0
    session: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    failed: str = ""

    def speed_range(self, target: str) -> tuple[float, float]:
        """Minimum and maximum of the speed that counts for the target."""
        return self.throughput_range if target == "throughput" else self.latency_range


class _Speed(NamedTuple):
    median: float
    least: float
    most: float


@dataclass(frozen=True, slots=True)
class Duel:
    """The two best recipes timed against each other: ``first``'s time over ``second``'s, with its range."""

    first: str
    second: str
    ratio: float
    ratio_range: tuple[float, float]
    chosen: str
    why: str


@dataclass(frozen=True, slots=True)
class SearchOptions:
    """What decides between recipes.

    Attributes:
        max_f1_drop: Points of F1 that a recipe may lose.
        target: latency, throughput or size.
        budget: Approximate seconds that the search may take once a recipe passes; None for no limit.
        cache: The folder of cached measurements; None caches none.
    """

    max_f1_drop: float
    target: str = "latency"
    budget: float | None = None
    cache: Path | None = None


@dataclass
class Search:
    """A search over recipes for one model; its fp32 model, with each of ``sessions``, is the baseline of speeds."""

    reference: Reference
    material: Material
    options: SearchOptions
    sessions: Sequence[Mapping[str, Any]] = SESSIONS
    say: Say = lambda _: None
    on_step: Callable[[Step], object] = lambda _: None
    _started: float = field(default_factory=time.monotonic, init=False)
    _at: tuple[int, int] = field(default=(0, 0), init=False)
    _questions: int = field(default=_TIMED, init=False)

    def run(self, chosen: Sequence[Recipe], done: int = 0) -> list[MeasuredRecipe]:
        """Measures the recipes in turn until the budget is used up and one passes; ``done`` were measured before."""
        found: list[MeasuredRecipe] = []
        of = done + len(chosen)
        for number, recipe in enumerate(chosen, done + 1):
            if self._left() == 0 and rank(found, self.options):
                self.say(
                    f"  the budget of {self.options.budget:.0f} s is used up: {recipe.name} and later recipes were not tried"
                )
                break
            self._at = (number - 1, of)
            candidate = self._kept(recipe) or self._measure(recipe)
            found.append(candidate)
            self._at = (number, of)
            self.say(f"  {number}/{of} {line(candidate)}")
        return found

    def _left(self) -> float | None:
        budget = self.options.budget
        return None if budget is None else max(0.0, budget - (time.monotonic() - self._started))

    def step(self, doing: str) -> None:
        """Reports what the search is doing."""
        self.on_step(Step(*self._at, doing, self._left()))

    @cached_property
    def judges(self) -> Judges:
        """The questions that candidates are judged on, answered by the float model. Also finds how many are timed."""
        self.step("answering with the fp32 model")
        budget = self.options.budget
        model = make_answerer(self.reference, self.material.source, self.sessions[0])
        found = find_judges(self.reference, model, None if budget is None else _judging_seconds(budget))
        pairs = self._pairs(_LEAST_TIMED)
        started = time.monotonic()
        asking(model, pairs, one=True)()
        self._questions = _timed_questions((time.monotonic() - started) / len(pairs), budget)
        return found

    def _measure(self, recipe: Recipe) -> MeasuredRecipe:
        judges = self.judges
        started = time.monotonic()
        with TemporaryDirectory(prefix="qadeploy-") as folder:
            model = Path(folder, "model.onnx")
            try:
                self.step(f"{recipe.name}: making the model")
                self._make(recipe, model)
                self.step(f"{recipe.name}: answering {len(judges.examples)} questions")
                change = judges.change(make_answerer(self.reference, model, SESSIONS[0]))
            except Exception as error:  # a quantizer may raise anything on an unknown graph; the others go on
                candidate = MeasuredRecipe(recipe.name, failed=f"{type(error).__name__}: {one_line(error, 160)}")
            else:
                one = self.options.target != "throughput"
                speeds = self._speeds(recipe, model, SESSIONS, one=one)
                session = SESSIONS[speeds.index(max(speeds))]
                deciding, other = max(speeds), self._speeds(recipe, model, [session], one=not one)[0]
                single, many = (deciding, other) if one else (other, deciding)
                candidate = MeasuredRecipe(
                    recipe.name,
                    **change,
                    latency=single.median,
                    latency_range=(single.least, single.most),
                    throughput=many.median,
                    throughput_range=(many.least, many.most),
                    size=model.stat().st_size,
                    session=session,
                    seconds=round(time.monotonic() - started, 1),
                )
        self._keep(recipe, candidate)
        return candidate

    def _make(self, recipe: Recipe, file: Path) -> None:
        """Writes a recipe's model: a session made from a file takes less memory than one from bytes."""
        return_freed_memory()
        file.write_bytes(recipe.make(self.material).model)
        return_freed_memory()  # of its copies

    def _pairs(self, count: int) -> list[tuple[str, str]]:
        return [(e.question, e.context) for e in spread(self.reference.choosing, count)]

    def _speeds(self, recipe: Recipe, model: Path, sessions: Sequence[Mapping[str, Any]], *, one: bool) -> list[_Speed]:
        """The model's speed with each of the settings, as a multiple of the fp32 model's with its better settings.

        The rounds are interleaved, on dev questions. All answerers are made anew each time, because one that has
        answered single questions and many at once keeps ONNX Runtime sessions for both.
        """
        self.step(f"{recipe.name}: timing {'one question at a time' if one else 'many at once'}")
        return_freed_memory()
        answerers = [make_answerer(self.reference, model, session) for session in sessions]
        floats = [make_answerer(self.reference, self.material.source, session) for session in self.sessions]
        pairs = self._pairs(self._questions)
        variants = {f"float {i}": asking(answerer, pairs, one=one) for i, answerer in enumerate(floats)}
        variants |= {str(i): asking(answerer, pairs, one=one) for i, answerer in enumerate(answerers)}
        timings = interleave(variants, _ROUNDS)
        fastest = np.min([timings[f"float {i}"].seconds for i in range(len(floats))], axis=0)
        ratios = [fastest / np.asarray(timings[str(i)].seconds) for i in range(len(answerers))]
        return [_Speed(float(np.median(r)), float(r.min()), float(r.max())) for r in ratios]

    def settle(self, ranked: Sequence[MeasuredRecipe]) -> tuple[list[MeasuredRecipe], Duel | None]:
        """The ranked candidates, with the first two timed against each other and reordered if their ranges overlap.

        If neither is clearly faster, the one that loses less F1 comes first.
        """
        if self.options.target == "size" or len(ranked) < 2:
            return list(ranked), None
        first, second = ranked[:2]
        if first.speed_range(self.options.target)[0] > second.speed_range(self.options.target)[1]:
            return list(ranked), None
        self.step(f"timing {first.recipe} against {second.recipe}")
        pairs, one = self._pairs(_DUEL_TIMED), self.options.target != "throughput"
        with TemporaryDirectory(prefix="qadeploy-") as folder:
            answerers = {}
            for candidate in (first, second):
                file = Path(folder, f"{candidate.recipe}.onnx")
                self._make(RECIPES[candidate.recipe], file)
                answerers[candidate.recipe] = make_answerer(self.reference, file, candidate.session)
            timings = interleave({name: asking(a, pairs, one=one) for name, a in answerers.items()}, ROUNDS)
        a, b = timings[first.recipe], timings[second.recipe]
        if b.clearly_faster(a) or b.clearly_slower(a):
            chosen, why = (second if b.clearly_faster(a) else first), "faster"
        else:
            chosen, why = min((first, second), key=lambda c: c.f1_lost), "as fast and loses less F1"
        duel = Duel(first.recipe, second.recipe, b.speedup, b.speedup_range, chosen.recipe, why)
        self.say(f"  {duel_line(duel)}")
        return [chosen, second if chosen is first else first, *ranked[2:]], duel

    # ------------------------------------------------------------ what is kept

    @cached_property
    def _basis(self) -> str:
        """Everything that a measurement depends on besides the recipe: model, settings, questions, target, machine, code."""
        parts = (
            hash_file(self.material.source),
            self.reference.checkpoint.settings.to_dict(),
            hash_examples(self.judges.examples),
            self.judges.dev,
            hash_examples(self.reference.choosing),
            self.options.target,
            self.material.reduce_range,
            machine().to_dict(threads=usable_cpus(), onnxruntime=onnxruntime().__version__),
            # Not the number of questions timed: it varies with the load, and the next run would find nothing.
            [_ROUNDS, _TIMED, SESSIONS],
            onnx.__version__,
            [code_of(module) for module in _CODE],
        )
        return json.dumps(parts, sort_keys=True)

    def _path(self, recipe: Recipe) -> Path | None:
        if self.options.cache is None:
            return None
        return self.options.cache / f"recipe-{hashlib.sha256((self._basis + recipe.name).encode()).hexdigest()}.json"

    def _kept(self, recipe: Recipe) -> MeasuredRecipe | None:
        path = self._path(recipe)
        try:
            kept = json.loads(path.read_text(encoding="utf-8")) if path else None
            pairs = ("f1_change_interval", "latency_range", "throughput_range")
            return kept and MeasuredRecipe(**{**kept, **{name: tuple(kept[name]) for name in pairs}})
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def _keep(self, recipe: Recipe, candidate: MeasuredRecipe) -> None:
        path = self._path(recipe)
        if path is None or candidate.failed:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, asdict(candidate))
        except OSError as error:
            self.say(f"  measurements are not kept: {path.parent}: {error.strerror}")


def code_of(module: ModuleType) -> str:
    """What a module does: its syntax tree without comments and docstrings, which change no measurement."""
    tree = ast.parse(inspect.getsource(module))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            node.body = [s for s in node.body if not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))]
    return ast.dump(tree)


def judged_questions(reference: Reference, each: float, budget: float) -> int:
    """About how many questions judge each recipe, if the float model takes ``each`` seconds per question."""
    dev = len(reference.choosing)
    return dev + fitting_questions(dev, ENOUGH if reference.dev else 0, each, _judging_seconds(budget))


def timing_seconds(each: float, budget: float) -> float:
    """About how many seconds timing a recipe takes, if the float model takes ``each`` seconds per question."""
    return _timed_questions(each, budget) * each * _RUNS


def _judging_seconds(budget: float) -> float:
    return budget * _JUDGING / (len(RECIPES) + 1)


def _timed_questions(each: float, budget: float | None) -> int:
    """How many questions are timed: halved until they fit, like the judging ones."""
    count = _TIMED
    while budget is not None and count > _LEAST_TIMED and count * each * _RUNS > budget * _TIMING / len(RECIPES):
        count //= 2
    return count


def rank(candidates: Sequence[MeasuredRecipe], options: SearchOptions) -> list[MeasuredRecipe]:
    """The candidates that lose at most ``max_f1_drop`` points of F1, the best for the target first."""
    sound = [c for c in candidates if not c.failed and c.f1_lost <= options.max_f1_drop]
    if options.target == "size":
        return sorted(sound, key=lambda c: (c.size, -c.latency))
    return sorted(sound, key=lambda c: -(c.throughput if options.target == "throughput" else c.latency))


def line(candidate: MeasuredRecipe) -> str:
    """One line of the leaderboard."""
    if candidate.failed:
        return f"{candidate.recipe:<22} {candidate.failed}"
    return (
        f"{candidate.recipe:<22} {candidate.size / 1e6:>6.1f} MB  F1 {-candidate.f1_lost:+6.2f}  "
        f"one at a time x{candidate.latency:.2f}  many x{candidate.throughput:.2f}"
    )


def duel_line(duel: Duel) -> str:
    """The result of timing the best two against each other."""
    low, high = duel.ratio_range
    return (
        f"{duel.second} against {duel.first}: x{duel.ratio:.2f} ({low:.2f} to {high:.2f}), {ROUNDS} interleaved rounds: "
        f"{duel.chosen} is {duel.why}"
    )


# ---------------------------------------------------------------- the leaderboard


def leaderboard(
    candidates: Sequence[MeasuredRecipe],
    known: Sequence[str],
    judged: Mapping[str, float],
    *,
    max_f1_drop: float,
    chosen: str | None = None,
) -> list[dict[str, Any]]:
    """A row for each of the ``known`` recipes, measured or not; ``judged`` maps recipes to F1 lost on held-out questions.

    ``verdict`` says why a recipe was not chosen.
    """
    found = {candidate.recipe: candidate for candidate in candidates}
    rows: list[dict[str, Any]] = []
    for name in known:
        candidate = found.get(name)
        if candidate is None:
            rows.append({"recipe": name, "verdict": "not tried: the budget was used up"})
            continue
        held_out: dict[str, Any] = {"f1_lost_held_out": judged[name]} if name in judged else {}
        verdict = "chosen" if name == chosen else _verdict(candidate, judged.get(name), max_f1_drop)
        rows.append({**asdict(candidate), **held_out, "verdict": verdict})
    return rows


def _verdict(candidate: MeasuredRecipe, held_out: float | None, max_f1_drop: float) -> str:
    if candidate.failed:
        return f"failed: {candidate.failed}"
    if not candidate.f1_lost <= max_f1_drop:
        return f"loses more than {max_f1_drop:g}"
    if held_out is not None and not held_out <= max_f1_drop:
        return f"lost {held_out:.2f} on the held-out questions"
    return "not the best"


def leaderboard_lines(
    rows: Sequence[Mapping[str, Any]], judged_on: Mapping[str, Any], chosen: str | None = None
) -> list[str]:
    """The rows of ``leaderboard`` as a table, the chosen recipe marked; ``judged_on`` comes from ``Judges.to_dict``."""
    lines = [
        f"{'recipe':<22} {'size':>9} {'F1 change (95 %)':>24} {'one at a time, x fp32':>24} {'many, x fp32':>21}  verdict"
    ]
    for row in rows:
        mark = "*" if row["recipe"] == chosen else " "
        if not row.get("size"):
            lines.append(f"{mark}{row['recipe']:<21} {row['verdict']}")
            continue
        low, high = row["f1_change_interval"]
        change = f"{-row['f1_lost']:+.2f} ({low:+.2f} to {high:+.2f})"
        lines.append(
            f"{mark}{row['recipe']:<21} {row['size'] / 1e6:>6.1f} MB {change:>24} {_speed(row, 'latency'):>24} "
            f"{_speed(row, 'throughput'):>21}  {row['verdict']}"
        )
    training = judged_on["training"]
    asked = f"{judged_on['dev']} dev"
    if training:
        asked += f" and {training} training questions, weighted like the dev set (worth {judged_on['worth']:.0f} of equal weight)"
    else:
        asked += " questions"
    return [
        *lines,
        f"F1 judged on {asked}, against the fp32 model; speeds are medians of interleaved rounds (least to most)",
    ]


def _speed(row: Mapping[str, Any], name: str) -> str:
    low, high = row[f"{name}_range"]
    return f"{row[name]:.2f} ({low:.2f} to {high:.2f})"
