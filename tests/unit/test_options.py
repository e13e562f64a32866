"""The commands, the config file, HTTP, the library and the documentation describe options as declared."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, fields
from types import NoneType
from typing import get_args, get_type_hints

import click
import pytest

from qadeploy.batch.ray_engine import Cluster
from qadeploy.batch.run import BatchRequest
from qadeploy.bench.limits import Limits
from qadeploy.bench.options import BenchOptions
from qadeploy.cli import main
from qadeploy.cli.answering import EvaluateOptions
from qadeploy.cli.config import read_config
from qadeploy.cli.labelling import LabelOptions
from qadeploy.core.settings import AnswerOptions, Options
from qadeploy.data.check_file import CheckOptions
from qadeploy.errors import InputError
from qadeploy.export.options import ExportOptions
from qadeploy.inference.tune_bundle import TuneOptions
from qadeploy.options import Option, check, declared, option, table
from qadeploy.serve.settings import Settings
from qadeploy.training.options import TrainOptions

COMMANDS = {
    "ask": (Options, EvaluateOptions),
    "bench": (BenchOptions, Limits),
    "check": (CheckOptions,),
    "answer": (BatchRequest, Cluster, TrainOptions),
    "evaluate": (EvaluateOptions, TrainOptions),
    "export": (ExportOptions,),
    "label": (LabelOptions,),
    "serve": (Settings,),
    "train": (TrainOptions,),
    "tune": (TuneOptions,),
}
PAIRS = [
    (name, param, declared(cls)[param.name])
    for name, classes in COMMANDS.items()
    for param in main.commands[name].params
    if isinstance(param, click.Option)
    for cls in classes[:1] + tuple(c for c in classes[1:] if param.name not in declared(classes[0]))
    if param.name in declared(cls) and (name, param.name) != ("evaluate", "data")  # its own: without a default
]


def shown(pair: tuple[str, click.Option, Option]) -> str:
    return f"{pair[0]} {pair[2].flag}"


@pytest.mark.parametrize(("command", "param", "each"), PAIRS, ids=map(shown, PAIRS))
def test_a_flag_is_as_declared(command, param, each):
    assert param.opts[0] == each.flag
    assert {*each.also} <= {*param.opts}
    assert param.help.startswith(each.help)
    if each.kind is not bool or each.off:
        assert param.help.endswith(f"[default: {each.default_text}]")
    if each.choices:
        assert tuple(param.type.choices) == each.choices
    elif each.least is not None or each.most is not None:
        assert (param.type.min, param.type.max) == (each.least, each.most)
    value = param.get_default(click.Context(main.commands[command]))
    if (command, each.name) != ("train", "out"):  # named after the data
        default = (each.default,) if each.many and isinstance(each.default, str) else each.default
        assert (value or ()) == default if each.many else value == default


def test_every_declared_option_is_a_flag_of_its_command():
    for name, classes in COMMANDS.items():
        cls = classes[0]
        assert set(declared(cls)) <= {param.name for param in main.commands[name].params}


@pytest.mark.parametrize(("command", "param", "each"), PAIRS, ids=map(shown, PAIRS))
def test_a_config_file_takes_the_name_and_refuses_what_is_out_of_range(command, param, each, tmp_path):
    target, path = main.commands[command], tmp_path / "run.json"
    good = {int: each.least or 3, float: each.least or 0.5, bool: True, str: (each.choices or ("text",))[0]}[each.kind]
    key = each.flag.removeprefix("--").replace("-", "_")
    path.write_text(json.dumps({key: [good] if each.many else good}))
    assert read_config(path, target, click.Context(target)) == {param.name: [good] if each.many else good}
    if each.least is not None or each.choices:
        path.write_text(json.dumps({key: "none of them" if each.choices else each.least - 1}))
        with pytest.raises(InputError, match=f"key {key}"):
            read_config(path, target, click.Context(target))


def test_the_library_takes_the_same_answering_options():
    typed, stated = get_type_hints(AnswerOptions), get_type_hints(Options)
    assert typed == {name: stated[name] for name in declared(Options)}
    assert AnswerOptions.__optional_keys__ == set(typed)


def test_http_takes_the_same_answering_options():
    from qadeploy.serve.schemas import AskOne

    schema = AskOne.model_json_schema()["properties"]
    assert set(schema) - {"question", "context", "contexts", "trace"} == set(declared(Options))
    for name, each in declared(Options).items():
        found = schema[name]
        kind = found.get("anyOf", [found])[0]
        assert found["default"] == each.default
        assert found["description"].startswith(each.help)
        assert kind["type"] == {bool: "boolean", int: "integer", float: "number", str: "string"}[each.kind]
        assert (kind.get("minimum"), kind.get("maximum")) == (each.least, each.most)
        words = kind.get("enum") or [one["const"] for one in found.get("anyOf", ()) if "const" in one]
        assert tuple(words) == each.choices
        assert (NoneType in get_args(get_type_hints(Options)[name])) == ("anyOf" in found)


@dataclass(frozen=True)
class Small:
    rate: float = option(0.5, "A rate.", least=0, most=1)
    names: tuple[str, ...] = option((), "A name; may be given several times.")
    kept: bool | None = option(None, "Whether it is kept.", off="--dropped", shown="by size")
    plain: int = 3


def test_a_declaration_makes_flags_checks_and_tables():
    assert [(each.flag, each.env, each.default_text) for each in declared(Small).values()] == [
        ("--rate", "QADEPLOY_RATE", "0.5"),
        ("--name", "QADEPLOY_NAME", "none"),
        ("--kept", "QADEPLOY_KEPT", "by size"),
    ]
    assert "plain" in {each.name for each in fields(Small)}
    assert table(Small).splitlines()[2] == "| `--rate` | 0.5 | A rate. |"
    check(Small())
    for bad, words in (
        (Small(rate=1.5), "rate must be a number from 0 to 1, not 1.5"),
        (Small(rate=float("nan")), "rate must be a number from 0 to 1, not nan"),
        (Small(rate=True), "rate must be a number from 0 to 1, not True"),
        (Small(rate=None), "rate is missing"),  # type: ignore[arg-type]
        (Small(names=("a", 3)), "names must be text, not 3"),  # type: ignore[arg-type]
        (Small(kept="yes"), "kept must be true or false, not 'yes'"),  # type: ignore[arg-type]
    ):
        with pytest.raises(InputError, match=re.escape(words)):
            check(bad)
