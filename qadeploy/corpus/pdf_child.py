"""The process that reads a PDF file for ``pdf``: bytes on stdin, JSON on stdout. It starts fast: it imports only pypdfium2."""

from __future__ import annotations

import json
import sys
from contextlib import suppress

if sys.platform != "win32":
    import resource

_MEMORY = 2**31  # bytes that the process may use besides the file itself
_PAGES = 20_000


def read(content: bytes, most: int) -> dict[str, object]:
    """The text of each page, or an error; ``most`` is the largest number of bytes of text, as UTF-8."""
    import pypdfium2
    from pypdfium2 import PdfiumError
    from pypdfium2.raw import FPDF_ERR_PASSWORD, FPDF_GetLastError

    try:
        document = pypdfium2.PdfDocument(content)
    except PdfiumError:
        locked = FPDF_GetLastError() == FPDF_ERR_PASSWORD
        return {"error": "encrypted: save it without a password" if locked else "not a readable PDF: it is damaged"}
    if len(document) > _PAGES:
        return {"error": f"{len(document):,} pages are more than {_PAGES:,}: split it"}
    pages: list[str] = []
    left = most
    for number in range(len(document)):
        try:
            page = document[number]
            text = page.get_textpage().get_text_bounded(errors="replace").replace("\r\n", "\n").replace("\f", "\n")
            page.close()
        except PdfiumError:
            return {"error": f"page {number + 1} cannot be read: it is damaged"}
        # PDFium marks a hyphen at a line end with \x02 or \ufffe.
        text = text.replace("\x02", "").replace("\ufffe", "").replace("\0", "")
        left -= len(text.encode())
        if left < 0:
            return {"error": f"unpacks to more than {most:,} bytes of text, so it may be a decompression bomb"}
        pages.append(text)
    return {"pages": pages}


def main() -> None:
    """Reads stdin with limited memory, and prints the result."""
    content = sys.stdin.buffer.read()
    limit = _MEMORY + 4 * len(content)
    if sys.platform != "win32":
        with suppress(ValueError, OSError):  # macOS has no such limit
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        found = read(content, int(sys.argv[1]))
    except MemoryError:
        found = {"error": "its reader needs too much memory"}
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
