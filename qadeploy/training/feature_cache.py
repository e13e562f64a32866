"""Features kept on disk by what they were made from, so that a second run does not tokenise.

An entry holds the windows and labels of all parts of a run together (train, dev, held out): another
split of the same questions, or another fold, finds it too. Its name is the SHA-256 of everything
that decides on its content: the questions, contexts and answers, the encoder's ``digest``
(tokenizer, configuration, version), ``max_seq_len``, ``doc_stride``, and the code that makes windows,
labels and entries, so that no change to it ever finds what the old one made.

On disk it is a numpy archive of flat arrays and their borders, read without pickle; the archive's own
checksums find damage. A cache is never needed: whatever goes wrong with one is a note, and the
features are made as if it were not there.
"""

from __future__ import annotations

import hashlib
import inspect
import io
import json
import os
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qadeploy import __version__
from qadeploy.core.settings import QaSettings
from qadeploy.core.windows import EncodedText, Encoder
from qadeploy.files import hash_file
from qadeploy.records import Example, IntArray, Window
from qadeploy.training.features import Feature, FeatureSet, make_features

LIMIT_BYTES = 2 * 2**30
_PREFIX = "features-"
_STALE_SECONDS = 24 * 60 * 60
_DIGEST_BYTES = 32
_WINDOW_FIELDS = ("context_begin", "context_length", "context_offset", "null_index")

Arrays = dict[str, NDArray[Any]]
MakeFeatures = Callable[[Sequence[Example], Encoder, QaSettings, str], FeatureSet]


@dataclass(frozen=True, slots=True)
class Part:
    """Examples that become one feature set, and where they come from, for messages."""

    examples: Sequence[Example]
    source: str


@dataclass(frozen=True, slots=True)
class CachedFeatures:
    """A feature set a part, in order. ``found`` is true where they came from the cache."""

    sets: tuple[FeatureSet, ...]
    found: bool


def cache_folder() -> Path | None:
    """``$QADEPLOY_CACHE``, else ``qadeploy`` under ``$XDG_CACHE_HOME``, else under ``~/.cache``; None without a home."""
    own, shared = os.environ.get("QADEPLOY_CACHE"), os.environ.get("XDG_CACHE_HOME", "")
    if own:
        return Path(own)
    if Path(shared).is_absolute():  # the XDG base directory specification: others are to be ignored
        return Path(shared) / "qadeploy"
    try:
        return Path.home() / ".cache" / "qadeploy"
    except RuntimeError:
        return None


def cached_features(
    parts: Sequence[Part],
    encoder: Encoder,
    settings: QaSettings,
    folder: Path | None,
    note: Callable[[str], object],
    *,
    make: MakeFeatures = make_features,
    limit: int = LIMIT_BYTES,
) -> CachedFeatures:
    """The features of each part, equal to ``make``'s, from ``folder`` where they are there, else made and kept there.

    ``folder`` None keeps nothing. ``limit`` is in bytes: the entries used least recently go where all together
    are more. ``note`` gets one line where the cache cannot be read or written. Raises what ``make`` raises.
    """
    if folder is None:
        return CachedFeatures(tuple(make(p.examples, encoder, settings, p.source) for p in parts), found=False)
    digests = _digests(chain.from_iterable(part.examples for part in parts))
    key = _key(digests, encoder, settings)
    path = folder / f"{_PREFIX}{key}.npz"
    try:
        sets = _unpack(_load(path, key), parts, digests, encoder)
    except (FileNotFoundError, NotADirectoryError):
        pass  # nothing kept yet
    except Exception as error:  # a damaged file makes the readers raise anything
        note(f"feature cache: {path} cannot be used ({_line(error)}): features are made anew")
    else:
        with suppress(OSError):
            os.utime(path)  # used last
        return CachedFeatures(tuple(sets), found=True)
    sets = [make(part.examples, encoder, settings, part.source) for part in parts]
    try:
        _store(path, {"key": np.asarray(key), **_pack(sets, digests)}, limit)
    except OSError as error:
        note(f"feature cache: {folder}: {_line(error)}: features are not kept (--no-cache, or set QADEPLOY_CACHE)")
    return CachedFeatures(tuple(sets), found=False)


def _line(error: BaseException) -> str:
    text = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
    return str(text)[:200]


# ---------------------------------------------------------------- keys

Content = tuple[str, str, tuple[tuple[int, int], ...]]


def _content(example: Example) -> Content:
    """What an example's features depend on: not its id, not its split."""
    return example.context, example.question, tuple((a.start, a.end) for a in example.answers)


def _digests(examples: Iterator[Example]) -> dict[Content, bytes]:
    """SHA-256 of each distinct example's content. Contexts repeat, so each is hashed once."""
    contexts: dict[str, str] = {}
    found: dict[Content, bytes] = {}
    for example in examples:
        content = _content(example)
        if content in found:
            continue
        context, question, answers = content
        if context not in contexts:
            # A lone surrogate has no UTF-8; it is the encoder's to refuse, with its own words.
            contexts[context] = hashlib.sha256(context.encode("utf-8", "surrogatepass")).hexdigest()
        found[content] = hashlib.sha256(json.dumps((contexts[context], question, answers)).encode()).digest()
    return found


def _key(digests: dict[Content, bytes], encoder: Encoder, settings: QaSettings) -> str:
    known = (__version__, *_code(), encoder.digest, settings.max_seq_len, settings.doc_stride)
    digest = hashlib.sha256(json.dumps(known).encode())
    for one in sorted(digests.values()):
        digest.update(one)
    return digest.hexdigest()


@cache
def _code() -> tuple[str, ...]:
    """SHA-256 of the modules that decide on an entry; where they are no files of their own, the version has to do."""
    try:
        return tuple(hash_file(Path(inspect.getfile(what))) for what in (_key, make_features, Encoder, Window))
    except OSError:
        return ()


# ---------------------------------------------------------------- feature sets to arrays and back


def _pack(sets: Sequence[FeatureSet], digests: dict[Content, bytes]) -> Arrays:
    """Every distinct example once, in order of its digest; rows ``borders[i] : borders[i + 1]`` are those of item ``i``."""
    places: dict[bytes, tuple[FeatureSet, int]] = {}
    for features in sets:
        for number, example in enumerate(features.examples):
            places.setdefault(digests[_content(example)], (features, number))
    contexts: dict[str, int] = {}
    encoded: list[EncodedText] = []
    context_of: list[int] = []
    groups: list[Sequence[Feature]] = []
    for digest in sorted(places):
        features, number = places[digest]
        context = features.contexts[number]
        if context.text not in contexts:
            contexts[context.text] = len(encoded)
            encoded.append(context)
        context_of.append(contexts[context.text])
        groups.append(features.features[features.first[number] : features.first[number + 1]])
    made = list(chain.from_iterable(groups))
    windows = [f.window for f in made]
    return {
        "digests": np.frombuffer(b"".join(sorted(places)), dtype=np.uint8).reshape(-1, _DIGEST_BYTES),
        "example_borders": _borders(groups),
        "example_contexts": np.asarray(context_of),
        "window_borders": _borders(windows),
        "window_ids": _flat([w.input_ids for w in windows]),
        "window_types": _flat([w.token_type_ids for w in windows if w.token_type_ids is not None]),
        "window_fields": np.asarray([[getattr(w, f) for f in _WINDOW_FIELDS] for w in windows]),
        "label_borders": _borders([f.positions for f in made]),
        "labels": _flat([f.positions for f in made], 2),
        "context_borders": _borders(encoded),
        "context_ids": _flat([c.ids for c in encoded]),
        "context_offsets": _flat([c.offsets for c in encoded], 2),
    }


def _borders(items: Sequence[Any]) -> NDArray[Any]:
    return np.cumsum([0, *(len(item) for item in items)])


def _flat(items: Sequence[IntArray], *width: int) -> NDArray[Any]:
    """All rows in one array, in the smallest type that holds them."""
    flat = np.concatenate([np.zeros((0, *width), dtype=np.int64), *items])
    return flat.astype(np.min_scalar_type(int(flat.max(initial=0))))


def _unpack(arrays: Arrays, parts: Sequence[Part], digests: dict[Content, bytes], encoder: Encoder) -> list[FeatureSet]:
    """The parts' feature sets, of arrays that ``_pack`` made of the same examples."""
    rows = {digest.tobytes(): row for row, digest in enumerate(arrays["digests"])}
    ids, types, labels = (arrays[name].astype(np.int64) for name in ("window_ids", "window_types", "labels"))
    features = [
        Feature(Window(ids[a:b], types[a:b] if len(types) else None, *fields), labels[c:d])
        for (a, b), (c, d), fields in zip(
            pairwise(arrays["window_borders"].tolist()),
            pairwise(arrays["label_borders"].tolist()),
            arrays["window_fields"].tolist(),
            strict=True,
        )
    ]
    groups = [features[a:b] for a, b in pairwise(arrays["example_borders"].tolist())]
    tokens, offsets = arrays["context_ids"].astype(np.int64), arrays["context_offsets"].astype(np.int64)
    spans = list(pairwise(arrays["context_borders"].tolist()))
    context_of = arrays["example_contexts"].tolist()
    encoded: dict[int, EncodedText] = {}
    sets = []
    for part in parts:
        found = [rows[digests[_content(example)]] for example in part.examples]
        for row, example in zip(found, part.examples, strict=True):
            if context_of[row] not in encoded:
                a, b = spans[context_of[row]]
                encoded[context_of[row]] = encoder.restore(example.context, tokens[a:b], offsets[a:b])
        chosen = [groups[row] for row in found]
        sets.append(
            FeatureSet(
                tuple(part.examples),
                tuple(encoded[context_of[row]] for row in found),
                tuple(chain.from_iterable(chosen)),
                tuple(_borders(chosen).tolist()),
            )
        )
    return sets


# ---------------------------------------------------------------- files


def _load(path: Path, key: str) -> Arrays:
    """The arrays of an entry. Raises FileNotFoundError where there is none, other errors where it is not a sound one."""
    # Member by member, because reading one to its end is what checks its CRC; numpy stops where a header says.
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    arrays = {
        name.removesuffix(".npy"): np.load(io.BytesIO(content), allow_pickle=False) for name, content in members.items()
    }
    if str(arrays["key"]) != key:
        raise ValueError("it is a copy of another entry")
    return arrays


def _store(path: Path, arrays: Arrays, limit: int) -> None:
    """Writes an entry so that nobody ever reads half of one, then drops what is over ``limit``. Raises OSError."""
    size = sum(array.nbytes for array in arrays.values())
    if size > limit:
        raise OSError(f"they take {size / 2**20:.0f} MiB, and the cache holds at most {limit / 2**20:.0f}")
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    # A name of its own for each writer, on whatever machine. Not flushed to the disk: damage is found on reading.
    descriptor, temporary = tempfile.mkstemp(prefix=_PREFIX, suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            np.savez(stream, allow_pickle=False, **arrays)
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise
    _drop_oldest(path, limit)


def _drop_oldest(newest: Path, limit: int) -> None:
    """Deletes what a killed writer left, and the entries used least recently until all are at most ``limit`` bytes."""
    entries = []
    for path in newest.parent.glob(f"{_PREFIX}*"):
        with suppress(OSError):  # another process may drop it first
            status = path.stat()
            if path.suffix == ".npz":
                entries.append((path == newest, status.st_mtime_ns, status.st_size, path))
            elif path.suffix == ".tmp" and status.st_mtime < time.time() - _STALE_SECONDS:
                path.unlink()
    total = sum(size for _, _, size, _ in entries)
    for is_newest, _, size, path in sorted(entries):
        if total <= limit or is_newest:
            return
        with suppress(OSError):
            path.unlink()
        total -= size
