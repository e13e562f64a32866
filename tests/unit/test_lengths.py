"""Lengths in tokens: counted by hand on a tokenizer of whole words."""

from __future__ import annotations

import json

import pytest

from qadeploy.core.settings import QaSettings
from qadeploy.data.check import check_rows
from qadeploy.data.fields import DataOptions
from qadeploy.data.lengths import histogram, load_encoder, measure_lengths
from qadeploy.data.rows import RawRow
from qadeploy.errors import InputError, StrideError
from qadeploy.shipped import base_model_path


@pytest.fixture(scope="module")
def base():
    return load_encoder(str(base_model_path()))


def checked(*answers: tuple[str, int], context: str, question: str = "what ?"):
    rows = [
        RawRow(n, {"context": context, "question": question, "answer": text, "answer_start": start})
        for n, (text, start) in enumerate(answers, 1)
    ]
    return check_rows("x", rows, DataOptions())


def test_windows_and_borders(base):
    # 20 one-token words; question 2 tokens, 3 special tokens: 16 - 5 = 11 words a window, overlap 3,
    # so windows over words 0-10, 8-18, 16-19.
    words = ["sea", "sky"] * 10
    context = " ".join(words)
    starts = [4 * i for i in range(20)]
    check = checked(
        ("sea", 0),  # one token, whole
        ("sea sky sea sky", starts[8]),  # 8-11: cut by the first window's end, whole in the second
        (context[starts[4] : starts[12] - 1], starts[4]),  # 4-11: whole in none
        (context[starts[2] : starts[9] + 3], starts[2]),  # 2-9: whole in the first, cut in the second
        context=context,
    )
    found = measure_lengths(check, base, QaSettings(max_seq_len=16, doc_stride=3))
    assert found.context_tokens == [20]
    assert found.answer_tokens == [1, 4, 8, 8]
    assert found.windows == [3, 3, 3, 3]
    assert (found.cut, found.lost, found.lowered, found.too_long_rows) == (3, 1, 0, [])
    assert "answers cut by a window border: 3 (75.0%); whole in no window: 1 (25.0%)" in found.lines()


def test_a_question_that_leaves_no_room(base):
    check = checked(*[("sea", 0)] * 11, context="sea sky", question="what " * 13)
    found = measure_lengths(check, base, QaSettings(max_seq_len=16, doc_stride=3))
    assert (found.too_long_rows, len(found.windows)) == (list(range(1, 12)), 0)
    assert (
        found.lines()[-1]
        == "questions that leave no room for context in 16 tokens: 11 (row 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, ...)"
    )


def test_rows_are_named_by_their_numbers_in_the_file(base):
    texts = ("what ?", "what " * 12, "what " * 13)  # 2, 12 and 13 tokens beside 3 special ones
    rows = [
        RawRow(n, {"context": "sea sky", "question": q, "answer": "sea", "answer_start": 0})
        for n, q in enumerate(texts, 4)
    ]
    found = measure_lengths(check_rows("x", rows, DataOptions()), base, QaSettings(max_seq_len=16, doc_stride=3))
    assert (found.too_long_rows, found.lowered) == ([6], 1)
    assert found.windows == [1, 2]
    assert found.lines()[-2:] == [
        "questions that leave so little room that doc_stride was lowered: 1",
        "questions that leave no room for context in 16 tokens: 1 (row 6)",
    ]


def test_a_stride_that_no_question_allows(base):
    check = checked(("sea", 0), context="sea sky " * 10)
    with pytest.raises(StrideError, match="doc_stride must be below max_seq_len 16, not 16"):
        measure_lengths(check, base, QaSettings(max_seq_len=16, doc_stride=16))


def test_tokens_that_the_tokenizer_does_not_know_are_said(base):
    found = measure_lengths(checked(("ሰላም", 0), context="ሰላም sea sky ."), base, QaSettings())
    assert found.unknown == 1 / 6  # one of "ሰላም sea sky ." and "what ?"
    assert any("unknown to the tokenizer: 17% of the tokens; a model cannot learn them" in x for x in found.lines())
    assert not any(
        "unknown" in x for x in measure_lengths(checked(("sea", 0), context="sea ."), base, QaSettings()).lines()
    )


def test_rejected_rows_are_not_counted(base):
    found = measure_lengths(checked(("sea", 0), ("red", 0), context="sea sky"), base, QaSettings())
    assert (len(found.answer_tokens), len(found.windows)) == (1, 1)


def test_a_histogram():
    values = [1, 1, 2, 3, 4, 9, 0]
    assert histogram("tokens", values, (1, 2, 3, 5)) == [
        "tokens: 7, median 2, 95 % at most 9, longest 9",
        f"          0  {'█' * 6} 1",
        f"          1  {'█' * 11} 2",
        f"          2  {'█' * 6} 1",
        f"        3-4  {'█' * 11} 2",
        f"         5+  {'█' * 6} 1",
    ]
    assert histogram("tokens", values[:0], (1,)) == ["tokens: none"]


@pytest.mark.parametrize(
    ("content", "message"), [({}, "has no tokenizer.json"), ({"tokenizer.json": "{"}, "not a readable tokenizer file")]
)
def test_a_folder_that_is_no_checkpoint(tmp_path, content, message):
    for name, text in content.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        load_encoder(str(tmp_path))


def test_a_name_that_the_hub_does_not_give(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        InputError, match="no-such/base: neither a checkpoint folder nor a tokenizer that can be loaded"
    ):
        load_encoder("no-such/base")


def test_left_padding_tokenizers_take_the_context_first(tmp_path):
    source = base_model_path()
    (tmp_path / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())
    for side in ("left", "right"):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"padding_side": side}))
        assert load_encoder(str(tmp_path)).config.context_first == (side == "left")
