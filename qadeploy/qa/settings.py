"""The settings that turn a question-answering model into answers, stored beside its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from qadeploy.errors import InputError
from qadeploy.qa.spans import DEFAULT_MAX_ANSWER_LEN
from qadeploy.qa.windows import DEFAULT_DOC_STRIDE, DEFAULT_MAX_SEQ_LEN


@dataclass(frozen=True, slots=True)
class QaSettings:
    """``max_seq_len``: longest window; ``doc_stride``: overlap of windows; ``max_answer_len``: all in tokens."""

    max_seq_len: int = DEFAULT_MAX_SEQ_LEN
    doc_stride: int = DEFAULT_DOC_STRIDE
    max_answer_len: int = DEFAULT_MAX_ANSWER_LEN

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain JSON values."""
        return asdict(self)

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
        """Reads stored settings; unknown keys are ignored. Raises InputError naming ``where`` on wrong values."""
        found = {}
        for name in cls.__slots__:
            value = values.get(name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < (name != "doc_stride"):
                raise InputError(f"{where}: {name} is {value!r}, a positive whole number is needed")
            found[name] = value
        return cls(**found)
