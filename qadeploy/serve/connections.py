"""Connections: uvicorn's HTTP protocol, with limits on the size of heads, on slow clients, and on the number of connections.

At any time a connection waits either for the server to answer a complete request, or for its client: to send a head or the rest
of a body, or to read a response. Waiting for a client has a time limit; beyond the limit of connections, the longest is ended.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

import httptools
from uvicorn import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from qadeploy.serve.calls import REFUSED, client_of, early, networks
from qadeploy.serve.errors import RefusedError, over_limit
from qadeploy.serve.metrics import Metrics
from qadeploy.serve.settings import Settings

_STEP = 4096  # bytes that are parsed at a time; requests that a client sends ahead stay unparsed until their turn
_LINGER = 2.0  # seconds for a client to read the last response before the connection is cut
# Seconds until a client that has closed its side is probed first, a second time (a client that is gone answers the first
# probe with a reset, on which the second fails), and between further probes.
_PROBE, _PROBE_AGAIN, _PROBE_EVERY = 0.5, 0.1, 2.0
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


class Connections:
    """All connections of a server.

    Args:
        settings: The limits.
        metrics: Counts the connections that are cut.
        limit: The largest number of open connections.
    """

    def __init__(self, settings: Settings, metrics: Metrics, limit: int) -> None:
        self.settings = settings
        self.trusted = networks(settings.trusted_proxies)
        self.metrics = metrics
        self.limit = limit
        self.held = 0  # bytes of request bodies in memory
        self.open: set[Connection] = set()
        self.waiting: dict[Connection, None] = {}  # waiting for their clients, the longest wait first
        metrics.connections(lambda: len(self.open))

    def add(self, new: Connection) -> None:
        """Adds a connection. If there are too many, one that waits for its client is closed, or the new one refused."""
        self.open.add(new)
        if len(self.open) <= self.limit:
            return
        oldest = next(iter(self.waiting), new)
        if oldest is not new:
            oldest.cut("limit")
            return
        self.metrics.cut.labels("limit").inc()
        text = f"{self.limit} connections are open, and all wait for answers"
        new.refuse(over_limit(503, "too_many_connections", text, self.limit, "max_connections", retry_after=1))

    def hold(self, size: int) -> None:
        """Counts bytes of a body. If there are too many, the upload that has waited longest for its client is cut."""
        self.held += size
        if self.held > self.settings.max_upload_bytes:
            oldest = next((one for one in self.waiting if one.uploads), None)
            if oldest is not None:
                oldest.cut("body")

    def remove(self, connection: Connection) -> None:
        """Forgets a connection."""
        self.open.discard(connection)
        self.waiting.pop(connection, None)


class Connection(HttpToolsProtocol):
    """One connection. ``_wait`` names what it expects from its client; it is "" while the server works.

    Args:
        config: The configuration of uvicorn.
        server_state: The state of uvicorn's server.
        app_state: The state of uvicorn's lifespan.
        connections: All connections of the server.
    """

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        connections: Connections,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._all = connections
        self._settings = connections.settings
        self._in_head = self._in_body = self._upgrades = False
        self._unparsed = b""
        self._held = 0  # bytes of the body in memory
        self._overhead = 0  # bytes of a head, of trailers or of invalid HTTP since the last progress
        self._running: RequestResponseCycle | None = None
        self._refused: RefusedError | None = None
        self._ended = False  # the client has closed its side
        self._lingers = False
        self._wait = "-"
        self._began = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._probe: asyncio.TimerHandle | None = None

    # ------------------------------------------------------------ from the transport

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has connected."""
        super().connection_made(transport)
        self._look()
        self._all.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is closed."""
        self._all.remove(self)
        self._release()
        for timer in (self._timer, self._probe):
            if timer is not None:
                timer.cancel()
        self.pipeline.clear()
        if self._running is not None:  # uvicorn notifies only the newest request
            self._running.disconnected = True
            self._running.message_event.set()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """The client has sent something."""
        self._unset_keepalive_if_required()
        rest = memoryview(self._unparsed + data)
        while rest and not (self._refused or self.pipeline or self.transport.is_closing()):
            step = min(_STEP, len(rest))
            rest = rest[step - self._parse(rest[:step]) :]
        self._unparsed = b"" if self._refused else bytes(rest)
        if self.pipeline:
            self.flow.pause_reading()
        self._look()

    def eof_received(self) -> bool | None:  # type: ignore[override]
        """The client has closed its side. It still gets the answer to a complete request."""
        if self._wait:
            return None
        self._ended = True
        self._probe = self.loop.call_later(_PROBE, self._seek_client, _PROBE_AGAIN)
        return True

    def pause_writing(self) -> None:
        """The client has stopped reading."""
        super().pause_writing()
        self._look()

    def resume_writing(self) -> None:
        """The client reads again."""
        super().resume_writing()
        self._look()

    # ------------------------------------------------------------ parsing

    def _parse(self, step: memoryview) -> int:
        """Parses some bytes and returns how many of them are left over."""
        before, left = self._overhead, 0
        self._overhead = -1  # the parser's callbacks set it to 0 on progress
        try:
            try:
                self.parser.feed_data(step)
            except httptools.HttpParserUpgrade as upgrade:
                left = len(step) - upgrade.args[0]
                self._answer_without_upgrade()
        except httptools.HttpParserError:
            self.refuse(self._refused or RefusedError(400, "bad_request", "what was sent is not HTTP/1.1"))
        if self._overhead < 0:
            self._overhead = before + len(step)
            if self._overhead > self._settings.max_head_bytes:
                self.refuse(self._refused or self._too_large())
        return left

    def _answer_without_upgrade(self) -> None:
        """Parses a head again without its Upgrade header, after which the parser would treat all bytes as another protocol."""
        method = self.parser.get_method()
        if method == b"CONNECT":
            self.refuse(RefusedError(405, "method", "this is no proxy"))
            return
        self._upgrades = False
        version = self.parser.get_http_version().encode()
        lines = [b"%b %b HTTP/%b" % (method, self.url, version)]
        lines += [b"%b: %b" % header for header in self.headers if header[0] not in {b"upgrade", b"connection"}]
        self.parser = httptools.HttpRequestParser(self)
        self.parser.feed_data(b"\r\n".join([*lines, b"", b""]))

    def _too_large(self) -> RefusedError:
        limit = self._settings.max_head_bytes
        text = f"the request line and headers have more than {limit} bytes"
        return over_limit(431, "head_too_large", text, limit, "max_head_bytes")

    def on_message_begin(self) -> None:
        """A head begins."""
        super().on_message_begin()
        self._in_head, self._overhead = True, 0

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header, or a trailer, which is ignored."""
        if self._in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """A head is complete. Raises ValueError if it is too large."""
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if size > self._settings.max_head_bytes:
            self._refused = self._too_large()
            raise ValueError
        self._overhead = 0
        self._upgrades = self.parser.should_upgrade()
        if not self._upgrades:
            super().on_headers_complete()
            self._in_head, self._in_body = False, True
            if not self.pipeline:
                self._running = self.cycle

    def on_body(self, body: bytes) -> None:
        """A part of a body."""
        self._overhead = 0
        super().on_body(body)
        if self.uploads:
            self._held += len(body)
            self._all.hold(len(body))

    def on_message_complete(self) -> None:
        """A request is complete."""
        if not self._upgrades:
            self._in_body, self._overhead = False, 0
            super().on_message_complete()

    # ------------------------------------------------------------ whose turn it is

    @property
    def uploads(self) -> bool:
        """Whether a body is being read whose request has not been answered."""
        return self._in_body and self.cycle is not None and not self.cycle.response_complete

    def _look(self) -> None:
        """Updates what the connection waits for, and starts the timer for it."""
        if self.transport.is_closing():
            return
        seconds: float | None = None
        if self._lingers:
            wait, seconds = "end", _LINGER
        elif self.flow.write_paused:
            wait, seconds = "response", self._settings.request_timeout
        elif self._running is not None:
            wait = "body" if self._in_body and not self.pipeline else ""  # the deadline of the request limits it
        elif self._in_body:
            wait, seconds = "rest", self._settings.head_timeout  # the request was answered before its body was read
        elif self._in_head or self._overhead or self.cycle is None:
            wait, seconds = "head", self._settings.head_timeout
        else:
            wait, seconds = "request", self._settings.keep_alive
        if wait == self._wait:
            return
        self._wait, self._began = wait, time.perf_counter()
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if seconds is None else self.loop.call_later(seconds, self._expired)
        self._all.waiting.pop(self, None)
        if wait:
            self._all.waiting[self] = None

    def _expired(self) -> None:
        if self._wait == "head" and (self._in_head or self._overhead):
            seconds = self._settings.head_timeout
            text = f"the request line and headers had not arrived after {seconds:g} seconds"
            self.refuse(over_limit(408, "slow_head", text, seconds, "head_timeout"))
        elif self._wait in {"head", "request"} and not self.transport.get_write_buffer_size():
            self.transport.close()
        else:
            self.cut({"rest": "body", "request": "response"}.get(self._wait, self._wait))

    def cut(self, reason: str) -> None:
        """Closes the connection at once and discards unsent data."""
        self._all.remove(self)
        self._release()
        if reason != "end":
            self._all.metrics.cut.labels(reason).inc()
        self.transport.abort()

    def _release(self) -> None:
        self._all.held -= self._held
        self._held = 0

    def on_response_complete(self) -> None:
        """A response was sent."""
        self._running = self.pipeline[-1][0] if self.pipeline else None
        self._release()
        super().on_response_complete()
        self._unset_keepalive_if_required()
        if self.transport.is_closing():
            return
        if self._running is None:
            if self._refused:
                self._end()
            elif self._ended:
                self.transport.close()
        self.data_received(b"")  # parses what the client sent ahead

    # ------------------------------------------------------------ refusals, and clients that have closed their side

    def refuse(self, refused: RefusedError) -> None:
        """Answers with a refusal once earlier requests are answered, and then closes the connection."""
        self._refused = refused
        if self._running is None:
            self._end()
        elif self._in_body:  # the refusal is the answer to this request
            self.cycle.scope[REFUSED] = refused  # type: ignore[literal-required]
            self.cycle.message_event.set()

    def _end(self) -> None:
        """Sends the refusal, unless the request was answered already, and leaves the client time to read it."""
        if not self._in_body and self._refused:
            client = client_of({"client": self.client, "headers": self.headers or []}, self._all.trusted)
            seconds = time.perf_counter() - self._began
            self.transport.write(early(self._all.metrics, client, self._refused, seconds))
        self._lingers = True
        self.transport.write_eof()
        self._look()

    def _seek_client(self, again: float) -> None:
        """Probes whether a client that has closed its side is still there: writing to one that is gone fails."""
        if self._running is None or self.transport.is_closing():
            return
        if self._running.scope["http_version"] == "1.0":  # without interim responses it cannot be probed: assumed gone
            self.transport.abort()
            return
        if not self._running.response_started:
            self.transport.write(_CONTINUE)
        self._probe = self.loop.call_later(again, self._seek_client, _PROBE_EVERY)
