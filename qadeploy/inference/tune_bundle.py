"""Tunes a bundle to this machine: measures its session settings and stores the best ones in its manifest."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from qadeploy import options
from qadeploy.data.fields import DataOptions
from qadeploy.data.loading import read_split
from qadeploy.errors import InputError, MachineWarning
from qadeploy.inference.answerer import Answerer
from qadeploy.inference.bundle import MODEL, Bundle, open_bundle, rewrite_manifest
from qadeploy.inference.hub import is_hub
from qadeploy.inference.load_timeout import within
from qadeploy.inference.manifest import SessionSettings
from qadeploy.inference.session import OnnxModel, onnxruntime
from qadeploy.inference.tuning import FP32_TOLERANCE, Tuning, model_of, tune
from qadeploy.machine import machine, saturation_warning
from qadeploy.options import check, option


@dataclass(frozen=True, slots=True)
class TuneOptions:
    """How a bundle is tuned."""

    target: Literal["latency", "throughput"] = option(
        "latency", "What to optimise for: one question at a time, or many at once."
    )
    data: str = option("handbook", "Questions to measure with, in any format that train reads.")
    threads: int | None = options.threads()
    load_timeout: float = options.load_timeout()
    dry_run: bool = option(False, "Measure and print only.")
    columns: str | None = options.columns()


@dataclass(frozen=True, slots=True)
class TunedBundle:
    """A bundle and the settings found for it.

    Attributes:
        bundle: Its folder, as given.
        tuning: The measurements and the settings found.
        entries: The entries ``machine`` and ``tuning`` of its manifest.
        written: Whether the settings and entries were stored.
        remedy: What to do if its int8 matmuls may saturate on this machine, "" if they cannot.
    """

    bundle: str
    tuning: Tuning
    entries: Mapping[str, Any]
    written: bool
    remedy: str

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        found = self.tuning
        return {
            "bundle": self.bundle,
            "written": self.written,
            "changed": found.changed,
            "before": found.before,
            "session": found.session,
            "remedy": self.remedy or None,
            **self.entries,
        }

    def lines(self) -> list[str]:
        """The measurements and the outcome as text."""
        found = self.tuning
        outcome = "settings changed to" if found.changed else "nothing is clearly faster, the settings stay"
        return [
            *found.lines(),
            f"logits moved by at most {found.logits_apart:.1e}, up to {found.tolerance:.1e} is allowed",
            f"{Path(self.bundle)}: {outcome} {found.session or 'the defaults'}",
            *([] if self.written else ["dry run: nothing was written"]),
        ]


def tune_bundle(folder: str, chosen: TuneOptions, say: Callable[[str], object] = lambda _: None) -> TunedBundle:
    """Measures a bundle's session settings on this machine's CPU and stores the best ones in it.

    Args:
        folder: The bundle.
        chosen: How to measure.
        say: Called with each line of progress.

    Raises:
        InputError: The folder that holds the bundle is not writable, or the questions cannot be used or are too few.
        BundleError: The bundle is damaged.
        LoadTimeoutError: The bundle takes too long to load.
    """
    check(chosen)
    if is_hub(folder) and not chosen.dry_run:
        raise InputError(f"{folder}: is on the hub: download it to a folder first, or give --dry-run")
    examples = read_split(chosen.data, "all", DataOptions(columns=chosen.columns), say, annotated=False)
    pairs = [(e.question, e.context) for e in examples]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MachineWarning)  # it advises to tune the bundle
        loaded = Answerer.load(folder, device="cpu", threads=chosen.threads, load_timeout=chosen.load_timeout)
    bundle = loaded.bundle or open_bundle(folder)
    if not chosen.dry_run and not os.access(bundle.folder.resolve().parent, os.W_OK):
        raise InputError(
            f"{folder}: the folder that holds it is not writable: copy the bundle first, or give --dry-run"
        )
    model = bundle.read(MODEL)

    def make(session: Mapping[str, Any]) -> Answerer:
        pad = bundle.encoder.pad_token_id
        settings = SessionSettings.from_manifest(session)
        load = partial(
            OnnxModel, lambda: model, device="cpu", threads=chosen.threads, pad_token_id=pad, settings=settings
        )
        return Answerer(loaded.encoder, loaded.settings, within(chosen.load_timeout, load, folder))

    stored, tolerance = bundle.manifest.get("session"), _tolerance(bundle)
    found = tune(make, pairs, stored, target=chosen.target, tolerance=tolerance, say=say)
    exported_on = bundle.manifest.get("exported_on") or bundle.manifest.get("machine")
    entries = {
        "machine": machine().to_dict(threads=model_of(loaded).threads, onnxruntime=onnxruntime().__version__),
        "tuning": {"date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "data": chosen.data, **found.to_dict()},
    }
    if not chosen.dry_run:
        rewrite_manifest(bundle, {"session": found.session, **entries, "exported_on": exported_on})
    return TunedBundle(folder, found, entries, not chosen.dry_run, saturation_warning(bundle.manifest))


def _tolerance(bundle: Bundle) -> float:
    """The largest change of a logit allowed: rounding in another order may move int8 logits as far as int8 itself did."""
    if bundle.precision == "fp32":
        return FP32_TOLERANCE
    return max(FP32_TOLERANCE, float(bundle.manifest.get("parity", {}).get("max_abs_diff", 0.0)))
