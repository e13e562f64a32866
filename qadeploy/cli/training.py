"""``qadeploy check`` and ``train``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from qadeploy.cli.common import command, fail, main, note, print_result, sayer
from qadeploy.cli.config import fold
from qadeploy.cli.options import options_of
from qadeploy.data.check_file import CheckOptions, check_file
from qadeploy.data.loading import sources
from qadeploy.data.wording import plural
from qadeploy.errors import InputError
from qadeploy.options import declared
from qadeploy.training.options import TrainOptions

OUT = declared(TrainOptions)["out"]


@command(
    main,
    example="""
qadeploy check faq.jsonl --fix faq-clean.jsonl
qadeploy check reviews.csv --columns context=review,answer=ans,span=indices --no-answer-token NONE
qadeploy check covid-qa.json --max-bad 0.01 --json
""",
)
@click.argument("file")
@options_of(CheckOptions)
def check(as_json: bool, file: str, **given: Any) -> None:
    """Classify every row of FILE (anything that train reads, and Label Studio's exports), and repair what can be repaired.

    Each row gets the first class that fits; the table explains the classes. --fix rejects an answer without an offset that
    occurs several times, unless --on-ambiguous first is given.
    """
    from qadeploy.data.check_text import check_lines

    chosen = CheckOptions(**given)
    checked, lengths, written = check_file(file, chosen, lengths=not as_json)
    print_result(
        as_json, checked.to_dict(), [*check_lines(checked, chosen.show), "", *(lengths.lines() if lengths else ())]
    )
    if written:
        note(
            f"{written.clean}: {plural(written.clean_rows, 'row')}; {written.rejected}: {plural(written.rejected_rows, 'row')}"
        )
        if written.renamed:
            note(f"{written.clean}: {written.renamed} rows had the id of an earlier row, so a number was appended")
    if not checked.usable():
        fail(f"{file}: holds no row that can be used", 1)
    if chosen.max_bad is not None and checked.bad_share > chosen.max_bad:
        fail(
            f"{file}: {checked.bad_share:.2%} of the rows cannot be used as they are, --max-bad allows {chosen.max_bad:.2%}",
            1,
        )


@command(
    main,
    example="""
qadeploy train
qadeploy train --data faq.jsonl --out runs/faq
qadeploy train --data old.jsonl --data new.jsonl --out runs/all
qadeploy train --config run.yaml --epochs 2
qadeploy train --data few.jsonl --folds 5
qadeploy train --data faq.jsonl --search 10
qadeploy train --data hub:squad --base bert-base-uncased --epochs 2 --out runs/squad
qadeploy train --resume --out runs/squad
""",
)
@options_of(TrainOptions, without=("out",))
@click.option("--out", "--output-dir", help=f"{OUT.help}  [default: {OUT.default_text}]")
@click.option("--dataset-name", help="A data set on the hub; the same as --data hub:NAME.")
@click.option("--dataset-config-name", help="Its configuration; the same as --data hub:NAME@CONFIG.")
@click.option(
    "--folds",
    type=int,
    help="Cross-validate first, with this many models, each scored on passages it was not trained on. Useful with little data.",
)
@click.option(
    "--search",
    type=int,
    help="Search for settings first: train N times, varying learning rate, epochs, batch size and negatives unless they are given. "
    "The best settings by dev F1, or by the mean F1 of the --folds, are used.",
    metavar="N",
)
@click.option("--resume", is_flag=True, help="Resume the unfinished run or search in --out with its recorded options.")
@click.option("--bf16", is_flag=True, help="The same as --precision bf16.")
@click.option("--fp16", is_flag=True, help="The same as --precision fp16.")
@click.option("--progress/--no-progress", default=None, help="Show a progress bar.  [default: on a terminal]")
def train(
    as_json: bool,
    progress: bool | None,
    out: str | None,
    folds: int | None,
    search: int | None,
    resume: bool,
    **options: Any,
) -> None:
    """Fine-tune a question-answering model and keep its best epoch, or the mean of its epochs.

    Under torchrun (torchrun --nproc-per-node 2 -m qadeploy train ...) the processes split each batch.
    """
    from qadeploy.training.distributed import count, is_first
    from qadeploy.training.folds import cross_validate
    from qadeploy.training.resume import recorded_options
    from qadeploy.training.search import recorded_search, train_with_search
    from qadeploy.training.train import train as run

    ctx = click.get_current_context()
    dataset, config = options.pop("dataset_name"), options.pop("dataset_config_name")
    if config and not dataset:
        raise InputError("--dataset-config-name names a configuration of --dataset-name: give both")
    place = f"hub:{dataset}@{config}" if config else f"hub:{dataset}"
    data = sources(fold(ctx, "data", {"dataset_name": (place,) if dataset else None}))
    options["data"] = data[0] if len(data) == 1 else data
    given = {name: name if options.pop(name) else None for name in ("bf16", "fp16")}
    options["precision"] = fold(ctx, "precision", given)
    name = Path(data[0].removeprefix("hub:").replace(":", "-").replace("@", "-")).stem
    out = out or f"runs/{name}"
    if resume:
        asked = {k: v for k, v in options.items() if ctx.get_parameter_source(k) is not ParameterSource.DEFAULT}
        begun = recorded_search(Path(out))
        recorded = begun.record["options"] if begun else recorded_options(Path(out))
        options = {**options, **{k: v for k, v in recorded.items() if k in options}, **asked}
        if begun:
            search = begun.trials if search is None else search
            folds = recorded["folds"] if folds is None else folds
        if isinstance(options["data"], list):
            options["data"] = tuple(options["data"])
    chosen = TrainOptions(out=out, **options)
    shown = sys.stderr.isatty() if progress is None else progress
    say = sayer(as_json)
    alone = "--search" if search is not None else "--folds" if folds is not None else ""
    if resume and alone == "--folds":
        raise InputError("--resume continues one run and --folds starts several: give only one of them")
    if alone and count() > 1:
        raise InputError(f"{alone} trains in one process: run it without torchrun, or leave out {alone}")
    if search is not None:
        result = train_with_search(chosen, search, say, folds=folds, progress=shown, resume=resume)
    elif folds is not None:
        found = cross_validate(chosen, folds, say, progress=shown)
        say("the run itself, trained on every fold:")
        result = run(chosen, say, progress=shown, more_metrics={"folds": found})
    else:
        result = run(chosen, say, progress=shown, resume=resume)
    if as_json and is_first():
        print_result(as_json, {"run": str(result.folder), **result.metrics}, ())
