"""The command line: parse, call one function, print. Heavy imports stand inside the command bodies.

Results go to stdout, remarks and progress to stderr; with ``--json`` stdout is one JSON object.
Exit codes: 0 well, 1 the work failed, 2 what the user gave cannot be used.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import click
from click.core import ParameterSource

from qadeploy import __version__
from qadeploy.config import fold, read_config, unknown_hint
from qadeploy.errors import InputError, MissingExtraError, QadeployError

_READING = {"on_ambiguous": "error", "columns": None, "no_answer_token": None}
_TRAIN_PACKAGES = frozenset(
    {"torch", "transformers", "optimum", "onnx", "datasets", "accelerate", "jinja2", "markupsafe", "matplotlib"}
)
_Function = TypeVar("_Function", bound=Callable[..., Any])


class _Command(click.Command):
    """A command with ``--config``, ``--json`` and ``--debug``, whose errors are one clear message."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params += [
            click.Option(
                ["--config"],
                is_eager=True,
                expose_value=False,
                callback=_configure,
                help="YAML or JSON file of options by name (paths from the current directory); flags given win.",
            ),
            click.Option(
                ["--json", "as_json"], is_flag=True, help="Print one JSON object on stdout, remarks on stderr."
            ),
            click.Option(["--debug"], is_flag=True, help="Show the traceback of an error."),
        ]

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            hint = unknown_hint(self, error.option_name)
            if not hint:
                raise
            message = f"No such option: {error.option_name}{hint}"
            raise click.NoSuchOption(error.option_name, message, ctx=ctx) from error

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        try:
            return super().make_context(*args, **kwargs)
        except click.UsageError as error:
            if os.environ.get("RANK", "0") != "0":  # torchrun starts the same command several times: one says it
                sys.exit(error.exit_code)
            raise

    def invoke(self, ctx: click.Context) -> Any:
        debug = ctx.params.pop("debug")
        try:
            return super().invoke(ctx)
        except QadeployError as error:
            if debug:
                traceback.print_exc()
            _fail(str(error), error.exit_code)
        except (click.exceptions.Exit, click.Abort, click.ClickException):
            raise
        except ImportError as error:
            package = (error.name or "").partition(".")[0]
            if debug or package not in _TRAIN_PACKAGES:
                raise
            _fail(str(MissingExtraError(f"qadeploy {ctx.info_name}", package, "train")), 1)
        except OSError as error:
            if debug:
                raise
            where = f"{error.filename}: " if error.filename else ""
            _fail(f"{where}{error.strerror or error}", 1)
        except MemoryError:
            if debug:
                raise
            _fail("the machine ran out of memory: lower --batch-size or --max-seq-len", 1)
        return None


def _configure(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
    if value is not None:
        try:
            ctx.default_map = read_config(Path(value), ctx.command, ctx)
        except QadeployError as error:
            _fail(str(error), error.exit_code)


def _fail(message: str, code: int) -> None:
    click.echo(f"Error: {message}", err=True)
    sys.exit(code)


def _command(group: click.Group, *, example: str) -> Callable[[Callable[..., Any]], click.Command]:
    def wrap(function: Callable[..., Any]) -> click.Command:
        epilog = "\b\nExamples:\n" + "\n".join(f"  {line}" for line in example.strip().splitlines())
        return group.command(cls=_Command, epilog=epilog)(function)

    return wrap


@click.group(
    context_settings={
        "help_option_names": ["-h", "--help"],
        "max_content_width": 120,
        "token_normalize_func": lambda name: name.replace("_", "-"),  # --max_seq_length as in run_qa.py
    }
)
@click.version_option(__version__, prog_name="qadeploy")
def main() -> None:
    """Extractive question answering, from (context, question, answer) triplets to a service.

    The road: check -> train -> export --quantize -> ask, answer, bench.
    """


def _note(message: str) -> None:
    click.echo(message, err=True)


def _print(as_json: bool, value: dict[str, Any], text: Sequence[str]) -> None:
    if as_json:
        click.echo(json.dumps(value, ensure_ascii=False))
    else:
        for line in text:
            click.echo(line)


def _say(as_json: bool) -> Callable[[str], None]:
    return lambda message: click.echo(message, err=as_json)


_trust_option = click.option(
    "--trust-remote-code", is_flag=True, help="Run the Python code that a model brings along. Read it before."
)


def _seconds(name: str, text: str) -> float:
    """Seconds of a time such as 90s, 5m or 1h; a bare number counts seconds. Raises InputError."""
    units = {"s": 1, "m": 60, "h": 3600}
    number, unit = (text[:-1], text[-1]) if text[-1:] in units else (text, "s")
    try:
        seconds = float(number) * units[unit]
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise InputError(f"{name} is {text!r}: give a time such as 90s, 5m or 1h")
    return seconds


def _device_option(function: _Function) -> _Function:
    option = click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
    return option(function)


def _columns_options(function: _Function) -> _Function:
    columns = click.option("--columns", help="The data's names for ours, e.g. context=review,answer=ans,span=indices.")
    token = click.option("--no-answer-token", help="An answer that means 'none in this context', e.g. ANSWERNOTFOUND.")
    return columns(token(function))


def _reading_options(function: _Function) -> _Function:
    ambiguous = click.option(
        "--on-ambiguous",
        type=click.Choice(["error", "first", "skip"]),
        default="error",
        show_default=True,
        help="What to do with an answer that occurs several times in its context and has no answer_start.",
    )
    return _columns_options(ambiguous(function))


def _reading(options: dict[str, Any]) -> Any:
    """Takes the options of ``_reading_options`` out of ``options``."""
    from qadeploy.data.fields import Reading

    return Reading.of({name: options.pop(name, None) or default for name, default in _READING.items()})


# ---------------------------------------------------------------- check, train


@_command(
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
@_reading_options
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
    from qadeploy.data.carriers import load_rows
    from qadeploy.data.check import check_rows
    from qadeploy.data.repair import check_places, write_fixed
    from qadeploy.data.table import lines
    from qadeploy.lengths import load_encoder, measure
    from qadeploy.qa.settings import QaSettings
    from qadeploy.shipped import base_model_path

    if fix:
        check_places(file, Path(fix))
    checked = check_rows(file, load_rows(file, token), _reading(options))
    text = lines(checked, show)
    if not as_json:
        settings = QaSettings().changed(max_seq_len=max_seq_len, doc_stride=doc_stride)
        encoder = load_encoder(base or str(base_model_path()))
        text += ["", *measure(checked, encoder, settings).lines()]
    _print(as_json, checked.to_dict(), text)
    if fix:
        written = write_fixed(checked, Path(fix))
        _note(f"{written.clean}: {written.clean_rows} rows; {written.rejected}: {written.rejected_rows} rows")
        if written.renamed:
            _note(f"{written.clean}: {written.renamed} rows had the id of an earlier row and got a number behind it")
    if max_bad is not None and checked.bad_share > max_bad:
        _fail(
            f"{file}: {checked.bad_share:.2%} of the rows cannot be used as they are, --max-bad allows {max_bad:.2%}", 1
        )


@_command(
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
@click.option("--attention-dropout", default=0.0, show_default=True, help="0 allows PyTorch's fused attention.")
@click.option(
    "--precision",
    type=click.Choice(["auto", "fp32", "bf16", "fp16"]),
    default="auto",
    show_default=True,
    help="Of the arithmetic; auto is bf16 where the hardware multiplies it natively; fp16 needs a GPU.",
)
@click.option("--save-steps", type=click.IntRange(min=1), help="Also save every N steps.  [default: each epoch only]")
@click.option("--resume", is_flag=True, help="Go on with the unfinished run in --out, with its options.")
@click.option("--bf16", is_flag=True, help="The same as --precision bf16.")
@click.option("--fp16", is_flag=True, help="The same as --precision fp16.")
@click.option("--token", help="Token for the hub, for private models and data sets.  [default: $HF_TOKEN, or a login]")
@_trust_option
@click.option(
    "--cache/--no-cache",
    default=True,
    show_default=True,
    help="Keep the windows in $QADEPLOY_CACHE (~/.cache/qadeploy) for the next run on the same data.",
)
@click.option("--progress/--no-progress", default=None, help="Show a progress bar.  [default: on a terminal]")
@_reading_options
def train(
    as_json: bool, progress: bool | None, out: str | None, folds: int | None, resume: bool, **options: Any
) -> None:
    """Fine-tune a question-answering model and keep its best epoch.

    Under torchrun (torchrun --nproc-per-node 2 -m qadeploy train ...) the processes share each step's batch.
    """
    from qadeploy.build.folds import train_with_folds
    from qadeploy.build.processes import count, is_first
    from qadeploy.build.resume import recorded_options
    from qadeploy.build.train import TrainOptions
    from qadeploy.build.train import train as run

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
    say = _say(as_json)
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


# ---------------------------------------------------------------- export


@_command(
    main,
    example="""
qadeploy export --quantize
qadeploy export runs/faq --quantize --max-f1-drop 0.3 --target throughput
qadeploy export runs/faq --quantize --recipe int8-protected
qadeploy export some/checkpoint --eval-data held_out.jsonl --out bundles/mine
""",
)
@click.argument("run", required=False)
@click.option("--out", help="Bundle folder.  [default: bundles/NAME after the run]")
@click.option("--quantize", is_flag=True, help="Also write NAME-int8, if it keeps its F1.")
@click.option(
    "--optimize/--no-optimize", default=True, show_default=True, help="Also write NAME-fused, the optimised graph."
)
@click.option("--eval-data", help="Held-out questions to judge on.  [default: those that the run held out]")
@click.option("--max-f1-drop", default=0.5, show_default=True, help="Points of F1 that int8 may lose.")
@click.option(
    "--target",
    type=click.Choice(["latency", "throughput", "size"]),
    default="latency",
    show_default=True,
    help="What the int8 recipe is chosen for: one question at a time, many at once, or bytes.",
)
@click.option("--recipe", help="Take this int8 recipe instead of measuring all; --list-recipes names them.")
@click.option("--list-recipes", is_flag=True, help="Explain the recipes and stop.")
@click.option(
    "--budget",
    default="5m",
    show_default=True,
    help="Time for measuring recipes, e.g. 90s or 5m; once one keeps its F1.",
)
@click.option(
    "--cache/--no-cache",
    default=True,
    show_default=True,
    help="Keep what was measured in $QADEPLOY_CACHE (~/.cache/qadeploy), so that a search that was cut off goes on.",
)
@_reading_options
def export(
    as_json: bool,
    run: str | None,
    out: str | None,
    quantize: bool,
    optimize: bool,
    eval_data: str | None,
    max_f1_drop: float,
    target: str,
    recipe: str | None,
    list_recipes: bool,
    budget: str,
    cache: bool,
    **options: Any,
) -> None:
    """Export RUN (a run or checkpoint folder, default the newest run) to ONNX bundles, with proof.

    With --quantize every int8 recipe is measured on this machine, and the best of those that keep their F1 is written.
    """
    from qadeploy.build.recipes import RECIPES

    if list_recipes:
        known = {name: each.what for name, each in RECIPES.items()}
        _print(as_json, known, [f"{name:<22} {what}" for name, what in known.items()])
        return
    from qadeploy.build import export as export_step
    from qadeploy.build import optimize as optimize_step
    from qadeploy.build import quantize as quantize_step
    from qadeploy.build.cache import cache_folder
    from qadeploy.build.report import make_reference, table
    from qadeploy.build.runs import find_run, held_out
    from qadeploy.bundle import check_place
    from qadeploy.errors import FailureError, GateError

    say = _say(as_json)
    reading = _reading(options)
    found = find_run(run)
    place = Path(out or f"bundles/{found.name}")
    check_place(place)
    if not 0 <= max_f1_drop <= 100:
        raise InputError(f"max-f1-drop {max_f1_drop} is not between 0 and 100 points")
    seconds = _seconds("budget", budget)
    if recipe:
        quantize_step.find_recipe(recipe)
    fused_place, int8_place = (place.with_name(place.name + end) for end in ("-fused", "-int8"))
    for folder in (fused_place, int8_place):
        check_place(folder)
    source, examples = held_out(found, eval_data, reading)
    say(f"exporting {found.checkpoint}, judged on {len(examples)} questions of {source}")
    reference = make_reference(found, source, examples)
    bundles = [export_step.export(reference, place)]
    say(f"{place}: logits within {bundles[0].manifest['parity']['max_abs_diff']:.1e} of PyTorch")
    if optimize:
        try:
            bundles.append(optimize_step.optimize(reference, bundles[0], fused_place))
            say(f"{fused_place}: {optimize_step.fusion_line(bundles[-1])}")
        except GateError:
            raise
        except FailureError as error:
            say(f"no optimised graph: {error}")
    if quantize:
        say(f"int8 recipes for {target}, against the fp32 model on the dev part:")
        quantized = quantize_step.quantize(
            reference,
            bundles[0],
            int8_place,
            max_f1_drop,
            target=target,
            recipe=recipe,
            budget=seconds,
            cache=cache_folder() if cache else None,
            say=say,
        )
        bundles.append(quantized)
        made = quantized.manifest["made"]
        say(f"{int8_place}: recipe {made['recipe']}, {made['what']}")
    rows = [(bundle.name, bundle.manifest) for bundle in bundles]
    size = 4 * bundles[0].manifest["architecture"]["parameters"]
    lines = table(reference, size, rows)
    value = {"bundles": {str(b.folder): b.manifest for b in bundles}}
    _print(as_json, value, ["", *lines])


# ---------------------------------------------------------------- evaluate, ask, answer


def _predictor(path: str, device: str, threads: int | None = None, trust_remote_code: bool = False) -> Any:
    """An answerer for a bundle, or for a run or checkpoint through PyTorch."""
    from qadeploy.bundle import MANIFEST

    if (Path(path) / MANIFEST).exists():
        from qadeploy import Answerer

        return Answerer.load(path, device=device, threads=threads)
    from qadeploy.build.runs import find_run

    if not Path(path).is_dir():
        raise InputError(f"{path}: no such folder: give a bundle, a run or a checkpoint folder")
    run = find_run(path)
    from qadeploy.build.checkpoint import Hub, load_checkpoint, torch_answerer

    return torch_answerer(load_checkpoint(run.checkpoint, Hub(trust_remote_code=trust_remote_code)), device)


def _examples(source: str, split: str, reading: Any, annotated: bool = True) -> tuple[Any, ...]:
    """Examples of a source; ``auto`` takes the validation split where the data has one."""
    from qadeploy.data.readers import read

    data = read(source, reading, annotated=annotated)
    for count, what in (
        (data.skipped, "ambiguous rows skipped"),
        (data.first_taken, "answers taken at their first place"),
    ):
        if count:
            _note(f"{source}: {count} {what}")
    if split == "all":
        return data.examples
    part = data.part("validation" if split == "auto" else split)
    if split == "auto":
        if part and len(part) < len(data.examples):
            _note(
                f"{source}: scoring the {len(part)} questions of its validation split (--split all for the others too)"
            )
        return part or data.examples
    if not part:
        raise InputError(f"{source}: no row has the split {split!r}")
    return part


@_command(
    main,
    example="""
qadeploy evaluate bundles/handbook-int8 --data handbook
qadeploy evaluate runs/faq --data held_out.json --predictions predictions.json --json
""",
)
@click.argument("model")
@click.option("--data", required=True, help="Annotated questions: anything that train reads.")
@click.option(
    "--split",
    type=click.Choice(["auto", "all", "train", "validation"]),
    default="auto",
    show_default=True,
    help="Which rows; auto is the validation split where the data has one, else all.",
)
@click.option("--predictions", type=click.Path(dir_okay=False), help="Write SQuAD's predictions format ({id: text}).")
@click.option(
    "--predictions-dir",
    type=click.Path(file_okay=False),
    help="Write predictions.json, nbest_predictions.json and, where 'no answer' competes, null_odds.json.",
)
@click.option(
    "--n-best-size",
    default=20,
    show_default=True,
    type=click.IntRange(min=1),
    help="Candidates a question in nbest_predictions.json.",
)
@click.option(
    "--allow-no-answer/--always-answer",
    default=None,
    help="Whether 'no answer' competes.  [default: where the data hold questions without an answer, or the model was trained with some]",
)
@_device_option
@_trust_option
@_reading_options
def evaluate(
    as_json: bool,
    model: str,
    data: str,
    split: str,
    predictions: str | None,
    predictions_dir: str | None,
    n_best_size: int,
    allow_no_answer: bool | None,
    device: str,
    trust_remote_code: bool,
    **options: Any,
) -> None:
    """Score MODEL (a run, a bundle or a checkpoint folder) on annotated questions."""
    from qadeploy.evaluate import evaluate as score_all
    from qadeploy.files import write_json
    from qadeploy.predictions import Recorder, write_predictions

    if predictions and not Path(predictions).absolute().parent.is_dir():
        raise InputError(f"{Path(predictions).parent}: no such folder to write --predictions into")
    examples = _examples(data, split, _reading(options))
    predictor = _predictor(model, device, trust_remote_code=trust_remote_code)
    if predictions_dir:
        Path(predictions_dir).mkdir(parents=True, exist_ok=True)
        predictor = Recorder(predictor, examples, n_best_size)
    with click.progressbar(length=len(examples), label="answering", file=sys.stderr) as bar:
        evaluation = score_all(predictor, examples, lambda: bar.update(1), allow_no_answer=allow_no_answer)
    if predictions:
        write_json(Path(predictions), evaluation.predictions(examples))
    if predictions_dir:
        write_predictions(Path(predictions_dir), predictor.predictions)
    value = {
        "model": model,
        "data": data,
        **evaluation.scores.to_dict(),
        "ece": evaluation.calibration_error,
        "allow_no_answer": evaluation.allow_no_answer,
        "null_threshold": predictor.settings.null_threshold,
    }
    names = {"exact_match": "exact match", "f1": "F1", "accuracy": "accuracy (exact span)"}
    text = [f"{model} on {len(examples)} questions of {data} (percent, 95 % bootstrap interval)"]
    for key, name in names.items():
        low, high = cast(list[float], value[f"{key}_interval"])
        text.append(f"  {name:<22} {value[key]:6.2f}  ({low:.2f} to {high:.2f})")
    if "NoAns_total" in value:
        for kind, name in (("HasAns", "with an answer"), ("NoAns", "without an answer")):
            if f"{kind}_total" in value:
                f1, total = value[f"{kind}_f1"], value[f"{kind}_total"]
                text.append(f"  {name:<22} {f1:6.2f}  F1, exact match {value[f'{kind}_exact']:.2f}, {total} questions")
    text.append(f"  {'calibration error':<22} {value['ece']:6.3f}  (ECE of the scores, 0 to 1)")
    text.append(
        "  " + _null_rule(evaluation.allow_no_answer, predictor.settings.null_threshold, allow_no_answer is None)
    )
    _print(as_json, value, text)


def _null_rule(allowed: bool, threshold: float | None, by_rule: bool) -> str:
    """One line: whether "no answer" competed, by what threshold, and why."""
    if not allowed:
        why = "neither the data nor the model's training has questions without an answer" if by_rule else "as asked"
        return f"every question is answered ({why})"
    why = "the model was trained with such questions" if threshold is not None else "the data hold such questions"
    how = "by probability, the model has no threshold" if threshold is None else f"null threshold {threshold:+.3f}"
    return f"'no answer' competes ({why if by_rule else 'as asked'}; {how})"


@_command(
    main,
    example="""
qadeploy ask bundles/handbook --question "When did it sail?" --context "It sailed at dawn."
qadeploy ask bundles/handbook-int8 --question "Who runs the Galley?" --context @notes.txt --top-k 3 --trace
""",
)
@click.argument("bundle")
@click.option("--question", required=True, help="The question.")
@click.option("--context", required=True, help="The text to find the answer in, or @FILE.")
@click.option("--top-k", default=3, show_default=True, help="How many answers.")
@click.option("--max-answer-len", type=int, help="Longest answer in tokens.  [default: the bundle's]")
@click.option("--max-seq-len", type=int, help="Longest window in tokens.  [default: the bundle's]")
@click.option("--doc-stride", type=int, help="Overlap of windows in tokens.  [default: the bundle's]")
@click.option("--align-to-words", is_flag=True, help="Widen answers to whole words.")
@click.option("--allow-no-answer", is_flag=True, help="Let 'no answer' compete, by the bundle's null threshold.")
@click.option("--trace", "show_trace", is_flag=True, help="Show the encoding, the forward pass and the span selection.")
@_device_option
def ask(as_json: bool, bundle: str, question: str, context: str, show_trace: bool, device: str, **options: Any) -> None:
    """Answer one question from one context with BUNDLE (a run or checkpoint folder works too)."""
    from qadeploy.runtime.answerer import Options, to_answers
    from qadeploy.runtime.trace import trace, trace_dict, trace_lines

    text = _context(context)
    answerer = _predictor(bundle, device)
    chosen = Options(**options)
    reading, candidates = trace(answerer, question, text, chosen)
    answers = to_answers(reading, chosen)
    value: dict[str, Any] = {"question": question, "answers": [a.to_dict() for a in answers]}
    lines: list[str] = []
    if show_trace:
        value["trace"] = trace_dict(reading, candidates)
        lines += [*trace_lines(answerer, reading, candidates), ""]
    for rank, answer in enumerate(answers, 1):
        shown = answer.text if answer.text else "(no answer in this text)"
        lines.append(f"{rank}. {shown}   score {answer.score:.4f}, code points {answer.start}-{answer.end}")
    _print(as_json, value, lines or ["no answer: the context has no token that could be one"])


def _context(value: str) -> str:
    if not value.startswith("@"):
        return value
    path = Path(value[1:])
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise InputError(f"--context {value}: no such file") from error
    except UnicodeDecodeError as error:
        raise InputError(f"--context {value}: not UTF-8 text (byte {error.start})") from error
    except OSError as error:
        raise InputError(f"--context {value}: cannot be read: {error.strerror}") from error


@_command(
    main,
    example="""
qadeploy answer bundles/handbook-int8 --input questions.jsonl --output answers.jsonl
qadeploy answer bundles/handbook-int8 --input questions.parquet --output answers
""",
)
@click.argument("bundle")
@click.option("--input", "source", required=True, help="Rows with context and question: anything that train reads.")
@click.option(
    "--output", required=True, type=click.Path(), help="A name in .jsonl is one file, another a folder of parquet."
)
@click.option("--allow-no-answer", is_flag=True, help="Let 'no answer' compete, by the bundle's null threshold.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads.  [default: all]")
@_columns_options
@_device_option
def answer(
    as_json: bool,
    bundle: str,
    source: str,
    output: str,
    allow_no_answer: bool,
    threads: int | None,
    device: str,
    **options: Any,
) -> None:
    """Answer every question of a file with BUNDLE, one row a question, in order."""
    from qadeploy import Answerer
    from qadeploy.batch import answer_file, check_output

    check_output(Path(output))
    examples = _examples(source, "all", _reading(options), annotated=False)
    answerer = Answerer.load(bundle, device=device, threads=threads)
    with click.progressbar(length=len(examples), label="answering", file=sys.stderr) as bar:
        rows = answer_file(answerer, examples, Path(output), lambda: bar.update(1), allow_no_answer=allow_no_answer)
    _print(as_json, {"rows": rows, "output": output}, [f"{output}: {rows} answers"])


# ---------------------------------------------------------------- bench, doctor


@_command(
    main,
    example="""
qadeploy bench
qadeploy bench bundles/faq-int8 bundles/faq --data held_out.jsonl --against pipeline,openvino --out results
qadeploy bench bundles/faq-int8 --against pipeline,torch --max-f1-drop 0.5 --min-speedup 4
""",
)
@click.argument("bundles", nargs=-1, metavar="[BUNDLE]...")
@click.option("--data", help="Annotated questions.  [default: those that the first bundle's run held out]")
@click.option(
    "--against",
    default="pipeline,optimum",
    show_default=True,
    help="Peers, by commas: pipeline, torch, torch-bf16, optimum, optimum-direct, openvino; empty for none.",
)
@click.option("--questions", default=200, show_default=True, help="Questions at most, drawn evenly.")
@click.option(
    "--latency-questions",
    default=50,
    show_default=True,
    type=click.IntRange(min=1),
    help="How many of them are also asked one at a time, for p50, p95 and p99.",
)
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(min=1), help="Interleaved rounds.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads of every variant.  [default: all]")
@click.option(
    "--checkpoint",
    type=click.Path(),
    help="The PyTorch checkpoint for the peers.  [default: the first bundle's source]",
)
@click.option("--out", type=click.Path(file_okay=False), help="Folder for bench.json, bench.html and bench.png.")
@click.option("--min-f1", type=float, help="Exit with 1 if the first bundle's F1 is lower.")
@click.option(
    "--max-f1-drop",
    type=float,
    help="Exit with 1 if it loses more points of F1 than this to the best other variant in float (peer or fp32 bundle).",
)
@click.option(
    "--min-speedup",
    type=float,
    help="Exit with 1 if it is not so many times as fast as the pipeline, or else the first peer.",
)
@_device_option
@_reading_options
def bench(
    as_json: bool,
    bundles: tuple[str, ...],
    data: str | None,
    against: str,
    questions: int,
    latency_questions: int,
    rounds: int,
    threads: int | None,
    checkpoint: str | None,
    out: str | None,
    min_f1: float | None,
    max_f1_drop: float | None,
    min_speedup: float | None,
    device: str,
    **options: Any,
) -> None:
    """Measure BUNDLEs (default: the newest) against other tools on the same questions, answers scored.

    Peers and limits go by the first BUNDLE; the others stand beside it.
    """
    from qadeploy.bench import measure, table
    from qadeploy.bench.limits import Limits, complaint
    from qadeploy.bench.own import open_bundles
    from qadeploy.bench.peers import parse_peers
    from qadeploy.bench.workload import draw
    from qadeploy.build.runs import find_run, held_out, known_examples
    from qadeploy.bundle import newest_bundle
    from qadeploy.runtime.session import check_device

    peers = parse_peers(against)
    check_device(device)
    opened, broken = open_bundles(bundles or [newest_bundle()])
    limits = Limits(min_f1, max_f1_drop, min_speedup)
    limits.check(peers, [bundle.precision for bundle in opened[1:]])
    source = Path(checkpoint or measure.source_of(opened[0]))
    if data is None:
        if not source.is_dir():
            raise InputError(
                f"{source}: the checkpoint that the bundle was made from is not there: give --data FILE, and --checkpoint for the peers"
            )
        name, examples = held_out(find_run(source), None)
    else:
        name, examples = data, _examples(data, "auto", _reading(options))
    workload = draw(name, examples, questions)
    if out:
        from qadeploy.bench.page import write  # what it needs is missed now, not after the measurements

        Path(out).mkdir(parents=True, exist_ok=True)
    known = (*known_examples(source), *examples) if "openvino" in peers else ()
    request = measure.Request(
        opened, broken, workload, peers, source, known, rounds, latency_questions, device, threads, limits
    )
    report = measure.bench(request, _note)
    text = table.lines(report)
    if out:
        text.append(f"written: {', '.join(str(path) for path in write(report, Path(out)))}")
    _print(as_json, report, text)
    if problem := complaint(report):
        _fail(problem, 1)


@_command(main, example="qadeploy doctor")
def doctor(as_json: bool) -> None:
    """Show what this installation can do, and what stands in the way."""
    from qadeploy.doctor import diagnose, lines

    report = diagnose()
    _print(as_json, report, lines(report))
