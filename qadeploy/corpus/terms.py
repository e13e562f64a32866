"""Texts to the terms that BM25 compares: words without case and accents, and of scripts without spaces each pair of characters."""

from __future__ import annotations

import re
import unicodedata
from functools import cache
from typing import Any

from qadeploy.core.scripts import UNSPACED
from qadeploy.extras import import_extra

ANALYZER = "qadeploy"  # its name in the index
MOST_TERMS = 256  # of a question; one with more words has no room in a window
_LONGEST_TERM = 100  # bytes; what is longer is no word
_WORD = r"[\p{Alphabetic}\p{M}\p{Nd}]+"
# Korean has spaces, but particles are written to its words.
_RUN = re.compile(rf"[{UNSPACED}\u1100-\u11ff\uac00-\ud7ff]+")


def require_tantivy() -> Any:
    """The search library. Raises MissingExtraError if it is not installed."""
    return import_extra("tantivy", "a corpus", "corpus")


@cache
def analyzer() -> Any:
    """What cuts a prepared text into terms, for passages and for questions."""
    tantivy = require_tantivy()
    found = tantivy.TextAnalyzerBuilder(tantivy.Tokenizer.regex(_WORD))
    filters = tantivy.Filter
    for each in (filters.remove_long(_LONGEST_TERM), filters.lowercase(), filters.ascii_fold()):
        found = found.filter(each)
    return found.build()


def prepared(text: str) -> str:
    """A text as the analyzer takes it: compatible characters as one, and pairs of characters in place of unspaced runs."""
    return text if text.isascii() else _RUN.sub(_pairs, unicodedata.normalize("NFKC", text))


def terms_of(question: str) -> list[str]:
    """The terms of a question, each once, at most ``MOST_TERMS``."""
    return list(dict.fromkeys(analyzer().analyze(prepared(question))))[:MOST_TERMS]


def _pairs(found: re.Match[str]) -> str:
    run = found[0]
    return f" {' '.join(run[i : i + 2] for i in range(max(1, len(run) - 1)))} "
