"""The metrics at /metrics, for Prometheus. Each server has its own registry; nothing is global."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from qadeploy.core.drift import Distribution, Drift, Figure
from qadeploy.inference.answerer import Answerer

CONTENT_TYPE = CONTENT_TYPE_LATEST
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_WINDOWS = (1, 2, 4, 8, 16, 32, 64, 128)
_TOKENS = (64, 128, 256, 384, 512, 1024, 2048, 4096, 8192, 16384)


class Queue(Protocol):
    """The depth of a queue, read at each request for the metrics: what waits, and in ``questions`` also what runs."""

    questions: int
    windows: int
    tokens: int

    @property
    def wait(self) -> float:
        """Seconds until a new request would begin to run."""
        ...


class _DriftCollector(Collector):
    """The drift figures of the questions that each bundle answered, and of the held-out questions in its manifest."""

    def __init__(self) -> None:
        self.shown: dict[str, tuple[Drift, Mapping[Figure, Distribution]]] = {}  # by the hash of the bundle

    def collect(self) -> Iterator[Metric]:
        """Yields both metric families."""
        asked = HistogramMetricFamily(
            "qadeploy_drift", "Figures of the questions that were answered.", labels=("hash", "figure")
        )
        held_out = GaugeMetricFamily(
            "qadeploy_drift_held_out",
            "The share of the held-out questions whose figure was at most le, as in the bundle's manifest.",
            labels=("hash", "figure", "le"),
        )
        for key, (drift, stored) in list(self.shown.items()):
            for figure, found in drift.distributions().items():
                buckets = [(bound, float(count)) for bound, count in _at_most(found)]
                asked.add_metric((key, figure), buckets, found.total)
            for figure, found in stored.items():
                for bound, count in _at_most(found):
                    held_out.add_metric((key, figure, bound), count / sum(found.counts))
        yield asked
        yield held_out


def _at_most(found: Distribution) -> Iterator[tuple[str, int]]:
    """Each bound as Prometheus writes it, and how many questions had at most that value."""
    return zip(map(floatToGoString, (*found.bounds, float("inf"))), found.at_most(), strict=True)


class Metrics:
    """The metrics of one server. Thread-safe."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self._requests = Counter(
            "qadeploy_requests", "Requests answered, by route and status.", ["route", "status"], registry=registry
        )
        self._seconds = Histogram(
            "qadeploy_request_seconds",
            "From the head of a request to the end of its response.",
            ["route"],
            buckets=_SECONDS,
            registry=registry,
        )
        self._stages = Histogram(
            "qadeploy_stage_seconds",
            "Stages: queue (until the first window of a request runs), search, tokenize and decode (per question), run (per batch).",
            ["stage"],
            buckets=_SECONDS,
            registry=registry,
        )
        self._stage = {name: self._stages.labels(name) for name in ("queue", "search", "tokenize", "run", "decode")}
        self._batch_windows = Histogram(
            "qadeploy_batch_windows", "Windows per run.", buckets=_WINDOWS, registry=registry
        )
        self._batch_tokens = Histogram(
            "qadeploy_batch_tokens", "Tokens per run, without padding.", buckets=_TOKENS, registry=registry
        )
        self._dropped = self._counter(
            "dropped",
            "Requests without an answer: full, deadline, disconnect.",
            "reason",
            "full",
            "deadline",
            "disconnect",
        )
        about = "Connections that the server closed, by reason: limit (too many connections), "
        about += "body (the rest of a refused body, or too much uploaded), response (not read)."
        self._cut = self._counter("connections_cut", about, "reason", "limit", "body", "response")
        self._bad_logits = Counter(
            "qadeploy_bad_logits", "Requests whose logits were NaN or infinite: the model is broken.", registry=registry
        )
        self._bundle = Gauge(
            "qadeploy_bundle_info",
            "Always 1; the labels say what runs. After a reload, also the previous bundle until its last request has ended.",
            ["bundle", "hash", "precision", "version", "device", "workers"],
            registry=registry,
        )
        self._drift = _DriftCollector()
        registry.register(self._drift)
        self._reloads = self._counter("reloads", "Reloads of the bundle, by result.", "result", "done", "failed")
        self._cache = self._gauges(
            context_cache_hits="Contexts that were found in the cache.",
            context_cache_misses="Contexts that were tokenised.",
            context_cache_bytes="Memory of the tokenised contexts that are kept.",
        )
        self._queue = self._gauges(
            queue_questions="Questions that wait or run.",
            queue_windows="Windows that wait.",
            queue_tokens="Tokens that wait; estimated for texts that are not tokenised yet.",
            queue_wait_seconds="Seconds until a new request would begin to run, at the recent speed.",
        )

    def _gauges(self, **about: str) -> list[Gauge]:
        return [Gauge(f"qadeploy_{name}", text, registry=self._registry) for name, text in about.items()]

    def _counter(self, name: str, about: str, label: str, *values: str) -> Counter:
        """A counter with one label, which starts at 0 for each of the given values."""
        made = Counter(f"qadeploy_{name}", about, [label], registry=self._registry)
        for each in values:
            made.labels(each)
        return made

    def show(self, answerer: Answerer, queue: Queue, labels: Sequence[str], drift: Drift) -> None:
        """Adds a bundle (``labels``) with its context cache, the depth of its queue, and the drift of its questions."""
        self._bundle.labels(*labels).set(1)
        bundle = answerer.bundle
        self._drift.shown[bundle.hash if bundle else ""] = drift, bundle.checked.drift if bundle else {}
        for gauge, cached in zip(self._cache, ("hits", "misses", "bytes"), strict=True):
            gauge.set_function(lambda name=cached: getattr(answerer.stats(), name))  # type: ignore[misc]
        for gauge, depth in zip(self._queue, ("questions", "windows", "tokens", "wait"), strict=True):
            gauge.set_function(lambda name=depth: getattr(queue, name))  # type: ignore[misc]

    def drift_of(self, bundle: str) -> Drift:
        """The drift of the questions that the bundle with this hash has answered so far; a reload of it continues them."""
        shown = self._drift.shown.get(bundle)
        return shown[0] if shown else Drift()

    def forget(self, labels: Sequence[str]) -> None:
        """Removes the labels of a bundle that no longer runs with them."""
        self._bundle.remove(*labels)

    def forget_drift(self, bundle: str) -> None:
        """Removes the drift of the bundle with this hash, which is no longer used."""
        self._drift.shown.pop(bundle, None)

    def connections(self, count: Callable[[], float]) -> None:
        """Adds the number of open connections."""
        Gauge("qadeploy_connections", "Open connections.", registry=self._registry).set_function(count)

    def cut(self, reason: str) -> None:
        """Counts a connection that the server cut; ``reason`` is limit, body or response."""
        self._cut.labels(reason).inc()

    def stage(self, name: str, seconds: float) -> None:
        """Records the time of a stage: queue, search, tokenize or decode."""
        self._stage[name].observe(seconds)

    def ran(self, seconds: float, windows: int, tokens: int) -> None:
        """Records a run of the model."""
        self._stage["run"].observe(seconds)
        self._batch_windows.observe(windows)
        self._batch_tokens.observe(tokens)

    def dropped(self, reason: str) -> None:
        """Counts a request without an answer; ``reason`` is full, deadline or disconnect."""
        self._dropped.labels(reason).inc()

    def reloaded(self, result: str) -> None:
        """Counts a reload; ``result`` is done or failed."""
        self._reloads.labels(result).inc()

    def bad_logits(self) -> None:
        """Counts a request whose logits were NaN or infinite."""
        self._bad_logits.inc()

    def responded(self, route: str, status: int, seconds: float) -> None:
        """Counts a response."""
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def text(self) -> bytes:
        """All metrics in the text format of Prometheus."""
        return generate_latest(self._registry)
