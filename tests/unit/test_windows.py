"""The encoder: the documented properties of its windows."""

from __future__ import annotations

import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from qadeploy.core.encoded_text import EncodedText
from qadeploy.core.settings import QaSettings
from qadeploy.core.windows import Encoder, EncoderConfig, pad_batch
from qadeploy.errors import InputError, QuestionTooLongError, StrideError, TooManyWindowsError
from qadeploy.records import Annotation, Example, Window
from qadeploy.training.features import make_features
from tests.tokenizers_for_tests import CORPUS, NAMES, encoder, family, texts, thorough

QUESTION = "Who wrote the report?"
CONTEXT = " ".join(CORPUS)


def facts(windows: list[Window]) -> list[dict[str, object]]:
    """Windows as plain values, to compare."""
    return [
        {
            "ids": w.input_ids.tolist(),
            "types": None if w.token_type_ids is None else w.token_type_ids.tolist(),
            "context": (w.context_begin, w.context_length, w.context_offset),
            "null": w.null_index,
        }
        for w in windows
    ]


def cut(enc: Encoder, question: str, context: str, **sizes: int) -> list[Window]:
    return enc.windows(enc.encode(question), enc.encode(context), **sizes)


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize(("segments", "types"), [(0, None), (1, {0}), (2, {0, 1})])
def test_token_types_follow_the_model(segments, types):
    kind = family("bert")
    windows = cut(
        Encoder(kind.tokenizer, replace(kind.config, segments=segments)),
        QUESTION,
        CONTEXT,
        max_seq_len=64,
        doc_stride=8,
    )
    assert len(windows) > 1
    for window in windows:
        assert (None if window.token_type_ids is None else set(window.token_type_ids.tolist())) == types


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("bert", "[CLS] Q [SEP] C [SEP]"),
        ("roberta", "<s> Q </s> </s> C </s>"),
        ("xlm-r", "<s> Q </s> </s> C </s>"),
        ("albert", "[CLS] Q [SEP] C [SEP]"),
        ("xlnet", "C <sep> Q <sep> <cls>"),
    ],
)
@pytest.mark.parametrize("context", ["The river.", ""])
def test_the_template_of_each_family(name, shape, context):
    enc = encoder(name)
    (window,) = cut(enc, QUESTION, context)
    parts = {"Q": enc.encode(QUESTION).tokens, "C": enc.encode(context).tokens}
    expected = [token for part in shape.split() for token in parts.get(part, [part])]
    assert [enc.token_text(i) for i in window.input_ids] == expected
    assert window.context_length == len(parts["C"])
    assert enc.token_text(window.input_ids[window.null_index]) in ("[CLS]", "<s>", "<cls>")
    assert window.null_index == (len(window) - 1 if name == "xlnet" else 0)


def test_a_special_token_inside_the_text_is_not_the_null_position():
    for name, token in (("bert", "[CLS]"), ("xlnet", "<cls>")):
        (window,) = cut(encoder(name), token, f"{token} river {token}")
        assert window.null_index == (0 if name == "bert" else len(window) - 1)


def test_without_a_null_token_the_first_position_stands_for_no_answer():
    kind = family("xlnet")
    (window,) = cut(Encoder(kind.tokenizer, replace(kind.config, null_token_id=None)), QUESTION, "river")
    assert window.null_index == 0


def test_baked_in_truncation_and_padding_have_no_effect(name, tmp_path):
    kind = family(name)
    baked = Tokenizer.from_str(kind.tokenizer.to_str())
    baked.enable_truncation(8)
    baked.enable_padding(length=128)
    before = baked.to_str()
    file = tmp_path / "tokenizer.json"
    baked.save(str(file))
    expected = facts(cut(kind.encoder, QUESTION, CONTEXT, max_seq_len=64, doc_stride=16))
    for enc in (Encoder(baked, kind.config), Encoder.from_file(file, kind.config)):
        assert facts(cut(enc, QUESTION, CONTEXT, max_seq_len=64, doc_stride=16)) == expected
    assert baked.to_str() == before


def test_threads_with_different_settings_agree_with_serial(name):
    enc = encoder(name)
    jobs = [(sentence, {"max_seq_len": 60 + i, "doc_stride": i % 9}) for i, sentence in enumerate(CORPUS * 4)]

    def work(job: tuple[str, dict[str, int]]) -> list[dict[str, object]]:
        return facts(cut(enc, "Who?", job[0] * 5, **job[1]))

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, jobs)) == [work(job) for job in jobs]


@pytest.mark.parametrize("parallelism", ["false", "true"])
def test_long_texts_encode_like_short_ones_whatever_the_parallelism(name, parallelism, monkeypatch):
    kind, long = family(name), " ".join(CORPUS * 20)
    assert len(long) > 2_000
    expected = kind.tokenizer.encode(long, add_special_tokens=False)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", parallelism)
    found = kind.encoder.encode(long)
    assert found.ids.tolist() == expected.ids
    assert found.offsets.tolist() == [list(pair) for pair in expected.offsets]
    assert found.tokens == expected.tokens


def test_other_threads_run_while_a_long_text_is_tokenised(monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    enc, text = encoder("bert"), "The river runs, and the boat waits. " * 20_000
    done, seconds = threading.Event(), []

    def tokenise() -> None:
        begun = time.perf_counter()
        enc.encode(text)
        seconds.append(time.perf_counter() - begun)
        done.set()

    thread = threading.Thread(target=tokenise)
    thread.start()
    turns = 0
    while not done.wait(0.001):
        turns += 1
    thread.join()
    assert turns > 20 * seconds[0]  # one each 50 ms: were the GIL kept, there would be none at all


def test_one_encoded_context_serves_many_questions():
    enc = encoder("bert")
    context = enc.encode(CONTEXT)
    for question in CORPUS[:5]:
        assert facts(enc.windows(enc.encode(question), context)) == facts(cut(enc, question, CONTEXT))


def test_a_question_too_long_is_named_and_one_free_token_is_enough(name):
    enc = encoder(name)
    full = len(enc.encode(QUESTION)) + enc.special_tokens
    with pytest.raises(QuestionTooLongError, match=f"max_seq_len {full}"):
        cut(enc, QUESTION, "", max_seq_len=full)
    windows = cut(enc, QUESTION, CONTEXT, max_seq_len=full + 1, doc_stride=0)
    assert len(windows) == len(enc.encode(CONTEXT))
    assert {w.context_length for w in windows} == {1}


def test_a_stride_that_no_question_allows_is_an_error_only_where_it_is_needed():
    enc, sizes = encoder("bert"), {"max_seq_len": 40, "doc_stride": 40}
    assert len(cut(enc, "Who?", "river", **sizes)) == 1
    with pytest.raises(StrideError, match="doc_stride must be below max_seq_len 40, not 40: it is the overlap"):
        cut(enc, "Who?", CONTEXT, **sizes)
    with pytest.raises(QuestionTooLongError, match="no room"):
        cut(enc, "river " * 40, CONTEXT, **sizes)


# Twelve tokens of context, and the first and last of each window by hand: an overlap of half the room, rounded down.
@pytest.mark.parametrize(
    ("room", "stride", "expected"),
    [
        (6, 5, [(0, 5), (1, 6), (2, 7), (3, 8), (4, 9), (5, 10), (6, 11)]),  # still less than the room
        (6, 6, [(0, 5), (3, 8), (6, 11)]),
        (6, 9, [(0, 5), (3, 8), (6, 11)]),
        (5, 9, [(0, 4), (3, 7), (6, 10), (9, 11)]),
        (2, 9, [(i, i + 1) for i in range(11)]),
        (1, 9, [(i, i) for i in range(12)]),
        (12, 14, [(0, 11)]),
    ],
)
def test_a_question_that_leaves_little_room_lowers_the_stride(name, room, stride, expected):
    enc = encoder(name)
    question, context = enc.encode(QUESTION), enc.encode(CONTEXT)
    context = enc.restore(CONTEXT, context.ids[:12], context.offsets[:12])
    windows = enc.windows(question, context, max_seq_len=len(question) + enc.special_tokens + room, doc_stride=stride)
    assert [(w.context_offset, w.context_offset + w.context_length - 1) for w in windows] == expected
    for window, (first, last) in zip(windows, expected, strict=True):
        held = slice(window.context_begin, window.context_begin + window.context_length)
        assert window.input_ids[held].tolist() == context.ids[first : last + 1].tolist()


def test_training_cuts_long_questions_as_serving_does():
    enc, settings = encoder("bert"), QaSettings(max_seq_len=40, doc_stride=13)
    question = "a " * (40 - enc.special_tokens - 10)
    start = CONTEXT.index("kettle")
    example = Example("a", question, CONTEXT, (Annotation("kettle", start),))
    features = make_features([example], enc, settings, "faq.jsonl")
    served = cut(enc, question, CONTEXT, max_seq_len=40, doc_stride=13)
    assert facts([f.window for f in features.features]) == facts(served)
    assert [w.context_offset for w in served[:4]] == [0, 5, 10, 15]
    assert 1 <= features.with_answer <= 2
    with pytest.raises(StrideError, match="doc_stride must be below max_seq_len 40, not 41"):
        make_features([example], enc, QaSettings(max_seq_len=40, doc_stride=41), "faq.jsonl")


@given(st.integers(1, 12), st.integers(0, 30), st.integers(0, 60))
def test_windows_cover_the_context_and_overlap_as_the_rule_says(room, stride, tokens):
    enc = encoder("bert")
    question, context = (
        enc.encode("Who wrote the long report on the river and on the two bridges?"),
        enc.encode("a " * tokens),
    )
    max_seq_len = len(question) + enc.special_tokens + room
    found = enc.cut(question, context, max_seq_len=max_seq_len, doc_stride=min(stride, max_seq_len - 1))
    stride = min(stride, max_seq_len - 1)
    assert found.overlap == (stride if tokens <= room or stride < room else room // 2)
    spans = [range(b, min(b + room, tokens)) for b in found.begins]
    assert set().union(*spans) == set(range(tokens))
    for one, other in pairwise(spans):
        assert len(one) == room
        assert len(set(one) & set(other)) == found.overlap
        assert other.stop > one.stop


@given(st.integers(0, 120), st.integers(1, 50), st.integers(0, 63), st.integers(16, 80))
def test_a_context_that_does_not_fit_is_cut_into_shorter_windows(tokens, asked, stride, longest):
    enc = encoder("bert")
    question, context = enc.encode("a " * asked), enc.encode("a " * tokens)
    found = enc.cut(question, context, max_seq_len=64, doc_stride=stride, long_seq_len=longest)
    overlap = stride * longest // 64
    short = tokens > enc.room(question, 64) and longest - asked - enc.special_tokens > overlap and longest < 64
    sizes = {"max_seq_len": longest, "doc_stride": overlap} if short else {"max_seq_len": 64, "doc_stride": stride}
    assert found == enc.cut(question, context, **sizes)


@given(st.integers(0, 60), st.integers(1, 12), st.integers(0, 11))
def test_the_bound_on_windows_is_known_before_they_are_made(tokens, room, stride):
    enc = encoder("bert")
    question, context = enc.encode("Who?"), enc.encode("a " * tokens)
    sizes = {"max_seq_len": len(question) + enc.special_tokens + room, "doc_stride": min(stride, room - 1)}
    count = len(enc.windows(question, context, **sizes))
    assert len(enc.windows(question, context, max_windows=count, **sizes)) == count
    with pytest.raises(TooManyWindowsError, match=f"makes {count} windows"):
        enc.windows(question, context, max_windows=count - 1, **sizes)


def test_sizes_that_make_no_sense_are_errors():
    enc = encoder("bert")
    with pytest.raises(InputError, match="doc_stride -1 is negative"):
        cut(enc, QUESTION, "", doc_stride=-1)
    with pytest.raises(InputError, match="max_seq_len 513 is more than the model's limit of 512"):
        cut(enc, QUESTION, "", max_seq_len=513)
    assert len(cut(enc, QUESTION, "", max_seq_len=512)) == 1


def test_a_lone_surrogate_is_an_input_error(name):
    enc = encoder(name)
    with pytest.raises(InputError, match="lone surrogate"):
        enc.encode("a\ud800b")
    with pytest.raises(InputError, match="lone surrogate"):
        enc.encode_many(["fine", "\udfff"])


def test_encode_many_equals_encode(name):
    enc = encoder(name)
    texts = [*CORPUS, "", "  "]
    for text, many in zip(texts, enc.encode_many(texts), strict=True):
        one = enc.encode(text)
        assert (many.text, many.tokens, many.ids.tolist()) == (text, one.tokens, one.ids.tolist())
        assert many.offsets.tolist() == one.offsets.tolist()


def test_tokenizers_that_cannot_be_used_are_input_errors(tmp_path):
    config = EncoderConfig(2, False, 0, 0, 512)
    (tmp_path / "tokenizer.json").write_text("{}")
    for file in ("tokenizer.json", "missing.json"):
        with pytest.raises(InputError, match=file):
            Encoder.from_file(tmp_path / file, config)
    with pytest.raises(InputError, match="vocabulary empty"):
        Encoder(Tokenizer(models.BPE()), config)
    swapped = Tokenizer.from_str(family("bert").tokenizer.to_str())
    swapped.post_processor = processors.TemplateProcessing(single="$A", pair="$B $A", special_tokens=[])
    with pytest.raises(InputError, match="pair template"):
        Encoder(swapped, config)


def test_pad_batch_pads_on_the_right_and_masks_it():
    enc = encoder("bert")
    windows = [cut(enc, "Who?", c)[0] for c in ("", CORPUS[0])]
    batch = pad_batch(windows, pad_token_id=77)
    assert set(batch) == {"input_ids", "attention_mask", "token_type_ids"}
    longest = len(windows[1])
    for row, window in enumerate(windows):
        rest = longest - len(window)
        assert batch["input_ids"][row].tolist() == window.input_ids.tolist() + [77] * rest
        assert batch["attention_mask"][row].tolist() == [1] * len(window) + [0] * rest
        assert batch["token_type_ids"][row].tolist() == window.token_type_ids.tolist() + [0] * rest
    assert {a.dtype for a in batch.values()} == {np.dtype(np.int64)}
    assert set(pad_batch(cut(encoder("roberta"), "Who?", ""), 1)) == {"input_ids", "attention_mask"}


@pytest.mark.parametrize("name", NAMES)
@thorough
@given(text=texts(12), data=st.data())
def test_tokens_of_is_the_shortest_run_of_tokens_around_a_piece_of_text(name, text, data):
    read = encoder(name).encode(text)
    start = data.draw(st.integers(0, len(text)), "start")
    end = data.draw(st.integers(start, len(text)), "end")
    # The code points of the piece that some token of the reference tokenizer stands for, without white space.
    offsets = family(name).tokenizer.encode(text, add_special_tokens=False).offsets
    held = [{i for i in range(a, b) if not text[i].isspace()} for a, b in offsets]
    piece = set(range(start, end)) & set().union(*held)
    found = read.tokens_of(start, end)
    if found is None:
        assert not piece
        return
    first, last = found
    assert piece
    a, b = read.visible(int(read.offsets[first, 0]), int(read.offsets[last, 1]))
    assert piece <= set(range(a, b))
    assert text[a:b] == text[a:b].strip() != ""
    assert held[first] & set(range(start, end))
    assert held[last] & set(range(start, end))


def test_tokens_of_finds_words_in_any_script(name):
    read = encoder(name).encode(CONTEXT)
    for word in ("kettle", "été", "図書館は九時に開き", "المكتبة", "किताब"):
        start = CONTEXT.index(word)
        first, last = read.tokens_of(start, start + len(word))
        a, b = int(read.offsets[first, 0]), int(read.offsets[last, 1])
        assert word in CONTEXT[a:b]
        assert read.tokens_of(a, b) == (first, last)


@thorough
@given(text=texts(10), data=st.data())
def test_visible_strips_white_space_only(text, data):
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, len(text)))
    a, b = encoder("bert").encode(text).visible(start, end)
    assert text[a:b] == text[start:end].strip()


@pytest.mark.parametrize("name", NAMES)
@thorough
@given(text=texts(12))
def test_words_are_those_of_the_tokenizer(name, text):
    reference = family(name).tokenizer.encode(text, add_special_tokens=False)
    expected = [
        reference.offsets[i] if word is None else reference.word_to_chars(word)
        for i, word in enumerate(reference.word_ids)
    ]
    assert [tuple(pair) for pair in encoder(name).encode(text).words.tolist()] == expected


def test_a_word_spans_all_of_its_tokens():
    letters = Tokenizer(models.BPE({"a": 0, "b": 1, " ": 2}, []))
    letters.pre_tokenizer = pre_tokenizers.Whitespace()
    read = Encoder(letters, EncoderConfig(0, False, None, 0, 512)).encode("ab bab")
    assert read.tokens == ["a", "b", "b", "a", "b"]
    assert read.words.tolist() == [[0, 2]] * 2 + [[3, 6]] * 3


def test_white_space_is_what_python_says_over_all_of_unicode():
    every = "".join(chr(code) for code in range(sys.maxunicode + 1) if not 0xD800 <= code < 0xE000)
    visible_before = EncodedText(
        every, np.empty(0, np.int64), np.empty((0, 2), np.int64), family("bert").tokenizer
    ).visible_before
    assert visible_before[0] == 0
    assert (np.diff(visible_before) == 0).tolist() == [c.isspace() for c in every]
