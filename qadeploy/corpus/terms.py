"""Texts to the terms that BM25 compares: words without case and accents, or pairs of characters in scripts without spaces."""

from __future__ import annotations

import re
import unicodedata
from functools import cache
from typing import Any

from qadeploy.core.scripts import UNSPACED
from qadeploy.extras import import_extra

ANALYZER = "qadeploy"  # the name of the analyzer in the index
MOST_TERMS = 256  # terms of a question; a question with more words does not fit into a window
_LONGEST_TERM = 100  # bytes; longer terms are not words
_WORD = r"[\p{Alphabetic}\p{M}\p{Nd}]+"
# Korean has spaces, but particles are attached to its words.
_RUN = re.compile(rf"[{UNSPACED}\u1100-\u11ff\uac00-\ud7ff]+")


def require_tantivy() -> Any:
    """The search library. Raises MissingExtraError if it is not installed."""
    return import_extra("tantivy", "a corpus", "corpus")


@cache
def analyzer() -> Any:
    """The analyzer that cuts a prepared text into terms, for passages and for questions."""
    tantivy = require_tantivy()
    found = tantivy.TextAnalyzerBuilder(tantivy.Tokenizer.regex(_WORD))
    filters = tantivy.Filter
    for each in (filters.remove_long(_LONGEST_TERM), filters.lowercase(), filters.ascii_fold()):
        found = found.filter(each)
    return found.build()


def prepared(text: str) -> str:
    """Prepares a text for the analyzer: NFKC, with unspaced runs replaced by their pairs of characters."""
    return text if text.isascii() else _RUN.sub(_pairs, unicodedata.normalize("NFKC", text))


def terms_of(question: str) -> list[str]:
    """The terms of a question, each once, at most ``MOST_TERMS``."""
    return list(dict.fromkeys(analyzer().analyze(prepared(question))))[:MOST_TERMS]


def _pairs(found: re.Match[str]) -> str:
    run = found[0]
    return f" {' '.join(run[i : i + 2] for i in range(max(1, len(run) - 1)))} "
