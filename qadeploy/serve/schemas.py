"""The JSON that goes in and out, as pydantic models: the API's document is made of them.

Limits that an operator sets are not part of it: they are checked by ``limits`` and named by the error.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag

from qadeploy.inference.answerer import Options


def _whole(value: Any) -> Any:
    """JSON has one kind of number: 3.0 is a whole one. Texts and booleans stay what they are, and are refused."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _count(about: str, least: int = 1) -> Any:
    return Annotated[
        Annotated[int, Field(ge=least, strict=True), BeforeValidator(_whole)] | None,
        Field(description=f"{about} Null or absent: what the bundle says."),
    ]


def _flag(about: str) -> Any:
    return Annotated[bool, Field(description=about, strict=True)]


_QUESTION, _CONTEXT = "Who trims the light?", "Mungo Strand trims the light at Port Ansel 🏮 every evening."
Text = Annotated[str, Field(min_length=1, pattern=r"\S", strict=True)]
Question = Annotated[Text, Field(description="The question.", examples=[_QUESTION])]
Context = Annotated[Text, Field(description="The text that holds the answer.", examples=[_CONTEXT])]
TopK = Annotated[int, Field(ge=1, strict=True), BeforeValidator(_whole)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Choices(_Model):
    top_k: Annotated[TopK, Field(description="How many answers, best first; fewer come where there are fewer.")] = 1
    max_answer_len: _count("Longest answer in tokens.") = None  # type: ignore[valid-type]
    max_seq_len: _count("Longest window in tokens.") = None  # type: ignore[valid-type]
    doc_stride: _count("Overlap of neighbouring windows in tokens.", 0) = None  # type: ignore[valid-type]
    align_to_words: _flag("Widen answers to whole words.") = False  # type: ignore[valid-type]
    allow_no_answer: _flag(  # type: ignore[valid-type]
        "Let 'no answer' (the empty text at 0) compete, by the bundle's null threshold."
    ) = False
    prefilter: Annotated[
        Annotated[int, Field(ge=1, strict=True), BeforeValidator(_whole)] | None,
        Field(
            description="Read at most so many windows of a long context, the best by BM25: answers and scores are over these "
            "alone, and only these count for max_windows. Null or absent: all are read."
        ),
    ] = None

    @property
    def options(self) -> Options:
        """The choices as the answerer takes them."""
        return Options(
            self.top_k,
            self.max_answer_len,
            self.max_seq_len,
            self.doc_stride,
            self.align_to_words,
            self.allow_no_answer,
            self.prefilter,
        )


class AskItem(_Choices):
    """One question of a batch."""

    question: Question
    context: Context


class AskOne(AskItem):
    """One question on one context."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"question": _QUESTION, "context": _CONTEXT, "top_k": 3}]}
    )
    trace: _flag(  # type: ignore[valid-type]
        "Return the way to the answers too: tokens, windows, logits, candidates."
    ) = False


class AskMany(_Choices):
    """Many questions on one context, which is tokenised once."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"questions": [_QUESTION, "Where is the light?"], "context": _CONTEXT}]}
    )
    context: Context
    questions: Annotated[list[Question], Field(min_length=1)]


def _form(body: Any) -> str | None:
    if isinstance(body, list):
        return "batch"
    if isinstance(body, dict):
        return "questions" if "questions" in body else "question"
    return None


Batch = Annotated[list[AskItem], Field(min_length=1, description="A batch of questions, each on a context of its own.")]
AnswerRequest = Annotated[
    Annotated[AskOne, Tag("question")] | Annotated[AskMany, Tag("questions")] | Annotated[Batch, Tag("batch")],
    Discriminator(_form),
]


class AnswerOut(BaseModel):
    """An answer. ``context[start:end]`` is ``text``, counted in Unicode code points (not UTF-16 units, not bytes)."""

    text: str
    score: Annotated[float, Field(description="A probability: one softmax over all spans of all windows.")]
    start: Annotated[int, Field(ge=0, description="First code point of the answer in the context.")]
    end: Annotated[int, Field(ge=0, description="One past the last code point.")]


class TraceWindow(BaseModel):
    """One model input; all lists have one entry a token."""

    tokens: int
    context_begin: Annotated[int, Field(description="Position of the first context token in this window.")]
    context_offset: Annotated[int, Field(description="Number of that token in the whole context.")]
    context_length: Annotated[int, Field(description="How many context tokens stand in this window.")]
    input_ids: list[int]
    pieces: Annotated[list[str], Field(description="The tokens as the vocabulary writes them.")]
    offsets: Annotated[
        list[tuple[int, int] | None],
        Field(description="Code points of the context; null for the question and special tokens."),
    ]
    token_type_ids: list[int] | None
    start_logits: list[float]
    end_logits: list[float]


class TracePrefilter(BaseModel):
    """Which windows were read where ``prefilter`` left some out."""

    read: Annotated[
        list[int], Field(description="Their numbers among all windows, from 1; ``windows`` lists these alone.")
    ]
    scores: Annotated[list[float], Field(description="The BM25 score of every window.")]


class TraceCandidate(BaseModel):
    """A pair of start and end positions with its fate."""

    window: Annotated[int, Field(description="From 1, among those that were read.")]
    tokens: Annotated[list[int], Field(description="Start and end position in the window, both included.")]
    logit: float
    text: str
    verdict: str


class TraceOut(BaseModel):
    """The way from texts to answers."""

    settings: dict[str, Any]
    question_tokens: list[str]
    context_tokens: int
    prefilter: TracePrefilter | None
    windows: list[TraceWindow]
    candidates: list[TraceCandidate]
    null_logit: float


class AnswersOut(BaseModel):
    """The answers to one question, best first; ``trace`` only where it was asked for."""

    answers: list[AnswerOut]
    trace: TraceOut | None = None


class HfInput(_Model):
    """A question and its context."""

    question: Question
    context: Context


class HfParameters(_Model):
    """The parameters of the Hugging Face question-answering task."""

    top_k: Annotated[TopK | None, Field(description="Absent, null or 1: one object; else a list.")] = None
    doc_stride: _count("Overlap of windows in tokens.", 0) = None  # type: ignore[valid-type]
    max_answer_len: _count("Longest answer in tokens.") = None  # type: ignore[valid-type]
    max_seq_len: _count("Longest window in tokens.") = None  # type: ignore[valid-type]
    max_question_len: _count(  # type: ignore[valid-type]
        "Without effect, as in transformers' pipeline with a fast tokenizer: a question is never cut."
    ) = None
    align_to_words: Annotated[bool | None, Field(strict=True, description="True where absent, as in transformers.")] = (
        None
    )
    handle_impossible_answer: Annotated[bool | None, Field(strict=True, description="Let 'no answer' compete.")] = None

    @property
    def options(self) -> Options:
        """The parameters as the answerer takes them."""
        return Options(
            self.top_k or 1,
            self.max_answer_len,
            self.max_seq_len,
            self.doc_stride,
            self.align_to_words is not False,
            bool(self.handle_impossible_answer),
        )


class HfRequest(BaseModel):
    """A request of the Hugging Face task; other keys than these, such as ``options``, are ignored."""

    model_config = ConfigDict(
        frozen=True, json_schema_extra={"examples": [{"inputs": {"question": _QUESTION, "context": _CONTEXT}}]}
    )
    inputs: HfInput | Annotated[list[HfInput], Field(min_length=1)]
    parameters: HfParameters | None = None


class HfAnswer(BaseModel):
    """An answer in the Hugging Face task's form; offsets count code points."""

    answer: str
    score: float
    start: int
    end: int


class ModelOut(BaseModel):
    """What answers here."""

    name: str
    hash: Annotated[str, Field(description="SHA-256 over the manifest, which holds the hashes of all files.")]
    version: Annotated[str, Field(description="Of qadeploy.")]
    device: str
    workers: Annotated[int, Field(description="Windows (on CUDA: batches) that run at a time.")]
    limits: Annotated[dict[str, float], Field(description="What a request may ask for, by setting.")]
    manifest: dict[str, Any]


class StateOut(BaseModel):
    """How the server is."""

    status: str


class ErrorDetail(BaseModel):
    """What went wrong. ``limit`` and ``flag`` name the exceeded number and what raises it."""

    type: str
    message: str
    limit: float | None
    flag: str | None


class ErrorOut(BaseModel):
    """Every error has this form."""

    error: ErrorDetail
    request_id: str
