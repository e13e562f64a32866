"""``qadeploy check`` and ``train``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from qadeploy.cli.common import (
    command,
    device_option,
    fail,
    main,
    note,
    print_result,
    reading_options,
    sayer,
    take_reading,
    trust_option,
)
from qadeploy.cli.config import fold
from qadeploy.errors import InputError


@command(
    main,
    example="""
qadeploy check faq.jsonl --fix faq-clean.jsonl
qadeploy check reviews.csv --columns context=review,answer=ans,span=indices --no-answer-token NONE
qadeploy check covid-qa.json --max-bad 0.01 --json
""",
)
@click.argument("file")
@click.option("--fix", type=click.Path(), help="Write usable and repaired rows to this JSONL file, the rest beside it.")
@click.option(
    "--max-bad", type=click.FloatRange(0, 1), help="Exit with 1 if a larger share of the rows is unusable as it is."
)
@click.option("--show", default=3, show_default=True, type=click.IntRange(min=0), help="Rows shown of each class.")
@click.option("--base", help="Whose tokenizer counts tokens: a checkpoint or hub name.  [default: the base that ships]")
@click.option("--max-seq-len", type=click.IntRange(min=16), help="Longest window in tokens.  [default: 384]")
@click.option("--doc-stride", type=click.IntRange(min=0), help="Overlap of windows in tokens.  [default: 128]")
@click.option("--token", help="Token for the hub, for private data sets.")
@reading_options
def check(
    as_json: bool,
    file: str,
    fix: str | None,
    max_bad: float | None,
    show: int,
    base: str | None,
    max_seq_len: int | None,
    doc_stride: int | None,
    token: str | None,
    **options: Any,
) -> None:
    """Classify every row of FILE (anything that train reads, and Label Studio's exports), and repair what can be.

    A row is no_answer, empty, exact, shifted, utf16, whitespace, case, detokenised or absent, the first of these that
    fits. An answer without an offset that occurs several times is rejected by --fix, unless --on-ambiguous first.
    """
    from qadeploy.core.settings import QaSettings
    from qadeploy.data.carriers import load_rows
    from qadeploy.data.check import check_rows
    from qadeploy.data.lengths import load_encoder, measure
    from qadeploy.data.repair import check_places, write_fixed
    from qadeploy.data.table import lines
    from qadeploy.shipped import base_model_path

    if fix:
        check_places(file, Path(fix))
    checked = check_rows(file, load_rows(file, token), take_reading(options))
    text = lines(checked, show)
    if not as_json:
        settings = QaSettings().changed(max_seq_len=max_seq_len, doc_stride=doc_stride)
        encoder = load_encoder(base or str(base_model_path()))
        text += ["", *measure(checked, encoder, settings).lines()]
    print_result(as_json, checked.to_dict(), text)
    if fix:
        written = write_fixed(checked, Path(fix))
        note(f"{written.clean}: {written.clean_rows} rows; {written.rejected}: {written.rejected_rows} rows")
        if written.renamed:
            note(f"{written.clean}: {written.renamed} rows had the id of an earlier row and got a number behind it")
    if max_bad is not None and checked.bad_share > max_bad:
        fail(
            f"{file}: {checked.bad_share:.2%} of the rows cannot be used as they are, --max-bad allows {max_bad:.2%}", 1
        )


@command(
    main,
    example="""
qadeploy train
qadeploy train --data faq.jsonl --out runs/faq
qadeploy train --config run.yaml --epochs 2
qadeploy train --data few.jsonl --folds 5
qadeploy train --data hub:squad --base bert-base-uncased --epochs 2 --out runs/squad
qadeploy train --resume --out runs/squad
""",
)
@click.option(
    "--data",
    "--train-file",
    default="handbook",
    show_default=True,
    help="handbook, a JSON/JSONL/CSV/parquet file, or hub:NAME.",
)
@click.option("--dataset-name", help="A data set of the hub: the same as --data hub:NAME.")
@click.option(
    "--base",
    "--model-name-or-path",
    help="Checkpoint folder or hub name to start from.  [default: the base model that ships]",
)
@click.option("--model-revision", help="Branch, tag or commit of a base from the hub.  [default: main]")
@click.option("--out", "--output-dir", help="Run folder.  [default: runs/NAME after the data]")
@click.option(
    "--eval-data",
    "--validation-file",
    help="Held-out data, only reported on.  [default: the data's own validation split]",
)
@click.option(
    "--dev-data", help="Data that chooses the epoch and the settings.  [default: carved from the training data]"
)
@click.option(
    "--dev-fraction", default=0.1, show_default=True, help="Share of training questions that chooses the epoch."
)
@click.option(
    "--folds",
    type=int,
    help="Cross-validate first: so many models, each scored on the passages it was not trained on; for little data.",
)
@click.option(
    "--max-train-samples", type=click.IntRange(min=1), help="Train on the first N questions of the training part only."
)
@click.option(
    "--max-eval-samples", type=click.IntRange(min=1), help="Score the first N questions of dev and held-out part only."
)
@click.option("--epochs", "--num-train-epochs", type=click.IntRange(min=1), help="Epochs at most.  [default: 3]")
@click.option("--learning-rate", type=float, help="Peak learning rate.  [default: by the amount of data]")
@click.option(
    "--batch-size",
    "--per-device-train-batch-size",
    type=click.IntRange(min=1),
    help="Windows a forward pass.  [default: by the amount of data]",
)
@click.option(
    "--batch-tokens",
    type=click.IntRange(min=1),
    help="Tokens a forward pass at most, padding included: many short windows, or few long ones; --batch-size bounds them.",
)
@click.option(
    "--gradient-accumulation-steps",
    default=1,
    show_default=True,
    type=click.IntRange(min=1),
    help="Batches a step: as one batch so many times as large, in the memory of one.",
)
@click.option("--gradient-checkpointing", is_flag=True, help="Save memory: compute activations again going backward.")
@click.option("--weight-decay", default=0.01, show_default=True, help="AdamW's weight decay.")
@click.option("--warmup-ratio", default=0.06, show_default=True, help="Share of steps over which the rate rises.")
@click.option(
    "--patience", default=2, show_default=True, type=click.IntRange(min=1), help="Epochs without a better dev F1."
)
@click.option("--seed", default=13, show_default=True, help="Seed of the split, the order and the dropout.")
@click.option(
    "--max-seq-len",
    "--max-seq-length",
    type=click.IntRange(min=16),
    help="Longest window in tokens.  [default: the base's]",
)
@click.option("--doc-stride", type=click.IntRange(min=0), help="Overlap of windows in tokens.  [default: the base's]")
@click.option(
    "--preprocessing-num-workers",
    default=1,
    show_default=True,
    type=click.IntRange(min=1),
    help="Processes that make windows; more than one pays on large data alone.",
)
@click.option(
    "--max-answer-len",
    "--max-answer-length",
    type=click.IntRange(min=1),
    help="Longest answer in tokens.  [default: chosen on the dev part]",
)
@click.option(
    "--null-score-diff-threshold",
    type=float,
    help="'No answer' wins if its logit exceeds the best span's by more.  [default: chosen on the dev part]",
)
@click.option(
    "--n-best-size",
    default=20,
    show_default=True,
    type=click.IntRange(min=1),
    help="Candidates a question in nbest_predictions.json; changes nothing else.",
)
@click.option(
    "--negatives",
    default=0,
    show_default=True,
    type=click.IntRange(0, 100),
    help="Per question, so many texts that do not answer it, so that the model learns to say so.",
)
@click.option("--teacher", help="Learn from this bundle, run, checkpoint or hub model too (distillation).")
@click.option(
    "--distill-weight",
    default=0.7,
    show_default=True,
    type=click.FloatRange(0, 1),
    help="The teacher's share of the loss.",
)
@click.option(
    "--distill-temperature", default=2.0, show_default=True, help="Flattens the teacher's distributions where above 1."
)
@click.option("--unlabelled", help="Questions and contexts without answers, which the teacher alone labels.")
@click.option("--layers", type=click.IntRange(min=1), help="Keep so many of the base's layers, evenly chosen.")
@click.option("--attention-dropout", default=0.0, show_default=True, help="0 allows PyTorch's fused attention.")
@click.option(
    "--precision",
    type=click.Choice(["auto", "fp32", "bf16", "fp16"]),
    default="auto",
    show_default=True,
    help="Of the arithmetic; auto is bf16 where the hardware multiplies it natively; fp16 needs a GPU.",
)
@click.option(
    "--torch-compile", is_flag=True, help="Run the model compiled (torch.compile): the first steps take long."
)
@device_option
@click.option("--save-steps", type=click.IntRange(min=1), help="Also save every N steps.  [default: each epoch only]")
@click.option("--resume", is_flag=True, help="Go on with the unfinished run in --out, with its options.")
@click.option("--bf16", is_flag=True, help="The same as --precision bf16.")
@click.option("--fp16", is_flag=True, help="The same as --precision fp16.")
@click.option("--token", help="Token for the hub, for private models and data sets.  [default: $HF_TOKEN, or a login]")
@trust_option
@click.option(
    "--cache/--no-cache",
    default=True,
    show_default=True,
    help="Keep the windows in $QADEPLOY_CACHE (~/.cache/qadeploy) for the next run on the same data.",
)
@click.option("--progress/--no-progress", default=None, help="Show a progress bar.  [default: on a terminal]")
@reading_options
def train(
    as_json: bool, progress: bool | None, out: str | None, folds: int | None, resume: bool, **options: Any
) -> None:
    """Fine-tune a question-answering model and keep its best epoch.

    Under torchrun (torchrun --nproc-per-node 2 -m qadeploy train ...) the processes share each step's batch.
    """
    from qadeploy.training.distributed import count, is_first
    from qadeploy.training.folds import train_with_folds
    from qadeploy.training.resume import recorded_options
    from qadeploy.training.train import TrainOptions
    from qadeploy.training.train import train as run

    ctx = click.get_current_context()
    dataset = options.pop("dataset_name")
    options["data"] = fold(ctx, "data", {"dataset_name": f"hub:{dataset}" if dataset else None})
    given = {name: name if options.pop(name) else None for name in ("bf16", "fp16")}
    options["precision"] = fold(ctx, "precision", given)
    name = Path(options["data"].removeprefix("hub:").replace(":", "-")).stem
    out = out or f"runs/{name}"
    if resume:
        asked = {k: v for k, v in options.items() if ctx.get_parameter_source(k) is not ParameterSource.DEFAULT}
        recorded = {k: v for k, v in recorded_options(Path(out)).items() if k in options}
        options = {**options, **recorded, **asked}
    chosen = TrainOptions(out=out, **options)
    shown = sys.stderr.isatty() if progress is None else progress
    say = sayer(as_json)
    if folds is None:
        result = run(chosen, say, progress=shown, resume=resume)
    elif resume:
        raise InputError("--resume goes on with one run, and --folds begins several: leave out one of them")
    elif count() > 1:
        raise InputError("--folds trains in one process: leave out torchrun, or --folds")
    else:
        result = train_with_folds(chosen, folds, say, progress=shown)
    if as_json and is_first():
        click.echo(json.dumps({"run": str(result.folder), **result.metrics}, ensure_ascii=False))
