"""The items to label: questions on contexts, or passages of documents on which questions are still to be typed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from qadeploy.corpus.cutting import cut
from qadeploy.corpus.documents import READERS, documents_of, endings, reader_of, require_size, unread
from qadeploy.corpus.records import Skipped
from qadeploy.corpus.scanning import scan
from qadeploy.data.fields import DataOptions
from qadeploy.data.formats import load_rows
from qadeploy.data.loading import read
from qadeploy.data.values import is_missing
from qadeploy.errors import InputError, MissingExtraError
from qadeploy.records import Answer

Say = Callable[[str], object]
_DOCUMENTS = frozenset(suffix for reader in READERS if reader.read for suffix in reader.suffixes)
_SAVED = ("state.json", "dataset_dict.json")  # a folder saved by the datasets library contains one of these files
_PREDICTED = {"id", "answer", "score", "start", "end"}
_MOST_NAMED = 3


@dataclass(frozen=True, slots=True)
class Proposal:
    """The answer of a model, and the hash or name of that model."""

    answer: Answer
    model: str


@dataclass(frozen=True, slots=True)
class Item:
    """A question on a context; or a passage of a document, if ``question`` is "".

    Attributes:
        key: Identifies the question and context, in any file.
        id: Its id in its source.
        context: The text in which answers are marked.
        question: The question.
        document: The document of a passage.
        place: The place of the passage in its document.
    """

    key: str
    id: str
    context: str
    question: str = ""
    document: str = ""
    place: str = ""


def key_of(question: str, context: str) -> str:
    """Identifies a question on a context: a hash as hexadecimal text."""
    return blake2b(json.dumps([question, context]).encode(), digest_size=10).hexdigest()


def load_items(source: str, options: DataOptions, say: Say) -> list[Item]:
    """Reads the items to label, each question on a context and each passage once.

    Args:
        source: A folder of documents, a document, or any data that ``train`` reads; answers in it are ignored.
        options: The options for reading rows.
        say: Called with a sentence that lists what is left out.

    Raises:
        InputError: Nothing can be read, or rows cannot be used; the message names file, row and field.
        MissingExtraError: A format needs an optional package.
    """
    path = Path(source)
    folder = path.is_dir() and not any((path / name).is_file() for name in _SAVED)
    found = _passages(path, say) if folder or path.suffix.lower() in _DOCUMENTS else _questions(source, options)
    items: dict[str, Item] = {}
    for item in found:
        items.setdefault(item.key, item)  # keeps the first of equal items
    return list(items.values())


def _questions(source: str, options: DataOptions) -> Iterator[Item]:
    rows = list(load_rows(source))
    fields = set(rows[0].fields) if rows else set()
    if fields >= _PREDICTED and not {options.column("context"), options.column("question")} & fields:
        raise InputError(
            f"{source}: holds answers of qadeploy answer without their questions: give the file of the questions, and this "
            f"one with --predictions {source}"
        )
    for row in rows:
        if not is_missing(row.fields.get(options.column("contexts"))):
            raise InputError(
                f"{source}: row {row.number}, field {options.column('contexts')}: has several passages: give one context per row"
            )
    for example in read(source, options, annotated=False, rows=rows).examples:
        yield Item(key_of(example.question, example.context), example.id, example.context, example.question)


def _passages(source: Path, say: Say) -> Iterator[Item]:
    skipped: list[Skipped] = []
    count = 0
    for found in scan(source, skipped.append):
        reader = reader_of(found.name)
        if reader is None:
            skipped.append(unread(found.name))
            continue
        try:
            require_size(found, reader)
            for document in documents_of(found, reader, skipped.append):
                for piece in cut(document):
                    count += 1
                    text = document.text[piece.start : piece.end]
                    name = f"{document.name}:{piece.start}"
                    yield Item(key_of("", text), name, text, document=document.name, place=piece.place)
        except (InputError, MissingExtraError) as error:
            skipped.append(Skipped(found.name, str(error).removeprefix(f"{found.name}: ")))
    named = "; ".join(map(str, skipped[:_MOST_NAMED]))
    named += f"; and {len(skipped) - _MOST_NAMED:,} more" if len(skipped) > _MOST_NAMED else ""
    if not count:
        raise InputError(f"{source}: holds no text to label: {named or f'give a folder with {endings()}'}")
    if skipped:
        say(f"left out: {named}")


def load_predictions(source: str, items: list[Item]) -> dict[str, Proposal]:
    """Reads the answers of a run of ``qadeploy answer`` as proposals for the items with the same ids.

    Raises:
        InputError: The source holds something else, no id is that of an item, or an answer is not at its place in the context.
    """
    path = Path(source)
    files = sorted(map(str, path.glob("part-*.parquet"))) if path.is_dir() else [source]
    if not files:
        raise InputError(
            f"--predictions {source}: the folder holds no part-*.parquet: give the --output of qadeploy answer"
        )
    by_id = {item.id: item for item in items}
    found: dict[str, Proposal] = {}
    for file in files:
        for row in load_rows(file):
            fields = row.fields
            where = f"--predictions {file}: row {row.number}"
            if row.problem or not fields.keys() >= _PREDICTED:
                missing = ", ".join(sorted(_PREDICTED - fields.keys()))
                raise InputError(f"{where}: {row.problem or f'lacks {missing}'}: give what qadeploy answer wrote")
            item = by_id.get(str(fields["id"]))
            if item is None:
                continue
            try:
                start, end, score = int(fields["start"]), int(fields["end"]), float(fields["score"])
                if not 0 <= score <= 1:
                    raise ValueError
            except (TypeError, ValueError) as error:
                raise InputError(
                    f"{where}: start and end must be whole numbers, and score a number from 0 to 1"
                ) from error
            text = str(fields["answer"] or "")
            if text != item.context[start:end]:
                raise InputError(
                    f"{where}, field start: the answer is not there in the context of {item.id!r}: give the answers to this "
                    "file, with offsets in code points"
                )
            found[item.key] = Proposal(Answer(text, start, end, score), str(fields.get("bundle") or source))
    if not found:
        raise InputError(f"--predictions {source}: no id is that of a row to label: give rows with the same ids")
    return found
