"""``qadeploy index``, and what ``ask`` does with a corpus."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qadeploy.cli.common import command, main, note, print_result
from qadeploy.cli.progress import Progress
from qadeploy.core.settings import Options
from qadeploy.data.wording import plural

if TYPE_CHECKING:
    from qadeploy.corpus.corpus import Corpus
    from qadeploy.corpus.records import CorpusAnswer, Passage
    from qadeploy.records import Answer


@command(
    main,
    example="""
qadeploy index manuals --out indexes/manuals
qadeploy index articles.jsonl --out indexes/articles --json
""",
)
@click.argument("source")
@click.option("--out", required=True, help="The folder of the index; an existing index is updated.")
def index(as_json: bool, source: str, out: str) -> None:
    """Make an index of SOURCE, a folder of documents or a file, from which ask and serve answer.

    Documents are text, Markdown, HTML and PDF files, and JSONL with a document per row (fields text, id, title). If --out is
    already an index, only changed files are read. Files that cannot be read are listed, with the reason.
    """
    from qadeploy.corpus.building import build

    with Progress(as_json) as progress:
        built = build(Path(source), Path(out), lambda number, name: progress.show(f"{number} files: {name}"))
    counts = {name: getattr(built, name) for name in ("files", "documents", "passages", "added", "changed", "removed")}
    skipped = [asdict(each) for each in built.skipped]
    changes = (
        "was up to date"
        if built.up_to_date
        else f"{built.added} added, {built.changed} changed, {built.removed} removed"
    )
    sizes = [plural(counts[f"{noun}s"], noun) for noun in ("file", "document", "passage")]
    text = [f"{out}: {', '.join(sizes)} ({changes})"]
    if built.skipped:
        text += ["skipped:", *(f"  {each}" for each in built.skipped)]
    print_result(as_json, {"index": out, **counts, "skipped": skipped}, text)


def open_corpus(place: str, progress: Progress) -> Corpus:
    """Opens an index, or builds one from documents, and notes which files are not in it."""
    from qadeploy.corpus.corpus import Corpus

    corpus = Corpus.open(place, lambda number, name: progress.show(f"{number} files: {name}"))
    if corpus.skipped:
        most = 3
        more = (
            f" and {len(corpus.skipped) - most} more (qadeploy index lists them)" if len(corpus.skipped) > most else ""
        )
        note(f"not in the corpus: {'; '.join(map(str, corpus.skipped[:most]))}{more}")
    return corpus


def place_answers(
    corpus: Corpus, answers: Sequence[Answer], passages: Sequence[Passage], options: Options
) -> tuple[list[CorpusAnswer], dict[str, Any]]:
    """The answers with their documents and places, and the values for the JSON output."""
    placed = corpus.placed(answers, passages, options.offsets)
    read = [passage.about() for passage in passages]
    answered = [answer.to_dict() for answer in placed]
    return placed, {"answers": answered, "passages": read, "skipped": [asdict(each) for each in corpus.skipped]}
