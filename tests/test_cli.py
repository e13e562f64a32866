"""The command line: documented, and run for real from ``export`` to ``doctor``."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import click
import pytest

from qadeploy import Answerer, __version__
from qadeploy.cli import main
from qadeploy.inference.bundle import MANIFEST, open_bundle
from qadeploy.shipped import base_bundle_path
from tests.cli_for_tests import run, value, well
from tests.conftest import triplets, write_jsonl
from tests.processes_for_tests import ended

pytestmark = pytest.mark.usefixtures("elsewhere")

COMMANDS = sorted(main.commands)


# ---------------------------------------------------------------- documentation


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_and_option_has_help(name):
    command = main.commands[name]
    assert command.help, name
    assert [p.opts for p in command.params if isinstance(p, click.Option) and not p.help] == []
    shown = well(name, "--help").stdout
    for param in command.params:
        assert (param.opts[0] if isinstance(param, click.Option) else param.human_readable_name.upper()) in shown


@pytest.mark.parametrize("name", COMMANDS)
def test_every_example_parses(name):
    examples = re.findall(rf"^ +qadeploy ({name}\b.*)$", well(name, "--help").stdout, re.MULTILINE)
    assert examples
    Path("run.yaml").write_text("epochs: 3")  # which an example names
    for line in examples:
        main.commands[name].make_context(name, shlex.split(line)[1:])  # raises on what does not exist


def test_the_group_lists_its_commands_and_its_version():
    shown = well("--help").stdout
    assert {"train", "export", "evaluate", "ask", "answer", "bench", "doctor"} <= set(COMMANDS)
    assert all(re.search(rf"^  {name}  ", shown, re.MULTILINE) for name in COMMANDS)
    assert well("--version").stdout.strip().endswith(__version__)


# ---------------------------------------------------------------- every command for real


def test_export(tiny, tiny_export):
    bundles = value(tiny_export)["bundles"]
    assert list(bundles) == ["bundles/keepers", "bundles/keepers-fused", "bundles/keepers-int8"]
    for path, manifest in bundles.items():
        assert open_bundle(tiny.root / path).manifest == manifest
    assert "judged on 20 questions" in tiny_export.stderr


def test_export_with_one_recipe_and_the_search_kept(tiny, monkeypatch, tmp_path):
    monkeypatch.setenv("QADEPLOY_CACHE", str(tmp_path / "cache"))
    base = ("export", tiny.run, "--quantize", "--no-optimize", "--out", "bundles/x")
    first = well(*base, "--recipe", "int8-mixed")
    assert "int8-mixed" in first.stdout
    assert "int8-protected" not in first.stdout
    assert open_bundle("bundles/x-int8").manifest["made"]["recipe"] == "int8-mixed"
    assert len(list((tmp_path / "cache").glob("recipe-*.json"))) == 1
    kept = open_bundle("bundles/x-int8").manifest["made"]["leaderboard"]
    well(*base, "--recipe", "int8-mixed")
    again = open_bundle("bundles/x-int8").manifest["made"]["leaderboard"]
    assert again == kept  # seconds and speeds are equal too, so they were not measured again
    out = well(*base, "--budget", 0, "--target", "size", "--no-cache").stdout
    assert "the budget of 0 s is used up: int8-static and later recipes were not tried" in out
    assert open_bundle("bundles/x-int8").manifest["made"]["target"] == "size"


def test_the_recipes_are_explained():
    shown = well("export", "--list-recipes").stdout.splitlines()
    assert [line.split()[0] for line in shown] == list(value(well("export", "--list-recipes", "--json")))
    assert all(len(line.split()) > 5 for line in shown)


def test_a_reader_that_goes_away_ends_a_command_quietly(tmp_path):
    data = write_jsonl(tmp_path / "rows.jsonl", triplets(400))
    command = f"{sys.executable} -m qadeploy check {data} --show 400 | head -n 1"
    done = ended(["bash", "-c", command])
    assert done.stdout.startswith(str(data))
    assert "pipe" not in done.stderr.lower()


def test_bench_bare_takes_the_newest_bundle_and_names_a_peer_that_fails(tiny, tiny_export, monkeypatch):
    monkeypatch.chdir(tiny.root)
    options = ("--questions", 3, "--rounds", 1, "--against", "pipeline", "--checkpoint", tiny.root / "gone")
    text = well("bench", "--data", tiny.data, *options).stdout
    newest = max((tiny.root / "bundles").iterdir(), key=lambda p: (p / MANIFEST).stat().st_mtime_ns)
    assert f"({newest.name})" in text
    assert re.search(
        r"^pipeline +failed: FailureError: .*gone: the bundle's source checkpoint no longer exists", text, re.M
    )


def test_without_a_bundle_the_newest_is_taken_else_the_one_that_ships(plain_int8):
    ask = ("ask", "--question", "Who keeps the lamp?", "--context", "Ada keeps the lamp.", "--json")
    result = well(*ask)
    assert f"using the bundle {base_bundle_path()}" in result.stderr
    assert value(result)["answers"][0]["text"] == "Ada"
    assert Answerer.load().answer("What is the capital of Japan?", "Warsaw is on the Vistula.")[0].text == ""
    Path("bundles").symlink_to(plain_int8.parent)
    assert f"using the bundle bundles/{plain_int8.name}" in well(*ask).stderr
    assert Answerer.load().bundle.folder == Path("bundles") / plain_int8.name


def test_doctor():
    assert "no problems found" in (text := well("doctor").stdout) or "PROBLEM: " in text
    report = value(well("doctor", "--json"))
    assert report["qadeploy"] == __version__
    assert report["packages"]["torch"]
    assert "CPUExecutionProvider" in report["providers"]


def test_a_typo_in_an_option_or_a_command_is_named():
    assert "No such option" in run("train", "--epoch-count", 3).stderr
    assert "No such command" in run("trian").stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_a_lack_of_memory_names_only_options_of_the_command(name, monkeypatch):
    command = main.commands[name]

    def exhausted(**given: object) -> None:
        raise MemoryError

    monkeypatch.setattr(command, "callback", exhausted)
    for param in command.params:
        monkeypatch.setattr(param, "required", False)
    result = run(name)
    assert (result.exit_code, result.stdout) == (1, "")
    assert "Error: the machine ran out of memory: " in result.stderr
    known = {opt for param in command.params for opt in param.opts}
    assert set(re.findall(r"--[a-z-]+", result.stderr.partition("memory: ")[2])) <= known
    assert ("--batch-size" in result.stderr) == (name == "train")


def test_debug_shows_the_traceback():
    command = [sys.executable, "-m", "qadeploy", "ask", "nothing", "--question", "Who?", "--context", "Ada."]
    plain = ended(command, timeout=120)
    assert (plain.returncode, plain.stdout) == (2, "")
    assert plain.stderr.startswith("Error: nothing: no such")
    assert "Traceback" not in plain.stderr
    debug = ended([*command, "--debug"], timeout=120)
    assert debug.returncode != 0
    assert "Traceback" in debug.stderr
    assert "InputError: nothing: no such" in debug.stderr
