"""The files of onnxruntime-web, downloaded with npm when needed: they are 14 MB, and most users of qadeploy do not need them."""

from __future__ import annotations

import base64
import hashlib
import io
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, cast

from qadeploy.errors import FailureError
from qadeploy.files import cache_folder, write_bytes

VERSION = "1.30.0"
INTEGRITY = "sha512-q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
# ONNX Runtime for WebAssembly alone. It gets the ending .js because some web servers do not serve .mjs as JavaScript.
_MEMBERS = {
    "onnxruntime-web.js": "package/dist/ort.wasm.bundle.min.mjs",
    "ort-wasm-simd-threaded.wasm": "package/dist/ort-wasm-simd-threaded.wasm",
}
_PACKAGE = f"onnxruntime-web@{VERSION}"
_ARCHIVE = f"onnxruntime-web-{VERSION}.tgz"


def onnxruntime_web(say: Callable[[str], object] = lambda _: None) -> dict[str, bytes]:
    """Returns the files of onnxruntime-web that a page needs, by name.

    The package comes from the cache or, the first time, from npm's registry. Its hash must be ``INTEGRITY``.

    Args:
        say: Receives a line of text before a download.

    Raises:
        FailureError: npm is missing or cannot download the package, the package has another hash, or there is no cache.
    """
    cache = cache_folder()
    if cache is None:
        raise FailureError(f"--web keeps {_PACKAGE} in a cache, for which there is no home folder: set QADEPLOY_CACHE")
    kept = cache / _ARCHIVE
    if kept.is_file():
        data = kept.read_bytes()
        if not _is_meant(data):
            raise FailureError(f"{kept}: is not {_PACKAGE}, which has another SHA-512: remove it")
    else:
        say(f"npm downloads {_PACKAGE} (33 MB)")
        data = _download(cache)
        cache.mkdir(parents=True, exist_ok=True)
        write_bytes(kept, data)
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:  # extractfile returns None only for folders
        return {name: cast(IO[bytes], archive.extractfile(member)).read() for name, member in _MEMBERS.items()}


def _download(cache: Path) -> bytes:
    by_hand = f"or copy {_ARCHIVE} into {cache} (npm pack {_PACKAGE} makes it on any machine)"
    npm = shutil.which("npm")
    if npm is None:
        raise FailureError(
            f"--web needs {_PACKAGE}, and npm is not on the PATH to download it: install Node.js, {by_hand}"
        )
    command = [npm, "pack", _PACKAGE, "--ignore-scripts", "--prefer-offline", "--loglevel=error"]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace", check=False)
        if done.returncode:
            reasons = re.findall("^npm (?:error|ERR!) (.+)", done.stderr, re.MULTILINE)
            reason = " ".join(reasons[:3]) or f"status {done.returncode}"
            raise FailureError(
                f"npm cannot download {_PACKAGE}: {reason}: check npm's connection and registry, {by_hand}"
            )
        data = Path(folder, _ARCHIVE).read_bytes()
    if not _is_meant(data):
        raise FailureError(
            f"npm's registry has another {_PACKAGE}, with another SHA-512: choose another registry, {by_hand}"
        )
    return data


def _is_meant(data: bytes) -> bool:
    return f"sha512-{base64.b64encode(hashlib.sha512(data).digest()).decode()}" == INTEGRITY
