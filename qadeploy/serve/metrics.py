"""The metrics at /metrics, for Prometheus. Each server has its own registry; nothing is global."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from qadeploy.core.drift import Distribution, Drift, Figure
from qadeploy.inference.answerer import Answerer

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_WINDOWS = (1, 2, 4, 8, 16, 32, 64, 128)
_TOKENS = (64, 128, 256, 384, 512, 1024, 2048, 4096, 8192, 16384)


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
    """The metrics of one server. Thread-safe.

    Attributes:
        dropped: Counts requests without an answer, by ``full``, ``deadline`` or ``disconnect``.
        cut: Counts connections that the server cut, by ``limit``, ``body`` or ``response``.
        reloads: Counts reloads, by ``done`` or ``failed``.
        bad_logits: Counts requests whose logits were NaN or infinite.
    """

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        histogram = partial(Histogram, registry=registry)
        self._requests = Counter(
            "qadeploy_requests", "Requests answered, by route and status.", ["route", "status"], registry=registry
        )
        about = "From the head of a request to the end of its response."
        self._seconds = histogram("qadeploy_request_seconds", about, ["route"], buckets=_SECONDS)
        about = "Stages: queue (until the first window of a request runs), search, tokenize and decode (per question), run (per batch)."
        stages = histogram("qadeploy_stage_seconds", about, ["stage"], buckets=_SECONDS)
        self._stage = {name: stages.labels(name) for name in ("queue", "search", "tokenize", "run", "decode")}
        self._batch_windows = histogram("qadeploy_batch_windows", "Windows per run.", buckets=_WINDOWS)
        self._batch_tokens = histogram("qadeploy_batch_tokens", "Tokens per run, without padding.", buckets=_TOKENS)
        about = "Requests without an answer: full, deadline, disconnect."
        self.dropped = self._counter("dropped", about, "reason", "full", "deadline", "disconnect")
        about = "Connections that the server closed, by reason: limit (too many connections), "
        about += "body (the rest of a refused body, or too much uploaded), response (not read)."
        self.cut = self._counter("connections_cut", about, "reason", "limit", "body", "response")
        self.bad_logits = Counter(
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
        self.reloads = self._counter("reloads", "Reloads of the bundle, by result.", "result", "done", "failed")
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

    def show(self, answerer: Answerer, scheduler: object, labels: Sequence[str], drift: Drift) -> None:
        """Adds a bundle (``labels``) with its context cache, the depth of its scheduler's queue, and the drift of its questions."""
        self._bundle.labels(*labels).set(1)
        bundle = answerer.bundle
        self._drift.shown[bundle.hash if bundle else ""] = drift, bundle.checked.drift if bundle else {}
        for gauge, cached in zip(self._cache, ("hits", "misses", "bytes"), strict=True):
            gauge.set_function(lambda name=cached: getattr(answerer.stats(), name))  # type: ignore[misc]
        for gauge, depth in zip(self._queue, ("questions", "windows", "tokens", "wait"), strict=True):
            gauge.set_function(lambda name=depth: getattr(scheduler, name))  # type: ignore[misc]

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

    def stage(self, name: str, seconds: float) -> None:
        """Records the time of a stage: queue, search, tokenize or decode."""
        self._stage[name].observe(seconds)

    def ran(self, seconds: float, windows: int, tokens: int) -> None:
        """Records a run of the model."""
        self._stage["run"].observe(seconds)
        self._batch_windows.observe(windows)
        self._batch_tokens.observe(tokens)

    def responded(self, route: str, status: int, seconds: float) -> None:
        """Counts a response."""
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def text(self) -> bytes:
        """All metrics in the text format of Prometheus."""
        return generate_latest(self._registry)
