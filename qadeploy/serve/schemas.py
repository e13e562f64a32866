"""The JSON of requests and responses as pydantic models, from which the API documents are made.

The limits that an operator sets are not part of the schema: ``limits`` checks them, and the errors name them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, create_model, model_validator
from pydantic_core import PydanticCustomError

from qadeploy.core.settings import Options
from qadeploy.inference.pairs import Texts
from qadeploy.options import declared


def _whole(value: Any) -> Any:
    """Turns 3.0 into 3, because JSON has a single number type. Other values are returned unchanged, and refused later."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


_DECLARED = declared(Options)


def choice(name: str) -> Any:
    """The type of an answering option, with its declared range and description."""
    one = _DECLARED[name]
    text = one.help if one.default is not None else f"{one.help} Null or absent: {one.default_text}."
    about = Field(description=text)
    if one.kind is bool:
        kind: Any = Annotated[bool, Field(strict=True)]
    elif one.kind is str:
        kind = Literal[one.choices]
    elif one.kind is float:
        kind = Annotated[float, Field(ge=one.least, le=one.most, strict=True)]
    else:
        most = None if one.most is None else int(one.most)
        kind = Annotated[int, Field(ge=int(one.least or 0), le=most, strict=True), BeforeValidator(_whole)]
        if one.choices:
            kind = kind | Literal[one.choices]
    return Annotated[kind if one.default is not None else kind | None, about]


_QUESTION, _CONTEXT = "Who trims the light?", "Mungo Strand trims the light at Port Ansel 🏮 every evening."
Text = Annotated[str, Field(min_length=1, pattern=r"\S", strict=True)]
Question = Annotated[Text, Field(description="The question.", examples=[_QUESTION])]
Context = Annotated[Text, Field(description="The text that holds the answer.", examples=[_CONTEXT])]
Passages = Annotated[
    list[Annotated[str, Field(strict=True)]],
    Field(
        min_length=1,
        description="Passages that are read together, instead of `context`; empty ones are skipped.",
        examples=[[_CONTEXT, "Port Ansel has a pub, the Galley."]],
    ),
]
TopK = Annotated[int, Field(ge=1, strict=True), BeforeValidator(_whole)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def answering_model(name: str, options: Iterable[str], base: type[BaseModel]) -> Any:
    """A model whose fields are the given answering options, as they are declared."""
    fields: dict[str, Any] = {each: (choice(each), _DECLARED[each].default) for each in options}
    return create_model(name, __base__=base, __module__=base.__module__, **fields)


class _Texts(answering_model("_Choices", _DECLARED, _Model)):  # type: ignore[misc]
    """A context or passages; neither is needed on a server with a corpus."""

    model_config = ConfigDict(json_schema_extra={"oneOf": [{"required": ["context"]}, {"required": ["contexts"]}]})
    needed: ClassVar[bool] = True
    context: Context | None = None
    contexts: Passages | None = None

    @model_validator(mode="after")
    def _one_of(self) -> Self:
        given = (self.context is not None) + (self.contexts is not None)
        if given == 2 or (self.needed and not given):
            other = "" if self.needed else ", or neither for the corpus"
            raise PydanticCustomError("texts", f"give either context, or contexts for several passages{other}")
        return self

    @property
    def options(self) -> Options:
        """The options for the answerer."""
        return Options(**{name: getattr(self, name) for name in _DECLARED})

    @property
    def texts(self) -> Texts | None:
        """The context, or the passages; None for the corpus."""
        return self.context if self.contexts is None else tuple(self.contexts)


class AskItem(_Texts):
    """One question of a batch."""

    question: Question


class AskOne(AskItem):
    """One question on one context."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"question": _QUESTION, "context": _CONTEXT, "top_k": 3}]}
    )
    trace: bool = Field(
        default=False, description="Also return the trace: tokens, windows, logits and candidates.", strict=True
    )


class AskMany(_Texts):
    """Many questions on one context or on the same passages, which are tokenised once."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"questions": [_QUESTION, "Where is the light?"], "context": _CONTEXT}]}
    )
    questions: Annotated[list[Question], Field(min_length=1)]


FORMS = ("one", "many", "batch")  # the tags of the forms of a body; pydantic adds them to the location of an error


def _form(body: Any) -> str | None:
    if isinstance(body, list):
        return "batch"
    if isinstance(body, dict):
        return "many" if "questions" in body else "one"
    return None


def _request(one: Any, many: Any, item: Any, batch: str, needed: str) -> Any:
    """The type of a body in one of the forms; ``batch`` describes a list, ``needed`` is the error for any other body."""
    several = Annotated[list[item], Field(min_length=1, description=batch)]
    forms = Annotated[one, Tag("one")] | Annotated[many, Tag("many")] | Annotated[several, Tag("batch")]
    return Annotated[forms, Discriminator(_form, custom_error_type="form", custom_error_message=needed)]


AnswerRequest = _request(
    AskOne,
    AskMany,
    AskItem,
    "A batch of questions, each with its own context or passages.",
    "give an object with question and context, or with questions and context, or a list of objects",
)
_NOT_BOTH: Any = {"not": {"required": ["context", "contexts"]}}


class CorpusItem(AskItem):
    """One question of a batch; without a context it is answered from the corpus."""

    model_config = ConfigDict(json_schema_extra=_NOT_BOTH)
    needed = False


class CorpusOne(AskOne):
    """One question; without a context it is answered from the corpus."""

    model_config = ConfigDict(json_schema_extra=_NOT_BOTH | {"examples": [{"question": _QUESTION, "top_k": 3}]})
    needed = False


class CorpusMany(AskMany):
    """Many questions; without a context each is answered from the corpus."""

    model_config = ConfigDict(json_schema_extra=_NOT_BOTH | {"examples": [{"questions": [_QUESTION]}]})
    needed = False


CorpusRequest = _request(
    CorpusOne,
    CorpusMany,
    CorpusItem,
    "A batch of questions, each with its own context or passages, or none.",
    "give an object with question or questions, and with context unless the corpus is meant, or a list of objects",
)


class SnippetOut(BaseModel):
    """The text around an answer, which is ``context[start:end]`` (or ``document[start:end]``) in the units of the answer."""

    text: str
    start: int = Field(ge=0)
    end: int = Field(ge=0)


class AnswerOut(BaseModel):
    """An answer. ``context[start:end]`` is ``text``, in Unicode code points unless ``offsets`` asks for another unit.

    From the corpus, ``document[start:end]`` is ``text``.
    """

    text: str
    score: float = Field(description="A probability: one softmax over all spans of all windows.")
    start: int = Field(ge=0, description="First code point of the answer in its context, passage or document.")
    end: int = Field(ge=0, description="One past the last code point.")
    passage: int | None = Field(
        default=None,
        ge=0,
        description="The index of its passage in `contexts`, or in the `passages` of the result, from 0; absent for "
        "`context` and for 'no answer'.",
    )
    snippet: SnippetOut | None = Field(
        default=None,
        description="Only if it was requested, or the answer is from the corpus (by default 200 characters on each side); "
        "absent for 'no answer'.",
    )
    document: str | None = Field(
        default=None, description="Only from the corpus: the document that holds the answer; empty for 'no answer'."
    )
    place: str | None = Field(
        default=None, description="Only from the corpus: the headings above the answer, its page, or its line."
    )


class PassageOut(BaseModel):
    """A passage of the corpus that the model read."""

    document: str
    place: str
    score: float = Field(description="How well it matches the question by BM25; comparable within one question only.")


class TraceWindow(BaseModel):
    """One model input; all lists have one entry per token."""

    tokens: int
    passage: int | None = Field(default=None, description="The index of its passage; absent for a single context.")
    context_begin: int = Field(description="Position of the first context token in this window.")
    context_offset: int = Field(description="Index of that token in the whole context or passage.")
    context_length: int = Field(description="Number of context tokens in this window.")
    input_ids: list[int]
    pieces: list[str] = Field(description="The tokens as the vocabulary spells them.")
    offsets: list[tuple[int, int] | None] = Field(
        description="Code points of the context or passage; null for the question and special tokens."
    )
    token_type_ids: list[int] | None
    start_logits: list[float]
    end_logits: list[float]


class TracePrefilter(BaseModel):
    """Which windows were read, if ``prefilter`` left some out."""

    read: list[int] = Field(description="Their numbers among all windows, from 1; ``windows`` lists only these.")
    scores: list[float] = Field(description="The BM25 score of every window.")


class TraceCandidate(BaseModel):
    """A pair of start and end positions, and whether it became an answer."""

    window: int = Field(description="The number of its window among those that were read, from 1.")
    tokens: list[int] = Field(description="First and last position in the window.")
    logit: float
    text: str
    answer: int | None = Field(description="Rank among the answers, from 1; null if it is none of them.")
    verdict: str = Field(description="Why it is or is not an answer, for people.")


class TraceOut(BaseModel):
    """The steps from the texts to the answers."""

    settings: dict[str, Any]
    question_tokens: list[str]
    context_tokens: int
    prefilter: TracePrefilter | None
    windows: list[TraceWindow]
    candidates: list[TraceCandidate]
    null_logit: float


class AnswersOut(BaseModel):
    """The answers to one question, best first; ``trace`` only if it was requested."""

    answers: list[AnswerOut]
    skipped: list[int] | None = Field(
        default=None, description="The indices of empty passages, which were skipped; absent if there are none."
    )
    passages: list[PassageOut] | None = Field(
        default=None,
        description="Only from the corpus: the passages read, best first; empty if no word of the question occurs there.",
    )
    trace: TraceOut | None = None


class HfInput(_Model):
    """A question and its context."""

    question: Question
    context: Context


class HfParameters(_Model):
    """The parameters of the Hugging Face question-answering task."""

    top_k: TopK | None = Field(default=None, description="Absent, null or 1 gives one object, a larger number a list.")
    doc_stride: choice("doc_stride") = None  # type: ignore[valid-type]
    max_answer_len: choice("max_answer_len") = None  # type: ignore[valid-type]
    max_seq_len: choice("max_seq_len") = None  # type: ignore[valid-type]
    max_question_len: TopK | None = Field(
        default=None,
        description="No effect, as in the transformers pipeline with a fast tokenizer: a question is never truncated.",
    )
    align_to_words: bool | None = Field(default=None, strict=True, description="True by default, as in transformers.")
    handle_impossible_answer: bool | None = Field(default=None, strict=True, description="Let 'no answer' compete.")

    @property
    def options(self) -> Options:
        """The options for the answerer."""
        return Options(
            self.top_k or 1,
            self.max_answer_len,
            self.max_seq_len,
            self.doc_stride,
            self.align_to_words is not False,
            bool(self.handle_impossible_answer),
        )


class HfRequest(BaseModel):
    """A request of the Hugging Face task; other keys, such as ``options``, are ignored."""

    model_config = ConfigDict(
        frozen=True, json_schema_extra={"examples": [{"inputs": {"question": _QUESTION, "context": _CONTEXT}}]}
    )
    inputs: HfInput | Annotated[list[HfInput], Field(min_length=1)]
    parameters: HfParameters | None = None


class HfAnswer(BaseModel):
    """An answer in the format of the Hugging Face task; offsets count code points."""

    answer: str
    score: float
    start: int
    end: int


class CorpusOut(BaseModel):
    """The corpus that questions without a context are answered from."""

    documents: int
    passages: int
    sha256: str = Field(description="SHA-256 of the manifest of its index, which holds the hashes of all files.")


class ModelOut(BaseModel):
    """The bundle in use."""

    name: str
    hash: str = Field(description="SHA-256 of the manifest, which holds the hashes of all files.")
    version: str = Field(description="The version of qadeploy.")
    device: str
    workers: int = Field(description="Windows (on CUDA, batches) that run at the same time.")
    limits: dict[str, float] = Field(description="The limits of a request, by name of the setting.")
    manifest: dict[str, Any]
    corpus: CorpusOut | None = Field(default=None, description="Absent without a corpus.")


class RightAnswer(_Model):
    """The right answer."""

    text: str = Field(strict=True, description="A part of the context; empty if the answer is not in it.")
    start: int | None = Field(
        None,
        ge=0,
        strict=True,
        description="Its first code point in the context, or in the document if that comes from the corpus; needed if it "
        "occurs in the context several times.",
    )


class FeedbackRequest(_Model):
    """A verdict on the best answer to a question."""

    request_id: str = Field(min_length=1, max_length=64, description="The X-Request-ID of the response.")
    question: int = Field(default=0, ge=0, strict=True, description="Its index among the questions of that request.")
    verdict: Literal["right", "wrong"]
    answer: RightAnswer | None = None


class ReloadOut(BaseModel):
    """The bundle in use after a reload."""

    name: str
    hash: str
    changed: bool = Field(description="Whether it differs from the previous bundle.")


class StateOut(BaseModel):
    """The state of the server."""

    status: str


class ErrorDetail(BaseModel):
    """What went wrong. ``limit`` and ``flag`` are the limit that was exceeded and the flag that raises it."""

    type: str
    message: str
    limit: float | None
    flag: str | None


class ErrorOut(BaseModel):
    """The JSON of every error."""

    error: ErrorDetail
    request_id: str
