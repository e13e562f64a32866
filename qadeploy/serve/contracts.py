"""Routes for hosting platforms, which give the same answers: Amazon SageMaker and the Open Inference Protocol.

SageMaker requires ``GET /ping`` and ``POST /invocations`` of a container; the latter accepts what ``/v1/answer`` accepts. In the
Open Inference Protocol (version 2 of KServe's protocol, over REST) the model has the inputs ``question`` and ``context`` and the
outputs ``answer``, ``score``, ``start`` and ``end``, each with one value per question.
"""

from __future__ import annotations

import json
import math
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, Field, model_validator
from pydantic_core import PydanticCustomError

from qadeploy import __version__
from qadeploy.core.settings import Options
from qadeploy.inference.pairs import DecodedPair, to_answers
from qadeploy.records import NO_ANSWER
from qadeploy.serve.answering import answered_by, dump, json_response
from qadeploy.serve.body import BoundedRoute
from qadeploy.serve.errors import RefusedError, clean, invalid
from qadeploy.serve.scheduler import Ask
from qadeploy.serve.schemas import AnswersOut, answering_model
from qadeploy.serve.service import Service

_INPUTS = ("question", "context")
_OUTPUTS = {"answer": "BYTES", "score": "FP64", "start": "INT64", "end": "INT64"}
_TAGS: list[Any] = ["platforms"]
_Responses = dict[int | str, dict[str, Any]]


_OPTIONS = (
    "max_answer_len", "max_seq_len", "doc_stride", "align_to_words", "allow_no_answer", "prefilter", "min_score", "offsets",
)  # fmt: skip
# What /v1/answer accepts and the outputs cannot hold, with the defaults.
_REFUSED = {"top_k": 1, "snippet": None, "trace": False}


class _Parameters(BaseModel):
    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, given: Any) -> Any:
        for name, default in _REFUSED.items():
            if isinstance(given, dict) and given.get(name) not in (None, default):
                text = (
                    "{name} is not supported here, because the outputs hold one answer to each question: use /v1/answer"
                )
                raise PydanticCustomError("unsupported", text, {"name": name})
        return given


# The other parameters, which clients send for servers of another kind, are ignored.
InferParameters = answering_model("InferParameters", _OPTIONS, _Parameters)


class InferInput(BaseModel):
    """A tensor of texts: one per question, or a single context for all questions."""

    name: str = Field(examples=["question"])
    shape: list[Annotated[int, Field(ge=0)]] = Field(min_length=1, max_length=2, examples=[[1]])
    datatype: str = Field(examples=["BYTES"])
    data: list[Any] = Field(examples=[["Who trims the light?"]])

    def texts(self) -> list[str]:
        """The values in order. Raises RefusedError (422) if they are not texts, or their number contradicts the shape."""
        flat = [text for each in self.data for text in (each if isinstance(each, list) else [each])]
        if self.datatype != "BYTES" or not all(isinstance(text, str) for text in flat):
            raise invalid(f"the input {clean(self.name)} must have the datatype BYTES, and strings as data")
        if len(flat) != math.prod(self.shape):
            raise invalid(f"the input {clean(self.name)} has {len(flat)} values, but its shape is {self.shape}")
        return flat


class InferOutput(BaseModel):
    """A requested output."""

    name: str


class InferRequest(BaseModel):
    """An inference request of the Open Inference Protocol, as JSON."""

    id: str | None = None
    parameters: InferParameters | None = None  # type: ignore[valid-type]
    inputs: list[InferInput]
    outputs: list[InferOutput] | None = Field(default=None, description="The requested outputs; null or absent: all.")

    def asks(self) -> list[Ask]:
        """One question for the scheduler per text of ``question``. Raises RefusedError (422)."""
        given = {each.name: each for each in self.inputs}
        if sorted(given) != sorted(_INPUTS) or len(self.inputs) != len(_INPUTS):
            raise invalid("give the inputs question and context, each once")
        questions, contexts = (given[name].texts() for name in _INPUTS)
        contexts = contexts * len(questions) if len(contexts) == 1 else contexts
        if len(questions) != len(contexts) or not questions:
            raise invalid(
                f"{len(questions)} questions need as many contexts, or one for all of them, not {len(contexts)}"
            )
        for number, texts in enumerate(zip(questions, contexts, strict=True), 1):
            for name, text in zip(_INPUTS, texts, strict=True):
                if not text.strip():
                    raise invalid(f"{name} {number} is empty")
        options = Options(**self.parameters.model_dump()) if self.parameters else Options()
        return [Ask(question, context, options) for question, context in zip(questions, contexts, strict=True)]

    def wanted(self) -> list[str]:
        """The names of the requested outputs. Raises RefusedError (422) if one does not exist."""
        names = list(_OUTPUTS) if self.outputs is None else [output.name for output in self.outputs]
        if unknown := sorted({*names} - {*_OUTPUTS}):
            raise invalid(f"there is no output {clean(unknown[0])}: choose from {', '.join(_OUTPUTS)}")
        return names


class InferTensor(BaseModel):
    """An output, with one value per question."""

    name: str
    datatype: str
    shape: list[int]
    data: list[Any]


class InferResponse(BaseModel):
    """The outputs, in the JSON of the Open Inference Protocol."""

    model_name: str
    model_version: str
    id: str | None = Field(default=None, description="The id of the request; absent if it has none.")
    outputs: list[InferTensor]


class InferError(BaseModel):
    """An error in the format of the Open Inference Protocol."""

    error: str
    request_id: str


class _InferRoute(BoundedRoute):
    """A route that assumes JSON if a request has no content-type."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The handler, preceded by a check of the headers."""
        handler = super().get_route_handler()

        async def as_json(request: Request) -> Response:
            if "inference-header-content-length" in request.headers:
                raise invalid("binary tensors are not supported: send the data as JSON (binary_data=False)")
            if "content-type" not in request.headers:
                request.scope["headers"].append((b"content-type", b"application/json"))
                request = Request(request.scope, request.receive)
            return await handler(request)

        return as_json


def add_contracts(
    app: FastAPI,
    service: Service,
    answer: Callable[..., Awaitable[Response]],
    responses: _Responses,
    locked: Sequence[Any],
) -> None:
    """Adds the routes to the application; ``answer`` is the handler of ``/v1/answer``, and ``responses`` are its errors."""
    texts: _Responses = {status: {**about, "model": InferError} for status, about in responses.items()}
    unready: _Responses = {503: {"description": "The server is shutting down, or a worker has died."}}

    get = partial(app.get, tags=_TAGS)

    @get("/ping", summary="SageMaker: whether to send requests here", response_class=Response, responses=unready)
    async def ping() -> Response:
        """An empty response: 200, or 503 like `/health/ready`."""
        return Response(status_code=200 if service.ready else 503)

    app.post(
        "/invocations",
        tags=_TAGS,
        summary="SageMaker: the same as /v1/answer",
        response_model=AnswersOut | list[AnswersOut],
        responses=responses,
        dependencies=locked,
        operation_id="invocations",
    )(answer)

    @get(
        "/v2/health/live",
        summary="Open Inference Protocol: whether the process works",
        responses={503: {"description": "A worker has died."}},
    )
    async def live() -> JSONResponse:
        """Whether the process should be left running."""
        return JSONResponse({"live": service.scheduler.alive}, 200 if service.scheduler.alive else 503)

    @get("/v2/health/ready", summary="Open Inference Protocol: whether the server is ready", responses=unready)
    async def ready() -> JSONResponse:
        """Whether to send requests here."""
        return JSONResponse({"ready": service.ready}, 200 if service.ready else 503)

    locked_get = partial(get, dependencies=locked)

    @locked_get("/v2", summary="Open Inference Protocol: the server", responses={401: texts[401]})
    async def server() -> dict[str, Any]:
        """The name and version of the server."""
        return {"name": "qadeploy", "version": __version__, "extensions": []}

    named: _Responses = {status: texts[status] for status in (401, 404)}

    @locked_get("/v2/models/{model}", summary="Open Inference Protocol: the model", responses=named)
    async def metadata(model: str) -> dict[str, Any]:
        """The tensors of the model. The version is the hash of the bundle."""
        return {
            "name": _name(service, model),
            "versions": [service.engine.hash],
            "platform": "qadeploy_onnx",
            "inputs": [{"name": each, "datatype": "BYTES", "shape": [-1]} for each in _INPUTS],
            "outputs": [{"name": each, "datatype": kind, "shape": [-1]} for each, kind in _OUTPUTS.items()],
        }

    @locked_get(
        "/v2/models/{model}/ready",
        summary="Open Inference Protocol: whether the model is ready",
        responses=named | unready,
    )
    async def model_ready(model: str) -> JSONResponse:
        """As `/v2/health/ready`."""
        return JSONResponse({"name": _name(service, model), "ready": service.ready}, 200 if service.ready else 503)

    router = APIRouter(route_class=_InferRoute)

    @router.post(
        "/v2/models/{model}/infer",
        tags=_TAGS,
        summary="Open Inference Protocol: answer questions",
        response_model=InferResponse,
        responses=texts,
        dependencies=locked,
    )
    async def infer(request: Request, model: str, body: InferRequest) -> Response:
        """The best answer to each question, in order. "No answer" is an empty text at 0."""
        name, version = _name(service, model), service.engine.hash  # a reload may replace the engine meanwhile
        names, asks = body.wanted(), body.asks()
        rows = [json.loads(row) for row in await answered_by(request, service, asks, _row)]
        values = dict(zip(_OUTPUTS, zip(*rows, strict=True), strict=True))
        outputs = [
            {"name": each, "datatype": _OUTPUTS[each], "shape": [len(rows)], "data": list(values[each])}
            for each in names
        ]
        found = {"model_name": name, "model_version": version, "outputs": outputs}
        return json_response(dump(found if body.id is None else found | {"id": body.id}))

    app.include_router(router)


def _row(ask: Ask, pair: DecodedPair | None) -> bytes:
    """The values of the outputs for one question."""
    best = ((to_answers(pair, ask.options) if pair else []) or [NO_ANSWER])[0]
    return dump([best.text, best.score, best.start, best.end])


def _name(service: Service, model: str) -> str:
    """The name of the served model. Raises RefusedError (404) if ``model`` is another."""
    name = service.engine.name
    if model != name:
        raise RefusedError(404, "not_found", f"there is no model {clean(model)} here: this server has {name}")
    return name
