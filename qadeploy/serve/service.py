"""A loaded bundle with its answerer, scheduler and metrics, and the state of the server."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

from qadeploy import __version__
from qadeploy.core.drift import Drift, Figure
from qadeploy.core.settings import Options
from qadeploy.corpus.corpus import Corpus
from qadeploy.errors import InputError, LoadTimeoutError
from qadeploy.inference.answerer import Answerer
from qadeploy.inference.pairs import DecodedPair, figures_of
from qadeploy.serve.errors import clean
from qadeploy.serve.feedback import Feedback
from qadeploy.serve.metrics import Metrics
from qadeploy.serve.scheduler import Scheduler
from qadeploy.serve.settings import Settings
from qadeploy.serve.threads import choose_workers

_POLL = 0.05  # seconds between checks whether the previous bundle has answered its last request
_log = logging.getLogger("qadeploy.serve")


@dataclass(frozen=True, slots=True)
class Engine:
    """A bundle's answerer and the scheduler that runs it.

    Attributes:
        answerer: The answerer.
        scheduler: The scheduler of the requests.
        device: cpu or cuda.
        hash: The hash of the loaded bundle, even if its folder has changed since.
        drift: The drift figures of the questions that the bundle has answered.
    """

    answerer: Answerer
    scheduler: Scheduler
    device: str
    hash: str
    drift: Drift

    @classmethod
    def load(cls, bundle: str | Path, settings: Settings, metrics: Metrics) -> Engine:
        """Loads a bundle, warms it up and starts the workers. Raises what ``Answerer.load`` raises."""
        # One thread per session: all workers run windows side by side in one session.
        answerer = Answerer.load(
            bundle,
            device=settings.device,
            threads=1,
            context_cache_bytes=settings.context_cache_bytes,
            sha256=settings.bundle_sha256,
        )
        return cls.of(answerer, settings, metrics)

    @classmethod
    def of(cls, answerer: Answerer, settings: Settings, metrics: Metrics) -> Engine:
        """Makes the engine of an answerer whose CPU sessions have one thread. Warms it up and starts the workers."""
        device = getattr(answerer.model, "device", "cpu")
        words = "word " * (2 * answerer.settings.max_seq_len)
        window = answerer.encode("What is it?", words, Options()).windows[0]
        answerer.model.run([window])  # the first run allocates memory, so it is not timed
        started = time.perf_counter()
        answerer.model.run([window])
        seconds = time.perf_counter() - started
        key = answerer.bundle.hash if answerer.bundle else ""
        workers, source = choose_workers(settings.threads, device, key, lambda: answerer.model.run([window]))
        _log.info("threads", extra={"fields": {"workers": workers, "source": source, "device": device}})
        drift, unknown = metrics.drift_of(key), answerer.encoder.unknown_id

        def watch(pair: DecodedPair | None, options: Options) -> None:
            drift.add(figures_of(pair, options, unknown) if pair else {Figure.NO_ANSWER: 1.0})

        scheduler = Scheduler(
            answerer,
            metrics,
            settings,
            workers=workers,
            batched=device == "cuda",
            tokens_per_second=workers * len(window) / seconds,
            watch=watch,
        )
        return cls(answerer, scheduler, device, key, drift)

    @property
    def name(self) -> str:
        """The name of the bundle; "" without one."""
        bundle = self.answerer.bundle
        return clean(bundle.name) if bundle else ""

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels of the bundle in the metrics."""
        bundle = self.answerer.bundle
        known = ("", "", "") if bundle is None else (self.name, self.hash, clean(bundle.precision))
        return (*known, __version__, self.device, str(self.scheduler.workers))


@dataclass(slots=True)
class Service:
    """The state that the routes share.

    Attributes:
        engine: What answers now. It changes only in the thread of the event loop.
        settings: The settings of the server.
        metrics: The metrics that /metrics shows.
        bundle: The folder that a reload loads; None if the answerer was made without one.
        corpus: The corpus from which questions without a context are answered, or None.
        feedback: The store of verdicts on answers; None if verdicts are not accepted.
        draining: Whether the server is shutting down, so that /health/ready is 503.
        reloading: Whether a reload is running.
    """

    engine: Engine
    settings: Settings
    metrics: Metrics
    bundle: str | Path | None = None
    corpus: Corpus | None = None
    feedback: Feedback | None = None
    draining: bool = False
    reloading: bool = False
    _before: dict[Engine, asyncio.Task[None]] = field(default_factory=dict)  # replaced engines with running requests

    def __post_init__(self) -> None:
        self._show(self.engine)

    def _show(self, engine: Engine) -> None:
        self.metrics.show(engine.answerer, engine.scheduler, engine.labels, engine.drift)

    @classmethod
    def load(cls, bundle: str | Path, settings: Settings) -> Service:
        """Loads a bundle, warms it up and starts the workers. Raises what ``Answerer.load`` raises."""
        metrics = Metrics()
        return cls(Engine.load(bundle, settings, metrics), settings, metrics, bundle)

    @property
    def scheduler(self) -> Scheduler:
        """The scheduler of the current bundle."""
        return self.engine.scheduler

    @property
    def ready(self) -> bool:
        """Whether new requests should be sent here."""
        return not self.draining and self.scheduler.alive

    async def reload(self) -> bool:
        """Loads the bundle's folder again while the current bundle keeps answering, and then replaces it.

        New requests go to the new bundle as soon as it is loaded, verified and warmed up. Running requests are answered by the
        previous bundle, whose workers end with the last of them. After an error nothing has changed.

        Returns:
            Whether the folder holds a different bundle than the previous one.

        Raises:
            InputError: There is no folder, or another reload is running.
            QadeployError: As ``Answerer.load`` does; LoadTimeoutError if loading takes longer than ``load_timeout``.
        """
        if self.bundle is None or self.reloading:
            raise InputError("another reload is running" if self.reloading else "there is no bundle folder to reload")
        self.reloading = True
        try:
            engine = await self._loaded(self.bundle)
        except BaseException:
            self.metrics.reloads.labels("failed").inc()
            raise
        finally:
            self.reloading = False
        before, self.engine = self.engine, engine
        self._show(engine)
        self.metrics.reloads.labels("done").inc()
        _log.info("reloaded", extra={"fields": {"bundle": engine.name, "hash": engine.hash, "before": before.hash}})
        self._before[before] = asyncio.create_task(self._end(before))
        return before.hash != engine.hash

    async def _loaded(self, bundle: str | Path) -> Engine:
        """Runs ``Engine.load`` in a thread that does not keep the process from exiting."""
        found: Future[Engine] = Future()

        def load() -> None:
            try:
                engine = Engine.load(bundle, self.settings, self.metrics)
            except BaseException as error:
                if found.set_running_or_notify_cancel():
                    found.set_exception(error)
                return
            if found.set_running_or_notify_cancel():
                found.set_result(engine)
            else:  # the time is up
                engine.scheduler.close()

        threading.Thread(target=load, name="reload", daemon=True).start()
        seconds = self.settings.load_timeout
        try:
            return await asyncio.wait_for(asyncio.wrap_future(found), seconds)
        except TimeoutError:
            raise LoadTimeoutError(f"{bundle}: was not loaded within {seconds:g} s: raise --load-timeout") from None

    async def _end(self, engine: Engine) -> None:
        """Ends a bundle's workers once its last request has ended."""
        while not engine.scheduler.idle:
            await asyncio.sleep(_POLL)
        await asyncio.to_thread(engine.scheduler.close)
        del self._before[engine]
        left = (self.engine, *self._before)
        if engine.labels not in {each.labels for each in left}:
            self.metrics.forget(engine.labels)
        if engine.hash not in {each.hash for each in left}:
            self.metrics.forget_drift(engine.hash)

    def close(self) -> None:
        """Ends the workers; unfinished requests are refused."""
        if self.feedback is not None:
            self.feedback.close()
        for engine in (*self._before, self.engine):
            engine.scheduler.close()
