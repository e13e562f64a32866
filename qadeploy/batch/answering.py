"""Rows to answers. A row that cannot be answered is rejected with the reason; the other rows are still answered."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from qadeploy.batch.plan import BatchPlan, Shard
from qadeploy.batch.ranges import Reader
from qadeploy.core.settings import Options
from qadeploy.data.fields import parse_row
from qadeploy.data.rows import RawRow, RowError
from qadeploy.errors import FailureError, QadeployError, one_line
from qadeploy.inference.answerer import Answerer
from qadeploy.inference.pairs import Asked, DecodedPair, to_answers
from qadeploy.records import NO_ANSWER

COLUMNS = ("id", "answer", "score", "start", "end", "bundle")
PASSAGE_COLUMNS = ("passage", "skipped")  # if the input has passages
SNIPPET_COLUMNS = ("snippet", "snippet_start", "snippet_end")  # if snippets are requested
_PROBE = ("what", "warms up")  # a question and context that any working model answers
# Decimals of a score. Logits are float32. Further digits depend on which questions were decoded together, because sums are
# then added in another order, so they could differ between two runs.
_DECIMALS = 7


class BrokenModelError(FailureError):
    """The model has stopped answering after a row, so its process must be replaced."""


@dataclass(frozen=True, slots=True)
class Answered:
    """The answer to a row. The null answer is the empty text at 0.

    Attributes:
        id: The id of the row.
        answer: The text.
        score: A probability, rounded to 7 decimals.
        start: Where it starts in the context or passage, in code points or the unit of the batch.
        end: Where it ends, exclusive.
        passage: The index of its passage in ``contexts``; None for a row with a context, and for the null answer.
        skipped: The indices of empty passages.
        snippet: The text around the answer, if the batch has snippets.
        snippet_start: Where the snippet starts.
        snippet_end: Where the snippet ends, exclusive.
    """

    id: str
    answer: str
    score: float
    start: int
    end: int
    passage: int | None = None
    skipped: tuple[int, ...] = ()
    snippet: str | None = None
    snippet_start: int | None = None
    snippet_end: int | None = None


@dataclass(frozen=True, slots=True)
class Rejected:
    """A row without an answer: its file, its number there (from 1), the faulty field ("" for the whole row), and why."""

    file: str
    row: int
    field: str
    id: str
    reason: str


Result = Answered | Rejected


def to_dict(result: Result) -> dict[str, Any]:
    """A result as plain JSON values, without empty fields."""
    return {name: value for name, value in asdict(result).items() if value is not None and value != ()}


def of_dict(value: Mapping[str, Any]) -> Result:
    """The result from the output of ``to_dict``."""
    if "reason" in value:
        return Rejected(**value)
    return Answered(**{**value, "skipped": tuple(value.get("skipped", ()))})


@dataclass(slots=True)
class _Row:
    """A usable row: its index among the results, its number, its id, and its question with the context."""

    place: int
    row: int
    id: str
    pair: Asked


class ShardAnswering:
    """Answers the rows of one shard in order.

    ``stream`` answers many rows at a time, ``alone`` one after the other. On a CPU every window runs alone on one thread, so
    both give the same answers, with any number of threads.
    """

    def __init__(self, answerer: Answerer, plan: BatchPlan, shard: Shard, reader: Reader) -> None:
        self._answerer = answerer
        self._plan = plan
        self._shard = shard
        self._options = plan.settings.options
        self._data_options = plan.settings.data_options
        self._rows = reader.rows(shard.source, shard.range)

    def stream(self) -> list[Result]:
        """One result per row, in order. Raises OSError, InputError (reading), BrokenModelError, FailureError (as ``alone``)."""
        results: list[Result | None] = []
        waiting: deque[_Row | None] = deque()
        rows = self._asked(results)
        failures: list[Exception] = []
        ended = False

        def pairs() -> Iterator[Asked]:
            nonlocal ended
            # If the first question of a stream formed a chunk of its own, it would run on all threads, which may change the
            # last bit of its score. The probe before it prevents that.
            waiting.append(None)
            yield _PROBE
            while True:
                try:
                    asked = next(rows, None)
                except Exception as error:  # an error of reading, not of the model
                    failures.append(error)
                    return
                if asked is None:
                    ended = True
                    return
                waiting.append(asked)
                yield asked.pair

        while True:
            try:
                for pair in self._answerer.read_stream(pairs(), self._options):
                    if asked := waiting.popleft():
                        results[asked.place] = _answered(asked, pair, self._options)
            except Exception:  # one of the waiting rows caused it: answering each alone shows which
                suspects = [asked for asked in waiting if asked]
                waiting.clear()
                for asked in suspects:
                    results[asked.place] = self._alone(asked)
                if not ended and not failures:
                    if not suspects:
                        raise
                    continue
            if failures:
                raise failures[0]
            return [result for result in results if result is not None]

    def alone(self, known: Mapping[int, Result], trying: Any) -> list[Result]:
        """Like ``stream``, but one row at a time.

        Args:
            known: Known results by row number; these rows are not answered again.
            trying: Called as ``trying(number)`` before a row is answered and as ``trying(number, result)`` afterwards.

        Raises:
            FailureError: The file was changed since the plan was made.
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
        """The rejection of a row that killed its worker process ``times`` times."""
        reason = f"its worker process ended {times} times while it answered this row alone (out of memory, or a crash)"
        return Rejected(self._shard.source.path, row, "", "", reason)

    def _asked(self, results: list[Result | None]) -> Iterator[_Row]:
        """Yields the usable rows. Appends an entry to ``results`` for each row: its rejection, or None for now."""
        self._check_source()
        for row in self._rows:
            results.append(None)
            try:
                fields = parse_row(row, self._data_options, annotated=False)
            except RowError as error:
                field = self._data_options.column(error.problem.field)
                results[-1] = self._rejected(row, field, str(error))
                continue
            identity = self._plan.row_id(self._shard.source, row.number) if fields.id is None else fields.id
            yield _Row(len(results) - 1, row.number, identity, (fields.question, fields.contexts or fields.context))
        self._check_source(len(results))

    def _check_source(self, rows: int | None = None) -> None:
        """Raises FailureError if the file is no longer that of the plan, or if it had another number of ``rows``."""
        source = self._shard.source
        if source.stat() != source or rows not in {None, self._shard.range.rows}:
            raise FailureError(f"{source.path}: was changed while it was being answered: start again")

    def _rejected(self, row: RawRow, field: str, reason: str) -> Rejected:
        given = row.fields.get(self._data_options.column("id"))
        usable = isinstance(given, str | int) and not isinstance(given, bool)
        identity = str(given) if usable else self._plan.row_id(self._shard.source, row.number)
        clean = identity.encode("utf-8", "replace").decode("utf-8")  # a lone surrogate cannot be written
        return Rejected(self._shard.source.path, row.number, field, clean, reason)

    def _alone(self, asked: _Row) -> Result:
        """The answer to one row, by the same runs of the model as in ``stream``."""
        source = self._shard.source.path
        try:
            pair = self._answerer.encode(*asked.pair, self._options)
            logits = self._answerer.model.start(pair.windows).result()
            return _answered(asked, self._answerer.decode(pair, logits, self._options), self._options)
        except QadeployError as error:
            return Rejected(source, asked.row, "", asked.id, one_line(error))
        except Exception as error:  # onnxruntime raises many types, and a large row may raise MemoryError
            reason = f"{type(error).__name__}: {one_line(error)}"
            self._check(f"{source}: row {asked.row}, or one asked with it: {reason}")
            return Rejected(source, asked.row, "", asked.id, reason)

    def _check(self, cause: str) -> None:
        """Raises BrokenModelError if the model no longer answers, for example after an illegal access on a GPU."""
        try:
            self._answerer.answer(*_PROBE)
        except Exception as error:
            raise BrokenModelError(f"{cause}; since then the model answers nothing: {one_line(error)}") from error


def _answered(asked: _Row, pair: DecodedPair, options: Options) -> Answered:
    best = next(iter(to_answers(pair, options)), NO_ANSWER)
    answered = Answered(
        asked.id, best.text, round(best.score, _DECIMALS), best.start, best.end, best.passage, pair.skipped
    )
    if best.snippet is None:
        return answered
    return replace(answered, snippet=best.snippet.text, snippet_start=best.snippet.start, snippet_end=best.snippet.end)
