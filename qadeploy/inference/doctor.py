"""Diagnosis of an installation: packages, providers, conflicts, the base model."""

from __future__ import annotations

import json
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from qadeploy.errors import CheckpointError
from qadeploy.inference import devices
from qadeploy.inference.bundle import MANIFEST
from qadeploy.inference.session import onnxruntime
from qadeploy.machine import machine, memory_bytes, usable_cpus
from qadeploy.shipped import base_model_path

_PACKAGES = {
    "runtime": ("numpy", "tokenizers", "onnxruntime", "onnxruntime-gpu"),
    "train": ("torch", "transformers", "onnx", "onnxscript", "datasets", "accelerate", "pyarrow"),
    "optimum": ("optimum", "optimum-onnx"),
    "peers": ("openvino", "nncf"),
}


def diagnose() -> dict[str, Any]:
    """Versions, CPU, GPUs, providers and ``problems``, one line each with the fix. Imports no torch.

    This initialises CUDA if there is a driver, and loads its libraries if ONNX Runtime was built for it.
    """
    driver, torch_cuda = devices.find_driver(), devices.torch_cuda()
    packages = {name: _version(name) for names in _PACKAGES.values() for name in names}
    report: dict[str, Any] = {
        "qadeploy": _version("qadeploy"),
        "commit": _commit(),
        "python": platform.python_version(),
        "cpu": {"model": machine().cpu, "usable": usable_cpus(), "features": list(machine().instruction_sets)},
        "memory_gib": round(memory_bytes() / 2**30, 1),
        "packages": packages,
        "nvidia_driver": str(driver) or None,
        "gpus": [
            {"name": g.name, "memory_gib": g.memory_gib, "compute_capability": ".".join(map(str, g.capability))}
            for g in driver.gpus
        ],
        "providers": [],
        "onnxruntime_build": None,
        "cuda": {
            "driver": driver.cuda and devices.dotted(driver.cuda),
            "driver_problem": driver.problem or None,
            "onnxruntime": None,
            "torch": torch_cuda and devices.dotted(torch_cuda),
            "libraries": {},
        },
    }
    problems: list[str] = []
    if find_spec("onnxruntime") is None:
        problems.append("onnxruntime is not installed, so nothing can be answered: pip install 'qadeploy[cpu]'")
    else:
        try:
            _add_build(report, driver, problems)
        except AttributeError:  # of the remains after one of two builds was uninstalled
            problems.append(
                "onnxruntime is broken (both builds were installed and one was removed?): pip uninstall -y onnxruntime "
                "onnxruntime-gpu, then install the one you want again"
            )
    if driver.gpus and packages["torch"] and torch_cuda is None:
        problems.append(
            f"there is an NVIDIA driver, but torch is a CPU build and trains on the CPU: {devices.torch_line()}"
        )
    missing = [name for name in _PACKAGES["train"] if not packages[name]]
    if missing:
        problems.append(
            f"train and export need {', '.join(missing)}: pip install 'qadeploy[train]' (answering does not)"
        )
    try:
        report["base_model"] = base_model_path().name
    except CheckpointError as error:
        report["base_model"] = None
        problems.append(str(error))
    report["problems"] = problems
    return report


def gpu_bundles(folder: Path = Path("bundles")) -> list[dict[str, Any]]:
    """How the fp16 bundles in ``folder`` run on a GPU, from their manifests, which are not verified here.

    ``paths`` are the notes of the runtime if the export ran on a GPU.
    """
    found = []
    for path in sorted(folder.glob(f"*/{MANIFEST}")):
        try:
            made = json.loads(path.read_text(encoding="utf-8"))["made"]
            if made["for"] == "cuda":
                facts = {"measured_on": made["measured_on"], "paths": made["paths"]}
                found.append({"bundle": str(path.parent), **facts})
        # Another kind of bundle, or not a bundle: loading it reports that.
        except (OSError, ValueError, LookupError, TypeError):
            continue
    return found


def diagnosis_lines(report: dict[str, Any]) -> list[str]:
    """The report of ``diagnose`` as lines of text."""
    cpu, build = report["cpu"], report["onnxruntime_build"]
    runtime = f"{build['package'] or 'onnxruntime'} {build['version']}" if build else "none"
    result = [
        f"qadeploy {report['qadeploy']}, Python {report['python']}",
        f"CPU: {cpu['model']}, {cpu['usable']} usable, {', '.join(cpu['features']) or 'no known vector features'}; "
        f"{report['memory_gib']} GiB of memory",
        f"NVIDIA driver: {report['nvidia_driver'] or 'none'}",
        f"ONNX Runtime: {runtime}; providers: {', '.join(report['providers']) or 'none'}",
        f"CUDA: {_cuda_line(report['cuda'])}",
        "packages: " + ", ".join(f"{name} {found or '-'}" for name, found in report["packages"].items()),
    ]
    for bundle in report.get("gpu_bundles", []):
        untried = f"measured on {bundle['measured_on']}; its paths are tried when it is loaded on a GPU"
        result.append(f"{bundle['bundle']}: {'; '.join(bundle['paths']) or untried}")
    result += [f"PROBLEM: {problem}" for problem in report["problems"]] or ["no problems found"]
    return result


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the checkout that this package runs from, with ``+`` if files were changed; None without a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _add_build(report: dict[str, Any], driver: devices.Driver, problems: list[str]) -> None:
    """Adds the build of the installed onnxruntime to ``report``, and what it lacks for this machine's GPUs to ``problems``."""
    ort = onnxruntime()
    report["providers"] = ort.get_available_providers()
    build = devices.find_build(ort)
    report["onnxruntime_build"] = {"package": build.package, "version": build.version, "installed": dict(build.wheels)}
    report["cuda"]["onnxruntime"] = build.cuda and devices.dotted(build.cuda)
    if build.conflict:
        problems.append(build.conflict)
    if build.has_cuda:
        devices.preload(ort)
        if build.cuda:
            missing = devices.missing_libraries(build.cuda[0])
            report["cuda"]["libraries"] = {name: name not in missing for name in devices.cuda_libraries(build.cuda[0])}
    if driver.cuda or build.has_cuda:  # a CPU build on a machine without a driver is no problem
        problems += [problem for problem in devices.obstacles(build, driver) if problem != build.conflict]
    if majors := devices.cuda_majors(build):
        problems.append(majors)


def _cuda_line(cuda: dict[str, Any]) -> str:
    parts = [f"{name} {cuda[name] or '-'}" for name in ("driver", "onnxruntime", "torch")]
    for state, word in ((True, "loaded"), (False, "missing")):
        names = [name for name, found in cuda["libraries"].items() if found is state]
        parts += [f"{word} {' '.join(names)}"] * bool(names)
    return "; ".join(parts)
