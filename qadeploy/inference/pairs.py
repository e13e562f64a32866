"""A question with its context on the way to answers: checked, encoded, decoded."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from qadeploy.core.bm25 import Ranking
from qadeploy.core.decoding import Decoded, WindowLogits, rank_answers
from qadeploy.core.drift import Figure, Figures
from qadeploy.core.encoded_text import EncodedText
from qadeploy.core.passages import JoinedText
from qadeploy.core.settings import Options, QaSettings
from qadeploy.core.unknown import unknown_share
from qadeploy.errors import DataWarning, InputError
from qadeploy.inference.presenting import present
from qadeploy.records import Answer, Logits, Window

Texts = str | Sequence[str]  # a context, or passages
Asked = tuple[str, Texts]
_CHUNK_CHARACTERS = 200_000
COMPARED = 2  # answers that must be decoded for the margin of ``figures_of``


@dataclass(frozen=True, slots=True)
class EncodedPair:
    """A question and its context, tokenised and cut into windows.

    Attributes:
        question: The tokens of the question.
        context: The tokens of the context; a ``JoinedText`` if passages were given.
        windows: The windows that the model reads.
        ranking: The BM25 scores of all windows if ``prefilter`` left some out, else None.
        settings: The settings of this call.
        skipped: The indices of empty passages.
    """

    question: EncodedText
    context: EncodedText
    windows: Sequence[Window]
    ranking: Ranking | None
    settings: QaSettings
    skipped: tuple[int, ...] = ()

    @property
    def passages(self) -> JoinedText | None:
        """The passages, None if a single context was given."""
        return self.context if isinstance(self.context, JoinedText) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodedPair(EncodedPair):
    """An encoded pair with the model's logits and the spans decoded from them.

    Attributes:
        scored: The windows with their logits, as ``settings`` rank them.
        decoded: The best spans and the null answer.
    """

    scored: WindowLogits
    decoded: Decoded

    @property
    def logits(self) -> list[Logits]:
        """Start and end logits of each window, float32 ``[tokens]`` each."""
        return list(zip(self.scored.start_logits, self.scored.end_logits, strict=True))

    def ranked(self, options: Options, top_k: int) -> list[Answer]:
        """The ``top_k`` best answers, with the null answer among them if it is allowed; spans are in the joined text."""
        return rank_answers(
            self.decoded,
            self.context.text,
            top_k=top_k,
            allow_no_answer=options.null_competes(self.settings),
            null_threshold=self.settings.null_threshold,
        )


def to_answers(pair: DecodedPair, options: Options) -> list[Answer]:
    """The answers of a decoded pair, best first, with the null answer among them if it is allowed."""
    answers = [answer for answer in pair.ranked(options, options.top_k) if answer.score >= options.min_score]
    joined = pair.passages
    parts = [joined.part_at(answer.start) if joined and answer.text else 0 for answer in answers]
    if joined:
        answers = [_in_passage(a, joined, i) if a.text else a for a, i in zip(answers, parts, strict=True)]
    if options.snippet is None and options.offsets == "codepoints":
        return answers
    texts = [joined.parts[i].text if joined else pair.context.text for i in parts]
    return present(answers, texts, options.snippet, options.offsets)


def _in_passage(answer: Answer, passages: JoinedText, part: int) -> Answer:
    begin = int(passages.begins[part])
    return replace(answer, start=answer.start - begin, end=answer.end - begin, passage=passages.numbers[part])


def figures_of(pair: DecodedPair, options: Options, unknown: int | None) -> Figures:
    """The figures of a question that are watched for drift, from its two best answers, whatever ``top_k`` and ``min_score`` are.

    Args:
        pair: The question, decoded with a ``top_k`` of at least ``COMPARED``.
        options: The options of the call that asked it.
        unknown: The id of the unknown token, or None if the tokenizer has none.
    """
    ranked = pair.ranked(options, COMPARED)
    best, second = (*(answer.score for answer in ranked), 0.0, 0.0)[:COMPARED]
    return {
        Figure.SCORE: best,
        Figure.MARGIN: max(best - second, 0.0),  # a null threshold may rank the less probable one first
        Figure.NO_ANSWER: float(not ranked or not ranked[0].text),
        Figure.QUESTION_TOKENS: len(pair.question),
        Figure.CONTEXT_TOKENS: len(pair.context),
        Figure.UNKNOWN_TOKENS: unknown_share([pair.question.ids, pair.context.ids], unknown),
    }


# ---------------------------------------------------------------- what may be asked


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
