"""Small files of questions, and the results of ``read`` and ``check`` on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qadeploy.data.check import check_rows
from qadeploy.data.fields import DataOptions
from qadeploy.data.formats import load_rows
from qadeploy.data.loading import read

SKY = "The sky is blue."
SEA = "The sea is deep, the sea is cold."
ONE = {"id": "q1", "question": "What colour is it?", "answers": [{"text": "blue", "answer_start": 11}]}
TWO = {"id": "q2", "question": "How is it?", "answers": [{"text": "cold", "answer_start": 28}]}
PARAGRAPHS = [{"context": SKY, "qas": [ONE]}, {"context": SEA, "qas": [TWO]}]
ARTICLE = {"title": "Nature", "paragraphs": PARAGRAPHS}
FLAT = [
    {"id": qa["id"], "question": qa["question"], "context": p["context"], "answers": {"text": [a["text"]], "answer_start": [a["answer_start"]]}}
    for p in PARAGRAPHS for qa in p["qas"] for a in qa["answers"]
]  # fmt: skip
WANTED = [("q1", SKY, "What colour is it?", [("blue", 11)]), ("q2", SEA, "How is it?", [("cold", 28)])]


def put(folder: Path, name: str, content: Any) -> str:
    """Writes a file and returns its path."""
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def found(source: str, options: DataOptions | None = None) -> list[tuple[str, str, str, list[tuple[str, int]]]]:
    """What ``read`` returns: id, context, question, and the texts and offsets of the answers."""
    examples = read(source, options).examples
    return [(e.id, e.context, e.question, [(a.text, a.start) for a in e.answers]) for e in examples]


def answers(source: str, options: DataOptions | None = None) -> list[list[tuple[str, int]]]:
    """The texts and offsets of each example's answers."""
    return [given for *_, given in found(source, options)]


def classes(source: str, options: DataOptions | None = None) -> dict[str, int]:
    """The classes that ``check`` counts, without empty ones."""
    counts = check_rows(source, load_rows(source), options or DataOptions()).to_dict()["classes"]
    return {name: n for name, n in counts.items() if n}


def lines(*values: Any) -> str:
    """Values as JSONL."""
    return "".join(json.dumps(v, ensure_ascii=False) + "\n" for v in values)
