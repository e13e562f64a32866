"""The bundles that are benched, through ``Answerer``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qadeploy.bench.options import BenchOptions
from qadeploy.bench.variant import Asker, Variant, around
from qadeploy.errors import FailureError, InputError
from qadeploy.inference.answerer import Answerer
from qadeploy.inference.bundle import Bundle, open_bundle


def open_bundles(paths: Sequence[str | Path]) -> tuple[list[Bundle], dict[str, FailureError]]:
    """The bundles that can be opened, and the errors of the others by name.

    Raises InputError if a folder does not exist or is named twice, BundleError if the first bundle, to which peers
    and limits refer, cannot be opened.
    """
    folders = [Path(p) for p in paths]
    for number, folder in enumerate(folders):
        if folder.resolve() in {other.resolve() for other in folders[:number]}:
            raise InputError(f"{folder}: is named twice: name each bundle once")
    found, broken = [], {}
    for number, folder in enumerate(folders):
        try:
            found.append(open_bundle(folder))
        except FailureError as error:
            if number == 0:
                raise
            broken[f"qadeploy ({folder})"] = error
    return found, broken


def variants(bundles: Sequence[Bundle], options: BenchOptions, allow_no_answer: bool) -> list[Variant]:
    """The bundles as variants, each with a name of its own."""
    names = [bundle.folder.resolve().name for bundle in bundles]
    found = []
    for bundle, name in zip(bundles, names, strict=True):
        shown = name if names.count(name) == 1 else str(bundle.folder)
        arguments = {"path": str(bundle.folder), "allow_no_answer": allow_no_answer}
        arguments |= {each: getattr(options, each) for each in ("device", "threads", "load_timeout")}
        title = f"qadeploy {bundle.precision} ({shown})"
        found.append(Variant(title, bundle.precision, bundle.model_bytes, "qadeploy.bench.own:load", arguments))
    return found


def load(path: str, device: str, threads: int | None, load_timeout: float, allow_no_answer: bool) -> Asker:
    """A bundle as a service loads it, without a context cache. Raises what ``Answerer.load`` raises."""
    answerer = Answerer.load(path, device=device, threads=threads, context_cache_bytes=0, load_timeout=load_timeout)
    return around(answerer, allow_no_answer)
