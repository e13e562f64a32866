"""The settings: one table for flags, environment and documents; and how many windows run at a time."""

from __future__ import annotations

import json
import logging
import sys
import threading
from dataclasses import fields
from pathlib import Path

import pytest
from click.testing import CliRunner

from qadeploy.cli import main
from qadeploy.options import declared, table
from qadeploy.serve import threads
from qadeploy.serve.errors import KINDS
from qadeploy.serve.limits import REQUEST_LIMITS
from qadeploy.serve.settings import Settings
from qadeploy.serve.threads import choose_workers

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "serving.md"


@pytest.fixture(autouse=True)
def loggers():
    """Restores this process's loggers, which the server takes over."""
    owned = [logging.getLogger(name) for name in ("qadeploy", "uvicorn", "asyncio")]
    before = [(logger, logger.handlers, logger.propagate, logger.level) for logger in owned]
    yield
    for logger, handlers, propagate, level in before:
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


def served(monkeypatch, *arguments: str, **environment: str) -> Settings:
    """The settings that a command line and an environment lead to."""
    taken: list[Settings] = []
    monkeypatch.setattr("qadeploy.serve.run.serve", lambda bundle, settings, on_ready: taken.append(settings))
    result = CliRunner().invoke(main, ["serve", "some-bundle", *arguments], env=environment)
    assert result.exit_code == 0, result.output
    return taken[0]


def test_the_document_has_the_table_of_settings():
    assert table(Settings, env=True) in DOCUMENT.read_text(encoding="utf-8")


def test_the_document_names_every_metric_and_every_error(bundle):
    from qadeploy import Answerer
    from tests.servers_for_tests import serving

    text = DOCUMENT.read_text(encoding="utf-8")
    with serving(Answerer.load(bundle, device="cpu", threads=1)) as local:
        names = {
            line.split()[2] for line in local.get("/metrics").text.splitlines() if line.startswith("# TYPE qadeploy")
        }
    assert len(names) > 10
    assert not [name for name in names if f"`{name}`" not in text and not name.endswith("_created")]
    kinds = {kind for _, _, kind in KINDS} | {"queue_full", "deadline", "unauthorized", "body_too_large", "slow_body"}
    assert not [kind for kind in kinds if f"`{kind}`" not in text]


@pytest.mark.parametrize("row", declared(Settings).values(), ids=lambda row: row.name)
def test_every_setting_is_a_flag_and_an_environment_variable(monkeypatch, row):
    given = "https://a.example" if row.many else {int: "7", float: "7.5", str: "debug", bool: "1"}[row.kind]
    expected = ("https://a.example",) if row.many else {int: 7, float: 7.5, str: "debug", bool: True}[row.kind]
    flags = [row.flag] if row.kind is bool else [row.flag, given]
    if row.name == "protect_metrics":
        monkeypatch.setenv("QADEPLOY_TOKEN", "secret")
    by_flag, by_environment = served(monkeypatch, *flags), served(monkeypatch, **{row.env: given})
    assert getattr(by_flag, row.name) == expected != row.default
    assert by_flag == by_environment
    others = served(monkeypatch)
    assert [f.name for f in fields(Settings) if getattr(by_flag, f.name) != getattr(others, f.name)] == [row.name]


def test_a_flag_wins_over_the_environment_and_nothing_gives_the_defaults(monkeypatch):
    assert served(monkeypatch, "--max-queue", "5", QADEPLOY_MAX_QUEUE="9").max_queue == 5
    assert served(monkeypatch) == Settings()
    several = served(monkeypatch, QADEPLOY_CORS_ORIGIN="https://a.example https://b.example")
    assert several.cors_origins == ("https://a.example", "https://b.example")


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (["--max-queue", "0"], {}, "'--max-queue': 0 is not in the range x>=1"),
        ([], {"QADEPLOY_THREADS": "many"}, "'--threads': 'many' is not a valid integer"),
        ([], {"QADEPLOY_TOKEN": ""}, "QADEPLOY_TOKEN is empty"),
        (["--token", "a b\n"], {}, "--token: give printable ASCII"),
        (["--protect-metrics"], {}, "--protect-metrics: needs a --token"),
        (
            [],
            {"QADEPLOY_CORS_ORIGIN": "http://a.example,http://b.example"},
            "in the environment, separate them by spaces",
        ),
        (["--log-level", "loud"], {}, "--log-level is 'loud'"),
        (["--host", "nowhere.invalid"], {}, "--host nowhere.invalid --port 8000: cannot listen there"),
        (["--port", "70000"], {}, "--port 70000: cannot listen there"),
        (["--port", "0"], {}, "some-bundle: no such bundle folder"),
    ],
)
def test_settings_that_cannot_be_are_named(arguments, environment, message):
    result = CliRunner().invoke(main, ["serve", "some-bundle", *arguments], env=environment)
    assert result.exit_code == 2
    assert message in result.output.replace("\n", " ")
    assert "Traceback" not in result.output


def test_without_its_packages_it_names_the_pip_line(monkeypatch):
    monkeypatch.delitem(sys.modules, "qadeploy.serve.run", raising=False)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    result = CliRunner().invoke(main, ["serve", "some-bundle"])
    assert result.exit_code == 1
    assert "pip install 'qadeploy[serve]'" in result.output


def test_every_limit_is_a_setting():
    assert set(REQUEST_LIMITS) < set(declared(Settings))


# ---------------------------------------------------------------- threads


class Machine:
    """A machine on which up to ``side_by_side`` runs at a time pay off; more wait for each other."""

    def __init__(self, side_by_side: int) -> None:
        self.places = threading.Semaphore(side_by_side)
        self.runs = 0

    def run(self) -> None:
        with self.places:
            self.runs += 1
            threading.Event().wait(0.004)


@pytest.fixture
def four_cpus(monkeypatch, tmp_path):
    monkeypatch.setenv("QADEPLOY_CACHE", str(tmp_path / "qadeploy"))
    monkeypatch.setattr(threads, "usable_cpus", lambda: 4)
    monkeypatch.setattr(threads, "_ROUND_SECONDS", 0.1)
    monkeypatch.setattr(threads, "_STEADY", 1e9)
    return tmp_path / "qadeploy" / "threads.json"


def test_what_was_asked_for_is_taken(four_cpus):
    machine = Machine(4)
    assert choose_workers(3, "cpu", "bundle", machine.run)[0] == 3
    assert choose_workers(3, "cuda", "bundle", machine.run)[0] == threads.CUDA_WORKERS
    assert machine.runs == 0


def test_all_cpus_are_taken_where_they_answer_more(four_cpus):
    assert choose_workers(None, "cpu", "bundle", Machine(4).run)[0] == 4


def test_a_measurement_is_kept_for_its_bundle_and_used_again(four_cpus):
    first = choose_workers(None, "cpu", "bundle", Machine(4).run)
    assert first[1] == f"measured now, kept in {four_cpus}"
    machine = Machine(1)
    again = choose_workers(None, "cpu", "bundle", machine.run)
    assert (*again, machine.runs) == (4, f"measured before ({four_cpus})", 0)
    choose_workers(None, "cpu", "other", machine.run)
    assert machine.runs > 0
    assert len(json.loads(four_cpus.read_text())) == 2


@pytest.mark.parametrize("text", ["", "[1]", '{"x": 1', "\xff"])
def test_a_broken_cache_is_measured_anew(four_cpus, text):
    four_cpus.parent.mkdir(parents=True)
    four_cpus.write_text(text, encoding="latin-1")
    assert choose_workers(None, "cpu", "bundle", Machine(4).run)[0] == 4
    assert choose_workers(None, "cpu", "bundle", Machine(4).run)[1].startswith("measured before")


def test_a_disturbed_measurement_is_not_kept(four_cpus, monkeypatch):
    monkeypatch.setattr(threads, "_STEADY", 0.5)
    assert (
        choose_workers(None, "cpu", "bundle", Machine(4).run)[1]
        == "measured now, but disturbed by other work: not kept"
    )
    assert not four_cpus.exists()


def test_one_cpu_needs_no_measurement(four_cpus, monkeypatch):
    monkeypatch.setattr(threads, "usable_cpus", lambda: 1)
    machine = Machine(1)
    assert choose_workers(None, "cpu", "bundle", machine.run)[0] == 1
    assert machine.runs == 0


def test_half_of_the_cpus_are_taken_where_more_do_not_help(four_cpus, monkeypatch):
    monkeypatch.setattr(threads, "_rate", lambda count, run: 100.0)
    assert choose_workers(None, "cpu", "bundle", Machine(4).run)[0] == 2


def test_a_cache_folder_that_cannot_be_written_or_found_is_said(four_cpus, monkeypatch):
    four_cpus.parent.write_text("a file where the folder should be")
    found = choose_workers(None, "cpu", "bundle", Machine(4).run)
    assert found[1] == f"measured now; it could not be kept in {four_cpus}: File exists"
    monkeypatch.setattr(threads, "cache_folder", lambda: None)
    assert "there is no cache folder" in choose_workers(None, "cpu", "bundle", Machine(4).run)[1]
