"""The bundle: one folder with everything that answering needs, verified by hashes.

    manifest.json    schema, settings, encoder, measurements, size and SHA-256 of every file, and its own SHA-256
    model.onnx       the graph with its weights
    tokenizer.json   the fast tokenizer
    README.md        the model card

A bundle is written to a hidden folder next to its final place, the manifest last, then flushed and renamed, so a bundle
folder is always complete. Loading checks the bytes that it uses, and rejects unknown schemas, missing, additional or
changed files, links, paths, and external data.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from qadeploy.core.settings import QaSettings
from qadeploy.core.windows import Encoder, EncoderConfig, rust_errors
from qadeploy.errors import BundleError, InputError
from qadeploy.files import (
    OpenFile,
    hash_file,
    holding,
    json_text,
    opened,
    replace_folder,
    sync,
    temporary_folder,
    write_text,
)
from qadeploy.inference.hub import fetch_bundle, is_hub
from qadeploy.inference.manifest import SCHEMA, Manifest, parse_json, read_manifest
from qadeploy.inference.onnx_file import check_model
from qadeploy.shipped import base_bundle_path

MANIFEST = "manifest.json"
MODEL = "model.onnx"
TOKENIZER = "tokenizer.json"
CARD = "README.md"
_REQUIRED = (MODEL, TOKENIZER, CARD)
# What comes before the SHA-256 of a manifest, its last entry.
_SELF = ',\n  "manifest_sha256": "'


@dataclass(frozen=True, slots=True)
class Bundle:
    """A verified bundle. Its files stay open, so that it can be read while another takes its place.

    Attributes:
        folder: The bundle folder.
        manifest: The whole manifest.
        checked: The entries of the manifest that decide how the bundle is used.
        hash: SHA-256 of the manifest. It identifies the bundle, because the manifest contains the hashes of all files.
    """

    folder: Path
    manifest: dict[str, Any]
    checked: Manifest
    hash: str
    _files: Mapping[str, OpenFile] = field(repr=False, compare=False)

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.name

    @property
    def encoder(self) -> EncoderConfig:
        """How texts become windows."""
        return self.checked.encoder

    @property
    def settings(self) -> QaSettings:
        """How windows become answers."""
        return self.checked.settings

    @property
    def precision(self) -> str:
        """``fp32``, ``fp16`` or ``int8``."""
        return self.checked.precision

    @property
    def in_graph(self) -> str:
        """What the graph does besides the model, for callers without qadeploy: ``spans``, ``text`` or empty."""
        return self.checked.in_graph

    @property
    def model_bytes(self) -> int:
        """Size of model.onnx."""
        return self.checked.files[MODEL].size

    def read(self, name: str) -> bytes:
        """The bytes of one file. Raises BundleError if they do not match the manifest."""
        entry = self.checked.files[name]
        try:
            data = self._files[name].read(0, entry.size + 1)
        except OSError as error:
            raise BundleError(f"{self.folder / name}: cannot be read: {error.strerror}") from error
        if len(data) != entry.size or hashlib.sha256(data).hexdigest() != entry.sha256:
            raise BundleError(
                f"{self.folder / name}: does not match the manifest (size or SHA-256 differ): "
                "the file is damaged or was changed; copy the bundle again or export it again"
            )
        return data

    def load_encoder(self) -> Encoder:
        """The encoder, with the bundle's tokenizer. Raises BundleError if the tokenizer cannot be read or used."""
        data = self.read(TOKENIZER)
        place = self.folder / TOKENIZER
        with rust_errors(lambda error: BundleError(f"{place}: cannot be used: {error}: export the bundle again")):
            return Encoder(Tokenizer.from_str(data.decode("utf-8")), self.encoder)


def open_bundle(folder: str | Path, *, sha256: str | None = None, revision: str | None = None) -> Bundle:
    """Reads a bundle folder and verifies all of its files.

    Args:
        folder: The bundle folder, or ``hub:ORG/NAME[@REVISION]``, which is downloaded unless it is in the cache.
        sha256: The SHA-256 of the expected ``manifest.json``: any other bundle is refused. The hashes in a manifest only detect
            damage; a hash from another source also protects against a forged bundle.
        revision: The branch, tag or commit of a bundle on the hub; None uses main.

    Raises:
        InputError: There is no such folder, ``sha256`` is not a SHA-256, or ``revision`` is given for a folder.
        HubError: The hub cannot be reached, lacks the bundle or refuses the token.
        MissingExtraError: huggingface_hub is not installed.
        BundleError: The bundle is incomplete, damaged, unsafe, or not the expected one.
    """
    name, folder = str(folder), Path(folder)
    if sha256 is not None and not re.fullmatch("[0-9a-f]{64}", sha256):
        raise InputError(
            f"the SHA-256 of a bundle must be 64 hexadecimal digits, not {sha256!r}: sha256sum {folder / MANIFEST}"
        )
    if is_hub(name):
        folder = fetch_bundle(name, revision, (MANIFEST, *_REQUIRED))
        if not (folder / MANIFEST).is_file():
            raise BundleError(f"{name}: has no {MANIFEST}: this is not a bundle: qadeploy push BUNDLE uploads one")
    elif revision is not None:
        raise InputError(
            f"{folder}: is a folder, which has no revisions: name a bundle on the hub, or leave out {revision!r}"
        )
    try:
        return opened(folder, lambda: _open(folder, sha256))
    except OSError as error:
        raise BundleError(f"{error.filename or folder}: cannot be read: {error.strerror or error}") from error


def _open(folder: Path, sha256: str | None) -> Bundle:
    if not folder.is_dir():
        raise InputError(f"{folder}: no such bundle folder: make one with qadeploy export")
    path = folder / MANIFEST
    if path.is_symlink() or not path.is_file():
        problem = f"{folder}: has no {MANIFEST}: this is not a bundle"
        if any((folder / name).is_file() for name in ("run.json", "config.json")):
            raise BundleError(f"{problem}, but a run or a checkpoint: make one with qadeploy export {folder}")
        raise BundleError(f"{problem}, or an unfinished one: make one with qadeploy export RUN")
    try:
        data = path.read_bytes()
        manifest = parse_json(data.decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BundleError(f"{path}: cannot be read: {error}: export the bundle again") from error
    if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA:
        found = manifest.get("schema") if isinstance(manifest, dict) else None
        raise BundleError(f"{path}: schema {found!r} is not {SCHEMA}, which this version of qadeploy reads")
    body, _, end = data.rpartition(_SELF.encode())
    if end != f'{hashlib.sha256(body).hexdigest()}"\n}}\n'.encode():
        raise BundleError(
            f"{path}: does not match its own SHA-256: it is damaged or was changed; copy the bundle again or export it again"
        )
    own = hashlib.sha256(data).hexdigest()
    if sha256 not in {None, own}:
        raise BundleError(f"{path}: its SHA-256 is {own}, not {sha256}: this is not the expected bundle")
    del manifest["manifest_sha256"]
    checked = read_manifest(manifest, str(path))
    _check_names(folder, set(checked.files))
    bundle = Bundle(folder, manifest, checked, own, {name: _file(folder / name) for name in checked.files})
    for name in checked.files:
        content = bundle.read(name)
        if name.endswith(".onnx"):
            check_model(content, str(folder / name), reads_text=bundle.in_graph == "text")
    return bundle


def _file(path: Path) -> OpenFile:
    try:
        return OpenFile(path)
    except OSError as error:
        raise BundleError(f"{path}: is missing or not a plain file: export the bundle again") from error


def _check_names(folder: Path, names: set[str]) -> None:
    for name in sorted(names):
        if (
            name != Path(name).name
            or name in {".", "..", MANIFEST}
            or "\\" in name
            or not name.isprintable()
            or len(name) > 255
        ):
            raise BundleError(f"{folder / MANIFEST}: lists {name!r}: only plain file names are allowed")
    missing = [name for name in _REQUIRED if name not in names]
    if missing:
        raise BundleError(f"{folder / MANIFEST}: does not list {', '.join(missing)}: export the bundle again")
    extra = sorted(p.name for p in folder.iterdir() if p.name not in names | {MANIFEST})
    if extra:
        shown = ", ".join(name if name.isprintable() else repr(name) for name in extra)
        raise BundleError(f"{folder}: holds {shown}, which the manifest does not list: remove it")


@contextmanager
def writing_bundle(out: Path) -> Iterator[Path]:
    """A temporary folder to fill and ``seal``; it is renamed to ``out`` at the end and removed on any error.

    An existing bundle is replaced as a whole. Raises InputError if ``out`` is something else, or being written.
    """
    check_place(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with holding(out), temporary_folder(out) as work:
        yield work
        check_place(out)  # something may have been put there meanwhile
        replace_folder(work, out)


def rewrite_manifest(bundle: Bundle, changes: Mapping[str, Any]) -> Bundle:
    """Changes values in a bundle's manifest (None removes one) and keeps its files. Returns the new bundle, verified.

    Raises BundleError if a file no longer matches the manifest; the bundle is then left unchanged.
    """
    kept = {name: value for name, value in bundle.manifest.items() if name not in {"schema", "files"}}
    out = bundle.folder.resolve()  # a link to the bundle stays valid
    with writing_bundle(out) as work:
        for name in bundle.manifest["files"]:
            (work / name).write_bytes(bundle.read(name))
            shutil.copymode(bundle.folder / name, work / name)
        seal(work, {k: v for k, v in {**kept, **changes}.items() if k not in changes or v is not None})
        shutil.copymode(bundle.folder / MANIFEST, work / MANIFEST)
        shutil.copymode(bundle.folder, work)
    return open_bundle(bundle.folder)


def check_place(out: Path, flag: str = "--out") -> None:
    """Raises InputError if ``out`` exists and is not a bundle, so that no bundle can be written there.

    ``flag`` is the option that names ``out``, for messages.
    """
    if not out.name:
        raise InputError(f"{out}: a bundle needs a folder of its own: give {flag} a name")
    if out.is_symlink():
        raise InputError(f"{out}: is a link, which is not overwritten: give {flag} the folder itself or another name")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    listed = _listed(out / MANIFEST)
    if listed is None:
        raise InputError(f"{out}: exists and is not a bundle, so it is not overwritten: give another {flag}")
    foreign = sorted(p.name for p in out.iterdir() if p.name not in {*listed, MANIFEST} or p.is_dir())
    if foreign:
        raise InputError(
            f"{out}: holds {', '.join(foreign[:5])} beside a bundle, which would be deleted: move it away, or give another {flag}"
        )


def _listed(path: Path) -> frozenset[str] | None:
    """The files that a manifest lists, damaged or not; None if it is not a bundle's manifest."""
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        ours = isinstance(manifest["schema"], int) and isinstance(manifest["manifest_sha256"], str)
        return frozenset(manifest["files"]) if ours else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def seal(work: Path, manifest: Mapping[str, Any]) -> None:
    """Flushes every file in ``work`` to disk, then writes the manifest with their hashes."""
    files = {}
    for path in sorted(work.iterdir()):
        sync(path)
        files[path.name] = {"size": path.stat().st_size, "sha256": hash_file(path)}
    write_text(work / MANIFEST, manifest_text({"schema": SCHEMA, **manifest, "files": files}))


def manifest_text(value: Mapping[str, Any]) -> str:
    """The text of a manifest: JSON that ends in the SHA-256 of everything before that entry."""
    body = json_text(value).removesuffix("\n}")
    return f'{body}{_SELF}{hashlib.sha256(body.encode()).hexdigest()}"\n}}\n'


def is_bundle(folder: str | Path) -> bool:
    """Whether a name is a bundle's: ``hub:ORG/NAME``, or a folder with a manifest. ``open_bundle`` verifies it."""
    return is_hub(folder) or (Path(folder) / MANIFEST).is_file()


def newest_bundle(folder: Path = Path("bundles")) -> Path:
    """The bundle in ``folder`` whose manifest was written last.

    It skips fused graphs, which stand beside their bundles for comparison, fp16 bundles, which are for GPUs, and graphs that
    answer by themselves, which are for other languages.

    Raises:
        InputError: There is no bundle.
    """
    found = _newest(folder)
    if found is None:
        raise InputError(f"{folder}: holds no bundle yet: run qadeploy export first, or name a bundle")
    return found


def default_bundle() -> Path:
    """The bundle to use if none is named: the newest under ``bundles/`` or, if there is none, the one that qadeploy ships.

    Raises:
        BundleError: This installation ships no bundle.
    """
    return _newest(Path("bundles")) or base_bundle_path()


def _newest(folder: Path) -> Path | None:
    found = [path for path in folder.glob("[!.]*") if _is_general(path / MANIFEST)]
    return max(found, key=lambda p: (p / MANIFEST).stat().st_mtime_ns, default=None)


def _is_general(manifest: Path) -> bool:
    """Whether a bundle is for any machine and caller. An invalid manifest counts, so that loading reports it."""
    try:
        values = json.loads(manifest.read_text(encoding="utf-8"))
        made = values.get("made", {})
        return not (
            (made.get("graph") == "fused" and "fused_nodes" in made)
            or made.get("for") == "cuda"
            or "in_graph" in values
        )
    except OSError:
        return False
    except (ValueError, TypeError, AttributeError):
        return True
