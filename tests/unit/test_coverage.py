"""Visible characters without a token: the token that they are assigned to, and which tokenizers are refused."""

from __future__ import annotations

import re
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from qadeploy.core.encoded_text import EncodedText
from qadeploy.core.settings import QaSettings
from qadeploy.core.windows import Encoder, EncoderConfig
from qadeploy.errors import InputError
from qadeploy.records import Annotation, Example
from qadeploy.training.features import make_features
from tests.tokenizers_for_tests import CORPUS, NAMES, family, texts, thorough

CONFIG = EncoderConfig(0, False, None, 0, 512)
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
LETTERS = [chr(code) for code in range(33, 127)]

Model = models.Model
PreTokenizer = pre_tokenizers.PreTokenizer


@cache
def model(kind: str) -> Model:
    """A small model: of characters with or without an unknown token, of bytes, or trained."""
    if kind == "letters":  # drops what it does not know
        return models.BPE({c: i for i, c in enumerate(LETTERS)}, [])
    if kind == "letters or unknown":
        return models.BPE({c: i for i, c in enumerate(["<unk>", *LETTERS])}, [], unk_token="<unk>")
    if kind == "bytes":
        merges = [("Ġ", "A"), ("Ġ", "t"), ("Ġt", "h"), ("Ġ", "."), ("o", "n"), ("Ġ", "Ã")]
        return models.BPE({c: i for i, c in enumerate([*BYTES, *map("".join, merges)])}, merges)
    if kind == "pieces":
        pieces = ["[UNK]", *LETTERS, *(f"##{c}" for c in LETTERS), "the", "##on", "br", "##idge"]
        return models.WordPiece({c: i for i, c in enumerate(pieces)}, unk_token="[UNK]")
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=400, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer.model


MODELS = st.sampled_from(["letters", "letters or unknown", "bytes", "pieces", "unigram"])
SPLITTERS = (
    st.builds(pre_tokenizers.Whitespace),
    st.builds(pre_tokenizers.WhitespaceSplit),
    st.builds(pre_tokenizers.BertPreTokenizer),
)
BYTE_LEVEL = st.builds(
    pre_tokenizers.ByteLevel, add_prefix_space=st.booleans(), trim_offsets=st.booleans(), use_regex=st.booleans()
)
BEHAVIORS = st.sampled_from(["removed", "isolated", "merged_with_previous", "merged_with_next", "contiguous"])
PARTS = st.one_of(
    *SPLITTERS,
    st.builds(pre_tokenizers.Metaspace, prepend_scheme=st.sampled_from(["always", "first", "never"])),
    st.builds(pre_tokenizers.Digits, individual_digits=st.booleans()),
    st.builds(pre_tokenizers.Punctuation, BEHAVIORS),
    st.builds(pre_tokenizers.Split, st.sampled_from(["e", "the", " "]), BEHAVIORS),
    st.builds(pre_tokenizers.Split, st.builds(Regex, st.sampled_from(["[A-Z]", r"\d+", "[aeiou]+"])), BEHAVIORS),
)


def processor(trim: bool, prefix: bool) -> processors.PostProcessor:
    return processors.RobertaProcessing(("</s>", 1), ("<s>", 0), trim_offsets=trim, add_prefix_space=prefix)


PROCESSORS = st.one_of(
    st.none(),
    st.builds(processors.ByteLevel, trim_offsets=st.booleans()),
    st.builds(processor, st.booleans(), st.booleans()),
)


def tokenizer_of(kind: str, pre: PreTokenizer, post: processors.PostProcessor | None = None) -> Tokenizer:
    made = Tokenizer(model(kind))
    made.pre_tokenizer = pre
    if post is not None:
        made.post_processor = post
    return made


def robbert(normalizer: normalizers.Normalizer | None = None) -> Tokenizer:
    """RobBERT-2023's parts."""
    split = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=True)])
    made = tokenizer_of("bytes", split, processor(trim=True, prefix=True))
    if normalizer is not None:
        made.normalizer = normalizer
    return made


def offsets(tokenizer: Tokenizer, text: str) -> list[tuple[int, int]]:
    return [(a, b) for a, b in Encoder(tokenizer, CONFIG).encode(text).offsets.tolist()]


def owners(found: list[tuple[int, int]], place: int) -> list[int]:
    return [i for i, (a, b) in enumerate(found) if a <= place < b]


def check(text: str, raw: list[tuple[int, int]], found: list[tuple[int, int]]) -> None:
    """Every visible character has the tokens that it had, otherwise the following one."""
    assert [b for _, b in found] == [b for _, b in raw]
    starts = [a for a, b in found if text[a:b].strip()]
    assert starts == sorted(starts)
    for place, character in enumerate(text):
        if character.isspace():
            continue
        before, now = owners(raw, place), owners(found, place)
        if before:
            assert set(before) <= set(now)
        else:
            assert now == [i for i, (a, _) in enumerate(raw) if a > place][:1]
    for (a, b), (first, _) in zip(raw, found, strict=True):
        assert first <= a <= b
        assert first == a or not text[first].isspace()


@thorough
@given(
    kind=MODELS,
    parts=st.lists(PARTS, max_size=2),
    last=st.one_of(PARTS, BYTE_LEVEL),
    post=PROCESSORS,
    text=st.one_of(texts(8), st.text(st.sampled_from("aAeTth on.1é東🚀ÃĠ▁- \n"), max_size=20)),
)
def test_characters_without_a_token_belong_to_the_one_behind_them(kind, parts, last, post, text):
    made = tokenizer_of(kind, pre_tokenizers.Sequence([*parts, last]), post)
    if not any(len(made.encode(probe).ids) for probe in ("a", "the", "1", ".")):
        return  # no encoder can be made of it
    raw = made.encode(text, add_special_tokens=False).offsets
    check(text, raw, offsets(made, text))


@thorough
@given(
    kind=st.sampled_from(["letters or unknown", "pieces", "unigram"]),
    first=st.one_of(*SPLITTERS),
    last=st.one_of(st.builds(pre_tokenizers.Metaspace), st.builds(pre_tokenizers.Digits), *SPLITTERS),
    byte_level=st.one_of(st.none(), BYTE_LEVEL),
    post=PROCESSORS,
    text=st.text(st.sampled_from("aAeTth on.1é東🚀- \n\u00a0"), max_size=20),
)
def test_every_run_of_words_can_be_an_answer(kind, first, last, byte_level, post, text):
    made = tokenizer_of("bytes" if byte_level else kind, pre_tokenizers.Sequence([first, byte_level or last]), post)
    read = Encoder(made, CONFIG).encode(text)
    words = [word.span() for word in re.finditer(r"\S+", text)]
    for i, (start, _) in enumerate(words):
        for _, end in words[i:]:
            assert answer(read, start, end) == text[start:end]


def answer(read: EncodedText, start: int, end: int) -> str:
    """What the tokens of a piece of text stand for."""
    tokens = read.tokens_of(start, end)
    assert tokens
    a, b = read.visible(int(read.offsets[tokens[0], 0]), int(read.offsets[tokens[1], 1]))
    return read.text[a:b]


@pytest.mark.parametrize(
    ("text", "raw", "expected"),
    [
        ("An on.", [(0, 1), (1, 2), (4, 4), (3, 5), (6, 6)], [(0, 1), (1, 2), (3, 4), (3, 5), (5, 6)]),
        ("A 🚀", [(0, 1), (3, 3), (2, 3), (2, 3), (2, 3), (2, 3)], [(0, 1), *[(2, 3)] * 5]),
        ("A Ade", [(0, 1), (3, 3), (3, 4), (4, 5)], [(0, 1), (2, 3), (3, 4), (4, 5)]),
        ("A the", [(0, 1), (3, 4), (4, 5)], [(0, 1), (2, 4), (4, 5)]),
    ],
)
def test_the_first_letters_that_robbert_loses(text, raw, expected):
    assert robbert().encode(text, add_special_tokens=False).offsets == raw
    assert offsets(robbert(), text) == expected


def test_labels_answers_and_whole_words_have_their_first_letter():
    encoder = Encoder(robbert(), CONFIG)
    text = "Ik woon nu in Amsterdam."
    example = Example("a", "Waar woon ik?", text, (Annotation("Amsterdam", 14),))
    features = make_features([example], encoder, QaSettings(), "here")
    window, ((first, last),) = features[0].window, features[0].positions.tolist()
    read, shift = features.contexts[0], window.context_offset - window.context_begin
    assert text[read.offsets[first + shift, 0] : read.offsets[last + shift, 1]] == "Amsterdam"
    assert read.words[first + shift].tolist() == [14, 23]
    assert not read.blank[first + shift]


STRIPPED = normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])


@pytest.mark.parametrize(
    ("normalizer", "lost"),
    [
        (STRIPPED, "\u0301"),
        (normalizers.NFC(), "\u0301"),
        (normalizers.BertNormalizer(), "\x00"),
        (normalizers.BertNormalizer(), "\u200b\ufeff"),
        (normalizers.Replace(Regex(r"\d"), ""), "12"),
        (normalizers.Replace("\u200b", " "), "\u200b"),
    ],
)
@pytest.mark.parametrize("split", [pre_tokenizers.BertPreTokenizer(), None])
def test_what_a_normalizer_removes_or_joins_belongs_to_no_token_behind_it(normalizer, lost, split):
    made = tokenizer_of("pieces", split) if split else robbert()
    made.normalizer = normalizer
    text = f"the{lost} end"
    found = offsets(made, text)
    assert [text[a:b] for a, b in found if a > 3] == (["e", "n", "d"] if split else ["e", "e", "n", "d"])
    Encoder(made, CONFIG).check_coverage("it")


def test_jamo_that_a_normalizer_joins_belong_to_their_syllable():
    made = tokenizer_of("pieces", pre_tokenizers.BertPreTokenizer())
    made.normalizer = normalizers.NFC()
    assert offsets(made, "\u1112\u1161\u11ab on") == [(0, 1), (4, 5), (5, 6)]


def test_two_characters_that_become_one_are_one_token():
    made = tokenizer_of("pieces", pre_tokenizers.BertPreTokenizer())
    made.normalizer = normalizers.Replace("''", '"')
    assert made.encode("''on", add_special_tokens=False).offsets == [(1, 2), (2, 3), (3, 4)]
    assert offsets(made, "''on") == [(0, 2), (2, 3), (3, 4)]


@pytest.mark.parametrize("name", NAMES)
@thorough
@given(text=texts(12))
def test_tokenizers_that_cover_everything_keep_their_offsets(name, text):
    found = family(name).encoder.encode_many([text, ""])[0].offsets.tolist()
    assert found == [list(pair) for pair in family(name).tokenizer.encode(text, add_special_tokens=False).offsets]


def test_nothing_is_guessed_behind_the_last_token():
    encoder = Encoder(tokenizer_of("letters", pre_tokenizers.WhitespaceSplit()), CONFIG)
    read = encoder.encode("on é")
    assert read.offsets.tolist() == [[0, 1], [1, 2]]
    assert read.tokens_of(3, 4) is None
    assert len(encoder.encode("é")) == 0
    assert encoder.encode("é on").offsets.tolist() == [[0, 3], [3, 4]]


@pytest.mark.parametrize("name", NAMES)
def test_tokenizers_that_cover_everything_can_be_trained(name):
    family(name).encoder.check_coverage(name)
    Encoder(robbert(), CONFIG).check_coverage("robbert")


def unknown_missing() -> Tokenizer:
    made = Tokenizer(models.WordPiece({c: i for i, c in enumerate(LETTERS)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return made


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (
            lambda: tokenizer_of("letters", pre_tokenizers.Whitespace()),
            r"^runs/x: its tokenizer has no token for 'se' at the end of 'Størrelse', so no answer could contain",
        ),
        (lambda: tokenizer_of("pieces", pre_tokenizers.Punctuation("removed")), r"for '\)' at the end of '\(a\)'"),
        (unknown_missing, r"^runs/x: its tokenizer cannot read 'word' \(WordPiece error: Missing \[UNK\] token"),
    ],
)
def test_tokenizers_that_drop_characters_are_refused(made, message):
    encoder = Encoder(made(), CONFIG)
    with pytest.raises(InputError, match=message):
        encoder.check_coverage("runs/x")
