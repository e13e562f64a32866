"""The pipeline's calls on a bundle, compared with transformers' pipeline on the checkpoint that the bundle was made from."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers.data import SquadExample as TheirExample

from qadeploy import Answerer
from qadeploy.bench.peers.setup import quiet
from qadeploy.compat import QuestionAnsweringPipeline, SquadExample, pipeline
from qadeploy.core.decoding import WindowLogits, span_table
from qadeploy.core.settings import Options
from qadeploy.core.windows import Encoder
from qadeploy.errors import BundleError, CallError, CallKeyError, DeviceError, InputError, QuestionTooLongError
from qadeploy.inference.bundle import open_bundle
from qadeploy.inference.pairs import DecodedPair
from qadeploy.shipped import base_model_path
from qadeploy.training.checkpoint import Checkpoint, encoder_config, load_checkpoint, torch_answerer
from tests.conftest import sealed_copy, triplets
from tests.models_for_tests import BY_NAME
from tests.processes_for_tests import succeeded

CONTEXT = "Ada keeps the lamp in room 3. Bela keeps the boat outside."
LAMP, BOAT = "Who keeps the lamp?", "Who keeps the boat?"
ONE, TWO = {"question": LAMP, "context": CONTEXT}, {"question": BOAT, "context": CONTEXT}
ROWS = triplets(300)
LONG = [" ".join(str(row["context"]) for row in ROWS[i : i + 6]) for i in range(90)]
DOCS = Path(__file__).parents[1] / "docs" / "migrating.md"
Form = Callable[[Any], Any]
# transformers hands torch's tensors to numpy 2 as they are.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning:transformers.pipelines")


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


@pytest.fixture(scope="module")
def theirs(tiny) -> Loud:
    return Loud(their_pipeline(tiny.run / "checkpoint"))


@pytest.fixture(scope="module")
def ours(bundle) -> QuestionAnsweringPipeline:
    return pipeline("question-answering", model=bundle, device=-1)


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


@pytest.fixture(scope="module")
def base() -> Both:
    """The base model that ships, which knows English."""
    return Both.around(base_model_path())


def shape(value: Any) -> Any:
    """The answer without its score: what must be the same."""
    if isinstance(value, list):
        return [shape(one) for one in value]
    assert list(value) == ["score", "start", "end", "answer"]
    assert [type(v) for v in value.values()] == [float, int, int, str]
    return {key: value[key] for key in ("start", "end", "answer")}


class Questions(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __len__(self) -> int:
        return 2

    def __getitem__(self, i: int) -> dict[str, str]:
        return {**[ONE, TWO][i], "id": str(i)}


class Stream(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
    def __iter__(self) -> Iterator[dict[str, str]]:
        yield from (ONE, TWO)


# ---------------------------------------------------------------- call forms

FORMS: dict[str, Form] = {
    "keywords": lambda qa: qa(question=LAMP, context=CONTEXT),
    "two texts": lambda qa: qa(LAMP, CONTEXT),
    "a dict": lambda qa: qa(ONE),
    "dicts": lambda qa: qa(ONE, TWO),
    "a list of one": lambda qa: qa([ONE]),
    "a list": lambda qa: qa([ONE, TWO]),
    "a tuple": lambda qa: qa((ONE, TWO)),
    "an iterator": lambda qa: qa(iter([ONE, TWO])),
    "an iterator of one": lambda qa: qa(iter([ONE])),
    "an empty list": lambda qa: qa([]),
    "X": lambda qa: qa(X=ONE),
    "data": lambda qa: qa(data=[ONE, TWO]),
    "questions on a context": lambda qa: qa(question=[LAMP, BOAT], context=CONTEXT),
    "one question in a list": lambda qa: qa(question=[LAMP], context=CONTEXT),
    "no questions": lambda qa: qa(question=[], context=CONTEXT),
    "two lists": lambda qa: qa(question=[LAMP, BOAT], context=[CONTEXT, CONTEXT]),
    "a dict of lists": lambda qa: qa({"question": [LAMP, BOAT], "context": [CONTEXT, CONTEXT]}),
    "a dict of lists of one": lambda qa: qa({"question": [LAMP], "context": [CONTEXT]}),
    "a dict of empty lists": lambda qa: qa({"question": [], "context": []}),
    "samples": lambda qa: qa(qa.create_sample(question=[LAMP, BOAT], context=[CONTEXT, CONTEXT])),
    "a sample in a list": lambda qa: qa([qa.create_sample(question=LAMP, context=CONTEXT)]),
    "samples by place": lambda qa: qa(qa.create_sample(LAMP, CONTEXT), qa.create_sample(BOAT, CONTEXT)),
    "their samples": lambda qa: qa([TheirExample(None, q, CONTEXT, None, None, None) for q in (LAMP, BOAT)]),
    "a generator": lambda qa: list(qa(dict(row) for row in (ONE, TWO, ONE))),
    "a generator of samples": lambda qa: list(qa(qa.create_sample(q, CONTEXT) for q in (LAMP, BOAT))),
    "a generator with more fields": lambda qa: list(qa({**row, "id": 1} for row in (ONE, TWO))),
    "a generator of blank contexts": lambda qa: list(qa({**ONE, "context": c} for c in ("", "  ", CONTEXT))),
    "an empty generator": lambda qa: list(qa(row for row in ())),
    "a generator as data": lambda qa: list(qa(data=(row for row in (ONE, TWO)))),
    "a generator in batches": lambda qa: list(qa((row for row in (ONE, TWO, ONE)), batch_size=2)),
    "a data set": lambda qa: list(qa(Questions())),
    "a streamed data set": lambda qa: list(qa(Stream())),
    "top_k 1": lambda qa: qa(ONE, top_k=1),
    "top_k 2": lambda qa: qa(ONE, top_k=2),
    "topk 2": lambda qa: qa(ONE, topk=2),
    "top_k before topk": lambda qa: qa(ONE, topk=2, top_k=1),
    "top_k 2, a list of one": lambda qa: qa([ONE], top_k=2),
    "top_k 2, a list": lambda qa: qa([ONE, TWO], top_k=2),
    "top_k 2, a generator": lambda qa: list(qa((row for row in (ONE, TWO)), top_k=2)),
    "max_answer_len": lambda qa: qa(ONE, max_answer_len=1),
    "windows": lambda qa: qa(ONE, max_seq_len=24, doc_stride=4),
    "a doc_stride that a short text does not need": lambda qa: qa(LAMP, "Ada", max_seq_len=30, doc_stride=28),
    "no overlap": lambda qa: qa(ONE, max_seq_len=24, doc_stride=0),
    "max_seq_len alone": lambda qa: qa(ONE, max_seq_len=32),
    "not aligned": lambda qa: qa([ONE, TWO], align_to_words=False),
    "numbers of numpy": lambda qa: qa(ONE, top_k=np.int64(1), max_answer_len=np.int32(2)),
    "nones": lambda qa: qa(ONE, top_k=None, doc_stride=None, max_answer_len=None, batch_size=None, padding=None),
    "padding": lambda qa: qa([ONE, TWO], padding="longest", batch_size=2, num_workers=0),
    "max_question_len that is not reached": lambda qa: qa(ONE, max_question_len=64),
    "a blank context": lambda qa: qa(question=LAMP, context=" \n "),
    "a blank context among others": lambda qa: qa([ONE, {**ONE, "context": " "}, TWO]),
    "a blank context that may have no answer": lambda qa: qa(question=LAMP, context=" ", handle_impossible_answer=True),
    "as scikit-learn predicts": lambda qa: qa.predict(ONE),
    "as scikit-learn transforms": lambda qa: qa.transform([ONE, TWO]),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_call_gives_what_the_pipeline_gives(form, theirs, ours):
    assert shape(FORMS[form](ours)) == shape(FORMS[form](theirs))


@pytest.mark.parametrize("allowed", [False, True])
def test_a_blank_context_scores_as_the_pipelines_does(allowed, theirs, ours):
    call = {"question": LAMP, "context": " ", "handle_impossible_answer": allowed}
    assert ours(**call) == theirs(**call) == {"score": float(allowed), "start": 0, "end": 0, "answer": ""}


@pytest.mark.parametrize("options", [{"top_k": 2}, {"max_answer_len": 1}, {"max_seq_len": 24, "doc_stride": 4}])
def test_options_of_the_pipeline_hold_for_every_call_and_give_way_to_the_calls_own(options, tiny, bundle, theirs, ours):
    made = pipeline(model=str(bundle), **options)
    assert made(ONE) == ours(ONE, **options)
    assert shape(made(ONE)) == shape(Loud(their_pipeline(tiny.run / "checkpoint", **options))(ONE))
    back = {"top_k": 1, "max_answer_len": 15, "max_seq_len": 160, "doc_stride": 80}
    assert made(ONE, **back) == ours(ONE)


def test_the_null_answer_competes_where_it_may(theirs, ours):
    questions = [
        {"question": q, "context": CONTEXT} for q in (LAMP, "Who?", "The hall is quiet.", "Who keeps the piano?")
    ]
    for top_k in (1, 4):
        call = {"handle_impossible_answer": True, "top_k": top_k}
        mine, found = ours(questions, **call), theirs(questions, **call)
        assert [[a["answer"] == "" for a in one] if top_k > 1 else one["answer"] == "" for one in mine] == [
            [a["answer"] == "" for a in one] if top_k > 1 else one["answer"] == "" for one in found
        ]
    assert all(sum(a["answer"] == "" for a in one) <= 1 for one in mine)


# ---------------------------------------------------------------- laziness


@pytest.mark.parametrize("size", [1, 2])
def test_a_generator_is_read_as_its_answers_are(size, theirs, ours):
    for qa in (theirs, ours):
        read: list[int] = []

        def rows(read: list[int] = read) -> Iterator[dict[str, str]]:
            for i in range(5):
                read.append(i)
                yield ONE

        answers = qa(rows(), batch_size=size)
        assert read == []
        iterator = iter(answers)
        next(iterator)
        assert read == list(range(size))
        assert len(list(iterator)) == 4
        assert read == [0, 1, 2, 3, 4]


def test_a_data_set_has_a_length_and_is_answered_again_and_again(theirs, ours):
    expected = shape(theirs([ONE, TWO]))
    for qa in (theirs, ours):
        found = qa(Questions())
        assert len(found) == 2
        for _ in range(2):
            assert shape(list(found)) == expected


def test_an_error_in_a_stream_names_the_question_and_comes_after_the_answers_before_it(ours):
    bad = {"question": LAMP}
    answers = ours(row for row in (ONE, TWO, bad))
    assert shape([next(answers), next(answers)]) == shape(ours([ONE, TWO]))
    with pytest.raises(CallKeyError, match=r"^question 3: has no context"):
        next(answers)
    long = {"question": "Who keeps " * 200, "context": CONTEXT}
    with pytest.raises(QuestionTooLongError, match=r"^question 2: the question has"):
        list(ours(row for row in (ONE, long)))
    with pytest.raises(QuestionTooLongError, match=r"^questions 3 to 4: pair 2: the question has"):
        list(ours((row for row in (ONE, TWO, ONE, long)), batch_size=2))
    with pytest.raises(CallError, match=r"^question 2: tuple is not a question"):
        list(ours(row for row in (ONE, (LAMP, CONTEXT))))


# ---------------------------------------------------------------- errors

SAME_ERRORS: dict[str, Form] = {
    "nothing": lambda qa: qa(),
    "a question alone": lambda qa: qa(question=LAMP),
    "a context alone": lambda qa: qa(context=CONTEXT),
    "one text": lambda qa: qa(LAMP),
    "three texts": lambda qa: qa(LAMP, CONTEXT, CONTEXT),
    "texts in a list": lambda qa: qa([LAMP, CONTEXT]),
    "a text and a dict": lambda qa: qa(LAMP, ONE),
    "a number": lambda qa: qa(5),
    "numbers": lambda qa: qa([5]),
    "X None": lambda qa: qa(X=None),
    "lists of two lengths": lambda qa: qa(question=[LAMP, BOAT], context=[CONTEXT]),
    "contexts for one question": lambda qa: qa(question=LAMP, context=[CONTEXT, CONTEXT]),
    "a tuple of questions": lambda qa: qa(question=(LAMP, BOAT), context=CONTEXT),
    "question None": lambda qa: qa(question=None, context=CONTEXT),
    "an empty question": lambda qa: qa(question="", context=CONTEXT),
    "an empty context": lambda qa: qa(question=LAMP, context=""),
    "an empty question among others": lambda qa: qa(question=[LAMP, ""], context=CONTEXT),
    "None in a dict": lambda qa: qa({"question": LAMP, "context": None}),
    "a number in a dict": lambda qa: qa({"question": 5, "context": CONTEXT}),
    "no context in a dict": lambda qa: qa({"question": LAMP}),
    "no context in one of many": lambda qa: qa([ONE, {"question": LAMP}]),
    "no context in a stream": lambda qa: list(qa(row for row in ({"question": LAMP},))),
    "a sample by itself": lambda qa: qa(qa.create_sample(question=LAMP, context=CONTEXT)),
    "top_k 0": lambda qa: qa(ONE, top_k=0),
    "topk 0": lambda qa: qa(ONE, topk=0),
    "top_k 0 for a stream, at once": lambda qa: qa((row for row in (ONE,)), top_k=0),
    "max_answer_len 0": lambda qa: qa(ONE, max_answer_len=0),
    "doc_stride above max_seq_len": lambda qa: qa(ONE, max_seq_len=30, doc_stride=31),
    "doc_stride as max_seq_len": lambda qa: qa(ONE, max_seq_len=30, doc_stride=30),
    "doc_stride above a short text's room": lambda qa: qa(question=LAMP, context="Ada", max_seq_len=30, doc_stride=29),
    "padding unknown": lambda qa: qa(ONE, padding="half"),
    "batch_size 0": lambda qa: qa(ONE, batch_size=0),
    "num_workers below 0": lambda qa: qa(ONE, num_workers=-1),
}


@pytest.mark.parametrize("form", SAME_ERRORS)
def test_it_raises_where_the_pipeline_does(form, theirs, ours):
    with pytest.raises((ValueError, KeyError)) as expected:
        SAME_ERRORS[form](theirs)
    with pytest.raises(expected.type) as found:
        SAME_ERRORS[form](ours)
    assert isinstance(found.value, CallError)
    assert isinstance(found.value, InputError)
    assert not str(found.value).startswith("'")


# What the pipeline raises (None: it answers), what is raised here, and what that says.
OTHER_ERRORS: dict[str, tuple[type[BaseException] | None, type[InputError], str, Form]] = {
    "another field": (TypeError, CallError, "has id besides question and context", lambda qa: qa({**ONE, "id": 1})),
    "lists in one of many": (
        AttributeError,
        CallError,
        "question 1: question must be text, not list",
        lambda qa: qa([{"question": [LAMP], "context": [CONTEXT]}, ONE]),
    ),
    "contexts in a dict": (
        TypeError,
        CallError,
        "context must be text, not list",
        lambda qa: qa({**ONE, "context": [CONTEXT] * 2}),
    ),
    "pairs in a stream": (
        AttributeError,
        CallError,
        "question 1: tuple",
        lambda qa: list(qa(row for row in ((LAMP, CONTEXT),))),
    ),
    "top_k in words": (TypeError, CallError, "top_k must be a whole number, not '3'", lambda qa: qa(ONE, top_k="3")),
    "top_k no whole number": (
        TypeError,
        CallError,
        "top_k must be a whole number, not 2.0",
        lambda qa: qa(ONE, top_k=2.0),
    ),
    "max_seq_len in words": (
        TypeError,
        CallError,
        "max_seq_len must be a whole number, not '30'",
        lambda qa: qa(ONE, max_seq_len="30"),
    ),
    "doc_stride below 0": (OverflowError, CallError, "doc_stride is -1", lambda qa: qa(ONE, doc_stride=-1)),
    "a question without room": (
        Exception,
        QuestionTooLongError,
        "leaves no room",
        lambda qa: qa(question="Who keeps " * 100, context=CONTEXT),
    ),
    "a lone surrogate": (TypeError, InputError, "lone surrogate", lambda qa: qa(question=LAMP, context="a \ud800 b")),
    "max_seq_len above the model's": (
        Exception,
        InputError,
        "more than the model's limit of 160",
        lambda qa: qa(question=LAMP, context=CONTEXT * 20, max_seq_len=500),
    ),
    "max_seq_len 0": (None, CallError, "max_seq_len is 0", lambda qa: qa(ONE, max_seq_len=0)),
    "half a token": (
        None,
        CallError,
        "max_answer_len must be a whole number, not 2.5",
        lambda qa: qa(ONE, max_answer_len=2.5),
    ),
    "a blank question": (None, CallError, "question is empty", lambda qa: qa(question="  ", context=CONTEXT)),
    "an empty question in a stream": (
        None,
        CallError,
        "question 1: question is empty",
        lambda qa: list(qa(row for row in ({**ONE, "question": ""},))),
    ),
    "lists of two lengths in a dict": (
        None,
        CallError,
        "2 questions and 1 contexts",
        lambda qa: qa({"question": [LAMP, BOAT], "context": [CONTEXT]}),
    ),
    "inputs twice": (None, CallError, "give questions once", lambda qa: qa(ONE, context=CONTEXT)),
}


@pytest.mark.parametrize("form", OTHER_ERRORS)
def test_where_the_pipeline_breaks_or_guesses_the_error_says_what_is_wrong(form, theirs, ours):
    raised, expected, said, call = OTHER_ERRORS[form]
    if raised is None:
        call(theirs)
    else:
        with pytest.raises(raised):
            call(theirs)
    with pytest.raises(expected, match=re.escape(said)):
        call(ours)


def test_a_stride_without_room_beside_a_long_question_is_lowered_where_the_pipeline_panics(theirs, ours):
    call = {"question": "Who keeps the lamp in the hall?", "context": CONTEXT, "max_seq_len": 20, "doc_stride": 15}
    with pytest.raises(BaseException, match="must be strictly less than") as panic:
        theirs(**call)
    assert not isinstance(panic.value, Exception)
    room = 20 - len(ours.answerer.encoder.encode(call["question"])) - ours.answerer.encoder.special_tokens
    assert room < 15
    assert ours(**call) == ours(**call | {"doc_stride": room // 2})


def test_an_unknown_option_changes_nothing_but_is_named(theirs, ours, bundle):
    expected = ours(ONE)
    assert shape(theirs(ONE, n_best_size=3)) == shape(expected)
    with pytest.warns(UserWarning, match="no option n_best_size.*there are align_to_words") as warned:
        assert ours(ONE, n_best_size=3) == expected
    assert warned[0].filename == __file__
    with pytest.warns(UserWarning, match="no option temperature") as warned:
        pipeline(model=bundle, temperature=2)
    assert warned[0].filename == __file__


# ---------------------------------------------------------------- making one


def test_it_is_made_like_the_pipeline(bundle, ours):
    expected = ours(ONE)
    for made in (
        pipeline("question-answering", str(bundle)),
        pipeline("question-answering", bundle, None, str(bundle)),
        pipeline(
            task="question-answering", model=bundle, tokenizer=bundle, config=bundle, framework="pt", use_fast=True
        ),
        pipeline(model=bundle, device="cpu", torch_dtype=torch.float32, trust_remote_code=False, token=None),
        pipeline(model=bundle, device=torch.device("cpu"), dtype="auto", revision="main", model_kwargs={}),
        pipeline(model=bundle, device_map="auto", batch_size=8, num_workers=2),
        pipeline(model=Answerer.load(bundle, device="cpu", threads=1)),
    ):
        assert shape(made(ONE)) == shape(expected)
        assert made.task == "question-answering"
    assert isinstance(QuestionAnsweringPipeline.create_sample(LAMP, CONTEXT), SquadExample)


@pytest.mark.parametrize("device", [0, "cuda", "cuda:0", torch.device("cuda", 0)])
def test_a_gpu_is_asked_for_by_number_or_name(device, bundle):
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime can do it")
    with pytest.raises(DeviceError, match=r"cuda(:0)? was requested but is not available"):
        pipeline(model=bundle, device=device)


@pytest.mark.parametrize(
    ("error", "said", "options"),
    [
        (CallKeyError, "task is 'summarization': only question-answering is", {"task": "summarization"}),
        (CallError, "model is missing: name a bundle folder", {"model": None}),
        (CallError, "model is a Linear: name a bundle folder", {"model": torch.nn.Linear(1, 1)}),
        (InputError, "no such bundle folder: make one with qadeploy export", {"model": "deepset/roberta-base-squad2"}),
        (CallError, "tokenizer is 'bert-base-cased': a bundle brings its own", {"tokenizer": "bert-base-cased"}),
        (CallError, "config is {}: a bundle brings its own", {"config": {}}),
        (CallError, "revision is for models of the Hub", {"revision": "v2"}),
        (CallError, "model_kwargs is for models of the Hub", {"model_kwargs": {"low_cpu_mem_usage": True}}),
        (CallError, "device_map is {'': 0}", {"device_map": {"": 0}}),
        (CallError, "dtype is float16, but the bundle is fp32", {"torch_dtype": torch.float16}),
        (CallError, "dtype is int8, but the bundle is fp32", {"dtype": "int8"}),
        (InputError, "device is 'mps': choose", {"device": "mps"}),
        (CallError, "top_k is 0", {"top_k": 0}),
    ],
)
def test_what_cannot_be_made_is_an_error_that_says_why(error, said, options, bundle):
    with pytest.raises(error, match=re.escape(said)):
        pipeline(**{"model": bundle, **options})


def test_a_checkpoint_is_no_bundle_and_an_answerer_has_its_device(tiny, ours):
    with pytest.raises(BundleError, match="this is not a bundle"):
        pipeline(model=tiny.run / "checkpoint")
    with pytest.raises(CallError, match="device is cpu, but the Answerer is already loaded"):
        pipeline(model=ours.answerer, device="cpu")
    by_torch = torch_answerer(load_checkpoint(tiny.run / "checkpoint"))
    assert shape(pipeline(model=by_torch)(ONE)) == shape(ours(ONE))
    with pytest.raises(CallError, match="the bundle is none"):
        pipeline(model=by_torch, dtype="float32")


def test_an_unknown_task_is_a_key_error_as_the_pipelines(tiny, bundle):
    with pytest.raises(KeyError, match="Unknown task question-answring"):
        transformers.pipeline("question-answring", model=str(tiny.run / "checkpoint"))
    with pytest.raises(KeyError, match="task is 'question-answring'"):
        pipeline("question-answring", model=bundle)


SCRIPT = """
import json, sys
from qadeploy.compat import pipeline

qa = pipeline("question-answering", model=sys.argv[1])
rows = [{"question": "Who keeps the lamp?", "context": "Ada keeps the lamp in room 0."}] * 2
print(json.dumps([qa(rows), qa(**rows[0], top_k=2), list(qa(row for row in rows))]))
found = [name for name in ("torch", "transformers", "optimum", "datasets", "onnx") if name in sys.modules]
assert not found, found
"""


def test_it_answers_without_torch_in_the_process(bundle, ours):
    done = succeeded([sys.executable, "-c", SCRIPT, bundle], timeout=120)
    assert done.stderr == ""
    row = {"question": LAMP, "context": "Ada keeps the lamp in room 0."}
    batch, top, streamed = json.loads(done.stdout)
    assert [shape(batch), shape(top), shape(streamed)] == [
        shape(ours([row, row])),
        shape(ours(row, top_k=2)),
        shape(ours([row, row])),
    ]


# ---------------------------------------------------------------- a few hundred questions, and every difference


@pytest.mark.parametrize(
    "options", [{}, {"align_to_words": False}, {"max_answer_len": 2}, {"max_seq_len": 60, "doc_stride": 8}]
)
def test_three_hundred_questions_on_one_window_have_the_same_answers(options, theirs, ours):
    items = [{"question": row["question"], "context": row["context"]} for row in ROWS]
    assert shape(ours(items, **options)) == shape(theirs(items, **options))


def best_by_window(found: DecodedPair) -> tuple[int, int]:
    """The place of the word-aligned span with the highest probability in a window of its own softmax."""
    best: tuple[float, tuple[int, int]] = (-np.inf, (0, 0))
    for window, (starts, ends) in zip(found.windows, found.logits, strict=True):
        table = span_table([WindowLogits([window], [starts], [ends], found.context)], found.settings.max_answer_len)
        free = [window.null_index, *range(window.context_begin, window.context_begin + window.context_length)]
        table = table - np.logaddexp.reduce(starts[free]) - np.logaddexp.reduce(ends[free])
        first, extra = divmod(int(table.argmax()), table.shape[1])
        words = found.context.words
        place = found.context.visible(int(words[first, 0]), int(words[first + extra, 1]))
        best = max(best, (float(table[first, extra]), place))
    return best[1]


def test_on_several_windows_answers_differ_only_where_the_pipeline_adds_up_or_goes_window_by_window(
    theirs, ours, monkeypatch
):
    """Ninety questions, windows so short that each context is cut into many: every difference has its reason."""
    options = {"max_seq_len": 40, "doc_stride": 12, "max_answer_len": 15}
    items = [{"question": str(row["question"]), "context": c} for row, c in zip(ROWS, LONG, strict=False)]
    added = theirs(list(items), **options)
    monkeypatch.setattr(theirs.pipe, "get_answer", lambda answers, target: None)  # which adds up scores of equal texts
    unadded, mine = theirs(list(items), **options), ours(items, **options)
    equal = by_window = 0
    for item, theirs_added, theirs_alone, own in zip(items, added, unadded, mine, strict=True):
        place, alone = ((answer["start"], answer["end"]) for answer in (own, theirs_alone))
        found = ours.answerer.read(item["question"], item["context"], Options(align_to_words=True, **options))
        assert len(found.windows) > 3
        equal += place == (theirs_added["start"], theirs_added["end"])
        if place != alone:
            assert best_by_window(found) == alone
            by_window += 1
    assert by_window > 0
    assert 0.2 * len(items) < equal < len(items)  # how many depends on how the tiny model was trained


def test_added_scores_go_above_one_and_choose_another_answer(base):
    """The keeper stands in one window, another name in two: its scores are added up and overtake."""
    context = "Mungo Strand keeps the lamp at Hedda Point. Ada Lind carries the lamp oil. The hall is quiet."
    call = {"question": LAMP, "context": context, "max_seq_len": 20}
    added, found = base.theirs(**call), base.ours(**call)
    assert added["answer"] == "Ada Lind"
    assert added["score"] > 1
    assert found["answer"] == "Mungo Strand"
    assert found["score"] < 1
    three = base.ours(**call, top_k=3)
    assert three[0] == found
    assert sum(answer["score"] for answer in three) <= 1


def test_an_answer_in_several_places_stands_where_the_best_is(base):
    context = "Ada Lind came late. It was a quiet hall in the old town by the sea. Ada Lind keeps the lamp there."
    call = {"question": LAMP, "context": context, "max_seq_len": 20}
    added, found = base.theirs(**call), base.ours(**call)
    assert added["answer"] == found["answer"] == "Ada Lind"
    assert (added["start"], found["start"]) == (context.index("Ada Lind"), context.rindex("Ada Lind"))
    assert added["score"] > 1 > found["score"]


def test_texts_that_differ_in_case_are_one_answer_of_several_in_both(base):
    context = "Ada Lind is here. Ada lind was late. The lamp is kept by ada lind."
    for qa in (base.theirs, base.ours):
        found = qa(question=LAMP, context=context, top_k=4)
        texts = [answer["answer"].lower() for answer in found]
        assert len(texts) == len(set(texts)) == 4
        assert found[0]["start"] == context.index("ada lind")


def test_tokens_of_the_question_are_no_answers(base):
    """Where the tokenizer pads on the left the context comes first, and the pipeline masks nothing at all."""
    left = Both.around(base_model_path(), "left")
    context = "It."
    call = {"question": "The lamp is kept by Ada Lind at Hedda Point, is it?", "context": context, "top_k": 3}
    theirs, ours = left.theirs(**call), left.ours(**call)
    assert theirs[0]["start"] > len(context)
    assert theirs[0]["answer"] == ""
    assert ours[0]["answer"] == "It"
    assert all(context[answer["start"] : answer["end"]] == answer["answer"] != "" for answer in ours)


def test_a_question_is_cut_where_max_question_len_is_given(base):
    context = "Mungo Strand keeps the lamp at Hedda Point."
    question = f"Who keeps the lamp {'that stood in the hall ' * 4}?"
    call = {"context": context, "top_k": 3}
    assert base.theirs(question=question, **call) == base.theirs(question=question, **call, max_question_len=4)
    assert base.ours(question=question, **call, max_question_len=4) == base.ours(question="Who keeps the lamp", **call)
    assert base.ours(question=question, **call, max_question_len=4) != base.ours(question=question, **call)
    long = {"question": question * 20, **call, "max_question_len": 20}
    with pytest.raises(Exception, match="Sequence to truncate too short"):
        base.theirs(**long)
    assert len(base.ours(**long)) == 3


def test_no_filler_of_score_zero_among_the_answers(base):
    call = {"question": LAMP, "context": "Mungo", "top_k": 3}
    theirs = base.theirs(**call)
    assert [answer["answer"] for answer in theirs if answer["score"]] == ["Mungo"]
    assert "" in [answer["answer"] for answer in theirs]
    assert shape(base.ours(**call)) == [{"start": 0, "end": 5, "answer": "Mungo"}]


def test_more_than_one_answer_asked_for_is_always_a_list(base):
    call = {"question": LAMP, "context": "  ", "top_k": 3}
    assert base.ours(**call) == [base.theirs(**call)]


def test_a_list_of_questions_on_a_text_in_a_dict_is_not_a_question_a_letter(theirs, ours):
    row = {"question": [LAMP, BOAT], "context": CONTEXT}
    assert [answer["end"] for answer in theirs(row)] == [1, 1]
    assert ours(row) == ours(**row)
    assert shape(ours(row)) == shape(theirs(**row))


def test_answers_have_no_white_space_at_their_borders(tmp_path):
    both = Both.around(BY_NAME["XLM-R"].save(tmp_path))  # whose tokens hold the space before a word
    call = {"question": LAMP, "context": "Ada keeps the lamp in room 3.  Bela keeps the boat outside.", "top_k": 5}
    theirs, ours = ([answer["answer"] for answer in qa(**call)] for qa in (both.theirs, both.ours))
    assert any(text != text.strip() for text in theirs)
    assert [text.strip() for text in ours] == ours


def test_weights_stored_in_fp16_run_in_it_there(base):
    """The pipeline's dtype is "auto"; a bundle's fp32 model computes in float32 whatever the checkpoint held."""
    fp16 = their_pipeline(base_model_path())
    assert fp16.model.dtype == torch.float16
    assert base.theirs.pipe.model.dtype == torch.float32


def test_the_null_answer_competes_at_the_bundles_threshold(bundle, tmp_path, theirs):
    settings = open_bundle(bundle).settings.to_dict()
    call = {"question": LAMP, "context": CONTEXT, "handle_impossible_answer": True, "top_k": 2}
    by_probability = shape(theirs(**call))
    for threshold, place in ((-1000.0, 0), (1000.0, None)):
        changed = sealed_copy(bundle, tmp_path / str(threshold), settings={**settings, "null_threshold": threshold})
        texts = [answer["answer"] for answer in pipeline(model=changed)(**call)]
        assert [i for i, text in enumerate(texts) if text == ""] == ([] if place is None else [place])
    assert shape(pipeline(model=bundle)(**call)) == by_probability


# ---------------------------------------------------------------- docs/migrating.md


def test_every_test_that_the_docs_name_is_there():
    named = set(re.findall(r"`(test_\w+)`", DOCS.read_text(encoding="utf-8")))
    assert len(named) >= 8
    assert named <= set(globals())
