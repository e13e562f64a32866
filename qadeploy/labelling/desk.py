"""The desk: hands rows to tabs, has the model propose answers, and takes decisions. Safe under threads.

Of the rows, every fifth that is shown is the next of a random sample; the others come least certain first, as far as the model
has been asked: a thread asks it about all rows, one after the other.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from qadeploy.core.metrics import choose_metric
from qadeploy.errors import InputError, QadeployError
from qadeploy.inference.answerer import Answerer
from qadeploy.labelling.estimate import EVERY, Estimate, estimate, is_sampled
from qadeploy.labelling.items import Item, Proposal, key_of
from qadeploy.labelling.store import Row, Store
from qadeploy.records import NO_ANSWER, Answer, Example

_UNKNOWN = Proposal(NO_ANSWER, "")  # the model could not be asked; as uncertain as can be


class DecidedError(InputError):
    """The row was decided in the meantime, in another tab."""


@dataclass(frozen=True, slots=True)
class Shown:
    """What a tab shows: a row, the model's proposal if it was asked, and a decision that was just taken back."""

    item: Item
    proposal: Answer | None
    undone: Row | None = None


class Desk:
    """The rows to label and what was decided. Close it at the end.

    Args:
        items: What is labelled.
        store: Where decisions go.
        annotator: Whose they are.
        answerer: The model that proposes answers.
        predictions: Proposals that are there already, by key.
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
        self._skipped: dict[str, None] = {}  # the longest ago first
        self._holders: dict[str, str] = {}  # of each tab, the key of its row
        self._turn = 0
        self._lock = threading.RLock()
        self._ending = threading.Event()
        self._asking = threading.Thread(target=self._ask_all, daemon=True)
        if not self.documents:
            self._asking.start()

    def close(self) -> None:
        """Stops asking the model."""
        self._ending.set()
        if self._asking.is_alive():
            self._asking.join()

    # ------------------------------------------------------------ what is shown

    @property
    def counts(self) -> tuple[int, int]:
        """How many rows the annotator has decided, or questions asked; and how many rows, or passages, are left."""
        with self._lock:
            closed = len(self._closed)
            return len(self._store.rows) if self.documents else closed, len(self._items) - closed

    @property
    def estimate(self) -> Estimate:
        """How often the model is right."""
        with self._lock:
            return estimate(self._store.rows, self._estimated, self._metric)

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
        """Puts a row off; a passage with a question of this annotator is finished."""
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
            return min(sampled)  # a key says nothing about its text: their order is random
        asked = [key for key in others if key in self._proposals]
        return min(asked, key=lambda key: self._proposals[key].answer.score) if asked else others[0]

    # ------------------------------------------------------------ the model

    def ask(self, key: str, question: str) -> Answer:
        """The best span for a question that was typed, also if the model says "no answer", which is what counts as its answer.

        Whoever types a question on a text mostly sees the answer there. Raises what ``Answerer.answer`` raises.
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
            question: What was asked, on a passage.

        Raises:
            DecidedError: The annotator has decided this row already.
            InputError: There is no such row, or the span or the question cannot be used.
            OSError: The disk is full or cannot be written; nothing was saved.
            FailureError: The file is no longer as it was left; nothing was saved.
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
        """Takes back the annotator's last decision and gives its row to the tab.

        Raises:
            InputError: It was on a row that is not in this input.
            FailureError: There is none, or another annotator's follows in the file.
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
            "id": f"{item.id}-{key_of(key, self.annotator)[:12]}",  # of each annotator and of each file another
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
