"""Collects what a run and its bundles measured into one file for the README's table.

python benchmarks/collect_run.py runs/handbook bundles/handbook benchmarks/results/handbook_run.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from qadeploy.files import write_json
from qadeploy.inference.doctor import diagnose


def main(run: Path, bundle: Path, out: Path) -> None:
    """Writes the collected figures."""
    metrics = json.loads((run / "metrics.json").read_text())
    plain = json.loads((bundle / "manifest.json").read_text())
    weights = (run / "checkpoint" / "model.safetensors").stat().st_size
    rows = [
        _row("base model, before fine-tuning", metrics["held_out_base"], weights),
        _row("fine-tuned, PyTorch", plain["measured"]["pytorch"], weights),
    ]
    for suffix, name in (("", "ONNX fp32"), ("-fused", "ONNX fp32, fused graph"), ("-int8", "ONNX int8")):
        path = bundle.with_name(bundle.name + suffix) / "manifest.json"
        if path.is_file():
            manifest = json.loads(path.read_text())
            rows.append(_row(name, manifest["measured"], manifest["files"]["model.onnx"]["size"]))
    report = {
        "environment": diagnose(),
        "run": json.loads((run / "run.json").read_text()),
        "epochs": metrics["epochs"],
        "seconds": metrics["seconds"],
        "rows": rows,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, report)


def _row(name: str, scores: dict[str, Any], size: int) -> dict[str, Any]:
    kept = ("exact_match", "f1", "accuracy", "total", "exact_match_interval", "f1_interval", "accuracy_interval")
    return {"name": name, "size_bytes": size, **{key: scores[key] for key in kept}}


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
