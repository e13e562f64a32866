"""Runs the variants of a bench in turns on the same questions, and reports on all of them."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qadeploy.bench import own
from qadeploy.bench.cold import cold
from qadeploy.bench.limits import FLOAT, Limits
from qadeploy.bench.options import BenchOptions
from qadeploy.bench.peak import Peak, measure_peak
from qadeploy.bench.peers import PEERS
from qadeploy.bench.peers.setup import Setup
from qadeploy.bench.split import Split, measure_split
from qadeploy.bench.variant import Asker, Pairs, Variant
from qadeploy.bench.workload import Workload, calibration, windows_of
from qadeploy.core.metrics import Scores, bootstrap_interval, choose_metric, score
from qadeploy.core.settings import any_unanswerable
from qadeploy.errors import FailureError, LoadTimeoutError, MissingExtraError
from qadeploy.inference.bundle import Bundle
from qadeploy.inference.doctor import diagnose
from qadeploy.inference.session import OnnxModel
from qadeploy.machine import usable_cpus
from qadeploy.records import Answer, Example
from qadeploy.timing import spread, turns

if TYPE_CHECKING:
    from qadeploy.bench.operations import Operations

_WARM_UP_QUESTIONS = 8
_ROW = 10  # questions asked one at a time before it is another variant's turn
_SPLIT_QUESTIONS = 48
_SPLIT_ROUNDS = 3
_CALIBRATION_QUESTIONS = 128
_COLD_QUESTIONS = 16
_COLD_PROCESSES = 3

Say = Callable[[str], object]


@dataclass(frozen=True, slots=True)
class BenchRequest:
    """What to bench, and how: ``bundles`` (peers and limits refer to the first) against ``peers``.

    ``broken`` are bundles that could not be opened. ``known`` are examples that a peer may calibrate on, except those on
    contexts of the workload. ``workload``, ``peers`` and ``checkpoint`` come from the options of the same purpose.
    """

    bundles: Sequence[Bundle]
    broken: Mapping[str, Exception]
    workload: Workload
    peers: Sequence[str]
    checkpoint: Path
    known: Sequence[Example]
    options: BenchOptions = field(default_factory=BenchOptions)
    limits: Limits = field(default_factory=Limits)


@dataclass(slots=True)
class _Measured:
    """The measurements of one variant so far; ``status`` is "ok" until something fails."""

    variant: Variant
    asker: Asker | None = None
    status: str = "ok"
    seconds: list[float] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    cold: dict[str, Any] = field(default_factory=dict)
    split: Split | None = None

    @property
    def ok(self) -> bool:
        return self.status == "ok"


def bench(request: BenchRequest, say: Say) -> dict[str, Any]:
    """Measures the bundles and the peers on one workload and returns everything as plain JSON values.

    In each round the variants take turns, and each gets all questions at once; figures are medians over rounds. A
    variant that fails is reported with the reason and does not stop the others.
    """
    workload = request.workload
    null = any_unanswerable(workload.examples)
    threads = request.options.threads or usable_cpus()
    peak, peak_note = _peak(threads, say)
    with tempfile.TemporaryDirectory(prefix="qadeploy-bench-") as folder:
        found = [_Measured(v) for v in own.variants(request.bundles, request.options, null)]
        found[0].asker = found[0].variant.load()  # without the first bundle there is nothing to compare
        for measured in found[1:]:
            _load(measured)
        device = next(
            (str(getattr(m.asker.answerer.model, "device", "cpu")) for m in found if m.asker and m.asker.answerer),
            "cpu",
        )
        others = calibration(request.known, workload, _CALIBRATION_QUESTIONS)
        trust, bundle = request.options.trust_remote_code, request.bundles[0]
        setup = Setup(request.checkpoint, bundle, device, threads, null, others, Path(folder), trust)
        for name in request.peers:
            say(f"preparing {name}")
            found.append(_prepared(name, setup))
        say(
            f"asking {len(workload.examples)} questions in {request.options.rounds} rounds, {len(found)} variants in turns"
        )
        _ask(found, request)
        say("measuring start-up time and memory, each variant in its own processes")
        for measured in found:
            if measured.ok:
                mine = not measured.variant.peer
                measured.cold = cold(measured.variant, workload.pairs[:_COLD_QUESTIONS], _COLD_PROCESSES if mine else 1)
    for measured in found:
        if measured.ok and not measured.variant.peer:
            say(f"measuring the parts of the time of {measured.variant.name}")
            _guard(measured, _split, measured, workload, null)
    if peak:
        peak = peak.best(measure_peak(threads))
    report = _report(request, found, peak, peak_note, device, threads)
    report["limits"] = request.limits.judge(report)
    return report


@contextmanager
def _failures(measured: _Measured) -> Iterator[None]:
    """Makes an error the variant's status: it may break in any way, and the bench goes on without it."""
    try:
        yield
    except LoadTimeoutError:  # its thread goes on and would disturb all other measurements
        raise
    except Exception as error:
        measured.status = status_of(error)
        measured.asker = None


def _guard(measured: _Measured, act: Callable[..., object], *given: Any) -> None:
    """Calls ``act`` with the asker of a variant that has not failed, and with ``given``."""
    if measured.asker:
        with _failures(measured):
            act(measured.asker, *given)


def status_of(error: Exception) -> str:
    """The status of a variant that raised ``error``."""
    if isinstance(error, MissingExtraError):
        return f"not installed: {error.fix} ({error.package})"
    return f"failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _load(measured: _Measured) -> None:
    with _failures(measured):
        measured.asker = measured.variant.load()


def _prepared(name: str, setup: Setup) -> _Measured:
    measured = _Measured(Variant(name, "", 0, "", {}, name))
    with _failures(measured):
        measured = _Measured(PEERS[name](setup))
        _load(measured)
    return measured


def _ask(found: Sequence[_Measured], request: BenchRequest) -> None:
    """Warms up, asks all questions ``rounds`` times, then some of them one at a time; the variants take turns.

    Single questions are asked in rows of ``_ROW``. Each row begins with a question that is not timed: idle threads of
    the previous variant spin for some milliseconds and would take a core from the variant that is measured.
    """
    pairs = request.workload.pairs
    longest = sorted(pairs, key=lambda pair: -len(pair[1]))[:1]
    by_name = {m.variant.name: m for m in found}

    def warm_up(asker: Asker) -> None:
        asker.answer_all([*spread(pairs, _WARM_UP_QUESTIONS), *longest])
        asker.answer_one(*pairs[0])

    def all_at_once(asker: Asker, measured: _Measured) -> None:
        started = time.perf_counter()
        measured.answers = asker.answer_all(pairs)
        measured.seconds.append(time.perf_counter() - started)
        if len(measured.answers) != len(pairs):
            raise FailureError(f"gave {len(measured.answers)} answers to {len(pairs)} questions")

    for measured in found:
        _guard(measured, warm_up)
    for order in turns(list(by_name), request.options.rounds):
        for name in order:
            _guard(by_name[name], all_at_once, by_name[name])
    asked = spread(pairs, request.options.latency_questions)
    rows = [asked[i : i + _ROW] for i in range(0, len(asked), _ROW)]
    for row, order in zip(rows, turns(list(by_name), len(rows)), strict=True):
        for name in order:
            _guard(by_name[name], _one_by_one, row, by_name[name].latencies)


def _one_by_one(asker: Asker, row: Pairs, latencies: list[float]) -> None:
    asker.answer_one(*row[0])
    for question, context in row:
        started = time.perf_counter()
        asker.answer_one(question, context)
        latencies.append(1000 * (time.perf_counter() - started))


def _split(asker: Asker, measured: _Measured, workload: Workload, null: bool) -> None:
    if asker.answerer:  # a bundle has one
        pairs = spread(workload.pairs, _SPLIT_QUESTIONS)
        measured.split = measure_split(asker.answerer, pairs, _SPLIT_ROUNDS, allow_no_answer=null)


def _remark(measured: _Measured) -> str:
    """The variant's own remark and, on CUDA, the paths that its windows took."""
    model = measured.asker.answerer.model if measured.asker and measured.asker.answerer else None
    notes = model.notes() if isinstance(model, OnnxModel) else []
    return "; ".join(filter(None, [measured.variant.remark, *notes]))


def _peak(threads: int, say: Say) -> tuple[Peak | None, str]:
    say("measuring the machine's peak")
    try:
        return measure_peak(threads), ""
    except MissingExtraError as error:
        return None, status_of(error)


# ---------------------------------------------------------------- the report


def _report(
    request: BenchRequest, found: Sequence[_Measured], peak: Peak | None, peak_note: str, device: str, threads: int
) -> dict[str, Any]:
    workload = request.workload
    metric = choose_metric(request.options.metric or request.bundles[0].settings.metric, workload.examples)
    scores = {m.variant.name: score(workload.examples, m.answers, metric) for m in found if m.ok}
    baseline = _baseline(found)
    work = _work(request, found)
    rows = []
    for measured in found:
        name = measured.variant.name
        if not measured.ok:
            rows.append(_bad_row(name, measured.variant.peer, measured.status))
            continue
        rates = len(workload.examples) / np.asarray(measured.seconds)
        per_second = float(np.median(rates))
        mine = work.get(name, work[""])
        rows.append(
            {
                **_bad_row(name, measured.variant.peer, "ok"),
                "precision": measured.variant.precision,
                "remark": _remark(measured),
                "questions_per_second": per_second,
                "questions_per_second_range": [float(rates.min()), float(rates.max())],
                "windows_per_second": mine.windows and per_second * mine.windows / len(workload.examples),
                "seconds_by_round": measured.seconds,
                "latency_ms": {f"p{q}": float(np.percentile(measured.latencies, q)) for q in (50, 95, 99)},
                "latency_questions": len(measured.latencies),
                "size_bytes": measured.variant.size,
                **measured.cold,
                "split": measured.split and measured.split.to_dict(),
                "peak_share": _share(measured, peak, mine, len(workload.examples), per_second),
                **scores[name].to_dict(),
                "f1_drop": _drop(name, found, scores),
                "speedup": baseline and _ratios(baseline.seconds, measured.seconds),
                "latency_speedup": baseline and _ratios(baseline.latencies, measured.latencies),
            }
        )
    rows += [_bad_row(name, "", status_of(error)) for name, error in request.broken.items()]
    first = work[""]
    return {
        "environment": {**diagnose(), "threads": threads, "device": device},
        "bundles": [{"name": b.name, "sha256": b.hash, "precision": b.precision} for b in request.bundles],
        "workload": {
            "source": workload.source,
            "questions": len(workload.examples),
            "metric": metric,
            "windows": first.windows,
            "operations_per_question": first.operations and first.operations / len(workload.examples),
            "operations_note": first.note,
        },
        "peak": asdict(peak) if peak else None,
        "peak_note": peak_note,
        "rounds": request.options.rounds,
        "speedup_against": baseline.variant.name if baseline else "",
        "speedup_against_peer": bool(baseline and baseline.variant.peer),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "variants": rows,
    }


def _bad_row(name: str, peer: str, status: str) -> dict[str, Any]:
    return {"name": name, "peer": peer, "status": status}


def _baseline(found: Sequence[_Measured]) -> _Measured | None:
    """The pipeline if it ran, otherwise the first peer that ran, otherwise the first variant that ran."""
    sound = [m for m in found if m.ok]
    ranked = sorted(sound, key=lambda m: (m.variant.peer != "pipeline", not m.variant.peer))
    return ranked[0] if ranked else None


def _ratios(first: Sequence[float], these: Sequence[float]) -> dict[str, Any]:
    """How many times as fast: the median ratio of neighbouring measurements, with the lowest and the highest."""
    ratios = np.asarray(first) / np.asarray(these)
    return {"median": float(np.median(ratios)), "range": [float(ratios.min()), float(ratios.max())]}


def _drop(name: str, found: Sequence[_Measured], scores: Mapping[str, Scores]) -> dict[str, Any] | None:
    """Points of F1 below the best other float variant, with the paired interval; None if there is no such variant."""
    others = [m.variant.name for m in found if m.ok and m.variant.precision in FLOAT and m.variant.name != name]
    if not others:
        return None
    best = max(others, key=lambda other: scores[other].f1)
    difference = scores[best].rows_f1 - scores[name].rows_f1
    interval = list(bootstrap_interval(difference))
    return {"points": 100.0 * float(difference.mean()), "interval": interval, "against": best}


@dataclass(frozen=True, slots=True)
class _Work:
    """The work of one of our variants: the workload's windows, and their useful operations."""

    windows: int | None = None
    operations: float | None = None
    counted: Operations | None = None
    note: str = ""


def _work(request: BenchRequest, found: Sequence[_Measured]) -> dict[str, _Work]:
    """The work of our own variants by name; "" stands for the first bundle, whose work counts for peers too."""
    work: dict[str, _Work] = {}
    for number, (bundle, measured) in enumerate(zip(request.bundles, found, strict=False)):
        answerer = measured.asker.answerer if measured.asker else None
        if answerer is None:
            continue
        lengths = [len(w) for w in windows_of(answerer.encoder, answerer.settings, request.workload.examples)]
        checkpoint = source_of(bundle) if number else request.checkpoint
        counted, note = _operations(checkpoint, request.options.trust_remote_code)
        entry = _Work(len(lengths), counted.of(lengths) if counted else None, counted, note)
        work[measured.variant.name] = entry
        if number == 0:
            work[""] = entry
    return {"": _Work(), **work}


def source_of(bundle: Bundle) -> Path:
    """The PyTorch checkpoint that a bundle was made from, by its manifest."""
    return Path(bundle.manifest["source"]["checkpoint"])


def _operations(checkpoint: Path, trust_remote_code: bool) -> tuple[Operations | None, str]:
    try:
        from qadeploy.bench.operations import count_operations

        return count_operations(checkpoint, trust_remote_code=trust_remote_code), ""
    except ImportError as error:
        return None, f"not counted: the package {error.name} is not installed"
    except FailureError as error:
        return None, f"not counted: {error}"


def _share(
    measured: _Measured, peak: Peak | None, work: _Work, questions: int, per_second: float
) -> dict[str, Any] | None:
    """Useful operations per second as a share, 0 to 1, of the peak measured at that precision.

    It is measured from text to answers and, for our own variants, for the model alone; None if a figure is not known.
    """
    most = peak.of(measured.variant.precision) if peak else None
    if most is None or work.operations is None or work.counted is None:
        return None
    split = measured.split
    alone = split and work.counted.of(split.windows) / (split.questions * split.run / 1000) / most
    return {"text_to_answers": work.operations / questions * per_second / most, "model_alone": alone}
