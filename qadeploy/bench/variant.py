"""A variant of a bench: something that answers questions, loaded in this process and again in separate ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from qadeploy.core.windows import Encoder
from qadeploy.inference.answerer import Answerer, LogitsModel
from qadeploy.inference.bundle import open_bundle
from qadeploy.records import NO_ANSWER, Answer

Pairs = Sequence[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Asker:
    """A loaded variant: gives the best answer to many (question, context) pairs at once, or to one.

    ``answerer`` is set if the variant uses our own encoder and decoder.
    """

    answer_all: Callable[[Pairs], list[Answer]]
    answer_one: Callable[[str, str], Answer]
    answerer: Answerer | None = None


@dataclass(frozen=True, slots=True)
class Variant:
    """How to load something that answers: ``loader`` is ``module:function``, ``arguments`` are JSON values.

    ``precision`` is the precision of its matmuls (fp32, bf16, fp16, int8), ``size`` the size of its weights in bytes,
    ``peer`` its name in ``--against`` ("" for one of our bundles).
    """

    name: str
    precision: str
    size: int
    loader: str
    arguments: Mapping[str, Any]
    peer: str = ""
    remark: str = ""

    def load(self) -> Asker:
        """Loads the variant into this process; may raise anything that its library raises."""
        return load(self.loader, self.arguments)


def load(loader: str, arguments: Mapping[str, Any]) -> Asker:
    """Calls ``module:function`` with ``arguments``."""
    module, _, function = loader.partition(":")
    found: Asker = getattr(import_module(module), function)(**arguments)
    return found


def around(answerer: Answerer, allow_no_answer: bool) -> Asker:
    """An answerer as an asker: answer_batch for many pairs, answer for one."""

    def first(found: list[Answer]) -> Answer:
        return found[0] if found else NO_ANSWER

    return Asker(
        lambda pairs: [first(found) for found in answerer.answer_batch(pairs, allow_no_answer=allow_no_answer)],
        lambda question, context: first(answerer.answer(question, context, allow_no_answer=allow_no_answer)),
        answerer,
    )


def host(bundle: str, model: Callable[[Encoder], LogitsModel]) -> Answerer:
    """An answerer with another runtime's model, and the encoder, the settings and the decoder of a bundle.

    Raises BundleError and InputError as ``open_bundle`` does.
    """
    found = open_bundle(bundle)
    encoder = found.load_encoder()
    return Answerer(encoder, found.settings, model(encoder), context_cache_bytes=0)
