"""The command line gives a clear message for every mistake that a new user makes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qadeploy.inference.bundle import MODEL
from tests.cli_for_tests import SEED, fails
from tests.conftest import triplets, write_jsonl

pytestmark = pytest.mark.usefixtures("elsewhere")


DATA_FAULTS: dict[str, tuple[Callable[[Path], Any], str, list[str]]] = {
    "empty file": (lambda p: p.write_text(""), "x.jsonl", ["the file is empty", "context, question and answer"]),
    "wrong JSON": (lambda p: p.write_text("[{]"), "x.json", ["line 1, column 3: not valid JSON"]),
    "half a line": (
        lambda p: p.write_text(json.dumps(SEED) + '\n{"context": "a"'),
        "x.jsonl",
        ["x.jsonl: row 2", "not valid JSON"],
    ),
    "unknown ending": (lambda p: p.write_text("hello"), "x.txt", ["unknown ending '.txt': use .json"]),
    "not parquet": (lambda p: p.write_text("hello"), "x.parquet", ["not a readable parquet file"]),
    "not UTF-8": (lambda p: p.write_bytes(b'{"context": "caf\xe9"}'), "x.jsonl", ["not UTF-8 text (byte 16)", "iconv"]),
    "missing column": (
        lambda p: write_jsonl(p, [SEED, {"passage": "a", "question": "b", "answer": "c"}]),
        "x.jsonl",
        ["row 2, field context: is missing; the fields found are passage, question, answer"],
    ),
    "numbers": (
        lambda p: write_jsonl(p, [{**SEED, "question": 7}]),
        "x.jsonl",
        ["row 1, field question: must be text, not a number"],
    ),
    "empty context": (lambda p: write_jsonl(p, [{**SEED, "context": " "}]), "x.jsonl", ["field context: is empty"]),
    "empty question": (lambda p: write_jsonl(p, [{**SEED, "question": ""}]), "x.jsonl", ["field question: is empty"]),
    "empty answer": (lambda p: write_jsonl(p, [{**SEED, "answer": ""}]), "x.jsonl", ["field answer: is empty"]),
    "foreign answer": (
        lambda p: write_jsonl(p, [SEED, {**SEED, "answer": "green"}]),
        "x.jsonl",
        ['row 2, field answer: "green" does not occur in the context', "exact copy of a part of the context"],
    ),
    "ambiguous answer": (
        lambda p: write_jsonl(p, [{**SEED, "context": "Ada saw Ada, and Ada smiled.", "answer": "Ada"}]),
        "x.jsonl",
        ['"Ada" occurs 3 times in the context', "--on-ambiguous first|skip"],
    ),
    "wrong offset": (
        lambda p: write_jsonl(p, [{**SEED, "answer_start": 10}]),
        "x.jsonl",
        ['field answer_start: 10 does not match: the context has " blu" there, the answer is "blue"'],
    ),
    "two bad rows": (
        lambda p: write_jsonl(p, [{**SEED, "answer": "green"}, {**SEED, "context": 1}]),
        "x.jsonl",
        ["row 1, field answer", "row 2, field context"],
    ),
}


@pytest.mark.parametrize("fault", DATA_FAULTS)
def test_data_faults_name_the_file_row_and_field(fault, tiny_checkpoint):
    write, name, messages = DATA_FAULTS[fault]
    write(Path(name))
    fails(2, [name, *messages], "train", "--data", name, "--base", tiny_checkpoint, "--out", "run")


@pytest.mark.parametrize(
    ("command", "option"),
    [
        ("train", "--data"),
        ("train", "--eval-data"),
        ("train", "--dev-data"),
        ("evaluate", "--data"),
        ("answer", "--input"),
        ("bench", "--data"),
    ],
)
def test_a_missing_data_file_is_named(command, option, bundle):
    write_jsonl(Path("good.jsonl"), triplets(8))
    rest = {
        "train": ["--data", "good.jsonl"] if option != "--data" else [],
        "answer": [bundle, "--output", "out.jsonl"],
    }.get(command, [bundle])
    fails(2, ["nothing.jsonl: no such file"], command, *rest, option, "nothing.jsonl")


@pytest.mark.parametrize(
    ("said", "arguments"),
    [
        ("--data is given twice: give it once", ["evaluate", "run", "--data", "a.jsonl", "--data", "b.jsonl"]),
        ("--eval-data is given twice", ["train", "--eval-data", "a.jsonl", "--validation_file", "b.jsonl"]),
        ("--question is given twice", ["ask", "--question", "Who?", "--question", "When?", "--context", "Ada."]),
        ("--passages: only with --corpus", ["ask", "--question", "Who?", "--context", "Ada.", "--passages", "3"]),
        ("--n-best-size: only with --predictions-dir", ["evaluate", "run", "--data", "a.jsonl", "--n-best-size", "3"]),
        ("--config is given twice", ["train", "--config", "a.yaml", "--config", "b.yaml"]),
        ("--reduce-range says how to make the int8 bundle: give --quantize too", ["export", "run", "--reduce-range"]),
        (
            "--recipe says how to make the int8 bundle: give --quantize too",
            ["export", "run", "--recipe", "int8-protected"],
        ),
    ],
)
def test_an_option_that_would_be_ignored_is_refused(said, arguments):
    fails(2, [said], *arguments)


@pytest.mark.parametrize(
    ("said", "arguments"),
    [
        ("extra argument (faq.jsonl); did you mean --data faq.jsonl?", ["train", "faq.jsonl"]),
        ("extra argument (faq.jsonl); did you mean --data faq.jsonl?", ["evaluate", "run", "faq.jsonl"]),
        ("extra argument (faq.jsonl); did you mean --input faq.jsonl?", ["answer", "bundle", "faq.jsonl"]),
        ("did you mean --question 'Who sails?'?", ["ask", "bundle", "Who sails?", "--context", "Ada sails."]),
        ("the file is given without a flag, as in qadeploy check FILE", ["check", "--data", "faq.jsonl"]),
        ("No such option: --bundle; give it without a flag: qadeploy serve BUNDLE", ["serve", "--bundle", "bundle"]),
        ("No such option: --file; give it without a flag: qadeploy check FILE", ["check", "--file", "faq.jsonl"]),
    ],
)
def test_a_missing_or_needless_flag_is_named(said, arguments):
    fails(2, [said], *arguments)


def test_an_unknown_base_says_what_it_may_be():
    write_jsonl(Path("good.jsonl"), triplets(8))
    message = fails(1, ["no/such-model: no such folder"], "train", "--data", "good.jsonl", "--base", "no/such-model")
    assert "offline? misspelt?" in message


def test_bare_commands_without_runs_or_bundles_name_the_step_before():
    fails(2, ["holds no finished run yet: run qadeploy train first"], "export")
    fails(2, ["holds no bundle yet: run qadeploy export first"], "bench")


@pytest.mark.parametrize("command", ["export", "evaluate", "ask"])
def test_a_run_without_its_checkpoint_is_named(command, tiny):
    shutil.copytree(tiny.run, "run")
    shutil.rmtree("run/checkpoint")
    rest = {"evaluate": ["--data", tiny.data], "ask": ["--question", "Who?", "--context", "Ada."]}.get(command, [])
    fails(1, ["run: the run has no checkpoint", "train again"], command, "run", *rest)


@pytest.mark.parametrize("name", [MODEL, "tokenizer.json", "README.md"])
def test_one_changed_byte_in_a_bundle_is_found(name, bundle):
    shutil.copytree(bundle, "copy")
    path = Path("copy") / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    messages = [f"copy/{name}: does not match the manifest", "export it again"]
    fails(1, messages, "ask", "copy", "--question", "Who?", "--context", "Ada.")


@pytest.mark.parametrize("command", ["ask", "answer", "evaluate", "bench"])
def test_a_bundle_that_is_not_there_is_named(command, tiny):
    rest = {
        "ask": ["--question", "Who?", "--context", "Ada."],
        "answer": ["--input", tiny.data, "--output", "out.jsonl"],
        "evaluate": ["--data", tiny.data],
        "bench": [],
    }[command]
    fails(2, ["bundles/typo: no such"], command, "bundles/typo", *rest)


@pytest.mark.parametrize(
    ("option", "bad", "message"),
    [
        ("--budget", "soon", "budget is 'soon': give a time such as 90s, 5m or 1h"),
        ("--budget", "-1s", "budget is '-1s'"),
        ("--recipe", "int4", "recipe is 'int4': choose one of int8, "),
    ],
)
def test_bad_options_of_the_search_are_named_before_anything_is_exported(option, bad, message, tiny):
    fails(2, [message], "export", tiny.run, "--quantize", option, bad)
    assert not Path("bundles").exists()


def test_what_is_there_is_not_overwritten(tiny, tiny_checkpoint, bundle):
    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("keep me")
    clash = ["mine", "exists"]
    fails(2, clash, "train", "--data", tiny.data, "--base", tiny_checkpoint, "--out", "mine")
    fails(2, clash, "export", tiny.run, "--out", "mine")
    fails(2, clash, "answer", bundle, "--input", tiny.data, "--output", "mine")
    missing = "--output nowhere/out.jsonl: its folder does not exist"
    fails(2, [missing], "answer", bundle, "--input", tiny.data, "--output", "nowhere/out.jsonl")
    missing = "--predictions nowhere/p.json: its folder does not exist"
    fails(2, [missing], "evaluate", bundle, "--data", tiny.data, "--predictions", "nowhere/p.json")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["ask", "--question", "", "--context", "Ada."], "question is empty"),
        (["ask", "--question", "Who?", "--context", " "], "context is empty"),
        (["ask", "--question", "Who?", "--context", "@gone.txt"], "--context @gone.txt: no such file"),
        (["ask", "--question", "Who?", "--context", "Ada.", "--top-k", 0], "0 is not in the range x>=1"),
        (["ask", "--question", "Who?", "--context", "Ada.", "--max-seq-len", 999], "limit of 160 tokens"),
        (["ask", "--question", "Who?", "--context", "Ada.", "--device", "tpu"], "choose auto, cpu, cuda or cuda:N"),
        (["bench", "--against", "pipeline,keras"], "unknown peer keras: choose from pipeline, torch"),
        (["bench", "--questions", 0], "'--questions': 0 is not in the range"),
    ],
)
def test_bad_options_are_named(args, message, tiny, bundle):
    fails(2, [message], args[0], bundle, *args[1:])


@pytest.mark.parametrize(
    ("option", "bad"),
    [
        ("--learning-rate", -1),
        ("--learning-rate", "nan"),
        ("--weight-decay", -1),
        ("--warmup-ratio", 2),
        ("--attention-dropout", 1.5),
        ("--dev-fraction", 0),
        ("--epochs", 0),
        ("--batch-size", 0),
        ("--batch-tokens", 0),
        ("--batch-tokens", 8),
        ("--device", "tpu"),
        ("--seed", -1),
        ("--max-seq-len", 4000),
    ],
)
def test_training_options_out_of_range_are_named(option, bad, tiny_checkpoint):
    write_jsonl(Path("good.jsonl"), triplets(8))
    name = option.strip("-")
    options = ("--data", "good.jsonl", "--base", tiny_checkpoint, "--precision", "fp32")
    message = fails(2, [], "train", *options, option, bad)
    assert name in message or name.replace("-", "_") in message
