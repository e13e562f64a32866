"""The journal of a shard: a file beside the answers, with one line per event, that survives the death of a worker.

A worker notes when it begins a shard, when its bundle is loaded, and when it leaves the shard because of an error or an
interruption. A killed worker notes no leaving, so the next worker can count the deaths. No row can cause a death before the
bundle is loaded: such deaths only count within a run, so that Ray does not replace workers for ever. After ``DEATHS`` deaths
of loaded workers, the next worker goes row by row and notes each row before it answers it. A row that was the last one noted
at ``DEATHS`` deaths is the cause, and is rejected. The journal is removed when the answers of the shard are complete.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

from qadeploy.batch.answering import Result, of_dict, to_dict
from qadeploy.errors import FailureError

DEATHS = 2
_FUTILE = 5  # after this many deaths in one run without a noted row in between, the rows are not the cause


class Journal:
    """The journal of one shard. Rows are numbered as in their file, from 1.

    ``careful`` says whether to go row by row, ``known`` holds the results of rows that earlier workers answered, and
    ``killers`` the rows that killed ``DEATHS`` workers. ``run`` identifies the command that the worker belongs to.
    """

    def __init__(self, path: Path, run: str = "") -> None:
        self._path = path
        self._run = run
        self.known: dict[int, Result] = {}
        self._ends: Counter[int] = Counter()
        self._deaths = self._futile = 0
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            text = ""
        self._replay(text)
        self._torn = bool(text) and not text.endswith("\n")

    def _replay(self, text: str) -> None:
        begun, loaded, trying, run = False, False, 0, None
        # The added event stands for this worker: a previous worker that has not left has died.
        for line in [*text.split("\n"), '{"event": "begin"}']:
            try:
                value = json.loads(line)
                event = value["event"]
            except (ValueError, KeyError, TypeError):
                continue  # the line is incomplete
            if event == "begin":
                self._deaths += begun and loaded
                self._futile += begun and run == self._run
                if trying:
                    self._ends[trying] += 1
                begun, loaded, trying, run = True, False, 0, value.get("run")
            elif event == "loaded":
                loaded = True
            elif event == "left":
                begun, trying = False, 0
            elif event == "try":
                trying, self._futile = value["row"], 0
            elif event == "result":
                self.known[value["row"]] = of_dict(value["result"])
                trying = 0

    @property
    def careful(self) -> bool:
        """Whether so many workers died on this shard that its rows must be answered one by one."""
        return self._deaths >= DEATHS

    @property
    def killers(self) -> dict[int, int]:
        """The rows that killed workers while they were answered alone, and the number of workers."""
        return {row: times for row, times in self._ends.items() if times >= DEATHS}

    def begin(self) -> None:
        """Notes that a worker begins the shard. Raises FailureError if several in a row died before their first row."""
        if self._futile >= _FUTILE:
            raise FailureError(
                f"{self._futile} worker processes ended one after the other before they answered a row of this part: "
                "is there enough memory? Give fewer --actors or more memory; the same command continues from there"
            )
        self._write(event="begin", run=self._run, process=os.getpid())

    def loaded(self) -> None:
        """Notes that the worker is ready to answer: from now on, a row may kill it."""
        self._write(event="loaded")

    def trying(self, row: int, result: Result | None = None) -> None:
        """Notes that a row is being answered alone, or its result."""
        if result is None:
            self._write(event="try", row=row)
        else:
            self._write(event="result", row=row, result=to_dict(result))

    def left(self) -> None:
        """Notes that the worker leaves the shard in an orderly way."""
        self._write(event="left")

    def remove(self) -> None:
        """Removes the journal: the shard is done."""
        self._path.unlink(missing_ok=True)

    def _write(self, **value: object) -> None:
        # Opened each time, so that nothing is buffered when the process dies. The system keeps what a dead process has
        # written, so fsync is not needed.
        with self._path.open("a", encoding="utf-8") as stream:
            stream.write(("\n" if self._torn else "") + json.dumps(value) + "\n")
        self._torn = False
