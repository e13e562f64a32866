"""Measures which session settings run a model fastest on this machine. Only clearly faster ones replace those stored.

There are three steps, each from the best settings so far: ONNX Runtime's graph optimizers to leave out, whether idle threads
spin or sleep, and the layout of one question's windows on the threads. ``qadeploy tune`` and the export use this.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from qadeploy.errors import InputError
from qadeploy.inference.answerer import Answerer, Pair
from qadeploy.inference.manifest import SessionSettings
from qadeploy.inference.session import OnnxModel, differences, narrow_windows
from qadeploy.records import Logits, Window
from qadeploy.timing import Timing, interleave, spread

TARGETS = ("latency", "throughput")
# One of the fusions can be slow: six SkipLayerNormalization kernels took 1.8 ms in an int8 MiniLM, plain
# LayerNormalization 0.03 ms each (ONNX Runtime 1.32, 2 cores with AVX512-VNNI).
SESSIONS: tuple[dict[str, Any], ...] = ({}, {"disabled_optimizers": ["SkipLayerNormFusion"]})
SPINNING = "session.intra_op.allow_spinning"
FP32_TOLERANCE = 1e-4
ROUNDS = 9
_QUESTIONS = 16
_LAYOUTS: tuple[str | None, ...] = (None, "wide", "narrow")
_LAYOUT_QUESTIONS = 6
_SEARCHED = 200  # questions in which to find some with one window and some with several
_JOINED = 64  # at most this many contexts make a question with several windows
SECONDS = 60.0  # for all steps, approximately; large models are measured with fewer questions
FEWER_ROUNDS = 5  # for a model so slow that not even two questions fit; a setting must then win all rounds
_PASSES = 17  # about how often each question is answered in one round of all steps
_COMPARED = 32  # windows whose logits are compared

Make = Callable[[Mapping[str, Any]], Answerer]


@dataclass(frozen=True, slots=True)
class Trial:
    """The measurement of one setting.

    Attributes:
        step: The step that it belongs to.
        settings: The name of the setting.
        ms: Milliseconds per question, the median of the rounds.
        ms_range: Minimum and maximum of the rounds.
        speedup: The speed relative to the first setting of the step.
        speedup_range: Minimum and maximum of the rounds.
        logits_apart: The largest difference of any logit from those of the settings before tuning.
        sound: Whether that difference is within the tolerance.
        taken: Whether the setting was chosen.
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
    """The settings found and how they were measured.

    Attributes:
        session: The settings found, as the ``session`` entry of a manifest.
        before: The settings before.
        target: latency or throughput.
        threads: The CPU threads.
        questions: The number of questions asked.
        rounds: The number of rounds.
        tolerance: The largest difference of logits allowed; None allows any.
        logits_apart: The largest difference that ``session`` makes.
        trials: All measurements.
    """

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
        """ONNX Runtime's defaults, without measurements, as on CUDA."""
        return cls({}, {}, TARGETS[0], threads, 0, 0, None, 0.0, ())

    @property
    def changed(self) -> bool:
        """Whether the settings found differ from those before."""
        return self.session != self.before

    def to_dict(self) -> dict[str, Any]:
        """The ``tuning`` entry of a manifest, as plain JSON values: all but the settings before and after."""
        return {k: v for k, v in asdict(self).items() if k not in {"session", "before"}}

    def lines(self) -> list[str]:
        """The measurements as text, one line per setting."""
        asked = "one at a time" if self.target == "latency" else "many at once"
        text = [
            f"{self.questions} questions {asked}, {self.threads} thread{'s' * (self.threads > 1)}, medians of {self.rounds} "
            "interleaved rounds (range); x is the speed relative to the first of its step",
            f"{'step':<34} {'setting':<34} {'ms per question':>24} {'x':>22}  {'logits moved by':>15}",
        ]
        for t in self.trials:
            ms = f"{t.ms:.2f} ({t.ms_range[0]:.2f} to {t.ms_range[1]:.2f})"
            ratio = f"{t.speedup:.2f} ({t.speedup_range[0]:.2f} to {t.speedup_range[1]:.2f})"
            end = "  <- taken" if t.taken else "" if t.sound else "  above the tolerance: left out"
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
    """Measures graph optimizers (``SESSIONS``), spinning and layouts on this machine.

    Args:
        make: Makes an answerer of the model with the session settings given.
        pairs: (question, context) pairs to measure with.
        stored: The settings before; they stay unless others are ``clearly_faster``. Their other entries are kept.
        target: latency (one question at a time) or throughput (many at once); the layout concerns single questions only.
        tolerance: Settings that move any logit by more than this are left out; None leaves none out.
        seconds: The approximate time for all steps. Large models get fewer questions, and the largest also fewer rounds.
        say: Called with a line before each step.

    Raises:
        InputError: ``target`` is unknown, there are no pairs, or a pair cannot be answered.
    """
    if target not in TARGETS:
        raise InputError(f"target is {target!r}: choose one of {', '.join(TARGETS)}")
    if not pairs:
        raise InputError("there is no question to measure with: give data with questions")
    return _Tuner(make, pairs, dict(stored or {}), target, tolerance, seconds, say).run()


def least_seconds(each: float) -> float:
    """The least seconds that tuning takes for a model that takes ``each`` seconds per question, whatever its limit."""
    return FEWER_ROUNDS * _PASSES * each


class _Tuner:
    """A tuning in progress: the settings found so far, their answerer, and the trials."""

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
        self.rounds = ROUNDS
        self.asked = self._fitting(pairs, seconds)
        searched = [(pair, self._windows(pair)) for pair in spread(pairs, _SEARCHED)]
        few = min(_LAYOUT_QUESTIONS, len(self.asked))
        self.single = spread([pair for pair, windows in searched if len(windows) == 1], few)
        self.several = spread([pair for pair, windows in searched if len(windows) > 1], few)
        if not self.several:
            made = [self._long(pairs, pair) for pair in spread(pairs, few)]
            self.several = [pair for pair in made if len(self._windows(pair)) > 1]
        compared = [w for pair in (*self.several, *self.asked) for w in self._windows(pair)]
        self.compared = spread(compared, _COMPARED)
        self.logits = self._logits(self.answerer)
        self.moved = 0.0
        self.trials: list[Trial] = []

    def run(self) -> Tuning:
        """Runs the three steps."""
        self._step("optimizers", _optimizer_choices(self.session))
        if self.threads > 1:
            if self.target == "latency":
                self._step("idle threads", _idle_choices(self.session))
            self._layout()
        return Tuning(
            self.session,
            self.before,
            self.target,
            self.threads,
            len(self.asked),
            self.rounds,
            self.tolerance,
            self.moved,
            tuple(self.trials),
        )

    # ------------------------------------------------------------ questions

    def _fitting(self, pairs: Sequence[Pair], seconds: float) -> list[Pair]:
        """Evenly spaced questions: as many as the time allows; for throughput enough to keep all threads busy.

        If not even two fit, there are fewer rounds, and at least one question (for throughput, one per thread).
        """
        most = _QUESTIONS if self.target == "latency" else max(_QUESTIONS, 4 * self.threads)
        asked = spread(pairs, most)
        self.answerer.answer(*asked[0])
        probe = spread(asked, 3)
        started = time.perf_counter()
        for question, context in probe:
            self.answerer.answer(question, context)
        each = (time.perf_counter() - started) / len(probe)
        fitting = int(seconds / (ROUNDS * _PASSES * each))
        if fitting < 2:
            self.rounds = FEWER_ROUNDS
            least = 1 if self.target == "latency" else self.threads
            fitting = max(least, int(seconds / (FEWER_ROUNDS * _PASSES * each)))
        return spread(asked, min(most, fitting))

    def _windows(self, pair: Pair) -> list[Window]:
        encoder, settings = self.answerer.encoder, self.answerer.settings
        return encoder.windows(encoder.encode(pair[0]), encoder.encode(pair[1]), **settings.lengths)

    def _long(self, pairs: Sequence[Pair], pair: Pair) -> Pair:
        """The question with its context and those after it, joined until they fill three windows."""
        first = pairs.index(pair)
        context = pair[1]
        for i in range(1, _JOINED):
            if len(self._windows((pair[0], context))) >= 3:
                break
            context += "\n" + pairs[(first + i) % len(pairs)][1]
        return pair[0], context

    # ------------------------------------------------------------ steps

    def _step(self, step: str, choices: Mapping[str, dict[str, Any]]) -> None:
        """Measures settings by name, the current ones first, and keeps the best."""
        first, *others = choices
        self.say(f"measuring {step}")
        answerers = {first: self.answerer, **{name: self.make(choices[name]) for name in others}}
        one = self.target == "latency"
        timings = interleave({n: asking(a, self.asked, one=one) for n, a in answerers.items()}, self.rounds)
        apart = {name: self._apart(a) for name, a in answerers.items()}
        faster = [n for n, t in timings.items() if self._sound(apart[n]) and t.clearly_faster(timings[first])]
        taken = max(faster, key=lambda n: timings[n].speedup, default=first)
        self._record(step, timings, apart, taken, len(self.asked))
        self.session, self.answerer, self.moved = choices[taken], answerers[taken], apart[taken]

    def _layout(self) -> None:
        """Measures the layouts of one question's windows, and keeps the best."""
        settings = SessionSettings.from_manifest(self.session)
        stored = settings.one if settings.threads in {None, self.threads} else None
        model, encoder, known = model_of(self.answerer), self.answerer.encoder, self.answerer.settings
        ways = sorted(_LAYOUTS, key=lambda way: way != stored)
        answerers = {way: Answerer(encoder, known, model.with_layout(way)) for way in ways}
        apart = {way: self._apart(answerers[way]) for way in ways}
        found: list[tuple[str, list[int], dict[str | None, Timing]]] = []
        for kind, pairs in (("of one window", self.single), ("of several windows", self.several)):
            if not pairs:
                continue
            self.say(f"measuring the layout of questions {kind}")
            counts = [len(self._windows(pair)) for pair in pairs]
            first = {self._plan(way, counts): way for way in reversed(ways)}  # the first of layouts that run the same
            alone = [way for way in ways if first[self._plan(way, counts)] == way]
            work = {str(way): asking(answerers[way], pairs, one=True) for way in alone}
            timed = interleave(work, self.rounds)
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
        if taken != stored or stored != settings.one:  # or it was measured with other threads
            rest = {k: v for k, v in self.session.items() if k != "layout"}
            self.session = rest if taken is None else {**rest, "layout": {"one": taken, "threads": self.threads}}
            self.answerer, self.moved = answerers[taken], apart[taken]

    def _plan(self, way: str | None, counts: Sequence[int]) -> tuple[int, ...]:
        """The number of windows of each question that run narrow."""
        settings = SessionSettings(one=way)
        return tuple(narrow_windows(settings, count, self.threads) for count in counts)

    # ------------------------------------------------------------ logits and trials

    def _logits(self, answerer: Answerer) -> list[Logits]:
        # One by one: windows side by side would need a second session, with its own copy of all weights.
        return [answerer.model.run([window])[0] for window in self.compared]

    def _apart(self, answerer: Answerer) -> float:
        return float(differences(self._logits(answerer), self.logits).max())

    def _sound(self, apart: float) -> bool:
        return self.tolerance is None or apart <= self.tolerance

    def _record(
        self, step: str, timings: Mapping[str, Timing], apart: Mapping[str, float], taken: str, asked: int
    ) -> None:
        for name, t in timings.items():
            median, least, most = (1000 * seconds / asked for seconds in (t.median, t.least, t.most))
            speed, sound = (t.speedup, t.speedup_range), self._sound(apart[name])
            self.trials.append(Trial(step, name, median, (least, most), *speed, apart[name], sound, name == taken))


def model_of(answerer: Answerer) -> OnnxModel:
    """The ONNX model of an answerer. Raises InputError if it has another kind of model."""
    if not isinstance(answerer.model, OnnxModel):
        raise InputError("only an ONNX model has session settings: give a bundle")
    return answerer.model


def _optimizer_choices(session: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Settings by name, ``session`` first: those with each known set of optimizers left out."""
    rest = {k: v for k, v in session.items() if k != "disabled_optimizers"}
    found: dict[str, dict[str, Any]] = {}
    for names in (session.get("disabled_optimizers", []), *(s.get("disabled_optimizers", []) for s in SESSIONS)):
        name = f"without {', '.join(names)}" if names else "all of the runtime's"
        found.setdefault(name, {**({"disabled_optimizers": list(names)} if names else {}), **rest})
    found[next(iter(found))] = session
    return found


def _idle_choices(session: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Settings by name, ``session`` first: idle threads spin, which is the default, or sleep."""
    rest = {k: v for k, v in session.items() if k != "config"}
    config = {k: v for k, v in session.get("config", {}).items() if k != SPINNING}
    sleep = {**rest, "config": {**config, SPINNING: "0"}}
    spin = {**rest, "config": config} if config else rest
    if session.get("config", {}).get(SPINNING) == "0":
        return {"sleep": session, "spin": spin}
    return {"spin": session, "sleep": sleep}


def asking(answerer: Answerer, pairs: Sequence[Pair], *, one: bool) -> Callable[[], object]:
    """A function that answers all pairs, for timing: one question at a time, or many at once."""
    if one:
        return lambda: [answerer.answer(question, context) for question, context in pairs]
    return lambda: answerer.answer_batch(pairs)


def _plan_name(plan: Sequence[int], counts: Sequence[int]) -> str:
    if not any(plan):
        return "wide"
    return "narrow" if list(plan) == list(counts) else "full rounds narrow, the rest wide"
