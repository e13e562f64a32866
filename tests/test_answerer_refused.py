"""What an answerer refuses: texts, options, devices, graphs, and logits that are not numbers."""

from __future__ import annotations

import re

import numpy as np
import onnxruntime
import pytest

from qadeploy import Answerer
from qadeploy.core.settings import Options
from qadeploy.errors import (
    BundleError,
    DataError,
    DeviceError,
    InputError,
    LogitsError,
    QuestionTooLongError,
    StrideError,
)
from qadeploy.inference.bundle import open_bundle
from qadeploy.inference.session import OnnxModel, Pending
from qadeploy.records import Example
from tests.conftest import sealed_copy
from tests.test_session_answerer import LONG, PAIRS, crafted

THREADS = 2  # of the answerer


@pytest.mark.parametrize(
    ("question", "context", "message"),
    [
        ("", "Some text.", "question is empty"),
        (" \n", "Some text.", "question is empty"),
        ("Who?", "", "context is empty"),
        ("Who?", "\u2003", "context is empty"),
        (None, "Some text.", "question must be text, not NoneType"),
        ("Who?", 7, "context must be text, not int"),
        ("Who?", b"bytes", "context must be text, not bytes"),
        ("Who?", "half \ud800 pair", "lone surrogate"),
    ],
)
def test_bad_texts_are_named_alone_and_in_a_batch(answerer, question, context, message):
    with pytest.raises(InputError, match=message) as caught:
        answerer.answer(question, context)
    assert "pair" not in str(caught.value).partition(message)[0]
    with pytest.raises(InputError, match=f"^pair 2: .*{message}"):
        answerer.answer_batch([PAIRS[0], (question, context), PAIRS[1]])


@pytest.mark.parametrize("pair", ["no pair", ("one",), ("a", "b", "c"), None, {"question": "q", "context": "c"}])
def test_what_is_no_pair_is_named(answerer, pair):
    with pytest.raises(InputError, match=r"^pair 3: must be a \(question, context\) pair, not \w+"):
        answerer.answer_batch([PAIRS[0], PAIRS[1], pair])


def test_a_bad_pair_late_in_a_stream_is_numbered_from_its_start(answerer):
    stream = answerer.answer_stream([*PAIRS * 3, ("Who?", "")])
    with pytest.raises(InputError, match=r"^pair 73: context is empty"):
        list(stream)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"top_k": 0}, InputError, "top_k must be a whole number from 1, not 0"),
        ({"max_answer_len": 0}, InputError, "max_answer_len"),
        ({"prefilter": 10**309}, InputError, "prefilter must be a whole number from 1, not one of over 300 digits"),
        ({"min_score": 10**5000}, InputError, "min_score must be a number from 0 to 1, not one of over 300 digits"),
        ({"max_seq_len": 161}, InputError, "limit of 160 tokens"),
        ({"max_seq_len": 5}, QuestionTooLongError, "no room for the context"),
        ({"max_seq_len": 40, "doc_stride": 40}, StrideError, "doc_stride must be below max_seq_len 40, not 40"),
        ({"doc_stride": -1}, InputError, "doc_stride"),
    ],
)
def test_bad_options_are_named(answerer, options, error, message):
    with pytest.raises(error, match=message):
        answerer.answer("Who keeps the lamp?", LONG, **options)


@pytest.mark.parametrize("tokens", [1, 4, 9])
def test_a_question_that_leaves_no_more_than_doc_stride_overlaps_by_half_of_its_room(answerer, tokens):
    question = "Who keeps the lamp?"
    size = len(answerer.encoder.encode(question)) + answerer.encoder.special_tokens + tokens
    expected = answerer.answer(question, LONG, max_seq_len=size, doc_stride=tokens // 2, top_k=3)
    assert answerer.answer(question, LONG, max_seq_len=size, doc_stride=tokens, top_k=3) == expected
    assert answerer.answer_batch([(question, LONG)], max_seq_len=size, doc_stride=size - 1, top_k=3) == [expected]


def test_every_question_without_room_is_named_before_any_is_asked(answerer):
    long = "Who keeps the lamp " * 60
    examples = [Example(i, q, "Ada.") for i, q in (("a", "Who?"), ("b", long), ("c", "Who?"), ("d", long))]
    with pytest.raises(DataError) as caught:
        answerer.require_room(examples, "faq.jsonl")
    numbers = [
        re.match(r"faq\.jsonl: question (\d) \(id (\w)\), field question: .*no room", p) for p in caught.value.problems
    ]
    assert [n and n.groups() for n in numbers] == [("2", "b"), ("4", "d")]
    answerer.require_room(examples[::2], "faq.jsonl")


@pytest.mark.skipif("CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="this is a CUDA build")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_cuda_on_a_cpu_build_says_what_to_install(bundle, device):
    with pytest.raises(DeviceError, match=r"CPU build.*pip install 'qadeploy\[gpu\]'"):
        Answerer.load(bundle, device=device)


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "cpu:0", "", "CUDA"])
def test_unknown_devices_are_refused(bundle, device):
    with pytest.raises(InputError, match="choose auto, cpu, cuda or cuda:N"):
        Answerer.load(bundle, device=device)


@pytest.mark.parametrize("threads", [0, -2])
def test_threads_are_at_least_one(bundle, threads):
    with pytest.raises(InputError, match=f"threads {threads} is below 1"):
        Answerer.load(bundle, threads=threads)


def test_load_says_what_it_loaded(bundle):
    loaded = Answerer.load(str(bundle))
    assert loaded.bundle is not None
    assert loaded.bundle.folder == bundle
    assert (loaded.settings, loaded.encoder.config) == (loaded.bundle.settings, loaded.bundle.encoder)
    assert set(loaded.model.inputs) == {"input_ids", "attention_mask", "token_type_ids"}
    with pytest.raises(InputError, match="no such bundle folder"):
        Answerer.load(bundle / "nowhere")


def test_a_model_and_an_encoder_that_disagree_on_segments_are_refused(bundle, tmp_path):
    encoder = {**open_bundle(bundle).manifest["encoder"], "segments": 0}
    with pytest.raises(BundleError, match="disagree on token_type_ids"):
        Answerer.load(sealed_copy(bundle, tmp_path / "copy", encoder=encoder))


@pytest.mark.parametrize("factor", [np.nan, np.inf, -np.inf])
def test_logits_that_are_no_numbers_are_an_error(bundle, tmp_path, factor):
    broken = Answerer.load(sealed_copy(bundle, tmp_path / "broken", crafted(float(factor))))
    with pytest.raises(LogitsError, match="NaN or infinite logits"):
        broken.answer(*PAIRS[0])


def test_of_many_pairs_the_one_with_such_logits_is_named(answerer, monkeypatch):
    real = answerer.model.run
    bad = answerer.read(*PAIRS[3], Options()).windows[0].input_ids.tolist()

    def run(windows):
        found = real(windows)
        return [(s * np.nan if w.input_ids.tolist() == bad else s, e) for w, (s, e) in zip(windows, found, strict=True)]

    monkeypatch.setattr(answerer.model, "run", run)
    monkeypatch.setattr(answerer.model, "start", lambda windows: Pending(lambda: run(windows)))
    seen = []
    with pytest.raises(LogitsError, match="pair 4: the model returned NaN or infinite logits"):
        seen.extend(answerer.answer_stream(PAIRS))
    assert len(seen) == 3  # those before it


def test_a_graph_that_is_no_question_answering_model_is_refused():
    with pytest.raises(BundleError, match="not those of a question-answering model"):
        OnnxModel(lambda: crafted(1.0, ("logits", "other")), device="cpu")
    with pytest.raises(BundleError, match="ONNX Runtime cannot load it"):
        OnnxModel(lambda: b"no model", device="cpu")
