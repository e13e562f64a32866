"""``qadeploy evaluate``, ``ask`` and ``answer``."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import click
from click.core import ParameterSource

from qadeploy import options
from qadeploy.batch.plan import CALL_OPTIONS
from qadeploy.batch.ray_engine import Cluster
from qadeploy.batch.run import BatchProgress, BatchRequest, Terminated, answer_files
from qadeploy.cli.common import bundle_argument, command, load_predictor, main, note, print_result, take_data_options
from qadeploy.cli.indexing import open_corpus, place_answers
from qadeploy.cli.options import options_of
from qadeploy.cli.progress import Progress
from qadeploy.core.metrics import MetricChoice, choose_metric
from qadeploy.core.settings import Options
from qadeploy.corpus.options import CorpusOptions, for_corpus
from qadeploy.data.fields import DataOptions
from qadeploy.data.loading import read_split
from qadeploy.data.wording import plural
from qadeploy.errors import FailureError, InputError
from qadeploy.evaluation.predictions import DEFAULT_N_BEST, new_predictions, write_predictions
from qadeploy.options import check, declared, option
from qadeploy.records import Answer
from qadeploy.training.options import TrainOptions

if TYPE_CHECKING:
    from qadeploy.corpus.records import CorpusAnswer


@dataclass(frozen=True, slots=True)
class EvaluateOptions:
    """The options of ``evaluate`` besides the model and the data."""

    split: Literal["auto", "all", "train", "validation"] = option(
        "auto", "Which rows to score; auto is the validation split if the data has one, else all."
    )
    predictions: str | None = option(None, "Write SQuAD's predictions format ({id: text}).")
    predictions_dir: str | None = option(
        None, "Write predictions.json, nbest_predictions.json and, if 'no answer' competes, null_odds.json."
    )
    n_best_size: int = option(DEFAULT_N_BEST, "Candidates per question in nbest_predictions.json.", least=1)
    metric: MetricChoice | None = option(  # noqa: RUF009 - a Literal
        None, "How EM and F1 compare texts, as in train; auto chooses by this data.", shown="the model's"
    )
    allow_no_answer: bool | None = option(
        None,
        "Whether 'no answer' competes.",
        off="--always-answer",
        shown="if the data has questions without an answer",
    )
    prefilter: int | None = options.prefilter()
    device: str = options.device()
    bundle_sha256: str | None = options.bundle_sha256()
    load_timeout: float = options.load_timeout()
    trust_remote_code: bool = options.trust_remote_code()
    allow_pickle: bool = options.allow_pickle()


_LOADING = ("device", "bundle_sha256", "load_timeout", "trust_remote_code", "allow_pickle")


@command(
    main,
    example="""
qadeploy evaluate bundles/handbook-int8 --data handbook
qadeploy evaluate runs/faq --data held_out.json --predictions predictions.json --json
""",
)
@click.argument("model")
@click.option("--data", required=True, help="Annotated questions, in any format that train reads.")
@options_of(EvaluateOptions)
@options_of(DataOptions)
def evaluate(as_json: bool, model: str, data: str, **given: Any) -> None:
    """Score MODEL (a run, a bundle or a checkpoint folder) on annotated questions."""
    from qadeploy.evaluation.scoring import evaluate as score_all
    from qadeploy.files import write_json

    reading = take_data_options(given)
    chosen = EvaluateOptions(**given)
    if chosen.predictions_dir is None and _given("n_best_size"):
        raise InputError("--n-best-size: only with --predictions-dir")
    file, folder = (Path(place) if place else None for place in (chosen.predictions, chosen.predictions_dir))
    with new_predictions(file, folder):
        examples = read_split(data, chosen.split, reading, note)
        predictor = load_predictor(model, **{name: getattr(chosen, name) for name in _LOADING})
        predictor.require_room(examples, data)
        with click.progressbar(length=len(examples), label="answering", file=sys.stderr) as bar:
            evaluation = score_all(
                predictor,
                examples,
                lambda: bar.update(1),
                allow_no_answer=chosen.allow_no_answer,
                prefilter=chosen.prefilter,
                metric=choose_metric(chosen.metric, examples) if chosen.metric else None,
                n_best_size=chosen.n_best_size if folder else None,
            )
        if file:
            write_json(file, evaluation.predictions(examples))
        if folder:
            write_predictions(folder, evaluation.recorded)
    value = {
        "model": model,
        "data": data,
        "metric": evaluation.metric,
        **evaluation.scores.to_dict(),
        "ece": evaluation.calibration_error,
        "allow_no_answer": evaluation.allow_no_answer,
        "prefilter": chosen.prefilter,
        "null_threshold": predictor.settings.null_threshold,
    }
    names = {"exact_match": "exact match", "f1": "F1", "accuracy": "accuracy (exact span)"}
    text = [f"{model} on {plural(len(examples), 'question')} of {data} (percent, 95 % bootstrap interval)"]
    for key, name in names.items():
        low, high = cast(list[float], value[f"{key}_interval"])
        text.append(f"  {name:<22} {value[key]:6.2f}  ({low:.2f} to {high:.2f})")
    if "NoAns_total" in value:
        for kind, name in (("HasAns", "with an answer"), ("NoAns", "without an answer")):
            if f"{kind}_total" in value:
                f1, total = value[f"{kind}_f1"], value[f"{kind}_total"]
                text.append(
                    f"  {name:<22} {f1:6.2f}  F1, exact match {value[f'{kind}_exact']:.2f}, {plural(total, 'question')}"
                )
    text.append(f"  {'calibration error':<22} {value['ece']:6.3f}  (ECE of the scores, 0 to 1)")
    origin = {None: "stored with the model", "auto": "chosen by the script of the data"}.get(chosen.metric, "as asked")
    text.append(f"  metric of EM and F1: {evaluation.metric} ({origin})")
    by_rule = chosen.allow_no_answer is None
    text.append("  " + _null_rule(evaluation.allow_no_answer, predictor.settings.null_threshold, by_rule))
    if chosen.prefilter is not None:
        text.append(f"  at most {chosen.prefilter} windows of a context are read, the best by BM25")
    print_result(as_json, value, text)


def _null_rule(allowed: bool, threshold: float | None, by_rule: bool) -> str:
    """One line: whether "no answer" competed, by which threshold, and why."""
    if not allowed:
        return f"every question is answered ({'all of the data has an answer' if by_rule else 'as asked'})"
    how = "by probability, the model has no threshold" if threshold is None else f"null threshold {threshold:+.3f}"
    return f"'no answer' competes ({'the data holds such questions' if by_rule else 'as asked'}; {how})"


@command(
    main,
    example="""
qadeploy ask --question "When did it sail?" --context "It sailed at dawn."
qadeploy ask bundles/handbook-int8 --question "Who runs the Galley?" --context @notes.txt --top-k 3 --trace
qadeploy ask bundles/handbook-int8 --question "Who runs the Galley?" --context @book.txt --prefilter 8
qadeploy ask bundles/handbook-int8 --question "Who runs the Galley?" --context @a.txt --context @b.txt --snippet sentence
qadeploy ask --question "Who runs the Galley?" --corpus manuals
""",
)
@bundle_argument
@click.option("--question", required=True, help="The question.")
@click.option(
    "--context",
    "contexts",
    multiple=True,
    help="The text to find the answer in, or @FILE: a UTF-8 file, read unchanged except for a byte order mark, which is skipped "
    "and not counted in offsets. @@TEXT is a text that begins with @. If given several times, the texts are passages that are "
    "read together.",
)
@click.option(
    "--corpus",
    "corpus_place",
    help="Documents to find the answer in, instead of --context: a folder, a file, or an index made by qadeploy index. The "
    "index of documents is kept in $QADEPLOY_CACHE (~/.cache/qadeploy).",
)
@options_of(CorpusOptions)
@options_of(Options)
@click.option("--trace", "show_trace", is_flag=True, help="Show the encoding, the forward pass and the span selection.")
@options_of(EvaluateOptions, *_LOADING)
def ask(
    as_json: bool,
    bundle: str,
    question: str,
    contexts: tuple[str, ...],
    corpus_place: str | None,
    show_trace: bool,
    passages: int,
    **given: Any,
) -> None:
    """Answer one question from one context, several passages or a corpus, with BUNDLE (a run or checkpoint folder works too).

    Without BUNDLE, the newest under bundles/ is used, or the shipped bundle if there is none.
    """
    from qadeploy.inference.pairs import skipped_passages, to_answers

    if bool(contexts) == (corpus_place is not None):
        raise InputError("give --context, or --corpus for documents, and not both")
    if contexts and _given("passages"):
        raise InputError("--passages: only with --corpus")
    texts = tuple(map(_context, contexts))
    loading = {name: given.pop(name) for name in _LOADING}
    chosen = reading = Options(**given)
    check(chosen)
    answerer = load_predictor(bundle, **loading)
    value: dict[str, Any]
    with Progress(as_json) as progress:
        corpus, found = None, []
        if corpus_place is not None:
            corpus = open_corpus(corpus_place, progress)
            found = corpus.search(question, passages)
            texts, reading = tuple(each.text for each in found), for_corpus(chosen)
        if corpus and not found:
            about = place_answers(corpus, (), (), chosen)[1]
            value = {"question": question, "corpus": corpus_place, **about}
            print_result(as_json, value, ["no answer: no word of the question occurs in the corpus"])
            return
        pair = answerer.read(
            question,
            texts if corpus or len(texts) > 1 else texts[0],
            reading,
            lambda done, of: progress.count(done, of, " windows read"),
        )
    answers: Sequence[Answer | CorpusAnswer] = to_answers(pair, reading)
    value = {"question": question, "answers": [answer.to_dict() for answer in answers]}
    if corpus:
        answers, about = place_answers(corpus, to_answers(pair, reading), found, chosen)
        value = {"question": question, "corpus": corpus_place, **about}
    elif pair.skipped:
        note(f"Warning: {skipped_passages(pair.skipped)}")
    lines: list[str] = []
    units = {"codepoints": "code points", "utf16": "UTF-16 units", "utf8": "bytes"}[chosen.offsets]
    if show_trace:
        from qadeploy.inference.trace import trace_dict, trace_lines

        value["trace"] = trace_dict(answerer, pair, reading)
        lines += [*trace_lines(answerer, pair, reading), ""]
    for rank, answer in enumerate(answers, 1):
        lines += _answer_lines(rank, answer, units)
    none = "no answer: the context has no token that could be an answer"
    if chosen.min_score:
        none = f"no answer has a score of {chosen.min_score:g} or more"
    print_result(as_json, value, lines or [none])


def _answer_lines(rank: int, answer: Answer | CorpusAnswer, units: str) -> list[str]:
    """An answer, its score and its place, and its snippet if it has one."""
    shown = answer.text if answer.text else "(no answer in this text)"
    if isinstance(answer, Answer):
        parts = [] if answer.passage is None else [f"passage {answer.passage}"]
    else:
        parts = [part for part in (answer.document, answer.place) if part]
    place = ", ".join([*parts, f"{units} {answer.start}-{answer.end}"])
    lines = [f"{rank}. {shown}   score {answer.score:.4f}, {place}"]
    if answer.snippet:
        lines.append("   " + " ".join(answer.snippet.text.split()))
    return lines


def _given(name: str) -> bool:
    """Whether an option was given, on the command line or in the config file."""
    return click.get_current_context().get_parameter_source(name) is not ParameterSource.DEFAULT


def _context(value: str) -> str:
    """The text itself, or that of a file. Line ends are not translated, so that offsets count in the file."""
    if not value.startswith("@") or value.startswith("@@"):
        if os.path.isfile(value):  # for too long a name it returns False, while Path.is_file raises
            note(f"Warning: --context {value}: is read as the text itself; to read the file, give --context @{value}")
        return value.removeprefix("@")
    path = Path(value[1:])
    try:
        return path.read_bytes().decode("utf-8-sig")
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
@bundle_argument
@click.option(
    "--input",
    "sources",
    required=True,
    multiple=True,
    help="Rows with question and context, or contexts (a list of passages): a file, folder or glob of parquet or JSONL, local or "
    "on s3://..., or any format that train reads. May be given several times.",
)
@click.option(
    "--output",
    "--out",
    required=True,
    type=click.Path(),
    help="A folder of parquet files, which the same command completes after an interruption; or a single .jsonl file.",
)
@click.option(
    "--engine",
    type=click.Choice(["local", "ray"]),
    default="local",
    show_default=True,
    help="local: this process on all cores; ray: actors on Ray, on this machine or a cluster.",
)
@options_of(BatchRequest, *CALL_OPTIONS, "bundle_sha256", "load_timeout", "device", "threads", "shard_rows")
@options_of(Cluster)
@click.option(
    "--max-rejected",
    type=click.FloatRange(0, 1),
    default=1,
    show_default=True,
    help="Exit with 1 if a larger share of the rows was rejected.",
)
@options_of(TrainOptions, "columns")
def answer(
    as_json: bool, bundle: str, sources: tuple[str, ...], output: str, engine: str, max_rejected: float, **given: Any
) -> None:
    """Answer every row of files with BUNDLE, one question per row, in order. Rows without an answer go to a list with the reason.

    Without BUNDLE, the newest under bundles/ is used, or the shipped bundle if there is none.
    """
    cluster = _cluster(engine, {name: given.pop(name) for name in declared(Cluster)})
    request = BatchRequest(bundle, sources, output, take_data_options(given), **given, cluster=cluster)
    with click.progressbar(length=0, label="answering", file=sys.stderr) as bar:

        def begin(rows: int, done: int) -> None:
            bar.length = rows - done
            if done:
                note(f"{output}: {done} of {rows} rows are already done")

        try:
            found = answer_files(request, BatchProgress(begin, bar.update))
        except KeyboardInterrupt as stop:
            kept = (
                ""
                if output.endswith(".jsonl")
                else ": finished parts are kept, and the same command continues from there"
            )
            note(f"\nstopped{kept}")
            sys.exit(128 + (stop.number if isinstance(stop, Terminated) else signal.SIGINT))
    value = {"rows": found.counts.rows, "rejected": found.counts.rejected, "output": output}
    text = [f"{output}: {plural(found.counts.rows, 'answer')}"]
    if found.counts.rejected:
        text.append(
            f"{found.rejected_in}: {plural(found.counts.rejected, 'row')} without an answer, each with its reason"
        )
    print_result(as_json, value, text)
    if found.counts.rejected > max_rejected * found.rows:
        share = found.counts.rejected / found.rows
        raise FailureError(f"{share:.2%} of the rows were rejected, --max-rejected allows {max_rejected:.2%}")


def _cluster(engine: str, given: dict[str, Any]) -> Cluster | None:
    """The cluster of ``--engine ray``. Raises InputError if options of Ray were given with the local engine."""
    if engine == "ray":
        return Cluster(**given)
    flags = [each.flag for name, each in declared(Cluster).items() if given[name] not in {each.default, None}]
    if flags:
        raise InputError(f"{', '.join(flags)}: only with --engine ray")
    return None
