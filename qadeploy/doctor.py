"""What this installation can do: packages, providers, conflicts, the base model."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from qadeploy.errors import CheckpointError
from qadeploy.machine import machine
from qadeploy.runtime.session import onnxruntime, usable_cpus
from qadeploy.shipped import base_model_path

_PACKAGES = {
    "runtime": ("numpy", "tokenizers", "onnxruntime", "onnxruntime-gpu"),
    "train": ("torch", "transformers", "optimum", "optimum-onnx", "onnx", "datasets", "accelerate", "pyarrow"),
    "peers": ("openvino", "nncf"),
}


def diagnose() -> dict[str, Any]:
    """Versions, CPU, providers, and ``problems``: one line each, with what to do. Imports no torch."""
    packages = {name: _version(name) for names in _PACKAGES.values() for name in names}
    report: dict[str, Any] = {
        "qadeploy": _version("qadeploy"),
        "commit": _commit(),
        "python": platform.python_version(),
        "cpu": {"model": machine().cpu, "usable": usable_cpus(), "features": list(machine().instruction_sets)},
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "packages": packages,
        "nvidia_driver": _driver(),
        "providers": [],
    }
    problems = []
    if packages["onnxruntime"] and packages["onnxruntime-gpu"]:
        problems.append(
            "onnxruntime and onnxruntime-gpu are both installed and break each other: "
            "pip uninstall onnxruntime onnxruntime-gpu, then install the one you want"
        )
    if find_spec("onnxruntime") is None:
        problems.append("onnxruntime is not installed, so nothing can be answered: pip install 'qadeploy[cpu]'")
    else:
        try:
            report["providers"] = onnxruntime().get_available_providers()
        except AttributeError:  # what is left where one of two builds was uninstalled
            problems.append(
                "onnxruntime is broken (both builds were installed and one was removed?): pip uninstall onnxruntime "
                "onnxruntime-gpu, then install the one you want again"
            )
        if report["nvidia_driver"] and "CUDAExecutionProvider" not in report["providers"]:
            problems.append(
                "an NVIDIA driver answers, but onnxruntime is a CPU build: pip install 'qadeploy[gpu]' instead"
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


def lines(report: dict[str, Any]) -> list[str]:
    """The report as lines of text."""
    cpu = report["cpu"]
    result = [
        f"qadeploy {report['qadeploy']}, Python {report['python']}",
        f"CPU: {cpu['model']}, {cpu['usable']} usable, {', '.join(cpu['features']) or 'no known vector features'}; "
        f"{report['memory_gib']} GiB of memory",
        f"NVIDIA driver: {report['nvidia_driver'] or 'none'}; ONNX Runtime providers: {', '.join(report['providers']) or 'none'}",
        "packages: " + ", ".join(f"{name} {found or '-'}" for name, found in report["packages"].items()),
    ]
    result += [f"PROBLEM: {problem}" for problem in report["problems"]] or ["no problems found"]
    return result


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the checkout that this package runs from, with ``+`` where it was changed; None elsewhere."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _driver() -> str | None:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    command = [tool, "--query-gpu=driver_version,name", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return "; ".join(done.stdout.split("\n")[:8]).strip("; ") if done.returncode == 0 else None
