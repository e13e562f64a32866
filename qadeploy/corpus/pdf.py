"""PDF files to text, page by page, in a separate process: a file may make the reader crash, hang or use all memory."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path

from qadeploy.corpus.records import Document
from qadeploy.data.unpacking import Budget
from qadeploy.errors import InputError, MissingExtraError

MOST_SECONDS = 120
_CHILD = Path(__file__).with_name("pdf_child.py")


def pdf_document(content: bytes, name: str) -> Document:
    """Reads a PDF file.

    Args:
        content: The file.
        name: The document's name.

    Raises:
        InputError: The file is damaged, encrypted or too large, or reading it takes longer than ``MOST_SECONDS``.
        MissingExtraError: pypdfium2 is not installed.
    """
    if find_spec("pypdfium2") is None:
        raise MissingExtraError("reading PDF files", "pypdfium2", "corpus")
    most = Budget(name, len(content)).limit
    command = [sys.executable, "-P", str(_CHILD), str(most)]
    try:
        done = subprocess.run(command, input=content, capture_output=True, timeout=MOST_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise InputError(f"{name}: its reader took longer than {MOST_SECONDS} seconds") from error
    if done.returncode:
        ended = f"signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
        raise InputError(f"{name}: not a readable PDF: its reader ended with {ended}")
    found = json.loads(done.stdout)
    if "error" in found:
        raise InputError(f"{name}: {found['error']}")
    pages = found["pages"]
    # A form feed separates the pages of the text.
    begins = [0, *accumulate(len(page) + 1 for page in pages)][:-1]
    return Document(name, "\f".join(pages), pages=tuple(begins))
