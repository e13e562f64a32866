"""The question-answering pipeline of transformers 4.57 on a bundle, without torch: same calls, results and ValueErrors.

    from qadeploy.integrations.transformers_pipeline import pipeline

    qa = pipeline("question-answering", model="bundles/faq")
    qa(question="Who keeps the lamp?", context="Mungo Strand keeps the lamp.")
    # {"score": 0.97, "start": 0, "end": 12, "answer": "Mungo Strand"}

The answers are the ``Answerer``'s: one softmax over all windows instead of added-up scores, and never tokens of the
question. ``docs/migrating.md`` lists every difference; the tests run both side by side.
"""

from __future__ import annotations

import operator
import sys
import types
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from qadeploy.core.windows import DEFAULT_DOC_STRIDE, DEFAULT_MAX_SEQ_LEN
from qadeploy.errors import CallError, CallKeyError, InputError
from qadeploy.inference.answerer import Answerer
from qadeploy.inference.pairs import Asked, check_passages, check_text, texts_of
from qadeploy.records import Answer

__all__ = ["QuestionAnsweringPipeline", "SquadExample", "pipeline"]

TASK = "question-answering"
_LEAST = dict.fromkeys(("top_k", "max_answer_len", "max_seq_len", "max_question_len", "batch_size"), 1)
_LEAST |= {"doc_stride": 0, "num_workers": 0}
_SWITCHES = ("handle_impossible_answer", "align_to_words")
_PADDINGS = (True, False, "longest", "max_length", "do_not_pad")
_INPUTS = ("X", "data", "question", "context", "contexts")
_FORMS = "give question= and context=, a dict with both, or a list of such dicts"
_DTYPES = {"float32": "fp32", "float": "fp32", "float16": "fp16", "half": "fp16"}
_STAND_IN = "-"  # replaces a blank context, so that the questions of a batch keep their numbers


@dataclass(frozen=True, slots=True)
class SquadExample:
    """One question on one context, as ``QuestionAnsweringPipeline.create_sample`` returns it."""

    question_text: str
    context_text: str


@dataclass(frozen=True, slots=True)
class _Parameters:
    """The options of a call, with the pipeline's defaults; None means the model's default. Lengths are in tokens."""

    top_k: int = 1
    max_answer_len: int = 15
    max_seq_len: int | None = None
    doc_stride: int | None = None
    max_question_len: int | None = None
    handle_impossible_answer: bool = False
    align_to_words: bool = True
    batch_size: int = 1

    def changed(self, given: Mapping[str, Any]) -> _Parameters:
        """A copy with the ``given`` options that are not None. Raises CallError on invalid values.

        Transformers silently ignores unknown names; here a UserWarning names them.
        """
        values = {name: value for name, value in given.items() if value is not None}
        if "topk" in values:
            old = values.pop("topk")
            values.setdefault("top_k", old)
        chosen: dict[str, Any] = {name: _whole(name, values.pop(name)) for name in _LEAST if name in values}
        chosen.update({name: bool(values.pop(name)) for name in _SWITCHES if name in values})
        padding = values.pop("padding", False)
        if padding not in _PADDINGS:
            raise CallError(f"padding is {padding!r}: give longest, max_length or do_not_pad")
        chosen.pop("num_workers", None)  # windows are made on the tokenizer's own threads
        if values:
            known = ", ".join(sorted((*_LEAST, *_SWITCHES, "padding")))
            warnings.warn(
                f"the pipeline has no option {', '.join(values)}, so it is ignored: there are {known}",
                UserWarning,
                stacklevel=3,
            )
        return replace(self, **chosen)


def _whole(name: str, value: object) -> int:
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise CallError(f"{name} must be a whole number, not {value!r}") from None
    if number < _LEAST[name]:
        raise CallError(f"{name} is {number}: at least {_LEAST[name]} is needed")
    return number


class QuestionAnsweringPipeline:
    """Has the calls and results of transformers' pipeline of that name; made by ``pipeline``. Thread-safe.

    ``answerer`` is the underlying ``Answerer``, for everything that the pipeline's calls cannot express.
    """

    task = TASK

    def __init__(self, answerer: Answerer, parameters: _Parameters) -> None:
        self.answerer = answerer
        self._parameters = parameters

    @staticmethod
    def create_sample(question: str | list[str], context: str | list[str]) -> SquadExample | list[SquadExample]:
        """A question with its context, or a list of them if both are lists. Raises CallError on other types."""
        pairs = _paired(question, context)
        samples = [SquadExample(pair["question"], pair["context"]) for pair in pairs]
        return samples if isinstance(question, list) else samples[0]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The answer ``{"score", "start", "end", "answer"}`` to each question; with ``top_k`` above 1, a list of answers.

        ``start`` and ``end`` are code points: ``context[start:end] == answer``. If nothing in the context can be an answer, it
        is "" at 0. Questions are given as

        - ``question=`` and ``context=``: two texts, a list of questions on one context, or two lists of equal length;
        - ``question=`` and ``contexts=``, a list of passages that are read together, which transformers does not have: each answer
          also has the index of its ``passage``;
        - a dict with these keys, several, or a list of them (or of ``create_sample``'s results), also as ``data=`` or ``X=``;
        - a generator, whose questions are answered while the answers are iterated, ``batch_size`` at a time, or a torch
          ``Dataset``, likewise, each time the result is iterated.

        One question (or a list of one) gives its answer, several give a list. Options: ``top_k`` (or ``topk``),
        ``max_answer_len`` (15), ``max_seq_len`` (384, or the model's limit if lower), ``doc_stride`` (128, at most half of
        ``max_seq_len``), ``max_question_len`` (longer questions are cut; default: no limit), all in tokens,
        ``handle_impossible_answer``, ``align_to_words`` (true); ``padding`` and ``num_workers`` change nothing.

        Raises CallError, a ValueError, on an invalid call or value; CallKeyError, also a KeyError, if a dict lacks a key;
        and what ``Answerer.answer`` raises.
        """
        named = {name: kwargs.pop(name) for name in _INPUTS if name in kwargs}
        inputs = _inputs(args, named)
        parameters = self._parameters.changed(kwargs)
        options = self._options(parameters)
        if isinstance(inputs, types.GeneratorType):
            return self._lazily(inputs, parameters, options)
        if _is_dataset(inputs):
            return _Answers(inputs, lambda rows: self._lazily(rows, parameters, options))
        pairs, alone = _eager(inputs)
        answers = self._answer(pairs, parameters, options) if pairs else []
        return answers[0] if alone else answers

    def predict(self, inputs: Any) -> Any:
        """``self(inputs)``, as scikit-learn calls it."""
        return self(inputs)

    transform = predict

    def _options(self, parameters: _Parameters) -> dict[str, Any]:
        """The options of the answerer's call. Raises CallError on a ``doc_stride`` that leaves no room for new text."""
        encoder = self.answerer.encoder
        length = parameters.max_seq_len or min(encoder.config.position_limit, DEFAULT_MAX_SEQ_LEN)
        stride = parameters.doc_stride
        # Transformers' bound, whatever the text.
        if stride is not None and stride > length - encoder.special_tokens + 1:
            raise CallError(
                f"doc_stride {stride} is too large for max_seq_len {length}: it is the tokens of context that neighbouring "
                "windows share, so it must be below the tokens of context that a window holds"
            )
        return {
            # More than requested, because answers with the same text are merged.
            "top_k": 1 if parameters.top_k == 1 else 2 * parameters.top_k + 10,
            "max_answer_len": parameters.max_answer_len,
            "max_seq_len": length,
            "doc_stride": min(length // 2, DEFAULT_DOC_STRIDE) if stride is None else stride,
            "align_to_words": parameters.align_to_words,
            "allow_no_answer": parameters.handle_impossible_answer,
        }

    def _lazily(self, items: Iterable[Any], parameters: _Parameters, options: dict[str, Any]) -> Iterator[Any]:
        rows = iter(items)
        first = 1
        while batch := list(islice(rows, parameters.batch_size)):
            pairs = [_streamed(item, f"question {number}: ") for number, item in enumerate(batch, first)]
            try:
                answers = self._answer(pairs, parameters, options)
            except InputError as error:
                last = first + len(batch) - 1
                where = f"question {first}" if first == last else f"questions {first} to {last}"
                raise type(error)(f"{where}: {error}") from error
            yield from answers
            first += len(batch)

    def _answer(self, pairs: Sequence[Asked], parameters: _Parameters, options: dict[str, Any]) -> list[Any]:
        asked: list[Asked] = [
            (self._cut(question, parameters.max_question_len), context if texts_of(context) else _STAND_IN)
            for question, context in pairs
        ]
        question, given = asked[0]
        if len(asked) > 1:
            found = self.answerer.answer_batch(asked, **options)
        elif isinstance(given, str):
            found = [self.answerer.answer(question, given, **options)]
        else:
            found = [self.answerer.answer(question, contexts=given, **options)]
        return [
            _shaped(answers if texts_of(context) else [], parameters)
            for answers, (_, context) in zip(found, pairs, strict=True)
        ]

    def _cut(self, question: str, longest: int | None) -> str:
        """The question's first ``longest`` tokens."""
        if longest is None:
            return question
        tokens = self.answerer.encoder.encode(question)
        return question if len(tokens) <= longest else question[: int(tokens.offsets[longest - 1, 1])]


class _Answers:
    """The answers of a data set, found on each iteration."""

    def __init__(self, data: Any, answers: Callable[[Iterable[Any]], Iterator[Any]]) -> None:
        self._data = data
        self._answers = answers

    def __iter__(self) -> Iterator[Any]:
        whole = hasattr(self._data, "__iter__")
        return self._answers(self._data if whole else (self._data[i] for i in range(len(self._data))))

    def __len__(self) -> int:
        return len(self._data)


def _shaped(answers: Sequence[Answer], parameters: _Parameters) -> Any:
    """One dict for ``top_k`` 1, else a list. Of answers whose texts differ only in case, the best is kept."""
    best: dict[str, Answer] = {}
    for answer in answers or [Answer("", 0, 0, float(parameters.handle_impossible_answer))]:
        best.setdefault(answer.text.lower(), answer)
    rows = [
        {"score": a.score, "start": a.start, "end": a.end, "answer": a.text}
        | ({} if a.passage is None else {"passage": a.passage})
        for a in best.values()
    ]
    return rows[0] if parameters.top_k == 1 else rows[: parameters.top_k]


# ---------------------------------------------------------------- the questions of a call


def _inputs(args: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """The questions of a call in any form. Raises CallError if there are none, or two forms at once."""
    if args and named:
        raise CallError(f"give questions once: the call has positional ones and {', '.join(named)}=")
    if len(args) == 1:
        return args[0]
    if args:
        pair = len(args) == 2 and all(isinstance(text, str) for text in args)
        return [{"question": args[0], "context": args[1]}] if pair else list(args)
    if len(named) == 1 and ("X" in named or "data" in named):
        return next(iter(named.values()))
    if set(named) == {"question", "context"}:
        return _paired(named["question"], named["context"])
    if set(named) == {"question", "contexts"}:
        return named
    found = " and ".join(f"{name}=" for name in named) or "nothing"
    raise CallError(f"the call has {found}: {_FORMS}")


def _paired(question: Any, context: Any) -> list[dict[str, Any]]:
    """Questions and contexts given as texts or lists, as one dict per question. Raises CallError on other types."""
    if isinstance(question, str) and isinstance(context, str):
        return [{"question": question, "context": context}]
    if not isinstance(question, list) or not isinstance(context, str | list):
        kinds = f"question is {type(question).__name__}, context is {type(context).__name__}"
        raise CallError(f"{kinds}: give two texts, a list of questions and a text, or two lists")
    contexts = [context] * len(question) if isinstance(context, str) else context
    if len(contexts) != len(question):
        raise CallError(
            f"there are {len(question)} questions and {len(contexts)} contexts: give one context per question"
        )
    return [{"question": q, "context": c} for q, c in zip(question, contexts, strict=True)]


def _eager(inputs: Any) -> tuple[list[Asked], bool]:
    """All pairs of an input that is not a generator, and whether it is a single question.

    Raises CallError, CallKeyError.
    """
    if isinstance(inputs, str):
        raise CallError(f"a single text is not a question with a context: {_FORMS}")
    if not isinstance(inputs, Iterable):
        raise CallError(f"{type(inputs).__name__} contains no questions: {_FORMS}")
    items = [inputs] if isinstance(inputs, dict) else list(inputs)
    alone = len(items) == 1
    if alone and isinstance(items[0], dict) and isinstance(items[0].get("question"), list):
        _check_keys(items[0], "")
        if "context" not in items[0]:
            raise CallError(
                "contexts belong to one question: for several, give a list of dicts with question and contexts"
            )
        items, alone = _paired(items[0]["question"], items[0]["context"]), False
    pairs = []
    for number, item in enumerate(items, 1):
        where = "" if len(items) == 1 else f"question {number}: "
        if isinstance(item, dict):
            _check_keys(item, where)
            if len(item) > 2:
                name = "context" if "context" in item else "contexts"
                extra = ", ".join(str(key) for key in item if key not in {"question", name})
                raise CallError(f"{where}has {extra} besides question and {name}: leave it out (or pass a generator)")
            if item.get("context") == "":
                raise CallError(f"{where}context is empty: give it some text")
        pairs.append(_streamed(item, where))
    return pairs, alone


def _check_keys(item: dict[Any, Any], where: str) -> None:
    for key in ("question", "context"):
        if key not in item and not (key == "context" and "contexts" in item):
            raise CallKeyError(f"{where}has no {key}: give a dict with question and context")


def _streamed(item: Any, where: str) -> Asked:
    """The question and context or passages of a dict or a ``SquadExample`` (also transformers'). Raises CallError, CallKeyError."""
    if isinstance(item, dict):
        _check_keys(item, where)
        question, context = item["question"], item.get("context")
    elif hasattr(item, "question_text") and hasattr(item, "context_text"):
        question, context = item.question_text, item.context_text
    else:
        raise CallError(f"{where}{type(item).__name__} is not a question with a context: {_FORMS}")
    try:
        question = check_text("question", question)
        if isinstance(item, dict) and "context" not in item:
            check_passages(item["contexts"])
            return question, list(item["contexts"])
    except InputError as error:
        raise CallError(f"{where}{error}") from error
    if not isinstance(context, str):
        raise CallError(f"{where}context must be text, not {type(context).__name__}")
    return question, context


def _is_dataset(inputs: Any) -> bool:
    """Whether this is a torch ``Dataset``; False if torch was not imported."""
    data = sys.modules.get("torch.utils.data")
    return data is not None and isinstance(inputs, data.Dataset)


# ---------------------------------------------------------------- making a pipeline


def pipeline(
    task: str | None = None,
    model: Any = None,
    config: Any = None,
    tokenizer: Any = None,
    *,
    device: Any = None,
    device_map: Any = None,
    dtype: Any = None,
    torch_dtype: Any = None,
    revision: str | None = None,
    framework: str | None = None,
    use_fast: bool = True,
    token: Any = None,
    trust_remote_code: bool | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    **defaults: Any,
) -> QuestionAnsweringPipeline:
    """A question-answering pipeline on a bundle, called like ``transformers.pipeline``.

    ``model`` is a bundle folder, or a loaded ``Answerer`` (for which ``threads=`` and others can be chosen).
    ``device``: -1 or "cpu", N or "cuda:N", a ``torch.device``; None or ``device_map="auto"``: CUDA if it is available.
    ``defaults`` are options for every call, including ``batch_size``. ``tokenizer`` and ``config`` may only name the bundle
    again, because a bundle brings its own; ``dtype`` may name the bundle's precision. ``framework``, ``use_fast``, ``token``
    and ``trust_remote_code`` change nothing.

    Raises CallError on invalid values, CallKeyError on another task, and what ``Answerer.load`` raises.
    """
    if task not in (None, TASK):
        raise CallKeyError(f"task is {task!r}: only {TASK} is supported")
    parameters = _Parameters().changed(defaults)
    for name, value in (("config", config), ("tokenizer", tokenizer)):
        if value is not None and not _names(value, model):
            raise CallError(f"{name} is {value!r}: a bundle brings its own, so leave it out")
    if revision not in (None, "main") or model_kwargs:
        name = "model_kwargs" if model_kwargs else "revision"
        raise CallError(f"{name} is for models of the Hub, but a bundle is a folder: leave it out")
    answerer = _answerer(model, _device(device, device_map))
    for value in (dtype, torch_dtype):
        _check_dtype(value, answerer)
    return QuestionAnsweringPipeline(answerer, parameters)


def _names(value: object, model: object) -> bool:
    """Whether both name the same folder."""
    both = isinstance(value, str | Path) and isinstance(model, str | Path)
    return both and Path(str(value)).resolve() == Path(str(model)).resolve()


def _answerer(model: object, device: str | None) -> Answerer:
    if isinstance(model, Answerer):
        if device is not None:
            raise CallError(f"device is {device}, but the Answerer is already loaded: choose it in Answerer.load")
        return model
    if not isinstance(model, str | Path):
        found = "missing" if model is None else f"a {type(model).__name__}"
        raise CallError(f"model is {found}: name a bundle folder, which qadeploy export makes from a trained model")
    return Answerer.load(model, device=device or "auto")


def _device(device: Any, device_map: Any) -> str | None:
    """The device as ``Answerer.load`` names it; None if none was chosen."""
    if device_map not in (None, "auto"):
        raise CallError(f"device_map is {device_map!r}: a bundle runs on one device, so give device= or 'auto'")
    if device is None:
        return None if device_map is None else "auto"
    try:
        number = operator.index(device)
    except TypeError:
        return str(device)  # torch.device("cuda", 0) reads cuda:0
    return "cpu" if number < 0 else f"cuda:{number}"


def _check_dtype(dtype: Any, answerer: Answerer) -> None:
    name = str(dtype).removeprefix("torch.")
    own = answerer.bundle.precision if answerer.bundle else None
    if dtype is not None and name != "auto" and (own is None or _DTYPES.get(name) != own):
        raise CallError(
            f"dtype is {name}, but the bundle is {own or 'none'}: leave it out, or name a bundle of that precision"
        )
