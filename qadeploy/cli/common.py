"""What the commands share: the group, its kind of command, options, printing, and the models and data that they name.

Results go to stdout, remarks and progress to stderr; with ``--json`` stdout is one JSON object.
Exit codes: 0 well, 1 the work failed, 2 what the user gave cannot be used.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click

from qadeploy import __version__
from qadeploy.cli.config import read_config, unknown_hint
from qadeploy.errors import DeviceWarning, InputError, MachineWarning, MissingExtraError, QadeployError

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
            with _plain_warnings():
                return super().invoke(ctx)
        except QadeployError as error:
            if debug:
                traceback.print_exc()
            fail(str(error), error.exit_code)
        except (click.exceptions.Exit, click.Abort, click.ClickException):
            raise
        except ImportError as error:
            package = (error.name or "").partition(".")[0]
            if debug or package not in _TRAIN_PACKAGES:
                raise
            fail(str(MissingExtraError(f"qadeploy {ctx.info_name}", package, "train")), 1)
        except OSError as error:
            if debug:
                raise
            where = f"{error.filename}: " if error.filename else ""
            fail(f"{where}{error.strerror or error}", 1)
        except MemoryError:
            if debug:
                raise
            fail("the machine ran out of memory: lower --batch-size, --batch-tokens or --max-seq-len", 1)
        return None


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Within it our own warnings are a line each on stderr, once, whatever Python's filters say; others are as ever."""
    with warnings.catch_warnings():
        show = warnings.showwarning

        def say(message: Warning | str, category: type[Warning], *where: Any) -> None:
            if issubclass(category, DeviceWarning | MachineWarning):
                note(f"Warning: {message}")
            else:
                show(message, category, *where)

        warnings.showwarning = say  # type: ignore[assignment]
        for ours in (DeviceWarning, MachineWarning):
            warnings.simplefilter("once", ours)
        yield


def _configure(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
    if value is not None:
        try:
            ctx.default_map = read_config(Path(value), ctx.command, ctx)
        except QadeployError as error:
            fail(str(error), error.exit_code)


def fail(message: str, code: int) -> None:
    """Says what failed on stderr and ends the process with the exit code."""
    click.echo(f"Error: {message}", err=True)
    sys.exit(code)


def command(group: click.Group, *, example: str) -> Callable[[Callable[..., Any]], click.Command]:
    """A command of the group, with examples under its help, a line each."""

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


def note(message: str) -> None:
    """A remark, on stderr."""
    click.echo(message, err=True)


def print_result(as_json: bool, value: dict[str, Any], text: Sequence[str]) -> None:
    """The result on stdout: ``value`` as JSON, or the lines of ``text``."""
    if as_json:
        click.echo(json.dumps(value, ensure_ascii=False))
    else:
        for line in text:
            click.echo(line)


def sayer(as_json: bool) -> Callable[[str], None]:
    """What prints progress, a line a call: on stdout, with ``--json`` on stderr."""
    return lambda message: click.echo(message, err=as_json)


trust_option = click.option(
    "--trust-remote-code", is_flag=True, help="Run the Python code that a model brings along. Read it before."
)


def seconds_of(name: str, text: str) -> float:
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


def device_option(function: _Function) -> _Function:
    """Adds ``--device``."""
    option = click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
    return option(function)


def prefilter_option(function: _Function) -> _Function:
    """Adds ``--prefilter``."""
    option = click.option(
        "--prefilter",
        type=click.IntRange(min=1),
        help="Of a long context read only so many windows, those that share most with the question (BM25).  [default: all]",
    )
    return option(function)


def columns_options(function: _Function) -> _Function:
    """Adds ``--columns`` and ``--no-answer-token``."""
    columns = click.option("--columns", help="The data's names for ours, e.g. context=review,answer=ans,span=indices.")
    token = click.option("--no-answer-token", help="An answer that means 'none in this context', e.g. ANSWERNOTFOUND.")
    return columns(token(function))


def reading_options(function: _Function) -> _Function:
    """Adds ``columns_options`` and ``--on-ambiguous``."""
    ambiguous = click.option(
        "--on-ambiguous",
        type=click.Choice(["error", "first", "skip"]),
        default="error",
        show_default=True,
        help="What to do with an answer that occurs several times in its context and has no answer_start.",
    )
    return columns_options(ambiguous(function))


def take_reading(options: dict[str, Any]) -> Any:
    """Takes the options of ``reading_options`` out of ``options``."""
    from qadeploy.data.fields import Reading

    return Reading.of({name: options.pop(name, None) or default for name, default in _READING.items()})


def load_predictor(path: str, device: str, threads: int | None = None, trust_remote_code: bool = False) -> Any:
    """An answerer for a bundle, or for a run or checkpoint through PyTorch."""
    from qadeploy.inference.bundle import MANIFEST

    if (Path(path) / MANIFEST).exists():
        from qadeploy import Answerer

        return Answerer.load(path, device=device, threads=threads)
    from qadeploy.training.runs import find_run

    if not Path(path).is_dir():
        raise InputError(f"{path}: no such folder: give a bundle, a run or a checkpoint folder")
    run = find_run(path)
    from qadeploy.training.checkpoint import Hub, load_checkpoint, torch_answerer

    return torch_answerer(load_checkpoint(run.checkpoint, Hub(trust_remote_code=trust_remote_code)), device)


def read_examples(source: str, split: str, reading: Any, annotated: bool = True) -> tuple[Any, ...]:
    """Examples of a source; ``auto`` takes the validation split where the data has one."""
    from qadeploy.data.readers import read

    data = read(source, reading, annotated=annotated)
    for count, what in (
        (data.skipped, "ambiguous rows skipped"),
        (data.first_taken, "answers taken at their first place"),
    ):
        if count:
            note(f"{source}: {count} {what}")
    if split == "all":
        return data.examples
    part = data.part("validation" if split == "auto" else split)
    if split == "auto":
        if part and len(part) < len(data.examples):
            note(
                f"{source}: scoring the {len(part)} questions of its validation split (--split all for the others too)"
            )
        return part or data.examples
    if not part:
        raise InputError(f"{source}: no row has the split {split!r}")
    return part
