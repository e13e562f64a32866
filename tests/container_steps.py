"""Runs the Dockerfile's RUN, COPY, ENV, HEALTHCHECK and ENTRYPOINT in a temporary folder, without a container engine.

    python -m tests.container_steps BUNDLE [--python python3.12] [--out benchmarks/results/container.json]

The steps come from the parsed Dockerfile and .dockerignore. Differences from an image: the stages share one folder as
their file system, into which every absolute path of the file is moved, and a copy of this machine's Python replaces the
base image's. As root, the server runs as the file's USER.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import click

from qadeploy.errors import FailureError, InputError, QadeployError
from qadeploy.files import write_json
from qadeploy.inference.doctor import diagnose

ROOT = Path(__file__).resolve().parents[1]
QUESTION = {"question": "Who keeps the lamp?", "context": "Ada keeps the lamp in room 7."}
HEALTHY_SECONDS = 30.0
# The known instructions; the parser raises on others, because a skipped step would make the check worthless.
KNOWN = frozenset(
    ["ARG", "FROM", "WORKDIR", "COPY", "RUN", "ENV", "USER", "EXPOSE", "STOPSIGNAL", "HEALTHCHECK", "ENTRYPOINT", "CMD"]
)


@dataclass
class Stage:
    """One FROM: its base (an image or an earlier stage) and its (instruction, rest) pairs."""

    name: str
    base: str
    steps: list[tuple[str, str]] = field(default_factory=list)


def parse(text: str, arguments: Mapping[str, str]) -> dict[str, Stage]:
    """The stages by name, in order; ``arguments`` override the ARGs before the first FROM.

    Raises InputError on an instruction that is not known here.
    """
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    stages: dict[str, Stage] = {}
    values: dict[str, str] = {}
    for line in re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines():
        if not line.strip():
            continue
        name, _, rest = line.strip().partition(" ")
        rest = rest.strip()
        if name not in KNOWN:
            raise InputError(f"Dockerfile: instruction {name} is not known to {Path(__file__).name}: teach it")
        if name == "FROM":
            base, _, alias = _expand(rest, values).partition(" AS ")
            stages[alias] = Stage(alias, base)
        elif not stages:  # only ARG stands there
            key, _, value = rest.partition("=")
            values[key] = arguments.get(key, value)
        else:
            list(stages.values())[-1].steps.append((name, rest))
    return stages


def order(stages: Mapping[str, Stage], target: str) -> list[Stage]:
    """The stages that a target needs, in the order they are built, the target last. Raises InputError."""
    if target not in stages:
        raise InputError(f"Dockerfile: no target {target}: choose {', '.join(stages)}")
    needed: list[Stage] = []

    def need(name: str) -> None:
        if name not in stages or stages[name] in needed:
            return
        stage = stages[name]
        need(stage.base)
        for instruction, rest in stage.steps:
            if instruction == "COPY" and (found := re.match(r"--from=(\S+)", rest)):
                need(found[1])
        needed.append(stage)

    need(target)
    return needed


def ignored(path: str, rules: Sequence[str]) -> bool:
    """Whether .dockerignore keeps a path out of the build's context; the last rule that matches decides.

    ``*`` matches within a folder, ``**/NAME`` at any depth, ``!`` includes again; a rule for a folder applies to its content.
    """
    found = False
    parts = path.split("/")
    for rule in rules:
        pattern = rule.removeprefix("!").strip("/")
        if pattern.startswith("**/"):
            hit = any(fnmatchcase(part, pattern[3:]) for part in parts)
        else:
            depth = pattern.count("/") + 1
            hit = len(parts) >= depth and all(map(fnmatchcase, parts[:depth], pattern.split("/")))
        if hit:
            found = not rule.startswith("!")
    return found


class Container:
    """A folder that replaces the file system of all stages, and the settings that the steps make."""

    def __init__(self, root: Path, stages: Sequence[Stage]) -> None:
        self.root = root
        self.environment: dict[str, str] = {}
        self.work = "/"
        self.user = ""
        self.health: list[str] = []
        self.entry: list[str] = []
        self.command: list[str] = []
        self.stop = signal.SIGTERM
        self.seconds: list[dict[str, Any]] = []
        steps = [step for stage in stages for step in stage.steps]
        made = {rest for name, rest in steps if name == "WORKDIR"}
        made |= {rest.split()[-1] for name, rest in steps if name == "COPY"} | {"/bundle", "/tmp"}
        self._paths = re.compile("(?<![\\w.])(" + "|".join(sorted(re.escape(p) for p in made if p[0] == "/")) + ")\\b")
        (root / "tmp").mkdir(mode=0o777)
        (root / "tmp").chmod(0o777)

    def inside(self, text: str) -> str:
        """A text with the file's absolute paths moved into the folder."""
        return self._paths.sub(lambda found: f"{self.root}{found[1]}", text)

    def variables(self) -> dict[str, str]:
        """The environment of a step: the base image's, then the file's; from the caller only the package index."""
        base = {
            "PATH": f"{self.root}/python/bin:/usr/local/bin:/usr/bin:/bin",
            "LD_LIBRARY_PATH": f"{self.root}/python/lib",  # the copied interpreter's libpython
            "HOME": "/",
            "LANG": "C.UTF-8",
        }
        kept = {k: v for k, v in os.environ.items() if k.startswith("PIP_") or k.lower().endswith("_proxy")}
        return {**kept, **base, **self.environment}

    def take(self, name: str, rest: str) -> None:
        """Runs one step. Raises FailureError if a command fails, InputError if a source is missing."""
        started = time.perf_counter()
        if name == "WORKDIR":
            self.work = rest
            Path(self.inside(rest)).mkdir(parents=True, exist_ok=True)
        elif name == "ENV":
            for key, value in (part.split("=", 1) for part in shlex.split(rest)):
                self.environment[key] = _expand(self.inside(value), self.variables())
        elif name == "COPY":
            self._copy(*rest.split())
        elif name == "RUN":
            self._run(rest)
        elif name == "USER":
            self.user = rest
        elif name == "STOPSIGNAL":
            self.stop = signal.Signals[rest]
        elif name == "HEALTHCHECK":
            self.health = json.loads(rest[rest.index("CMD") + 3 :])
        elif name == "ENTRYPOINT":
            self.entry = json.loads(rest)
        elif name == "CMD":
            self.command = json.loads(rest)
        elif name not in {"ARG", "EXPOSE"}:
            raise InputError(f"Dockerfile: {name} is not known here")
        seconds = time.perf_counter() - started
        self.seconds.append({"step": f"{name} {rest}", "seconds": round(seconds, 2)})
        click.echo(f"{seconds:7.1f} s  {name} {rest[:100]}")

    def _run(self, command: str) -> None:
        done = subprocess.run(
            ["sh", "-c", self.inside(command)],
            cwd=self.inside(self.work),
            env=self.variables(),
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise FailureError(f"RUN {command}: ended with {done.returncode}:\n{(done.stdout + done.stderr)[-2000:]}")

    def _copy(self, *parts: str) -> None:
        sources, target = parts[:-1], parts[-1]
        if sources[0].startswith("--from="):  # from another stage, whose files are in the same folder
            if list(sources[1:]) != [target]:
                raise InputError(
                    f"Dockerfile: COPY {' '.join(parts)}: between stages only a path of the same name is known"
                )
            return
        rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
        for source in sources:
            if ignored(source, rules) or not (ROOT / source).exists():
                raise InputError(f"Dockerfile: COPY {source}: is not there, or .dockerignore keeps it out")
            into = Path(self.inside(self.work), self.inside(target))
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, into, dirs_exist_ok=True, ignore=_ignore(rules))
            else:
                into.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / source, into)


def _ignore(rules: Sequence[str]) -> Any:
    def names(folder: str, found: list[str]) -> list[str]:
        place = Path(folder).relative_to(ROOT)
        return [name for name in found if ignored((place / name).as_posix(), rules)]

    return names


def _expand(text: str, values: Mapping[str, str]) -> str:
    return re.sub(r"\$\{?(\w+)\}?", lambda found: values.get(found[1], ""), text)


def serve(machine: Container, bundle: Path) -> dict[str, Any]:
    """Starts the entry point with the bundle, waits until healthy, asks a question, stops it. Raises FailureError."""
    shutil.copytree(bundle, machine.inside("/bundle"), dirs_exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables = {**machine.variables(), "QADEPLOY_PORT": str(port), "QADEPLOY_HOST": "127.0.0.1"}  # like docker run -e
    user = {"user": int(machine.user.split(":")[0]), "group": int(machine.user.split(":")[1]), "extra_groups": []}
    identity: dict[str, Any] = user if os.geteuid() == 0 else {}
    place = machine.inside(machine.work)
    command = [machine.inside(word) for word in machine.entry + machine.command]
    executable = shutil.which(command[0], path=variables["PATH"])
    if executable is None:
        raise FailureError(f"{command[0]} is not installed")
    log = machine.root / "tmp" / "log"
    started = time.perf_counter()
    with log.open("w") as file:
        server = subprocess.Popen(
            [executable, *command[1:]], env=variables, cwd=place, stdout=file, stderr=subprocess.STDOUT, **identity
        )
    try:
        check = [shutil.which(machine.health[0], path=variables["PATH"]) or "", *machine.health[1:]]
        unhealthy = 0
        while subprocess.run(check, env=variables, cwd=place, capture_output=True, check=False, **identity).returncode:
            unhealthy += 1
            if server.poll() is not None or time.perf_counter() - started > HEALTHY_SECONDS:
                raise FailureError(f"the server does not become healthy:\n{log.read_text()[-2000:]}")
            time.sleep(0.1)
        healthy = time.perf_counter() - started
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/answer", json.dumps(QUESTION).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=30) as response:
            answer = json.load(response)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/static/app.js", timeout=30) as response:
            page = len(response.read())
        owner = os.stat(f"/proc/{server.pid}").st_uid
        server.send_signal(machine.stop)
        code = server.wait(60)
    finally:
        if server.poll() is None:
            server.kill()
            server.wait()
    if code:
        raise FailureError(f"after {machine.stop.name} the server ended with {code}:\n{log.read_text()[-2000:]}")
    return {
        "healthy_after_seconds": round(healthy, 2),
        "checks_before_healthy": unhealthy,
        "answer": answer,
        "page_script_bytes": page,
        "user": owner,
        "exit_code_after_stop_signal": code,
    }


def _installed(machine: Container) -> Iterator[str]:
    site = next(Path(machine.inside("/opt/venv")).glob("lib/python*/site-packages"))
    yield from sorted(path.name.rsplit(".", 1)[0] for path in site.glob("*.dist-info"))


def _megabytes(folder: Path) -> float:
    return round(sum(p.stat().st_size for p in folder.rglob("*") if p.is_file() and not p.is_symlink()) / 1e6, 1)


def steps(target: str, bundle: Path, python: str = sys.executable) -> dict[str, Any]:
    """Runs the steps of a target and its server, with a copy of the interpreter ``python``; returns the results."""
    stages = order(parse((ROOT / "Dockerfile").read_text(), {}), target)
    ask = "import sys; print(sys.base_prefix, *sys.version_info[:3])"
    prefix, *version = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True).stdout.split()
    with tempfile.TemporaryDirectory(prefix="container-") as temporary:
        root = Path(temporary)
        root.chmod(0o755)
        site = Path("lib", f"python{version[0]}.{version[1]}", "site-packages")
        unneeded = shutil.ignore_patterns("__pycache__", "test", "tests", "site-packages", "share", "*.a")
        shutil.copytree(prefix, root / "python", symlinks=True, ignore=unneeded)
        (root / "python" / site).mkdir()
        machine = Container(root, stages)
        for stage in stages:
            click.echo(f"FROM {stage.base} AS {stage.name}")
            for name, rest in stage.steps:
                machine.take(name, rest)
        installed = list(_installed(machine))
        heavy = [name for name in installed if name.startswith(("torch-", "transformers-", "optimum-"))]
        if heavy:
            raise FailureError(f"the image would hold {', '.join(heavy)}")
        served = serve(machine, bundle)
        return {
            "target": target,
            "image_built": False,
            "python": ".".join(version),
            "stages": [stage.name for stage in stages],
            "steps": machine.seconds,
            "packages": installed,
            "venv_megabytes": _megabytes(Path(machine.inside("/opt/venv"))),
            **served,
        }


@click.command(help=__doc__)
@click.argument("bundle", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--target", default="cpu", show_default=True)
@click.option("--python", default=sys.executable, help="The interpreter to use in place of the base image's.")
@click.option("--out", type=click.Path(path_type=Path))
def main(bundle: Path, target: str, python: str, out: Path | None) -> None:
    """Runs the steps, prints the results, and writes them as JSON."""
    found = steps(target, bundle, python)
    served = {key: found[key] for key in ("healthy_after_seconds", "answer", "user", "exit_code_after_stop_signal")}
    click.echo(json.dumps({"venv_megabytes": found["venv_megabytes"], **served}, indent=2, ensure_ascii=False))
    click.echo("No container engine ran: no image was built.")
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        environment = diagnose()
        write_json(out, {"date": time.strftime("%Y-%m-%d", time.gmtime()), "environment": environment, **found})


if __name__ == "__main__":
    try:
        main()
    except QadeployError as error:
        raise SystemExit(f"Error: {error}") from error
