"""A cache of features on disk, keyed by their inputs, so that a second run on the same data does not tokenise.

An entry holds the windows and labels of a run's train, dev and held-out sets together, so that another split of the same
questions, or another fold, finds it too. Its name is the SHA-256 of everything that determines its content: the questions,
contexts and answers, the encoder's ``digest`` (tokenizer, configuration, version), ``max_seq_len``, ``doc_stride``, and the
code that makes windows, labels and entries, so that changed code never finds an old entry.

On disk it is a numpy archive of flat arrays, read without pickle; the archive's own checksums find damage. The cache is
optional: if it cannot be read or written, a note says so, and the features are made without it.
"""

from __future__ import annotations

import hashlib
import inspect
import io
import json
import os
import re
import zipfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from itertools import chain, pairwise
from pathlib import Path

import numpy as np

from qadeploy import __version__
from qadeploy.core.encoded_text import EncodedText
from qadeploy.core.settings import QaSettings
from qadeploy.core.windows import Encoder
from qadeploy.data.loading import DataSet
from qadeploy.errors import one_line
from qadeploy.files import hash_file, sweep, writing
from qadeploy.records import Example, Window
from qadeploy.training.features import (
    Arrays,
    FeatureSet,
    borders,
    flat,
    make_features,
    pack_features,
    unpack_features,
)

LIMIT_BYTES = 2 * 2**30
_PREFIX = "features-"
_ENTRY = re.compile(_PREFIX + "[0-9a-f]{64}\\.npz")  # other files in the folder are not ours to delete
_DIGEST_BYTES = 32

MakeFeatures = Callable[[Sequence[Example], Encoder, QaSettings, str], FeatureSet]


@dataclass(frozen=True, slots=True)
class CachedFeatures:
    """Feature sets in the order of their data sets, and whether they came from the cache."""

    sets: tuple[FeatureSet, ...]
    found: bool


def cached_features(
    data: Sequence[DataSet],
    encoder: Encoder,
    settings: QaSettings,
    folder: Path | None,
    note: Callable[[str], object],
    *,
    make: MakeFeatures = make_features,
    limit: int = LIMIT_BYTES,
) -> CachedFeatures:
    """The features of each data set, read from the cache if it has them, otherwise made by ``make`` and stored.

    Args:
        data: The data sets.
        encoder: Cuts the windows.
        settings: Gives the length and overlap of windows.
        folder: Where entries are stored; None stores nothing.
        note: Called with one line if the cache cannot be read or written.
        make: Makes the features. Its errors are passed on.
        limit: The maximum bytes of all entries; those used least recently are deleted.
    """
    if folder is None:
        return CachedFeatures(tuple(make(d.examples, encoder, settings, d.source) for d in data), found=False)
    digests = _digests(data)
    key = _key(digests, encoder, settings)
    path = folder / f"{_PREFIX}{key}.npz"
    try:
        sets = _unpack(_load(path, key), data, digests, encoder)
    except (FileNotFoundError, NotADirectoryError):
        pass  # nothing kept yet
    except Exception as error:  # a damaged file makes the readers raise anything
        note(f"feature cache: {path} cannot be used ({_reason(error)}): features are made again")
    else:
        with suppress(OSError):
            os.utime(path)  # marks it as used last
        return CachedFeatures(tuple(sets), found=True)
    sets = [make(d.examples, encoder, settings, d.source) for d in data]
    try:
        _store(path, {"key": np.asarray(key), **_pack(sets, digests)}, limit)
    except OSError as error:
        note(f"feature cache: {folder}: {_reason(error)}: features are not stored (--no-cache, or set QADEPLOY_CACHE)")
    return CachedFeatures(tuple(sets), found=False)


def _reason(error: BaseException) -> str:
    return str(getattr(error, "strerror", None) or one_line(error))[:200]


# ---------------------------------------------------------------- keys


def _digests(data: Sequence[DataSet]) -> list[list[bytes]]:
    """For each data set, the SHA-256 of what each example's features depend on; its id and its split do not matter."""

    @cache  # contexts repeat
    def of_context(context: str) -> str:
        # A lone surrogate has no UTF-8; the encoder refuses it with a clear message.
        return hashlib.sha256(context.encode("utf-8", "surrogatepass")).hexdigest()

    def of(example: Example) -> bytes:
        content = of_context(example.context), example.question, [(a.start, a.end) for a in example.answers]
        return hashlib.sha256(json.dumps(content).encode()).digest()

    return [[of(example) for example in one.examples] for one in data]


def _key(digests: Sequence[Sequence[bytes]], encoder: Encoder, settings: QaSettings) -> str:
    known = (__version__, *_code(), encoder.digest, *settings.lengths.values())
    digest = hashlib.sha256(json.dumps(known).encode())
    for one in sorted({*chain.from_iterable(digests)}):
        digest.update(one)
    return digest.hexdigest()


@cache
def _code() -> tuple[str, ...]:
    """SHA-256 of the modules that determine an entry; empty if they are not files, so that only the version counts."""
    try:
        return tuple(hash_file(Path(inspect.getfile(what))) for what in (_key, make_features, Encoder, Window))
    except OSError:
        return ()


# ---------------------------------------------------------------- feature sets to arrays and back


def _pack(sets: Sequence[FeatureSet], digests: Sequence[Sequence[bytes]]) -> Arrays:
    """The arrays of an entry: every distinct example once, in the order of the digests."""
    places: dict[bytes, tuple[FeatureSet, int]] = {}
    for features, own in zip(sets, digests, strict=True):
        for number, digest in enumerate(own):
            places.setdefault(digest, (features, number))
    chosen = [places[digest] for digest in sorted(places)]
    groups = [features.features[features.first[i] : features.first[i + 1]] for features, i in chosen]
    contexts = [features.contexts[i] for features, i in chosen]
    encoded = {context.text: context for context in contexts}
    numbers = {text: number for number, text in enumerate(encoded)}
    return {
        "digests": np.frombuffer(b"".join(sorted(places)), dtype=np.uint8).reshape(-1, _DIGEST_BYTES),
        "example_borders": borders(groups),
        "example_contexts": np.asarray([numbers[context.text] for context in contexts]),
        **pack_features(list(chain.from_iterable(groups))),
        "context_borders": borders(list(encoded.values())),
        "context_ids": flat([c.ids for c in encoded.values()]),
        "context_offsets": flat([c.offsets for c in encoded.values()], 2),
    }


def _unpack(
    arrays: Arrays, data: Sequence[DataSet], digests: Sequence[Sequence[bytes]], encoder: Encoder
) -> list[FeatureSet]:
    """The feature sets of the data sets, from arrays that ``_pack`` made of the same examples."""
    rows = {digest.tobytes(): row for row, digest in enumerate(arrays["digests"])}
    features = unpack_features(arrays)
    groups = [features[a:b] for a, b in pairwise(arrays["example_borders"].tolist())]
    tokens, offsets = arrays["context_ids"].astype(np.int64), arrays["context_offsets"].astype(np.int64)
    spans = list(pairwise(arrays["context_borders"].tolist()))
    context_of = arrays["example_contexts"].tolist()
    encoded: dict[int, EncodedText] = {}
    sets = []
    for one, own in zip(data, digests, strict=True):
        found = [rows[digest] for digest in own]
        for row, example in zip(found, one.examples, strict=True):
            if context_of[row] not in encoded:
                a, b = spans[context_of[row]]
                encoded[context_of[row]] = encoder.restore(example.context, tokens[a:b], offsets[a:b])
        chosen = [groups[row] for row in found]
        contexts = tuple(encoded[context_of[row]] for row in found)
        sets.append(
            FeatureSet(one.examples, contexts, tuple(chain.from_iterable(chosen)), tuple(borders(chosen).tolist()))
        )
    return sets


# ---------------------------------------------------------------- files


def _load(path: Path, key: str) -> Arrays:
    """The arrays of an entry. Raises FileNotFoundError if there is none, other errors if it is damaged."""
    # Reading a whole member checks its CRC; numpy would stop at the length in the header and skip the check.
    with zipfile.ZipFile(path) as archive:
        arrays = {
            name.removesuffix(".npy"): np.load(io.BytesIO(archive.read(name)), allow_pickle=False)
            for name in archive.namelist()
        }
    if str(arrays["key"]) != key:
        raise ValueError("it is a copy of another entry")
    return arrays


def _store(path: Path, arrays: Arrays, limit: int) -> None:
    """Writes an entry atomically, then deletes the oldest beyond ``limit`` bytes. Raises OSError."""
    size = sum(array.nbytes for array in arrays.values())
    if size > limit:
        raise OSError(f"they take {size / 2**20:.0f} MiB, and the cache holds at most {limit / 2**20:.0f}")
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    sweep(path.parent)
    with writing(path) as stream:
        np.savez(stream, allow_pickle=False, **arrays)
    _drop_oldest(path, limit)


def _drop_oldest(newest: Path, limit: int) -> None:
    """Deletes the least recently used entries beyond ``limit`` bytes in total."""
    entries = []
    for path in filter(lambda path: _ENTRY.fullmatch(path.name), newest.parent.iterdir()):
        with suppress(OSError):  # another process may drop it first
            status = path.stat()
            entries.append((path == newest, status.st_mtime_ns, status.st_size, path))
    total = sum(size for _, _, size, _ in entries)
    for is_newest, _, size, path in sorted(entries):
        if total <= limit or is_newest:
            return
        with suppress(OSError):
            path.unlink()
        total -= size
