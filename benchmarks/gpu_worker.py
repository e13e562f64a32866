"""The process of benchmarks/gpu.py that measures one model: ``python -m benchmarks.gpu_worker PLAN.json``."""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu_plan import (
    BASE,
    COMPILED,
    E2E_ALL,
    E2E_ONE,
    EAGER,
    LATENCY,
    MANY_384,
    MIXED,
    ONE_128,
    ONE_384,
    OPTIMUM,
    ORT_PLAIN,
    PIPELINE,
    REFERENCE,
    SDPA,
    SORTED,
    THROUGHPUT,
    GpuVariant,
    GpuWatch,
    ModelPlan,
)
from benchmarks.gpu_variants import Subject
from benchmarks.harness import Json
from qadeploy.core.metrics import bootstrap_interval, score
from qadeploy.records import Answer, Example
from qadeploy.timing import spread, turns

_WATCHED = (THROUGHPUT, SORTED, PIPELINE)  # the variants whose GPU utilisation is measured
_SHORT = 0.02  # minimum seconds of a round, so that the clock can resolve it
_SLOW = 1.0  # a run that takes longer, in seconds, is not repeated to warm up
_LONG, _FEWEST = 1.5, 3  # a variant has enough rounds after this many seconds, if it has had this many


class GpuWorker:
    """Measures one model and writes a line of JSON for each fact as soon as it is known."""

    def __init__(self, plan: ModelPlan) -> None:
        self.plan = plan
        self.gpu = GpuWatch(plan.device)
        self.failed: set[str] = set()

    def say(self, kind: str, **values: Any) -> None:
        """Writes one line."""
        with Path(self.plan.rows).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"kind": kind, "model": self.plan.model, **values}) + "\n")

    def guarded(self, name: str, step: str, work: Callable[[], object]) -> bool:
        """Runs a variant's step and returns whether it succeeded; a failure becomes a row, and the others go on.

        If the process crashes, the failure is attributed to the variant that began last.
        """
        self.say("begin", variant=name)
        try:
            if time.time() > self.plan.until:
                raise TimeoutError("the time was up")
            work()
        except Exception as error:  # a variant may raise anything that its library raises
            self.failed.add(name)
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            self.say("failed", variant=name, step=step, reason=reason)
            return False
        return True

    def run(self) -> None:
        """Loads and times every variant."""
        started = time.monotonic()
        subject = Subject(self.plan)
        lengths = [len(w) for w in subject.windows]
        facts = {
            "questions": len(subject.pairs),
            "windows": len(lengths),
            "tokens": {"mean": float(np.mean(lengths)), "least": min(lengths), "most": max(lengths)},
            "graph": subject.fp16.to_dict(),
            "seconds_to_load": time.monotonic() - started,
        }
        self.say("subject", **facts)
        right = self.right_answers(subject)
        loaded: dict[str, GpuVariant] = {}
        loaders: list[tuple[str, Callable[[], Any]]] = [
            (LATENCY, subject.load_ours),
            (ORT_PLAIN, subject.load_plain),
            (EAGER, partial(subject.load_torch, EAGER)),
            (SDPA, partial(subject.load_torch, SDPA)),
            (SORTED, partial(subject.load_torch, SORTED)),
            (PIPELINE, subject.load_pipeline),
        ]
        if self.plan.model == BASE:
            loaders.append((OPTIMUM, subject.load_optimum))
        for name, load in loaders:
            self.load(name, load, loaded, subject, right)
        self.time(subject, loaded, "main")
        late: dict[str, GpuVariant] = {}
        self.load(COMPILED, partial(subject.load_torch, COMPILED), late, subject, right)
        if late:
            known = {k: v for k, v in loaded.items() if k in {LATENCY, THROUGHPUT, EAGER} and k not in self.failed}
            self.time(subject, {**known, **late}, "compiled")
        self.gpu.close()
        self.say("done", seconds=time.monotonic() - started)

    def right_answers(self, subject: Subject) -> list[Answer]:
        """The answers of torch fp32 on the same device, with TF32 off; if it fails, none, and nothing is compared."""
        found: list[Answer] = []

        def work() -> None:
            variant = subject.load_reference()
            found.extend(variant.all(subject.pairs) if variant.all else [])
            self.say("reference", f1=score(subject.examples, found).f1)

        if REFERENCE not in self.plan.skip:
            self.guarded(REFERENCE, "load", work)
        subject.checkpoint.model.to("cpu")
        return found

    def load(
        self,
        name: str,
        load: Callable[[], Any],
        loaded: dict[str, GpuVariant],
        subject: Subject,
        right: Sequence[Answer],
    ) -> None:
        """Loads a variant, or several that share a model, and lets each answer all questions once."""
        if name in self.plan.skip:
            return

        def work() -> None:
            self.release()
            before, started = self.gpu.memory(), time.monotonic()
            made = load()
            for variant in [made] if isinstance(made, GpuVariant) else list(made):
                answers = [] if variant.all is None else variant.all(subject.pairs)
                if variant.run is not None:
                    variant.run(subject.windows)
                if variant.name == LATENCY and variant.one is not None:  # on the path that will be timed
                    answers = [variant.one(question, context) for question, context in subject.pairs]
                after = self.gpu.memory()
                self.say(
                    "variant",
                    variant=variant.name,
                    precision=variant.precision,
                    seconds_to_first_pass=time.monotonic() - started,
                    memory_mib=None if before is None or after is None else after - before,
                    notes=variant.notes(),
                    **compare(subject.examples, answers, right),
                )
                loaded[variant.name] = variant

        self.guarded(name, "load", work)

    def release(self) -> None:
        """Frees the memory that torch keeps from earlier variants, which would otherwise count for the next one."""
        gc.collect()
        if self.plan.on_gpu:
            import torch

            torch.cuda.empty_cache()

    def time(self, subject: Subject, loaded: Mapping[str, GpuVariant], phase: str) -> None:
        """Times every scenario, with the variants in turns."""
        one = spread(subject.pairs, 4 if self.plan.dry else 64)
        some = spread(subject.pairs, 128)
        many = 2 if self.plan.dry else 32
        works: dict[str, tuple[int, Callable[[GpuVariant], Callable[[], object] | None]]] = {
            ONE_128: (1, lambda v: _call(v.run, [subject.window(128)])),
            ONE_384: (1, lambda v: _call(v.run, [subject.window(384)])),
            MANY_384: (many, lambda v: _call(v.run, [subject.window(384)] * many)),
            MIXED: (len(subject.windows), lambda v: _call(v.run, subject.windows)),
            E2E_ONE: (len(one), lambda v: v.one and partial(_each, v.one, one)),
            E2E_ALL: (len(some), lambda v: _call(v.all, some)),
        }
        for scenario, (count, make) in works.items():
            work = {n: f for n, v in loaded.items() if scenario in v.scenarios and (f := make(v)) is not None}
            times = self.rounds({n: f for n, f in work.items() if n not in self.failed}, scenario)
            for name, seconds in times.items():
                if not seconds:
                    continue
                row = {
                    "median_ms": 1e3 * float(np.median(seconds)),
                    "least_ms": 1e3 * min(seconds),
                    "most_ms": 1e3 * max(seconds),
                }
                usage = None
                if scenario in {MIXED, E2E_ALL} and name in _WATCHED and time.time() < self.plan.until:
                    usage = self.gpu.utilisation(work[name])
                self.say(
                    "row",
                    phase=phase,
                    scenario=scenario,
                    variant=name,
                    rounds=len(seconds),
                    seconds=seconds,
                    items=count,
                    items_per_second=count / float(np.median(seconds)),
                    utilisation=usage,
                    **row,
                )

    def rounds(self, work: Mapping[str, Callable[[], object]], scenario: str) -> dict[str, list[float]]:
        """Seconds of each variant's rounds; a round of a short task is the mean of several runs."""
        times: dict[str, list[float]] = {name: [] for name in work}
        repeats: dict[str, int] = {}
        for name, run in work.items():

            def prepare(name: str = name, run: Callable[[], object] = run) -> None:
                seconds = 1.0
                for _ in range(2):  # the first run does not count; a slow one is not repeated
                    started = time.perf_counter()
                    run()
                    seconds = time.perf_counter() - started
                    if seconds > _SLOW:
                        break
                repeats[name] = max(1, min(50, int(_SHORT / max(1e-6, seconds))))

            self.guarded(name, scenario, prepare)
        gc.collect()
        for order in turns(list(repeats), self.plan.rounds):
            for name in order:
                enough = len(times[name]) >= _FEWEST and sum(times[name]) * repeats[name] > _LONG
                if name in self.failed or enough or time.time() > self.plan.until:
                    continue

                def measure(name: str = name) -> None:
                    started = time.perf_counter()
                    for _ in range(repeats[name]):
                        work[name]()
                    times[name].append((time.perf_counter() - started) / repeats[name])

                self.guarded(name, scenario, measure)
        return times


def _call(run: Callable[[Any], object] | None, given: Any) -> Callable[[], object] | None:
    return None if run is None else partial(run, given)


def _each(ask: Callable[[str, str], Answer], pairs: Sequence[tuple[str, str]]) -> list[Answer]:
    return [ask(question, context) for question, context in pairs]


def compare(examples: Sequence[Example], answers: Sequence[Answer], right: Sequence[Answer]) -> Json:
    """The share of answers at the same place as torch fp32's, and the paired difference of F1 with its interval."""
    if not answers or not right:
        f1 = score(examples, answers).f1 if answers else None
        return {"equal_answers": None, "f1": f1, "f1_change": None, "f1_change_interval": None}
    own, theirs = score(examples, answers), score(examples, right)
    difference = own.rows_f1 - theirs.rows_f1
    equal = [(a.text, a.start, a.end) == (b.text, b.start, b.end) for a, b in zip(answers, right, strict=True)]
    return {
        "equal_answers": float(np.mean(equal)),
        "f1": own.f1,
        "f1_change": 100 * float(difference.mean()),
        "f1_change_interval": list(bootstrap_interval(difference)),
    }


def main() -> None:
    """Reads the plan and carries it out."""
    spec = Path(sys.argv[1])
    values = json.loads(spec.read_text(encoding="utf-8"))
    GpuWorker(ModelPlan(**{**values, "skip": tuple(values["skip"])})).run()


if __name__ == "__main__":
    main()
