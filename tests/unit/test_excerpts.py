"""Excerpts of contexts: nothing is lost near a span, spans are cut out by code points, long texts are clipped."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from qadeploy.reports.excerpts import excerpt

TEXT = st.text(alphabet=st.sampled_from("ab \n\u0301\u200d\U0001f468م日"), max_size=300)


@st.composite
def contexts(draw):
    context = draw(TEXT)
    place = st.integers(0, len(context))
    spans = st.lists(st.tuples(place, place).map(lambda p: (min(p), max(p))).filter(lambda p: p[0] < p[1]), max_size=3)
    return context, draw(spans), draw(spans)


@given(contexts(), st.integers(10, 60), st.integers(5, 30))
def test_pieces_are_slices_of_the_context_marked_as_brute_force_marks_them(made, whole, around):
    context, golds, answered = made
    pieces = excerpt(context, golds, answered, whole=whole, around=around)
    shown = set()
    for piece in pieces:
        assert context[piece.start : piece.end] == piece.text
        for place in range(piece.start, piece.end):
            assert place not in shown
            shown.add(place)
            assert piece.gold == any(a <= place < b for a, b in golds)
            assert piece.answered == any(a <= place < b for a, b in answered)
    if len(context) <= whole:
        assert len(shown) == len(context)
    for span in (*golds, *answered):
        for edge in span:
            assert {p for p in (edge - 1, edge) if 0 <= p < len(context)} <= shown
    previous = 0
    for piece in pieces:
        assert piece.gap == (piece.start > previous)
        previous = piece.end


def test_a_long_context_is_clipped_around_two_distant_spans():
    context = "word " * 2000
    gold, answer = (5000, 5004), (9000, 9004)
    pieces = excerpt(context, [gold], [answer])
    assert [p.gap for p in pieces].count(True) == 2
    assert sum(len(p.text) for p in pieces) < 1000
    assert [(p.start, p.end) for p in pieces if p.gold] == [gold]
    assert [(p.start, p.end) for p in pieces if p.answered] == [answer]
    for piece in pieces:
        if piece.gap:
            assert piece.text[0].isspace() or context[piece.start - 1].isspace()


def test_the_beginning_is_shown_where_nothing_is_marked():
    (piece,) = excerpt("a" * 5000, [], [], whole=100)
    assert (piece.start, piece.gap) == (0, False)
    assert len(piece.text) >= 100


def test_a_cut_does_not_tear_an_emoji_of_several_code_points():
    family = "\U0001f468\U0001f3fd\u200d\U0001f469\u200d\U0001f467"
    context = family * 200
    for shift in range(len(family)):
        middle = 600 + shift
        pieces = excerpt(context, [(middle, middle + 1)], [], whole=100, around=60)
        assert pieces[0].start % len(family) == 0
        assert pieces[-1].end % len(family) == 0
