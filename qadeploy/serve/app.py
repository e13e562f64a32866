"""The routes: each request is JSON in, one job for the scheduler, JSON out."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Sequence
from importlib.resources import files
from inspect import cleandoc
from typing import Annotated, Any

from fastapi import Body, Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from fastapi.security import HTTPBearer
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import Scope

from qadeploy import __version__
from qadeploy.errors import LogitsError
from qadeploy.inference.answerer import DecodedPair, to_answers
from qadeploy.inference.trace import trace_dict
from qadeploy.records import NO_ANSWER
from qadeploy.serve.auth import Auth
from qadeploy.serve.body import BoundedRoute
from qadeploy.serve.calls import Calls, call_of, response
from qadeploy.serve.errors import RefusedError, clean, refusal
from qadeploy.serve.examples import examples
from qadeploy.serve.limits import REQUEST_LIMITS, BodyLimit, check_limits
from qadeploy.serve.metrics import CONTENT_TYPE
from qadeploy.serve.reference import reference_page
from qadeploy.serve.scheduler import Ask, Render, deadline_passed
from qadeploy.serve.schemas import (
    FORMS,
    AnswerRequest,
    AnswersOut,
    AskItem,
    AskMany,
    AskOne,
    CorpusRequest,
    ErrorOut,
    HfAnswer,
    HfParameters,
    HfRequest,
    ModelOut,
    StateOut,
)
from qadeploy.serve.search import about, corpus_answers, from_corpus
from qadeploy.serve.service import Service

_log = logging.getLogger("qadeploy.serve")
_SHOWN_FAULTS = 5
_PLAIN = {
    404: ("not_found", "there is nothing here: /docs lists the routes"),
    405: ("method", "this route does not support this method: /docs lists the routes"),
}
_ABOUT = {
    400: "The body is not valid JSON.",
    401: "The bearer token is missing or wrong.",
    408: "The body did not arrive in time.",
    413: "The body has too many bytes.",
    422: "The request does not match the schema, or exceeds a limit.",
    429: "The queue is full; Retry-After says in how many seconds it has room.",
    500: "The model or the server failed.",
    503: "The server is shutting down.",
    504: "There was no answer within the time allowed.",
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
    app = FastAPI(
        title="qadeploy",
        version=__version__,
        description=_DESCRIPTION + more,
        docs_url=None,  # FastAPI's page loads scripts from other sites
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.settings = settings
    app.router.route_class = BoundedRoute
    app.add_middleware(BodyLimit, settings=settings)
    if settings.token is not None:
        app.add_middleware(Auth, token=settings.token, metrics=settings.protect_metrics)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type", "x-request-id"],
            expose_headers=["retry-after", "x-request-id"],
        )
    app.add_middleware(Calls, metrics=service.metrics, settings=settings, closing=lambda: service.draining)
    add_errors(app)
    locked = [Depends(HTTPBearer(auto_error=False))] if settings.token is not None else []
    _add_answers(app, service, locked)
    _add_state(app, service, locked)
    _add_pages(app)
    return app


def _add_answers(app: FastAPI, service: Service, locked: Sequence[Any]) -> None:
    post = app.post(
        "/v1/answer",
        tags=["answers"],
        summary="Answer one question, a batch, or many questions on one context, or on several passages",
        response_model=AnswersOut | list[AnswersOut],
        response_model_exclude_unset=True,
        responses=_ANSWERING,
        dependencies=locked,
    )

    async def answer(request: Request, body: Annotated[AnswerRequest, Body()]) -> Response:
        """One object gives one result. A list, or `questions` on one `context`, gives a list of results in the same order.

        `contexts` instead of `context` holds passages that are read together: one ranking, scores that compare over all of
        them, one "no answer". Each answer has the index of its passage.

        If one question fails, the request fails, and the error names the question.
        """
        return await _reply(request, service, body)

    async def answer_from_corpus(request: Request, body: Annotated[CorpusRequest, Body()]) -> Response:
        """Without `context` and `contexts`, a question is answered from the corpus: the passages that fit it best are read."""
        return await _reply(request, service, body)

    if service.corpus is None:
        post(answer)
    else:
        answer_from_corpus.__doc__ = f"{answer_from_corpus.__doc__}\n\n{cleandoc(answer.__doc__ or '')}"
        post(answer_from_corpus)

    @app.post(
        "/",
        tags=["answers"],
        summary="The Hugging Face question-answering task",
        response_model=HfAnswer | list[HfAnswer] | list[list[HfAnswer]],
        responses=_ANSWERING,
        dependencies=locked,
    )
    async def hugging_face(request: Request, body: HfRequest) -> Response:
        """The format of `huggingface_hub.InferenceClient(model=URL).question_answering`.

        One input gives an object, or a list of objects if `top_k` is above 1. A list of inputs gives a list of these.
        """
        options = (body.parameters or HfParameters()).options
        many = isinstance(body.inputs, list)
        inputs = body.inputs if isinstance(body.inputs, list) else [body.inputs]
        asks = [Ask(one.question, one.context, options) for one in inputs]
        found = await _answered(request, service, asks, _hugging_face)
        return _json(_list(found) if many else found[0])


def _add_state(app: FastAPI, service: Service, locked: Sequence[Any]) -> None:
    settings, answerer = service.settings, service.answerer

    @app.get(
        "/v1/model",
        tags=["state"],
        summary="The bundle and the limits",
        response_model=ModelOut,
        response_model_exclude_unset=True,
        responses=_errors(401),
        dependencies=locked,
    )
    async def model() -> dict[str, Any]:
        """The manifest of the bundle: settings, measurements, versions and the hash of every file."""
        bundle = answerer.bundle
        return {
            "name": clean(bundle.name) if bundle else "",
            "hash": service.hash,
            "version": __version__,
            "device": service.device,
            "workers": service.scheduler.workers,
            "limits": {name: getattr(settings, name) for name in REQUEST_LIMITS},
            "manifest": bundle.manifest if bundle else {},
            **({"corpus": about(service.corpus)} if service.corpus else {}),
        }

    @app.get("/health/live", tags=["state"], summary="Whether the process works", response_model=StateOut)
    async def live() -> JSONResponse:
        """503 means that a worker has died and the server needs a restart."""
        alive = service.scheduler.alive
        return JSONResponse({"status": "live" if alive else "dead"}, 200 if alive else 503)

    @app.get(
        "/health/ready",
        tags=["state"],
        summary="Whether to send requests here",
        response_model=StateOut,
        responses={503: {"model": StateOut, "description": "The server is shutting down, or a worker has died."}},
    )
    async def ready() -> JSONResponse:
        """503 from SIGTERM on, while requests are still answered (draining), and after a worker has died (broken)."""
        state = "ready" if service.ready else "draining" if service.draining else "broken"
        return JSONResponse({"status": state}, 200 if service.ready else 503)

    @app.get(
        "/metrics",
        tags=["state"],
        summary="Metrics for Prometheus",
        response_class=Response,
        responses={200: {"content": {"text/plain": {}}}},
    )
    async def metrics() -> Response:
        """Requests, queue, stages, batches, bundle and process."""
        return Response(service.metrics.text(), headers={"content-type": CONTENT_TYPE})


def _add_pages(app: FastAPI) -> None:
    page = files("qadeploy.serve") / "page"
    start = (page / "index.html").read_text(encoding="utf-8")
    tried = _dump(examples())

    @app.get("/static/examples.json", include_in_schema=False)
    async def handbook() -> Response:
        return _json(tried)

    app.mount("/static", Static(directory=str(page)), name="static")

    @app.get("/", include_in_schema=False)
    async def index() -> HTMLResponse:
        return HTMLResponse(start)

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(reference_page(app.openapi()))


class Static(StaticFiles):
    """Files under one path each: Starlette's also have those with a slash at the end, or with ``//`` and ``./``."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        """The file. Raises HTTPException if the path is not exactly its own."""
        if scope["path"] != f"/static/{path}":
            raise HTTPException(404)
        return await super().get_response(path, scope)


def add_errors(app: FastAPI) -> None:
    """Answers whatever goes wrong with JSON of one shape."""

    @app.exception_handler(RefusedError)
    async def refused(request: Request, error: RefusedError) -> Response:
        return response(request.scope, error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return response(request.scope, RefusedError(422, "invalid_request", _faults(error)))

    @app.exception_handler(HTTPException)
    async def plain(request: Request, error: HTTPException) -> Response:
        kind, message = _PLAIN.get(error.status_code, ("bad_request", str(error.detail)))
        found = response(request.scope, RefusedError(error.status_code, kind, message))
        found.headers.update(error.headers or {})
        return found

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> Response:
        return response(request.scope, RefusedError(500, "internal", "the server failed; its log has the reason"))


async def _reply(request: Request, service: Service, body: AskOne | AskMany | Sequence[AskItem]) -> Response:
    if isinstance(body, AskOne):
        asks = [_ask(service, body.question, body)]
    elif isinstance(body, AskMany):
        asks = [_ask(service, question, body) for question in body.questions]
    else:
        asks = [_ask(service, item.question, item) for item in body]
    traced = isinstance(body, AskOne) and body.trace
    found = await _answered(request, service, asks, _shown(service, traced))
    return _json(found[0] if isinstance(body, AskOne) else _list(found))


async def _answered(request: Request, service: Service, asks: Sequence[Ask], render: Render) -> list[bytes]:
    """The results of ``render``. Raises RefusedError: limits, a full queue, the deadline, or an error of answering."""
    settings, scheduler, call = service.settings, service.scheduler, call_of(request.scope)
    check_limits(asks, settings)
    call.questions = len(asks)
    if settings.log_text:
        asked = [_logged(ask) for ask in asks]
        _log.info("asked", extra={"fields": {"request_id": call.request_id, "asked": asked}})
    seconds = call.deadline - asyncio.get_running_loop().time()
    try:
        job = scheduler.submit(asks, render, timeout=seconds)
    except RefusedError as full:
        if full.status == 429:
            service.metrics.dropped("full")
        raise
    answered = asyncio.wrap_future(job.future)
    answered.add_done_callback(lambda future: future.cancelled() or future.exception())  # retrieves the exception
    gone = asyncio.ensure_future(request.receive())
    either: set[asyncio.Future[Any]] = {answered, gone}
    try:
        await asyncio.wait(either, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if answered.done():
            return list(answered.result())
        if gone.done():
            raise RefusedError(499, "disconnected", "the client has disconnected")
        raise deadline_passed(settings.request_timeout)
    except Exception as error:
        raise _told(error, service, call.request_id) from error
    finally:
        call.windows = job.windows
        gone.cancel()
        scheduler.drop(job, RefusedError(499, "dropped", "nobody waits for it"))  # no effect if it is over


def _told(error: Exception, service: Service, request_id: str) -> RefusedError:
    """The refusal that the caller sees. It is counted, and logged if the server is at fault."""
    told = refusal(error, service.settings)
    if told.status == 504:
        service.metrics.dropped("deadline")
        told = deadline_passed(service.settings.request_timeout)  # counted from the head of the request
    if isinstance(error, LogitsError):
        service.metrics.bad_logits()
    if told.status == 500:
        fields = {"request_id": request_id, "error": clean(str(error))}
        _log.error("answering failed", extra={"fields": fields}, exc_info=None if told.kind != "internal" else error)
    return told


def _logged(ask: Ask) -> dict[str, Any]:
    if ask.search:
        return {"question": clean(ask.question)}
    if isinstance(ask.context, str):
        return {"question": clean(ask.question), "context": clean(ask.context)}
    return {"question": clean(ask.question), "contexts": [clean(text) for text in ask.context]}


def _ask(service: Service, question: str, given: AskItem | AskMany) -> Ask:
    if given.texts is not None:
        return Ask(question, given.texts, given.options)
    if service.corpus is None:  # the schema does not let it through
        raise RefusedError(422, "invalid_request", "give either context, or contexts for several passages")
    return from_corpus(service.corpus, service.settings, question, given.options)


def _shown(service: Service, traced: bool) -> Render:
    """The result of a question as JSON."""

    def render(ask: Ask, pair: DecodedPair | None) -> bytes:
        if service.corpus and ask.search:
            told = corpus_answers(service.corpus, ask, pair)
        else:
            told = {"answers": [answer.to_dict() for answer in to_answers(pair, ask.options)] if pair else []}
        if pair and pair.skipped:
            told["skipped"] = pair.skipped
        answers = _dump(told)
        if not traced or pair is None:
            return answers
        trace = trace_dict(service.answerer, pair, ask.options)
        # Window by window: one call for megabytes would keep the interpreter, and so the event loop, for too long.
        windows = _list([_dump(window) for window in trace.pop("windows")])
        return b'%b,"trace":%b,"windows":%b}}' % (answers[:-1], _dump(trace)[:-1], windows)

    return render


def _hugging_face(ask: Ask, pair: DecodedPair | None) -> bytes:
    found = (to_answers(pair, ask.options) if pair else []) or [NO_ANSWER]  # no token of the context can be an answer
    told = [{"answer": a.text, "score": a.score, "start": a.start, "end": a.end} for a in found]
    return _dump(told if ask.options.top_k > 1 else told[0])


def _dump(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def _list(found: Sequence[bytes]) -> bytes:
    return b"[" + b",".join(found) + b"]"


def _json(content: bytes) -> Response:
    return Response(content, media_type="application/json")


def _faults(error: RequestValidationError) -> str:
    """The first faults, one clause each: the field and what is wrong. Values are left out because they may be texts."""
    found = []
    for fault in error.errors():
        place = fault["loc"][2:] if fault["loc"][1:2] and fault["loc"][1] in FORMS else fault["loc"][1:]
        found.append(f"{'.'.join(map(str, place)) or 'body'}: {fault['msg']}")
    more = f" (and {len(found) - _SHOWN_FAULTS} more)" if len(found) > _SHOWN_FAULTS else ""
    return "; ".join(found[:_SHOWN_FAULTS]) + more
