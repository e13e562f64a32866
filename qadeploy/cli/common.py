"""What the commands share: the group, the command class, options, printing, and loading models and data.

Results go to stdout, remarks and progress to stderr; with ``--json``, stdout is one JSON object.
Exit codes: 0 success, 1 the work failed, 2 the input or the options are invalid.
"""

from __future__ import annotations

import errno
import io
import json
import os
import shlex
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import click

from qadeploy import __version__
from qadeploy.cli.config import read_config, unknown_hint
from qadeploy.data.fields import DataOptions
from qadeploy.errors import DataWarning, DeviceWarning, InputError, MachineWarning, MissingExtraError, QadeployError
from qadeploy.inference.load_timeout import end_past_loading
from qadeploy.options import declared

_EXTRAS = {
    **dict.fromkeys(("torch", "transformers", "onnx", "onnx_ir", "datasets", "accelerate", "jinja2"), "train"),
    **dict.fromkeys(("markupsafe", "matplotlib"), "train"),
    **dict.fromkeys(("fastapi", "starlette", "pydantic", "uvicorn", "prometheus_client"), "serve"),
}
# Options that a user may expect to be repeatable, as train --data is.
_ONLY_ONCE = {
    "--columns",
    "--config",
    "--corpus",
    "--data",
    "--dev-data",
    "--eval-data",
    "--label",
    "--question",
    "--unlabelled",
}
# Options whose flag a user may leave out; the first that a command has is suggested.
_OFTEN_LEFT_OUT = ("--question", "--data", "--input")
# What lowers a command's need of memory.
_SAVES_MEMORY = {
    "answer": "--shard-rows or --prefilter",
    "ask": "--prefilter or --max-seq-len",
    "evaluate": "--prefilter",
    "train": "--batch-size, --batch-tokens or --max-seq-len",
}
_Function = TypeVar("_Function", bound=Callable[..., Any])


class _Command(click.Command):
    """A command with ``--config``, ``--json`` and ``--debug`` that reports each error as one clear message."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params += [
            click.Option(
                ["--config"],
                is_eager=True,
                expose_value=False,
                callback=_configure,
                help="YAML or JSON file of options by name; paths are relative to the current directory, and flags win over the file.",
            ),
            click.Option(
                ["--json", "as_json"], is_flag=True, help="Print one JSON object on stdout, remarks on stderr."
            ),
            click.Option(["--debug"], is_flag=True, help="Show the traceback of an error."),
        ]

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            self._check_repeated(ctx, args)
            return super().parse_args(ctx, list(args))  # click's parser empties the list
        except click.NoSuchOption as error:
            hint = unknown_hint(self, error.option_name)
            if not hint:
                raise
            message = f"No such option: {error.option_name}{hint}"
            raise click.NoSuchOption(error.option_name, message, ctx=ctx) from error
        except click.UsageError as error:
            if isinstance(error, click.MissingParameter) or type(error) is click.UsageError:
                self._check_extra(ctx, args, error)
            raise

    def _check_extra(self, ctx: click.Context, args: list[str], error: click.UsageError) -> None:
        """Raises UsageError with the flag that was probably left out, if there are more arguments than the command takes."""
        rest = self.make_parser(ctx).parse_args(list(args))[1]
        flags = {flag for param in self.params for flag in param.opts}
        flag = next((flag for flag in _OFTEN_LEFT_OUT if flag in flags), None)
        if rest and flag:
            message = f"Got unexpected extra argument ({rest[0]}); did you mean {flag} {shlex.quote(rest[0])}?"
            raise click.UsageError(message, ctx) from error

    def _check_repeated(self, ctx: click.Context, args: list[str]) -> None:
        """Raises UsageError if an option is given twice, possibly to add a value: click would silently use the last."""
        order = self.make_parser(ctx).parse_args(list(args))[2]
        given = [each.opts[0] for each in order if not getattr(each, "multiple", False)]
        again = next((flag for flag in given if flag in _ONLY_ONCE and given.count(flag) > 1), None)
        if again is not None:
            raise click.UsageError(f"{again} is given twice: give it once", ctx)

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        try:
            return super().make_context(*args, **kwargs)
        except QadeployError as error:  # of a callback
            fail(str(error), error.exit_code)
        except click.UsageError as error:
            if os.environ.get("RANK", "0") != "0":  # of the processes that torchrun starts, only the first reports it
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
            if debug or package not in _EXTRAS:
                raise
            fail(str(MissingExtraError(f"qadeploy {ctx.info_name}", package, _EXTRAS[package])), 1)
        except OSError as error:
            if debug or error.errno == errno.EPIPE:  # the reader of stdout has exited, as head does: click ends quietly
                raise
            where = f"{error.filename}: " if error.filename else ""
            fail(f"{where}{error.strerror or error}", 1)
        except MemoryError:
            if debug:
                raise
            flags = _SAVES_MEMORY.get(self.name or "")
            remedy = f"lower {flags}" if flags else "end other programs, give less data, or use a larger machine"
            fail(f"the machine ran out of memory: {remedy}", 1)


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Prints each of our own warnings once, as a line on stderr, whatever Python's filters are; leaves others alone."""
    with warnings.catch_warnings():
        show = warnings.showwarning

        def say(message: Warning | str, category: type[Warning], *where: Any) -> None:
            if issubclass(category, DataWarning | DeviceWarning | MachineWarning):
                note(f"Warning: {message}")
            else:
                show(message, category, *where)

        warnings.showwarning = say  # type: ignore[assignment]
        for ours in (DataWarning, DeviceWarning, MachineWarning):
            warnings.simplefilter("once", ours)
        yield


def _configure(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
    if value is not None:
        ctx.default_map = read_config(Path(value), ctx.command, ctx)


def fail(message: str, code: int) -> NoReturn:
    """Prints the error on stderr and ends the process with the exit code."""
    click.echo(f"Error: {message}", err=True)
    sys.exit(code)


def command(group: click.Group, *, example: str) -> Callable[[Callable[..., Any]], click.Command]:
    """Adds a command to the group, with examples under its help, one per line."""

    def wrap(function: Callable[..., Any]) -> click.Command:
        epilog = "\b\nExamples:\n" + "\n".join(f"  {line}" for line in example.strip().splitlines())
        return group.command(cls=_Command, epilog=epilog)(function)

    return wrap


class _Group(click.Group):
    """A group whose process can exit even while a thread is still inside ONNX Runtime."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                # Not every encoding, such as cp1252 of Windows, has every character.
                stream.reconfigure(errors="backslashreplace")
        try:
            return super().main(*args, **kwargs)
        except SystemExit as end:
            end_past_loading(end.code if isinstance(end.code, int) else 0)
            raise


@click.group(
    cls=_Group,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "max_content_width": 120,
        "token_normalize_func": lambda name: name.replace("_", "-"),  # --max_seq_length as in run_qa.py
    },
)
@click.version_option(__version__, prog_name="qadeploy")
def main() -> None:
    """Extractive question answering, from (context, question, answer) triplets to a service.

    The usual order: check -> train -> export --quantize -> ask, answer, bench.
    """


def note(message: str) -> None:
    """Prints a remark on stderr."""
    click.echo(message, err=True)


def print_result(as_json: bool, value: dict[str, Any], text: Sequence[str]) -> None:
    """Prints the result on stdout: ``value`` as JSON, or the lines of ``text``."""
    if as_json:
        click.echo(json.dumps(value, ensure_ascii=(sys.stdout.encoding or "utf-8").lower() != "utf-8"))
    else:
        for line in text:
            click.echo(line)


def sayer(as_json: bool) -> Callable[[str], None]:
    """A function that prints one line of progress per call: on stdout, or on stderr with ``--json``."""
    return lambda message: click.echo(message, err=as_json)


def take_data_options(options: dict[str, Any]) -> DataOptions:
    """Removes the options of ``DataOptions`` from ``options``; options that a command lacks keep their defaults."""
    return DataOptions(**{name: options.pop(name) for name in declared(DataOptions) if name in options})


def bundle_argument(function: _Function) -> _Function:
    """Adds the argument ``BUNDLE``; without it, the newest under ``bundles/`` is used, or else the shipped bundle."""

    def fill(ctx: click.Context, param: click.Parameter, value: str | None) -> str:
        if value is not None:
            return value
        from qadeploy.inference.bundle import default_bundle

        found = str(default_bundle())
        note(f"using the bundle {found}")
        return found

    return click.argument("bundle", required=False, envvar="QADEPLOY_BUNDLE", callback=fill)(function)


def load_predictor(
    path: str,
    device: str,
    *,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    bundle_sha256: str | None = None,
    load_timeout: float | None = None,
) -> Any:
    """An answerer for a bundle, or for a run or checkpoint through PyTorch."""
    from qadeploy.inference.bundle import is_bundle

    if is_bundle(path):
        from qadeploy import Answerer

        return Answerer.load(path, device=device, sha256=bundle_sha256, load_timeout=load_timeout)
    if bundle_sha256 is not None:
        raise InputError(f"{path}: is not a bundle, which --bundle-sha256 requires")
    from qadeploy.training.runs import find_run

    if not Path(path).is_dir():
        raise InputError(f"{path}: no such folder: give a bundle, a run or a checkpoint folder")
    run = find_run(path)
    from qadeploy.training.checkpoint import Hub, load_checkpoint, torch_answerer

    hub = Hub(trust_remote_code=trust_remote_code, allow_pickle=allow_pickle)
    return torch_answerer(load_checkpoint(run.checkpoint, hub), device)
