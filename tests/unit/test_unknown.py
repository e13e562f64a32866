"""Unknown tokens: shares counted by hand on a vocabulary of eight pieces."""

from __future__ import annotations

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from qadeploy.core.settings import QaSettings
from qadeploy.core.unknown import unknown_id, unknown_share
from qadeploy.core.windows import Encoder, EncoderConfig
from qadeploy.records import Annotation, Example
from qadeploy.training.features import make_features, unknown_tokens

PIECES = ("[PAD]", "[CLS]", "[SEP]", "[UNK]", "the", "cat", "##s", "sat")


def wordpiece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(PIECES)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return tokenizer


def encoder(context_first: bool = False) -> Encoder:
    return Encoder(wordpiece(), EncoderConfig(2, context_first, 1, 0, 100))


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (models.WordPiece({"a": 0, "[UNK]": 1}, unk_token="[UNK]"), 1),
        (models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"), 2),
        (models.Unigram([("a", -1.0), ("<unk>", -2.0)], unk_id=1), 1),
        (models.Unigram([("a", -1.0)]), None),
        (models.BPE({"a": 0, "<unk>": 1}, [], unk_token="<unk>"), 1),
        (models.BPE({"a": 0}, []), None),  # as with bytes
        (models.BPE({"a": 0}, [], unk_token="<unk>"), None),  # named, but not in the vocabulary
    ],
)
def test_the_unknown_token_of_each_kind_of_tokenizer(model, expected):
    assert unknown_id(Tokenizer(model)) == expected


def test_the_share_is_that_of_all_tokens():
    texts = encoder().encode_many(["The cats sat", "ሰላም cat", "", "ዓለም!"])
    assert [text.ids.tolist() for text in texts] == [[4, 5, 6, 7], [3, 5], [], [3, 3]]
    assert unknown_share((text.ids for text in texts), 3) == 3 / 8
    assert unknown_share([texts[0].ids], 3) == 0.0


def test_there_is_no_share_without_an_unknown_token_or_without_tokens():
    assert unknown_share([np.asarray([0, 1, 0])], None) == 0.0
    assert unknown_share([], 3) == unknown_share([np.zeros(0, dtype=np.int64)], 3) == 0.0


@pytest.mark.parametrize("context_first", [False, True])
def test_each_context_and_question_of_the_data_counts_once_however_many_windows_it_makes(context_first):
    long = "the cats sat ሰላም " * 4  # 20 tokens, 4 of them unknown
    examples = [
        Example("1", "ማን sat", long, (Annotation("cats", 4),)),  # 2 tokens, 1 unknown
        Example("2", "cats", long),  # 2 tokens
        Example("3", "ማን sat", "ሰላም the"),  # a question seen before; 2 tokens, 1 unknown
    ]
    made = encoder(context_first)
    sets = [make_features(part, made, QaSettings(max_seq_len=12, doc_stride=3), "x") for part in (examples, examples)]
    assert sets[0].first[1] > 2
    assert unknown_tokens(sets, made) == (4 + 1 + 1) / (20 + 2 + 2 + 2)
