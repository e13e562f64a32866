"""Lengths in tokens: of answers and contexts, how many windows a question needs, what their borders cut.

Counted with the model's own tokenizer and the one encoder, without the model.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from qadeploy.core.settings import QaSettings
from qadeploy.core.windows import Encoder, EncoderConfig
from qadeploy.data.check import DataCheck
from qadeploy.errors import InputError, QuestionTooLongError
from qadeploy.records import IntArray, Window

_ANSWER_EDGES = (1, 2, 3, 5, 9, 17, 33, 65)
_CONTEXT_EDGES = (1, 33, 65, 129, 257, 385, 513, 1025, 2049, 4097)
_WINDOW_EDGES = (1, 2, 3, 4, 5, 9, 17, 33)
_UNLIMITED = 10**9
_BAR = 40


@dataclass(frozen=True, slots=True)
class Lengths:
    """Lengths over the rows that can be used or repaired.

    ``context_tokens`` ``[contexts]`` and ``answer_tokens`` ``[answers]`` in tokens, ``windows`` ``[questions]``; ``cut``
    answers lie across the border of some window, ``lost`` ones are whole in no window. ``too_long`` questions leave no
    room for context, and are in none of these.
    """

    settings: QaSettings
    context_tokens: IntArray
    answer_tokens: IntArray
    windows: IntArray
    cut: int
    lost: int
    too_long: int

    def lines(self) -> list[str]:
        """The histograms and shares as text."""
        answers = max(len(self.answer_tokens), 1)
        text = [
            *histogram("answer tokens", self.answer_tokens, _ANSWER_EDGES),
            "",
            *histogram("context tokens", self.context_tokens, _CONTEXT_EDGES),
            "",
            *histogram(
                f"windows a question (max_seq_len {self.settings.max_seq_len}, doc_stride {self.settings.doc_stride})",
                self.windows,
                _WINDOW_EDGES,
            ),
            "",
            f"answers cut by a window's border: {self.cut} ({self.cut / answers:.1%}); whole in no window: "
            f"{self.lost} ({self.lost / answers:.1%})",
        ]
        if self.too_long:
            text.append(
                f"questions that leave no room for context in {self.settings.max_seq_len} tokens: {self.too_long}"
            )
        return text


def load_encoder(base: str) -> Encoder:
    """The encoder of a checkpoint folder or hub name, from its tokenizer alone. Raises InputError."""
    folder = Path(base)
    left = False
    if folder.is_dir():
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise InputError(f"{base}: has no tokenizer.json: save the checkpoint with a fast tokenizer")
        tokenizer_config = folder / "tokenizer_config.json"
        if tokenizer_config.is_file():
            try:
                left = json.loads(tokenizer_config.read_text(encoding="utf-8")).get("padding_side") == "left"
            except (ValueError, AttributeError) as error:
                raise InputError(f"{tokenizer_config}: not valid JSON: {error}") from error
        return Encoder.from_file(path, _config(left))
    try:
        tokenizer = Tokenizer.from_pretrained(base)
    except Exception as error:  # the Rust binding raises bare Exception
        raise InputError(
            f"{base}: neither a checkpoint folder nor a tokenizer that can be loaded from the hub: {' '.join(str(error).split())}"
        ) from error
    return Encoder(tokenizer, _config(left))


def _config(context_first: bool) -> EncoderConfig:
    # Only lengths are asked for: token types, null and padding play no part in them.
    return EncoderConfig(0, context_first, None, 0, _UNLIMITED)


def measure(check: DataCheck, encoder: Encoder, settings: QaSettings) -> Lengths:
    """Counts tokens and windows of every row that is not rejected. Raises StrideError, InputError on the settings."""
    usable = [row for row in check.rows if not row.reason and row.fields]
    contexts = list(dict.fromkeys(row.fields.context for row in usable if row.fields))
    encoded = dict(zip(contexts, encoder.encode_many(contexts), strict=True))
    questions = encoder.encode_many([row.fields.question for row in usable if row.fields])
    answer_tokens, window_counts = [], []
    cut = lost = too_long = 0
    for row, question in zip(usable, questions, strict=True):
        assert row.fields is not None  # noqa: S101 - usable rows have fields
        context = encoded[row.fields.context]
        try:
            windows = encoder.windows(
                question, context, max_seq_len=settings.max_seq_len, doc_stride=settings.doc_stride
            )
        except QuestionTooLongError:
            too_long += 1
            continue
        window_counts.append(len(windows))
        for finding in row.findings:
            span = context.tokens_of(finding.fixed.start, finding.fixed.end) if finding.fixed else None
            if span is None:
                continue
            answer_tokens.append(span[1] - span[0] + 1)
            is_cut, is_whole = _borders(windows, span)
            cut += is_cut
            lost += not is_whole
    return Lengths(
        settings,
        np.asarray([len(e) for e in encoded.values()], dtype=np.int64),
        np.asarray(answer_tokens, dtype=np.int64),
        np.asarray(window_counts, dtype=np.int64),
        cut,
        lost,
        too_long,
    )


def _borders(windows: Sequence[Window], span: tuple[int, int]) -> tuple[bool, bool]:
    """Whether some window holds a part of the span only, and whether some window holds it whole."""
    parts = [
        min(span[1], w.context_offset + w.context_length - 1) - max(span[0], w.context_offset) + 1 for w in windows
    ]
    size = span[1] - span[0] + 1
    return any(0 < part < size for part in parts), any(part == size for part in parts)


def histogram(name: str, values: IntArray, edges: Sequence[int]) -> list[str]:
    """A line a bin with a bar, under a line with the count, median, 95th percentile and maximum."""
    if not len(values):
        return [f"{name}: none"]
    middle, most = (int(np.percentile(values, q, method="higher")) for q in (50, 95))
    text = [f"{name}: {len(values)}, median {middle}, 95 % at most {most}, longest {int(values.max())}"]
    bounds = [*edges, _UNLIMITED]
    counts = [int(((values >= low) & (values < high)).sum()) for low, high in pairwise(bounds)]
    below = int((values < edges[0]).sum())
    rows = [(low, high, count) for (low, high), count in zip(pairwise(bounds), counts, strict=True)]
    while rows and not rows[-1][2]:
        rows.pop()
    if below:
        rows.insert(0, (0, edges[0], below))
    for low, high, count in rows:
        label = f"{low}" if high == low + 1 else f"{low}+" if high == _UNLIMITED else f"{low}-{high - 1}"
        bar = "█" * max(round(_BAR * count / len(values)), bool(count))
        text.append(f"  {label:>9}  {bar} {count}".rstrip())
    return text
