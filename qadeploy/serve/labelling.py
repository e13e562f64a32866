"""The labelling page: a desk over HTTP, on loopback only.

No other website can use it: each call needs the token in the fragment of the printed address, which browsers send to no
server, and a loopback Host header, which prevents DNS rebinding.
"""

from __future__ import annotations

import contextlib
import secrets
import signal
import socket
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import uvicorn
from fastapi import FastAPI
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import Response

from qadeploy.errors import InputError, QadeployError
from qadeploy.labelling.desk import DecidedError, Desk, Shown
from qadeploy.serve.app import bounded_app
from qadeploy.serve.calls import Calls, response
from qadeploy.serve.errors import RefusedError
from qadeploy.serve.metrics import Metrics
from qadeploy.serve.pages import add_page
from qadeploy.serve.run import PLAIN, handling
from qadeploy.serve.settings import Settings

_LOOPBACK = "127.0.0.1"


class _Call(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    tab: str


class _OnRow(_Call):
    key: str


class _Asked(_OnRow):
    question: str


class _Decision(_Asked):
    start: int | None  # null: the answer is not in the text
    end: int | None


def create_label_app(desk: Desk, token: str) -> FastAPI:
    """The ASGI application of a desk. The caller closes the desk."""
    settings = Settings(token=token)
    app = bounded_app(
        settings,
        Middleware(Calls, metrics=Metrics(), settings=settings, closing=lambda: False),
        Middleware(TrustedHostMiddleware, allowed_hosts=[_LOOPBACK, "localhost"], www_redirect=False),
        openapi_url=None,
    )

    @app.exception_handler(QadeployError)
    async def refused(request: Request, error: QadeployError) -> Response:
        status = 409 if isinstance(error, DecidedError) else 422 if isinstance(error, InputError) else 500
        return response(request.scope, RefusedError(status, "not_done", str(error)))

    @app.exception_handler(OSError)
    async def unwritten(request: Request, error: OSError) -> Response:
        text = f"nothing was saved, and the row stays here: {error.filename or 'the disk'}: {error.strerror}"
        return response(request.scope, RefusedError(507, "not_saved", text))

    _add_calls(app, desk)
    add_page(app, "label.html")
    return app


def _add_calls(app: FastAPI, desk: Desk) -> None:
    # Plain functions: FastAPI runs them in threads, since they wait for the model and the disk.
    @app.post("/v1/label/show")
    def show(call: _Call) -> JSONResponse:
        return _told(desk, desk.show(call.tab))

    @app.post("/v1/label/skip")
    def skip(call: _OnRow) -> JSONResponse:
        desk.skip(call.tab, call.key)
        return _told(desk, desk.show(call.tab))

    @app.post("/v1/label/ask")
    def ask(call: _Asked) -> JSONResponse:
        return JSONResponse({"proposal": desk.ask(call.key, call.question).to_dict()})

    @app.post("/v1/label/decide")
    def decide(call: _Decision) -> JSONResponse:
        span = None if call.start is None or call.end is None else (call.start, call.end)
        if span is None and (call.start, call.end) != (None, None):
            raise InputError("start and end must both be given, or both be null")
        desk.decide(call.key, span, call.question)
        return _told(desk, desk.show(call.tab))

    @app.post("/v1/label/undo")
    def undo(call: _Call) -> JSONResponse:
        return _told(desk, desk.undo(call.tab))


def _told(desk: Desk, shown: Shown | None) -> JSONResponse:
    """What the page shows: a row, or null if all are decided, and the progress."""
    told: dict[str, Any] = {**desk.progress(), "annotator": desk.annotator, "documents": desk.documents, "row": None}
    if shown:
        item = shown.item
        names = ("key", "context", "question", "document", "place")
        told["row"] = {name: getattr(item, name) for name in names}
        told["row"]["proposal"] = shown.proposal.to_dict() if shown.proposal else None
        if row := shown.undone:
            span = None if row["is_impossible"] else (row["answer_start"], row["answer_start"] + len(row["answer"]))
            told["row"]["undone"] = {"question": row["question"], "span": span}
    return JSONResponse(told)


class _Server(uvicorn.Server):
    """uvicorn's server, but a signal makes it return; uvicorn's own handler would then kill the process by that signal."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handles SIGTERM and SIGINT while the server runs."""
        with handling(dict.fromkeys((signal.SIGTERM, signal.SIGINT), partial(setattr, self, "should_exit", True))):
            yield


def listen(port: int) -> socket.socket:
    """A socket that listens on loopback. Raises InputError if the port is taken."""
    try:
        return socket.create_server((_LOOPBACK, port))
    except OSError as error:
        raise InputError(
            f"--port {port}: cannot listen there: {error.strerror}: give another port, or 0 for a free one"
        ) from error


def serve_desk(desk: Desk, listener: socket.socket, on_ready: Callable[[str], object]) -> None:
    """Serves a desk until a signal arrives; ``on_ready`` is called with the address of the page."""
    token = secrets.token_urlsafe(24)
    config = uvicorn.Config(create_label_app(desk, token), **PLAIN, timeout_graceful_shutdown=5)
    on_ready(f"http://{_LOOPBACK}:{listener.getsockname()[1]}/#{token}")
    _Server(config).run([listener])
