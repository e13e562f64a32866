"""A static site: a text model with a page that runs it in the browser. The folder is a bundle; a web host serves its files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from qadeploy.errors import InputError
from qadeploy.inference.bundle import Bundle, check_place, is_bundle
from qadeploy.integrations.onnx_standalone.in_graph import strings_in_graph
from qadeploy.integrations.web.npm import INTEGRITY, VERSION, onnxruntime_web
from qadeploy.records import Example
from qadeploy.shipped import PAGE

_OWN = Path(__file__).parent / "page"
_PAGE = "index.html"
_SHARED = ("tools.js", "style.css", "icon.svg")  # with the pages of the server


def write_site(
    source: Bundle, out: Path, examples: Sequence[Example], say: Callable[[str], object] = lambda _: None
) -> Bundle:
    """Writes the site ``out``, in which the bundle ``source`` answers, and returns it, verified.

    Args:
        source: An fp32 or int8 bundle with a WordPiece tokenizer.
        out: The folder. An existing site is replaced as a whole.
        examples: Questions on which the site's answers must equal the Answerer's.
        say: Receives lines of progress.

    Raises:
        InputError: The bundle or the place cannot be used.
        FailureError: onnxruntime-web is not available, or the model cannot be embedded.
        GateError: An answer differs from the Answerer's.
    """
    check_site(out)
    if source.precision == "fp16":
        raise InputError(f"{source.folder}: is fp16, which is for GPUs: give the int8 or fp32 bundle for --web")
    runtime = onnxruntime_web(say)
    page = {path.name: path.read_bytes() for path in (*_OWN.iterdir(), *(PAGE / name for name in _SHARED))}
    entries = {"web": {"onnxruntime-web": VERSION, "integrity": INTEGRITY}}
    made = strings_in_graph(
        source, out, examples, usage=_usage(source, out), entries=entries, files={**page, **runtime}
    )
    say(
        f"{out}: a page with its model and onnxruntime-web {VERSION}; its answers to all {made.manifest['made']['proof']['questions']} "
        f"questions equal the Answerer's; to see it: python3 -m http.server --directory {out}"
    )
    return made


def check_site(out: Path) -> None:
    """Raises InputError if ``out`` exists and is neither a site nor an empty folder, so that no site can replace it."""
    check_place(out, "--web")
    if is_bundle(out) and not (out / _PAGE).exists():
        raise InputError(f"{out}: holds a bundle and no page, so it is not overwritten: give another --web")


def _usage(source: Bundle, out: Path) -> list[str]:
    return [
        f"A static site that answers in the browser: upload the folder to any web host, or try it with "
        f"`python3 -m http.server --directory {out.name}`. It loads nothing from elsewhere, and what is asked stays in the browser.",
        "",
        "`answerer.js` is for pages of your own:",
        "",
        "```js",
        'import { Answerer } from "./answerer.js";',
        "const answerer = await Answerer.load();",
        'const { text, score, start, end, utf16 } = await answerer.answer("Who keeps the lamp?", "Mungo Strand keeps the lamp.");',
        "```",
        "",
        f"Made from the bundle `{source.name}` (SHA-256 of its manifest: {source.hash}) with onnxruntime-web {VERSION} from npm "
        f"({INTEGRITY}), copyright Microsoft Corporation, MIT License.",
        "",
    ]
