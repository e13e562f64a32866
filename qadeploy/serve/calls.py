"""A request from start to end: its token, an id, a deadline, a line in the log and a count in the metrics."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import logging
import re
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http import HTTPStatus

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qadeploy.errors import InputError
from qadeploy.serve.errors import RefusedError, body
from qadeploy.serve.metrics import Metrics
from qadeploy.serve.settings import Settings

ROUTES = frozenset(
    {"/", "/v1/answer", "/v1/model", "/health/live", "/health/ready", "/metrics", "/docs", "/openapi.json"}
    | {"/ping", "/invocations", "/admin/reload", "/v1/feedback"}
)
_PREFIXES = ("/static/", "/v2/")
_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
_HEALTH = frozenset({"/health/live", "/health/ready", "/ping", "/v2/health/live", "/v2/health/ready"})
_QUIET = _HEALTH | {"/metrics"}  # requested every few seconds
_OPEN = _HEALTH | {"/", "/docs", "/openapi.json"}  # also the pages that show how to use the API
_KEY = "qadeploy.call"
REFUSED = "qadeploy.refused"  # the key in a scope of the refusal because of which its body is not read further
Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
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
    """The state of a request. ``deadline`` is in the time of the event loop, ``started`` in that of ``perf_counter``."""

    request_id: str
    started: float
    deadline: float
    questions: int = 0
    windows: int = 0
    kind: str = ""


def call_of(scope: Scope) -> Call:
    """The call that ``Calls`` stored in the scope of a request."""
    found: Call = scope[_KEY]
    return found


def early(metrics: Metrics, client: str | None, refused: RefusedError, seconds: float) -> bytes:
    """Counts and logs a refusal before there is a request, and returns the response as bytes; it closes the connection."""
    request_id = uuid.uuid4().hex
    metrics.responded("other", refused.status, seconds)
    fields = {"request_id": request_id, "route": "other", "status": refused.status, "ms": round(1000 * seconds, 1)}
    _log.info("request", extra={"fields": {**fields, "client": client, "error": refused.kind}})
    found = JSONResponse(body(refused, request_id), refused.status, headers=refused.headers)
    found.headers.update({"connection": "close", "x-request-id": request_id})
    head = [f"HTTP/1.1 {refused.status} {HTTPStatus(refused.status).phrase}".encode()]
    head += [name + b": " + value for name, value in (*found.raw_headers, *_SAFE)]
    return b"\r\n".join(head) + b"\r\n\r\n" + bytes(found.body)


def response(scope: Scope, refused: RefusedError) -> JSONResponse:
    """A refusal as a response; its ``type`` is logged."""
    call = call_of(scope)
    call.kind = refused.kind
    told = body(refused, call.request_id)
    if scope["path"].startswith("/v2/"):  # the Open Inference Protocol requires ``error`` to be a text
        told["error"] = told["error"]["message"]
    return JSONResponse(told, refused.status, headers=refused.headers)


class Calls:
    """The outermost ASGI middleware: gives each request its ``Call`` and its X-Request-ID, and logs and counts it.

    If ``closing`` returns True, responses close their connection, so that clients connect to another server.
    An id that the client sends is kept if it consists of up to 64 letters, digits, dots, dashes and underscores.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, settings: Settings, closing: Callable[[], bool]) -> None:
        self._app = app
        self._metrics = metrics
        self._timeout = settings.request_timeout
        self._trusted = networks(settings.trusted_proxies)
        self._closing = closing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes the request on."""
        now = asyncio.get_running_loop().time()  # with uvloop, in whole milliseconds
        given = dict(scope["headers"]).get(b"x-request-id", b"")
        request_id = given.decode() if _ID.fullmatch(given) else uuid.uuid4().hex
        call = scope[_KEY] = Call(request_id, time.perf_counter(), now + self._timeout)
        status = 0

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
        except asyncio.CancelledError:  # on a second signal, or when the time to drain is up
            if not status:
                closing = RefusedError(503, "closing", "the server shut down before there was an answer", retry_after=1)
                await response(scope, closing)(scope, receive, named)
        finally:
            self._end(scope, call, status or 500)

    def _end(self, scope: Scope, call: Call, status: int) -> None:
        seconds = time.perf_counter() - call.started
        path = scope["path"]
        group = next((prefix.rstrip("/") for prefix in _PREFIXES if path.startswith(prefix)), "other")
        route = path if path in ROUTES else group
        self._metrics.responded(route, status, seconds)
        if call.kind == "disconnected":
            self._metrics.dropped.labels("disconnect").inc()
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
            "client": client_of(scope, self._trusted),
        }
        if call.kind:
            fields["error"] = call.kind
        if call.questions:
            fields |= {"questions": call.questions, "windows": call.windows}
        _log.log(level, "request", extra={"fields": fields})


class Failures:
    """ASGI middleware that answers an unexpected exception with 500, and logs it under the id of the request.

    Starlette's own is outside all middleware, so its response would lack their headers.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes the request on."""
        begun = False

        async def watched(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception as error:
            if begun:
                raise
            fields = {"request_id": call_of(scope).request_id}
            _log.error("the server failed", extra={"fields": fields}, exc_info=error)
            failed = RefusedError(500, "internal", "the server failed; its log has the reason under this request id")
            await response(scope, failed)(scope, receive, send)


class Auth:
    """ASGI middleware that refuses (401) requests without the token. Tokens are compared in constant time.

    The page, its files, the API documents and the health checks are open to GET, and so is /metrics unless ``metrics``.
    """

    def __init__(self, app: ASGIApp, token: str, *, metrics: bool) -> None:
        self._app = app
        self._token = token.encode()
        self._open = _OPEN if metrics else _OPEN | {"/metrics"}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes the request on if it is allowed."""
        if self._is_open(scope) or self._has_token(scope):
            await self._app(scope, receive, send)
            return
        message = "this server needs a token: send the header 'Authorization: Bearer TOKEN'"
        await response(scope, RefusedError(401, "unauthorized", message))(scope, receive, send)

    def _is_open(self, scope: Scope) -> bool:
        path = scope["path"]
        return scope["method"] in {"GET", "HEAD"} and (path in self._open or path.startswith("/static/"))

    def _has_token(self, scope: Scope) -> bool:
        scheme, _, given = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(given.strip(), self._token)


def networks(proxies: Sequence[str]) -> list[Network]:
    """The networks of trusted proxies. Raises InputError if one is neither an address nor a network."""
    try:
        return [ipaddress.ip_network(proxy) for proxy in proxies]
    except ValueError as error:
        raise InputError(f"--trusted-proxy must be an address or a network such as 10.0.0.0/8: {error}") from error


def client_of(scope: Scope, trusted: Sequence[Network]) -> str | None:
    """The address of the client: the peer or, if that is a trusted proxy, the last untrusted address in X-Forwarded-For."""
    peer = scope["client"][0] if scope.get("client") else None
    found = _address(peer or "")
    given = b",".join(value for name, value in scope["headers"] if name == b"x-forwarded-for")
    hops = given.decode("latin-1").split(",")
    while hops and found is not None and any(found in network for network in trusted):
        before = _address(hops.pop())
        if before is None:
            break
        found = before
    return peer if found is None else str(found)


def _address(text: str) -> Address | None:
    """An address that may be followed by a port. An IPv4 address that an IPv6 socket gives (``::ffff:10.0.0.1``) is IPv4."""
    text = text.strip()
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        found = None if "%" in text else ipaddress.ip_address(text)  # the zone after % may be any text
    except ValueError:
        return None
    return getattr(found, "ipv4_mapped", None) or found
