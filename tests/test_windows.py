"""The encoder against transformers' fast tokenizers, and its own promises."""

from __future__ import annotations

import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from qadeploy.core.windows import EncodedText, Encoder, EncoderConfig, pad_batch
from qadeploy.errors import InputError, QuestionTooLongError, StrideError, TooManyWindowsError
from qadeploy.records import Window
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


@pytest.mark.parametrize("name", NAMES)
@thorough
@given(question=texts(6), context=texts(), data=st.data())
def test_windows_equal_those_of_transformers(name, question, context, data):
    kind = family(name)
    asked, read = kind.encoder.encode(question), kind.encoder.encode(context)
    room = data.draw(st.integers(1, 20), "room")
    stride = data.draw(st.integers(0, room - 1), "doc_stride")
    max_seq_len = len(asked) + kind.encoder.special_tokens + room
    ours = kind.encoder.windows(asked, read, max_seq_len=max_seq_len, doc_stride=stride)

    first = kind.config.context_first
    theirs = kind.reference(  # lists, because transformers drops an empty second text given alone
        [context if first else question],
        [question if first else context],
        truncation="only_first" if first else "only_second",
        max_length=max_seq_len,
        stride=stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    assert [w.input_ids.tolist() for w in ours] == theirs["input_ids"]
    if kind.config.segments:
        top = kind.config.segments - 1  # the templates know nothing of a model with one token type
        expected = [[min(t, top) for t in row] for row in theirs["token_type_ids"]]
        assert [w.token_type_ids.tolist() for w in ours] == expected
    for row, window in enumerate(ours):
        part = theirs.sequence_ids(row)
        place = [i for i, p in enumerate(part) if p == (0 if first else 1)]
        begin = window.context_begin
        assert place == list(range(begin, begin + window.context_length))
        offsets = read.offsets[window.context_offset : window.context_offset + window.context_length]
        assert [tuple(pair) for pair in offsets.tolist()] == [theirs["offset_mapping"][row][i] for i in place]


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
    expected = kind.encoder._tokenizer.encode(long, add_special_tokens=False)
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
        enc._encoding(text)
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


def test_a_stride_that_stands_still_is_an_error_only_where_it_is_needed():
    enc = encoder("bert")
    fits = len(enc.encode(CONTEXT))
    sizes = {"max_seq_len": len(enc.encode("Who?")) + enc.special_tokens + fits, "doc_stride": fits}
    enc_wide = Encoder(family("bert").tokenizer, replace(enc.config, position_limit=10_000))
    assert len(cut(enc_wide, "Who?", CONTEXT, **sizes)) == 1
    with pytest.raises(StrideError, match=f"doc_stride {fits} is not below the {fits} "):
        cut(enc_wide, "Who?", CONTEXT + "x", **sizes)
    assert len(cut(enc_wide, "Who?", CONTEXT + "x", **sizes | {"doc_stride": fits - 1})) == 2


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
    spoken = EncodedText(every, np.empty(0, np.int64), np.empty((0, 2), np.int64), family("bert").tokenizer).spoken
    assert spoken[0] == 0
    assert (np.diff(spoken) == 0).tolist() == [c.isspace() for c in every]
