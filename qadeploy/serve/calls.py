"""A request from its head to the end of its response: an id, a deadline, a line in the log and a count in the metrics."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qadeploy.serve.errors import RefusedError, body
from qadeploy.serve.metrics import Metrics

ROUTES = frozenset(
    {"/", "/v1/answer", "/v1/model", "/health/live", "/health/ready", "/metrics", "/docs", "/openapi.json"}
)
_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
_QUIET = frozenset({"/health/live", "/health/ready", "/metrics"})  # asked for every few seconds
_KEY = "qadeploy.call"
_SAFE = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
)
_log = logging.getLogger("qadeploy.serve")


@dataclass(slots=True)
class Call:
    """What is known of a request. ``deadline`` is a time of the event loop's clock, ``started`` of ``perf_counter``."""

    request_id: str
    started: float
    deadline: float
    questions: int = 0
    windows: int = 0
    kind: str = ""


def call_of(scope: Scope) -> Call:
    """The call that ``Calls`` has put into a request's scope."""
    found: Call = scope[_KEY]
    return found


async def respond(scope: Scope, receive: Receive, send: Send, refused: RefusedError) -> None:
    """Sends a refusal."""
    await response(scope, refused)(scope, receive, send)


def response(scope: Scope, refused: RefusedError) -> JSONResponse:
    """A refusal as a response; its ``type`` goes to the log."""
    call = call_of(scope)
    call.kind = refused.kind
    return JSONResponse(body(refused, call.request_id), refused.status, headers=refused.headers)


class Calls:
    """ASGI middleware, the outermost: gives each request its ``Call`` and its X-Request-ID, logs and counts it.

    ``closing`` says whether callers should look for another connection: the responses then close theirs.
    An id that the caller sends is kept where it is made of up to 64 letters, digits, dots, dashes and underscores.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, timeout: float, closing: Callable[[], bool]) -> None:
        self._app = app
        self._metrics = metrics
        self._timeout = timeout
        self._closing = closing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes the request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        now = asyncio.get_running_loop().time()  # of which uvloop's has whole milliseconds only
        given = dict(scope["headers"]).get(b"x-request-id", b"")
        request_id = given.decode() if _ID.fullmatch(given) else uuid.uuid4().hex
        call = scope[_KEY] = Call(request_id, time.perf_counter(), now + self._timeout)
        status = 500

        async def named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode()), *_SAFE]
                if self._closing():
                    message["headers"].append((b"connection", b"close"))
            await send(message)

        try:
            await self._app(scope, receive, named)
        finally:
            self._end(scope, call, status)

    def _end(self, scope: Scope, call: Call, status: int) -> None:
        seconds = time.perf_counter() - call.started
        path = scope["path"]
        route = path if path in ROUTES else "/static" if path.startswith("/static/") else "other"
        self._metrics.responded(route, status, seconds)
        level = logging.ERROR if status == 500 else logging.INFO
        if path in _QUIET and status != 500:
            level = logging.DEBUG
        if not _log.isEnabledFor(level):
            return
        fields = {
            "request_id": call.request_id,
            "method": scope["method"],
            "route": route,
            "status": status,
            "ms": round(1000 * seconds, 1),
            "client": scope["client"][0] if scope.get("client") else None,
        }
        if call.kind:
            fields["error"] = call.kind
        if call.questions:
            fields |= {"questions": call.questions, "windows": call.windows}
        _log.log(level, "request", extra={"fields": fields})
