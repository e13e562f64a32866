"""The bearer token. If one is set, all paths except the open ones require it."""

from __future__ import annotations

import hmac

from starlette.types import ASGIApp, Receive, Scope, Send

from qadeploy.serve.calls import response
from qadeploy.serve.errors import RefusedError

# Open: the health checks of orchestrators, and the pages that show how to use the API.
_OPEN = frozenset(
    {"/", "/docs", "/openapi.json", "/health/live", "/health/ready", "/ping", "/v2/health/live", "/v2/health/ready"}
)


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
