"""Option values that do not come from their own flag, but from a file (``--config run.yaml``) or from a synonymous flag.

The command line wins over the file, and the file over the defaults. Keys of the file are option names without the leading
dashes, with dashes or underscores; names from run_qa.py work too. The file becomes click's ``default_map``, so every value is
checked as a flag is.
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

from qadeploy.cli.options import NumberOrWord
from qadeploy.data.wording import printable
from qadeploy.errors import InputError
from qadeploy.extras import import_extra

_MOST = 2**16  # bytes of a file; PyYAML takes seconds for more
_DEEPEST = 20  # levels of nested lists and groups; no option needs even one
_BITS = 512  # bits of a whole number: no option accepts more, and Python refuses to print thousands of digits

# Options that a command does not need: of run_qa.py (transformers 4.57, examples/pytorch/question-answering), and of others here.
_NOT_NEEDED = {
    "check": {"data": "the file is given without a flag, as in qadeploy check FILE"},
    "train": {
        "do-train": "train always trains",
        "do-eval": "every epoch is evaluated, and held-out data if there is any",
        "do-predict": "export the run, then use qadeploy answer",
        "test-file": "export the run, then use qadeploy answer",
        "max-predict-samples": "export the run, then use qadeploy answer",
        "version-2-with-negative": "questions without an answer are found in the data",
        "overwrite-cache": "the cache is keyed by content",
        "overwrite-output-dir": "a finished run folder is replaced once the new run is complete",
        "pad-to-max-length": "a batch is padded to its longest window",
        "per-device-eval-batch-size": "it is twice --batch-size",
        "eval-strategy": "every epoch is evaluated",
        "evaluation-strategy": "every epoch is evaluated",
        "save-strategy": "every epoch is saved",
        "save-total-limit": "only the best epoch, or the mean of the epochs, is kept",
        "logging-steps": "every epoch is logged",
        "logging-strategy": "every epoch is logged",
        "load-best-model-at-end": "the best epoch, or the mean of the epochs, is always kept",
        "metric-for-best-model": "it is the F1 on the dev set",
        "use-cpu": "give --device cpu",
        "tf32": "a GPU that has TF32 uses it",
        "optim": "it is PyTorch's fused AdamW",
        "group-by-length": "batches hold windows of similar length",
        "cache-dir": "set the environment variable HF_HOME",
    },
}


def read_config(path: Path, command: click.Command, context: click.Context) -> dict[str, Any]:
    """The file's values by parameter name of ``command``, for ``Context.default_map``. Nulls are left out.

    A file named *.json is read as JSON, any other as YAML, without aliases. Raises InputError, which names the file and every
    key that is unknown, given twice, of the wrong type or out of range, and MissingExtraError if PyYAML is not installed.
    """
    values = _read(path)
    known = _names(command)
    found: dict[str, Any] = {}
    given: dict[str, str] = {}
    problems = []
    for key, value in ((_shown(key), value) for key, value in values.items()):
        name = _dashed(key)
        param = known.get(name)
        if param is None or not param.name:
            problems.append(f"{path}: key {key}: {command.name} has no such option{unknown_hint(command, name)}")
        elif param.name in given:
            problems.append(f"{path}: key {key}: is the same option as {given[param.name]}: give one of them")
        else:
            given[param.name] = key
            if value is None:
                continue
            try:
                many = param.multiple or param.nargs == -1
                several = value if many and isinstance(value, list) else [value]
                checked = [_checked(one, param, context) for one in several]
                found[param.name] = checked if many else checked[0]
            except click.BadParameter as error:
                problems.append(f"{path}: key {key}: {error.message}")
    if problems:
        raise InputError("\n".join(problems))
    return found


def unknown_hint(command: click.Command, name: str) -> str:
    """The hint for an option that ``command`` lacks: why it is not needed, the nearest name, or nothing.

    The nearest name is written as ``name`` is: as a flag or as a key.
    """
    flag, name = name.startswith("--"), _dashed(name)
    reason = _NOT_NEEDED.get(command.name or "", {}).get(name)
    if reason:
        return f"; leave it out: {reason}"
    nearest = get_close_matches(name, _names(command), 1)
    if not nearest:
        return ""
    param = _names(command)[nearest[0]]
    if flag and isinstance(param, click.Argument):
        return f"; give it without a flag: qadeploy {command.name} {param.human_readable_name}"
    return f"; did you mean {'--' + nearest[0] if flag else nearest[0].replace('-', '_')}?"


def fold(context: click.Context, target: str, others: Mapping[str, Any]) -> Any:
    """The value of option ``target``, which other options can also set.

    ``others`` maps the parameter names of these options to the values that they imply, None if an option is not given. The
    command line wins over a config file. Raises InputError if either of the two contradicts itself.
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
    """Every name that a key may have: the long, positive names of the options and the names of the arguments."""
    names: dict[str, click.Parameter] = {}
    for param in command.params:
        opts = param.opts if isinstance(param, click.Option) else [f"--{param.name}"]
        names.update({_dashed(opt): param for opt in opts if opt.startswith("--") and opt != "--config"})
    return names


def _checked(value: Any, param: click.Parameter, context: click.Context) -> Any:
    """The value, converted by the option's type. Unlike a flag's text, it must have the right type already."""
    if isinstance(param, click.Option) and param.is_flag:
        wanted, fits = "true or false", isinstance(value, bool)
    elif isinstance(param.type, click.types.IntParamType):
        wanted, fits = "a whole number", isinstance(value, int) and not isinstance(value, bool)
    elif isinstance(param.type, click.types.FloatParamType):
        wanted, fits = "a number", isinstance(value, int | float) and not isinstance(value, bool)
    elif isinstance(param.type, NumberOrWord):
        wanted, fits = "a whole number or a word", isinstance(value, int | str) and not isinstance(value, bool)
    else:
        wanted, fits = "text", isinstance(value, str)
    if fits and isinstance(value, str) and any(c == "\0" or "\ud800" <= c <= "\udfff" for c in value):
        raise click.BadParameter("must be valid Unicode without NUL characters")
    if fits and isinstance(value, int) and value.bit_length() > _BITS:
        raise click.BadParameter(f"must be {wanted} of fewer digits")
    if not fits:  # the value is not shown: it may be a token
        quotes = ": put it in quotes" if wanted == "text" and not isinstance(value, list | dict | None) else ""
        raise click.BadParameter(f"must be {wanted}, not {_kind(value)}{quotes}")
    return param.type.convert(value, param, context)


def _shown(key: Any) -> str:
    """A key as printable text. Python refuses to print a number of thousands of digits."""
    if isinstance(key, int) and key.bit_length() > _BITS:
        return "a number too long"
    return printable(str(key))


def _kind(value: Any) -> str:
    kinds = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "text",
        list: "a list",
        dict: "a group",
        type(None): "empty",
    }
    return kinds.get(type(value), f"a {type(value).__name__}")


def _read(path: Path) -> dict[Any, Any]:
    try:
        if path.stat().st_size > _MOST:
            raise InputError(f"{path}: is larger than {_MOST // 2**10} KiB: --config takes a file of options")
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file: --config takes a YAML or JSON file") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start})") from error
    except (OSError, ValueError) as error:  # a name with a NUL character
        raise InputError(f"{path}: cannot be read: {getattr(error, 'strerror', error)}") from error
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
            raise InputError(f"{path}: key {_shown(key)}: is given twice: give it once")
        values[key] = value
    return values


def _read_json(path: Path, text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=lambda pairs: _unique(path, pairs))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON: {error}") from error


def _read_yaml(path: Path, text: str) -> Any:
    import_extra("yaml", f"reading {path} as YAML", "train")
    import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML has no types
        depth = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):  # ten lines of aliases can expand to billions of values
                line = self.peek_event().start_mark.line + 1
                raise InputError(f"{path}: line {line}: an alias (*name) is not read: write the value out")
            self.depth += 1
            if self.depth > _DEEPEST:
                raise InputError(f"{path}: is nested too deeply: lines of 'option: value' are needed")
            node = super().compose_node(parent, index)
            self.depth -= 1
            return node

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            pairs = [(self.construct_object(k, deep=True), v) for k, v in node.value]
            try:
                _unique(path, pairs)
            except TypeError:
                raise InputError(f"{path}: line {node.start_mark.line + 1}: a key is a list or a group") from None
            return dict(super().construct_mapping(node, deep))

    # In YAML 1.1, 1e-4 is text, because floats need a point. In YAML 1.2 it is a number, as users expect.
    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?(\.\d+|\d+(\.\d*)?)[eE][-+]?\d+$"), list("-+.0123456789")
    )
    try:
        return yaml.load(text, Loader)  # noqa: S506 - a SafeLoader
    except yaml.MarkedYAMLError as error:
        # Not str(error), which quotes the line: it may hold a token.
        line = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise InputError(f"{path}: not valid YAML{line}: {error.problem}") from error
    except InputError:
        raise
    except Exception as error:  # a date like 2024-13-45, !!bool maybe, too deep: PyYAML raises many unrelated types
        raise InputError(f"{path}: not valid YAML: {type(error).__name__}") from error
