"""Small tokenizers of nine families, trained on first use, and texts to try them on.

They are the same in every run, so that a failure can be repeated. The trainers of ``tokenizers`` are not deterministic:
WordPiece's breaks ties at random, Unigram's gives its pieces random numbers and slightly different scores.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from qadeploy.core.windows import Encoder, EncoderConfig

CORPUS = (
    "The library opens at nine and closes at half past six.",
    "Who wrote the report on the river, and when was it published?",
    "In 1969 the crew of three flew 384,400 km to the Moon.",
    "A kettle boils one litre of water in about four minutes.",
    "The museum's oldest map, drawn by hand, shows only two bridges.",
    "Which of the two bridges was rebuilt after the flood of 1931?",
    "She paid $12.50 for the ticket (return, second class).",
    "Write to info@example.org, or call +44 20 7946 0000.",
    "The tokens of a long context are cut into overlapping windows.",
    "Every answer is a span of the text: it has a start and an end.",
    "État d'âme, été, naïveté : le café était déjà fermé à Orléans.",
    "Où se trouve la bibliothèque où l'élève a oublié son œuvre ?",
    "Größere Straßen führen über die Brücke nach München.",
    "El niño pequeño soñó con una cigüeña en la montaña.",
    "Zażółć gęślą jaźń; Łódź leży w środku Polski.",
    "Příliš žluťoučký kůň úpěl ďábelské ódy.",
    "Τι ώρα ανοίγει το μουσείο στην Αθήνα;",
    "Сколько стоит билет до Москвы? Поезд уходит в полдень.",
    "We landed 🚀 and cheered 🎉🎉, then slept 😴.",
    "The family 👨‍👩‍👧‍👦 waved 👋🏽 at the flag 🇫🇷 on the tower.",
    "図書館は九時に開き、六時に閉まります。",
    "東京は日本の首都です。人口は約千四百万人です。",
    "北京是中国的首都,故宫在城市的中心。",
    "谁写了这本书?书在桌子上。",
    "서울은 대한민국의 수도이며 한강이 흐른다.",
    "تفتح المكتبة في الساعة التاسعة صباحا.",
    "أين تقع مدينة القاهرة؟ تقع على نهر النيل.",
    "الكِتَابُ عَلَى الطَّاوِلَةِ.",
    "पुस्तकालय सुबह नौ बजे खुलता है।",
    "दिल्ली भारत की राजधानी है और यमुना के किनारे बसी है।",
    "क्या किताब मेज़ पर रखी है?",
    "The word 'fiancée' and the number ½ stand beside ﬁve ligatures.",
)

# Enough examples to meet the odd cases, few enough for every commit; a busy machine is no failure.
thorough = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])

_ODD = (" ", "\n\n", "\t", "\u00a0", "\u3000", "\u200d", "\u0301", "\x00", "\x1f", "[SEP]", "</s>", "<sep>", "▁", "##s")
_PIECES = st.one_of(
    st.sampled_from([word for sentence in CORPUS for word in sentence.split()]),
    st.text(max_size=8),
    st.sampled_from(_ODD),
)


def texts(max_pieces: int = 30, min_pieces: int = 0) -> st.SearchStrategy[str]:
    """Words of the corpus among odd white space, special tokens and any Unicode that can be encoded."""
    pieces = st.lists(_PIECES, min_size=min_pieces, max_size=max_pieces)
    return st.builds(str.join, st.sampled_from(("", " ", "  ")), pieces)


@dataclass(frozen=True)
class Family:
    """One kind of tokenizer, with the values a checkpoint of that kind has in its config."""

    tokenizer: Tokenizer
    config: EncoderConfig
    encoder: Encoder
    special: dict[str, str]

    @cached_property
    def reference(self) -> Any:
        """Transformers' wrapper around a copy of the tokenizer."""
        from transformers import PreTrainedTokenizerFast

        copy = Tokenizer.from_str(self.tokenizer.to_str())
        side = "left" if self.config.context_first else "right"
        return PreTrainedTokenizerFast(tokenizer_object=copy, padding_side=side, **self.special)


def set_wordpiece(tokenizer: Tokenizer, texts: Iterable[str], size: int, special: list[str], unknown: str) -> None:
    """Gives a tokenizer the special tokens, all characters, and the pieces that cover most of the texts."""
    single, pieces = set[str](), Counter[str]()
    for text in texts:
        for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str(text)):
            single |= {*word, *(f"##{character}" for character in word[1:])}
            for start in range(len(word)):
                for end in range(start + 2, len(word) + 1):
                    pieces["##" * (start > 0) + word[start:end]] += end - start
    ranked = sorted(pieces, key=lambda piece: (-pieces[piece], piece))
    vocabulary = {piece: number for number, piece in enumerate([*special, *sorted(single), *ranked][:size])}
    tokenizer.model = models.WordPiece(vocabulary, unk_token=unknown)
    tokenizer.add_special_tokens(special)


def _template(single: str, pair: str, *special: str) -> Callable[[Tokenizer], processors.PostProcessor]:
    return lambda tokenizer: processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=[(token, tokenizer.token_to_id(token)) for token in special]
    )


# BERT's pair and RoBERTa's.
_BRACKETS = _template("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", "[CLS]", "[SEP]")
_ANGLES = _template("<s> $A </s>", "<s> $A </s> </s> $B </s>", "<s>", "</s>")


def _wordpiece(
    special: list[str], unknown: str, template: Callable[[Tokenizer], processors.PostProcessor]
) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token=unknown))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    set_wordpiece(tokenizer, CORPUS, 700, special, unknown)
    tokenizer.post_processor = template(tokenizer)
    return tokenizer


def _bert() -> Tokenizer:
    return _wordpiece(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"], "[UNK]", _BRACKETS)


def _mpnet() -> Tokenizer:
    """BERT's pieces in RoBERTa's template, which has token types that the model does not accept."""
    template = _template("<s> $A </s>", "<s> $A </s> </s> $B:1 </s>:1", "<s>", "</s>")
    return _wordpiece(["<s>", "<pad>", "</s>", "[UNK]", "<mask>"], "[UNK]", template)


def _byte_level(special: list[str], template: Callable[[Tokenizer], processors.PostProcessor]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = template(tokenizer)
    return tokenizer


def _roberta() -> Tokenizer:
    """Two separators between question and context, offsets trimmed to the words."""
    return _byte_level(
        ["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
        lambda t: processors.RobertaProcessing(
            ("</s>", t.token_to_id("</s>")),  # by position: the names changed in tokenizers 0.23
            ("<s>", t.token_to_id("<s>")),
            trim_offsets=True,
            add_prefix_space=False,
        ),
    )


def _modernbert() -> Tokenizer:
    """Bytes like RoBERTa's, but in BERT's template and with untrimmed offsets: a token includes the space before it."""
    tokenizer = _byte_level(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"], _BRACKETS)
    tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def _unigram(
    normalizer: normalizers.Normalizer,
    special: list[str],
    template: Callable[[Tokenizer], processors.PostProcessor],
    unknown: str = "<unk>",
) -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizer, normalizers.Replace(Regex(" {2,}"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=600, special_tokens=special, unk_token=unknown, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    # The pieces are the trainer's; their scores are not, since these depend on its random order. Few, long pieces win.
    found = [(piece, len(piece) / 10 - 10) for piece in sorted(tokenizer.get_vocab()) if piece not in special]
    tokenizer.model = models.Unigram([*((token, 0.0) for token in special), *found], special.index(unknown), False)
    tokenizer.post_processor = template(tokenizer)
    return tokenizer


def _xlm_r() -> Tokenizer:
    return _unigram(normalizers.NFKC(), ["<s>", "<pad>", "</s>", "<unk>", "<mask>"], _ANGLES)


def _camembert() -> Tokenizer:
    """Like XLM-R's, but the first five places are taken, so that <s> and </s> stand at 5 and 6."""
    taken = ["<s>NOTUSED", "<pad>", "</s>NOTUSED", "<unk>", "<unk>NOTUSED"]
    return _unigram(normalizers.NFKC(), [*taken, "<s>", "</s>", "<mask>"], _ANGLES)


def _deberta_v2() -> Tokenizer:
    """Sentencepiece in BERT's template, white space at the borders stripped."""
    plain = normalizers.Sequence([normalizers.Strip(), normalizers.NFKC()])
    return _unigram(plain, ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"], _BRACKETS, "[UNK]")


def _albert() -> Tokenizer:
    plain = normalizers.Sequence([normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()])
    return _unigram(plain, ["<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]"], _BRACKETS)


def _xlnet() -> Tokenizer:
    template = _template("$A <sep> <cls>:2", "$A <sep> $B:1 <sep>:1 <cls>:2", "<sep>", "<cls>")
    return _unigram(normalizers.NFKC(), ["<unk>", "<cls>", "<sep>", "<pad>", "<mask>"], template)


# How to train it, segments, context first, CLS, PAD.
_KINDS: dict[str, tuple[Callable[[], Tokenizer], int, bool, str, str]] = {
    "bert": (_bert, 2, False, "[CLS]", "[PAD]"),
    "mpnet": (_mpnet, 0, False, "<s>", "<pad>"),
    "roberta": (_roberta, 0, False, "<s>", "<pad>"),
    "modernbert": (_modernbert, 0, False, "[CLS]", "[PAD]"),
    "xlm-r": (_xlm_r, 1, False, "<s>", "<pad>"),
    "camembert": (_camembert, 0, False, "<s>", "<pad>"),
    "albert": (_albert, 2, False, "[CLS]", "<pad>"),
    "deberta-v2": (_deberta_v2, 0, False, "[CLS]", "[PAD]"),
    "xlnet": (_xlnet, 3, True, "<cls>", "<pad>"),
}
NAMES = tuple(_KINDS)


@cache
def family(name: str) -> Family:
    """The trained tokenizer and our encoder."""
    train, segments, context_first, null, pad = _KINDS[name]
    tokenizer = train()
    config = EncoderConfig(
        segments=segments,
        context_first=context_first,
        null_token_id=tokenizer.token_to_id(null),
        pad_token_id=tokenizer.token_to_id(pad),
        position_limit=512,
    )
    return Family(tokenizer, config, Encoder(tokenizer, config), {"cls_token": null, "pad_token": pad})


def encoder(name: str) -> Encoder:
    """The encoder of one family."""
    return family(name).encoder
