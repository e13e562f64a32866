"""The scores against values worked out by hand and a second statement of SQuAD's rules."""

from __future__ import annotations

import string
import sys
import unicodedata
from itertools import groupby

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qadeploy.core.metrics import (
    Scores,
    bootstrap_interval,
    choose_metric,
    exact_match,
    f1,
    normalize,
    score,
    wilson_interval,
)
from qadeploy.records import Annotation, Answer, Example
from tests.tokenizers_for_tests import thorough

# SQuAD's rules once more, on plain texts.


def plain_tokens(text: str) -> list[str]:
    kept = "".join(c for c in text.lower() if c not in string.punctuation)
    runs = ("".join(run) for _, run in groupby(kept, key=str.isalnum))
    return "".join(" " if run in ("a", "an", "the") else run for run in runs).split()


def plain_f1(prediction: str, gold: str) -> float:
    left, right = plain_tokens(prediction), plain_tokens(gold)
    rest = list(right)
    for token in left:
        if token in rest:
            rest.remove(token)
    shared = len(right) - len(rest)
    return 2 * shared / (len(left) + len(right)) if shared else 0.0


def official_v1(prediction: str, golds: list[str]) -> tuple[float, float]:
    """v1.1: the best over the gold answers; nothing shared is 0, even if both are empty."""
    same = any(plain_tokens(prediction) == plain_tokens(gold) for gold in golds)
    return float(same), max(plain_f1(prediction, gold) for gold in golds)


def official_v2(prediction: str, golds: list[str]) -> tuple[float, float]:
    """v2.0: gold answers without a token are dropped; if none is left, only "no answer" matches."""
    golds = [gold for gold in golds if plain_tokens(gold)]
    if not golds or not plain_tokens(prediction):
        both = float(not golds and not plain_tokens(prediction))
        return both, both
    return official_v1(prediction, golds)


def ask(prediction: str, *golds: str) -> tuple[float, float]:
    """Exact match and F1 of one question, 0 to 1."""
    example = Example("1", "?", "", tuple(Annotation(gold, 0) for gold in golds))
    scores = score([example], [Answer(prediction, 0, len(prediction), 1.0)])
    return float(scores.rows_exact_match[0]), float(scores.rows_f1[0])


# fmt: off
WORDS = (
    "the", "The", "a", "An.", "'an'", "¿a?", "the—", "theatre", "cat", "Cat", "cats,",
    "a-b", "U.S.", "3.5", "£5", "été", "É", "_", "...", "—", "東京",
)
# fmt: on
ANSWERS = st.one_of(st.lists(st.sampled_from(WORDS), max_size=6).map(" ".join), st.text(max_size=12))


@thorough
@given(prediction=ANSWERS, golds=st.lists(ANSWERS, max_size=3))
def test_score_equals_the_rules_of_v2(prediction, golds):
    assert ask(prediction, *golds) == pytest.approx(official_v2(prediction, golds))


@thorough
@given(prediction=ANSWERS, golds=st.lists(ANSWERS.filter(plain_tokens), min_size=1, max_size=3))
def test_score_equals_the_rules_of_v1_where_every_gold_has_a_token(prediction, golds):
    assert ask(prediction, *golds) == pytest.approx(official_v1(prediction, golds))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Cat\tsat,\n on an A-frame!", "cat sat on aframe"),
        ("a.b.c. the", "abc"),  # punctuation goes before articles, and leaves no space
        ("theatre another bathe", "theatre another bathe"),
        ("THE THE a", ""),
        ("l'été — “the” Straße", "lété — “ ” straße"),  # only ASCII punctuation goes
        ("$3.50\u00a0a\u3000kilo", "350 kilo"),
        ("under_score", "underscore"),
        ("", ""),
    ],
)
def test_normalize(text, expected):
    assert normalize(text) == expected


@pytest.mark.parametrize(
    ("prediction", "gold", "em", "overlap"),
    [
        ("The Eiffel Tower.", "eiffel tower", 1, 1),
        ("Eiffel Tower in Paris", "the Eiffel Tower", 0, 2 / 3),  # precision 2/4, recall 2/2
        ("Saint Bernadette Soubirous of Lourdes", "Bernadette", 0, 1 / 3),  # 1/5, 1/1
        ("cat cat cat", "cat cat dog", 0, 2 / 3),  # each token counts as often as both sides have it
        ("dog cat", "cat dog", 0, 1),
        ("red", "blue", 0, 0),
        ("", "blue", 0, 0),
        ("blue", "", 0, 0),
        ("", "", 1, 1),
        ("the", "...", 1, 1),  # nothing is left of either
    ],
)
def test_exact_match_and_f1_by_hand(prediction, gold, em, overlap):
    assert exact_match(prediction, gold) == em
    assert f1(prediction, gold) == pytest.approx(overlap)


SCRIPTS = st.lists(
    st.sampled_from(
        ["the", "a", " ", "“", "。", "天氣", "好", "タワー", "ที่", "서울", "мир", "،", "في", "＄", "5", "\u200b"]
    ),
    max_size=6,
).map("".join)


@pytest.mark.parametrize("metric", ["squad", "mixed"])
@thorough
@given(a=ANSWERS | SCRIPTS, b=ANSWERS | SCRIPTS)
def test_f1_is_symmetric_and_one_for_an_exact_match(metric, a, b):
    assert f1(a, b, metric) == f1(b, a, metric)
    assert 0 <= f1(a, b, metric) <= 1
    assert f1(a, a, metric) == exact_match(a, a, metric) == 1
    assert exact_match(a, b, metric) <= f1(a, b, metric)


# The metric "mixed".


@pytest.mark.parametrize(
    ("prediction", "gold", "em", "overlap"),
    [
        ("天氣很", "天氣很好", 0, 6 / 7),  # precision 3/3, recall 3/4
        ("“北京”。", "北京", 1, 1),
        ("《红楼梦》", "红楼梦", 1, 1),
        ("公司苹果", "苹果公司", 0, 1),
        ("iPhone 手机", "iphone手机", 1, 1),  # spaces between tokens do not count
        ("1998年", "1998年3月", 0, 2 / 3),  # 1998 年 of 1998 年 3 月
        ("𠮷野家", "野家", 0, 4 / 5),  # a character of plane 2
        ("東京タワー", "東京", 0, 4 / 7),
        ("「はい」、そうです！", "はい", 0, 4 / 8),
        ("กรุงเทพ", "กรุงเทพฯ", 0, 14 / 15),
        ("ที่นี่", "นี่", 0, 2 / 3),  # a vowel and a tone mark are characters too: 6 and 3
        ("ភ្នំ\u200bពេញ", "ភ្នំពេញ", 1, 1),
        ("서울 특별시", "서울", 0, 2 / 3),
        ("서울특별시", "서울", 0, 0),
        ("في القاهرة،", "القاهرة", 0, 2 / 3),
        ("«القاهرة»؟", "القاهرة", 1, 1),
        ("«Мир» — это", "МИР", 0, 2 / 3),
        ("दिल्ली।", "दिल्ली", 1, 1),
        ("«¿Qué?»", "qué", 1, 1),
        ("“el Rey”, dijo", "el rey", 0, 4 / 5),
        ("el rey", "rey", 0, 2 / 3),  # the language is not known, so only English articles are dropped
        ("The cat’s “hat”…", "cats hat", 1, 1),
        ("the Beatles", "Beatles", 1, 1),
        ("the 台北", "台北", 0, 4 / 5),  # not Latin alone, so the article stays
        ("＄５", "５", 1, 1),  # full-width
        ("5 €", "5", 0, 2 / 3),  # a symbol, no punctuation
        ("。", "", 1, 1),
        ("。", "好", 0, 0),
    ],
)
def test_mixed_by_hand(prediction, gold, em, overlap):
    assert exact_match(prediction, gold, "mixed") == em
    assert f1(prediction, gold, "mixed") == pytest.approx(overlap, abs=1e-12)


def mlqa(text: str, language: str) -> str:
    """MLQA's rules once more, on plain texts: English and Chinese."""
    plain = (c for c in text.lower() if c not in string.punctuation and not unicodedata.category(c).startswith("P"))
    if language == "en":
        return " ".join(plain_tokens("".join(plain)))
    return " ".join("".join(f" {c} " if "\u4e00" <= c <= "\u9fa5" else c for c in plain).split())


SIGNS = ("", " ", ", ", "。", "“", "’", "¿", "—", "$", "·", "(", "\u3000")
ENGLISH = st.lists(st.sampled_from(("The", "a", "an", "theatre", "Été", "3.5", "café", *SIGNS)), max_size=8).map(
    "".join
)
CHINESE = st.lists(st.sampled_from(("天氣", "好", "NBA", "the", "3", "苹果", *SIGNS)), max_size=8).map("好".join)


@thorough
@given(english=ENGLISH, chinese=CHINESE)
def test_mixed_equals_the_rules_of_mlqa(english, chinese):
    assert normalize(english, "mixed") == mlqa(english, "en")
    chinese += "好"  # a text without it would be English
    assert normalize(chinese, "mixed") == mlqa(chinese, "zh")


@thorough
@given(text=st.text(st.characters(max_codepoint=127)) | ANSWERS.filter(str.isascii))
def test_both_metrics_are_squads_on_ascii(text):
    assert normalize(text) == normalize(text, "mixed") == " ".join(plain_tokens(text))


def test_characters_of_scripts_without_spaces_are_tokens_and_those_of_others_are_not():
    east_asian = ("CJK UNIFIED", "HIRAGANA", "KATAKANA", "HALFWIDTH KATAKANA")
    unspaced = (*east_asian, "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN")
    spaced = ("LATIN", "GREEK", "CYRILLIC", "ARABIC", "HEBREW", "DEVANAGARI", "TAMIL", "GEORGIAN", "ETHIOPIC", "HANGUL")
    found = {1: 0, 2: 0}
    for char in map(chr, range(sys.maxunicode + 1)):
        name = unicodedata.name(char, "")
        if name.startswith((*unspaced, *spaced)) and unicodedata.category(char)[0] in "LM" and char.isprintable():
            tokens = 2 if name.startswith(unspaced) else 1
            assert len(normalize(2 * char, "mixed").split()) == tokens, name
            found[tokens] += 1
    assert found[1] > 14_000
    assert found[2] > 90_000


def test_score_by_the_metric():
    # The second normalises to nothing.
    example = Example("1", "?", "", (Annotation("天氣很好", 0), Annotation("。", 4)))
    for metric, overlap in (("squad", 0), ("mixed", 6 / 7)):
        found = score([example], [Answer("天氣很", 0, 3, 1.0)], metric)
        assert found.rows_f1[0] == pytest.approx(overlap)
    assert score([example], [Answer("", 0, 0, 1.0)], "mixed").f1 == 0


def asked(context: str, *answers: str) -> Example:
    return Example("1", "?", context, tuple(Annotation(answer, 0) for answer in answers))


@pytest.mark.parametrize(
    ("examples", "expected"),
    [
        ([], "squad"),
        ([asked("Ada keeps the lamp.", "Ada")], "squad"),
        ([asked("¿Quién guarda la lámpara? «Ñandú», dijo él.", "Ñandú")], "squad"),
        ([asked("Ｌatin, full width: ｆ", "f")], "squad"),
        ([asked("王家保管燈。", "王家")], "mixed"),
        ([asked("Ада хранит лампу.", "Ада")], "mixed"),
        ([asked("آدا تحتفظ بالمصباح", "آدا")], "mixed"),
        ([asked("अदा दीपक रखती है", "अदा")], "mixed"),
        ([asked(90 * "a" + 10 * "я", "a")], "squad"),  # 10 % is not more than 10 %
        ([asked(89 * "a" + 11 * "я", "a")], "mixed"),
        ([asked(89 * "a" + 11 * "я" + 99 * "1 . “", "a")], "mixed"),  # only letters count
        ([asked(20 * "a"), *9 * [asked(10 * "я")]], "mixed"),
        ([asked(100 * "a"), *99 * [asked(10 * "я")]], "squad"),  # 10 of 110: a context counts once
        ([asked(99 * "a" + "天", "天")], "mixed"),  # the answers are all Chinese
    ],
)
def test_auto_goes_by_the_letters_of_contexts_and_answers(examples, expected):
    assert choose_metric("auto", examples) == expected
    assert [choose_metric(choice, examples) for choice in ("squad", "mixed")] == ["squad", "mixed"]


def test_score_by_hand():
    def example(*answers: tuple[str, int]) -> Example:
        return Example("1", "?", "", tuple(Annotation(*answer) for answer in answers))

    examples = [
        example(("in Paris", 10), ("Paris", 13)),  # the best gold counts
        example(("Paris", 13)),  # the right text at another place is no exact span
        example(("the Seine", 0)),
        example(),
        example(),
        example(("the", 0)),  # normalises to nothing: wants no answer
        example(("the", 0), ("Seine", 4)),  # here the article is no gold
        example(("Lyon", 3)),
    ]
    predictions = [
        Answer("Paris", 13, 18, 0.9),
        Answer("Paris", 40, 45, 0.9),
        Answer("Seine river", 4, 15, 0.9),
        Answer("", 0, 0, 0.9),
        Answer("Paris", 13, 18, 0.9),
        Answer("", 0, 0, 0.9),
        Answer("", 0, 0, 0.9),
        Answer("", 0, 0, 0.9),
    ]
    scores = score(examples, predictions)
    assert scores.rows_exact_match.tolist() == [1, 1, 0, 1, 0, 1, 0, 0]
    assert scores.rows_f1.tolist() == pytest.approx([1, 1, 2 / 3, 1, 0, 1, 0, 0])
    assert scores.rows_accuracy.tolist() == [1, 0, 0, 1, 0, 0, 0, 0]
    assert (scores.total, scores.exact_match, scores.accuracy) == (8, 50, 25)
    assert scores.f1 == pytest.approx(100 * (4 + 2 / 3) / 8)
    plain = scores.to_dict()
    kinds = {"exact": (3 / 6, 1 / 2), "f1": ((3 + 2 / 3) / 6, 1 / 2), "total": (0.06, 0.02)}
    for name, values in kinds.items():
        for kind, value in zip(("HasAns", "NoAns"), values, strict=True):
            assert plain[f"{kind}_{name}"] == pytest.approx(100 * value)
    assert {k: plain[k] for k in ("exact_match", "accuracy", "total")} == {
        "exact_match": 50,
        "accuracy": 25,
        "total": 8,
    }
    assert plain["f1_interval"] == list(bootstrap_interval(scores.rows_f1))


def test_score_wants_one_prediction_a_question():
    with pytest.raises(ValueError):
        score([Example("1", "?", "")], [])


def test_no_questions_score_zero():
    assert set(map(str, score([], []).to_dict().values())) == {"0", "0.0", "[0.0, 0.0]"}


ROWS = st.lists(st.floats(0, 1, width=16), min_size=1, max_size=60).map(np.array)


@thorough
@given(rows=ROWS)
def test_the_interval_contains_the_mean_and_is_the_same_each_time(rows):
    low, high = bootstrap_interval(rows)
    assert low - 1e-9 <= Scores(rows, rows, rows, rows > 0).f1 <= high + 1e-9
    assert 0 <= low <= high <= 100
    assert bootstrap_interval(rows) == (low, high)


def test_the_interval_has_the_width_of_theory_and_shrinks_with_n():
    for n in (100, 400, 1600):
        rows = np.arange(n) % 2.0  # mean one half, standard deviation one half
        low, high = bootstrap_interval(rows)
        assert high - low == pytest.approx(2 * 1.96 * 50 / n**0.5, rel=0.1)
        assert (low + high) / 2 == pytest.approx(50, abs=1.5)


@pytest.mark.parametrize(
    ("share", "count", "low", "high"),
    # scipy 1.17.1: binomtest(share * count, count).proportion_ci(method="wilson")
    # The last is from Newcombe 1998.
    [
        (0.5, 10, 0.236593, 0.763407),
        (0.0, 10, 0.0, 0.277533),
        (1.0, 5, 0.565518, 1.0),
        (0.3, 200, 0.240747, 0.366791),
        (81 / 263, 263, 0.2553, 0.3662),
    ],
)
def test_wilson_s_interval(share, count, low, high):
    assert wilson_interval(share, count) == (pytest.approx(low, abs=6e-5), pytest.approx(high, abs=6e-5))
