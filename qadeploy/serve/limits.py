"""The limits of a request. Each has its own error, which names the limit and the flag that raises it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qadeploy.serve.calls import REFUSED, call_of, response
from qadeploy.serve.errors import RefusedError, over_limit
from qadeploy.serve.scheduler import Ask
from qadeploy.serve.settings import Settings

REQUEST_LIMITS = (
    "max_body_bytes", "max_context_chars", "max_passages", "max_question_chars", "max_windows", "max_batch", "max_top_k",
    "max_answer_tokens", "request_timeout",
)  # fmt: skip


def check_limits(asks: Sequence[Ask], settings: Settings) -> None:
    """Raises RefusedError (422) if a request exceeds a limit. The scheduler counts the windows."""
    hold(len(asks), settings, "max_batch", "batch_too_large", "the request holds {} questions")
    for number, ask in enumerate(asks, 1):
        where = f"question {number}: " if len(asks) > 1 else ""
        options, passages = ask.options, 1 if isinstance(ask.context, str) else len(ask.context)
        texts = "the context has" if isinstance(ask.context, str) else f"the {passages} passages have"
        for value, name, kind, what in (
            (passages, "max_passages", "too_many_passages", "it has {} passages"),
            (sum(map(len, ask.texts)), "max_context_chars", "context_too_long", f"{texts} {{}} characters"),
            (len(ask.question), "max_question_chars", "question_too_long", "it has {} characters"),
            (options.top_k, "max_top_k", "top_k_too_large", "top_k is {}"),
            (options.max_answer_len or 0, "max_answer_tokens", "answer_too_long", "max_answer_len is {}"),
        ):
            hold(value, settings, name, kind, where + what)


def hold(value: int, settings: Settings, name: str, kind: str, what: str) -> None:
    """Raises RefusedError (422) if a value exceeds the limit ``name``; ``what`` is the message, with ``{}`` for the value."""
    limit = getattr(settings, name)
    if value > limit:
        raise over_limit(422, kind, f"{what.format(value)}, at most {limit} are allowed", limit, name)


class BodyLimit:
    """ASGI middleware that reads the whole body and counts its bytes before it passes the request on.

    A body that is too large is refused (413): by its Content-Length before it is read, or as soon as it exceeds the limit.
    A body that has not arrived by the deadline of the request is refused with 408.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes the request on with its whole body; later messages come from the connection, as does a disconnect."""
        try:
            body = await self._read(scope, receive)
        except RefusedError as refused:
            await response(scope, refused)(scope, receive, send)
            return
        unread = True

        async def once() -> Message:
            nonlocal unread
            if unread:
                unread = False
                return {"type": "http.request", "body": body, "more_body": False}
            return await receive()

        await self._app(scope, once, send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes:
        limit = self._settings.max_body_bytes
        declared = dict(scope["headers"]).get(b"content-length", b"")
        if declared.isdigit() and int(declared) > limit:
            raise self._too_large(f"{int(declared)} bytes")
        chunks, size = [], 0
        try:
            async with asyncio.timeout_at(call_of(scope).deadline):
                while True:
                    message = await receive()
                    if REFUSED in scope:  # the connection has stopped reading
                        raise scope[REFUSED]
                    if message["type"] == "http.disconnect":
                        raise RefusedError(499, "disconnected", "the client has disconnected")
                    chunks.append(message.get("body", b""))
                    size += len(chunks[-1])
                    if size > limit:
                        raise self._too_large("more")
                    if not message.get("more_body", False):
                        return b"".join(chunks)
        except TimeoutError:
            seconds = self._settings.request_timeout
            text = f"the body had not arrived after {seconds:g} seconds"
            raise over_limit(408, "slow_body", text, seconds, "request_timeout") from None

    def _too_large(self, what: str) -> RefusedError:
        limit = self._settings.max_body_bytes
        text = f"the body has {what}, at most {limit} bytes are allowed"
        return over_limit(413, "body_too_large", text, limit, "max_body_bytes")
