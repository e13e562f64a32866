"""How a model is run on a CPU: the session settings that a bundle stores, and the rule for the rest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qadeploy.errors import BundleError

# The share of a run's work that all threads of a wide session do side by side (Amdahl 1967): an estimate, which
# benchmarks/layout.py measures for a bundle on a quiet machine. With two threads any share gives the same choice.
PARALLEL_SHARE = 0.8


@dataclass(frozen=True, slots=True)
class SessionSettings:
    """What a manifest's ``session`` entry says; all of it was measured on a CPU and holds there only.

    ``disabled_optimizers``: ONNX Runtime's graph optimizers to leave out. ``config``: entries for
    ``SessionOptions.add_session_config_entry``. ``one``: how the windows of one question run, ``wide`` (one after
    another on all threads) or ``narrow`` (side by side on one thread each); None goes by ``narrow_windows``. With
    ``threads`` it holds with so many threads only, those that it was measured with.
    """

    disabled_optimizers: tuple[str, ...] = ()
    config: Mapping[str, str] = field(default_factory=dict)
    one: str | None = None
    threads: int | None = None

    @classmethod
    def from_manifest(cls, values: object) -> SessionSettings:
        """Reads ``{"disabled_optimizers": [...], "config": {...}, "layout": {"one": ..., "threads": ...}}``; any may be missing.

        Other keys are ignored. Raises BundleError on values of a wrong kind.
        """
        stored = _mapping({} if values is None else values, "session")
        names = stored.get("disabled_optimizers", [])
        if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
            raise _wrong("disabled_optimizers", names, "a list of names")
        config = _mapping(stored.get("config", {}), "config")
        if not all(isinstance(text, str) for entry in config.items() for text in entry):
            raise _wrong("config", config, "texts by name")
        layout = _mapping(stored.get("layout", {}), "layout")
        one, threads = layout.get("one"), layout.get("threads")
        if one not in {None, "wide", "narrow"}:
            raise _wrong("layout.one", one, "wide or narrow")
        if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or threads < 1):
            raise _wrong("layout.threads", threads, "a positive whole number")
        return cls(tuple(names), dict(config), one, threads)

    def narrow_windows(self, windows: int, threads: int) -> int:
        """How many of one question's windows run side by side on one thread each; the others run wide, one by one.

        As many as fill all threads in full rounds. Those left over would leave threads idle: they
        run wide where that is sooner than one more round. With s = 1 / (1 - p + p / threads), the speedup of a
        wide run (Amdahl's law, p = ``PARALLEL_SHARE``), r windows take r / s of a narrow run's time.
        """
        if self.one is not None and self.threads in {None, threads}:
            return windows if self.one == "narrow" else 0
        rest = windows % threads
        speedup = 1 / (1 - PARALLEL_SHARE + PARALLEL_SHARE / threads)
        return windows - rest if rest < speedup else windows


def _mapping(value: object, name: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise _wrong(name, value, "an object")
    return value


def _wrong(name: str, value: object, needed: str) -> BundleError:
    return BundleError(
        f"manifest.json: {name} of the session settings is {value!r}, {needed} is needed: export the bundle again"
    )
