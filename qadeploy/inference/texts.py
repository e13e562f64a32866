"""The input of a call: a question, and a context or passages to answer it from."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence

from qadeploy.errors import DataWarning, InputError

Texts = str | Sequence[str]  # a context, or passages
Asked = tuple[str, Texts]
_CHUNK_CHARACTERS = 200_000


def one_of(context: str | None, contexts: Sequence[str] | None) -> Texts:
    """The context or passages to answer from. Raises InputError unless exactly one is given and has the right type."""
    if contexts is not None:
        if context is not None:
            raise InputError("context and contexts are given: leave one of them out")
        check_passages(contexts)
        return contexts
    if context is None:
        raise InputError("there is no context: give context, or contexts for several passages")
    return context if isinstance(context, str) else check_text("context", context)


def texts_of(given: Texts) -> list[str]:
    """The non-blank texts of a context or of passages; skips values that are not texts."""
    texts = given if isinstance(given, list | tuple) else [given]
    return [text for text in texts if isinstance(text, str) and text.strip()]


def check_text(name: str, value: object) -> str:
    """Returns the value. Raises InputError unless it is a non-blank text."""
    if not isinstance(value, str):
        raise InputError(f"{name} must be text, not {type(value).__name__}")
    if not value.strip():
        raise InputError(f"{name} is empty: give it some text")
    return value


def check_passages(passages: Sequence[str]) -> list[int]:
    """The indices of the non-empty passages. Raises InputError if there are none, or if one is not a text."""
    if not isinstance(passages, list | tuple):
        raise InputError(f"contexts must be a list of texts, not {type(passages).__name__}")
    if not passages:
        raise InputError("contexts is empty: give at least one passage")
    for number, passage in enumerate(passages):
        if not isinstance(passage, str):
            raise InputError(f"contexts[{number}] must be text, not {type(passage).__name__}")
    numbers = [number for number, passage in enumerate(passages) if passage.strip()]
    if not numbers:
        raise InputError("contexts: every passage is empty: give some text")
    return numbers


def warn_of_skipped(skipped: Sequence[int], where: str = "") -> None:
    """Warns about skipped passages, if any."""
    if skipped:
        warnings.warn(f"{where}{skipped_passages(skipped)}", DataWarning, stacklevel=3)


def skipped_passages(skipped: Sequence[int]) -> str:
    """A sentence that names the passages that were skipped because they are empty."""
    named = ", ".join(f"contexts[{number}]" for number in skipped)
    return f"{named} {'is' if len(skipped) == 1 else 'are'} empty and skipped"


def chunks_of(pairs: Iterable[Asked], size: int) -> Iterator[list[Asked]]:
    """The pairs in lists of at most ``size`` pairs and about 200,000 characters. Raises InputError if one is not a pair."""
    chunk: list[Asked] = []
    characters = 0
    for number, pair in enumerate(pairs, 1):
        if not (isinstance(pair, tuple | list) and len(pair) == 2):
            raise InputError(f"pair {number}: must be a (question, context) pair, not {type(pair).__name__}")
        chunk.append((pair[0], pair[1]))
        characters += sum(map(len, texts_of(pair[1])))
        if len(chunk) == size or characters >= _CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk
