"""The estimated cost of a request before it is tokenised, and the measured speed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qadeploy.core.settings import QaSettings
from qadeploy.serve.cost import Speed, TokenRatios, window_tokens

ENGLISH, CHINESE = "the lamp " * 100, "灯塔看守人" * 100
SCRIPTS = {
    "Latin": "Größe, “naïve” – straße",
    "letters": "фонарьλύχνοςمصباحमशाल",
    "unspaced": "ตะเกียงໂຄມໄຟចង្កៀង",
    "Han": "灯塔の守り人は、ランプを磨く。𠀀豈！",
    "Hangul": "등대지기등불",
    "other": "🚀🙂\ue000",
}
PER_CHARACTER = dict(zip(SCRIPTS, (0.25, 0.6, 1.0, 1.0, 2.0, 1.0), strict=True))


@pytest.mark.parametrize("script", SCRIPTS)
def test_each_script_has_a_ratio_of_its_own(script):
    ratios = TokenRatios()
    for _ in range(200):
        ratios.learn(SCRIPTS[script] * 100, 3 * len(SCRIPTS[script] * 100))
    for other, text in SCRIPTS.items():
        expected = 3 if other == script else PER_CHARACTER[other]
        assert ratios.tokens(text) == pytest.approx(expected * len(text), rel=0.01)


def test_ratios_follow_what_was_tokenised():
    ratios = TokenRatios()
    assert ratios.tokens(ENGLISH) == 225
    assert ratios.tokens(CHINESE) == 500
    before = abs(ratios.tokens(ENGLISH + CHINESE) - 950)
    for _ in range(300):
        ratios.learn(ENGLISH, 200)
        ratios.learn(ENGLISH + CHINESE, 950)  # 200 and 750
    assert before == 225
    assert ratios.tokens(ENGLISH) == pytest.approx(200, rel=0.02)
    assert ratios.tokens(CHINESE) == pytest.approx(750, rel=0.02)


def test_ratios_are_bounded_and_short_texts_teach_little():
    ratios = TokenRatios()
    ratios.learn("", 3)
    ratios.learn("!?!", 3)
    assert ratios.tokens(ENGLISH) == pytest.approx(225, rel=0.01)
    for _ in range(100):
        ratios.learn(ENGLISH, 10**6)
        ratios.learn(CHINESE, 0)
    assert ratios.tokens(ENGLISH) == 4 * 900
    assert ratios.tokens(CHINESE) == pytest.approx(0.02 * 500)


def test_a_long_text_is_sampled_evenly():
    assert TokenRatios().tokens("the lamp " * 50_000 + "灯" * 150_000) == pytest.approx(450_000 / 4 + 150_000, rel=0.01)


def test_a_text_that_is_no_unicode_has_an_estimate_too():
    assert TokenRatios().tokens("\ud800" * 10) == 10


@given(
    st.integers(1, 40), st.integers(0, 3_000), st.integers(0, 4), st.integers(48, 512), st.integers(0, 40), st.data()
)
def test_windows_and_their_tokens_are_those_of_cutting_them(question, context, special, longest, stride, data):
    longer = data.draw(st.integers(longest, 600))  # what a context may have to be one window
    settings = QaSettings(max_seq_len=longer, doc_stride=stride, long_seq_len=longest)
    room, stride = longest - question - special, stride * longest // longer
    if context <= longer - question - special or room <= stride:
        room, stride = longer - question - special, settings.doc_stride
    overlap = stride if stride < room else room // 2
    sizes, begin = [min(room, context)], 0
    while begin + room < context:
        begin += room - overlap
        sizes.append(min(room, context - begin))
    most = data.draw(st.sampled_from([10_000, len(sizes), max(1, len(sizes) // 2)]))
    windows, tokens = window_tokens(question, context, special, settings, most)
    assert windows == min(most, len(sizes))
    # Of those that a prefilter chooses, the last may be shorter.
    expected = sum(sorted(sizes)[-windows:]) + windows * (question + special)
    assert tokens == expected


def test_a_question_that_fills_the_window_costs_no_more_than_the_windows_allowed():
    assert window_tokens(500, 10_000, 3, QaSettings(), 256)[0] == 256


def test_the_speed_is_that_of_the_last_seconds():
    speed = Speed(100.0, workers=2)
    assert speed.all == 100
    for step in range(2_000):  # two workers, each 500 tokens in 0.05 seconds
        speed.ran(500, 0.0, 0.05, step * 0.025)
    assert speed.all == pytest.approx(20_000, rel=0.01)
    for step in range(400):  # then half as fast, for twenty seconds
        speed.ran(500, 0.0, 0.1, 50 + step * 0.05)
    assert speed.all == pytest.approx(10_000, rel=0.05)


def test_short_requests_leave_the_rest_and_are_forgotten():
    speed = Speed(1000.0, workers=2)
    for step in range(1_000):  # one of two workers
        speed.ran(50, 1.0, 0.05, step * 0.05)
    assert speed.all == pytest.approx(2_000, rel=0.02)
    assert speed.left(50, 0.25) == pytest.approx(1_000, rel=0.05)
    assert speed.left(50, 0.75) == pytest.approx(1_500, rel=0.05)
    assert speed.left(100, 0.25) == pytest.approx(2_000, rel=0.02)
