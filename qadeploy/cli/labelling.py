"""``qadeploy label``."""

from __future__ import annotations

import getpass
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from qadeploy import options
from qadeploy.cli.common import command, main, note, print_result
from qadeploy.cli.options import options_of
from qadeploy.data.fields import DataOptions
from qadeploy.errors import InputError
from qadeploy.options import check, option


@dataclass(frozen=True, slots=True)
class LabelOptions:
    """The annotator, the model that proposes answers, and the server.

    Raises:
        InputError: A value is out of range, or the annotator's name is blank or not printable.
    """

    bundle: str | None = option(
        None, "Bundle whose model proposes answers.", shown="the newest under bundles/, or the shipped one"
    )
    predictions: str | None = option(
        None, "Answers that qadeploy answer wrote for the same rows, as proposals: a file, or a folder."
    )
    annotator: str | None = option(None, "Name that is written into each row.", shown="your login name")
    port: int = option(8001, "Port to listen on, on 127.0.0.1 only; 0 picks a free one.", least=0, most=65535)
    columns: str | None = options.columns()
    bundle_sha256: str | None = options.bundle_sha256()
    load_timeout: float = options.load_timeout()
    device: str = options.device()
    threads: int | None = options.threads()

    def __post_init__(self) -> None:
        check(self)
        name = self.annotator
        if name is not None and not (name.strip() and name.isprintable() and len(name) <= 100):
            raise InputError("--annotator: give a printable name of at most 100 characters")


@command(
    main,
    example="""
qadeploy label questions.jsonl --out rows.jsonl
qadeploy label manuals --out rows.jsonl --bundle bundles/faq-int8
qadeploy label questions.jsonl --predictions answers.jsonl --out rows.jsonl --annotator ada
""",
)
@click.argument("source")
@click.option(
    "--out", required=True, help="The .jsonl file of decisions, which train reads; an existing file is continued."
)
@options_of(LabelOptions)
def label(as_json: bool, source: str, out: str, **given: Any) -> None:
    """Label SOURCE in a browser on this machine: a model proposes answers, you accept or correct them.

    SOURCE is data with questions and contexts, in any format that train reads; answers in it are ignored. Or it is a folder
    of documents (text, Markdown, HTML, PDF), or a single document: then you type questions on its passages.
    Each decision is saved to the disk before the next row is shown. Rows that the annotator has decided are not shown again.
    """
    from qadeploy.inference.answerer import Answerer
    from qadeploy.labelling.desk import Desk
    from qadeploy.labelling.items import load_items, load_predictions
    from qadeploy.labelling.store import Store
    from qadeploy.serve.labelling import listen, serve_desk

    chosen = LabelOptions(**given)
    place = Path(out)
    if place.exists() and Path(source).exists() and place.samefile(source):
        raise InputError(f"--out {out}: is the data to label: give another name")
    annotator = (chosen.annotator or _login()).strip()
    with Store.open(place, annotator) as store, listen(chosen.port) as listener:
        items = load_items(source, DataOptions(columns=chosen.columns), note)
        predictions = load_predictions(chosen.predictions, items) if chosen.predictions else None
        answerer = Answerer.load(
            chosen.bundle,
            device=chosen.device,
            threads=chosen.threads,
            sha256=chosen.bundle_sha256,
            load_timeout=chosen.load_timeout,
        )
        desk = Desk(items, store, annotator, answerer, predictions)
        try:
            serve_desk(desk, listener, lambda url: _say(as_json, url, desk, out))
        finally:
            desk.close()
        done, left = desk.counts
        note(f"{out}: {done:,} done by {annotator}, {left:,} {'passages' if desk.documents else 'rows'} left")


def _login() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError) as error:
        raise InputError("this user has no login name: give --annotator") from error


def _say(as_json: bool, url: str, desk: Any, out: str) -> None:
    done, left = desk.counts
    value = {"url": url, "out": out, "annotator": desk.annotator, "done": done, "left": left}
    what = "passages to ask questions on" if desk.documents else "rows to decide"
    said = f"{url}\nOpen this address: {left:,} {what}, for {desk.annotator}. Ctrl+C stops; every decision is in {out}."
    print_result(as_json, value, [said])
