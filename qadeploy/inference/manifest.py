"""What a manifest may contain: types and ranges of all entries that the code acts on, checked when a bundle is opened.

A manifest is untrusted input. Entries that are not described here are kept for people and never acted on.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from qadeploy.core.drift import Distribution, Figure
from qadeploy.core.settings import QaSettings
from qadeploy.core.windows import EncoderConfig
from qadeploy.errors import BundleError, InputError
from qadeploy.records import LOGIT_NAMES

SCHEMA = 1
# What a bundle may pass to ONNX Runtime. Other entries write or read files, with which a bundle's author could run code.
CONFIG = {"session.intra_op.allow_spinning": ("0", "1"), "session.set_denormal_as_zero": ("0", "1")}
_OPTIMIZER = re.compile(r"[A-Za-z]\w{0,99}")
_SHA256 = re.compile("[0-9a-f]{64}")
_LONGEST = 2**20  # tokens; no model reads more in one window
_COUNT = range(2**31)
_MOST_BUCKETS = 100


@dataclass(frozen=True, slots=True)
class SessionSettings:
    """The ``session`` entry of a manifest. It was measured on a CPU and is used on CPUs only.

    Attributes:
        disabled_optimizers: ONNX Runtime's graph optimizers to leave out.
        config: Entries for ``SessionOptions.add_session_config_entry``, only those in ``CONFIG``.
        one: How the windows of one question run: ``wide`` (one after another on all threads) or ``narrow`` (side by side on one
            thread each); None follows the rule of ``session.narrow_windows``.
        threads: The number of threads that ``one`` was measured with and is used for; None means any.
    """

    disabled_optimizers: tuple[str, ...] = ()
    config: Mapping[str, str] = field(default_factory=dict)
    one: str | None = None
    threads: int | None = None

    @classmethod
    def from_manifest(cls, values: object) -> SessionSettings:
        """Reads ``{"disabled_optimizers": [...], "config": {...}, "layout": {"one": ..., "threads": ...}}``.

        Every key may be missing; unknown keys are ignored. Raises InputError on a value of the wrong type, or an entry of
        ``config`` that is not in ``CONFIG``.
        """
        stored = _mapping({} if values is None else values, "session")
        names = stored.get("disabled_optimizers", [])
        if not _is_list(names, lambda name: isinstance(name, str) and _OPTIMIZER.fullmatch(name) is not None):
            raise _wrong("session.disabled_optimizers", names, "a list of names")
        config = _mapping(stored.get("config", {}), "session.config")
        for name, value in config.items():
            if not isinstance(value, str) or value not in CONFIG.get(name, ()):
                raise InputError(
                    f"the session settings set {name!r} to {value!r}, which qadeploy does not pass on: a bundle may only "
                    f"set {', '.join(CONFIG)}, to 0 or 1"
                )
        layout = _mapping(stored.get("layout", {}), "session.layout")
        one, threads = layout.get("one"), layout.get("threads")
        if not (one is None or (isinstance(one, str) and one in {"wide", "narrow"})):
            raise _wrong("session.layout.one", one, "wide or narrow")
        if threads is not None and (not _is_count(threads) or threads < 1):
            raise _wrong("session.layout.threads", threads, "a positive whole number")
        return cls(tuple(names), dict(config), one, threads)


@dataclass(frozen=True, slots=True)
class Entry:
    """The size in bytes and the SHA-256 of one file of a bundle."""

    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Probe:
    """One question with the logits that the model gave when the bundle was made, to detect a wrong or broken model.

    Attributes:
        question: The question.
        context: The context; both fit in one window.
        input_ids: The tokens of that window.
        start_logits: The start logit of each token.
        end_logits: The end logit of each token.
    """

    question: str
    context: str
    input_ids: tuple[int, ...]
    start_logits: tuple[float, ...]
    end_logits: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Manifest:
    """The entries of a manifest that decide how a bundle is used.

    Attributes:
        precision: ``fp32``, ``fp16`` or ``int8``.
        encoder: How texts become windows.
        settings: How windows become answers.
        session: How the model runs on a CPU.
        files: The files of the bundle by name.
        in_graph: What the graph does besides the model: ``spans``, ``text`` or empty.
        probe: The logits of one question, if the bundle has any.
        drift: The figures of the held-out questions; empty if the bundle has none.
    """

    precision: str
    encoder: EncoderConfig
    settings: QaSettings
    session: SessionSettings
    files: Mapping[str, Entry]
    in_graph: str
    probe: Probe | None
    drift: Mapping[Figure, Distribution]


def parse_json(text: str) -> Any:
    """Reads JSON, refusing NaN, infinities and numbers too large for a float. Raises ValueError, RecursionError."""

    def number(digits: str) -> float:
        value = float(digits)
        if not math.isfinite(value):
            raise ValueError(f"the number {digits[:40]} is out of range")
        return value

    def constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is no JSON value")

    return json.loads(text, parse_float=number, parse_constant=constant)


def read_manifest(values: Mapping[str, Any], where: str) -> Manifest:
    """Checks a manifest, entry by entry.

    Args:
        values: The manifest.
        where: Its path, for messages.

    Raises:
        BundleError: An entry is missing or wrong; the message names it.
    """
    try:
        _check_others(values)
        return Manifest(
            precision=_precision(values.get("precision")),
            encoder=_encoder(values.get("encoder")),
            settings=_settings(values.get("settings")),
            session=SessionSettings.from_manifest(values.get("session")),
            files=_files(values.get("files")),
            in_graph=_in_graph(values),
            probe=_probe(values.get("probe")),
            drift=_drift(values.get("drift")),
        )
    except InputError as error:
        raise BundleError(f"{where}: {error}: export the bundle again") from error


def _precision(value: object) -> str:
    if not isinstance(value, str) or value not in {"fp32", "fp16", "int8"}:
        raise _wrong("precision", value, "fp32, fp16 or int8")
    return value


def _encoder(values: object) -> EncoderConfig:
    try:
        found = EncoderConfig.from_dict(_mapping(values, "encoder"))
    except KeyError as error:
        raise InputError(f"encoder has no {error.args[0]}") from error
    except TypeError as error:
        raise InputError(str(error)) from error
    for name, most in (("segments", 256), ("position_limit", _LONGEST), ("pad_token_id", _COUNT[-1])):
        if getattr(found, name) > most:
            raise _wrong(f"encoder.{name}", getattr(found, name), f"at most {most}")
    return found


def _settings(values: object) -> QaSettings:
    found = QaSettings.from_dict(_mapping(values, "settings"), "settings")
    for name in ("max_seq_len", "doc_stride", "max_answer_len", "long_seq_len"):
        if (getattr(found, name) or 0) > _LONGEST:
            raise _wrong(f"settings.{name}", getattr(found, name), f"at most {_LONGEST}")
    return found


def _in_graph(values: Mapping[str, Any]) -> str:
    if "in_graph" not in values:
        return ""
    inside = _mapping(values["in_graph"], "in_graph")
    if inside.get("kind") not in ("spans", "text"):
        raise _wrong("in_graph.kind", inside.get("kind"), "spans or text")
    if inside["kind"] == "spans" and not _is_count(inside.get("k")):
        raise _wrong("in_graph.k", inside.get("k"), "a whole number")
    source = _mapping(values.get("made", {}), "made").get("from")
    if not _is_name(source):
        raise _wrong("made.from", source, "a name")
    return str(inside["kind"])


def _check_others(values: Mapping[str, Any]) -> None:
    """Checks the entries that code reads from ``Bundle.manifest``, because ``Manifest`` does not have them."""
    for name in ("machine", "exported_on"):
        entry = _mapping({} if values.get(name) is None else values[name], name)
        if not _is_list(entry.get("instruction_sets", []), _is_name):
            raise _wrong(f"{name}.instruction_sets", entry["instruction_sets"], "a list of names")
    if not _is_list(values.get("inputs", []), _is_name):
        raise _wrong("inputs", values["inputs"], "a list of names")
    _mapping(values.get("made", {}), "made")


def _files(values: object) -> dict[str, Entry]:
    entries = {}
    for name, value in _mapping(values, "files").items():
        entry = _mapping(value, f"files.{name}")
        size: Any = entry.get("size")
        digest = entry.get("sha256")
        if not _is_count(size, range(2**63)):
            raise _wrong(f"files.{name}.size", size, "a whole number of bytes")
        if not isinstance(digest, str) or not _SHA256.fullmatch(digest):
            raise _wrong(f"files.{name}.sha256", digest, "64 hexadecimal digits")
        entries[name] = Entry(size, digest)
    return entries


def _probe(values: object) -> Probe | None:
    if values is None:
        return None
    probe = _mapping(values, "probe")
    question, context = (probe.get(name) for name in ("question", "context"))
    if not (isinstance(question, str) and isinstance(context, str) and question.strip() and context.strip()):
        raise _wrong("probe", sorted(probe), "a question and a context with their tokens and logits")
    ids: Any = probe.get("input_ids")
    if not _is_list(ids, _is_count) or not 0 < len(ids) <= 512:
        raise _wrong("probe.input_ids", ids, "a list of token ids")
    both: list[Any] = [probe.get(name) for name in LOGIT_NAMES]
    for name, logits in zip(LOGIT_NAMES, both, strict=True):
        if not _is_list(logits, _is_number) or len(logits) != len(ids):
            raise _wrong(f"probe.{name}", logits, f"a list of {len(ids)} numbers")
    return Probe(question, context, tuple(ids), *(tuple(map(float, logits)) for logits in both))


def _drift(values: object) -> dict[Figure, Distribution]:
    """The distributions that this version knows; bundles of later versions may have more."""
    stored = _mapping({} if values is None else values, "drift")
    found = {}
    for figure in (figure for figure in Figure if figure in stored):
        name = f"drift.{figure}"
        entry = _mapping(stored[figure], name)
        bounds: Any = entry.get("bounds")
        counts: Any = entry.get("counts")
        if not _is_list(bounds, _is_number) or not 0 < len(bounds) <= _MOST_BUCKETS or sorted(set(bounds)) != [*bounds]:
            raise _wrong(f"{name}.bounds", bounds, "an ascending list of numbers")
        if not _is_list(counts, _is_count) or len(counts) != len(bounds) + 1 or not any(counts):
            raise _wrong(f"{name}.counts", counts, f"a list of {len(bounds) + 1} numbers of questions, not all 0")
        found[figure] = Distribution(tuple(map(float, bounds)), tuple(counts))
    return found


def _is_list(value: object, fits: Callable[[Any], bool]) -> bool:
    return isinstance(value, list | tuple) and all(map(fits, value))


def _is_count(value: object, within: range = _COUNT) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value in within


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9


def _is_name(value: object) -> bool:
    return isinstance(value, str) and 0 < len(value) <= 300 and value.isprintable()


def _mapping(value: object, name: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise _wrong(name, value, "an object")
    return value


def _wrong(name: str, value: object, needed: str) -> InputError:
    shown = repr(value)
    shown = shown if len(shown) <= 80 else f"{shown[:80]}..."
    return InputError(f"{name} must be {needed}, not {shown}")
