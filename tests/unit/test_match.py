"""Finding an answer that does not occur exactly in its context, compared with brute force over every slice."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qadeploy.data.match import (
    Slice,
    cuts_a_word,
    find_caseless,
    find_spaced,
    find_spelled,
    from_utf8,
    from_utf16,
    occurrences,
    whole_words,
)

TEXT = st.text(alphabet="aAbß İ,.- \t\n\u00a0é\u0301क\u093f😀", min_size=1, max_size=14)


def spelled(text):
    return "".join(c.casefold() for c in text if unicodedata.category(c)[0] in "LMN")


def slices(context, same, kept=lambda c: True):
    """Every slice whose form is the wanted one and which begins and ends with a kept character."""
    return [
        Slice(i, j)
        for i in range(len(context))
        for j in range(i + 1, len(context) + 1)
        if kept(context[i]) and kept(context[j - 1]) and same(context[i:j])
    ]


@given(TEXT, TEXT)
def test_occurrences_overlap(text, context):
    assert occurrences(text, context) == [i for i in range(len(context)) if context.startswith(text, i)]


@given(TEXT, TEXT)
def test_letter_case(answer, context):
    wanted = slices(context, lambda piece: piece.casefold() == answer.casefold())
    assert find_caseless(answer, context) == wanted


@given(TEXT.filter(str.strip), TEXT)
def test_white_space(answer, context):
    wanted = slices(
        context, lambda piece: " ".join(piece.split()) == " ".join(answer.split()), lambda c: not c.isspace()
    )
    assert find_spaced(answer, context) == wanted


@given(TEXT, TEXT)
def test_letters_and_digits(answer, context):
    if not spelled(answer):
        assert find_spelled(answer, context) == []
        return
    core = answer.strip("".join(c for c in answer if not spelled(c)))
    wanted = slices(context, lambda piece: spelled(piece) == spelled(answer), lambda c: bool(spelled(c)))
    assert find_spelled(core, context) == wanted


@pytest.mark.parametrize(
    ("answer", "context"),
    [
        ("15", "It is 1.5 km."),
        ("1012", "From 10-12 on."),
        ("10 12", "From 1012 on."),
        ("+5", "It was -5 there."),
        ("5", "It was -5 there."),
        ("5", "It was .5 there."),
        ("1.5", "About 15 of them."),
        ("3,5", "About 3.5 of them."),
    ],
)
def test_numbers_are_not_changed(answer, context):
    assert find_spelled(answer, context) == []


@pytest.mark.parametrize(
    ("answer", "context", "found"),
    [
        ("1 , 000 people", "Over 1,000 people came.", "1,000 people"),
        ("in 1990 - 1995", "It was in 1990-1995 or so.", "in 1990-1995"),
        ("covid - 19", "He had COVID-19 then.", "COVID-19"),
        ("about 3 . 5 %", "About 3.5% of it.", "About 3.5%"),
        ("funny , funny", "It is funny, funny.", "funny, funny"),
        ("do n't , ever !", "You don't, ever! Go.", "don't, ever!"),
        ("( it 's ) fine .", "Well (it's) fine.", "(it's) fine."),
        ("$ 5 . 00", "It costs $5.00 here", "$5.00"),
        ("the '' one ''", 'He said the "one" twice', 'the "one'),
        ("naïve ?", "Is that NAÏVE ? Yes", "NAÏVE ?"),
    ],
)
def test_detokenised_answers(answer, context, found):
    (place,) = find_spelled(answer, context)
    assert context[place.start : place.end] == found


def test_the_slice_that_the_data_names_comes_first():
    context = "so so. It is so , so. Yes"
    assert find_spelled("so, so", context, Slice(12, 21)) == [Slice(13, 21)]
    assert find_spelled("so, so", context, Slice(0, 3)) == find_spelled("so, so", context)
    assert find_spelled("so, so", context, Slice(30, 99)) == find_spelled("so, so", context)


def test_words_are_not_cut():
    context = "the other, the 15 and 5, 日本語"
    cut, whole = Slice(5, 8), Slice(11, 14)
    assert [cuts_a_word(s, context) for s in (cut, whole)] == [True, False]
    assert cuts_a_word(Slice(16, 17), context)
    assert not cuts_a_word(Slice(25, 26), context)
    assert whole_words([cut, whole], context) == [whole]
    assert whole_words([cut], context) == [cut]


@given(st.text(alphabet="a😀é", max_size=10), st.integers(0, 12))
def test_utf16_offsets(text, offset):
    places = {len(text[:i].encode("utf-16-le")) // 2: i for i in range(len(text) + 1)}
    assert from_utf16(offset, text) == places.get(offset)


@given(st.text(alphabet="a😀é", max_size=10), st.integers(0, 30))
def test_utf8_offsets(text, offset):
    places = {len(text[:i].encode()): i for i in range(len(text) + 1)}
    assert from_utf8(offset, text) == places.get(offset)
