"""``qadeploy label``."""

from __future__ import annotations

import getpass
import json
from pathlib import Path
from typing import Any

import click

from qadeploy.cli.common import command, main, note
from qadeploy.cli.options import options_of
from qadeploy.data.fields import DataOptions
from qadeploy.errors import InputError
from qadeploy.labelling.options import LabelOptions


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

    options = LabelOptions(**given)
    place = Path(out)
    if place.exists() and Path(source).exists() and place.samefile(source):
        raise InputError(f"--out {out}: is the data to label: give another name")
    annotator = (options.annotator or _login()).strip()
    with Store.open(place, annotator) as store, listen(options.port) as listener:
        items = load_items(source, DataOptions(columns=options.columns), note)
        predictions = load_predictions(options.predictions, items) if options.predictions else None
        desk = Desk(
            items,
            store,
            annotator,
            Answerer.load(
                options.bundle,
                device=options.device,
                threads=options.threads,
                sha256=options.bundle_sha256,
                load_timeout=options.load_timeout,
            ),
            predictions,
        )
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
    if as_json:
        click.echo(json.dumps({"url": url, "out": out, "annotator": desk.annotator, "done": done, "left": left}))
    else:
        what = "passages to ask questions on" if desk.documents else "rows to decide"
        click.echo(
            f"{url}\nOpen this address: {left:,} {what}, for {desk.annotator}. Ctrl+C stops; every decision is in {out}."
        )
