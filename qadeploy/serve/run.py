"""The server process: logs, the bundle, the listener, and an orderly shutdown.

On SIGTERM, /health/ready returns 503 at once, so that load balancers send requests elsewhere, but requests are still accepted.
After ``drain_delay`` the listener closes, running requests are answered, and the process exits with 0. SIGINT skips the
delay. SIGHUP reloads the bundle's folder. A second SIGTERM or SIGINT refuses running requests (503); the process exits with 1.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn
from prometheus_client import disable_created_metrics

from qadeploy.errors import FailureError, InputError, QadeployError
from qadeploy.inference.load_timeout import within
from qadeploy.serve.app import create_app
from qadeploy.serve.calls import networks
from qadeploy.serve.connections import Connection, Connections
from qadeploy.serve.errors import clean
from qadeploy.serve.feedback import Feedback
from qadeploy.serve.search import open_corpus
from qadeploy.serve.service import Service
from qadeploy.serve.settings import Settings

# Settings of uvicorn: no websockets, no proxy headers, no logging configuration, access log or Server header.
PLAIN: dict[str, Any] = {
    "ws": "none", "proxy_headers": False, "log_config": None, "access_log": False, "server_header": False, "lifespan": "off",
}  # fmt: skip
_BACKLOG = 2048
_MOST_CONNECTIONS = 4096
_SPARE_FILES = 64  # file descriptors for files, pipes, and connections that are being closed
_LAST_WORDS = 1.0  # seconds to send refusals after a second signal
_LEVELS = ("debug", "info", "warning", "error")
_log = logging.getLogger("qadeploy.serve")


class JsonFormatter(logging.Formatter):
    """Formats a record as one line of JSON: ``time``, ``level``, ``event``, and the entries of ``extra={"fields": {...}}``."""

    def format(self, record: logging.LogRecord) -> str:
        """Returns the line."""
        value: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            value["traceback"] = self.formatException(record.exc_info)
        return json.dumps(value)  # ASCII, so that a lone surrogate in a path cannot break the stream


def set_up_logs(level: str) -> None:
    """Sends the logs of qadeploy, uvicorn and asyncio to stderr as JSON. Raises InputError on an unknown level."""
    if level not in _LEVELS:
        raise InputError(f"--log-level is {level!r}: choose {', '.join(_LEVELS)}")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    for name in ("qadeploy", "uvicorn", "asyncio"):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.propagate = False
        logger.setLevel(level.upper())
    if level == "info":  # uvicorn logs its start and stop, which our own lines report
        logging.getLogger("uvicorn").setLevel(logging.WARNING)


@contextlib.contextmanager
def handling(handlers: Mapping[signal.Signals, Callable[[], None]]) -> Iterator[None]:
    """Calls these functions in the running event loop when their signals arrive."""
    loop = asyncio.get_running_loop()  # loop.add_signal_handler does not exist on Windows

    def later(number: int, frame: object) -> None:
        loop.call_soon_threadsafe(handlers[signal.Signals(number)])

    before = {number: signal.signal(number, later) for number in handlers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Server(uvicorn.Server):
    """uvicorn's server with other signal handlers: uvicorn's own close the listener at once, and exit with 143."""

    def __init__(self, config: uvicorn.Config, service: Service, on_ready: Callable[[], object]) -> None:
        super().__init__(config)
        self._service = service
        self._on_ready = on_ready
        self.cut_off = False

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handles SIGTERM, SIGINT and SIGHUP while the server runs."""
        delays = {signal.SIGTERM: self._service.settings.drain_delay, signal.SIGINT: 0.0}
        handlers: dict[signal.Signals, Callable[[], None]]
        handlers = {number: partial(self._drain, number, delay) for number, delay in delays.items()}
        if sys.platform != "win32":
            handlers[signal.SIGHUP] = self._reload
        with handling(handlers):
            yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Starts to listen, then calls ``on_ready``."""
        await super().startup(sockets)
        self._on_ready()

    def _drain(self, number: signal.Signals, delay: float) -> None:
        if self._service.draining:
            _log.warning("stopped at once", extra={"fields": {"signal": number.name}})
            self.should_exit = self.cut_off = True
            for task in self.server_state.tasks:
                task.cancel()  # ``Calls`` then answers with 503
            asyncio.get_running_loop().call_later(_LAST_WORDS, setattr, self, "force_exit", True)
            return
        self._service.draining = True
        _log.info("draining", extra={"fields": {"signal": number.name, "drain_delay": delay}})
        asyncio.get_running_loop().call_later(delay, setattr, self, "should_exit", True)

    def _reload(self) -> None:
        self._reloading = asyncio.ensure_future(self._reloaded())

    async def _reloaded(self) -> None:
        try:
            await self._service.reload()
        except Exception as error:
            unexpected = None if isinstance(error, QadeployError) else error
            _log.error("not reloaded", extra={"fields": {"error": clean(str(error))}}, exc_info=unexpected)


def serve(bundle: str | Path, settings: Settings, on_ready: Callable[[str, Service], object]) -> None:
    """Serves a bundle until a signal arrives.

    Args:
        bundle: The bundle folder.
        settings: The settings of the server.
        on_ready: Called with the URL and the service once the server listens.

    Raises:
        InputError: A setting is invalid, or the server cannot listen on the address.
        QadeployError: As ``Answerer.load`` does, LoadTimeoutError too.
        FailureError: A second signal cut off running requests.
    """
    set_up_logs(settings.log_level)
    networks(settings.trusted_proxies)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # so that other threads keep running while a long text is tokenised
    disable_created_metrics()  # type: ignore[no-untyped-call]
    with contextlib.closing(_listen(settings.host, settings.port)) as listener:
        service = within(settings.load_timeout, partial(Service.load, bundle, settings), bundle)
        try:
            if settings.corpus is not None:
                service.corpus = open_corpus(settings.corpus)
            if settings.feedback is not None:
                service.feedback = Feedback(Path(settings.feedback), settings.feedback_bytes)
            host, port = listener.getsockname()[:2]
            url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
            connections = Connections(settings, service.metrics, _room(settings.max_connections))
            protocol: Any = partial(Connection, connections=connections)
            config = uvicorn.Config(
                create_app(service),
                http=protocol,
                **PLAIN,
                backlog=_BACKLOG,
                timeout_graceful_shutdown=int(settings.request_timeout) + 1,
            )
            server = _Server(config, service, lambda: on_ready(url, service))
            server.run([listener])
        finally:
            service.close()
        _log.info("stopped")
        if server.cut_off:
            raise FailureError("stopped by a second signal before all running requests were answered")


def _room(asked: int | None) -> int:
    """The largest number of open connections. Raises InputError if the limit of open files does not allow it."""
    if sys.platform == "win32":
        return asked or _MOST_CONNECTIONS
    import resource

    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files == resource.RLIM_INFINITY:
        return asked or _MOST_CONNECTIONS
    try:
        room = files - len(os.listdir("/proc/self/fd")) - _SPARE_FILES
    except OSError:  # not Linux
        room = files - 2 * _SPARE_FILES
    if (asked or 1) > room:
        raise InputError(
            f"--max-connections must be at most {max(room, 0)}, not {asked or 1}: this process may open {files} files (ulimit -n)"
        )
    return asked or min(room, _MOST_CONNECTIONS)


def _listen(host: str, port: int) -> socket.socket:
    """A bound socket. It is bound early, so that a port in use is reported before the bundle is loaded."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"--host {host} --port {port}: cannot listen there: {reason}") from error
    listener.setblocking(False)
    return listener
