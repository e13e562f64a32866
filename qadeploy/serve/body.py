"""JSON bodies, read so that none of them blocks the event loop.

Python parses megabytes of text in strings within milliseconds, but megabytes of small values take seconds, and pydantic takes
even longer to report their errors. So the strings, and the bytes outside them (punctuation, numbers, constants), are counted
first, in steps between which other requests run. A body with more of them than ``max_batch`` questions on ``max_passages``
passages each can need is refused, which bounds all that follows: parsing, counting the questions, and validating each.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic_core import from_json
from starlette.exceptions import HTTPException

from qadeploy.serve.errors import RefusedError, over_limit
from qadeploy.serve.limits import hold
from qadeploy.serve.settings import Settings

_STEP = 2**16  # bytes
_PARTS_PER_QUESTION = 128  # strings, and non-space bytes outside them; a question with every option has about 100
_PARTS_PER_PASSAGE = 2  # the string and the comma
_PARTS_MORE = 1024  # for everything besides the questions, such as ``parameters``
_WHITE = b" \t\r\n"


class BoundedRoute(APIRoute):
    """A route whose JSON body is bounded by the settings in the state of the application."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's handler, which reads JSON with ``_read_json``."""
        handler = super().get_route_handler()

        async def bounded(request: Request) -> Response:
            own = _Request(request.scope, request.receive)
            try:
                return await handler(own)
            except HTTPException as error:  # FastAPI turns any error of reading the body into one
                raise own.refused or error from error

        return bounded


class _Request(Request):
    refused: RefusedError | None = None

    async def json(self) -> Any:
        try:
            return await _read_json(await self.body(), self.app.state.settings)
        except RefusedError as refused:
            self.refused = refused
            raise


async def _read_json(body: bytes, settings: Settings) -> Any:
    """The value of a JSON text. Raises RefusedError if it holds too much, ValueError or RecursionError if it is not JSON."""
    each = _PARTS_PER_QUESTION + _PARTS_PER_PASSAGE * settings.max_passages
    allowed = _PARTS_MORE + each * settings.max_batch
    found = 0
    for end, parts in _parts(body):
        found += parts
        if found > allowed:
            raise _too_much(body[:end], settings)
        await asyncio.sleep(0)
    value = json.loads(body.decode("utf-8-sig"))
    hold(_questions(value), settings, "max_batch", "batch_too_large", "the request holds {} questions")
    return value


def _parts(body: bytes) -> Iterator[tuple[int, int]]:
    """Yields the end of each step, and its number of strings and of bytes outside them (a backslash there is no JSON)."""
    inside, escape = False, b""
    for start in range(0, len(body), _STEP):
        step = (escape + body[start : start + _STEP]).replace(b"\\\\", b"")
        escape = b"\\" if step.endswith(b"\\") else b""
        pieces = step.removesuffix(escape).replace(b'\\"', b"").split(b'"')
        yield start + _STEP, len(pieces) // 2 + len(b"".join(pieces[inside::2]).translate(None, _WHITE))
        inside ^= len(pieces) % 2 == 0


def _too_much(begun: bytes, settings: Settings) -> RefusedError:
    """The refusal of a body, from its first bytes: too many questions or passages, or too many other values."""
    try:
        value = from_json(begun.decode("utf-8-sig", "ignore"), allow_partial=True)
        most = max(map(_passages, value if isinstance(value, list) else [value]), default=0)
        hold(most, settings, "max_passages", "too_many_passages", "a question has {} passages or more")
        count = _questions(value)
        hold(count, settings, "max_batch", "batch_too_large", "the request holds {} questions or more")
    except RefusedError as refused:
        return refused
    except ValueError:
        return RefusedError(400, "bad_request", "the body is not valid JSON, or is nested too deep")
    message = f"the body holds more values, fields or digits than {settings.max_batch} questions need"
    return over_limit(422, "invalid_request", message, settings.max_batch, "max_batch")


def _passages(value: Any) -> int:
    """How many passages a question has."""
    found = value.get("contexts") if isinstance(value, dict) else None
    return len(found) if isinstance(found, list) else 0


def _questions(value: Any) -> int:
    """How many questions the body of a request to any route has."""
    if isinstance(value, dict):
        value = value.get("questions", value.get("inputs"))
    if not isinstance(value, list):
        return 1
    tensors = [each["data"] for each in value if isinstance(each, dict) and isinstance(each.get("data"), list)]
    return len(value) if len(tensors) < len(value) else max(map(len, tensors), default=0)
