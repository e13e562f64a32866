"""Shared by all tests: no network, and a tiny question-answering model that is trained once."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

NAMES = ("Ada", "Bela", "Cora", "Dora", "Elin", "Fay", "Gail", "Hilde", "Ines", "Judith", "Kaya", "Lena")
THINGS = ("lamp", "boat", "ladder", "kettle", "piano", "bell", "rope", "clock")


def triplets(count: int = 96) -> list[dict[str, object]]:
    """Rows that a tiny model can learn: who keeps which thing; each row its own passage."""
    rows: list[dict[str, object]] = []
    for i in range(count):
        thing, other = THINGS[i % 8], THINGS[(i * 3 + 1) % 8 if (i * 3 + 1) % 8 != i % 8 else (i + 1) % 8]
        name, wrong = NAMES[i % 12], NAMES[(i + 5) % 12]
        context = f"{name} keeps the {thing} in room {i}. {wrong} keeps the {other} outside."
        rows.append({"context": context, "question": f"Who keeps the {thing}?", "answer": name})
    return rows


def write_jsonl(path: Path, rows: list[dict[str, object]]) -> Path:
    """Writes rows as JSONL and returns the path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def make_tiny_checkpoint(folder: Path) -> Path:
    """A BERT of two layers with random weights and a WordPiece tokenizer trained on the triplets."""
    import torch
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import BertConfig, BertForQuestionAnswering, PreTrainedTokenizerFast

    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    texts = [str(row[key]) for row in triplets() for key in ("context", "question")]
    tokenizer.train_from_iterator(texts, trainers.WordPieceTrainer(vocab_size=300, special_tokens=specials))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    torch.manual_seed(5)
    config = BertConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
        max_position_embeddings=160,
    )
    BertForQuestionAnswering(config).save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=160,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A question-answering checkpoint with random weights."""
    return make_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "checkpoint")
