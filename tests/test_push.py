"""``push`` and ``hub:`` bundles: the real huggingface_hub against a hub on this machine."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from qadeploy.errors import BundleError, InputError, MissingExtraError
from qadeploy.export.push import files_to_push
from qadeploy.inference.answerer import Answerer
from qadeploy.inference.bundle import open_bundle
from qadeploy.inference.tune_bundle import TuneOptions, tune_bundle
from qadeploy.training.distill import load_teacher
from tests.conftest import triplets
from tests.hub_for_tests import TOKEN, StubHub, serving_hub
from tests.processes_for_tests import succeeded

# Its address and its folders are read when the library is imported, so it runs in a process of its own.
BEGIN = """
import json, os, sys
from click.testing import CliRunner
from qadeploy import Answerer
from qadeploy.cli import main
from qadeploy.errors import QadeployError

run, bundle, commit, sha256, data = sys.argv[1:]
found = {}

def step(name, *arguments):
    result = CliRunner().invoke(main, list(arguments))
    found[name] = [result.exit_code, result.stdout if result.exit_code == 0 else result.stderr]

def load(name, *arguments, **options):
    try:
        found[name] = str(Answerer.load(*arguments, **options).bundle.folder)
    except QadeployError as error:
        found[name] = f"{type(error).__name__}: {error}"

"""
STEPS = """
step("bundle", "push", bundle, "me/qa", "--private", "--json")
step("again", "push", bundle, "hub:me/qa", "--revision", "v2")
step("run again", "push", run, "me/run", "--revision", "v2")
step("run", "push", run, "me/run", "--json")
step("report", "push", run, "me/run", "--report", "--revision", "v2", "--json")
step("rights", "push", bundle, "other/qa")
step("name", "push", bundle, "no/such/name")
os.environ["HF_TOKEN"] = "hf_wrong"
step("token", "push", bundle, "me/qa")
del os.environ["HF_TOKEN"]
step("none", "push", bundle, "me/qa")

load("load", "hub:me/qa", sha256=sha256)
load("pinned", "hub:me/qa", sha256="0" * 64)
load("revision", "hub:me/old", revision="v1")
load("at", f"hub:me/old@{commit}")
load("both", f"hub:me/old@{commit}", revision="v1")
load("no revision", "hub:me/old", revision="v9")
load("no name", "hub:me/old@")
load("missing", "hub:me/missing")
load("gated", "hub:me/gated")
load("no bundle", "hub:me/run")
load("damaged", "hub:me/damaged")
load("bad name", "hub:no/such/name")
step("ask", "ask", "hub:me/qa", "--question", "Who keeps the lamp?", "--context", "Ada keeps the lamp in room 0.", "--json")
print(json.dumps(found))
"""
USES = """
import asyncio
import torch
from qadeploy.serve.service import Service
from qadeploy.serve.settings import Settings
from qadeploy.training.distill import load_teacher

name = "hub:me/qa"
step("evaluate", "evaluate", name, "--data", data, "--split", "all", "--json")
step("answer", "answer", name, "--input", data, "--output", "answers.jsonl")
step("bench", "bench", name, "--data", data, "--against", "optimum-direct", "--questions", "8", "--rounds", "1", "--json")
step("triton", "export", name, "--triton", "repository")
step("graph", "export", name, "--text-in-graph")
found["teacher"] = load_teacher(name, torch.device("cpu")).digest
service = Service.load(name, Settings(threads=1))
found["reloaded"] = asyncio.run(service.reload())
service.close()
print(json.dumps(found))
"""
CUT_OFF = """
load("offline", "hub:me/qa")
load("offline, not cached", "hub:me/other")
step("offline push", "push", bundle, "me/qa")
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def hub(bundle: Path) -> Iterator[StubHub]:
    """A hub with a bundle that has two revisions, and a damaged one."""
    files = {path.name: path.read_bytes() for path in bundle.iterdir()}
    with serving_hub() as found:
        found.add("me/old", "v1", files)
        found.add("me/old", "main", {".gitattributes": b"*.onnx filter=lfs", **files})
        found.add("me/damaged", "main", {**files, "model.onnx": files["model.onnx"][:-1] + b"!"})
        yield found


@pytest.fixture(scope="module")
def done(hub: StubHub, tiny: Any, bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each step gave."""
    folder = tmp_path_factory.mktemp("hub")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING_FACE"))}
    environment |= {"HF_HOME": str(folder / "hf"), "HF_TOKEN": TOKEN}
    environment |= {"QADEPLOY_CACHE": str(folder / "cache"), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
    sha256 = hashlib.sha256((bundle / "manifest.json").read_bytes()).hexdigest()
    found: dict[str, Any] = {"folder": folder}
    for steps, address in ((STEPS, hub.address), (USES, hub.address), (CUT_OFF, "http://127.0.0.1:9")):
        given = [str(tiny.run), str(bundle), hub.branches["me/old", "v1"], sha256, str(tiny.data)]
        command = [sys.executable, "-c", BEGIN + steps, *given]
        environment["HF_ENDPOINT"] = address
        ended = succeeded(command, timeout=300, env=environment, cwd=folder)
        found |= json.loads(ended.stdout.splitlines()[-1])
    assert TOKEN not in json.dumps(found, default=str)
    return found


def test_a_bundle_is_pushed_whole_and_nothing_else(done, hub, bundle):
    code, said = done["bundle"]
    assert code == 0, said
    sent = {name: data for name, data in hub.pushed("me/qa").items() if name != ".gitattributes"}
    assert sent == {path.name: path.read_bytes() for path in bundle.iterdir()}
    assert sorted(json.loads(said)["files"]) == sorted(sent)
    assert hub.private == {"me/qa": True, "me/run": False}
    assert done["again"][0] == 0
    assert "to use it: qadeploy ask hub:me/qa@v2 ..." in done["again"][1]
    assert "to use it: qadeploy train --base me/run --model-revision v2 ..." in done["run again"][1]


def test_a_run_is_pushed_without_the_texts_of_its_users_unless_asked(done, hub, tiny):
    assert done["run"][0] == done["report"][0] == 0, done
    sent = set(hub.pushed("me/run")) - {".gitattributes"}
    assert sent == {path.name for path in (tiny.run / "checkpoint").iterdir()} | {"README.md"}
    assert hub.pushed("me/run")["README.md"] == (tiny.run / "README.md").read_bytes()
    assert set(hub.pushed("me/run", "v2")) - sent == {".gitattributes", "report.html"}


@pytest.mark.parametrize(
    ("step", "code", "message"),
    [
        ("rights", 1, "other/qa: the hub does not allow it: set HF_TOKEN, or log in"),
        ("token", 1, "me/qa: the hub does not accept the token: set HF_TOKEN"),
        ("none", 1, "me/qa: .*set HF_TOKEN"),
        ("name", 2, "no/such/name: is not the name of a repository: give ORG/NAME"),
        ("offline push", 1, "me/qa: the hub cannot be reached"),
    ],
)
def test_each_refusal_of_a_push_is_one_error(done, step, code, message):
    assert done[step][0] == code, done[step]
    assert re.match(f"Error: {message}", done[step][1]), done[step]


def test_a_download_that_was_cut_short_is_completed(bundle, tmp_path, monkeypatch):
    snapshot = tmp_path / "commit"
    snapshot.mkdir()
    (snapshot / "README.md").write_bytes((bundle / "README.md").read_bytes())
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(snapshot))
    monkeypatch.setenv("QADEPLOY_CACHE", str(tmp_path / "cache"))
    with pytest.raises(BundleError, match=r"^hub:me/qa: has no manifest\.json"):
        open_bundle("hub:me/qa")
    shutil.copytree(bundle, snapshot, dirs_exist_ok=True)
    assert open_bundle("hub:me/qa").hash == open_bundle(bundle).hash


def test_a_bundle_of_the_hub_is_a_plain_folder_named_by_its_commit(done, hub, bundle):
    folder = Path(done["load"])
    assert folder.parts[-4:] == ("me", "qa", hub.branches["me/qa", "main"], "qa")
    assert not any(path.is_symlink() for path in folder.iterdir())
    assert open_bundle(folder).hash == open_bundle(bundle).hash
    assert done["offline"] == done["load"]
    assert done["revision"] == done["at"]
    assert Path(done["at"]).parent.name == hub.branches["me/old", "v1"]
    assert json.loads(done["ask"][1])["answers"][0]["text"] == "Ada"


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ("pinned", "BundleError: .*this is not the expected bundle"),
        ("both", "InputError: hub:me/old@.*: names a revision already: leave out 'v1'"),
        ("no revision", "HubError: hub:me/old: there is no such revision"),
        ("no name", "InputError: hub:me/old@: names no revision: give a branch, tag or commit after the @"),
        ("missing", "HubError: hub:me/missing: the hub has no such repository"),
        ("gated", "HubError: hub:me/gated: is gated: accept its terms"),
        ("no bundle", "BundleError: hub:me/run: has no manifest.json: this is not a bundle"),
        ("damaged", "BundleError: .*model.onnx: does not match the manifest"),
        ("bad name", "InputError: hub:no/such/name: is not the name of a repository"),
        ("offline, not cached", "HubError: hub:me/other: the hub cannot be reached, and it is not in the cache"),
    ],
)
def test_each_bundle_that_cannot_be_had_is_one_error(done, step, message):
    assert re.match(message, done[step]), done[step]


def test_every_use_of_a_bundle_takes_one_of_the_hub(done, bundle, tiny):
    assert json.loads(done["evaluate"][1])["exact_match"] > 90
    answers = [json.loads(line) for line in (done["folder"] / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == len(triplets())
    variant = json.loads(done["bench"][1])["variants"][0]
    assert "(qa)" in variant["name"]
    assert done["triton"][0] == 0, done["triton"]
    assert (done["folder"] / "repository" / "qa" / "config.pbtxt").is_file()
    assert done["graph"] == [2, "Error: hub:me/qa: is on the hub: give --out for the graphs made from it\n"]
    assert done["teacher"] == load_teacher(str(bundle), torch.device("cpu")).digest
    assert done["reloaded"] is False


def test_what_makes_no_sense_is_refused(bundle, tiny_checkpoint, monkeypatch):
    with pytest.raises(InputError, match="is a folder, which has no revisions"):
        Answerer.load(bundle, revision="v1")
    with pytest.raises(InputError, match="is on the hub: download it to a folder first"):
        tune_bundle("hub:me/qa", TuneOptions())
    with pytest.raises(InputError, match=r"is a bundle, which has no report\.html: leave out --report"):
        files_to_push(str(bundle), report=True)
    with pytest.raises(InputError, match="no model card: give a run or a bundle"):
        files_to_push(str(tiny_checkpoint))
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingExtraError, match=r"hub:me/qa needs the package huggingface_hub.*qadeploy\[hub\]"):
        Answerer.load("hub:me/qa")
