"""A loaded bundle with all that serves it: the answerer, its scheduler, its metrics and its state."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path

from qadeploy.core.settings import Options
from qadeploy.corpus.corpus import Corpus
from qadeploy.inference.answerer import Answerer
from qadeploy.serve.metrics import Metrics
from qadeploy.serve.scheduler import Scheduler
from qadeploy.serve.settings import Settings
from qadeploy.serve.threads import choose_workers

_log = logging.getLogger("qadeploy.serve")


@dataclass(slots=True)
class Service:
    """What the routes need.

    Attributes:
        answerer: Answers.
        settings: The settings of the server.
        metrics: What /metrics shows.
        scheduler: Runs the requests.
        device: cpu or cuda.
        hash: Identifies the bundle that was loaded, even if its folder has changed since.
        corpus: Where questions without a context are answered from.
        draining: Whether the server is shutting down, so that /health/ready is 503.
    """

    answerer: Answerer
    settings: Settings
    metrics: Metrics
    scheduler: Scheduler
    device: str
    hash: str
    corpus: Corpus | None = None
    draining: bool = False

    @classmethod
    def load(cls, bundle: str | Path, settings: Settings) -> Service:
        """Loads a bundle, warms it up and starts the workers. Raises what ``Answerer.load`` raises."""
        # One thread per session: all workers run windows side by side in one session.
        answerer = Answerer.load(
            bundle,
            device=settings.device,
            threads=1,
            context_cache_bytes=settings.context_cache_bytes,
            sha256=settings.bundle_sha256,
        )
        return cls.of(answerer, settings)

    @classmethod
    def of(cls, answerer: Answerer, settings: Settings) -> Service:
        """The service of an answerer whose CPU sessions have one thread. Warms it up and starts the workers."""
        device = getattr(answerer.model, "device", "cpu")
        words = "word " * (2 * answerer.settings.max_seq_len)
        window = answerer.encode("What is it?", words, Options()).windows[0]
        answerer.model.run([window])  # the first run allocates memory, so it is not timed
        started = time.perf_counter()
        answerer.model.run([window])
        seconds = time.perf_counter() - started
        key = answerer.bundle.hash if answerer.bundle else ""
        choice = choose_workers(settings.threads, device, key, lambda: answerer.model.run([window]))
        _log.info("threads", extra={"fields": {"workers": choice.workers, "source": choice.source, "device": device}})
        metrics = Metrics()
        scheduler = Scheduler(
            answerer,
            metrics,
            settings,
            workers=choice.workers,
            batched=device == "cuda",
            tokens_per_second=choice.workers * len(window) / seconds,
        )
        metrics.describe(answerer, key, device, choice.workers)
        return cls(answerer, settings, metrics, scheduler, device, key)

    @property
    def ready(self) -> bool:
        """Whether new requests should be sent here."""
        return not self.draining and self.scheduler.alive

    def close(self) -> None:
        """Ends the workers; unfinished requests are refused."""
        self.scheduler.close()
