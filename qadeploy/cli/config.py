"""Option values from elsewhere than their flag: a file (``--config run.yaml``), or a second flag that means the same.

A value on the command line wins over the file, the file over the defaults. Keys of the file are option names, with
dashes or underscores and without the leading dashes, or a name of run_qa.py where the option has one. The file becomes
click's ``default_map``, so that every value is checked as a flag's is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from qadeploy.errors import InputError, MissingExtraError

# What people bring along from run_qa.py (transformers 4.57, examples/pytorch/question-answering) and need not bring.
_NOT_NEEDED = {
    "train": {
        "do-train": "train always trains",
        "do-eval": "every epoch, and held-out data where there is some, is always evaluated",
        "do-predict": "export the run, then use qadeploy answer",
        "test-file": "export the run, then use qadeploy answer",
        "max-predict-samples": "export the run, then use qadeploy answer",
        "version-2-with-negative": "questions without an answer are found in the data",
        "overwrite-cache": "what is kept is found by its content",
        "overwrite-output-dir": "a finished run folder is replaced once the new run is complete",
        "pad-to-max-length": "a batch is padded to its longest window",
        "per-device-eval-batch-size": "it is twice --batch-size",
        "eval-strategy": "every epoch is evaluated",
        "evaluation-strategy": "every epoch is evaluated",
        "save-strategy": "every epoch is saved",
        "save-total-limit": "only the best epoch is kept",
        "logging-steps": "every epoch is logged",
        "logging-strategy": "every epoch is logged",
        "load-best-model-at-end": "the best epoch is always kept",
        "metric-for-best-model": "it is the F1 of the dev part",
        "use-cpu": "give --device cpu",
        "tf32": "a GPU that has TF32 uses it",
        "optim": "it is PyTorch's fused AdamW",
        "group-by-length": "batches hold windows of like length",
        "report-to": "the figures are in the run folder",
        "cache-dir": "set the environment variable HF_HOME",
        "dataset-config-name": "only a data set's default configuration is read",
    }
}


def read_config(path: Path, command: click.Command, context: click.Context) -> dict[str, Any]:
    """The file's values by parameter name of ``command``, for ``Context.default_map``. A null is left out.

    A name in .json is read as JSON, any other as YAML. Raises InputError naming the file and every key that is
    unknown, twice there, of the wrong type or out of range; MissingExtraError where YAML cannot be read.
    """
    values = _read(path)
    known = _names(command)
    found: dict[str, Any] = {}
    given: dict[str, str] = {}
    problems = []
    for key, value in values.items():
        name = _dashed(str(key))
        param = known.get(name)
        if param is None or not param.name:
            problems.append(f"{path}: key {key}: {command.name} has no such option{unknown_hint(command, name)}")
        elif param.name in given:
            problems.append(f"{path}: key {key}: is the same option as {given[param.name]}: give one of them")
        else:
            given[param.name] = str(key)
            if value is None:
                continue
            try:
                several = value if param.multiple and isinstance(value, list) else [value]
                checked = [_checked(one, param, context) for one in several]
                found[param.name] = checked if param.multiple else checked[0]
            except click.BadParameter as error:
                problems.append(f"{path}: key {key}: {error.message}")
    if problems:
        raise InputError("\n".join(problems))
    return found


def unknown_hint(command: click.Command, name: str) -> str:
    """What to say of an option that ``command`` does not have: why it is not needed, or the nearest name, or nothing.

    The nearest is written like ``name``: as a flag where that is one, else as a key.
    """
    flag, name = name.startswith("--"), _dashed(name)
    reason = _NOT_NEEDED.get(command.name or "", {}).get(name)
    if reason:
        return f"; leave it out: {reason}"
    nearest = get_close_matches(name, _names(command), 1)
    if not nearest:
        return ""
    return f"; did you mean {'--' + nearest[0] if flag else nearest[0].replace('-', '_')}?"


def fold(context: click.Context, target: str, others: Mapping[str, Any]) -> Any:
    """The value of the option ``target``, which other options can set too.

    ``others`` maps their parameter names to the value each stands for, None where it is not given. What the command
    line says wins over a config file. Raises InputError where one of the two says different things.
    """
    meant = {target: context.params[target], **others}
    for source in (ParameterSource.COMMANDLINE, ParameterSource.DEFAULT_MAP):
        given = {
            name: value
            for name, value in meant.items()
            if value is not None and context.get_parameter_source(name) is source
        }
        if len(set(given.values())) > 1:
            flags = " and ".join("--" + name.replace("_", "-") for name in given)
            raise InputError(f"{flags} contradict each other: give one of them")
        if given:
            context.set_parameter_source(target, source)
            return next(iter(given.values()))
    return meant[target]


def _dashed(name: str) -> str:
    return name.lstrip("-").replace("_", "-")


def _names(command: click.Command) -> dict[str, click.Parameter]:
    """Every name that a key may have: all names of an option but its short and its negated one, the name of an argument."""
    names: dict[str, click.Parameter] = {}
    for param in command.params:
        opts = param.opts if isinstance(param, click.Option) else [f"--{param.name}"]
        names.update({_dashed(opt): param for opt in opts if opt.startswith("--") and opt != "--config"})
    return names


def _checked(value: Any, param: click.Parameter, context: click.Context) -> Any:
    """The value as the option's type makes it; unlike a flag's text it must be of that type already."""
    if isinstance(param, click.Option) and param.is_flag:
        wanted, fits = "true or false", isinstance(value, bool)
    elif isinstance(param.type, click.types.IntParamType):
        wanted, fits = "a whole number", isinstance(value, int) and not isinstance(value, bool)
    elif isinstance(param.type, click.types.FloatParamType):
        wanted, fits = "a number", isinstance(value, int | float) and not isinstance(value, bool)
    else:
        wanted, fits = "text", isinstance(value, str)
    if not fits:  # the value is not shown: it may be a token
        quotes = ": put it in quotes" if wanted == "text" and not isinstance(value, list | dict) else ""
        raise click.BadParameter(f"is {_kind(value)}, {wanted} is needed{quotes}")
    return param.type.convert(value, param, context)


def _kind(value: Any) -> str:
    kinds = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "text",
        list: "a list",
        dict: "a group",
    }
    return kinds.get(type(value), f"a {type(value).__name__}")


def _read(path: Path) -> dict[Any, Any]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file: --config takes a YAML or JSON file") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start})") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    values = _read_json(path, text) if path.suffix.lower() == ".json" else _read_yaml(path, text)
    if values is None:  # an empty YAML file
        return {}
    if not isinstance(values, dict):
        raise InputError(f"{path}: holds {_kind(values)}, lines of 'option: value' are needed")
    return values


def _unique(path: Path, pairs: Sequence[tuple[Any, Any]]) -> dict[Any, Any]:
    values: dict[Any, Any] = {}
    for key, value in pairs:
        if key in values:
            raise InputError(f"{path}: key {key}: stands there twice: give it once")
        values[key] = value
    return values


def _read_json(path: Path, text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=lambda pairs: _unique(path, pairs))
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON: {error}") from error


def _read_yaml(path: Path, text: str) -> Any:
    try:
        import yaml
    except ImportError as error:
        raise MissingExtraError(f"reading {path} as YAML", "yaml", "train") from error

    class Loader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML has no types
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            pairs = [(self.construct_object(k, deep=True), v) for k, v in node.value]
            try:
                _unique(path, pairs)
            except TypeError:
                raise InputError(f"{path}: line {node.start_mark.line + 1}: a key is a list or a group") from None
            return dict(super().construct_mapping(node, deep))

    # YAML 1.1 takes 1e-4 for text, as its floats need a point; YAML 1.2 and everybody who writes a learning rate do not.
    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?(\.\d+|\d+(\.\d*)?)[eE][-+]?\d+$"), list("-+.0123456789")
    )
    try:
        return yaml.load(text, Loader)  # noqa: S506 - a SafeLoader
    except yaml.MarkedYAMLError as error:
        # Not str(error), which quotes the line: it may hold a token.
        line = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise InputError(f"{path}: not valid YAML{line}: {error.problem}") from error
    except (yaml.YAMLError, ValueError) as error:  # a control character; a date like 2024-13-45
        raise InputError(f"{path}: not valid YAML: {type(error).__name__}") from error
