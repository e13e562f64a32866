"""``qadeploy evaluate``, ``ask`` and ``answer``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, cast

import click

from qadeploy.cli.common import (
    columns_options,
    command,
    device_option,
    load_predictor,
    main,
    note,
    prefilter_option,
    print_result,
    read_examples,
    reading_options,
    take_reading,
    trust_option,
)
from qadeploy.errors import FailureError, InputError


@command(
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
@prefilter_option
@device_option
@trust_option
@reading_options
def evaluate(
    as_json: bool,
    model: str,
    data: str,
    split: str,
    predictions: str | None,
    predictions_dir: str | None,
    n_best_size: int,
    allow_no_answer: bool | None,
    prefilter: int | None,
    device: str,
    trust_remote_code: bool,
    **options: Any,
) -> None:
    """Score MODEL (a run, a bundle or a checkpoint folder) on annotated questions."""
    from qadeploy.evaluation.predictions import Recorder, write_predictions
    from qadeploy.evaluation.scoring import evaluate as score_all
    from qadeploy.files import write_json

    if predictions and not Path(predictions).absolute().parent.is_dir():
        raise InputError(f"{Path(predictions).parent}: no such folder to write --predictions into")
    examples = read_examples(data, split, take_reading(options))
    predictor = load_predictor(model, device, trust_remote_code=trust_remote_code)
    if predictions_dir:
        Path(predictions_dir).mkdir(parents=True, exist_ok=True)
        predictor = Recorder(predictor, examples, n_best_size)
    with click.progressbar(length=len(examples), label="answering", file=sys.stderr) as bar:
        evaluation = score_all(
            predictor, examples, lambda: bar.update(1), allow_no_answer=allow_no_answer, prefilter=prefilter
        )
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
        "prefilter": prefilter,
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
    if prefilter is not None:
        text.append(f"  at most {prefilter} windows of a context are read, the best by BM25")
    print_result(as_json, value, text)


def _null_rule(allowed: bool, threshold: float | None, by_rule: bool) -> str:
    """One line: whether "no answer" competed, by what threshold, and why."""
    if not allowed:
        why = "neither the data nor the model's training has questions without an answer" if by_rule else "as asked"
        return f"every question is answered ({why})"
    why = "the model was trained with such questions" if threshold is not None else "the data hold such questions"
    how = "by probability, the model has no threshold" if threshold is None else f"null threshold {threshold:+.3f}"
    return f"'no answer' competes ({why if by_rule else 'as asked'}; {how})"


@command(
    main,
    example="""
qadeploy ask bundles/handbook --question "When did it sail?" --context "It sailed at dawn."
qadeploy ask bundles/handbook-int8 --question "Who runs the Galley?" --context @notes.txt --top-k 3 --trace
qadeploy ask bundles/handbook-int8 --question "Who runs the Galley?" --context @book.txt --prefilter 8
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
@prefilter_option
@click.option("--trace", "show_trace", is_flag=True, help="Show the encoding, the forward pass and the span selection.")
@device_option
def ask(as_json: bool, bundle: str, question: str, context: str, show_trace: bool, device: str, **options: Any) -> None:
    """Answer one question from one context with BUNDLE (a run or checkpoint folder works too)."""
    from qadeploy.cli.progress import Progress
    from qadeploy.inference.answerer import Options, to_answers
    from qadeploy.inference.trace import trace, trace_dict, trace_lines

    text = _context(context)
    answerer = load_predictor(bundle, device)
    chosen = Options(**options)
    with Progress(as_json) as progress:
        reading, candidates = trace(
            answerer, question, text, chosen, lambda done, of: progress.count(done, of, " windows read")
        )
    answers = to_answers(reading, chosen)
    value: dict[str, Any] = {"question": question, "answers": [a.to_dict() for a in answers]}
    lines: list[str] = []
    if show_trace:
        value["trace"] = trace_dict(answerer, reading, candidates)
        lines += [*trace_lines(answerer, reading, candidates), ""]
    for rank, answer in enumerate(answers, 1):
        shown = answer.text if answer.text else "(no answer in this text)"
        lines.append(f"{rank}. {shown}   score {answer.score:.4f}, code points {answer.start}-{answer.end}")
    print_result(as_json, value, lines or ["no answer: the context has no token that could be one"])


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


@command(
    main,
    example="""
qadeploy answer bundles/handbook-int8 --input questions.jsonl --output answers.jsonl
qadeploy answer bundles/handbook-int8 --input 'asked/*.parquet' --output answers
qadeploy answer bundles/handbook-int8 --input s3://bucket/asked/ --output answers --engine ray --actors 2
""",
)
@click.argument("bundle")
@click.option(
    "--input",
    "sources",
    required=True,
    multiple=True,
    help="Rows with context and question: a file, folder or glob of parquet or JSONL, here or on s3://..., or anything "
    "that train reads. May be given several times.",
)
@click.option(
    "--output",
    required=True,
    type=click.Path(),
    help="A folder of parquet, into which the same command goes on after a stop; a name in .jsonl is one file.",
)
@click.option(
    "--engine",
    type=click.Choice(["local", "ray"]),
    default="local",
    show_default=True,
    help="This process with all cores, or actors on Ray, here or on a cluster.",
)
@click.option("--allow-no-answer", is_flag=True, help="Let 'no answer' compete, by the bundle's null threshold.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads of the local engine.  [default: all]")
@click.option(
    "--actors",
    type=click.IntRange(min=1),
    help="Ray: processes.  [default: one a core, 8 at most; on a cluster as many as fit]",
)
@click.option(
    "--cpus-per-actor",
    type=click.IntRange(min=1),
    help="Ray: cores, and threads, of each.  [default: shared out; on a cluster 1]",
)
@click.option(
    "--gpus-per-actor",
    type=click.FloatRange(min=0),
    default=0,
    help="Ray: GPUs of each, 0.5 for two on one; 0 answers on CPUs.  [default: 0]",
)
@click.option(
    "--address", help="Ray: the cluster to join, auto or HOST:PORT.  [default: one of its own on this machine]"
)
@click.option(
    "--shard-rows", type=click.IntRange(min=1), help="Rows a part.  [default: 250, up to 8000 where there are many]"
)
@click.option(
    "--max-rejected",
    type=click.FloatRange(0, 1),
    default=1,
    show_default=True,
    help="Exit with 1 where a larger share of the rows was rejected.",
)
@click.option("--verbose", is_flag=True, help="Show what Ray says.")
@columns_options
@prefilter_option
@device_option
def answer(
    as_json: bool,
    bundle: str,
    sources: tuple[str, ...],
    output: str,
    engine: str,
    allow_no_answer: bool,
    threads: int | None,
    shard_rows: int | None,
    max_rejected: float,
    prefilter: int | None,
    device: str,
    **options: Any,
) -> None:
    """Answer every row of files with BUNDLE, one row a question, in order; rows that cannot be are set aside with the reason."""
    from qadeploy.batch.run import Progress, Request, answer_files

    cluster = _cluster(engine, options)
    request = Request(
        bundle, sources, output, take_reading(options), allow_no_answer, device, threads, shard_rows, cluster, prefilter
    )
    with click.progressbar(length=0, label="answering", file=sys.stderr) as bar:

        def begin(rows: int, done: int) -> None:
            bar.length = rows - done
            if done:
                note(f"{output}: {done} of {rows} rows are done already")

        try:
            found = answer_files(request, Progress(begin, bar.update))
        except KeyboardInterrupt:
            kept = (
                ""
                if output.endswith(".jsonl")
                else ": the parts that are done stay, the same command goes on from there"
            )
            note(f"\nstopped{kept}")
            sys.exit(130)
    value = {"rows": found.counts.rows, "rejected": found.counts.rejected, "output": output}
    text = [f"{output}: {found.counts.rows} answers"]
    if found.counts.rejected:
        text.append(f"{found.rejected_in}: {found.counts.rejected} rows without one, each with its reason")
    print_result(as_json, value, text)
    if found.counts.rejected > max_rejected * found.rows:
        share = found.counts.rejected / found.rows
        raise FailureError(f"{share:.2%} of the rows were rejected, --max-rejected allows {max_rejected:.2%}")


def _cluster(engine: str, options: dict[str, Any]) -> Any:
    """Takes the options of Ray out of ``options``: a ``Cluster`` with ``--engine ray``, else None."""
    from qadeploy.batch.ray_engine import Cluster

    names = {
        "address": "address",
        "actors": "actors",
        "cpus_per_actor": "cpus",
        "gpus_per_actor": "gpus",
        "verbose": "verbose",
    }
    values = {ours: options.pop(name) for name, ours in names.items()}
    if engine == "ray":
        return Cluster(**values)
    given = [f"--{name.replace('_', '-')}" for name, ours in names.items() if values[ours]]
    if given:
        raise InputError(f"{', '.join(given)}: only with --engine ray")
    return None
