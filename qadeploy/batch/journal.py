"""What is known of a shard whose workers die: a file beside the answers, a line an event, that outlives any process.

A worker that takes up a shard says so, and says so again when it lays it down, by an error or an interruption. One
that is killed cannot. So the next one counts the deaths, and after ``DEATHS`` of them goes row by row, each
announced before it is asked: a row that was the last one announced at ``DEATHS`` deaths is what kills, and is left out.
The journal goes when the shard's answers stand.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

from qadeploy.batch.answering import Result, of_dict, to_dict
from qadeploy.errors import FailureError

DEATHS = 2
_FUTILE = 5  # deaths without one row announced between them, after which the rows are not to blame


class Journal:
    """The journal of one shard. ``row`` numbers are those of the shard's file, from 1.

    ``careful`` says whether to go row by row; ``known`` are the results of rows that earlier workers went through,
    ``killers`` the rows that ended ``DEATHS`` of them.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
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
        begun, trying = False, 0
        for line in [*text.split("\n"), '{"event": "begin"}']:  # as if begun once more: what is open now, died
            try:
                value = json.loads(line)
                event = value["event"]
            except (ValueError, KeyError, TypeError):
                continue  # a line that its writer did not finish
            if event == "begin":
                self._deaths += begun
                self._futile += begun
                if trying:
                    self._ends[trying] += 1
                begun, trying = True, 0
            elif event == "left":
                begun, trying = False, 0
            elif event == "try":
                trying, self._futile = value["row"], 0
            elif event == "result":
                self.known[value["row"]] = of_dict(value["result"])
                trying = 0

    @property
    def careful(self) -> bool:
        """Whether so many workers died over this shard that its rows are to be asked one by one."""
        return self._deaths >= DEATHS

    @property
    def killers(self) -> dict[int, int]:
        """The rows that workers died of while they were asked alone, and how many did."""
        return {row: times for row, times in self._ends.items() if times >= DEATHS}

    def begin(self) -> None:
        """A worker takes the shard up. Raises FailureError where one after the other died before it asked anything."""
        if self._futile >= _FUTILE:
            raise FailureError(
                f"{self._futile} worker processes ended one after the other before they answered a row of this part: "
                "is there memory enough? Give fewer --actors, or more memory; the same command goes on from there"
            )
        self._write(event="begin", process=os.getpid())

    def trying(self, row: int, result: Result | None = None) -> None:
        """A row is asked alone, or has its result."""
        if result is None:
            self._write(event="try", row=row)
        else:
            self._write(event="result", row=row, result=to_dict(result))

    def left(self) -> None:
        """The worker lays the shard down in good order."""
        self._write(event="left")

    def remove(self) -> None:
        """Forgets it all: the shard is done."""
        self._path.unlink(missing_ok=True)

    def _write(self, **value: object) -> None:
        # Opened each time: nothing is buffered when the process dies. A dead process leaves what it wrote to the
        # system, which is why nothing is flushed to the disk here.
        with self._path.open("a", encoding="utf-8") as stream:
            stream.write(("\n" if self._torn else "") + json.dumps(value) + "\n")
        self._torn = False
