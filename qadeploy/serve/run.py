"""The process: logs, the bundle, the listener, and going down in good order.

SIGTERM: /health/ready turns 503 at once, so that balancers look elsewhere, while requests are still taken; ``drain_delay``
later the listener closes; running requests are answered; the process ends with 0. SIGINT skips the delay. A second
signal ends it at once, with 1.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import uvicorn
from prometheus_client import disable_created_metrics

from qadeploy.errors import FailureError, InputError
from qadeploy.serve.app import create_app
from qadeploy.serve.logs import set_up
from qadeploy.serve.service import Service
from qadeploy.serve.settings import Settings

_BACKLOG = 2048
_log = logging.getLogger("qadeploy.serve")


class _Server(uvicorn.Server):
    """uvicorn's server with signals of our own: uvicorn's close the listener first, and end with 143."""

    def __init__(self, config: uvicorn.Config, service: Service, on_ready: Callable[[], object]) -> None:
        super().__init__(config)
        self._service = service
        self._on_ready = on_ready

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handles SIGTERM and SIGINT while the server runs."""
        loop = asyncio.get_running_loop()
        delays = {signal.SIGTERM: self._service.settings.drain_delay, signal.SIGINT: 0.0}
        for number, delay in delays.items():
            loop.add_signal_handler(number, self._drain, number, delay)
        try:
            yield
        finally:
            for number in delays:
                loop.remove_signal_handler(number)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listens, then says so."""
        await super().startup(sockets)
        self._on_ready()

    def _drain(self, number: signal.Signals, delay: float) -> None:
        if self._service.draining:
            _log.warning("stopped at once", extra={"fields": {"signal": number.name}})
            self.should_exit = self.force_exit = True
            return
        self._service.draining = True
        _log.info("draining", extra={"fields": {"signal": number.name, "drain_delay": delay}})
        asyncio.get_running_loop().call_later(delay, self._close)

    def _close(self) -> None:
        self.should_exit = True


def serve(bundle: str | Path, settings: Settings, on_ready: Callable[[str, Service], object]) -> None:
    """Serves a bundle until a signal; ``on_ready`` gets the URL once it listens.

    Raises InputError (settings, an address that cannot be listened on), what ``Answerer.load`` raises, and
    FailureError where a second signal cut running requests off.
    """
    set_up(settings.log_level)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # so that tokenising a long text lets other threads run
    disable_created_metrics()  # type: ignore[no-untyped-call]
    with contextlib.closing(_listen(settings.host, settings.port)) as listener:
        service = Service.load(bundle, settings)
        try:
            host, port = listener.getsockname()[:2]
            url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
            config = uvicorn.Config(
                create_app(service),
                log_config=None,
                access_log=False,
                server_header=False,
                lifespan="off",
                backlog=_BACKLOG,
                timeout_keep_alive=int(settings.keep_alive),
                timeout_graceful_shutdown=int(settings.request_timeout) + 1,
            )
            server = _Server(config, service, lambda: on_ready(url, service))
            server.run([listener])
        finally:
            service.close()
        _log.info("stopped")
        if server.force_exit:
            raise FailureError("stopped by a second signal before all running requests were answered")


def _listen(host: str, port: int) -> socket.socket:
    """A bound socket. It is bound first, so that a taken port is known before the bundle is loaded."""
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
