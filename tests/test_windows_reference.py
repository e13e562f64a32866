"""The encoder's windows against those of transformers' fast tokenizers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.tokenizers_for_tests import NAMES, family, texts, thorough


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
    theirs = kind.reference(  # lists, because transformers drops an empty second text that is not in a list
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
