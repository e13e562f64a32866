"""A bundle, loaded and ready to answer many callers: the answerer, its scheduler, its metrics and its state."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path

from qadeploy.inference.answerer import Answerer, Options
from qadeploy.serve.metrics import Metrics
from qadeploy.serve.scheduler import Scheduler
from qadeploy.serve.settings import Settings
from qadeploy.serve.threads import choose

_log = logging.getLogger("qadeploy.serve")


@dataclass(slots=True)
class Service:
    """What the routes need. ``draining`` turns /health/ready to 503.

    ``hash`` names the bundle that was loaded, whatever lies in its folder since.
    """

    answerer: Answerer
    settings: Settings
    metrics: Metrics
    scheduler: Scheduler
    device: str
    hash: str
    draining: bool = False

    @classmethod
    def load(cls, bundle: str | Path, settings: Settings) -> Service:
        """Loads a bundle, runs it once, and starts the workers. Raises what ``Answerer.load`` raises."""
        # One thread a session: all workers run windows side by side on the one session that there is.
        answerer = Answerer.load(
            bundle, device=settings.device, threads=1, context_cache_bytes=settings.context_cache_bytes
        )
        return cls.of(answerer, settings)

    @classmethod
    def of(cls, answerer: Answerer, settings: Settings) -> Service:
        """A service around an answerer whose CPU sessions have one thread. Warms it up and starts the workers."""
        device = getattr(answerer.model, "device", "cpu")
        words = "word " * (2 * answerer.settings.max_seq_len)
        window = answerer.begin("What is it?", words, Options()).windows[0]
        answerer.model.run([window])  # the first run allocates: it is no measure
        started = time.perf_counter()
        answerer.model.run([window])
        seconds = time.perf_counter() - started
        key = answerer.bundle.hash if answerer.bundle else ""
        choice = choose(settings.threads, device, key, lambda: answerer.model.run([window]))
        _log.info("threads", extra={"fields": {"workers": choice.workers, "source": choice.source, "device": device}})
        metrics = Metrics()
        scheduler = Scheduler(
            answerer,
            metrics,
            workers=choice.workers,
            batch_tokens=settings.max_batch_tokens if device == "cuda" else None,
            max_queue=settings.max_queue,
            max_wait=settings.max_wait,
            max_windows=settings.max_windows,
            tokens_a_second=choice.workers * len(window) / seconds,
        )
        metrics.describe(answerer, key, device, choice.workers)
        return cls(answerer, settings, metrics, scheduler, device, key)

    @property
    def ready(self) -> bool:
        """Whether new requests should be sent here."""
        return not self.draining and self.scheduler.alive

    def close(self) -> None:
        """Ends the workers."""
        self.scheduler.close()
