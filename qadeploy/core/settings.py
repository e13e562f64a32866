"""The settings that turn a question-answering model into answers, stored beside its weights."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from qadeploy.core.decoding import DEFAULT_MAX_ANSWER_LEN, Scored
from qadeploy.core.windows import DEFAULT_DOC_STRIDE, DEFAULT_MAX_SEQ_LEN, EncodedText
from qadeploy.errors import InputError
from qadeploy.records import Example, FloatArray, Window


@dataclass(frozen=True, slots=True)
class QaSettings:
    """``max_seq_len``: longest window; ``doc_stride``: overlap of windows; ``max_answer_len``: all in tokens.

    ``null_threshold``: where "no answer" is allowed it wins if its logit exceeds the best span's by more than this;
    None for a model that was trained on answerable questions alone, which is 0 where it is asked for all the same.
    ``temperature``: the logits are divided by it before the softmax that makes scores (Guo et al. 2017).
    ``relative_to_null``: spans are ranked by their logit less the null logit of their window, the odds that the window
    holds them, which compare between windows of a model that was trained to tell windows without an answer.
    """

    max_seq_len: int = DEFAULT_MAX_SEQ_LEN
    doc_stride: int = DEFAULT_DOC_STRIDE
    max_answer_len: int = DEFAULT_MAX_ANSWER_LEN
    null_threshold: float | None = None
    temperature: float = 1.0
    relative_to_null: bool = False

    def scored(
        self,
        windows: Sequence[Window],
        start_logits: Sequence[FloatArray],
        end_logits: Sequence[FloatArray],
        context: EncodedText,
    ) -> Scored:
        """Windows with a model's logits as these settings rank them, for the decoder.

        Args:
            windows: Those of one question over one context.
            start_logits: Float32 ``[tokens]`` of each window, or more.
            end_logits: The same for the ends.
            context: The context.
        """
        if self.relative_to_null:
            start_logits, end_logits = (
                [x - x[w.null_index] for w, x in zip(windows, logits, strict=True)]
                for logits in (start_logits, end_logits)
            )
        return Scored(windows, start_logits, end_logits, context)

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain JSON values."""
        return asdict(self)

    def null_competes(self, examples: Iterable[Example]) -> bool:
        """Whether "no answer" competes when ``examples`` are scored: the one rule for training, gates and evaluation.

        It does if any of the examples has no answer. Where all have one, as in SQuAD v1.1, every question is answered.
        """
        return any(not e.answers for e in examples)

    def changed(
        self, *, max_seq_len: int | None = None, doc_stride: int | None = None, max_answer_len: int | None = None
    ) -> QaSettings:
        """These settings with some chosen anew (None: as they are). Raises InputError on values below 1 (stride: 0).

        Where only ``max_seq_len`` is chosen, ``doc_stride`` shrinks to at most a third of it.
        """
        if max_seq_len is not None and doc_stride is None:
            doc_stride = min(self.doc_stride, max_seq_len // 3)
        chosen = {"max_seq_len": max_seq_len, "doc_stride": doc_stride, "max_answer_len": max_answer_len}
        return self.from_dict({**self.to_dict(), **{k: v for k, v in chosen.items() if v is not None}}, "option")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str) -> QaSettings:
        """Reads stored settings; unknown keys are ignored, missing ones and null take their defaults.

        Raises InputError naming ``where`` on wrong values.
        """
        found: dict[str, Any] = {}
        for name in cls.__slots__:
            value = values.get(name)
            if value is None:
                continue
            if name == "relative_to_null":
                if not isinstance(value, bool):
                    raise InputError(f"{where}: {name} is {value!r}, true or false is needed")
                found[name] = value
                continue
            if name in {"null_threshold", "temperature"}:
                found[name] = _number(value, name, where)
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < (name != "doc_stride"):
                raise InputError(f"{where}: {name} is {value!r}, a positive whole number is needed")
            found[name] = value
        return cls(**found)


def _number(value: object, name: str, where: str) -> float:
    sound = isinstance(value, int | float) and not isinstance(value, bool)
    if sound and abs(value) <= sys.float_info.max and (name != "temperature" or value > 0):  # type: ignore[arg-type,operator]
        return float(value)  # type: ignore[arg-type]
    needed = "a number above 0" if name == "temperature" else "a number"
    raise InputError(f"{where}: {name} is {value!r}, {needed} is needed")
