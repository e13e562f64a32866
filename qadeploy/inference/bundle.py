"""The bundle: one folder with everything an answer needs, and proof of what it is.

    manifest.json    schema, settings, encoder, measurements, the SHA-256 and size of every file, and its own
    model.onnx       the graph, weights inside
    tokenizer.json   the fast tokenizer
    README.md        the model card

A bundle is written into a hidden folder beside its place, flushed, and renamed, the manifest last;
so a folder of that name is whole. Loading checks the very bytes that it uses, and
refuses unknown versions, missing, additional or changed files, links, paths, and external data.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qadeploy.core.settings import QaSettings
from qadeploy.core.windows import EncoderConfig
from qadeploy.errors import BundleError, InputError
from qadeploy.files import hash_file, replace_folder, write_text

SCHEMA = 1
MANIFEST = "manifest.json"
MODEL = "model.onnx"
TOKENIZER = "tokenizer.json"
CARD = "README.md"
_REQUIRED = (MODEL, TOKENIZER, CARD)
_SELF = ',\n  "manifest_sha256": "'


@dataclass(frozen=True, slots=True)
class Bundle:
    """A verified manifest. ``read`` gives a file's bytes, checked against it once more."""

    folder: Path
    manifest: dict[str, Any]
    encoder: EncoderConfig
    settings: QaSettings

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.name

    @property
    def precision(self) -> str:
        """``fp32``, ``fp16`` or ``int8``."""
        return str(self.manifest["precision"])

    @property
    def hash(self) -> str:
        """SHA-256 over the manifest, which holds the hashes of all files: names this very bundle."""
        return hash_file(self.folder / MANIFEST)

    @property
    def in_graph(self) -> str:
        """What its graph does beside the model, so that it is for callers without qadeploy: ``spans``, ``text`` or nothing."""
        return str(self.manifest.get("in_graph", {}).get("kind", ""))

    @property
    def model_bytes(self) -> int:
        """Size of model.onnx."""
        return int(self.manifest["files"][MODEL]["size"])

    def read(self, name: str) -> bytes:
        """The bytes of one file. Raises BundleError where they are not those of the manifest."""
        entry = self.manifest["files"][name]
        path = self.folder / name
        try:
            if path.is_symlink() or not path.is_file():
                raise BundleError(f"{path}: is missing or not a plain file: export the bundle again")
            data = path.read_bytes()
        except OSError as error:
            raise BundleError(f"{path}: cannot be read: {error.strerror}") from error
        if len(data) != entry["size"] or hashlib.sha256(data).hexdigest() != entry["sha256"]:
            raise BundleError(
                f"{path}: does not match the manifest (size or SHA-256 differ): "
                "the file is damaged or was changed; copy the bundle again or export it again"
            )
        return data


def open_bundle(folder: str | Path) -> Bundle:
    """Reads and verifies a bundle folder, all of its files. Raises BundleError, InputError (no folder)."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such bundle folder: make one with qadeploy export")
    path = folder / MANIFEST
    if path.is_symlink() or not path.is_file():
        raise BundleError(f"{folder}: no {MANIFEST} in it: this is not a bundle (or one that was not finished)")
    try:
        text = path.read_text(encoding="utf-8")
        manifest = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise BundleError(f"{path}: cannot be read: {error}: export the bundle again") from error
    if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA:
        found = manifest.get("schema") if isinstance(manifest, dict) else None
        raise BundleError(f"{path}: schema {found!r} is not {SCHEMA}, which this version of qadeploy reads")
    body, _, end = text.rpartition(_SELF)
    if end != f'{hashlib.sha256(body.encode()).hexdigest()}"\n}}\n':
        raise BundleError(
            f"{path}: does not match its own SHA-256: it is damaged or was changed; copy the bundle again or export it again"
        )
    del manifest["manifest_sha256"]
    try:
        bundle = Bundle(
            folder,
            manifest,
            EncoderConfig.from_dict(manifest["encoder"]),
            QaSettings.from_dict(manifest["settings"], str(path)),
        )
        names = {str(name): (int(e["size"]), str(e["sha256"])) for name, e in manifest["files"].items()}
        str(manifest["precision"])
    except InputError as error:
        raise BundleError(f"{error}: export the bundle again") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BundleError(f"{path}: is incomplete: {error!r}: export the bundle again") from error
    _check_names(folder, set(names))
    for name in names:
        data = bundle.read(name)
        if name.endswith(".onnx") and has_external_data(data):
            raise BundleError(f"{folder / name}: keeps weights in another file, which a bundle must not")
    return bundle


def _check_names(folder: Path, names: set[str]) -> None:
    for name in sorted(names):
        if name != Path(name).name or name in {".", "..", MANIFEST} or "\\" in name:
            raise BundleError(f"{folder / MANIFEST}: lists {name!r}: only plain file names may stand there")
    missing = [name for name in _REQUIRED if name not in names]
    if missing:
        raise BundleError(f"{folder / MANIFEST}: does not list {', '.join(missing)}: export the bundle again")
    extra = sorted(p.name for p in folder.iterdir() if p.name not in names | {MANIFEST})
    if extra:
        raise BundleError(f"{folder}: holds {', '.join(extra)}, which the manifest does not list: remove it")


@contextmanager
def writing_bundle(out: Path) -> Iterator[Path]:
    """A temporary folder to fill and ``seal``; renamed to ``out`` at the end, removed on any error.

    Raises InputError where ``out`` exists and is no bundle. An older bundle there is replaced whole.
    """
    check_place(out)
    work = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        yield work
        if not (work / MANIFEST).is_file():
            raise BundleError(f"{out}: the bundle was not sealed")
        replace_folder(work, out)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def rewrite_manifest(bundle: Bundle, changes: Mapping[str, Any]) -> Bundle:
    """The bundle with other values in its manifest, replaced whole; its files stay what they are. Returns it, verified.

    Raises BundleError where a file is not the manifest's any more, and then the bundle stays as it was.
    """
    kept = {name: value for name, value in bundle.manifest.items() if name not in {"schema", "files"}}
    out = bundle.folder.resolve()  # a link to the bundle goes on pointing to it
    with writing_bundle(out) as work:
        for name in bundle.manifest["files"]:
            (work / name).write_bytes(bundle.read(name))
            shutil.copymode(bundle.folder / name, work / name)
        seal(work, {**kept, **changes})
        shutil.copymode(bundle.folder / MANIFEST, work / MANIFEST)
        shutil.copymode(bundle.folder, work)
    return open_bundle(bundle.folder)


def check_place(out: Path) -> None:
    """Raises InputError where a bundle cannot be written to ``out``: it exists and is no bundle."""
    if not out.name:
        raise InputError(f"{out}: a bundle needs a folder of its own: give --out a name")
    if out.exists() and not (out / MANIFEST).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: exists and is not a bundle, so it is not overwritten: give another --out")


def seal(work: Path, manifest: Mapping[str, Any]) -> None:
    """Flushes every file in ``work`` to the disk and writes the manifest with their hashes, last."""
    files = {}
    for path in sorted(work.iterdir()):
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
        files[path.name] = {"size": path.stat().st_size, "sha256": hash_file(path)}
    write_text(work / MANIFEST, manifest_text({"schema": SCHEMA, **manifest, "files": files}))


def manifest_text(value: Mapping[str, Any]) -> str:
    """The manifest as it is written: JSON that ends in the SHA-256 of all the text before that entry."""
    body = json.dumps(value, indent=2, ensure_ascii=False).removesuffix("\n}")
    return f'{body}{_SELF}{hashlib.sha256(body.encode()).hexdigest()}"\n}}\n'


def is_bundle(folder: str | Path) -> bool:
    """Whether a folder says that it is a bundle; ``open_bundle`` says whether it is a sound one."""
    return (Path(folder) / MANIFEST).is_file()


def newest_bundle(folder: Path = Path("bundles")) -> Path:
    """The bundle in ``folder`` whose manifest was written last. Raises InputError where there is none.

    A fused graph stands beside the bundle it was made from for comparison and is passed over; one in fp16 too, which is for
    GPUs, and graphs that answer by themselves, which are for other languages.
    """
    found = [p for p in folder.iterdir() if (p / MANIFEST).is_file()] if folder.is_dir() else []
    others = ("-fused", "-fp16", "-spans", "-text")
    found = [p for p in found if not p.name.startswith(".") and not p.name.endswith(others)]
    if not found:
        raise InputError(f"{folder}: holds no bundle yet: run qadeploy export first, or name a bundle")
    return max(found, key=lambda p: (p / MANIFEST).stat().st_mtime_ns)


# ---------------------------------------------------------------- external data, without the onnx package

# Field numbers of onnx.proto (https://github.com/onnx/onnx/blob/main/onnx/onnx.proto) that lead to tensors.
_PATHS: dict[str, dict[int, str]] = {
    "model": {7: "graph", 25: "function"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {},
}
_EXTERNAL_DATA, _DATA_LOCATION = 13, 14


def has_external_data(model: bytes) -> bool:
    """True where any tensor of an ONNX model says that its values lie in another file.

    Raises BundleError on bytes that are no protobuf message.
    """
    try:
        return _external(memoryview(model), "model")
    except (IndexError, ValueError, RecursionError) as error:
        raise BundleError(f"{MODEL}: is not an ONNX model: {error}") from error


def _external(message: memoryview, kind: str) -> bool:
    for number, value in _fields(message):
        if kind == "tensor" and (number == _EXTERNAL_DATA or (number == _DATA_LOCATION and value != 0)):
            return True
        inner = _PATHS[kind].get(number)
        if inner and isinstance(value, memoryview) and _external(value, inner):
            return True
    return False


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    at, end = 0, len(message)
    while at < end:
        key, at = _varint(message, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(message, at)
            yield number, value
        elif wire == 2:
            size, at = _varint(message, at)
            if at + size > end:
                raise ValueError("a field runs past the end")
            yield number, message[at : at + size]
            at += size
        elif wire in {1, 5}:
            at += 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire}")


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
        if shift > 63:
            raise ValueError("a number is too long")
