"""The desk: assigns rows to browser tabs, lets the model propose answers, and stores decisions. Thread-safe.

Every fifth row that is shown is the next of a random sample. The others are shown least certain first, among those that the
model has answered so far: a thread has it answer all rows, one after the other.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from qadeploy.core.metrics import choose_metric, exact_match, wilson_interval
from qadeploy.errors import InputError, QadeployError
from qadeploy.inference.answerer import Answerer
from qadeploy.labelling.items import Item, Proposal, key_of
from qadeploy.labelling.store import Row, Store
from qadeploy.records import NO_ANSWER, Answer, Example

EVERY = 5  # one in this many rows is shown at random, and counts for the estimate
_UNKNOWN = Proposal(NO_ANSWER, "")  # the model failed to answer; its score of 0 makes the row the least certain


class DecidedError(InputError):
    """The row was decided in the meantime, in another tab."""


@dataclass(frozen=True, slots=True)
class Shown:
    """What a tab shows: a row, the model's proposal if there is one, and the decision that was just undone, if any."""

    item: Item
    proposal: Answer | None
    undone: Row | None = None


def is_sampled(key: str) -> bool:
    """Whether a row belongs to the random sample. It depends on its text alone, not on the model, the order or the run."""
    return int(key[:8], 16) % EVERY == 0


@dataclass(frozen=True, slots=True)
class Estimate:
    """Exact match of the model's answers, in percent, with a 95 % interval, on ``total`` rows; None without rows."""

    total: int
    exact_match: float | None
    interval: tuple[float, float] | None


class Desk:
    """The rows to label and the decisions on them. Close it at the end.

    Args:
        items: The rows or passages to label.
        store: The store of decisions.
        annotator: The name of the annotator.
        answerer: The model that proposes answers.
        predictions: Existing proposals, by key.
    """

    def __init__(
        self,
        items: Sequence[Item],
        store: Store,
        annotator: str,
        answerer: Answerer,
        predictions: Mapping[str, Proposal] | None = None,
    ) -> None:
        self.annotator = annotator
        self.documents = not items[0].question
        self._items = {item.key: item for item in items}
        self._store, self._answerer = store, answerer
        self._proposals = dict(predictions or {})
        bundle = answerer.bundle
        self.model = bundle.hash if bundle else "unnamed"
        self._estimated = next(iter(self._proposals.values())).model if self._proposals else self.model
        self._metric = choose_metric("auto", [Example(item.id, "", item.context) for item in items])
        self._decided = {key_of(row["question"], row["context"]) for row in store.rows}
        own = {key_of("", row["context"]) for row in store.rows} if self.documents else self._decided
        self._closed = own & self._items.keys()
        self._skipped: dict[str, None] = {}  # keys of skipped rows, the oldest skip first
        self._holders: dict[str, str] = {}  # the key of each tab's row, by tab
        self._turn = 0
        self._lock = threading.RLock()
        self._ending = threading.Event()
        self._asking = threading.Thread(target=self._ask_all, daemon=True)
        if not self.documents:
            self._asking.start()

    def close(self) -> None:
        """Stops querying the model."""
        self._ending.set()
        if self._asking.is_alive():
            self._asking.join()

    # ------------------------------------------------------------ what is shown

    @property
    def counts(self) -> tuple[int, int]:
        """The number of rows that the annotator has decided (or questions typed), and of rows (or passages) left."""
        with self._lock:
            closed = len(self._closed)
            return len(self._store.rows) if self.documents else closed, len(self._items) - closed

    @property
    def estimate(self) -> Estimate:
        """How often the model is right on all rows: estimated from the decisions on rows of the random sample."""
        with self._lock:
            found = [
                exact_match(row["predicted"], row["answer"], self._metric)
                for row in self._store.rows
                if row.get("sampled") is True and row.get("model") == self._estimated
            ]
        if not found:
            return Estimate(0, None, None)
        share = sum(found) / len(found)
        low, high = wilson_interval(share, len(found))
        return Estimate(len(found), 100 * share, (100 * low, 100 * high))

    def show(self, tab: str) -> Shown | None:
        """The row of a tab, a new one if it has none; None if all are decided."""
        with self._lock:
            key = self._holders.get(tab)
            if key is None or key in self._closed:
                key = self._next(tab)
                if key is None:
                    self._holders.pop(tab, None)
                    return None
                self._holders[tab] = key
        item = self._items[key]
        return self._shown(item, self._proposal(item) if item.question else None)

    def skip(self, tab: str, key: str) -> None:
        """Postpones a row. A passage on which the annotator has typed a question is finished instead."""
        with self._lock:
            self._item(key)
            if self.documents and any(key_of("", row["context"]) == key for row in self._store.rows):
                self._closed.add(key)
            else:
                self._skipped.pop(key, None)
                self._skipped[key] = None
            self._holders.pop(tab, None)

    def _next(self, tab: str) -> str | None:
        held = {key for other, key in self._holders.items() if other != tab}
        left = [key for key in self._items if key not in self._closed]
        free = [key for key in left if key not in held and key not in self._skipped]
        self._turn += 1
        if not free:
            return next((key for key in self._skipped if key not in held and key not in self._closed), None) or next(
                iter(left), None
            )
        if self.documents:
            return free[0]
        sampled, others = ([key for key in free if is_sampled(key) is wanted] for wanted in (True, False))
        if sampled and (self._turn % EVERY == 0 or not others):
            return min(sampled)  # keys are hashes, so their order is random
        asked = [key for key in others if key in self._proposals]
        return min(asked, key=lambda key: self._proposals[key].answer.score) if asked else others[0]

    # ------------------------------------------------------------ the model

    def ask(self, key: str, question: str) -> Answer:
        """The best span for a typed question, even if the model prefers "no answer", which is then stored as its answer.

        People who type a question on a text usually see the answer there. Raises what ``Answerer.answer`` raises.
        """
        item = self._item(key)
        found = self._answerer.answer(question.strip(), item.context, top_k=2)
        with self._lock:
            self._proposals[key_of(question.strip(), item.context)] = Proposal([*found, NO_ANSWER][0], self.model)
        return next((answer for answer in found if answer.text), NO_ANSWER)

    def _proposal(self, item: Item) -> Proposal:
        with self._lock:
            known = self._proposals.get(item.key)
        if known is None:
            try:
                found = self._answerer.answer(item.question, item.context)
                known = Proposal(found[0] if found else NO_ANSWER, self.model)
            except QadeployError:
                known = _UNKNOWN
            with self._lock:
                known = self._proposals.setdefault(item.key, known)
        return known

    def _ask_all(self) -> None:
        for item in self._items.values():
            if self._ending.is_set():
                return
            if item.key not in self._closed:
                self._proposal(item)

    # ------------------------------------------------------------ decisions

    def decide(self, key: str, span: tuple[int, int] | None, question: str = "") -> None:
        """Saves a decision: a span in code points, or None if the answer is not in the text.

        Args:
            key: The row.
            span: First code point, and one past the last.
            question: The typed question, on a passage.

        Raises:
            DecidedError: The annotator has decided this row already.
            InputError: There is no such row, or the span or the question cannot be used.
            OSError: The disk is full or cannot be written; nothing was saved.
            FailureError: Another program has changed the file; nothing was saved.
        """
        with self._lock:
            item = self._item(key)
            question = question.strip() if self.documents else item.question
            if not question:
                raise InputError("the question is empty: type one")
            start, end = span or (0, 0)
            if span is not None and not (0 <= start < end <= len(item.context) and item.context[start:end].strip()):
                raise InputError("the selected answer must be a part of the text and not blank: select it again")
            own = key_of(question, item.context)
            if own in self._decided:
                raise DecidedError(
                    "you have asked this question on this passage already: ask another"
                    if self.documents
                    else "this row has been decided in another tab, so this decision was not saved"
                )
            self._store.append(self._row(item, own, question, item.context[start:end], start if span else -1))
            self._decided.add(own)
            if not self.documents:
                self._closed.add(key)

    def undo(self, tab: str) -> Shown:
        """Undoes the annotator's last decision and assigns its row to the tab.

        Raises:
            InputError: The decision was on a row that is not in this input.
            FailureError: There is no decision, or another annotator's follows in the file.
            OSError: The file cannot be written.
        """
        with self._lock:
            last = self._store.rows[-1] if self._store.rows else None
            key = key_of("" if self.documents else last["question"], last["context"]) if last else ""
            if last and key not in self._items:
                raise InputError("your last decision was on other data, so it is not undone here")
            row = self._store.undo()
            self._decided.discard(key_of(row["question"], row["context"]))
            self._closed.discard(key)
            self._skipped.pop(key, None)
            self._holders = {other: at for other, at in self._holders.items() if at != key} | {tab: key}
        item = self._items[key]
        asked = self._proposals.get(key_of(row["question"], row["context"])) if self.documents else self._proposal(item)
        return self._shown(item, asked, row)

    @staticmethod
    def _shown(item: Item, proposal: Proposal | None, undone: Row | None = None) -> Shown:
        known = proposal is not None and proposal is not _UNKNOWN
        return Shown(item, proposal.answer if proposal and known else None, undone)

    def _item(self, key: str) -> Item:
        if key not in self._items:
            raise InputError("there is no such row: reload the page")
        return self._items[key]

    def _row(self, item: Item, key: str, question: str, answer: str, start: int) -> Row:
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        row: Row = {
            "annotator": self.annotator,
            "time": now,
            "id": f"{item.id}-{key_of(key, self.annotator)[:12]}",  # unique per annotator, also across files
            "context": item.context,
            "question": question,
            "answer": answer,
            "answer_start": start,  # -1 without an answer
            "is_impossible": not answer,
        }
        proposal = self._proposals.get(key)
        if proposal and proposal is not _UNKNOWN:
            row |= {"predicted": proposal.answer.text, "score": proposal.answer.score, "model": proposal.model}
            row["sampled"] = self.documents or is_sampled(item.key)
        return row | {name: getattr(item, name) for name in ("document", "place") if getattr(item, name)}

    def progress(self) -> dict[str, Any]:
        """The counts and the estimate as plain JSON values."""
        done, left = self.counts
        return {"done": done, "left": left, "estimate": asdict(self.estimate)}
