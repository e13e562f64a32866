"""What a request may ask for. Each limit has an error of its own that names it and the flag that raises it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qadeploy.serve.calls import call_of, respond
from qadeploy.serve.errors import RefusedError
from qadeploy.serve.scheduler import Ask
from qadeploy.serve.settings import Settings, flag_of

REQUEST_LIMITS = (
    "max_body_bytes",
    "max_context_chars",
    "max_question_chars",
    "max_windows",
    "max_batch",
    "max_top_k",
    "max_answer_tokens",
    "request_timeout",
)


def check(asks: Sequence[Ask], settings: Settings) -> None:
    """Raises RefusedError (422) where a request asks for more than the settings allow. Windows are counted when there are some."""
    _hold(len(asks), settings, "max_batch", "batch_too_large", "the request holds {} questions")
    for number, ask in enumerate(asks, 1):
        where = f"question {number}: " if len(asks) > 1 else ""
        of = ask.options
        _hold(
            len(ask.context),
            settings,
            "max_context_chars",
            "context_too_long",
            f"{where}the context has {{}} characters",
        )
        _hold(len(ask.question), settings, "max_question_chars", "question_too_long", f"{where}it has {{}} characters")
        _hold(of.top_k, settings, "max_top_k", "top_k_too_large", f"{where}top_k is {{}}")
        _hold(
            of.max_answer_len or 0, settings, "max_answer_tokens", "answer_too_long", f"{where}max_answer_len is {{}}"
        )


def _hold(value: int, settings: Settings, name: str, kind: str, what: str) -> None:
    limit = getattr(settings, name)
    if value > limit:
        refused = RefusedError(422, kind, "", limit=limit, setting=name)
        refused.args = (f"{what.format(value)}, at most {limit} are taken ({refused.flag})",)
        raise refused


class BodyLimit:
    """ASGI middleware that reads a body whole, counting its bytes as they come, before anything else is done.

    A body that is too large is refused (413) by its Content-Length before it is read, else as soon as it is; one
    that is not there when the request's time is up is refused with 408.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes the request on with its whole body; what is received after that is the caller's leaving."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            body = await self._read(scope, receive)
        except RefusedError as refused:
            await respond(scope, receive, send, refused)
            return
        if body is None:
            return
        unread = True

        async def once() -> Message:
            nonlocal unread
            if unread:
                unread = False
                return {"type": "http.request", "body": body, "more_body": False}
            return await receive()

        await self._app(scope, once, send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """The body, or None where the caller has gone."""
        limit = self._settings.max_body_bytes
        said = dict(scope["headers"]).get(b"content-length", b"")
        if said.isdigit() and int(said) > limit:
            raise self._too_large(f"{int(said)} bytes")
        chunks, size = [], 0
        try:
            async with asyncio.timeout_at(call_of(scope).deadline):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    chunks.append(message.get("body", b""))
                    size += len(chunks[-1])
                    if size > limit:
                        raise self._too_large("more")
                    if not message.get("more_body", False):
                        return b"".join(chunks)
        except TimeoutError:
            seconds = self._settings.request_timeout
            text = f"the body was not there after {seconds:g} seconds ({flag_of('request_timeout')})"
            raise RefusedError(408, "slow_body", text, limit=seconds, setting="request_timeout") from None

    def _too_large(self, what: str) -> RefusedError:
        limit = self._settings.max_body_bytes
        text = f"the body has {what}, at most {limit} bytes are taken ({flag_of('max_body_bytes')})"
        return RefusedError(413, "body_too_large", text, limit=limit, setting="max_body_bytes")
