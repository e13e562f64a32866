"""Transformers' pipeline and ours, and the questions that both answer."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers

from qadeploy.bench.peers.setup import quiet
from qadeploy.compat import QuestionAnsweringPipeline, pipeline
from qadeploy.core.windows import Encoder
from qadeploy.training.checkpoint import Checkpoint, encoder_config, load_checkpoint, torch_answerer
from tests.conftest import triplets

CONTEXT = "Ada keeps the lamp in room 3. Bela keeps the boat outside."
LAMP, BOAT = "Who keeps the lamp?", "Who keeps the boat?"
ONE, TWO = {"question": LAMP, "context": CONTEXT}, {"question": BOAT, "context": CONTEXT}
ROWS = triplets(300)


class Loud:
    """Transformers' pipeline without its deprecation warnings, lists of answers included."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self.create_sample = pipe.create_sample

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with quiet():
            return self.pipe(*args, **kwargs)

    def predict(self, inputs: Any) -> Any:
        with quiet():
            return self.pipe.predict(inputs)

    def transform(self, inputs: Any) -> Any:
        with quiet():
            return self.pipe.transform(inputs)


def their_pipeline(folder: Path, **options: Any) -> Any:
    with quiet():
        return transformers.pipeline("question-answering", model=str(folder), device="cpu", **options)


@dataclass(frozen=True)
class Both:
    """The two pipelines around one checkpoint in float32."""

    checkpoint: Checkpoint
    theirs: Loud
    ours: QuestionAnsweringPipeline

    @classmethod
    def around(cls, folder: Path, padding_side: str = "right") -> Both:
        loaded = load_checkpoint(folder)
        tokenizer = copy.deepcopy(loaded.tokenizer)
        tokenizer.padding_side = padding_side
        encoder = Encoder(tokenizer.backend_tokenizer, encoder_config(loaded.model, tokenizer))
        with quiet():
            theirs = transformers.pipeline("question-answering", model=loaded.model, tokenizer=tokenizer, device="cpu")
        answerer = torch_answerer(dataclasses.replace(loaded, encoder=encoder))
        return cls(loaded, Loud(theirs), pipeline(model=answerer))


def shape(value: Any) -> Any:
    """The answer without its score, which may differ."""
    if isinstance(value, list):
        return [shape(one) for one in value]
    assert list(value) == ["score", "start", "end", "answer"]
    assert [type(v) for v in value.values()] == [float, int, int, str]
    return {key: value[key] for key in ("start", "end", "answer")}
