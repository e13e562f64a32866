"""Verdicts of clients on answers, stored as rows that ``qadeploy label`` and ``qadeploy check`` read.

The server remembers the questions that it answered recently, so a client sends only the id of its request and a verdict. The row
is on the disk before the client gets a response. A full file is renamed to ``FILE.1``, which it replaces.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections import OrderedDict
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from qadeploy.errors import FailureError, InputError
from qadeploy.files import BINARY, append_line, holding
from qadeploy.inference.pairs import DecodedPair, to_answers
from qadeploy.records import NO_ANSWER, Answer
from qadeploy.serve.errors import RefusedError, clean, invalid
from qadeploy.serve.scheduler import Ask, Render

_KEPT = 64 * 2**20  # bytes of questions and contexts that are remembered
_log = logging.getLogger("qadeploy.serve")


@dataclass(frozen=True, slots=True)
class Asked:
    """A question, the context of its best answer, that answer, the hash of the bundle, and the verdict on the answer.

    ``begin`` is the position of the context in its document of the corpus; 0 if the client sent the context.
    """

    question: str
    context: str
    best: Answer
    bundle: str
    begin: int = 0
    verdict: tuple[str, str | None, int | None] | None = None

    @property
    def size(self) -> int:
        """The approximate memory in bytes."""
        return 4 * (len(self.question) + len(self.context)) + 500


class Feedback:
    """The verdicts of one server. Thread-safe.

    Args:
        path: The file that rows are appended to.
        most_bytes: The size above which the file is renamed to ``FILE.1``.

    Raises:
        InputError: The file exists and holds something else, or another process is writing it.
    """

    def __init__(self, path: Path, most_bytes: int) -> None:
        self._path, self._most = path, most_bytes
        self._recent: OrderedDict[tuple[str, int], Asked] = OrderedDict()
        self._bytes = 0
        self._lock = threading.RLock()  # guards _recent and _bytes
        self._writes = threading.Lock()
        with ExitStack() as stack:
            stack.enter_context(holding(path))
            self._repair()
            self._held = stack.pop_all()

    def close(self) -> None:
        """Releases the file."""
        self._held.close()

    def _repair(self) -> None:
        """Removes a partial line of a process that died. Raises InputError if the file is not a feedback file."""
        try:
            with self._path.open("r+b") as file:
                first = file.readline()
                if first.endswith(b"\n") and not _is_ours(first):
                    raise InputError(f"{self._path}: is not a feedback file: give --feedback another name")
                file.truncate((first + file.read()).rfind(b"\n") + 1)
        except FileNotFoundError:
            return
        except OSError as error:
            raise InputError(f"--feedback {self._path}: {error.strerror}") from error

    def remembering(self, request_id: str, bundle: str, render: Render) -> Render:
        """Wraps ``render`` to also remember each question of a request with its best answer."""

        def remembers(ask: Ask, pair: DecodedPair | None) -> Any:
            if pair is not None:
                self._remember((request_id, ask.number), _asked(ask, pair, bundle))
            return render(ask, pair)

        return remembers

    def _remember(self, key: tuple[str, int], asked: Asked) -> None:
        with self._lock:
            before = self._recent.pop(key, None)
            self._recent[key] = asked
            self._bytes += asked.size - (before.size if before else 0)
            while self._bytes > _KEPT and len(self._recent) > 1:
                self._bytes -= self._recent.popitem(last=False)[1].size

    def add(self, request_id: str, number: int, verdict: str, text: str | None, start: int | None) -> None:
        """Appends a verdict to the file, unless the same verdict is stored already: a client may send it again.

        Args:
            request_id: The X-Request-ID of the response that held the answer.
            number: The index of the question in its request, from 0.
            verdict: right or wrong.
            text: The right answer, if the verdict is wrong and it is known; empty if the context holds no answer.
            start: Its first code point in the context, or in the document of the corpus that holds the context; needed if it
                occurs in the context several times.

        Raises:
            RefusedError: The question is not remembered (404) or judged (409), or its context lacks the right answer (422).
            FailureError: The file cannot be written.
        """
        key, given = (request_id, number), (verdict, text, start)
        with self._writes:
            with self._lock:
                asked = self._recent.get(key)
            name = f"question {number} of request {request_id}"
            if asked is None:
                raise RefusedError(404, "not_found", f"{name} was not answered recently")
            if asked.verdict is not None:
                if asked.verdict != given:
                    raise RefusedError(409, "judged", f"{name} has another verdict already, which stays as it is")
                return
            judged = asked
            try:
                self._append(_row(asked, f"{request_id}-{number}", given))
                judged = replace(asked, verdict=given)
            finally:  # stored or not, the client may send it again: the question must not be evicted before
                with self._lock:
                    if self._recent.get(key, asked) is asked:
                        self._remember(key, judged)

    def _append(self, row: dict[str, Any]) -> None:
        line = json.dumps(row, ensure_ascii=False).encode() + b"\n"
        try:
            descriptor = os.open(self._path, os.O_WRONLY | BINARY | os.O_APPEND | os.O_CREAT, 0o600)
            try:
                append_line(descriptor, line)
                size = os.fstat(descriptor).st_size
            finally:
                os.close(descriptor)
        except OSError as error:
            raise FailureError(f"{self._path}: the feedback was not stored: {error.strerror}") from error
        if size > self._most:
            try:
                self._path.replace(self._path.with_name(f"{self._path.name}.1"))
            except OSError as error:  # the row is stored, so the client must not send it again
                fields = {"file": clean(str(self._path)), "error": error.strerror}
                _log.warning("the full feedback file was not renamed", extra={"fields": fields})


def _is_ours(line: bytes) -> bool:
    try:
        row = json.loads(line)
    except ValueError:
        return False
    return isinstance(row, dict) and {"question", "context", "verdict", "predicted"} <= row.keys()


def _asked(ask: Ask, pair: DecodedPair, bundle: str) -> Asked:
    best = next(
        iter(to_answers(pair, replace(ask.options, top_k=1, min_score=0, snippet=None, offsets="codepoints"))),
        NO_ANSWER,
    )
    joined = pair.passages
    if joined is None:
        return Asked(ask.question, pair.context.text, best, bundle)
    spans = pair.decoded.spans
    part = joined.part_at(spans[0].start) if spans else 0  # for the null answer, the passage of the best span
    begin = ask.found[joined.numbers[part]].start if ask.found else 0
    return Asked(ask.question, joined.parts[part].text, best, bundle, begin)


def _row(asked: Asked, request: str, given: tuple[str, str | None, int | None]) -> dict[str, Any]:
    """The stored row. It has no id: a client may send one X-Request-ID twice, but ids in a data set must be unique."""
    return {
        "request": request,
        "question": asked.question,
        "context": asked.context,
        **_answer(asked, *given),
        "verdict": given[0],
        "predicted": asked.best.text,
        "score": asked.best.score,
        "bundle": asked.bundle,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _answer(asked: Asked, verdict: str, text: str | None, start: int | None) -> dict[str, Any]:
    """The fields of the right answer; none if it is not known. Raises RefusedError (422)."""
    if verdict == "right":
        if text is not None:
            raise invalid("answer is only for the verdict wrong: it says what would have been right")
        text, start = asked.best.text, asked.best.start + asked.begin
    if text is None:
        return {}
    if not text:
        return {"answer": "", "is_impossible": True}
    if start is None:
        places = [i for i in range(len(asked.context)) if asked.context.startswith(text, i)]
    else:
        places = [start - asked.begin]
    if not places or places[0] < 0 or not asked.context.startswith(text, places[0]):
        raise invalid("answer.text does not occur in the context" + ("" if start is None else " at answer.start"))
    if len(places) > 1:
        raise invalid(f"answer.text occurs in the context {len(places)} times: give answer.start, its first code point")
    return {"answer": text, "answer_start": places[0]}
