"""The pipeline's calls on a bundle, compared with transformers' pipeline on the checkpoint that the bundle was made from."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers.data import SquadExample as TheirExample

from qadeploy import Answerer
from qadeploy.compat import QuestionAnsweringPipeline, SquadExample, pipeline
from qadeploy.errors import BundleError, CallError, CallKeyError, DeviceError, InputError, QuestionTooLongError
from qadeploy.training.checkpoint import load_checkpoint, torch_answerer
from tests.compat_for_tests import BOAT, CONTEXT, LAMP, ONE, TWO, Loud, shape, their_pipeline
from tests.processes_for_tests import succeeded

Form = Callable[[Any], Any]
# transformers passes torch's tensors to numpy 2 without conversion.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning:transformers.pipelines")


@pytest.fixture(scope="module")
def theirs(tiny) -> Loud:
    return Loud(their_pipeline(tiny.run / "checkpoint"))


@pytest.fixture(scope="module")
def ours(bundle) -> QuestionAnsweringPipeline:
    return pipeline("question-answering", model=bundle, device=-1)


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
    "several questions on passages": (
        ValueError,
        CallError,
        "give a list of dicts with question and contexts",
        lambda qa: qa(question=[LAMP, BOAT], contexts=[CONTEXT]),
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
