"""Rows to answers, whatever a row holds: what cannot be answered is rejected with its reason, and the others go on."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from qadeploy.batch.plan import Plan, Shard
from qadeploy.batch.ranges import Reader
from qadeploy.data.carriers import Row
from qadeploy.data.fields import ProblemError, parse
from qadeploy.data.wording import one_line
from qadeploy.errors import FailureError, QadeployError
from qadeploy.inference.answerer import Answerer, Options, Pair, to_answers
from qadeploy.records import Answer

COLUMNS = ("id", "answer", "score", "start", "end", "bundle")
_PROBE = ("what", "warms up")  # a question that a working model answers
# Decimals of a score. Logits are float32; past this, digits tell which questions were decoded together, by the order of a
# sum's terms, and would differ between a first try and a second.
_DECIMALS = 7


class BrokenModelError(FailureError):
    """After a row the model answers nothing any more: the process that holds it is of no further use."""


@dataclass(frozen=True, slots=True)
class Answered:
    """A row's answer; the null answer is the empty text at 0. ``start`` and ``end`` count code points.

    ``score`` is a probability, rounded to 7 decimals.
    """

    id: str
    answer: str
    score: float
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Rejected:
    """A row without an answer: its file, its number there (from 1), the field at fault ("" for the whole row), and why."""

    file: str
    row: int
    field: str
    id: str
    reason: str


Result = Answered | Rejected


def to_dict(result: Result) -> dict[str, Any]:
    """A result as plain JSON values."""
    return asdict(result)


def of_dict(value: Mapping[str, Any]) -> Result:
    """The result of ``to_dict``."""
    return Rejected(**value) if "reason" in value else Answered(**value)


@dataclass(slots=True)
class _Asked:
    """A usable row on its way: its place among the results, and what to ask."""

    place: int
    row: int
    id: str
    pair: Pair


class ShardAnswering:
    """Answers the rows of one shard in order.

    ``stream`` takes many at a time, ``alone`` one after the other; on a CPU every window runs by itself on one thread, so
    that both give the same answers, with any number of threads.
    """

    def __init__(self, answerer: Answerer, plan: Plan, shard: Shard, reader: Reader) -> None:
        self._answerer = answerer
        self._plan = plan
        self._shard = shard
        self._options = Options(allow_no_answer=plan.job.allow_no_answer, prefilter=plan.job.prefilter)
        self._reading = plan.job.reading
        self._rows = reader.rows(shard.source, shard.part)

    def stream(self) -> list[Result]:
        """A result a row, in order. Raises OSError, InputError (reading), BrokenModelError."""
        results: list[Result | None] = []
        waiting: deque[_Asked | None] = deque()
        rows = self._asked(results)
        failures: list[Exception] = []

        def pairs() -> Iterator[Pair]:
            # A stream runs its first question on all threads where that makes a chunk by itself, which may change the
            # last bit of a score. With the probe before it, it never does.
            waiting.append(None)
            yield _PROBE
            while True:
                try:
                    asked = next(rows, None)
                except Exception as error:  # of reading: told apart from what the model raises
                    failures.append(error)
                    return
                if asked is None:
                    return
                waiting.append(asked)
                yield asked.pair

        while True:
            try:
                for answers in self._answerer.answer_stream(
                    pairs(), allow_no_answer=self._options.allow_no_answer, prefilter=self._options.prefilter
                ):
                    if asked := waiting.popleft():
                        results[asked.place] = _answered(asked, answers)
            except Exception:  # by one of those waiting: each alone tells which
                if not waiting:
                    raise
                while waiting:
                    if asked := waiting.popleft():
                        results[asked.place] = self._alone(asked)
                continue
            if failures:
                raise failures[0]
            return [result for result in results if result is not None]

    def alone(self, known: Mapping[int, Result], trying: Any) -> list[Result]:
        """Like ``stream``, each row by itself, those of ``known`` (by their number) left out.

        Calls ``trying(number)`` before a row is asked, and ``trying(number, result)`` after it.
        """
        results: list[Result | None] = []
        for asked in self._asked(results):
            result = known.get(asked.row)
            if result is None:
                trying(asked.row)
                result = self._alone(asked)
                trying(asked.row, result)
            results[asked.place] = result
        return [result for result in results if result is not None]

    def killer(self, row: int, times: int) -> Rejected:
        """What is said of a row that ended its worker process so many times."""
        reason = f"its worker process ended {times} times while it answered this row alone (out of memory, or a crash)"
        return Rejected(self._shard.source.path, row, "", "", reason)

    def _asked(self, results: list[Result | None]) -> Iterator[_Asked]:
        """The usable rows. Each row of the shard gets a place in ``results``, one that is unusable its rejection too."""
        for row in self._rows:
            results.append(None)
            try:
                fields = parse(row, self._reading, annotated=False)
            except ProblemError as problem:
                field = self._reading.columns.get(problem.field, problem.field)
                results[-1] = self._rejected(row, field, str(problem))
                continue
            identity = self._plan.row_id(self._shard.source, row.number) if fields.id is None else fields.id
            yield _Asked(len(results) - 1, row.number, identity, (fields.question, fields.context))

    def _rejected(self, row: Row, field: str, reason: str) -> Rejected:
        given = row.fields.get(self._reading.columns.get("id", "id"))
        usable = isinstance(given, str | int) and not isinstance(given, bool)
        identity = str(given) if usable else self._plan.row_id(self._shard.source, row.number)
        clean = identity.encode("utf-8", "replace").decode("utf-8")  # a lone surrogate cannot be written
        return Rejected(self._shard.source.path, row.number, field, clean, reason)

    def _alone(self, asked: _Asked) -> Result:
        """One row's answer, by the same runs of the model as in ``stream``."""
        source = self._shard.source.path
        try:
            begun = self._answerer.begin(*asked.pair, self._options)
            logits = self._answerer.model.start(begun.windows).result()
            return _answered(asked, to_answers(self._answerer.finish(begun, logits, self._options), self._options))
        except QadeployError as error:
            return Rejected(source, asked.row, "", asked.id, one_line(error))
        except Exception as error:  # onnxruntime raises many types, a large row MemoryError
            reason = f"{type(error).__name__}: {one_line(error)}"
            self._check(f"{source}: row {asked.row}, or one asked with it: {reason}")
            return Rejected(source, asked.row, "", asked.id, reason)

    def _check(self, cause: str) -> None:
        """Raises BrokenModelError where the model no longer answers, e.g. after an illegal access on a GPU."""
        try:
            self._answerer.answer(*_PROBE)
        except Exception as error:
            raise BrokenModelError(f"{cause}; after it the model answers nothing: {one_line(error)}") from error


def _answered(asked: _Asked, answers: Iterable[Answer]) -> Answered:
    best = next(iter(answers), Answer("", 0, 0, 0.0))
    return Answered(asked.id, best.text, round(best.score, _DECIMALS), best.start, best.end)
