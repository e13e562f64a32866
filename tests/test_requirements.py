"""The lists of hashes that a container is installed from: complete, with the tested versions, accepted by pip."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.processes_for_tests import ended

ROOT = Path(__file__).resolve().parents[1]
HASHED = re.compile(r"(?P<line>[a-z0-9][a-z0-9.-]*==.+?)(?P<hashes>(?: --hash=sha256:[0-9a-f]{64})+)")
LISTS = {"cpu": ("cpu", "serve", "corpus"), "gpu": ("gpu", "serve", "corpus"), "build": ()}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def read(name: str) -> dict[str, Requirement]:
    """The requirements of a list, each of which has a hash and nothing else."""
    text = (ROOT / "requirements" / f"{name}.txt").read_text("utf-8").replace(" \\\n   ", "")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    found = [HASHED.fullmatch(line) for line in lines]
    assert all(found), [line[:80] for line, match in zip(lines, found, strict=True) if not match]
    parsed = [Requirement(match["line"]) for match in found if match]
    return {canonicalize_name(each.name): each for each in parsed}


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and line[0] != "#"]
    return {canonicalize_name(name): version for name, version in pairs}


@pytest.mark.parametrize("name", LISTS)
def test_a_list_has_the_tested_versions(name):
    versions = pins()
    found = {each: str(one.specifier) for each, one in read(name).items() if not each.startswith("nvidia-")}
    # NVIDIA's follow the runtime, and torch wants others.
    assert found == {each: f"=={versions[each]}" for each in found}


@pytest.mark.parametrize("name", LISTS)
def test_a_list_has_what_the_project_asks_for(name):
    wanted = PROJECT["project"]["dependencies"] if LISTS[name] else PROJECT["build-system"]["requires"]
    for extra in LISTS[name]:
        wanted = [*wanted, *PROJECT["project"]["optional-dependencies"][extra]]
    found = read(name)
    for each in map(Requirement, wanted):
        listed = found[canonicalize_name(each.name)]
        assert listed.marker is None
        (version,) = (one.version for one in listed.specifier)
        assert version in each.specifier
    assert not {"torch", "transformers", "optimum"} & found.keys()


def test_another_file_of_the_same_version_is_refused(tmp_path):
    """The purpose of a hash, with pip itself and no network: a wheel is changed after its hash was computed."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    build = ROOT / "requirements" / "build.txt"
    text = re.sub(r"sha256:[0-9a-f]{64}", "sha256:" + 64 * "0", build.read_text("utf-8"))
    (tmp_path / "list.txt").write_text(text)
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--require-hashes", "--only-binary=:all:"]
    done = ended([*command, "-r", "list.txt", "-d", "wheels"], cwd=tmp_path)
    if "DO NOT MATCH THE HASHES" not in done.stderr and "from versions: none" in done.stderr:
        pytest.skip("no package index")
    assert done.returncode == 1
    assert "THESE PACKAGES DO NOT MATCH THE HASHES" in done.stderr
    assert not list(wheels.iterdir())


@pytest.mark.slow
def test_a_fresh_environment_can_be_made_of_the_list(tmp_path):
    """As the Dockerfile does, for this Python: every wheel by its hash, and then the server's modules can be imported."""
    make = [sys.executable, "-m", "venv", str(tmp_path / "venv")]
    subprocess.run(make, check=True, capture_output=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    flags = ("--require-hashes", "--only-binary=:all:", "--no-compile")  # bytecode of all packages would take longest
    command = [python, "-m", "pip", "install", "-q", *flags]
    listed = str(ROOT / "requirements" / "cpu.txt")
    done = ended([*command, "-r", listed])
    if "from versions: none" in done.stderr:
        pytest.skip("no package index")
    assert done.returncode == 0, done.stderr
    ask = (
        "import qadeploy.serve.app, qadeploy.inference.answerer, lxml.html, markdown_it, pypdfium2, tantivy, sys; "
        "assert 'torch' not in sys.modules; print('ready')"
    )
    asked = ended([python, "-c", ask], cwd=ROOT)
    assert asked.stdout == "ready\n", asked.stderr
