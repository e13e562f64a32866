"""Splits SQuAD-shifts into the base model's training data and the two parts that are held out from it.

    python models/prepare_data.py FOLDER_WITH_SQUADSHIFTS OUT

Held out: 8 of the 48 Wikipedia articles and 10 % of the Reddit paragraphs, whole, drawn with seed 13.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

SEED = 13


def rows(paragraphs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Flat rows with every annotator's answer, offsets as published."""
    return [
        {
            "id": qa["id"],
            "context": paragraph["context"],
            "question": qa["question"],
            "answers": {
                "text": [a["text"] for a in qa["answers"]],
                "answer_start": [a["answer_start"] for a in qa["answers"]],
            },
        }
        for paragraph in paragraphs
        for qa in paragraph["qas"]
    ]


def main(source: Path, out: Path) -> None:
    """Writes train.jsonl, held_out_wiki.jsonl and held_out_reddit.jsonl into ``out``."""
    articles = json.loads((source / "squadshifts_new_wiki.json").read_text())["data"]
    posts = [p for a in json.loads((source / "squadshifts_reddit.json").read_text())["data"] for p in a["paragraphs"]]
    generator = random.Random(SEED)
    held_titles = set(generator.sample(sorted(a["title"] for a in articles), 8))
    held_posts = set(generator.sample(range(len(posts)), len(posts) // 10))
    parts = {
        "train": rows([p for a in articles if a["title"] not in held_titles for p in a["paragraphs"]])
        + rows([p for i, p in enumerate(posts) if i not in held_posts]),
        "held_out_wiki": rows([p for a in articles if a["title"] in held_titles for p in a["paragraphs"]]),
        "held_out_reddit": rows([p for i, p in enumerate(posts) if i in held_posts]),
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, part in parts.items():
        with (out / f"{name}.jsonl").open("w", encoding="utf-8") as stream:
            stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in part)
        print(f"{name}: {len(part)} questions")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
