"""Documents for the tests of a corpus, and the smallest PDF files that hold text."""

from __future__ import annotations

from pathlib import Path

LAMPS = """# Lamps

The light is red.

## Trimming

Mungo Strand trims the light.

```
# no heading
```

Oil
---

Nobody fills it at noon.
"""
PAGE = """<!DOCTYPE html><html><head><title>The quay</title><style>p { color: red }</style></head>
<body><script>var hidden = 1;</script><h1>Boats &amp; ropes</h1><p>The night boat
   leaves <b>Carrow</b> Quay.<br>At eleven.</p><pre>a
  b</pre><table><tr><td>Ada</td><td>rope</td></tr></table><!-- unseen --></body></html>"""
ROWS = '{"id": "t", "title": "Capitals", "text": "東京は日本の首都である。"}\n{"text": "ภาษาไทยไม่เว้นวรรค"}\n'


def write_documents(folder: Path) -> Path:
    """A folder with a file of every kind but PDF. Returns it."""
    (folder / "deep").mkdir(parents=True)
    (folder / "lamps.md").write_text(LAMPS, encoding="utf-8")
    (folder / "deep" / "quay.html").write_text(PAGE, encoding="utf-8")
    (folder / "rows.jsonl").write_text(ROWS, encoding="utf-8")
    (folder / "notes.txt").write_bytes("Bela keeps the ladder.\r\n\r\nCora keeps the kettle.".encode("utf-8-sig"))
    (folder / "wide.txt").write_bytes("Dora keeps the piano 🎹 and Zoë the bell.".encode("utf-16"))
    return folder


def pdf(*pages: str, trailer: str = "") -> bytes:
    """A PDF file with a line of ASCII text per page."""
    count = len(pages)
    kids = " ".join(f"{4 + 2 * number} 0 R" for number in range(count))
    objects = [
        "<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Kids [{kids}] /Count {count} >>",
        "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    for number, text in enumerate(pages):
        drawn = f"BT /F1 12 Tf 40 700 Td ({text}) Tj ET"
        resources = "<< /Font << /F1 3 0 R >> >>"
        objects.append(
            f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 595 842] /Resources {resources} /Contents {5 + 2 * number} 0 R >>"
        )
        objects.append(f"<< /Length {len(drawn)} >>\nstream\n{drawn}\nendstream")
    out, places = b"%PDF-1.4\n", []
    for number, content in enumerate(objects, 1):
        places.append(len(out))
        out += f"{number} 0 obj\n{content}\nendobj\n".encode("ascii")
    table = "".join(f"{place:010} 00000 n \n" for place in places)
    end = f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{table}"
    end += f"trailer\n<< /Size {len(objects) + 1} /Root 1 0 R {trailer} >>\nstartxref\n{len(out)}\n%%EOF\n"
    return out + end.encode("ascii")


# Neither entry matches the empty password.
ENCRYPTED = f"/Encrypt << /Filter /Standard /V 1 /R 2 /P -4 /O <{'11' * 32}> /U <{'22' * 32}> >> /ID [<{'33' * 16}> <{'33' * 16}>]"
