"""The options of answering from a corpus."""

from __future__ import annotations

from dataclasses import dataclass, replace

from qadeploy.core.settings import Options
from qadeploy.options import option

READ = 5
MOST_READ = 100
SNIPPET = 200  # code points on each side of an answer


@dataclass(frozen=True, slots=True)
class CorpusOptions:
    """The options for reading a corpus."""

    passages: int = option(
        READ,
        "How many passages of a corpus the model reads, those that share most with the question (BM25).",
        least=1,
        most=MOST_READ,
    )


def for_corpus(options: Options) -> Options:
    """The options for reading passages of a corpus: answers have a snippet, and offsets are converted later."""
    return replace(options, snippet=SNIPPET if options.snippet is None else options.snippet, offsets="codepoints")
