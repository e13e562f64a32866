"""Lengths of answers and contexts in tokens, windows per question, and the answers that window borders cut.

They are counted with the model's tokenizer and encoder, without the model.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from qadeploy.core.settings import QaSettings
from qadeploy.core.unknown import MANY_UNKNOWN
from qadeploy.core.windows import Cut, Encoder, EncoderConfig
from qadeploy.data.check import CheckedData
from qadeploy.errors import InputError, QuestionTooLongError, one_line

_ANSWER_EDGES = (1, 2, 3, 5, 9, 17, 33, 65)
_CONTEXT_EDGES = (1, 33, 65, 129, 257, 385, 513, 1025, 2049, 4097)
_WINDOW_EDGES = (1, 2, 3, 4, 5, 9, 17, 33)
_UNLIMITED = 10**9
_BAR = 40
_SHOWN_ROWS = 10
_CHUNK = 2**18  # characters of contexts tokenised at a time


@dataclass(slots=True)
class Lengths:
    """Lengths over the rows that can be used or repaired.

    Attributes:
        settings: The settings by which the windows were cut.
        context_tokens: Tokens of each context.
        answer_tokens: Tokens of each answer.
        windows: Windows of each question.
        cut: Number of answers that the border of some window cuts.
        lost: Number of answers that are whole in no window.
        lowered: Number of questions that leave so little room that ``doc_stride`` was lowered for them.
        too_long_rows: Numbers of the rows whose question leaves no room for context; they are not counted elsewhere.
        tokens: Number of all tokens.
        unknown_tokens: Number of the tokens that the tokenizer does not know.
    """

    settings: QaSettings
    context_tokens: list[int] = field(default_factory=list)
    answer_tokens: list[int] = field(default_factory=list)
    windows: list[int] = field(default_factory=list)
    cut: int = 0
    lost: int = 0
    lowered: int = 0
    too_long_rows: list[int] = field(default_factory=list)
    tokens: int = 0
    unknown_tokens: int = 0

    @property
    def unknown(self) -> float:
        """Share of all tokens that the tokenizer does not know, 0 to 1."""
        return self.unknown_tokens / max(self.tokens, 1)

    def add_answers(self, spans: Iterable[tuple[int, int]], cut: Cut) -> None:
        """Adds the answers of one question, given by their first and last tokens."""
        for first, last in spans:
            size = last - first + 1
            parts = [min(last + 1, begin + cut.room) - max(first, begin) for begin in cut.begins]
            self.answer_tokens.append(size)
            self.cut += any(0 < part < size for part in parts)
            self.lost += size not in parts

    def lines(self) -> list[str]:
        """Returns the histograms and shares as lines of text."""
        answers = max(len(self.answer_tokens), 1)
        sizes = f"max_seq_len {self.settings.max_seq_len}, doc_stride {self.settings.doc_stride}"
        text = [
            *histogram("answer tokens", self.answer_tokens, _ANSWER_EDGES),
            "",
            *histogram("context tokens", self.context_tokens, _CONTEXT_EDGES),
            "",
            *histogram(f"windows per question ({sizes})", self.windows, _WINDOW_EDGES),
            "",
            f"answers cut by a window border: {self.cut} ({self.cut / answers:.1%}); whole in no window: "
            f"{self.lost} ({self.lost / answers:.1%})",
        ]
        if self.unknown > MANY_UNKNOWN:
            text.append(
                f"unknown to the tokenizer: {self.unknown:.0%} of the tokens; a model cannot learn them (--base)"
            )
        if self.lowered:
            text.append(f"questions that leave so little room that doc_stride was lowered: {self.lowered}")
        if self.too_long_rows:
            more = ", ..." if len(self.too_long_rows) > _SHOWN_ROWS else ""
            text.append(
                f"questions that leave no room for context in {self.settings.max_seq_len} tokens: {len(self.too_long_rows)} "
                f"(row {', '.join(map(str, self.too_long_rows[:_SHOWN_ROWS]))}{more})"
            )
        return text


def load_encoder(base: str) -> Encoder:
    """Loads the encoder of a checkpoint folder or hub name, from its tokenizer alone. Raises InputError."""
    folder = Path(base)
    config = EncoderConfig(0, False, None, 0, _UNLIMITED)  # lengths depend on no token types, null token or padding
    if folder.is_dir():
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise InputError(f"{base}: has no tokenizer.json: save the checkpoint with a fast tokenizer")
        tokenizer_config = folder / "tokenizer_config.json"
        if tokenizer_config.is_file():
            try:
                left = json.loads(tokenizer_config.read_text(encoding="utf-8")).get("padding_side") == "left"
                config = replace(config, context_first=left)
            except (ValueError, AttributeError) as error:
                raise InputError(f"{tokenizer_config}: not valid JSON: {error}") from error
        return Encoder.from_file(path, config)
    try:
        tokenizer = Tokenizer.from_pretrained(base)
    except Exception as error:  # the Rust binding raises bare Exception
        raise InputError(
            f"{base}: neither a checkpoint folder nor a tokenizer that can be loaded from the hub: {one_line(error)}"
        ) from error
    return Encoder(tokenizer, config)


def measure_lengths(check: CheckedData, encoder: Encoder, settings: QaSettings) -> Lengths:
    """Counts the tokens and windows of every row that is not rejected.

    Args:
        check: The checked rows.
        encoder: The model's encoder.
        settings: The settings that determine the sizes of windows.

    Raises:
        StrideError: ``doc_stride`` is at least ``max_seq_len``, and a context needs several windows.
        InputError: The sizes are invalid.
    """
    groups = check.by_context()
    found = Lengths(settings)
    for contexts in _chunks(groups):
        rows = [pair for context in contexts for pair in groups[context]]
        encoded = dict(zip(contexts, encoder.encode_many(contexts), strict=True))
        questions = encoder.encode_many([parsed.question for _, parsed in rows])
        ids = np.concatenate([text.ids for text in (*encoded.values(), *questions)])
        found.tokens += len(ids)
        found.unknown_tokens += 0 if encoder.unknown_id is None else int((ids == encoder.unknown_id).sum())
        found.context_tokens += [len(context) for context in encoded.values()]
        for (row, parsed), question in zip(rows, questions, strict=True):
            context = encoded[parsed.context]
            try:
                cut = encoder.cut(question, context, **settings.lengths)
            except QuestionTooLongError:
                found.too_long_rows.append(row.raw.number)
                continue
            found.lowered += cut.overlap < settings.doc_stride
            found.windows.append(len(cut.begins))
            spans = [context.tokens_of(a.fixed.start, a.fixed.end) for a in row.answers if a.fixed]
            found.add_answers(filter(None, spans), cut)
    found.too_long_rows.sort()
    return found


def _chunks(contexts: Iterable[str]) -> Iterator[list[str]]:
    """Yields lists of contexts that are small enough for their tokens to need little memory."""
    chunk: list[str] = []
    characters = 0
    for context in contexts:
        if chunk and characters + len(context) > _CHUNK:
            yield chunk
            chunk, characters = [], 0
        chunk.append(context)
        characters += len(context)
    if chunk:
        yield chunk


def histogram(name: str, lengths: Sequence[int], edges: Sequence[int]) -> list[str]:
    """Draws a histogram: count, median, 95th percentile and maximum, then one line with a bar per bin."""
    if not lengths:
        return [f"{name}: none"]
    values = np.asarray(lengths)
    middle, most = (int(np.percentile(values, q, method="higher")) for q in (50, 95))
    text = [f"{name}: {len(values)}, median {middle}, 95 % at most {most}, longest {int(values.max())}"]
    bins = [*pairwise([*edges, _UNLIMITED])]
    rows = [(low, high, int(((values >= low) & (values < high)).sum())) for low, high in bins]
    while rows and not rows[-1][2]:
        rows.pop()
    if below := int((values < edges[0]).sum()):
        rows.insert(0, (0, edges[0], below))
    for low, high, count in rows:
        label = f"{low}" if high == low + 1 else f"{low}+" if high == _UNLIMITED else f"{low}-{high - 1}"
        bar = "█" * max(round(_BAR * count / len(values)), bool(count))
        text.append(f"  {label:>9}  {bar} {count}".rstrip())
    return text
