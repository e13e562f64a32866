"""From requests to answers: jobs for the scheduler, results as JSON, and the refusal if a request fails."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from qadeploy.errors import LogitsError
from qadeploy.inference.pairs import DecodedPair, to_answers
from qadeploy.inference.trace import trace_dict
from qadeploy.records import NO_ANSWER
from qadeploy.serve.calls import call_of
from qadeploy.serve.errors import RefusedError, clean, refusal
from qadeploy.serve.limits import check_limits
from qadeploy.serve.scheduler import Ask, Render, deadline_passed
from qadeploy.serve.schemas import AskItem, AskMany, AskOne
from qadeploy.serve.search import corpus_answers, from_corpus
from qadeploy.serve.service import Service

_log = logging.getLogger("qadeploy.serve")


async def reply(request: Request, service: Service, body: AskOne | AskMany | Sequence[AskItem]) -> Response:
    """The response of ``/v1/answer``. Raises RefusedError as ``answered_by`` does."""
    if isinstance(body, AskOne):
        asks = [_ask(service, body.question, body)]
    elif isinstance(body, AskMany):
        asks = [_ask(service, question, body) for question in body.questions]
    else:
        asks = [_ask(service, item.question, item) for item in body]
    traced = isinstance(body, AskOne) and body.trace
    found = await answered_by(request, service, asks, _shown(service, traced))
    return json_response(found[0] if isinstance(body, AskOne) else json_list(found))


async def answered_by(request: Request, service: Service, asks: Sequence[Ask], render: Render) -> list[bytes]:
    """The results of ``render``. Raises RefusedError on a limit, a full queue, the deadline, or an error while answering."""
    settings, scheduler, call = service.settings, service.scheduler, call_of(request.scope)
    check_limits(asks, settings)
    call.questions = len(asks)
    if settings.log_text:
        asked = [_logged(ask) for ask in asks]
        _log.info("asked", extra={"fields": {"request_id": call.request_id, "asked": asked}})
    if service.feedback is not None:
        asks = [replace(ask, number=number) for number, ask in enumerate(asks)]
        render = service.feedback.remembering(call.request_id, service.engine.hash, render)
    seconds = call.deadline - asyncio.get_running_loop().time()
    try:
        job = scheduler.submit(asks, render, timeout=seconds)
    except RefusedError as full:
        if full.status == 429:
            service.metrics.dropped.labels("full").inc()
        raise
    answered = asyncio.wrap_future(job.future)
    answered.add_done_callback(lambda future: future.cancelled() or future.exception())  # or asyncio logs the exception
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
        scheduler.end(job, RefusedError(499, "dropped", "nobody waits for it"))  # no effect if the job is over


def _told(error: Exception, service: Service, request_id: str) -> RefusedError:
    """The refusal that the caller sees. It is counted, and logged if the server is at fault."""
    told = refusal(error, service.settings)
    if told.status == 504:
        service.metrics.dropped.labels("deadline").inc()
        told = deadline_passed(service.settings.request_timeout)  # the time counts from the head of the request
    if isinstance(error, LogitsError):
        service.metrics.bad_logits.inc()
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
    if given.texts is None and service.corpus is not None:
        return from_corpus(service.corpus, service.settings, question, given.options)
    return Ask(question, given.texts or (), given.options)  # without a corpus, the schema requires texts


def _shown(service: Service, traced: bool) -> Render:
    """A function that renders the result of a question as JSON."""
    answerer = service.engine.answerer  # stays the one that decodes the pairs, even after a reload

    def render(ask: Ask, pair: DecodedPair | None) -> bytes:
        if service.corpus and ask.search:
            told = corpus_answers(service.corpus, ask, pair)
        else:
            told = {"answers": [answer.to_dict() for answer in to_answers(pair, ask.options)] if pair else []}
        if pair and pair.skipped:
            told["skipped"] = pair.skipped
        answers = dump(told)
        if not traced or pair is None:
            return answers
        trace = trace_dict(answerer, pair, ask.options)
        # Window by window: one call for megabytes would hold the GIL, and so block the event loop, for too long.
        windows = json_list([dump(window) for window in trace.pop("windows")])
        return b'%b,"trace":%b,"windows":%b}}' % (answers[:-1], dump(trace)[:-1], windows)

    return render


def hugging_face_result(ask: Ask, pair: DecodedPair | None) -> bytes:
    """The result of a question as JSON, in the format of the Hugging Face task."""
    found = (to_answers(pair, ask.options) if pair else []) or [NO_ANSWER]
    told = [{"answer": a.text, "score": a.score, "start": a.start, "end": a.end} for a in found]
    return dump(told if ask.options.top_k > 1 else told[0])


def dump(value: Any) -> bytes:
    """A value as JSON."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def json_list(found: Sequence[bytes]) -> bytes:
    """A JSON list of values that are already JSON."""
    return b"[" + b",".join(found) + b"]"


def json_response(content: bytes) -> Response:
    """A response with JSON as its body."""
    return Response(content, media_type="application/json")
