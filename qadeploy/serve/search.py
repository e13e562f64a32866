"""Questions without a context: searches in the corpus of the server, and their results as JSON."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from typing import Any

from qadeploy.core.settings import Options
from qadeploy.corpus.corpus import Corpus
from qadeploy.corpus.options import for_corpus
from qadeploy.inference.pairs import DecodedPair, to_answers
from qadeploy.serve.limits import check_limits
from qadeploy.serve.scheduler import Ask
from qadeploy.serve.settings import Settings

_SHOWN_SKIPPED = 20
_REPORT_SECONDS = 10.0
_log = logging.getLogger("qadeploy.serve")


def open_corpus(place: str) -> Corpus:
    """Opens an index, or builds one from documents, and logs what is in it and which files are not.

    Raises:
        QadeployError: As ``Corpus.open`` does.
    """
    reported = time.monotonic()

    def report(number: int, name: str) -> None:
        nonlocal reported
        if time.monotonic() - reported > _REPORT_SECONDS:
            reported = time.monotonic()
            _log.info("indexing", extra={"fields": {"files": number, "file": name}})

    corpus = Corpus.open(place, report)
    facts = {"index": str(corpus.folder), "files": corpus.files, **about(corpus)}
    _log.info("corpus", extra={"fields": facts})
    if corpus.skipped:
        shown = [str(each) for each in corpus.skipped[:_SHOWN_SKIPPED]]
        _log.warning("not in the corpus", extra={"fields": {"count": len(corpus.skipped), "skipped": shown}})
    return corpus


def about(corpus: Corpus) -> dict[str, Any]:
    """The facts that the server reports about its corpus."""
    return {"documents": corpus.documents, "passages": corpus.passages, "sha256": corpus.hash}


def from_corpus(corpus: Corpus, settings: Settings, question: str, options: Options) -> Ask:
    """A question that is answered from a corpus. The scheduler runs the search, so that its limits cover the search too."""

    def search(ask: Ask) -> Ask:
        found = tuple(corpus.search(ask.question, settings.corpus_passages))
        ask = replace(ask, context=tuple(passage.text for passage in found), found=found)
        check_limits([ask], settings)
        return ask

    return Ask(question, (), options, search)


def corpus_answers(corpus: Corpus, ask: Ask, pair: DecodedPair | None) -> dict[str, Any]:
    """The answers to a question from the corpus, with their documents and places, and the passages that were read."""
    answers = to_answers(pair, for_corpus(ask.options)) if pair else []
    placed = corpus.placed(answers, ask.found, ask.options.offsets)
    return {"answers": [answer.to_dict() for answer in placed], "passages": [passage.about() for passage in ask.found]}
