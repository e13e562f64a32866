"""Which session settings run a model soonest on this machine: measured in turns, and kept where nothing is clearly better.

Three steps, each from the best of the one before: graph optimizers of ONNX Runtime to leave out, whether its idle threads
spin or sleep, and the layout of one question's windows on threads. ``qadeploy tune`` and the export measure with it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from qadeploy.errors import InputError
from qadeploy.inference.answerer import Answerer, Pair
from qadeploy.inference.layout import SessionSettings
from qadeploy.inference.session import OnnxModel
from qadeploy.records import Window
from qadeploy.timing import Timing, interleave, spread

TARGETS = ("latency", "throughput")
# What the runtime fuses by itself: six SkipLayerNormalization kernels took 1.8 ms of an int8 MiniLM, plain
# LayerNormalization 0.03 ms each (ONNX Runtime 1.32, 2 cores with AVX512-VNNI).
SESSIONS: tuple[dict[str, Any], ...] = ({}, {"disabled_optimizers": ["SkipLayerNormFusion"]})
SPINNING = "session.intra_op.allow_spinning"
FP32_TOLERANCE = 1e-4
ROUNDS = 9
_QUESTIONS = 16
_LAYOUTS: tuple[str | None, ...] = (None, "wide", "narrow")
_LAYOUT_QUESTIONS = 6
_LOOKED_AT = 200  # questions, for some of one window and some of several
_JOINED = 64  # contexts at most, to make a question of several windows
SECONDS = 60.0  # all steps together, about; large models are asked fewer questions
_PASSES = 17  # about so many times is each question asked in a round of all steps
_COMPARED = 32  # windows whose logits are compared

Make = Callable[[Mapping[str, Any]], Answerer]


@dataclass(frozen=True, slots=True)
class Trial:
    """One setting as measured: milliseconds a question, and the speed as times that of its step's first.

    ``logits_apart`` is the largest difference of any logit to the settings that were there before; where it is above the
    tolerance ``taken`` is never true.
    """

    step: str
    settings: str
    ms: float
    ms_range: tuple[float, float]
    speedup: float
    speedup_range: tuple[float, float]
    logits_apart: float
    sound: bool
    taken: bool


@dataclass(frozen=True, slots=True)
class Tuning:
    """The settings found, and how: ``session`` as a manifest holds it, ``logits_apart`` what it moves the logits by."""

    session: dict[str, Any]
    before: dict[str, Any]
    target: str
    threads: int
    questions: int
    rounds: int
    tolerance: float | None
    logits_apart: float
    trials: tuple[Trial, ...]

    @classmethod
    def none(cls, threads: int) -> Tuning:
        """Nothing was measured: ONNX Runtime's own settings, as on CUDA."""
        return cls({}, {}, TARGETS[0], threads, 0, 0, None, 0.0, ())

    @property
    def changed(self) -> bool:
        """Whether other settings were found than those that were there."""
        return self.session != self.before

    def to_dict(self) -> dict[str, Any]:
        """All of it but the settings before and found, as plain JSON values: a manifest's ``tuning`` entry."""
        return {k: v for k, v in asdict(self).items() if k not in {"session", "before"}}

    def lines(self) -> list[str]:
        """The leaderboard as text: a line a setting, under a line that says what was measured."""
        asked = "one at a time" if self.target == "latency" else "many at once"
        text = [
            f"{self.questions} questions {asked}, {self.threads} thread{'s' * (self.threads > 1)}, medians of {self.rounds} "
            "rounds in turns (least to most); x is against the first of its step",
            f"{'step':<34} {'setting':<34} {'ms a question':>24} {'x':>22}  {'logits moved by':>15}",
        ]
        for t in self.trials:
            ms = f"{t.ms:.2f} ({t.ms_range[0]:.2f} to {t.ms_range[1]:.2f})"
            ratio = f"{t.speedup:.2f} ({t.speedup_range[0]:.2f} to {t.speedup_range[1]:.2f})"
            end = "" if t.sound else "  too far: left out"
            end = "  <- taken" if t.taken else end
            text.append(f"{t.step:<34} {t.settings:<34} {ms:>24} {ratio:>22}  {t.logits_apart:>15.1e}{end}")
        return text


def tune(
    make: Make,
    pairs: Sequence[Pair],
    stored: Mapping[str, Any] | None = None,
    *,
    target: str = "latency",
    tolerance: float | None = None,
    seconds: float = SECONDS,
    say: Callable[[str], object] = lambda _: None,
) -> Tuning:
    """Measures the settings of ``SESSIONS``, spinning and layouts for the model that ``make`` makes an answerer of.

    ``make`` takes session settings; ``pairs`` are the (question, context) pairs to time with; ``stored`` the settings that
    stay where none is clearly faster (see ``Timing.clearly_faster``), with all their other entries. Settings that move any logit
    by more than ``tolerance`` are left out (None: none is). About ``seconds`` are spent, by asking fewer questions of a
    large model, at least two. ``target`` decides on the first two steps; the layout is about
    one question at any time. Raises InputError on an unknown target, without pairs, and what answering raises.
    """
    if target not in TARGETS:
        raise InputError(f"target is {target!r}: choose one of {', '.join(TARGETS)}")
    if not pairs:
        raise InputError("there is no question to measure with: give data with questions")
    return _Tuner(make, pairs, dict(stored or {}), target, tolerance, seconds, say).run()


class _Tuner:
    """One tuning under way: the settings found so far, their answerer, and the trials."""

    def __init__(
        self,
        make: Make,
        pairs: Sequence[Pair],
        stored: dict[str, Any],
        target: str,
        tolerance: float | None,
        seconds: float,
        say: Callable[[str], object],
    ) -> None:
        self.make, self.target, self.tolerance, self.say = make, target, tolerance, say
        self.before = stored
        self.session = stored
        self.answerer = make(stored)
        self.threads = model_of(self.answerer).threads
        self.asked = self._fitting(pairs, seconds)
        self.pairs = pairs
        looked_at = [(pair, self._windows(pair)) for pair in spread(pairs, _LOOKED_AT)]
        few = min(_LAYOUT_QUESTIONS, len(self.asked))
        self.single = spread([pair for pair, windows in looked_at if len(windows) == 1], few)
        self.several = spread([pair for pair, windows in looked_at if len(windows) > 1], few)
        if not self.several:
            made = [self._long(pairs, pair) for pair in spread(pairs, few)]
            self.several = [pair for pair in made if len(self._windows(pair)) > 1]
        compared = [w for pair in (*self.several, *self.asked) for w in self._windows(pair)]
        self.compared = spread(compared, _COMPARED)
        self.logits = self._logits(self.answerer)
        self.moved = 0.0
        self.trials: list[Trial] = []

    def run(self) -> Tuning:
        """Takes the three steps."""
        self._step("optimizers", _graphs(self.session))
        if self.threads > 1:
            if self.target == "latency":
                self._step("idle threads", _spins(self.session))
            self._layout()
        return Tuning(
            self.session,
            self.before,
            self.target,
            self.threads,
            len(self.asked),
            ROUNDS,
            self.tolerance,
            self.moved,
            tuple(self.trials),
        )

    # ------------------------------------------------------------ questions

    def _fitting(self, pairs: Sequence[Pair], seconds: float) -> list[Pair]:
        """Questions at even distances: as many as the time allows, for many at once enough to keep all threads busy."""
        most = _QUESTIONS if self.target == "latency" else max(_QUESTIONS, 4 * self.threads)
        asked = spread(pairs, most)
        self.answerer.answer(*asked[0])
        probe = spread(asked, 3)
        started = time.perf_counter()
        for question, context in probe:
            self.answerer.answer(question, context)
        each = (time.perf_counter() - started) / len(probe)
        return spread(asked, min(most, max(2, int(seconds / (ROUNDS * _PASSES * each)))))

    def _windows(self, pair: Pair) -> list[Window]:
        encoder, settings = self.answerer.encoder, self.answerer.settings
        return encoder.windows(
            encoder.encode(pair[0]),
            encoder.encode(pair[1]),
            max_seq_len=settings.max_seq_len,
            doc_stride=settings.doc_stride,
        )

    def _long(self, pairs: Sequence[Pair], pair: Pair) -> Pair:
        """The question on its context and those after it, joined until they fill three windows."""
        first = pairs.index(pair)
        context = pair[1]
        for i in range(1, _JOINED):
            if len(self._windows((pair[0], context))) >= 3:
                break
            context += "\n" + pairs[(first + i) % len(pairs)][1]
        return pair[0], context

    # ------------------------------------------------------------ steps

    def _step(self, step: str, others: Mapping[str, dict[str, Any]]) -> None:
        """Times settings (by name, the ones so far first) for the target, and goes on with the best."""
        (first, _), *rest = others.items()
        self.say(f"measuring {step}")
        answerers = {first: self.answerer, **{name: self.make(others[name]) for name, _ in rest}}
        timings = interleave({name: self._work(a) for name, a in answerers.items()}, ROUNDS)
        apart = {name: self._apart(a) for name, a in answerers.items()}
        faster = [n for n, t in timings.items() if self._sound(apart[n]) and t.clearly_faster(timings[first])]
        taken = max(faster, key=lambda n: timings[n].speedup, default=first)
        self._record(step, timings, apart, taken, len(self.asked))
        self.session, self.answerer, self.moved = others[taken], answerers[taken], apart[taken]

    def _layout(self) -> None:
        settings = SessionSettings.from_manifest(self.session)
        stored = settings.one if settings.threads in {None, self.threads} else None
        model = model_of(self.answerer)
        ways = sorted(_LAYOUTS, key=lambda way: way != stored)
        answerers = {way: self._with(model.with_layout(way)) for way in ways}
        apart = {way: self._apart(answerers[way]) for way in ways}
        found: list[tuple[str, list[int], dict[str | None, Timing]]] = []
        for kind, pairs in (("of one window", self.single), ("of several windows", self.several)):
            if not pairs:
                continue
            self.say(f"measuring the layout of questions {kind}")
            counts = [len(self._windows(pair)) for pair in pairs]
            first = {self._plan(way, counts): way for way in reversed(ways)}  # of those that run alike
            alone = [way for way in ways if first[self._plan(way, counts)] == way]
            work = {str(way): (lambda a=answerers[way], p=pairs: _one_by_one(a, p)) for way in alone}
            timed = interleave(work, ROUNDS)
            found.append((kind, counts, {way: timed[str(first[self._plan(way, counts)])] for way in ways}))
        sound = [
            way
            for way in ways[1:]
            if self._sound(apart[way])
            and any(timings[way].clearly_faster(timings[stored]) for _, _, timings in found)
            and not any(timings[way].clearly_slower(timings[stored]) for _, _, timings in found)
        ]
        taken = max(sound, key=lambda way: math.prod(t[way].speedup for _, _, t in found), default=stored)
        for kind, counts, timings in found:
            names = {way: _plan_name(self._plan(way, counts), counts) for way in reversed(ways)}
            rows = {names[way]: timings[way] for way in ways}
            moved = {name: apart[way] for way, name in names.items()}
            self._record(f"layout, questions {kind}", rows, moved, names[taken], len(counts))
        if taken != stored or stored != settings.one:  # the latter: one for other threads
            rest = {k: v for k, v in self.session.items() if k != "layout"}
            self.session = rest if taken is None else {**rest, "layout": {"one": taken, "threads": self.threads}}
            self.answerer, self.moved = answerers[taken], apart[taken]

    def _plan(self, way: str | None, counts: Sequence[int]) -> tuple[int, ...]:
        """How many windows of each question run narrow."""
        settings = SessionSettings(one=way)
        return tuple(settings.narrow_windows(count, self.threads) for count in counts)

    def _with(self, model: OnnxModel) -> Answerer:
        return Answerer(self.answerer.encoder, self.answerer.settings, model)

    def _work(self, answerer: Answerer) -> Callable[[], object]:
        if self.target == "latency":
            return lambda: _one_by_one(answerer, self.asked)
        return lambda: answerer.answer_batch(self.asked)

    # ------------------------------------------------------------ logits, and what is written down

    def _logits(self, answerer: Answerer) -> np.ndarray[Any, Any]:
        return np.concatenate([values for pair in answerer.model.run(self.compared) for values in pair])

    def _apart(self, answerer: Answerer) -> float:
        return float(np.abs(self._logits(answerer) - self.logits).max())

    def _sound(self, apart: float) -> bool:
        return self.tolerance is None or apart <= self.tolerance

    def _record(
        self, step: str, timings: Mapping[str, Timing], apart: Mapping[str, float], taken: str, asked: int
    ) -> None:
        for name, t in timings.items():
            self.trials.append(
                Trial(
                    step,
                    name,
                    1000 * t.median / asked,
                    (1000 * t.least / asked, 1000 * t.most / asked),
                    t.speedup,
                    t.speedup_range,
                    apart[name],
                    self._sound(apart[name]),
                    name == taken,
                )
            )


def model_of(answerer: Answerer) -> OnnxModel:
    """The ONNX model of an answerer. Raises InputError where it has another kind of model."""
    if not isinstance(answerer.model, OnnxModel):
        raise InputError("session settings are those of an ONNX model: give a bundle")
    return answerer.model


def _graphs(session: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Settings by name, those of ``session`` first: with each of the known optimizers to leave out."""
    rest = {k: v for k, v in session.items() if k != "disabled_optimizers"}
    found: dict[str, dict[str, Any]] = {}
    for names in (session.get("disabled_optimizers", []), *(s.get("disabled_optimizers", []) for s in SESSIONS)):
        name = f"without {', '.join(names)}" if names else "all of the runtime's"
        found.setdefault(name, {**({"disabled_optimizers": list(names)} if names else {}), **rest})
    found[next(iter(found))] = session
    return found


def _spins(session: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Settings by name, those of ``session`` first: idle threads wait spinning, which is the default, or asleep."""
    rest = {k: v for k, v in session.items() if k != "config"}
    config = {k: v for k, v in session.get("config", {}).items() if k != SPINNING}
    sleep = {**rest, "config": {**config, SPINNING: "0"}}
    spin = {**rest, "config": config} if config else rest
    if session.get("config", {}).get(SPINNING) == "0":
        return {"sleep": session, "spin": spin}
    return {"spin": session, "sleep": sleep}


def _one_by_one(answerer: Answerer, pairs: Sequence[Pair]) -> list[object]:
    return [answerer.answer(question, context) for question, context in pairs]


def _plan_name(plan: Sequence[int], counts: Sequence[int]) -> str:
    if not any(plan):
        return "wide"
    return "narrow" if list(plan) == list(counts) else "full rounds narrow, the rest wide"
