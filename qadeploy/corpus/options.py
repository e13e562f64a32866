"""The options of answering from a corpus."""

from __future__ import annotations

from dataclasses import dataclass

from qadeploy.options import option

READ = 5
MOST_READ = 100


@dataclass(frozen=True, slots=True)
class CorpusOptions:
    """How a corpus is read."""

    passages: int = option(
        READ,
        "Of a corpus, how many passages the model reads, those that share most with the question (BM25).",
        least=1,
        most=MOST_READ,
    )
