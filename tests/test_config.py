"""Option values from a file, and options that mean the same."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from qadeploy.cli import main
from qadeploy.cli.config import fold, read_config
from qadeploy.errors import InputError
from tests.processes_for_tests import ended

DOCS = Path(__file__).resolve().parent.parent / "docs" / "run-qa.md"
TRAIN = main.commands["train"]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def values(text: str, name: str = "run.yaml", command: click.Command = TRAIN) -> dict[str, Any]:
    Path(name).write_text(text, encoding="utf-8")
    return read_config(Path(name), command, click.Context(command))


def problem(text: str | bytes, name: str = "run.yaml") -> str:
    Path(name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError) as caught:
        read_config(Path(name), TRAIN, click.Context(TRAIN))
    return str(caught.value)


def test_keys_are_option_names_in_any_of_their_spellings():
    text = """
        learning_rate: 1e-4       # a float in YAML 1.2 and to everybody, text in YAML 1.1
        num_train_epochs: 2       # run_qa.py's name
        max-seq-len: 64
        --doc-stride: 16
        warmup_ratio: 0
        model_name_or_path: bert-base-uncased
        bf16: true
        progress: false
        base_is_not_here: null
    """
    with pytest.raises(InputError, match=r"^run\.yaml: key base_is_not_here: train has no such option$"):
        values(text)
    assert values(text.replace("base_is_not_here", "eval_data")) == {
        "learning_rate": 1e-4,
        "epochs": 2,
        "max_seq_len": 64,
        "doc_stride": 16,
        "warmup_ratio": 0.0,
        "base": "bert-base-uncased",
        "bf16": True,
        "progress": False,
    }


@pytest.mark.parametrize(("text", "number"), [("1e-4", 1e-4), ("5E+1", 50.0), (".5e0", 0.5), ("2", 2.0), ("2.5", 2.5)])
def test_numbers_as_people_write_them(text, number):
    assert values(f"learning_rate: {text}") == {"learning_rate": number}


def test_json_and_arguments_and_nothing():
    assert values('{"epochs": 2, "base": null}', "run.json") == {"epochs": 2}
    assert values("model: runs/faq\ndata: held.jsonl", command=main.commands["evaluate"]) == {
        "model": "runs/faq",
        "data": "held.jsonl",
    }
    assert values("") == values("# nothing yet\n") == {}
    bench = main.commands["bench"]
    for given, bundles in (("my bundle", ["my bundle"]), ("[a, my bundle]", ["a", "my bundle"])):
        assert values(f"bundles: {given}", command=bench) == {"bundles": bundles}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("epoch: 2", "key epoch: train has no such option; did you mean epochs?"),
        ("max_train_sample: 2", "key max_train_sample: train has no such option; did you mean max_train_samples?"),
        ("do_train: true", "key do_train: train has no such option; leave it out: train always trains"),
        ("config: other.yaml", "key config: train has no such option"),
        ("no_progress: true", "key no_progress: train has no such option; did you mean progress?"),
        ("epochs: three", "key epochs: must be a whole number, not text"),
        ("epochs: 2.5", "key epochs: must be a whole number, not a number"),
        ("epochs: true", "key epochs: must be a whole number, not true or false"),
        ("epochs: 0", "key epochs: 0 is not in the range x>=1."),
        ("learning_rate: [1, 2]", "key learning_rate: must be a number, not a list"),
        ("data: {a: b}", "key data: must be text, not a group"),
        ("data: [faq.jsonl, null]", "key data: must be text, not empty"),
        ("model_revision: 20240101", "key model_revision: must be text, not a whole number: put it in quotes"),
        ("model_revision: 2024-01-01", "key model_revision: must be text, not a date: put it in quotes"),
        ("precision: fp8", "key precision: 'fp8' is not one of 'auto', 'fp32', 'bf16', 'fp16'."),
        ("gradient_checkpointing: 1", "key gradient_checkpointing: must be true or false, not a whole number"),
        ("epochs: 1\nepochs: 2", "key epochs: is given twice: give it once"),
        ("epochs: 1\nnum_train_epochs: 2", "key num_train_epochs: is the same option as epochs: give one of them"),
        ("epochs: 1\n  seed: 2", "not valid YAML in line 2: mapping values are not allowed here"),
        ("- epochs", "holds a list, lines of 'option: value' are needed"),
        ("epochs", "holds text, lines of 'option: value' are needed"),
        ("? [a, b]\n: 1", "line 1: a key is a list or a group"),
        (
            "a: !!python/object/apply:os.system [ls]",
            "not valid YAML in line 1: could not determine a constructor for the tag",
        ),
        ("seed: 2024-13-45", "not valid YAML: ValueError"),
        ("seed: \x07", "not valid YAML: ReaderError"),
        ("seed: !!bool maybe", "not valid YAML: KeyError"),
        ("seed: !!timestamp never", "not valid YAML: AttributeError"),
        ("[" * 3000, "is nested too deeply: lines of 'option: value' are needed"),
        ("- " * 3000, "is nested too deeply: lines of 'option: value' are needed"),
        ("seed: &a 1\nepochs: *a", "line 2: an alias (*name) is not read: write the value out"),
        ("a: &a [x]\n<<: *a", "line 2: an alias (*name) is not read"),
        ("seed: 0x" + "f" * 5000, "key seed: must be a whole number of fewer digits"),
        ("? 0x" + "f" * 5000 + "\n: 1", "key a number too long: train has no such option"),
        ("learning_rate: 0x" + "f" * 5000, "key learning_rate: must be a number of fewer digits"),
        ('out: "a\\0b"', "key out: must be valid Unicode without NUL characters"),
        ("#" * (2**16 + 1), "is larger than 64 KiB: --config takes a file of options"),
    ],
)
def test_what_cannot_be_used_is_named_by_file_and_key(line, said):
    assert problem(line).startswith(f"run.yaml: {said}")


def test_every_key_at_fault_is_named_at_once():
    assert problem("epoch: 1\nseed: x\npatience: 0").splitlines() == [
        "run.yaml: key epoch: train has no such option; did you mean epochs?",
        "run.yaml: key seed: must be a whole number, not text",
        "run.yaml: key patience: 0 is not in the range x>=1.",
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"epochs": 1, "epochs": 2}', "run.json: key epochs: is given twice"),
        ('{"epochs": 1', "run.json: not valid JSON: "),
        ("[1]", "run.json: holds a list"),
        ("[" * 20000, "run.json: not valid JSON: "),
        ('{"seed": ' + "1" * 401 + "}", "run.json: key seed: must be a whole number of fewer digits"),
        ('{"out": "\\ud800"}', "run.json: key out: must be valid Unicode without NUL characters"),
        ('{"\\ud800": 1}', "run.json: key \\ud800: train has no such option"),
        (b'{"data": "\xff"}', "run.json: not UTF-8 text (byte 10)"),
    ],
)
def test_json_that_cannot_be_used(text, said):
    assert problem(text, "run.json").startswith(said)


def test_a_file_that_is_not_there_or_no_file():
    for name, said in (("none.yaml", "no such file"), (".", "cannot be read: Is a directory")):
        with pytest.raises(InputError, match=re.escape(f"{name}: {said}")):
            read_config(Path(name), TRAIN, click.Context(TRAIN))


def test_aliases_that_multiply_are_refused_at_once():
    """Twenty lines that stand for 9 ** 20 values (YAML's billion laughs, by merge keys)."""
    lines = ["a0: &a0 {seed: 1}"]
    lines += [f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}" for n in range(1, 20)]
    assert problem("\n".join(lines)) == "run.yaml: line 2: an alias (*name) is not read: write the value out"


SECRET = "hf_veryveryverysecret"


@pytest.mark.parametrize("text", ["token: [SECRET]", "token: SECRET\n seed: 1", "token: SECRET: x", 'token: "SECRET'])
def test_no_error_quotes_a_token(text):
    assert SECRET not in problem(text.replace("SECRET", SECRET))


# ---------------------------------------------------------------- on the command line


def run(*args: str) -> Result:
    return CliRunner().invoke(main, args)


@pytest.fixture
def echo(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What ``train`` was called with, instead of training."""
    import qadeploy.training.search  # noqa: F401 - the command imports it and folds, which must keep the real function
    from qadeploy.training import train as module

    seen: dict[str, Any] = {}

    def keep(options: Any, *args: Any, **kwargs: Any) -> Any:
        seen.update({name: getattr(options, name) for name in options.__slots__})
        return module.RunResult(Path("nowhere"), {})

    monkeypatch.setattr(module, "train", keep)
    return seen


def test_flags_win_over_the_file_and_the_file_over_defaults(echo):
    Path("run.yaml").write_text("data: faq.jsonl\nepochs: 7\nseed: 3\nprecision: fp32\ntrust_remote_code: true\n")
    assert run("train", "--config", "run.yaml", "--seed", "4").exit_code == 0
    expected = {"data": "faq.jsonl", "out": "runs/faq", "epochs": 7, "seed": 4, "patience": 2, "precision": "fp32"}
    assert {name: echo[name] for name in expected} == expected
    assert echo["trust_remote_code"] is True
    assert run("train", "--seed", "5", "--config=run.yaml", "--num_train_epochs", "2").exit_code == 0
    assert (echo["seed"], echo["epochs"]) == (5, 2)
    Path("both.yaml").write_text("data: [faq.jsonl, more.csv]\n")
    assert run("train", "--config", "both.yaml").exit_code == 0
    assert (echo["data"], echo["out"]) == (("faq.jsonl", "more.csv"), "runs/faq")
    Path("none.yaml").write_text("data: []\n")
    assert "no data is named" in run("train", "--config", "none.yaml").output
    assert run("train", "--config", "run.yaml", "--data", "a.json", "--train-file", "b.json").exit_code == 0
    assert (echo["data"], echo["out"]) == (("a.json", "b.json"), "runs/a")
    # Another spelling of what the file says wins too, and does not contradict it.
    assert run("train", "--config", "run.yaml", "--bf16", "--dataset-name", "squad").exit_code == 0
    assert (echo["precision"], echo["data"], echo["out"]) == ("bf16", "hub:squad", "runs/squad")


@pytest.mark.parametrize(
    ("args", "precision"),
    [
        ([], "auto"),
        (["--bf16"], "bf16"),
        (["--fp16"], "fp16"),
        (["--precision", "fp16"], "fp16"),
        (["--precision", "bf16", "--bf16"], "bf16"),
    ],
)
def test_precision_has_two_spellings(args, precision, echo):
    assert run("train", *args).exit_code == 0
    assert echo["precision"] == precision


@pytest.mark.parametrize(
    ("args", "text", "names"),
    [
        (["--fp16", "--bf16"], "", "--bf16 and --fp16"),
        (["--precision", "fp32", "--fp16"], "", "--precision and --fp16"),
        (["--data", "a.json", "--dataset-name", "squad"], "", "--data and --dataset-name"),
        ([], "fp16: true\nbf16: true", "--bf16 and --fp16"),
    ],
)
def test_contradictions_are_refused(args, text, names, echo):
    Path("run.yaml").write_text(text)
    result = run("train", "--config", "run.yaml", *args)
    assert result.exit_code == 2
    assert f"Error: {names} contradict each other" in result.stderr
    assert not echo


def test_a_folded_option_remembers_where_it_came_from():
    command = click.Command("x", params=[click.Option(["--a"]), click.Option(["--b"], is_flag=True)])
    context = command.make_context("x", ["--b"])
    assert fold(context, "a", {"b": "bee"}) == "bee"
    assert context.get_parameter_source("a") is click.core.ParameterSource.COMMANDLINE


def test_an_unknown_flag_and_a_bad_file_end_with_2(echo):
    for args, said in (
        (["--do_eval"], "No such option: --do-eval; leave it out: every epoch"),
        (["--num-epochs", "3"], "No such option: --num-epochs; did you mean --num-train-epochs?"),
        (["--config", "gone.yaml"], "Error: gone.yaml: no such file"),
    ):
        result = run("train", *args)
        assert (result.exit_code, said in result.stderr) == (2, True), result.stderr
    assert not echo


@pytest.mark.parametrize("name", sorted(main.commands))
def test_every_command_takes_a_config(name):
    Path("run.json").write_text(json.dumps({"surely_not_an_option": 1}))
    result = run(name, "--config", "run.json")
    assert result.exit_code == 2
    assert f"run.json: key surely_not_an_option: {name} has no such option" in result.stderr


def test_json_is_read_where_yaml_is_not_installed(tmp_path):
    block = "import sys; sys.modules['yaml'] = None; from qadeploy.cli import main; main(sys.argv[1:])"
    for name, code, said in (("run.json", 0, "handbook"), ("run.yaml", 1, "pip install 'qadeploy[train]'")):
        Path(name).write_text('{"json": true}')
        command = [sys.executable, "-c", block, "doctor", "--config", name]
        done = ended(command, timeout=60)
        assert done.returncode == code, done.stderr
        assert said in done.stdout + done.stderr or name == "run.json"
        assert "Traceback" not in done.stderr
        if name == "run.json":
            json.loads(done.stdout)


# ---------------------------------------------------------------- docs/run-qa.md


def table() -> list[list[str]]:
    rows = [line for line in DOCS.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in rows]


def test_every_flag_in_the_docs_is_what_train_says_of_it():
    flags = {opt for param in TRAIN.params if isinstance(param, click.Option) for opt in param.opts}
    rows = table()
    assert len(rows) > 30
    for theirs, ours, *_ in rows:
        names = [name.replace("_", "-") for name in re.findall(r"`(--[a-z0-9_]+)`", theirs)]
        assert names, theirs
        if ours.startswith("leave it out"):
            for name in names:
                assert name not in flags
                assert f"; {ours.split(':')[0]}" in run("train", name).stderr, name
        elif ours.startswith("the same"):
            assert flags.issuperset(names), names
        else:
            assert flags.issuperset(re.findall(r"`(--[a-z0-9-]+)[ `]", ours)), ours
