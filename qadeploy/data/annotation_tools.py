"""Exports of annotation tools: Label Studio, Prodigy and doccano, one row per task.

A region is ``{"text", "start", "end", "label"}``; its text may be left out. Label Studio counts UTF-16 units. The field
``text`` of a task is its context, unless it has a field ``context``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from html.parser import HTMLParser
from typing import Any

from qadeploy.data.rows import RawRow
from qadeploy.data.values import literal, plain

_ADDRESS = re.compile(r"\s*(\w+://\S+|/data/\S+)\s*")
_VERDICTS = frozenset({"accept", "reject", "ignore"})
_EXPORTED = frozenset({"lead_time", "annotator", "created_at"})  # columns of Label Studio
_DOCCANO = ("label", "labels", "entities")
Region = dict[str, Any]


def is_task(value: Mapping[str, Any]) -> bool:
    """Whether an object is a task of Label Studio's JSON export."""
    return isinstance(value.get("data"), dict) and isinstance(value.get("annotations"), list)


def task(value: Mapping[str, Any]) -> RawRow:
    """Reads a task of Label Studio: the regions of all annotators are its answers."""
    done = [a for a in value["annotations"] if isinstance(a, dict) and not a.get("was_cancelled")]
    results = [result for annotation in done for result in _objects(annotation.get("result"))]
    fields = {"id": value.get("id"), **value["data"]}
    return _labelled(fields, [*_results(results)] if done else None, utf16=True)


def is_export_row(value: Mapping[str, Any]) -> bool:
    """Whether an object is a row of Label Studio's JSON-MIN or CSV export."""
    if "annotation_id" not in value or _EXPORTED.isdisjoint(value):
        return False
    return {"answer", "answers"}.isdisjoint(map(plain, value))  # such fields hold written answers, not regions


def row_of_export(value: Mapping[str, Any]) -> RawRow:
    """Reads a row of Label Studio's JSON-MIN or CSV export: the column of regions holds its answers."""
    fields = {**value, "id": value["annotation_id"]}  # several annotators share the id of their task
    regions: list[Region] = []
    for name, cell in value.items():
        found = literal(cell) if isinstance(cell, str) and cell.lstrip().startswith("[{") else cell
        if isinstance(found, list) and found and all(isinstance(x, dict) and "start" in x for x in found):
            regions += _results([{"value": x, "to_name": x.get("to_name")} for x in found])
            del fields[name]
    return _labelled(fields, regions, utf16=True)


def _results(results: Iterable[Mapping[str, Any]]) -> Iterator[Region]:
    """Yields the regions; choices, ratings and comments have no position and are left out."""
    for result in results:
        value = result.get("value")
        if not isinstance(value, dict) or "start" not in value:
            continue
        html = isinstance(value.get("globalOffsets"), dict)
        places = value["globalOffsets"] if html else value  # in hypertext, "start" is an XPath
        given = [x for name, x in value.items() if name.endswith("labels") and isinstance(x, list)]
        yield {
            "text": value.get("text"),
            "start": places.get("start"),
            "end": places.get("end"),
            "label": [str(label) for labels in given for label in labels],
            "on": result.get("to_name"),
            "html": html,
        }


def is_prodigy(value: Mapping[str, Any]) -> bool:
    """Whether an object is a task of Prodigy."""
    verdict = value.get("answer")
    return "_task_hash" in value or (
        isinstance(verdict, str) and verdict in _VERDICTS and isinstance(value.get("spans"), list)
    )


def prodigy(value: Mapping[str, Any]) -> RawRow:
    """Reads a task of Prodigy, whose ``answer`` is the annotator's verdict."""
    fields = {name: x for name, x in value.items() if name not in {"answer", "spans"}}
    verdict = value.get("answer", "accept")
    if verdict != "accept":
        return RawRow(
            0, dict(value), problem=f"the annotator's verdict is {verdict!r}: only tasks with 'accept' hold an answer"
        )
    return _labelled(fields, [*_objects(value.get("spans"))])


def is_doccano(value: Mapping[str, Any]) -> bool:
    """Whether an object is a line of doccano's export of sequence labels."""
    spans = value.get(_doccano_name(value))
    if not {"answer", "answers"}.isdisjoint(value):
        return False
    return "text" in value and isinstance(spans, list) and all(isinstance(s, list | dict) for s in spans)


def _doccano_name(value: Mapping[str, Any]) -> str:
    given = [name for name in _DOCCANO if name in value]
    return next((name for name in given if value[name]), given[0] if given else "")


def doccano(value: Mapping[str, Any]) -> RawRow:
    """Reads a line of doccano's export."""
    name = _doccano_name(value)
    regions: list[Region] = []
    for span in value[name]:
        if isinstance(span, dict):
            regions.append(
                {"start": span.get("start_offset"), "end": span.get("end_offset"), "label": span.get("label")}
            )
        elif len(span) == 3:
            regions.append({"start": span[0], "end": span[1], "label": span[2]})
        else:
            return RawRow(0, dict(value), problem=f"field {name}: each span must be [start, end, label], not {span!r}")
    return _labelled({key: x for key, x in value.items() if key != name}, regions)


def _labelled(fields: dict[str, Any], regions: list[Region] | None, *, utf16: bool = False) -> RawRow:
    """A row whose answers are its regions; ``regions`` is None if nobody annotated it."""
    meta = fields.get("meta")
    fields = {**(meta if isinstance(meta, dict) else {}), **fields}
    by_plain = {plain(key): key for key in reversed(fields)}
    name = by_plain.get("context") or by_plain.get("text")
    text = fields.get(name) if name else None
    if name and "context" not in by_plain:
        fields["context"] = fields.pop(name)
    if isinstance(text, str) and _ADDRESS.fullmatch(text):
        problem = f"field {name}: is an address, not a text: export the tasks with their texts"
        return RawRow(0, fields, problem=problem, utf16=utf16)
    if regions is not None:
        question = by_plain.get("question", "question")
        if any(region.get("html") for region in regions):
            fields = {
                key: visible_text(x) if isinstance(x, str) and key != question else x for key, x in fields.items()
            }
            text = visible_text(text) if isinstance(text, str) else None
        own = [r for r in regions if not _on_question(r, question, fields.get(question), text)]
        if not own and regions:
            return RawRow(0, fields, problem="every region is on the question, none on the context", utf16=utf16)
        fields["answers"] = [{key: r.get(key) for key in ("text", "start", "end", "label")} for r in own]
        regions = own
    labels = dict.fromkeys(label for r in regions or () for label in labels_of(r))
    return RawRow(0, fields, utf16=utf16, labels=tuple(labels))


def labels_of(region: Mapping[str, Any]) -> list[str]:
    """The labels of a region: none, one or several."""
    label = region.get("label")
    return [str(x) for x in label] if isinstance(label, list) else [] if label is None else [str(label)]


def _objects(values: Any) -> Iterator[dict[str, Any]]:
    """Yields the objects in a list; nothing if the value is no list."""
    yield from (x for x in values if isinstance(x, dict)) if isinstance(values, list) else ()


def _on_question(region: Region, name: str, question: Any, context: Any) -> bool:
    """Whether a region marks the question: by the tag's name, or because only the question holds its text."""
    on, text = region.get("on"), region.get("text")
    if on is None:
        return False
    if str(on).lower() == name.lower():
        return True
    held = [isinstance(x, str) and isinstance(text, str) and text in x for x in (question, context)]
    return isinstance(context, str) and held == [True, False]


def visible_text(html: str) -> str:
    """The text of an HTML page without tags, in which Label Studio's global offsets count."""
    found = _Text()
    found.feed(html)
    found.close()
    return "".join(found.parts)


class _Text(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []

    def handle_data(self, data: str) -> None:
        self.parts.append(data)
