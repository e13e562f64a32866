"""The routes: each request is JSON in, one job for the scheduler, JSON out."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial
from inspect import cleandoc
from typing import Annotated, Any

from fastapi import Body, Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from fastapi.security import HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from qadeploy import __version__
from qadeploy.errors import FailureError, QadeployError
from qadeploy.serve.answering import answered_by, dump, hugging_face_result, json_list, json_response, reply
from qadeploy.serve.body import BoundedRoute
from qadeploy.serve.calls import Auth, Calls, Failures, response
from qadeploy.serve.contracts import add_contracts
from qadeploy.serve.errors import RefusedError, clean, invalid
from qadeploy.serve.feedback import Feedback
from qadeploy.serve.limits import REQUEST_LIMITS, BodyLimit
from qadeploy.serve.pages import add_page, examples, reference_page
from qadeploy.serve.scheduler import Ask
from qadeploy.serve.schemas import (
    FORMS,
    AnswerRequest,
    AnswersOut,
    CorpusRequest,
    ErrorOut,
    FeedbackRequest,
    HfAnswer,
    HfParameters,
    HfRequest,
    ModelOut,
    ReloadOut,
    StateOut,
)
from qadeploy.serve.search import about
from qadeploy.serve.service import Service
from qadeploy.serve.settings import Settings

_SHOWN_FAULTS = 5
_PLAIN = {
    404: ("not_found", "there is nothing here: /docs lists the routes"),
    405: ("method", "this route does not support this method: /docs lists the routes"),
}
_ABOUT = {
    400: "The body is not valid JSON.",
    401: "The bearer token is missing or wrong.",
    404: "There is no such model or question.",
    409: "The bundle was not reloaded, or the question has another verdict.",
    408: "The body did not arrive in time.",
    413: "The body has too many bytes.",
    422: "The request does not match the schema, or exceeds a limit.",
    429: "The queue is full; Retry-After says in how many seconds it has room.",
    500: "The model or the server failed.",
    503: "The server is shutting down.",
    504: "There was no answer within the time allowed.",
    507: "The feedback could not be written.",
}
_DESCRIPTION = """Answers questions with spans of the context in the request. `start` and `end` count Unicode code
points: in Python `context[start:end]`, in JavaScript `Array.from(context).slice(start, end).join("")`. With
`"offsets": "utf16"` they count what `context.slice(start, end)` counts in JavaScript, and `substring` in Java."""
_CORPUS = """ Questions without a context are answered from {documents} documents of this server: each answer names its `document`
and its `place` there, and its offsets count in the text of the document."""


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": ErrorOut, "description": _ABOUT[status]} for status in statuses}


_ANSWERING = _errors(400, 401, 408, 413, 422, 429, 500, 503, 504)


def create_app(service: Service) -> FastAPI:
    """The ASGI application of a service. The caller closes the service."""
    settings = service.settings
    more = _CORPUS.format(documents=service.corpus.documents) if service.corpus else ""
    cors = Middleware(
        CORSMiddleware,
        allow_origins=list(settings.cors_origins),
        allow_methods=["GET", "POST"],
        allow_headers=["authorization", "content-type", "x-request-id"],
        expose_headers=["retry-after", "x-request-id"],
    )
    app = bounded_app(
        settings,
        Middleware(Calls, metrics=service.metrics, settings=settings, closing=lambda: service.draining),
        *([cors] if settings.cors_origins else []),
        title="qadeploy",
        version=__version__,
        description=_DESCRIPTION + more,
    )
    locked = [Depends(HTTPBearer(auto_error=False))] if settings.token is not None else []
    _add_answers(app, service, locked)
    if service.feedback is not None:
        _add_feedback(app, service.feedback, locked)
    _add_state(app, service, locked)
    _add_pages(app)
    return app


def _add_answers(app: FastAPI, service: Service, locked: Sequence[Any]) -> None:
    post = partial(app.post, tags=["answers"], responses=_ANSWERING, dependencies=locked)

    async def answer(request: Request, body: Annotated[AnswerRequest, Body()]) -> Response:
        """One object gives one result. A list, or `questions` on one `context`, gives a list of results in the same order.

        `contexts` instead of `context` holds passages that are read together: one ranking, scores that compare over all of
        them, one "no answer". Each answer has the index of its passage.

        If one question fails, the request fails, and the error names the question.
        """
        return await reply(request, service, body)

    async def answer_from_corpus(request: Request, body: Annotated[CorpusRequest, Body()]) -> Response:
        """Without `context` and `contexts`, a question is answered from the corpus: the passages that fit it best are read."""
        return await reply(request, service, body)

    answer_from_corpus.__doc__ = f"{answer_from_corpus.__doc__}\n\n{cleandoc(answer.__doc__ or '')}"
    chosen = answer if service.corpus is None else answer_from_corpus
    post(
        "/v1/answer",
        summary="Answer one question, a batch, or many questions on one context, or on several passages",
        response_model=AnswersOut | list[AnswersOut],
        response_model_exclude_unset=True,
    )(chosen)
    add_contracts(app, service, chosen, _ANSWERING | _errors(404), locked)

    @post(
        "/",
        summary="The Hugging Face question-answering task",
        response_model=HfAnswer | list[HfAnswer] | list[list[HfAnswer]],
    )
    async def hugging_face(request: Request, body: HfRequest) -> Response:
        """The format of `huggingface_hub.InferenceClient(model=URL).question_answering`.

        One input gives an object, or a list of objects if `top_k` is above 1. A list of inputs gives a list of these.
        """
        options = (body.parameters or HfParameters()).options
        inputs = body.inputs if isinstance(body.inputs, list) else [body.inputs]
        asks = [Ask(one.question, one.context, options) for one in inputs]
        found = await answered_by(request, service, asks, hugging_face_result)
        return json_response(json_list(found) if isinstance(body.inputs, list) else found[0])


def _add_feedback(app: FastAPI, feedback: Feedback, locked: Sequence[Any]) -> None:
    @app.post(
        "/v1/feedback",
        tags=["answers"],
        summary="Say whether an answer was right",
        status_code=204,
        responses=_errors(400, 401, 404, 408, 409, 413, 422, 507),
        dependencies=locked,
    )
    async def verdict(body: FeedbackRequest) -> Response:
        """The server writes the verdict to its disk, with question and context, before it responds."""
        text, start = (body.answer.text, body.answer.start) if body.answer else (None, None)
        try:
            await asyncio.to_thread(feedback.add, body.request_id, body.question, body.verdict, text, start)
        except FailureError as error:
            raise RefusedError(507, "not_stored", clean(str(error))) from error
        return Response(status_code=204)


def _add_state(app: FastAPI, service: Service, locked: Sequence[Any]) -> None:
    settings, get = service.settings, partial(app.get, tags=["state"])

    @get(
        "/v1/model",
        summary="The bundle and the limits",
        response_model=ModelOut,
        response_model_exclude_unset=True,
        responses=_errors(401),
        dependencies=locked,
    )
    async def model() -> dict[str, Any]:
        """The manifest of the bundle: settings, measurements, versions and the hash of every file."""
        engine = service.engine
        bundle = engine.answerer.bundle
        return {
            "name": engine.name,
            "hash": engine.hash,
            "version": __version__,
            "device": engine.device,
            "workers": engine.scheduler.workers,
            "limits": {name: getattr(settings, name) for name in REQUEST_LIMITS},
            "manifest": bundle.manifest if bundle else {},
            **({"corpus": about(service.corpus)} if service.corpus else {}),
        }

    if settings.token is not None:  # without a token, anybody could trigger reloads

        @app.post(
            "/admin/reload",
            tags=["state"],
            summary="Load the bundle's folder again",
            response_model=ReloadOut,
            responses=_errors(401, 409),
            dependencies=locked,
        )
        async def reload() -> dict[str, Any]:
            """Responds once the new bundle is in use. After an error (409), the previous bundle stays in use."""
            try:
                changed = await service.reload()
            except QadeployError as error:
                raise RefusedError(409, "not_reloaded", clean(str(error))) from error
            return {"name": service.engine.name, "hash": service.engine.hash, "changed": changed}

    @get("/health/live", summary="Whether the process works", response_model=StateOut)
    async def live() -> JSONResponse:
        """503 means that a worker has died and the server needs a restart."""
        alive = service.scheduler.alive
        return JSONResponse({"status": "live" if alive else "dead"}, 200 if alive else 503)

    @get(
        "/health/ready",
        summary="Whether to send requests here",
        response_model=StateOut,
        responses={503: {"model": StateOut, "description": "The server is shutting down, or a worker has died."}},
    )
    async def ready() -> JSONResponse:
        """503 from SIGTERM on, while requests are still answered (draining), and after a worker has died (broken)."""
        state = "ready" if service.ready else "draining" if service.draining else "broken"
        return JSONResponse({"status": state}, 200 if service.ready else 503)

    as_text: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": {}}}}

    @get("/metrics", summary="Metrics for Prometheus", response_class=Response, responses=as_text)
    async def metrics() -> Response:
        """Requests, queue, stages, batches, drift, bundle and process."""
        return Response(service.metrics.text(), headers={"content-type": CONTENT_TYPE_LATEST})


def _add_pages(app: FastAPI) -> None:
    tried = dump(examples())

    @app.get("/static/examples.json", include_in_schema=False)
    async def handbook() -> Response:
        return json_response(tried)

    add_page(app, "index.html")

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(reference_page(app.openapi()))


def bounded_app(settings: Settings, *outer: Middleware, **about: Any) -> FastAPI:
    """An application for HTTP alone that bounds and, with a token, guards its requests, and answers every error with JSON.

    Args:
        settings: The settings of the server.
        *outer: Middleware that sees all responses, the outermost first.
        **about: Arguments of ``FastAPI``.
    """
    auth = [Middleware(Auth, token=settings.token, metrics=settings.protect_metrics)] if settings.token else []
    app = FastAPI(
        docs_url=None,  # FastAPI's page loads scripts from other sites
        redoc_url=None,
        redirect_slashes=False,
        middleware=[*outer, Middleware(Failures), *auth, Middleware(BodyLimit, settings=settings)],
        **about,
    )
    app.state.settings = settings
    app.router.route_class = BoundedRoute

    @app.exception_handler(RefusedError)
    async def refused(request: Request, error: RefusedError) -> Response:
        return response(request.scope, error)

    @app.exception_handler(RequestValidationError)
    async def unreadable(request: Request, error: RequestValidationError) -> Response:
        return response(request.scope, invalid(_faults(error)))

    @app.exception_handler(HTTPException)
    async def plain(request: Request, error: HTTPException) -> Response:
        kind, message = _PLAIN.get(error.status_code, ("bad_request", str(error.detail)))
        found = response(request.scope, RefusedError(error.status_code, kind, message))
        found.headers.update(error.headers or {})
        return found

    return app


def _faults(error: RequestValidationError) -> str:
    """The first faults, one clause each: the field and what is wrong. Values are left out: they may be private texts."""
    found = []
    for fault in error.errors():
        place = fault["loc"][2:] if fault["loc"][1:2] and fault["loc"][1] in FORMS else fault["loc"][1:]
        found.append(f"{'.'.join(map(str, place)) or 'body'}: {fault['msg']}")
    more = f" (and {len(found) - _SHOWN_FAULTS} more)" if len(found) > _SHOWN_FAULTS else ""
    return "; ".join(found[:_SHOWN_FAULTS]) + more
